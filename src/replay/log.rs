//! Reads a log: a file or standard input, plain or gzip.

use std::{
    fmt,
    fs::File,
    io::{self, BufRead, BufReader, Cursor, Read},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use flate2::read::MultiGzDecoder;
use tokio::sync::mpsc;

use super::{
    ReplayError,
    entry::{Entry, parse},
};

/// A longer line is a bad one.
const LINE_LIMIT_BYTES: usize = 16 * 1024 * 1024;
/// How many lines, and bytes of messages, are handed on together.
const CHUNK_LINES: usize = 256;
const CHUNK_BYTES: usize = 64 * 1024;
/// How many chunks are read ahead.
const CHUNKS_AHEAD: usize = 4;

/// Where a log is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Log {
    Stdin,
    File(PathBuf),
}

impl fmt::Display for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdin => f.write_str("standard input"),
            Self::File(path) => write!(f, "{}", path.display()),
        }
    }
}

/// A line of a log, taken apart.
#[derive(Debug)]
pub(super) struct Line {
    /// From 1.
    pub number: u64,
    pub entries: Vec<Entry>,
    /// Why it, or a part of it, gives no message.
    pub problem: Option<String>,
    /// How much of the log was read with it, as it is stored.
    pub read_bytes: u64,
}

/// Opens a log, and gives its length as it is stored, where that is known.
pub(super) fn open(log: &Log) -> io::Result<(Box<dyn Read + Send>, Option<u64>)> {
    match log {
        Log::Stdin => Ok((Box::new(io::stdin()), None)),
        Log::File(path) => {
            let file = File::open(path)?;
            let metadata = file.metadata()?;
            if metadata.is_dir() {
                return Err(io::ErrorKind::IsADirectory.into());
            }
            Ok((Box::new(file), metadata.is_file().then_some(metadata.len())))
        }
    }
}

/// Reads lines from number `from` on, in a thread of its own, a little ahead of who takes them.
pub(super) fn read(
    log: Log,
    input: Box<dyn Read + Send>,
    from: u64,
) -> mpsc::Receiver<Result<Vec<Line>, ReplayError>> {
    let (to, lines) = mpsc::channel(CHUNKS_AHEAD);
    tokio::task::spawn_blocking(move || {
        let mut number = 0;
        let mut send = |chunk| to.blocking_send(Ok(chunk)).is_ok();
        let failed = match read_lines(input, from, &mut number, &mut send) {
            Ok(()) => return,
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => ReplayError::Tar { log },
            Err(source) => ReplayError::Read { log, line: number + 1, source },
        };
        // Nobody listens after a stop.
        let _ = to.blocking_send(Err(failed));
    });
    lines
}

/// Hands on chunks of lines until there are no more, or nobody takes them. `InvalidInput` stands for a
/// tar file.
fn read_lines(
    input: impl Read + Send + 'static,
    from: u64,
    number: &mut u64,
    send: &mut impl FnMut(Vec<Line>) -> bool,
) -> io::Result<()> {
    let read_bytes = Arc::<AtomicU64>::default();
    let mut input = unpacked(Counting { input, read_bytes: read_bytes.clone() })?;
    let (mut chunk, mut chunk_bytes) = (Vec::new(), 0);
    let mut line = Vec::new();
    loop {
        // Who writes a pipe may pause: what is there goes on before that is waited for.
        let may_wait = input.buffer().is_empty();
        let is_full = chunk.len() >= CHUNK_LINES || chunk_bytes >= CHUNK_BYTES;
        if (may_wait || is_full) && !chunk.is_empty() {
            chunk_bytes = 0;
            if !send(std::mem::take(&mut chunk)) {
                return Ok(());
            }
        }
        line.clear();
        let length = input.by_ref().take(LINE_LIMIT_BYTES as u64).read_until(b'\n', &mut line)?;
        if length == 0 {
            break;
        }
        if *number == 0 && line.get(257..262) == Some(b"ustar") {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        *number += 1;
        let too_long = length == LINE_LIMIT_BYTES && !line.ends_with(b"\n");
        if too_long {
            skip_line(&mut input)?;
        }
        if *number < from {
            continue;
        }
        let mut entries = Vec::new();
        let problem = if too_long {
            Some(format!("it is longer than {LINE_LIMIT_BYTES} bytes"))
        } else {
            parse(&line, &mut entries).err()
        };
        chunk_bytes += line.len();
        let read_bytes = read_bytes.load(Ordering::Relaxed);
        chunk.push(Line { number: *number, entries, problem, read_bytes });
    }
    if !chunk.is_empty() {
        send(chunk);
    }
    Ok(())
}

fn skip_line(input: &mut impl BufRead) -> io::Result<()> {
    loop {
        let buffer = input.fill_buf()?;
        let end = buffer.iter().position(|byte| *byte == b'\n');
        let length = end.map_or(buffer.len(), |end| end + 1);
        let is_over = end.is_some() || length == 0;
        input.consume(length);
        if is_over {
            return Ok(());
        }
    }
}

/// What is in it, which its first bytes tell and not its name.
fn unpacked(mut input: impl Read + Send + 'static) -> io::Result<BufReader<Box<dyn Read + Send>>> {
    let mut head = Vec::new();
    input.by_ref().take(2).read_to_end(&mut head)?;
    let is_gzip = head == [0x1F, 0x8B];
    let whole = Cursor::new(head).chain(input);
    let unpacked: Box<dyn Read + Send> =
        if is_gzip { Box::new(MultiGzDecoder::new(whole)) } else { Box::new(whole) };
    Ok(BufReader::with_capacity(64 * 1024, unpacked))
}

/// Counts what is read.
struct Counting<R> {
    input: R,
    read_bytes: Arc<AtomicU64>,
}

impl<R: Read> Read for Counting<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.input.read(buffer)?;
        self.read_bytes.fetch_add(length as u64, Ordering::Relaxed);
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use flate2::{Compression, write::GzEncoder};

    use super::*;

    fn lines(log: Vec<u8>, from: u64) -> io::Result<Vec<Line>> {
        let mut lines = Vec::new();
        let mut send = |chunk: Vec<Line>| {
            assert!(chunk.len() <= CHUNK_LINES);
            lines.extend(chunk);
            true
        };
        read_lines(Cursor::new(log), from, &mut 0, &mut send)?;
        Ok(lines)
    }

    fn gzip(content: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(content).expect("compressed");
        encoder.finish().expect("compressed")
    }

    fn log(count: usize) -> Vec<u8> {
        (1..=count).flat_map(|n| format!("{n},DIAG,12:00:00,x\n").into_bytes()).collect()
    }

    #[test]
    fn plain_and_gzip_of_several_members_give_the_same_lines() {
        let (one, two) = (log(700), log(3));
        let plain = lines([one.clone(), two.clone()].concat(), 1).expect("lines");
        let packed = [gzip(&one), gzip(&two)].concat();
        let length = packed.len() as u64;
        let packed = lines(packed, 1).expect("lines");
        assert_eq!(plain.len(), 703);
        for (plain, packed) in plain.iter().zip(&packed) {
            assert_eq!((plain.number, &plain.entries), (packed.number, &packed.entries));
        }
        assert_eq!(packed.last().map(|line| line.read_bytes), Some(length));
    }

    #[test]
    fn lines_before_the_first_wanted_one_are_passed_over() {
        let lines = lines(log(10), 8).expect("lines");
        assert_eq!(lines.iter().map(|line| line.number).collect::<Vec<u64>>(), [8, 9, 10]);
    }

    #[test]
    fn p9_a_line_without_end_takes_no_more_memory_than_the_limit_and_the_next_one_is_read() {
        let mut log = vec![b'x'; LINE_LIMIT_BYTES + 100];
        log.extend_from_slice(b"\n2,DIAG,12:00:00,x");
        let lines = lines(log, 1).expect("lines");
        assert!(lines[0].problem.as_ref().is_some_and(|why| why.contains("longer")));
        assert_eq!((lines[1].number, lines[1].entries.len()), (2, 1));
    }

    #[test]
    fn a_log_that_is_cut_off_is_an_error_after_its_lines() {
        let mut packed = gzip(&log(5));
        packed.truncate(packed.len() - 4);
        let error = lines(packed, 1).expect_err("cut off");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_tar_file_is_told() {
        let mut tar = vec![0; 512];
        tar[257..262].copy_from_slice(b"ustar");
        let error = lines(gzip(&[tar, log(5)].concat()), 1).expect_err("a tar file");
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
