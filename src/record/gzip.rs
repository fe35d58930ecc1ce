//! Records that their producer compressed.

use std::io::{ErrorKind, Read as _};

use flate2::bufread::MultiGzDecoder;

/// Whether this begins as gzip does (RFC 1952). No JSON and no KPL aggregate does.
pub(super) fn is_gzip(data: &[u8]) -> bool {
    data.starts_with(&[0x1F, 0x8B])
}

/// Unpacks all members, unless that is more than `left_bytes`, and takes what it gave from those: also when
/// it fails, so that many bombs cost no more than one.
pub(super) fn unpack(data: &[u8], left_bytes: &mut usize) -> Result<Vec<u8>, String> {
    // The end says how long the last member is; deflate makes nothing more than 1032 times shorter.
    let said = data.last_chunk().map_or(0, |end| u32::from_le_bytes(*end) as usize);
    let mut unpacked = Vec::with_capacity(said.min(data.len() * 1032).min(*left_bytes));
    let read = MultiGzDecoder::new(data).take(*left_bytes as u64 + 1).read_to_end(&mut unpacked);
    let had_bytes = std::mem::replace(left_bytes, left_bytes.saturating_sub(unpacked.len()));
    match read {
        Ok(_) if unpacked.len() > had_bytes => Err(format!(
            "gzip: it unpacks to more than the {had_bytes} bytes that are left of a record's limit"
        )),
        Ok(_) => Ok(unpacked),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Err("gzip: it is cut off".into()),
        Err(error) => Err(format!("gzip: {error}")),
    }
}
