//! From lines to the letters that are to be put, in order. Pure.

use std::{
    collections::{BTreeMap, HashSet},
    fmt,
    sync::Arc,
};

use bytes::Bytes;
use jiff::Timestamp;
use sha2::{Digest as _, Sha256};

use super::RedriveError;
use crate::{
    handler::{
        DeadLetter, KEY_LIMIT_CHARS, Kind, LetterId, Outgoing, Part, Place, RECORD_LIMIT_BYTES,
        ReadLine, RecordPlace, hexadecimal,
    },
    record::{Record, ShardName, unpack},
};

/// How many problems are kept to be told one by one.
const TOLD_PROBLEMS: usize = 20;

/// Which letters are put.
#[derive(Debug, Default)]
pub(crate) struct Selection {
    /// Letters of this kind, whether consumers can read them or not. Without: letters of any kind that
    /// consumers can read.
    pub kind: Option<Kind>,
    /// Letters given up at this time or later,
    pub since: Option<Timestamp>,
    /// and before this time.
    pub until: Option<Timestamp>,
    /// Letters with this partition key.
    pub partition_key: Option<String>,
}

impl Selection {
    fn takes(&self, letter: &DeadLetter, place: &RecordPlace) -> bool {
        self.kind.is_none_or(|kind| letter.kind == kind)
            && self.since.is_none_or(|since| letter.given_up_at >= since)
            && self.until.is_none_or(|until| letter.given_up_at < until)
            && self.partition_key.as_ref().is_none_or(|key| *key == place.partition_key)
    }
}

/// A letter that is to be put.
#[derive(Debug, Clone)]
pub(crate) struct Letter {
    pub id: LetterId,
    pub kind: Kind,
    pub place: RecordPlace,
    pub record: Outgoing,
    /// The id of the CloudEvent, if it is one.
    pub event_id: Option<String>,
}

/// What was found, beside the letters that are to be put.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    /// Left out by the selection.
    pub filtered: u64,
    /// Left out because no consumer can read them.
    pub not_messages: u64,
    /// Left out because they came over an OCS connection and were never in a stream.
    pub connections: u64,
    /// Copies of letters, which are put once.
    pub repeats: u64,
    /// Put by an earlier redrive.
    pub put_before: u64,
    /// Lines that are no letter, and letters that cannot be put.
    pub problems: u64,
    /// The first of them.
    pub told: Vec<Problem>,
}

/// Something that should be put and cannot be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Problem {
    /// Such as `line 17`.
    pub at: String,
    pub why: String,
}

/// Takes the lines of a source, in any order.
pub(super) struct Collector {
    selection: Selection,
    /// What Kinesis has by the journal.
    done: HashSet<LetterId>,
    /// What it may have.
    uncertain: HashSet<LetterId>,
    limit_bytes: usize,
    size_bytes: usize,
    seen: HashSet<LetterId>,
    parts: BTreeMap<PartsOf, Parts>,
    collected: Collected,
}

/// All letters of a source.
#[derive(Debug, Default)]
pub(super) struct Collected {
    /// In the order in which they are to be put.
    pub letters: Vec<Letter>,
    pub counts: Counts,
    /// Those that Kinesis may have, whether they are selected or not.
    pub uncertain: Vec<Letter>,
    /// The same, if they are not in this source.
    pub elsewhere: Vec<LetterId>,
}

/// Whose parts: the letter as it would be without data, and what is known of the data.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct PartsOf(LetterId, String, u32);

struct Parts {
    at: String,
    letter: DeadLetter,
    data: BTreeMap<u32, Bytes>,
}

impl Collector {
    /// `limit_bytes` bounds the letters that are to be put.
    pub(super) fn new(
        selection: Selection,
        done: HashSet<LetterId>,
        uncertain: HashSet<LetterId>,
        limit_bytes: usize,
    ) -> Self {
        Self {
            selection,
            done,
            uncertain,
            limit_bytes,
            size_bytes: 0,
            seen: HashSet::new(),
            parts: BTreeMap::new(),
            collected: Collected::default(),
        }
    }

    /// Takes a line. `at` says where it was.
    pub(super) fn line(&mut self, at: impl fmt::Display, line: &[u8]) -> Result<(), RedriveError> {
        if line.trim_ascii().is_empty() {
            return Ok(());
        }
        match ReadLine::parse(line) {
            Ok(ReadLine { letter, part: None }) => self.letter(at, letter),
            Ok(ReadLine { letter, part: Some(part) }) => self.part(at, letter, part),
            Err(unreadable) => {
                self.problem(at, unreadable);
                Ok(())
            }
        }
    }

    /// Notes something that should be put and cannot be.
    pub(super) fn problem(&mut self, at: impl fmt::Display, why: impl fmt::Display) {
        let counts = &mut self.collected.counts;
        counts.problems += 1;
        if counts.told.len() < TOLD_PROBLEMS {
            counts.told.push(Problem { at: at.to_string(), why: why.to_string() });
        }
    }

    fn part(
        &mut self,
        at: impl fmt::Display,
        letter: DeadLetter,
        part: Part,
    ) -> Result<(), RedriveError> {
        if part.number == 0 || part.number > part.of {
            self.problem(at, format!("part {} of {}", part.number, part.of));
            return Ok(());
        }
        let data = letter.data.clone();
        self.grow(data.len())?;
        let letter = DeadLetter { data: Bytes::new(), ..letter };
        let parts = self
            .parts
            .entry(PartsOf(letter.id(), part.data_sha256, part.of))
            .or_insert_with(|| Parts { at: at.to_string(), letter, data: BTreeMap::new() });
        // Every copy of a letter is cut in the same way.
        parts.data.entry(part.number).or_insert(data);
        Ok(())
    }

    fn letter(&mut self, at: impl fmt::Display, letter: DeadLetter) -> Result<(), RedriveError> {
        let Place::Record(place) = &letter.place else {
            self.collected.counts.connections += 1;
            return Ok(());
        };
        let id = letter.id();
        let event_id = readable(place, &letter.data);
        let found = |letter: &DeadLetter, place: &RecordPlace| Letter {
            id,
            kind: letter.kind,
            place: place.clone(),
            record: Outgoing {
                partition_key: place.partition_key.clone(),
                data: letter.data.clone(),
            },
            event_id: event_id.clone(),
        };
        if self.uncertain.remove(&id) {
            self.collected.uncertain.push(found(&letter, place));
        }
        let counts = &mut self.collected.counts;
        if !self.selection.takes(&letter, place) {
            counts.filtered += 1;
        } else if !self.seen.insert(id) {
            counts.repeats += 1;
        } else if self.done.contains(&id) {
            counts.put_before += 1;
        } else if self.selection.kind.is_none() && event_id.is_none() {
            counts.not_messages += 1;
        } else if !(1..=KEY_LIMIT_CHARS).contains(&place.partition_key.chars().count()) {
            self.problem(at, "its partition key has not 1 to 256 characters");
        } else if letter.data.len() + place.partition_key.len() > RECORD_LIMIT_BYTES {
            self.problem(at, format!("its {} bytes do not fit into a record", letter.data.len()));
        } else {
            let found = found(&letter, place);
            self.grow(found.record.data.len())?;
            self.collected.letters.push(found);
        }
        Ok(())
    }

    fn grow(&mut self, bytes: usize) -> Result<(), RedriveError> {
        self.size_bytes += bytes;
        match self.size_bytes <= self.limit_bytes {
            true => Ok(()),
            false => Err(RedriveError::TooMuch { limit_bytes: self.limit_bytes }),
        }
    }

    /// The letters in the order in which they are to be put: by stream, shard, sequence number and the
    /// places within the record. What shards come from what is not known here; but a shard that follows
    /// another has the higher number, so that the order within a partition key is that of its records.
    pub(super) fn finish(mut self) -> Result<Collected, RedriveError> {
        for (PartsOf(_, data_sha256, of), parts) in std::mem::take(&mut self.parts) {
            let Parts { at, letter, data } = parts;
            if data.len() != of as usize {
                let missing = of as usize - data.len();
                self.problem(at, format!("{missing} of the {of} parts of a letter are missing"));
                continue;
            }
            let data: Vec<u8> = data.into_values().flatten().collect();
            self.size_bytes = self.size_bytes.saturating_sub(data.len());
            if hexadecimal(&Sha256::digest(&data)) != data_sha256 {
                self.problem(at, "the parts of a letter do not fit together");
                continue;
            }
            self.letter(at, DeadLetter { data: data.into(), ..letter })?;
        }
        self.collected.elsewhere = self.uncertain.into_iter().collect();
        self.collected.letters.sort_by(|a, b| (&a.place, a.id).cmp(&(&b.place, b.id)));
        Ok(self.collected)
    }
}

/// The id of the first event, if a consumer of this version can read all of the data.
fn readable(place: &RecordPlace, data: &Bytes) -> Option<String> {
    let shard = ShardName {
        stream: place.stream.as_str().into(),
        shard: place.shard.as_str().into(),
        hash_key_range: None,
    };
    let record = Record {
        sequence_number: place.sequence_number.clone(),
        partition_key: place.partition_key.clone(),
        arrived_at: place.arrived_at,
        data: data.clone(),
    };
    let (mut messages, mut undecodable) = (Vec::new(), Vec::new());
    unpack(&Arc::new(shard), record, None, &mut messages, &mut undecodable);
    messages.first().filter(|_| undecodable.is_empty()).map(|message| message.id().to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{handler::dead_letter_tests::letter, ocs::EventSource};

    fn event(raw: &str) -> Vec<u8> {
        let source = EventSource::new("k".into(), "s", None);
        source.event("2021-08-13T12:00:00Z", raw.as_bytes()).json
    }

    fn message(sequence_number: u64, key: &str) -> DeadLetter {
        letter(sequence_number, key, event(&format!("{sequence_number},DIAG,12:00:00,{key}")))
    }

    fn undecodable(sequence_number: u64) -> DeadLetter {
        DeadLetter { kind: Kind::Undecodable, ..letter(sequence_number, "k", "\u{1}garbage") }
    }

    fn collector(selection: Selection) -> Collector {
        Collector::new(selection, HashSet::new(), HashSet::new(), usize::MAX)
    }

    fn collect(selection: Selection, letters: &[DeadLetter]) -> Collected {
        let mut collector = collector(selection);
        for (n, letter) in (1..).zip(letters) {
            collector.line(format_args!("line {n}"), &letter.line()).expect("bounded");
        }
        collector.finish().expect("bounded")
    }

    fn numbers(letters: &[Letter]) -> Vec<&str> {
        letters.iter().map(|letter| letter.place.sequence_number.as_str()).collect()
    }

    fn moved(letter: DeadLetter, change: impl Fn(&mut RecordPlace)) -> DeadLetter {
        let Place::Record(mut place) = letter.place else { panic!("a record") };
        change(&mut place);
        DeadLetter { place: Place::Record(place), ..letter }
    }

    #[test]
    fn letters_are_put_in_the_order_of_their_records_each_once_as_they_were() {
        let last = moved(message(1, "a"), |place| place.shard = "shardId-1".into());
        let second = moved(message(9, "a"), |place| place.sub_sequence_number = Some(10));
        let letters =
            [last.clone(), message(10, "b"), second, message(9, "a"), last, message(10, "b")];
        let Collected { letters, counts, .. } = collect(Selection::default(), &letters);
        assert_eq!(numbers(&letters), ["9", "9", "10", "1"]);
        assert_eq!(letters[1].place.sub_sequence_number, Some(10));
        assert_eq!(counts.repeats, 2);
        assert_eq!(letters[2].record.partition_key, "b");
        assert_eq!(letters[2].record.data, event("10,DIAG,12:00:00,b"));
        assert!(letters[2].event_id.as_deref().is_some_and(|id| id.ends_with('=')));
    }

    #[test]
    fn what_no_consumer_can_read_is_put_only_when_it_is_asked_for() {
        let of_connection = DeadLetter {
            place: Place::Connection {
                connection: "c".into(),
                received_at: "t".into(),
                length_bytes: 1,
            },
            ..undecodable(1)
        };
        // An earlier version did not know it.
        let readable_now = DeadLetter { kind: Kind::Undecodable, ..message(3, "k") };
        let letters = [message(1, "k"), undecodable(2), readable_now, of_connection];
        let Collected { letters: put, counts, .. } = collect(Selection::default(), &letters);
        assert_eq!(numbers(&put), ["1", "3"]);
        assert_eq!((counts.not_messages, counts.connections, counts.filtered), (1, 1, 0));

        let asked = Selection { kind: Some(Kind::Undecodable), ..Selection::default() };
        let Collected { letters: put, counts, .. } = collect(asked, &letters);
        assert_eq!(numbers(&put), ["2", "3"]);
        assert_eq!(put[0].record.data, "\u{1}garbage");
        assert_eq!((counts.not_messages, counts.connections, counts.filtered), (0, 1, 1));
    }

    #[test]
    fn letters_are_chosen_by_time_and_key() {
        let at = |second: u32, letter| DeadLetter {
            given_up_at: format!("2025-07-02T15:00:{second:02}Z").parse().expect("a time"),
            ..letter
        };
        let letters = [at(1, message(1, "a")), at(2, message(2, "b")), at(3, message(3, "b"))];
        let time = |text: &str| text.parse().ok();
        let chosen = |since, until, key: Option<&str>| {
            let partition_key = key.map(str::to_owned);
            let selection = Selection { kind: None, since, until, partition_key };
            let Collected { letters, counts, .. } = collect(selection, &letters);
            (numbers(&letters).join(" "), counts.filtered)
        };
        let second = time("2025-07-02T15:00:02Z");
        assert_eq!(chosen(second, None, None), ("2 3".into(), 1));
        assert_eq!(chosen(None, second, None), ("1".into(), 2));
        assert_eq!(chosen(None, None, Some("b")), ("2 3".into(), 1));
        assert_eq!(chosen(None, None, Some("none")), ("".into(), 3));
    }

    #[test]
    fn what_the_journal_has_is_not_put_and_what_it_does_not_know_is_kept_also_if_not_chosen() {
        let letters = [message(1, "a"), message(2, "a"), message(3, "b")];
        let done = HashSet::from([letters[0].id()]);
        let elsewhere = message(4, "a").id();
        let uncertain = HashSet::from([letters[1].id(), letters[2].id(), elsewhere]);
        let selection = Selection { partition_key: Some("a".into()), ..Selection::default() };
        let mut collector = Collector::new(selection, done, uncertain, usize::MAX);
        for letter in &letters {
            collector.line("", &letter.line()).expect("bounded");
        }
        let collected = collector.finish().expect("bounded");
        assert_eq!(numbers(&collected.letters), ["2"]);
        assert_eq!((collected.counts.put_before, collected.counts.filtered), (1, 1));
        assert_eq!(numbers(&collected.uncertain), ["2", "3"]);
        assert_eq!(collected.elsewhere, [elsewhere]);
    }

    #[test]
    fn p9_lines_that_are_no_letter_are_told_with_their_place_and_stop_nothing() {
        let mut collector = collector(Selection::default());
        let whole = message(1, "k").line();
        let [no_key, long_key] = [(5, String::new()), (6, "é".repeat(257))].map(|(n, key)| {
            moved(message(n, "k"), |place| place.partition_key.clone_from(&key)).line()
        });
        let large = letter(3, "k", event(&"x".repeat(1024 * 1024))).line();
        let lines: [&[u8]; 7] = [
            b"{\"message\":\"a log line\"}\n",
            &whole,
            b"",
            &whole[..60],
            &no_key,
            &long_key,
            &large,
        ];
        for (n, line) in (1..).zip(lines) {
            collector.line(format_args!("line {n}"), line).expect("bounded");
        }
        let Collected { letters, counts, .. } = collector.finish().expect("bounded");
        assert_eq!(numbers(&letters), ["1"]);
        assert_eq!(counts.problems, 5);
        let told: Vec<String> =
            counts.told.iter().map(|p| format!("{}: {}", p.at, p.why)).collect();
        assert_eq!(told[0], "line 1: no dead letter");
        assert!(told[1].starts_with("line 4: not JSON"));
        assert!(told[2].starts_with("line 5: its partition key"));
        assert!(told[3].starts_with("line 6: its partition key"));
        assert!(told[4].starts_with("line 7: its 10487"), "{}", told[4]);
    }

    #[test]
    fn p9_a_letter_in_parts_is_put_together_from_all_copies_and_missing_parts_are_told() {
        let whole = DeadLetter { kind: Kind::Undecodable, ..letter(1, "k", vec![b'x'; 1_048_000]) };
        let lost = DeadLetter { kind: Kind::Undecodable, ..letter(2, "k", vec![b'y'; 1_048_000]) };
        let asked = Selection { kind: Some(Kind::Undecodable), ..Selection::default() };
        let mut collector = collector(asked);
        let copy = DeadLetter { reason: "longer than before".into(), ..whole.clone() };
        let (parts, copies, lost) =
            (whole.lines(1024 * 1024), copy.lines(1024 * 1024), lost.lines(1024 * 1024));
        for line in [&copies[1], &lost[0], &parts[1], &parts[0]] {
            collector.line("there", line).expect("bounded");
        }
        let Collected { letters, counts, .. } = collector.finish().expect("bounded");
        assert_eq!(numbers(&letters), ["1"]);
        assert_eq!(letters[0].record.data, whole.data);
        assert_eq!(letters[0].id, whole.id());
        assert_eq!(counts.told[0].why, "1 of the 2 parts of a letter are missing");
        assert_eq!(counts.problems, 1);
    }

    #[test]
    fn more_than_can_be_held_is_refused_with_what_to_do() {
        let mut collector =
            Collector::new(Selection::default(), HashSet::new(), HashSet::new(), 2 * 1024 * 1024);
        let large = |n| letter(n, "k", event(&"x".repeat(1_000_000))).line();
        collector.line("", &large(1)).expect("fits");
        collector.line("", &large(2)).expect("fits");
        let error = collector.line("", &large(3)).expect_err("too much").to_string();
        assert!(error.contains("more than 2 MiB") && error.contains("--since"), "{error}");
    }

    proptest! {
        /// In whatever order lines are read, and however often, a key's letters keep their order.
        #[test]
        fn p7_letters_of_a_key_are_put_in_order_once(
            keys in prop::collection::vec(0_u8..3, 1..15),
            picks in prop::collection::vec(any::<prop::sample::Index>(), 10),
        ) {
            let letters: Vec<DeadLetter> = (1..).zip(&keys)
                .map(|(n, key)| message(n, &key.to_string()))
                .collect();
            let lines: Vec<DeadLetter> = letters.iter().rev()
                .chain(picks.iter().map(|pick| pick.get(&letters)))
                .cloned()
                .collect();
            let put = collect(Selection::default(), &lines);
            prop_assert_eq!(put.counts.repeats, 10);
            let put: Vec<Bytes> = put.letters.into_iter().map(|letter| letter.record.data).collect();
            let expected: Vec<Bytes> = letters.into_iter().map(|letter| letter.data).collect();
            prop_assert_eq!(put, expected);
        }
    }
}
