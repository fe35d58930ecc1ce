//! How far a shard is finished when its messages are finished in any order. Pure.

use std::{collections::BTreeMap, ops::Range};

use super::Position;

/// Follows the messages of one shard from delivery to their end, and tells the highest position at and
/// below which everything is finished (P1, P3).
///
/// A position is that of a plain record, or of a user record in an aggregate. It may hold several
/// messages, or none, and counts when all of them are finished.
///
/// ```
/// use tramline::checkpoint::{Position, Tracker};
/// use tramline::SequenceNumber;
///
/// let at = |number: &str| Position {
///     sequence_number: SequenceNumber::parse(number).expect("a number"),
///     sub_sequence_number: 0,
/// };
/// let mut tracker = Tracker::new(100);
/// let first = tracker.deliver(at("7"), 1).expect("room");
/// let second = tracker.deliver(at("8"), 2).expect("room");
///
/// second.for_each(|serial| assert!(tracker.finish(serial)));
/// assert_eq!(tracker.checkpoint(), None, "7 is not finished");
/// assert!(tracker.finish(first.start));
/// assert_eq!(tracker.checkpoint(), Some(&at("8")));
/// ```
#[derive(Debug, Clone)]
pub struct Tracker {
    limit: usize,
    next_serial: u64,
    /// The messages that are not finished. Each carries the position that is reached once it and all
    /// before it are finished; `None` if a later message of its own position comes first.
    unfinished: BTreeMap<u64, Option<Position>>,
    checkpoint: Option<Position>,
}

impl Tracker {
    /// A tracker that takes up to `limit` unfinished messages.
    pub fn new(limit: usize) -> Self {
        Self { limit, next_serial: 0, unfinished: BTreeMap::new(), checkpoint: None }
    }

    /// Takes all messages of a position, each of which gets a serial number to be finished by. `None` if
    /// that is more than the limit: finish some first. A position with more messages than the limit is
    /// taken when no other message is unfinished.
    ///
    /// Positions ascend. One without messages, such as a record that went to the dead letters, is always
    /// taken.
    pub fn deliver(&mut self, position: Position, messages: usize) -> Option<Range<u64>> {
        debug_assert!(self.delivered() < Some(&position), "positions ascend");
        if messages > 0 && self.outstanding() > 0 && self.outstanding() + messages > self.limit {
            return None;
        }
        let serials = self.next_serial..self.next_serial + messages as u64;
        self.next_serial = serials.end;
        self.unfinished.extend(serials.clone().map(|serial| (serial, None)));
        self.reach(serials.end, position);
        Some(serials)
    }

    /// The serial number that the next message gets.
    pub fn next_serial(&self) -> u64 {
        self.next_serial
    }

    /// Gives no serial number below this one any more.
    pub fn skip_to(&mut self, serial: u64) {
        self.next_serial = self.next_serial.max(serial);
    }

    /// Notes that a message is finished. `false` if it is not one of ours, or was finished before: then
    /// nothing changes.
    pub fn finish(&mut self, serial: u64) -> bool {
        let Some(reached) = self.unfinished.remove(&serial) else { return false };
        if let Some(reached) = reached {
            self.reach(serial, reached);
        }
        true
    }

    /// The highest position at and below which everything is finished.
    pub fn checkpoint(&self) -> Option<&Position> {
        self.checkpoint.as_ref()
    }

    /// How many messages are not finished.
    pub fn outstanding(&self) -> usize {
        self.unfinished.len()
    }

    /// Notes that `position` is reached once every message before `serial` is finished.
    fn reach(&mut self, serial: u64, position: Position) {
        let waits_for = self.unfinished.range_mut(..serial).next_back();
        *waits_for.map_or(&mut self.checkpoint, |(_, reached)| reached) = Some(position);
    }

    /// The highest position that was delivered.
    pub fn delivered(&self) -> Option<&Position> {
        match self.unfinished.last_key_value() {
            Some((_, reached)) => reached.as_ref(),
            None => self.checkpoint(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::shard::SequenceNumber;

    fn at(number: usize) -> Position {
        Position {
            sequence_number: SequenceNumber::parse((number / 3).to_string()).expect("a number"),
            sub_sequence_number: (number % 3) as u64,
        }
    }

    #[test]
    fn p1_a_position_counts_when_all_its_messages_are_finished() {
        let mut tracker = Tracker::new(10);
        let first = tracker.deliver(at(1), 2).expect("room");
        assert!(tracker.finish(first.start + 1));
        assert_eq!(tracker.checkpoint(), None);
        assert!(tracker.finish(first.start));
        assert_eq!(tracker.checkpoint(), Some(&at(1)));
    }

    #[test]
    fn p1_a_position_without_messages_waits_for_those_before_it() {
        let mut tracker = Tracker::new(1);
        tracker.deliver(at(1), 0).expect("room");
        assert_eq!(tracker.checkpoint(), Some(&at(1)));
        let first = tracker.deliver(at(2), 1).expect("room");
        tracker.deliver(at(3), 0).expect("it needs no room");
        assert_eq!(tracker.checkpoint(), Some(&at(1)));
        assert!(tracker.finish(first.start));
        assert_eq!(tracker.checkpoint(), Some(&at(3)));
    }

    #[test]
    fn finishing_twice_or_what_was_never_delivered_changes_nothing() {
        let mut tracker = Tracker::new(10);
        let first = tracker.deliver(at(1), 1).expect("room");
        tracker.deliver(at(2), 1).expect("room");
        assert!(!tracker.finish(99));
        assert!(tracker.finish(first.start));
        assert!(!tracker.finish(first.start));
        assert_eq!((tracker.checkpoint(), tracker.outstanding()), (Some(&at(1)), 1));
    }

    #[test]
    fn a_full_tracker_takes_no_more_and_a_large_record_goes_alone() {
        let mut tracker = Tracker::new(2);
        let first = tracker.deliver(at(1), 2).expect("room");
        assert_eq!(tracker.deliver(at(2), 1), None);
        tracker.finish(first.start);
        assert_eq!(tracker.deliver(at(2), 5), None, "five do not fit beside one");
        tracker.finish(first.start + 1);
        assert_eq!(tracker.deliver(at(2), 5).map(|serials| serials.count()), Some(5));
        assert_eq!(tracker.deliver(at(3), 1), None);
    }

    /// What is done to a tracker.
    #[derive(Debug, Clone)]
    enum Step {
        Deliver { messages: usize },
        Finish { which: prop::sample::Index },
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            2 => (0..4_usize).prop_map(|messages| Step::Deliver { messages }),
            5 => any::<prop::sample::Index>().prop_map(|which| Step::Finish { which }),
        ]
    }

    proptest! {
        /// Against a model that remembers everything: for each position, the messages that are not
        /// finished.
        #[test]
        fn p3_the_checkpoint_is_the_end_of_the_finished_prefix_and_never_goes_back(
            steps in prop::collection::vec(step(), 1..200),
            limit in 1..20_usize,
        ) {
            let mut tracker = Tracker::new(limit);
            let mut model: Vec<(Position, Vec<u64>)> = Vec::new();
            let mut last = None;
            for step in steps {
                match step {
                    Step::Deliver { messages } => {
                        let outstanding: usize = model.iter().map(|(_, open)| open.len()).sum();
                        let fits = messages == 0 || outstanding == 0 || outstanding + messages <= limit;
                        let position = at(model.len());
                        let serials = tracker.deliver(position.clone(), messages);
                        prop_assert_eq!(serials.is_some(), fits);
                        if let Some(serials) = serials {
                            prop_assert_eq!(serials.clone().count(), messages);
                            model.push((position, serials.collect()));
                        }
                    }
                    Step::Finish { which } => {
                        // Any serial that was ever given out, so also finished ones, and one too high.
                        let serial = which.index(tracker.next_serial as usize + 1) as u64;
                        let open = model.iter_mut().find(|(_, open)| open.contains(&serial));
                        prop_assert_eq!(tracker.finish(serial), open.is_some());
                        if let Some((_, open)) = open {
                            open.retain(|other| *other != serial);
                        }
                    }
                }
                let finished = model.iter().take_while(|(_, open)| open.is_empty()).last();
                let checkpoint = tracker.checkpoint().cloned();
                prop_assert_eq!(&checkpoint, &finished.map(|(position, _)| position.clone()));
                prop_assert!(last <= checkpoint, "{:?} came after {:?}", checkpoint, last);
                last = checkpoint;
                let outstanding: usize = model.iter().map(|(_, open)| open.len()).sum();
                prop_assert_eq!(tracker.outstanding(), outstanding);
                prop_assert!(outstanding <= limit.max(3), "bounded");
            }
        }
    }
}
