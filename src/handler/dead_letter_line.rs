//! Reading dead letters back.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use jiff::Timestamp;
use serde::Deserialize;

use super::dead_letter::{DeadLetter, Kind, Line, Part, Place, VERSION};

/// A line that was read: a letter, or a part of one.
#[derive(Debug)]
pub(crate) struct ReadLine {
    /// Of a part, with the data of that part.
    pub letter: DeadLetter,
    pub part: Option<Part>,
}

/// Why a line is no dead letter. Says nothing of what is in it: a log gets this.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unreadable {
    #[error("not JSON from column {column} on: cut short or damaged")]
    NotJson { column: usize },
    #[error("no dead letter")]
    NoLetter,
    #[error("a dead letter of version {0}, and this program reads version {VERSION}")]
    Version(u32),
    #[error("its data is no Base64")]
    NoBase64,
}

impl ReadLine {
    pub(crate) fn parse(line: &[u8]) -> Result<Self, Unreadable> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        #[derive(Deserialize)]
        struct Read {
            kind: Kind,
            reason: String,
            #[serde(flatten)]
            place: Place,
            attempts: u32,
            given_up_at: Timestamp,
            application: Option<String>,
            worker: Option<String>,
            part: Option<Part>,
            data_base64: String,
        }
        let unreadable = |error: serde_json::Error| {
            // Its text may quote the line.
            tracing::debug!("a line is no dead letter: {error}");
            match error.classify() {
                serde_json::error::Category::Data => Unreadable::NoLetter,
                _ => Unreadable::NotJson { column: error.column() },
            }
        };
        let versioned: Line<Versioned> = serde_json::from_slice(line).map_err(unreadable)?;
        if versioned.dead_letter.version != VERSION {
            return Err(Unreadable::Version(versioned.dead_letter.version));
        }
        let Line::<Read> { dead_letter: read } =
            serde_json::from_slice(line).map_err(unreadable)?;
        let data = BASE64_STANDARD.decode(read.data_base64).map_err(|_| Unreadable::NoBase64)?;
        Ok(Self {
            letter: DeadLetter {
                kind: read.kind,
                reason: read.reason,
                place: read.place,
                attempts: read.attempts,
                given_up_at: read.given_up_at,
                application: read.application,
                worker: read.worker,
                data: data.into(),
            },
            part: read.part,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::handler::dead_letter::tests::letter;

    #[test]
    fn what_is_no_letter_is_told_without_quoting_it() {
        let whole = letter(1, "k", "secret").line();
        let text = String::from_utf8(whole.clone()).expect("UTF-8");
        for (line, unreadable) in [
            (&whole[..whole.len() / 2], Unreadable::NotJson { column: whole.len() / 2 }),
            (b"", Unreadable::NotJson { column: 0 }),
            (b"{\"message\":\"secret\"}", Unreadable::NoLetter),
            (text.replace("version\":1", "version\":2").as_bytes(), Unreadable::Version(2)),
            (text.replace("handler-failed", "secret").as_bytes(), Unreadable::NoLetter),
            (
                text.replace("_number\":\"1\"", "_number\":\"secret\"").as_bytes(),
                Unreadable::NoLetter,
            ),
            (text.replace("c2VjcmV0", "secret!").as_bytes(), Unreadable::NoBase64),
        ] {
            let error = ReadLine::parse(line).expect_err("no letter");
            assert_eq!(error, unreadable, "{}", String::from_utf8_lossy(line));
            assert!(!error.to_string().contains("secret"));
        }
    }

    #[test]
    fn fields_of_a_later_program_are_ignored() {
        let text = String::from_utf8(letter(1, "k", "x").line()).expect("UTF-8");
        let later = text.replace("\"attempts\"", "\"new\":{\"a\":[1]},\"attempts\"");
        assert_eq!(
            ReadLine::parse(later.as_bytes()).expect("a letter").letter,
            letter(1, "k", "x")
        );
    }

    proptest! {
        #[test]
        fn no_line_makes_it_panic(line in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = ReadLine::parse(&line);
        }
    }
}
