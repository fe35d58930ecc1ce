//! Watching the OCS sequence numbers.

use std::collections::HashMap;

use jiff::{SignedDuration, Timestamp, civil::Date};

use super::clock::EASTERN;

/// A sender starts its numbers again at midnight. Its clock and ours may differ by this much.
const MARGIN: SignedDuration = SignedDuration::from_mins(5);

/// Watches the OCS sequence numbers of each sender: messages that OCS sent and that did not arrive show
/// as a [`Gap`](SequenceStep::Gap).
///
/// A sender counts its messages over all types and lines, and starts again around midnight in
/// America/New_York. Two senders count apart, so each is known by the address it sends from:
/// [`Message::source_ip`](crate::Message::source_ip).
///
/// The numbers of one sender must be given in the order in which it sent them. A Kinesis shard keeps
/// that order for a connection. A sender that connects anew may come out of another shard, unless the
/// producer makes its partition key of the host alone
/// ([`PartitionKey::HostHash`](crate::PartitionKey::HostHash)).
///
/// ```
/// use jiff::Timestamp;
/// use tramline::ocs::{self, SequenceMonitor, SequenceStep};
///
/// let mut monitor = SequenceMonitor::new(100);
/// let at: Timestamp = "2025-07-02T15:00:00Z".parse()?;
/// let mut step = |line: &str| {
///     let counter = ocs::counter(line.as_bytes())?;
///     Some(monitor.observe("10.0.0.2", counter, at))
/// };
/// assert_eq!(step("41,DIAG,11:00:00,a"), Some(SequenceStep::First));
/// assert_eq!(step("42,DIAG,11:00:00,b"), Some(SequenceStep::Next));
/// assert_eq!(step("45,DIAG,11:00:00,c"), Some(SequenceStep::Gap { last: 42, missing: 2 }));
/// assert_eq!(step("garbage"), None);
/// # Ok::<_, jiff::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct SequenceMonitor {
    senders: HashMap<Box<str>, Sender>,
    capacity: usize,
    /// How many numbers were given: a clock for which sender was heard last.
    observed: u64,
}

/// How a sequence number follows the one before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum SequenceStep {
    /// Nothing is known of the sender's earlier numbers.
    First,
    /// One more, as it should be.
    Next,
    /// Messages are missing in between.
    Gap {
        /// The number before.
        last: u64,
        /// How many are missing.
        missing: u64,
    },
    /// A number that was there before: since the last gap, every number from the first one up to the
    /// highest was there. Kinesis and a retry after a lost answer may bring messages twice.
    Repeat,
    /// A number below those seen since the last gap. The sender lost count, or messages changed places.
    /// From here on it is counted from this number.
    Backwards {
        /// The number before.
        last: u64,
    },
    /// The sender started again, as it does every midnight. Whether its first number is 0 or 1 is not
    /// public; if this one is higher than that, the messages below it are missing. How many are missing
    /// at the end of the day before cannot be told.
    Reset {
        /// The number before.
        last: u64,
    },
}

/// What is known of a sender.
#[derive(Debug, Clone)]
struct Sender {
    /// All numbers from here to `last` were there.
    first: u64,
    last: u64,
    /// When `last` was.
    at: Timestamp,
    /// The date at whose beginning these numbers started, if that was seen.
    day: Date,
    /// When it was heard, by the monitor's own count.
    heard: u64,
}

impl SequenceMonitor {
    /// Watches at most `senders` senders, at least one. If there are more, it forgets the one that was
    /// quiet for longest.
    pub fn new(senders: usize) -> Self {
        Self { senders: HashMap::new(), capacity: senders.max(1), observed: 0 }
    }

    /// Takes the number of the next message of `sender`, which was sent or received at `at`.
    ///
    /// `at` is the event's time or, where the message is understood, [`Header::at`](super::Header::at);
    /// not the time of reading it from the stream, which may be long after.
    pub fn observe(&mut self, sender: &str, counter: u64, at: Timestamp) -> SequenceStep {
        self.observed += 1;
        if let Some(known) = self.senders.get_mut(sender) {
            known.heard = self.observed;
            return known.step(counter, at);
        }
        if self.senders.len() >= self.capacity {
            let quiet = self.senders.iter().min_by_key(|(_, sender)| sender.heard);
            if let Some(quiet) = quiet.map(|(sender, _)| sender.clone()) {
                self.senders.remove(&quiet);
            }
        }
        let new =
            Sender { first: counter, last: counter, at, day: Date::MIN, heard: self.observed };
        self.senders.insert(sender.into(), new);
        SequenceStep::First
    }
}

impl Sender {
    fn step(&mut self, number: u64, at: Timestamp) -> SequenceStep {
        let last = self.last;
        if last.checked_add(1) == Some(number) {
            (self.last, self.at) = (number, at);
            return SequenceStep::Next;
        }
        let step = if let Some(day) = self.reset(number, at) {
            self.day = day;
            SequenceStep::Reset { last }
        } else if number > last {
            SequenceStep::Gap { last, missing: number - last - 1 }
        } else if number >= self.first {
            return SequenceStep::Repeat;
        } else {
            // Since when the sender counts is not known any more.
            self.day = Date::MIN;
            SequenceStep::Backwards { last }
        };
        (self.first, self.last, self.at) = (number, number, at);
        step
    }

    /// The date whose numbers start here, if they do: a midnight has surely passed since the number
    /// before, or one may have and the number is much smaller. It happens once a midnight.
    fn reset(&self, number: u64, at: Timestamp) -> Option<Date> {
        let day = self.day.max(date(self.at, -MARGIN));
        let (surely, perhaps) = (date(at, -MARGIN), date(at, MARGIN));
        if surely > day {
            Some(surely)
        } else {
            (perhaps > day && number <= self.last / 2).then_some(perhaps)
        }
    }
}

fn date(at: Timestamp, moved: SignedDuration) -> Date {
    // It cannot be moved only at the ends of the calendar.
    at.checked_add(moved).unwrap_or(at).to_zoned(EASTERN.clone()).date()
}

/// The OCS sequence number of a line, without understanding the rest; `None` if it begins with no
/// number.
pub fn counter(line: &[u8]) -> Option<u64> {
    let field = line.split(|&byte| byte == b',').next()?;
    str::from_utf8(field).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().expect("a time")
    }

    /// What becomes of numbers given at these times of one summer night in Boston.
    fn steps<const N: usize>(numbers: [(&str, u64); N]) -> [SequenceStep; N] {
        let mut monitor = SequenceMonitor::new(1);
        numbers.map(|(time, number)| monitor.observe("a", number, at(&format!("{time}-04:00"))))
    }

    const NOON: &str = "2025-07-02T12:00:00";

    #[test]
    fn every_step_of_a_sender_is_told_apart() {
        let numbers = [7, 8, 11, 12, 12, 11, 13, 9, 10, 11];
        assert_eq!(
            steps(numbers.map(|number| (NOON, number))),
            [
                SequenceStep::First,
                SequenceStep::Next,
                SequenceStep::Gap { last: 8, missing: 2 },
                SequenceStep::Next,
                SequenceStep::Repeat,
                SequenceStep::Repeat,
                SequenceStep::Next,
                SequenceStep::Backwards { last: 13 },
                SequenceStep::Next,
                SequenceStep::Next,
            ]
        );
    }

    #[test]
    fn a_sender_that_starts_again_at_noon_goes_backwards_once() {
        let numbers = [70_000, 1, 2].map(|number| (NOON, number));
        assert_eq!(
            steps(numbers),
            [SequenceStep::First, SequenceStep::Backwards { last: 70_000 }, SequenceStep::Next]
        );
    }

    #[test]
    fn a_sender_starts_again_around_midnight_also_where_its_clock_differs_from_ours() {
        for time in ["2025-07-02T23:59:57", "2025-07-03T00:00:00", "2025-07-03T00:04:00"] {
            let numbers = [("2025-07-02T23:56:00", 89_999), (time, 90_000), (time, 1), (time, 2)];
            let [.., reset, next] = steps(numbers);
            assert_eq!(reset, SequenceStep::Reset { last: 90_000 }, "{time}");
            assert_eq!(next, SequenceStep::Next);
        }
    }

    #[test]
    fn a_sender_that_counts_on_over_midnight_did_not_start_again() {
        let numbers = [
            ("2025-07-02T23:59:59", 90_000),
            ("2025-07-03T00:00:01", 90_001),
            ("2025-07-03T00:00:02", 90_003),
            ("2025-07-03T00:00:03", 90_002),
            ("2025-07-03T00:00:04", 1),
        ];
        let [_, next, gap, back, reset] = steps(numbers);
        assert_eq!(next, SequenceStep::Next);
        assert_eq!(gap, SequenceStep::Gap { last: 90_001, missing: 1 });
        assert_eq!(back, SequenceStep::Backwards { last: 90_003 });
        assert_eq!(reset, SequenceStep::Reset { last: 90_002 });
    }

    #[test]
    fn a_sender_starts_again_once_a_midnight() {
        let numbers = [
            ("2025-07-02T23:59:59", 90_000),
            ("2025-07-03T00:00:01", 1),
            ("2025-07-03T00:00:02", 2),
            ("2025-07-03T00:00:03", 3),
            ("2025-07-03T00:00:04", 1),
            ("2025-07-03T00:00:05", 0),
        ];
        let [_, reset, .., repeat, back] = steps(numbers);
        assert_eq!(reset, SequenceStep::Reset { last: 90_000 });
        assert_eq!(repeat, SequenceStep::Repeat);
        assert_eq!(back, SequenceStep::Backwards { last: 3 });
    }

    #[test]
    fn a_night_without_messages_hides_no_reset() {
        let evening = ("2025-07-02T23:00:00", 80_000);
        for (time, number) in [
            ("2025-07-03T05:33:34", 7_422),
            // More than the day before had, by evening.
            ("2025-07-03T23:30:00", 85_000),
            ("2025-07-05T00:01:00", 20),
        ] {
            assert_eq!(steps([evening, (time, number)])[1], SequenceStep::Reset { last: 80_000 });
        }
        // After a quiet day the next midnight still counts.
        let numbers = [evening, ("2025-07-03T23:57:00", 60_000), ("2025-07-04T00:00:01", 1)];
        assert_eq!(steps(numbers)[2], SequenceStep::Reset { last: 60_000 });
    }

    #[test]
    fn a_clock_that_was_years_ahead_hides_one_midnight_and_not_the_next() {
        let numbers = [
            ("2025-07-02T12:00:00", 10),
            ("2035-07-02T12:00:00", 15),
            ("2025-07-02T12:00:02", 16),
            ("2025-07-03T00:00:00", 1),
            ("2025-07-03T23:59:00", 2),
            ("2025-07-04T00:00:00", 1),
        ];
        let [_, ahead, _, hidden, _, seen] = steps(numbers);
        assert_eq!(ahead, SequenceStep::Reset { last: 10 });
        assert_eq!(hidden, SequenceStep::Backwards { last: 16 });
        assert_eq!(seen, SequenceStep::Reset { last: 2 });
    }

    #[test]
    fn senders_count_apart_and_the_quietest_is_forgotten() {
        let mut monitor = SequenceMonitor::new(2);
        let mut step = |sender, number| monitor.observe(sender, number, at("2025-07-02T16:00:00Z"));
        assert_eq!(step("a", 1), SequenceStep::First);
        assert_eq!(step("b", 50), SequenceStep::First);
        assert_eq!(step("a", 2), SequenceStep::Next);
        assert_eq!(step("c", 9), SequenceStep::First);
        assert_eq!(step("a", 3), SequenceStep::Next);
        assert_eq!(step("b", 51), SequenceStep::First);
        assert_eq!(monitor.senders.len(), 2);
    }

    #[test]
    fn a_line_without_a_number_has_none() {
        for (line, number) in [
            (&b"4994,TSCH,02:00:06,R,RLD,W"[..], Some(4994)),
            (b" 7 ,DIAG", Some(7)),
            (b"7", Some(7)),
            (b"", None),
            (b",DIAG", None),
            (b"not_an_integer,DEVI,02:04:55", None),
            (b"-1,DIAG", None),
            (b"18446744073709551616,DIAG", None),
            (b"\xff\xfe", None),
        ] {
            assert_eq!(counter(line), number);
        }
    }

    proptest! {
        #[test]
        fn every_message_that_is_lost_is_missed(
            arrives in prop::collection::vec(any::<bool>(), 0..200),
        ) {
            let mut monitor = SequenceMonitor::new(1);
            let mut missed = 0;
            let arrived = (0..).zip(arrives).filter_map(|(n, arrives)| arrives.then_some(n));
            let arrived: Vec<u64> = arrived.collect();
            for &number in &arrived {
                match monitor.observe("a", number, at("2025-07-02T16:00:00Z")) {
                    SequenceStep::Gap { missing, .. } => missed += missing,
                    SequenceStep::First | SequenceStep::Next => {}
                    step => prop_assert!(false, "{step:?}"),
                }
            }
            if let [first, .., last] = arrived[..] {
                prop_assert_eq!(missed, last - first + 1 - arrived.len() as u64);
            }
        }

        #[test]
        fn no_numbers_or_times_make_it_panic(
            numbers in prop::collection::vec((0..3usize, any::<u64>(), any::<i64>()), 0..50),
        ) {
            let mut monitor = SequenceMonitor::new(2);
            for (sender, number, second) in numbers {
                let ends = [Timestamp::MIN.as_second(), Timestamp::MAX.as_second()];
                let at = Timestamp::from_second(second.clamp(ends[0], ends[1])).expect("in range");
                monitor.observe(["a", "b", "c"][sender], number, at);
                monitor.observe("c", u64::MAX, at);
            }
        }
    }
}
