//! The line format of the day's log that analysts keep.

use std::io::Write as _;

use jiff::{
    Timestamp,
    civil::{Date, DateTime, Time},
};

use super::clock::EASTERN;

/// A line of the day's log: `MM/dd/yy,HH:mm:ss,` by New York's clocks, and the OCS text, such as
/// `03/01/22,00:00:02,101,DIAG,00:00:01,test1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ArchiveLine<'a> {
    /// When the message was received, by New York's clocks, to the second.
    pub received_at: DateTime,
    /// The OCS text.
    pub raw: &'a [u8],
}

impl<'a> ArchiveLine<'a> {
    /// Appends the line for a message, with a line break at its end. A line break within the message
    /// becomes a space: it would end the line.
    pub fn write(received_at: Timestamp, raw: &[u8], out: &mut Vec<u8>) {
        let at = received_at.to_zoned(EASTERN.clone());
        // Writing to a Vec cannot fail.
        let _ = write!(
            out,
            "{:02}/{:02}/{:02},{:02}:{:02}:{:02},",
            at.month(),
            at.day(),
            at.year().rem_euclid(100),
            at.hour(),
            at.minute(),
            at.second()
        );
        out.extend(raw.iter().map(|byte| if matches!(byte, b'\n' | b'\r') { b' ' } else { *byte }));
        out.push(b'\n');
    }

    /// Reads a line without its line break; `None` if it does not begin as these lines do. Years are
    /// those from 2000.
    pub fn parse(line: &'a [u8]) -> Option<Self> {
        let (stamp, raw) = line.split_at_checked("MM/dd/yy,HH:mm:ss,".len())?;
        let number = |at: usize| match stamp[at..at + 2] {
            [tens @ b'0'..=b'9', ones @ b'0'..=b'9'] => {
                Some((tens - b'0') as i8 * 10 + (ones - b'0') as i8)
            }
            _ => None,
        };
        let separators = [2, 5, 8, 11, 14, 17].map(|at| stamp[at]);
        if separators != *b"//,::," {
            return None;
        }
        let date = Date::new(2000 + i16::from(number(6)?), number(0)?, number(3)?).ok()?;
        let time = Time::new(number(9)?, number(12)?, number(15)?, 0).ok()?;
        Some(Self { received_at: date.to_datetime(time), raw })
    }

    /// The instant that [`received_at`](Self::received_at) means. In autumn an hour comes twice: of the
    /// two it is the one nearer to the line before, where that is known, and else the earlier one.
    /// `None` only at the ends of the calendar.
    pub fn instant(&self, line_before: Option<Timestamp>) -> Option<Timestamp> {
        let at = EASTERN.to_ambiguous_timestamp(self.received_at);
        let (first, second) = (at.earlier().ok()?, at.later().ok()?);
        let distance = |at: Timestamp| line_before.map(|before| at.duration_since(before).abs());
        Some(if distance(second) < distance(first) { second } else { first })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().expect("a time")
    }

    fn written(received_at: &str, raw: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        ArchiveLine::write(at(received_at), raw, &mut out);
        out
    }

    #[test]
    fn lines_are_those_of_the_archive() {
        // From the archive's own table.
        for (time, prefix) in [
            ("2022-03-01T04:59:59Z", "02/28/22,23:59:59,"),
            ("2022-03-01T05:00:02Z", "03/01/22,00:00:02,"),
            ("2022-03-01T06:59:59Z", "03/01/22,01:59:59,"),
            ("2022-03-01T07:00:00Z", "03/01/22,02:00:00,"),
            ("2022-11-06T05:30:00Z", "11/06/22,01:30:00,"),
            ("2022-11-06T06:30:00.999999Z", "11/06/22,01:30:00,"),
        ] {
            let line = written(time, b"101,DIAG,00:00:01,test1");
            assert_eq!(line, format!("{prefix}101,DIAG,00:00:01,test1\n").into_bytes(), "{time}");
        }
    }

    #[test]
    fn a_line_break_within_a_message_does_not_make_two_lines() {
        assert_eq!(written("2022-03-01T07:00:00Z", b"a\r\nb"), b"03/01/22,02:00:00,a  b\n");
    }

    #[test]
    fn the_hour_that_comes_twice_is_the_one_near_the_line_before() {
        let line = ArchiveLine::parse(b"11/06/22,01:30:00,x").expect("a line");
        let instant = |before: Option<&str>| line.instant(before.map(at)).expect("an instant");
        assert_eq!(instant(None), at("2022-11-06T05:30:00Z"));
        assert_eq!(instant(Some("2022-11-06T05:29:59Z")), at("2022-11-06T05:30:00Z"));
        assert_eq!(instant(Some("2022-11-06T06:29:59Z")), at("2022-11-06T06:30:00Z"));
    }

    #[test]
    fn other_lines_are_none() {
        for line in [
            "",
            "03/01/22,02:00:00",
            "4994,TSCH,02:00:06,R,RLD,W",
            "13/01/22,02:00:00,x",
            "03/01/22,24:00:00,x",
            "03-01-22,02:00:00,x",
            "0é/01/22,02:00:00,x",
        ] {
            assert_eq!(ArchiveLine::parse(line.as_bytes()), None, "{line}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back(
            second in 946_702_800i64..4_102_376_400,
            raw in prop::collection::vec(any::<u8>().prop_filter("a line", |b| !b"\r\n".contains(b)), 0..60),
        ) {
            let received_at = Timestamp::from_second(second).expect("in range");
            let mut out = Vec::new();
            ArchiveLine::write(received_at, &raw, &mut out);
            let line = ArchiveLine::parse(out.strip_suffix(b"\n").expect("a line")).expect("a line");
            prop_assert_eq!(line.raw, &raw);
            prop_assert_eq!(line.instant(Some(received_at)), Some(received_at));
        }
    }
}
