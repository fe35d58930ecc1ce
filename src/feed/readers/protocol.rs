//! What a feed and its readers say to each other: docs/feeds.md. Lines of JSON, pure but for their reading.

use std::io;

use serde::Deserialize;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt as _};

/// The version of the protocol.
const VERSION: u64 = 1;
/// The longest line that a reader may send, and how much is read at a time.
const LINE_BYTES: usize = 4096;
/// The longest name of a reader.
const NAME_BYTES: usize = 128;

/// The first line of a feed: how many messages it sends ahead of the acknowledgements.
pub(super) fn hello(window: usize) -> String {
    format!("{}\n", json!({"tramline": VERSION, "window": window}))
}

/// The last line to a reader that is refused.
pub(super) fn refusal(reason: &str) -> String {
    format!("{}\n", json!({"error": reason}))
}

/// The name in the first line of a reader; empty if it has none. An error for the reader otherwise.
pub(super) fn reader_name(line: &[u8]) -> Result<String, String> {
    #[derive(Deserialize)]
    struct Hello {
        tramline: u64,
        #[serde(default)]
        reader: String,
    }
    let hello: Hello = serde_json::from_slice(line).map_err(|error| {
        format!(r#"the first line must be {{"tramline":{VERSION},"reader":"NAME"}}: {error}"#)
    })?;
    if hello.tramline != VERSION {
        let theirs = hello.tramline;
        return Err(format!("this feed speaks version {VERSION}, and the reader {theirs}"));
    }
    if hello.reader.len() > NAME_BYTES {
        return Err(format!("the reader's name is longer than {NAME_BYTES} bytes"));
    }
    Ok(hello.reader)
}

/// The serial number that a line acknowledges. An error for the reader if it is no acknowledgement.
pub(super) fn acknowledged(line: &[u8]) -> Result<u64, String> {
    #[derive(Deserialize)]
    struct Acknowledgement {
        ack: u64,
    }
    serde_json::from_slice::<Acknowledgement>(line)
        .map(|line| line.ack)
        .map_err(|error| format!(r#"an answer must be {{"ack":SERIAL}}: {error}"#))
}

/// Lines from a reader, of limited length.
pub(super) struct Lines<R> {
    from: R,
    read: Vec<u8>,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    pub(super) fn new(from: R) -> Self {
        Self { from, read: Vec::with_capacity(LINE_BYTES) }
    }

    /// The next line that is not blank; `None` at the end, whatever was said of an unfinished one. If the
    /// call is dropped, nothing is lost.
    pub(super) async fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            if let Some(end) = self.read.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.read.drain(..=end).collect();
                if !line.trim_ascii().is_empty() {
                    return Ok(Some(line));
                }
            } else if self.read.len() >= LINE_BYTES {
                let told = format!("a line is longer than {LINE_BYTES} bytes");
                return Err(io::Error::new(io::ErrorKind::InvalidData, told));
            } else if (&mut self.from)
                .take((LINE_BYTES - self.read.len()) as u64)
                .read_buf(&mut self.read)
                .await?
                == 0
            {
                return Ok(None);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_lines_name_the_version() {
        assert_eq!(hello(1000), "{\"tramline\":1,\"window\":1000}\n");
        let name = |line: &str| reader_name(line.as_bytes());
        assert_eq!(name(r#"{"tramline":1,"reader":"green"}"#), Ok("green".to_owned()));
        assert_eq!(name(r#"{"tramline":1,"later":"fields are ignored"}"#), Ok(String::new()));
        assert!(name(r#"{"tramline":2}"#).expect_err("a version").contains("version 1"));
        for wrong in ["", "hello", "{}", r#"{"ack":1}"#, r#"{"tramline":1,"reader":7}"#] {
            let told = name(wrong).expect_err("no hello");
            assert!(told.contains(r#"{"tramline":1,"reader":"NAME"}"#), "{told}");
        }
        let long = format!(r#"{{"tramline":1,"reader":"{}"}}"#, "x".repeat(200));
        assert!(name(&long).is_err());
    }

    #[test]
    fn an_acknowledgement_names_a_serial_number() {
        assert_eq!(acknowledged(b"{\"ack\":17}\r\n"), Ok(17));
        for wrong in ["17", "{}", r#"{"ack":-1}"#, r#"{"ack":"17"}"#, r#"{"ack":1.5}"#, "\u{0}"] {
            assert!(acknowledged(wrong.as_bytes()).is_err(), "{wrong}");
        }
    }

    #[tokio::test]
    async fn lines_come_whole_and_are_of_limited_length() {
        let mut lines = Lines::new(&b"one\n\n \ntwo\nunfinished"[..]);
        assert_eq!(lines.next().await.expect("a line"), Some(b"one\n".to_vec()));
        assert_eq!(lines.next().await.expect("a line"), Some(b"two\n".to_vec()));
        assert_eq!(lines.next().await.expect("the end"), None);
        let endless = vec![b'x'; 100_000];
        let mut lines = Lines::new(&endless[..]);
        assert!(lines.next().await.is_err());
        assert!(lines.read.capacity() < 2 * LINE_BYTES);
    }
}
