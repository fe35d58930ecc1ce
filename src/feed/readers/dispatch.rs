//! Which reader gets which message, and when a message is finished. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

/// Who gets a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Spread {
    /// Every reader that is there. It is finished when all of them have finished it.
    Every,
    /// The one reader that is there: another is refused, and one of the same name takes its place.
    One,
    /// One of the readers, so that messages of one key are with one reader at a time.
    Shared,
}

/// One shard's reading, from its start to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Source(u64);

/// One connection of a reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct ReaderId(u64);

/// What of a source is not finished.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Unfinished {
    pub messages: usize,
    pub bytes: usize,
}

/// A reader was refused: there is one already, of this name.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Occupied(pub String);

/// A reader acknowledged a message that it was not sent; this is the last one that it was.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NotSent(pub u64);

/// The messages that are not finished, and who has them. `T` is what is kept of a message.
#[derive(Debug)]
pub(super) struct Dispatch<T> {
    spread: Spread,
    /// How many messages one reader may have that are not finished.
    window: usize,
    /// In the order in which they came; so those of a source are in its order.
    messages: BTreeMap<u64, Held<T>>,
    /// Those that no reader has. Not used where every reader gets every message.
    waiting: BTreeSet<u64>,
    readers: BTreeMap<ReaderId, Reader>,
    /// Who has messages of a key, and how many.
    holders: HashMap<u64, (ReaderId, usize)>,
    sources: BTreeMap<Source, Unfinished>,
    next_id: u64,
}

#[derive(Debug)]
struct Held<T> {
    source: Source,
    key: u64,
    bytes: usize,
    item: T,
}

#[derive(Debug, Default)]
struct Reader {
    name: String,
    /// How many it was sent: the serial number of the last one.
    sent: u64,
    /// Those that it has not finished. One that was withdrawn meanwhile stays in its place.
    unfinished: VecDeque<u64>,
    /// Where every reader gets every message: all before this were sent to it.
    next: u64,
}

impl<T> Dispatch<T> {
    pub(super) fn new(spread: Spread, window: usize) -> Self {
        Self {
            spread,
            window,
            messages: BTreeMap::new(),
            waiting: BTreeSet::new(),
            readers: BTreeMap::new(),
            holders: HashMap::new(),
            sources: BTreeMap::new(),
            next_id: 0,
        }
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// A new source of messages.
    pub(super) fn open(&mut self) -> Source {
        let source = Source(self.id());
        self.sources.insert(source, Unfinished::default());
        source
    }

    /// Takes a message. Those of a source come in its order.
    pub(super) fn offer(&mut self, source: Source, key: u64, bytes: usize, item: T) {
        let id = self.id();
        let unfinished = self.sources.entry(source).or_default();
        unfinished.messages += 1;
        unfinished.bytes += bytes;
        self.messages.insert(id, Held { source, key, bytes, item });
        if self.spread != Spread::Every {
            self.waiting.insert(id);
        }
    }

    pub(super) fn unfinished(&self, source: Source) -> Unfinished {
        self.sources.get(&source).copied().unwrap_or_default()
    }

    /// Takes back what no reader has of a source.
    pub(super) fn withdraw_waiting(&mut self, source: Source) -> Vec<T> {
        let sent_to = self.readers.values().map(|reader| reader.next).max().unwrap_or(0);
        let waits = |id: &u64| match self.spread {
            Spread::Every => *id >= sent_to,
            Spread::One | Spread::Shared => self.waiting.contains(id),
        };
        let ids = self.messages.iter().filter(|(id, held)| held.source == source && waits(id));
        let ids: Vec<u64> = ids.map(|(id, _)| *id).collect();
        ids.into_iter().filter_map(|id| self.remove(id)).collect()
    }

    /// Takes back everything of a source, which ends.
    pub(super) fn close(&mut self, source: Source) -> Vec<T> {
        let ids = self.messages.iter().filter(|(_, held)| held.source == source);
        let ids: Vec<u64> = ids.map(|(id, _)| *id).collect();
        let items = ids.into_iter().filter_map(|id| self.remove(id)).collect();
        self.sources.remove(&source);
        items
    }

    /// A reader has come. Gives those of its name whose place it takes, too. Readers without a name are
    /// strangers to each other, but where there is one.
    pub(super) fn join(&mut self, name: &str) -> Result<(ReaderId, Vec<ReaderId>), Occupied> {
        if self.spread == Spread::One
            && let Some(other) = self.readers.values().find(|reader| reader.name != name)
        {
            return Err(Occupied(other.name.clone()));
        }
        let displaced = self.displaced_by(name);
        for id in &displaced {
            self.leave(*id);
        }
        let id = ReaderId(self.id());
        self.readers.insert(id, Reader { name: name.to_owned(), ..Reader::default() });
        Ok((id, displaced))
    }

    /// The readers whose place one of this name takes.
    pub(super) fn displaced_by(&self, name: &str) -> Vec<ReaderId> {
        let of_name = |reader: &Reader| match self.spread {
            Spread::Every => false,
            Spread::One => reader.name == name,
            Spread::Shared => reader.name == name && !name.is_empty(),
        };
        self.readers.iter().filter(|(_, reader)| of_name(reader)).map(|(id, _)| *id).collect()
    }

    /// A reader has gone. What it has not finished waits for the next one, before what came later. Gives
    /// what is finished without it.
    pub(super) fn leave(&mut self, reader: ReaderId) -> Vec<T> {
        let Some(gone) = self.readers.remove(&reader) else { return Vec::new() };
        if self.spread == Spread::Every {
            return self.finished_by_every();
        }
        for id in gone.unfinished {
            if let Some(held) = self.messages.get(&id) {
                let key = held.key;
                self.waiting.insert(id);
                self.release(key);
            }
        }
        Vec::new()
    }

    /// How many messages a reader has that are not finished.
    pub(super) fn unfinished_by(&self, reader: ReaderId) -> usize {
        self.readers.get(&reader).map_or(0, |reader| reader.unfinished.len())
    }

    /// The next message for a reader, with its serial number, if there is one that it may have.
    pub(super) fn next(&mut self, id: ReaderId) -> Option<(u64, &T)> {
        let reader = self.readers.get_mut(&id)?;
        if reader.unfinished.len() >= self.window {
            return None;
        }
        let message = match self.spread {
            Spread::Every => self.messages.range(reader.next..).next().map(|(id, _)| *id)?,
            Spread::One | Spread::Shared => {
                let may_have = |message: &&u64| {
                    let key = self.messages.get(message).map(|held| held.key);
                    let holder = key.and_then(|key| self.holders.get(&key));
                    holder.is_none_or(|(holder, _)| *holder == id)
                };
                let message = *self.waiting.iter().find(may_have)?;
                self.waiting.remove(&message);
                message
            }
        };
        let held = self.messages.get(&message)?;
        if self.spread != Spread::Every {
            self.holders.entry(held.key).or_insert((id, 0)).1 += 1;
        }
        reader.next = message + 1;
        reader.sent += 1;
        reader.unfinished.push_back(message);
        Some((reader.sent, &held.item))
    }

    /// A reader has finished what it was sent up to a serial number; to say it again changes nothing.
    /// Gives what is finished by it.
    pub(super) fn finish(&mut self, reader: ReaderId, serial: u64) -> Result<Vec<T>, NotSent> {
        let Some(reader) = self.readers.get_mut(&reader) else { return Ok(Vec::new()) };
        if serial > reader.sent {
            return Err(NotSent(reader.sent));
        }
        let remain = usize::try_from(reader.sent - serial).unwrap_or(usize::MAX);
        let count = reader.unfinished.len().saturating_sub(remain);
        let done: Vec<u64> = reader.unfinished.drain(..count).collect();
        Ok(match self.spread {
            Spread::Every => self.finished_by_every(),
            Spread::One | Spread::Shared => {
                done.into_iter().filter_map(|id| self.remove(id)).collect()
            }
        })
    }

    /// What every reader has finished. Nothing while there is none.
    fn finished_by_every(&mut self) -> Vec<T> {
        let finished_to = |reader: &Reader| *reader.unfinished.front().unwrap_or(&reader.next);
        let finished_to = self.readers.values().map(finished_to).min().unwrap_or(0);
        let ids: Vec<u64> = self.messages.range(..finished_to).map(|(id, _)| *id).collect();
        ids.into_iter().filter_map(|id| self.remove(id)).collect()
    }

    fn remove(&mut self, id: u64) -> Option<T> {
        let held = self.messages.remove(&id)?;
        if let Some(unfinished) = self.sources.get_mut(&held.source) {
            unfinished.messages -= 1;
            unfinished.bytes -= held.bytes;
        }
        if !self.waiting.remove(&id) && self.spread != Spread::Every {
            self.release(held.key);
        }
        Some(held.item)
    }

    /// A reader has one message of a key less.
    fn release(&mut self, key: u64) {
        if let Some((_, count)) = self.holders.get_mut(&key) {
            *count -= 1;
            if *count == 0 {
                self.holders.remove(&key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WINDOW: usize = 4;

    /// Everything that a reader can be sent now.
    fn sent(dispatch: &mut Dispatch<u32>, reader: ReaderId) -> Vec<u32> {
        std::iter::from_fn(|| dispatch.next(reader).map(|(_, item)| *item)).collect()
    }

    fn with_messages(spread: Spread, keys: &[u64]) -> (Dispatch<u32>, Source) {
        let mut dispatch = Dispatch::new(spread, WINDOW);
        let source = dispatch.open();
        for (n, key) in (0..).zip(keys) {
            dispatch.offer(source, *key, 10, n);
        }
        (dispatch, source)
    }

    fn join(dispatch: &mut Dispatch<u32>, name: &str) -> ReaderId {
        dispatch.join(name).expect("a place").0
    }

    #[test]
    fn p1_what_every_reader_gets_is_finished_when_all_have_finished_it() {
        let (mut dispatch, source) = with_messages(Spread::Every, &[1, 1, 1]);
        let (a, b) = (join(&mut dispatch, ""), join(&mut dispatch, ""));
        assert_eq!(sent(&mut dispatch, a), [0, 1, 2]);
        assert_eq!(dispatch.finish(a, 3), Ok(vec![]));
        assert_eq!(sent(&mut dispatch, b), [0, 1, 2]);
        assert_eq!(dispatch.finish(b, 2), Ok(vec![0, 1]));
        assert_eq!(dispatch.unfinished(source), Unfinished { messages: 1, bytes: 10 });
        assert_eq!(dispatch.leave(b), [2], "a has finished it");
        assert_eq!(dispatch.unfinished(source), Unfinished::default());
    }

    #[test]
    fn p1_without_a_reader_messages_wait_and_one_that_comes_gets_all_that_are_not_finished() {
        let (mut dispatch, _) = with_messages(Spread::Every, &[1, 1]);
        let a = join(&mut dispatch, "");
        assert_eq!(sent(&mut dispatch, a), [0, 1]);
        assert_eq!(dispatch.finish(a, 1), Ok(vec![0]));
        assert!(dispatch.leave(a).is_empty());
        let b = join(&mut dispatch, "");
        assert_eq!(sent(&mut dispatch, b), [1]);
    }

    #[test]
    fn p1_a_reader_that_comes_back_goes_on_after_its_last_acknowledgement() {
        let (mut dispatch, _) = with_messages(Spread::One, &[1, 2, 1]);
        let a = join(&mut dispatch, "green");
        assert_eq!(sent(&mut dispatch, a), [0, 1, 2]);
        assert_eq!(dispatch.finish(a, 1), Ok(vec![0]));
        dispatch.leave(a);
        let a = join(&mut dispatch, "green");
        assert_eq!(sent(&mut dispatch, a), [1, 2]);
        assert_eq!(dispatch.finish(a, 2), Ok(vec![1, 2]), "serial numbers begin anew");
    }

    #[test]
    fn of_two_readers_of_one_name_the_later_one_takes_the_place_and_another_name_is_refused() {
        let (mut dispatch, _) = with_messages(Spread::One, &[1, 2]);
        let old = join(&mut dispatch, "green");
        assert_eq!(sent(&mut dispatch, old), [0, 1]);
        assert_eq!(dispatch.join("red"), Err(Occupied("green".to_owned())));
        let (new, displaced) = dispatch.join("green").expect("a place");
        assert_eq!(displaced, [old]);
        assert_eq!(sent(&mut dispatch, new), [0, 1]);
        assert_eq!(dispatch.finish(old, 2), Ok(vec![]), "it is nobody any more");
        assert_eq!(dispatch.finish(new, 2), Ok(vec![0, 1]));
    }

    #[test]
    fn p2_a_key_is_with_one_reader_at_a_time() {
        let (mut dispatch, _) = with_messages(Spread::Shared, &[1, 2, 1, 2, 1]);
        let (a, b) = (join(&mut dispatch, "a"), join(&mut dispatch, "b"));
        assert_eq!(dispatch.next(a), Some((1, &0)));
        assert_eq!(dispatch.next(b), Some((1, &1)));
        assert_eq!(sent(&mut dispatch, b), [3]);
        assert_eq!(dispatch.finish(b, 2), Ok(vec![1, 3]));
        assert_eq!(sent(&mut dispatch, b), [0u32; 0], "the rest is of the key that a has");
        dispatch.leave(a);
        assert_eq!(sent(&mut dispatch, b), [0, 2, 4], "in order, with what a has not finished");
    }

    #[test]
    fn a_reader_has_no_more_than_its_window() {
        let (mut dispatch, _) = with_messages(Spread::One, &[1; 6]);
        let a = join(&mut dispatch, "a");
        assert_eq!(sent(&mut dispatch, a), [0, 1, 2, 3]);
        assert_eq!(dispatch.finish(a, 1), Ok(vec![0]));
        assert_eq!(sent(&mut dispatch, a), [4]);
        assert_eq!(dispatch.unfinished_by(a), WINDOW);
    }

    #[test]
    fn nonsense_finishes_nothing() {
        let (mut dispatch, source) = with_messages(Spread::One, &[1, 1]);
        let a = join(&mut dispatch, "a");
        assert_eq!(dispatch.finish(a, 1), Err(NotSent(0)));
        assert_eq!(sent(&mut dispatch, a), [0, 1]);
        assert_eq!(dispatch.finish(a, u64::MAX), Err(NotSent(2)));
        assert_eq!(dispatch.finish(a, 2).expect("sent"), [0, 1]);
        assert_eq!(dispatch.finish(a, 1), Ok(vec![]), "it was said before");
        assert_eq!(dispatch.unfinished(source), Unfinished::default());
    }

    #[test]
    fn p4_what_is_taken_back_is_sent_to_nobody_any_more() {
        for spread in [Spread::Every, Spread::One, Spread::Shared] {
            let (mut dispatch, lost) = with_messages(spread, &[1; 6]);
            let kept = dispatch.open();
            dispatch.offer(kept, 1, 10, 7);
            let a = join(&mut dispatch, "a");
            assert_eq!(sent(&mut dispatch, a), [0, 1, 2, 3]);
            assert_eq!(dispatch.withdraw_waiting(lost), [4, 5], "{spread:?}");
            assert_eq!(dispatch.close(lost), [0, 1, 2, 3], "{spread:?}");
            assert_eq!(dispatch.finish(a, 4), Ok(vec![]));
            assert_eq!(dispatch.next(a), Some((5, &7)));
            assert_eq!(dispatch.finish(a, 5), Ok(vec![7]), "{spread:?}");
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Offer { source: usize, key: u64 },
        Join,
        Leave(prop::sample::Index),
        Next(prop::sample::Index),
        Finish(prop::sample::Index, u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0usize..2, 0u64..3).prop_map(|(source, key)| Step::Offer { source, key }),
            1 => Just(Step::Join),
            1 => any::<prop::sample::Index>().prop_map(Step::Leave),
            6 => any::<prop::sample::Index>().prop_map(Step::Next),
            3 => (any::<prop::sample::Index>(), 0u64..3)
                .prop_map(|(reader, less)| Step::Finish(reader, less)),
        ]
    }

    proptest! {
        /// Readers come, go and acknowledge as they like.
        #[test]
        fn p1_p2_every_message_is_finished_once_and_by_a_reader_that_got_its_key_in_order(
            steps in prop::collection::vec(step(), 1..200),
            shared in any::<bool>(),
        ) {
            let spread = if shared { Spread::Shared } else { Spread::Every };
            let mut dispatch = Dispatch::new(spread, WINDOW);
            let sources = [dispatch.open(), dispatch.open()];
            let (mut offered, mut finished) = (0, BTreeSet::new());
            let mut keys = Vec::new();
            // What each reader was sent, over all readers that are there.
            let mut readers: Vec<(ReaderId, Vec<u32>)> = Vec::new();
            for (n, step) in steps.into_iter().map(Some).chain([None]).enumerate() {
                let mut done = Vec::new();
                match step {
                    // At the end, one reader gets what is left.
                    None => {
                        for (reader, _) in readers.drain(..) {
                            done.extend(dispatch.leave(reader));
                        }
                        let reader = join(&mut dispatch, "last");
                        let mut serial = 0;
                        while let Some((next, _)) = dispatch.next(reader) {
                            serial = next;
                            done.extend(dispatch.finish(reader, serial).expect("sent"));
                        }
                        prop_assert_eq!(dispatch.finish(reader, serial + 1), Err(NotSent(serial)));
                    }
                    Some(Step::Offer { source, key }) => {
                        dispatch.offer(sources[source], key, 1, offered);
                        keys.push(key);
                        offered += 1;
                    }
                    Some(Step::Join) => {
                        let (reader, displaced) = dispatch.join(&format!("reader {n}")).expect("a place");
                        prop_assert!(displaced.is_empty());
                        readers.push((reader, Vec::new()));
                    }
                    Some(Step::Leave(index)) if !readers.is_empty() => {
                        let (reader, _) = readers.remove(index.index(readers.len()));
                        done = dispatch.leave(reader);
                    }
                    Some(Step::Next(index)) if !readers.is_empty() => {
                        let index = index.index(readers.len());
                        let (reader, sent) = &mut readers[index];
                        if let Some((serial, item)) = dispatch.next(*reader) {
                            sent.push(*item);
                            prop_assert_eq!(serial, sent.len() as u64);
                            let item = *item;
                            let of_key = |other: &&u32| keys[**other as usize] == keys[item as usize];
                            prop_assert!(sent.iter().filter(of_key).is_sorted(), "{:?}", sent);
                            prop_assert!(!finished.contains(&item));
                            // Nobody else has an earlier one of the key unfinished.
                            if shared {
                                let earlier = (0..item).filter(|other| of_key(&other));
                                for other in earlier.filter(|other| !finished.contains(other)) {
                                    prop_assert!(sent.contains(&other));
                                }
                            }
                        }
                    }
                    Some(Step::Finish(index, less)) if !readers.is_empty() => {
                        let (reader, sent) = &readers[index.index(readers.len())];
                        let serial = (sent.len() as u64).saturating_sub(less);
                        done = dispatch.finish(*reader, serial).expect("sent");
                    }
                    _ => {}
                }
                for item in done {
                    prop_assert!(finished.insert(item), "finished twice: {}", item);
                }
            }
            prop_assert_eq!(finished.len(), offered as usize);
            for source in sources {
                prop_assert_eq!(dispatch.unfinished(source), Unfinished::default());
            }
            prop_assert!(dispatch.holders.is_empty() && dispatch.waiting.is_empty());
        }
    }
}
