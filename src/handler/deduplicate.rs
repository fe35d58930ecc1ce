use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
};

use super::{Batch, Handler, StopReason, Tenure};

/// Keeps messages from a handler that it has handled already, by the event's id.
///
/// The same event may stand in the stream twice: a producer that gets no answer to a put cannot know
/// whether it arrived, and puts the event again with the same id. A handler that may do its work twice,
/// as one that sets values by key, needs nothing of this; one that counts or sends on does.
///
/// It remembers the last ids, as many as it is told, in memory: about 100 bytes each. Of what comes
/// again after a restart it knows nothing. A message whose event has no id is always given.
///
/// An id counts once the handler has returned `Ok` for its batch. So a batch that fails is offered again
/// in full (P1).
///
/// ```
/// use tramline::{Deduplicate, Handler};
///
/// fn each_event_once(alerts: impl Handler) -> impl Handler {
///     Deduplicate::new(alerts, 100_000)
/// }
/// ```
#[derive(Debug)]
pub struct Deduplicate<H> {
    inner: H,
    window: usize,
    seen: HashSet<Arc<str>>,
    /// The same ids, oldest first.
    order: VecDeque<Arc<str>>,
}

impl<H> Deduplicate<H> {
    /// Gives `handler` no message whose id is among the last `window` ids that it handled.
    pub fn new(handler: H, window: usize) -> Self {
        Self { inner: handler, window, seen: HashSet::new(), order: VecDeque::new() }
    }

    fn unseen(&self, batch: &Batch) -> Batch {
        let mut here = HashSet::new();
        let mut unseen = Vec::new();
        for (n, message) in batch.iter().enumerate() {
            let id = message.id();
            if id.is_empty() || (!self.seen.contains(id) && here.insert(id)) {
                unseen.push(n);
            }
        }
        batch.only(&unseen)
    }

    fn remember(&mut self, handled: &Batch) {
        for message in handled.iter().filter(|message| !message.id().is_empty()) {
            let id: Arc<str> = message.id().into();
            self.seen.insert(id.clone());
            self.order.push_back(id);
            if self.order.len() > self.window
                && let Some(oldest) = self.order.pop_front()
            {
                self.seen.remove(&oldest);
            }
        }
    }
}

impl<H: Handler> Handler for Deduplicate<H> {
    type Error = H::Error;

    async fn handle(&mut self, batch: &Batch) -> Result<(), H::Error> {
        let unseen = self.unseen(batch);
        if unseen.len() < batch.len() {
            tracing::debug!(
                repeats = batch.len() - unseen.len(),
                "events that came again left out"
            );
        }
        if !unseen.is_empty() {
            self.inner.handle(&unseen).await?;
            self.remember(&unseen);
        }
        Ok(())
    }

    fn takes_backlog(&self) -> bool {
        self.inner.takes_backlog()
    }

    async fn started(&mut self, tenure: &Tenure) {
        self.inner.started(tenure).await;
    }

    async fn ended(&mut self) {
        self.inner.ended().await;
    }

    async fn lost(&mut self) {
        self.inner.lost().await;
    }

    async fn stopping(&mut self, why: StopReason) {
        self.inner.stopping(why).await;
    }

    fn snapshot(&mut self) -> Result<Option<Vec<u8>>, H::Error> {
        self.inner.snapshot()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), H::Error> {
        self.inner.restore(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handler::testing::{Recorder, batch, hear_everything};

    /// Equal lines are equal events here.
    fn lines(lines: &[&str]) -> Batch {
        batch(&lines.iter().map(|line| ("k", *line)).collect::<Vec<_>>())
    }

    #[tokio::test]
    async fn an_event_that_comes_again_is_left_out() {
        let mut once = Deduplicate::new(Recorder::default(), 100);
        for batch in [&["1", "2", "1"][..], &["2", "3"], &["3", "1"], &["4"]] {
            once.handle(&lines(batch)).await.expect("handled");
        }
        assert_eq!(once.inner.batches, [vec!["1", "2"], vec!["3"], vec!["4"]]);
    }

    #[tokio::test]
    async fn p1_a_batch_that_failed_is_offered_again_in_full() {
        let mut once = Deduplicate::new(Recorder { failures: 1, ..Recorder::default() }, 100);
        let batch = lines(&["1", "2"]);
        once.handle(&batch).await.expect_err("as told");
        once.handle(&batch).await.expect("handled");
        once.handle(&batch).await.expect("handled");
        assert_eq!(once.inner.batches, [["1", "2"]]);
    }

    #[tokio::test]
    async fn it_remembers_as_many_as_it_was_told() {
        let mut once = Deduplicate::new(Recorder::default(), 2);
        for batch in [["1", "2", "3"], ["2", "3", "1"]] {
            once.handle(&lines(&batch)).await.expect("handled");
        }
        assert_eq!(once.inner.batches, [vec!["1", "2", "3"], vec!["1"]]);
        assert_eq!((once.seen.len(), once.order.len()), (2, 2));
    }

    #[tokio::test]
    async fn the_handler_hears_of_everything_else() {
        let mut once = Deduplicate::new(Recorder::default(), 1);
        hear_everything(&mut once).await;
        assert_eq!(
            once.inner.heard,
            ["started", "ended", "lost", "stopping", "snapshot", "restore"]
        );
        assert!(once.takes_backlog());
    }
}
