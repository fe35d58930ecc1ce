use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    hash::Hash,
};

use futures_util::stream::{FuturesUnordered, StreamExt as _};

use super::{Batch, Handler};
use crate::{record::Message, shard::SequenceNumber};

/// A [`Handler`] that works on several messages of a batch at a time, one of each key.
///
/// For work that mostly waits, such as a request to a service for every message: one after the other, a
/// shard gets no faster than the answers come. More shards would help too; this needs none. It starts no
/// tasks, so work that computes gains nothing.
///
/// What it promises:
///
/// - At most as many messages as it is told are worked on at a time, and none between two batches: a batch
///   takes as long as its slowest key.
/// - Of messages with the same key, one begins when the one before it has succeeded (P2, for each key).
///   Across keys, earlier messages begin first, but may finish later.
/// - When a message fails, those of its key that follow wait for the next attempt; the other keys go on
///   to the end of the batch, and then the batch fails. When it is offered again, the messages that
///   succeeded are not worked on again, and each key goes on where it was.
/// - A message is worked on at least once (P1). It comes again after a restart, or if it was under way
///   when the call was dropped: the lease was lost, or the worker stopped waiting.
///
/// ```
/// use tramline::{Concurrent, Handler, Message};
///
/// # #[derive(Clone)]
/// # struct Client;
/// # impl Client {
/// #     async fn send(&self, _line: &str) -> Result<(), std::io::Error> { Ok(()) }
/// # }
/// /// Sends 16 messages at a time, those of one OCS connection in order.
/// fn sender(client: Client) -> impl Handler {
///     let connection = |message: &Message| message.partition_key().to_owned();
///     Concurrent::new(16, connection, move |message| {
///         let client = client.clone();
///         async move { client.send(message.raw()).await }
///     })
/// }
/// ```
pub struct Concurrent<K, F> {
    limit: usize,
    key: K,
    work: F,
    /// The messages of a failed batch that succeeded.
    done: BTreeSet<Place>,
}

/// Names a message of a shard.
type Place = (SequenceNumber, u64);

/// Some messages of a batch failed.
#[derive(Debug, thiserror::Error)]
#[error(
    "{failed} of {messages} messages failed, the first at sequence number {sequence_number}, \
     sub-sequence number {sub_sequence_number}: {error}"
)]
#[non_exhaustive]
pub struct MessagesFailed<E> {
    /// How many failed. Those that wait behind them are not counted.
    pub failed: usize,
    /// How many the batch has.
    pub messages: usize,
    /// Of the record of the first that failed.
    pub sequence_number: SequenceNumber,
    /// Its place in the record.
    pub sub_sequence_number: u64,
    /// Why it failed.
    pub error: E,
}

impl<K, F> Concurrent<K, F> {
    /// Does `work` for `limit` messages at a time, at least one, and of each `key` for one at a time.
    pub fn new<G, Done>(limit: usize, key: K, work: F) -> Self
    where
        K: Fn(&Message) -> G,
        F: FnMut(Message) -> Done,
    {
        Self { limit: limit.max(1), key, work, done: BTreeSet::new() }
    }

    /// Forgets what is done of other batches: what was not offered again by now is given up.
    fn keep_done_of(&mut self, batch: &Batch) {
        let done = std::mem::take(&mut self.done);
        self.done = batch.iter().map(place).filter(|place| done.contains(place)).collect();
    }

    /// What is to be done of a batch.
    fn queue<G>(&self, batch: &Batch) -> Queue
    where
        K: Fn(&Message) -> G,
        G: Eq + Hash,
    {
        let mut queue = Queue { ready: BTreeSet::new(), next: vec![None; batch.len()] };
        let mut last = HashMap::new();
        for (i, message) in batch.iter().enumerate() {
            if self.done.contains(&place(message)) {
                continue;
            }
            match last.insert((self.key)(message), i) {
                Some(before) => queue.next[before] = Some(i),
                None => {
                    queue.ready.insert(i);
                }
            }
        }
        queue
    }
}

/// Messages by their index in the batch.
struct Queue {
    /// Those that nothing of their key is in front of.
    ready: BTreeSet<usize>,
    /// For each the next one of its key.
    next: Vec<Option<usize>>,
}

impl<K, F, G, Done, E> Handler for Concurrent<K, F>
where
    K: Fn(&Message) -> G + Send + 'static,
    G: Eq + Hash,
    F: FnMut(Message) -> Done + Send + 'static,
    Done: Future<Output = Result<(), E>> + Send,
    E: fmt::Display + Send,
{
    type Error = MessagesFailed<E>;

    async fn handle(&mut self, batch: &Batch) -> Result<(), Self::Error> {
        self.keep_done_of(batch);
        let mut queue = self.queue(batch);
        let mut under_way = FuturesUnordered::new();
        let mut failed = 0;
        let mut first_failed: Option<(usize, E)> = None;
        loop {
            while under_way.len() < self.limit
                && let Some(i) = queue.ready.pop_first()
            {
                let work = (self.work)(batch[i].clone());
                under_way.push(async move { (i, work.await) });
            }
            match under_way.next().await {
                Some((i, Ok(()))) => {
                    // Noted at once: the call may be dropped at any `await`.
                    self.done.insert(place(&batch[i]));
                    queue.ready.extend(queue.next[i]);
                }
                Some((i, Err(error))) => {
                    failed += 1;
                    if first_failed.as_ref().is_none_or(|(first, _)| i < *first) {
                        first_failed = Some((i, error));
                    }
                }
                None => break,
            }
        }
        let Some((i, error)) = first_failed else {
            self.done.clear();
            return Ok(());
        };
        let (sequence_number, sub_sequence_number) = place(&batch[i]);
        let messages = batch.len();
        Err(MessagesFailed { failed, messages, sequence_number, sub_sequence_number, error })
    }
}

fn place(message: &Message) -> Place {
    (message.sequence_number().clone(), message.sub_sequence_number())
}

impl<K, F> fmt::Debug for Concurrent<K, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Concurrent")
            .field("limit", &self.limit)
            .field("done", &self.done.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex, MutexGuard};

    use futures_util::{FutureExt as _, future::BoxFuture};
    use proptest::prelude::*;
    use tokio::task::yield_now;

    use super::*;
    use crate::handler::testing::batch;

    type Work = Box<dyn FnMut(Message) -> BoxFuture<'static, Result<(), String>> + Send>;

    /// What was done to messages, by their text.
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<State>>);

    #[derive(Default)]
    struct State {
        begun: Vec<String>,
        succeeded: Vec<String>,
        under_way: usize,
        most_under_way: usize,
        /// Each fails once.
        failing: Vec<String>,
        /// Never finishes.
        stuck: Option<&'static str>,
    }

    impl Log {
        fn state(&self) -> MutexGuard<'_, State> {
            self.0.lock().expect("a lock")
        }

        fn take_begun(&self) -> Vec<String> {
            std::mem::take(&mut self.state().begun)
        }

        fn fail(&self, raws: &[&str]) {
            self.state().failing = raws.iter().map(|raw| (*raw).to_owned()).collect();
        }

        /// Works with `limit` messages at a time, each for `waits` turns of the executor.
        fn handler(
            &self,
            limit: usize,
            waits: fn(&str) -> usize,
        ) -> Concurrent<fn(&Message) -> String, Work> {
            let log = self.clone();
            Concurrent::new(
                limit,
                |message| message.partition_key().to_owned(),
                Box::new(move |message| log.clone().work(message, waits).boxed()),
            )
        }

        async fn work(self, message: Message, waits: fn(&str) -> usize) -> Result<(), String> {
            let raw = message.raw();
            let is_stuck = {
                let mut state = self.state();
                state.begun.push(raw.to_owned());
                state.under_way += 1;
                state.most_under_way = state.most_under_way.max(state.under_way);
                state.stuck == Some(raw)
            };
            if is_stuck {
                std::future::pending::<()>().await;
            }
            for _ in 0..waits(raw) {
                yield_now().await;
            }
            let mut state = self.state();
            state.under_way -= 1;
            if let Some(i) = state.failing.iter().position(|failing| *failing == raw) {
                state.failing.remove(i);
                return Err(format!("{raw} as told"));
            }
            state.succeeded.push(raw.to_owned());
            Ok(())
        }
    }

    /// The earlier it begins the later it ends.
    fn backwards(raw: &str) -> usize {
        9 - usize::from(raw.as_bytes()[1] - b'0')
    }

    #[tokio::test]
    async fn keys_pass_each_other_and_the_limit_holds() {
        let log = Log::default();
        let messages = [("a", "a1"), ("b", "b5"), ("c", "c9"), ("d", "d9"), ("e", "e1")];
        log.handler(3, backwards).handle(&batch(&messages)).await.expect("handled");
        let state = log.state();
        assert_eq!(state.begun, ["a1", "b5", "c9", "d9", "e1"]);
        assert_eq!(state.succeeded, ["c9", "d9", "b5", "a1", "e1"]);
        assert_eq!((state.most_under_way, state.under_way), (3, 0));
    }

    #[tokio::test]
    async fn p2_one_at_a_time_is_the_order_of_the_stream() {
        let log = Log::default();
        let messages = [("a", "a1"), ("a", "a2"), ("b", "b1"), ("a", "a3"), ("b", "b2")];
        log.handler(1, backwards).handle(&batch(&messages)).await.expect("handled");
        assert_eq!(log.state().succeeded, messages.map(|(_, raw)| raw));
    }

    #[tokio::test]
    async fn p2_a_failure_holds_up_its_key_alone_and_what_succeeded_is_not_done_again() {
        let log = Log::default();
        log.fail(&["a2", "c1"]);
        let mut handler = log.handler(2, backwards);
        let messages =
            batch(&[("a", "a1"), ("a", "a2"), ("b", "b1"), ("a", "a3"), ("c", "c1"), ("b", "b2")]);
        let error = handler.handle(&messages).await.expect_err("as told");
        assert_eq!(
            error.to_string(),
            format!(
                "2 of 6 messages failed, the first at sequence number {}, sub-sequence number 0: a2 as \
                 told",
                messages[1].sequence_number()
            )
        );
        let mut begun = log.take_begun();
        begun.sort();
        assert_eq!(begun, ["a1", "a2", "b1", "b2", "c1"]);

        log.fail(&["a3"]);
        handler.handle(&messages).await.expect_err("as told");
        assert_eq!(log.take_begun(), ["a2", "c1", "a3"]);
        handler.handle(&messages).await.expect("handled");
        assert_eq!(log.take_begun(), ["a3"]);

        handler.handle(&messages).await.expect("handled");
        assert_eq!(log.take_begun().len(), 6, "after an Ok it starts anew");
    }

    #[tokio::test]
    async fn p1_what_finished_before_the_call_was_dropped_is_not_done_again() {
        let log = Log::default();
        log.state().stuck = Some("b1");
        let mut handler = log.handler(2, |_| 0);
        let messages = batch(&[("a", "a1"), ("b", "b1"), ("a", "a2"), ("b", "b2")]);
        assert!(handler.handle(&messages).now_or_never().is_none());
        log.state().stuck = None;
        log.take_begun();
        handler.handle(&messages).await.expect("handled");
        assert_eq!(log.take_begun(), ["b1", "b2"]);
        assert_eq!(log.state().succeeded, ["a1", "a2", "b1", "b2"]);
    }

    #[tokio::test]
    async fn what_was_done_of_a_batch_that_was_given_up_is_forgotten() {
        let log = Log::default();
        log.fail(&["b1", "c1"]);
        let mut handler = log.handler(2, |_| 0);
        let messages = batch(&[("a", "a1"), ("b", "b1"), ("c", "c1")]);
        handler.handle(&messages).await.expect_err("as told");
        assert_eq!(handler.done.len(), 1);
        let next = messages.only(&[2]);
        log.fail(&["c1"]);
        handler.handle(&next).await.expect_err("as told");
        assert!(handler.done.is_empty());
    }

    proptest! {
        #[test]
        fn p2_each_key_is_done_in_order_and_once_however_work_and_failures_fall(
            keys in prop::collection::vec(0..5usize, 1..40),
            failing in prop::collection::vec(any::<prop::sample::Index>(), 0..5),
            limit in 1..6usize,
        ) {
            let keys: Vec<&str> = keys.into_iter().map(|key| ["a", "b", "c", "d", "e"][key]).collect();
            let raws: Vec<String> =
                keys.iter().enumerate().map(|(i, key)| format!("{key}{}", 10 + i)).collect();
            let lines: Vec<_> = keys.iter().zip(&raws).map(|(key, raw)| (*key, &**raw)).collect();
            let messages = batch(&lines);
            let log = Log::default();
            log.state().failing = failing.iter().map(|i| i.get(&raws).clone()).collect();
            let mut handler = log.handler(limit, |raw| usize::from(raw.as_bytes()[2]) % 4);
            let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
            let mut attempts = 1;
            while runtime.block_on(handler.handle(&messages)).is_err() {
                attempts += 1;
            }
            prop_assert!(attempts <= 1 + failing.len());
            let state = log.state();
            prop_assert!(state.most_under_way <= limit);
            for key in &keys {
                let of_key = |raws: &[String]| -> Vec<String> {
                    raws.iter().filter(|raw| raw.starts_with(key)).cloned().collect()
                };
                prop_assert_eq!(of_key(&state.succeeded), of_key(&raws));
            }
        }
    }
}
