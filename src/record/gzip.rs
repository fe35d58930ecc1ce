//! Records that their producer compressed.

use std::io::{ErrorKind, Read as _};

use flate2::bufread::MultiGzDecoder;

/// Whether this begins as gzip does (RFC 1952). No JSON and no KPL aggregate does.
pub(super) fn is_gzip(data: &[u8]) -> bool {
    data.starts_with(&[0x1F, 0x8B])
}

/// Unpacks all members, unless that is more than `limit_bytes`.
pub(super) fn unpack(data: &[u8], limit_bytes: usize) -> Result<Vec<u8>, String> {
    // The end says how long the last member is; deflate makes nothing a thousand times shorter.
    let said = data.last_chunk().map_or(0, |end| u32::from_le_bytes(*end) as usize);
    let mut unpacked =
        Vec::with_capacity(said.min(data.len().saturating_mul(1032)).min(limit_bytes));
    let limit = limit_bytes as u64;
    match MultiGzDecoder::new(data).take(limit + 1).read_to_end(&mut unpacked) {
        Ok(_) if unpacked.len() > limit_bytes => Err(format!(
            "gzip: it unpacks to more than the {limit_bytes} bytes that are left of a record's limit"
        )),
        Ok(_) => Ok(unpacked),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Err("gzip: it is cut off".into()),
        Err(error) => Err(format!("gzip: {error}")),
    }
}
