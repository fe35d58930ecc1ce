//! What of one service day of one shard is archived, and what waits to be. Pure.

use std::{collections::VecDeque, fmt};

use crate::{record::Message, shard::SequenceNumber};

/// A message's place in its shard.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    sequence_number: SequenceNumber,
    sub_sequence_number: u64,
}

impl Place {
    pub(super) fn of(message: &Message) -> Self {
        Self {
            sequence_number: message.sequence_number().clone(),
            sub_sequence_number: message.sub_sequence_number(),
        }
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        let (number, sub) = text.split_once('-')?;
        let sequence_number = SequenceNumber::parse(number)?;
        Some(Self { sequence_number, sub_sequence_number: sub.parse().ok()? })
    }
}

/// With as many digits as AWS writes, so that names of objects stand in the order of the shard.
impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:0>56}-{:010}", self.sequence_number.as_str(), self.sub_sequence_number)
    }
}

/// One service day of one shard: its objects, as far as they are known, and the lines that wait to
/// become the next one. `A` is what says that a message is finished.
pub(super) struct Day<A> {
    /// Up to here, messages of the day are in objects.
    archived_to: Option<Place>,
    /// Where the objects begin that were there when the day was opened, and have not been reached.
    ahead: VecDeque<Place>,
    waiting: VecDeque<Waiting<A>>,
    /// The lines of all that waits.
    lines: Vec<u8>,
}

struct Waiting<A> {
    place: Place,
    length_bytes: usize,
    ack: A,
}

/// An object to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Object<'a> {
    /// The place of its first message, which names it.
    pub first: &'a Place,
    /// The place of its last message.
    pub last: &'a Place,
    pub lines: &'a [u8],
}

impl<A> Day<A> {
    /// A day whose objects begin at `starts`.
    pub(super) fn new(mut starts: Vec<Place>) -> Self {
        starts.sort_unstable();
        Self {
            archived_to: None,
            ahead: starts.into(),
            waiting: VecDeque::new(),
            lines: Vec::new(),
        }
    }

    /// The object in which this message may be already, if there is one. Before the message is taken,
    /// what waits is to be written, and the object's end to be [noted](Self::archived).
    pub(super) fn meets(&mut self, place: &Place) -> Option<Place> {
        let mut met = None;
        // They follow each other: the last one that begins before it ends last.
        while self.ahead.front().is_some_and(|start| start <= place) {
            met = self.ahead.pop_front();
        }
        met
    }

    /// Takes a message, whose line `write` appends; or gives the ack back if it is archived.
    pub(super) fn take(
        &mut self,
        place: Place,
        ack: A,
        write: impl FnOnce(&mut Vec<u8>),
    ) -> Option<A> {
        if self.archived_to.as_ref().is_some_and(|end| place <= *end) {
            return Some(ack);
        }
        let before = self.lines.len();
        write(&mut self.lines);
        let length_bytes = self.lines.len() - before;
        self.waiting.push_back(Waiting { place, length_bytes, ack });
        None
    }

    /// What waits, as an object.
    pub(super) fn object(&self) -> Option<Object<'_>> {
        let (first, last) = (self.waiting.front()?, self.waiting.back()?);
        Some(Object { first: &first.place, last: &last.place, lines: &self.lines })
    }

    /// Notes that messages are archived up to `end`, and gives the acks of those that waited.
    pub(super) fn archived(&mut self, end: Place) -> Vec<A> {
        let count = self.waiting.iter().take_while(|waiting| waiting.place <= end).count();
        let bytes: usize =
            self.waiting.iter().take(count).map(|waiting| waiting.length_bytes).sum();
        self.lines.drain(..bytes);
        self.archived_to = self.archived_to.take().max(Some(end));
        self.waiting.drain(..count).map(|waiting| waiting.ack).collect()
    }

    /// Gives up what waits.
    pub(super) fn give_up(self) -> impl Iterator<Item = A> {
        self.waiting.into_iter().map(|waiting| waiting.ack)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn place(number: u64) -> Place {
        Place::parse(&format!("{}-{}", number / 3, number % 3)).expect("a place")
    }

    #[test]
    fn a_place_is_written_in_the_order_of_the_shard_and_reads_back() {
        let place = |number: &str, sub| Place {
            sequence_number: SequenceNumber::parse(number).expect("a number"),
            sub_sequence_number: sub,
        };
        let places = [place("9", 0), place("9", 2), place("9", 10), place("10", 0)];
        assert!(places.is_sorted());
        let names = places.clone().map(|place| place.to_string());
        assert!(names.is_sorted(), "{names:?}");
        assert_eq!(names.map(|name| Place::parse(&name).expect("a place")), places);
        for wrong in ["", "1", "1-", "-1", "a-1", "1-b"] {
            assert_eq!(Place::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn what_is_archived_is_finished_and_not_written_again() {
        let mut day = Day::new(vec![place(5), place(2)]);
        let line = |n: u64| move |lines: &mut Vec<u8>| lines.extend(format!("{n}\n").bytes());
        assert_eq!(day.meets(&place(1)), None);
        assert_eq!(day.take(place(1), 1, line(1)), None);
        // An object begins here: it is to be looked at, after what waits is written.
        assert_eq!(day.meets(&place(3)), Some(place(2)));
        let object = day.object().expect("an object");
        assert_eq!((object.first, object.last, object.lines), (&place(1), &place(1), &b"1\n"[..]));
        assert_eq!(day.archived(place(1)), [1]);
        assert!(day.archived(place(3)).is_empty());
        assert_eq!(day.take(place(3), 3, line(3)), Some(3));
        assert_eq!(day.take(place(4), 4, line(4)), None);
        assert_eq!(day.object().expect("an object").lines, b"4\n");
    }

    /// Objects by name, written as S3 does with a condition: the first one stays.
    #[derive(Default)]
    struct Bucket(BTreeMap<Place, (Place, Vec<u8>)>);

    impl Bucket {
        fn write(&mut self, day: &mut Day<u64>) -> Vec<u64> {
            let mut finished = Vec::new();
            while let Some(object) = day.object() {
                let (first, content) = (object.first.clone(), (object.last.clone(), object.lines));
                let (end, _) =
                    self.0.entry(first).or_insert_with(|| (content.0, content.1.to_vec()));
                finished.extend(day.archived(end.clone()));
            }
            finished
        }
    }

    proptest! {
        /// Writers of one shard that do not know of each other: each begins anywhere before the end of
        /// what is finished, as after a crash or for one that lost its lease and does not know it yet.
        #[test]
        fn p1_writers_that_overlap_in_any_way_leave_every_message_once_and_in_order(
            steps in prop::collection::vec((0usize..3, 0u8..10), 1..300),
            count in 1u64..60,
        ) {
            let mut bucket = Bucket::default();
            let mut writers: [(u64, Day<u64>); 3] = std::array::from_fn(|_| (0, Day::new(Vec::new())));
            // Up to where everything is finished: no checkpoint is beyond it.
            let mut finished = vec![false; count as usize];
            let steps = steps.into_iter().chain((0..count).map(|_| (0, 5))).chain([(0, 9)]);
            for (n, action) in steps {
                let (next, day) = &mut writers[n];
                match action {
                    // A restart, from a checkpoint or from earlier.
                    0 | 1 => {
                        let checkpoint = finished.iter().take_while(|done| **done).count() as u64;
                        *next = if action == 0 { checkpoint } else { checkpoint / 2 };
                        *day = Day::new(bucket.0.keys().cloned().collect());
                    }
                    2..=8 if *next < count => {
                        if let Some(met) = day.meets(&place(*next)) {
                            for done in bucket.write(day) {
                                finished[done as usize] = true;
                            }
                            let end = bucket.0[&met].0.clone();
                            for done in day.archived(end) {
                                finished[done as usize] = true;
                            }
                        }
                        let line = format!("{next}\n");
                        let write = |lines: &mut Vec<u8>| lines.extend(line.bytes());
                        if let Some(done) = day.take(place(*next), *next, write) {
                            finished[done as usize] = true;
                        }
                        *next += 1;
                    }
                    _ => {
                        for done in bucket.write(day) {
                            finished[done as usize] = true;
                        }
                    }
                }
            }
            let archived: Vec<u8> = bucket.0.values().flat_map(|(_, lines)| lines.clone()).collect();
            let to = writers[0].0;
            let expected: String = (0..to.max(finished.iter().rposition(|done| *done).map_or(0, |n| n as u64 + 1)))
                .map(|n| format!("{n}\n"))
                .collect();
            prop_assert_eq!(String::from_utf8_lossy(&archived), expected);
        }
    }
}
