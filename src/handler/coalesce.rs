use std::{collections::HashMap, hash::Hash};

use super::{Batch, Handler, StopReason, Tenure};
use crate::record::Message;

/// Gives a handler only the newest message of each key in a batch.
///
/// For a handler that wants to know how things are, not how they came to be, and that is slower than the
/// stream: a display of train positions, a cache. While it is busy, what is read waits and becomes its next
/// batch ([`Handler::takes_backlog`]), most of which is then outdated; the further behind, the more is left
/// out. Where every message counts, such as schedule changes, give no key: those are always kept, in their
/// place.
///
/// What is left out counts as handled, and the checkpoint passes it. Each batch is looked at by itself:
/// two batches may bring the same key.
///
/// ```
/// use tramline::{
///     Coalesce, Handler, Message,
///     ocs::{Body, Movement},
/// };
///
/// /// Each train's newest position, and all other messages.
/// fn newest_positions(display: impl Handler) -> impl Handler {
///     Coalesce::new(display, |message: &Message| match message.ocs().ok()?.body {
///         Body::Movement(Movement::HeavyRail(train)) => Some(train.train.to_owned()),
///         Body::Movement(Movement::LightRail(train)) => Some(train.train.to_owned()),
///         _ => None,
///     })
/// }
/// ```
#[derive(Debug)]
pub struct Coalesce<H, F> {
    inner: H,
    key: F,
}

impl<H, F> Coalesce<H, F> {
    /// Gives `handler`, of the messages in a batch that have the same `key`, only the last one.
    pub fn new<K>(handler: H, key: F) -> Self
    where
        F: Fn(&Message) -> Option<K>,
    {
        Self { inner: handler, key }
    }

    fn newest<K: Eq + Hash>(&self, batch: &Batch) -> Batch
    where
        F: Fn(&Message) -> Option<K>,
    {
        let keys: Vec<Option<K>> = batch.iter().map(&self.key).collect();
        let mut last = HashMap::new();
        for (i, key) in keys.iter().enumerate() {
            last.insert(key, i);
        }
        let is_kept = |i: usize| keys[i].is_none() || last[&keys[i]] == i;
        batch.only(&(0..batch.len()).filter(|i| is_kept(*i)).collect::<Vec<_>>())
    }
}

impl<H, F, K> Handler for Coalesce<H, F>
where
    H: Handler,
    F: Fn(&Message) -> Option<K> + Send + 'static,
    K: Eq + Hash,
{
    type Error = H::Error;

    async fn handle(&mut self, batch: &Batch) -> Result<(), H::Error> {
        let newest = self.newest(batch);
        self.inner.handle(&newest).await
    }

    fn takes_backlog(&self) -> bool {
        true
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
    use std::time::Duration;

    use super::*;
    use crate::handler::testing::{Recorder, batch, hear_everything};

    fn by_partition_key(message: &Message) -> Option<String> {
        Some(message.partition_key().to_owned()).filter(|key| key != "every")
    }

    #[tokio::test]
    async fn p2_the_newest_of_each_key_comes_in_its_place_and_what_has_no_key_always() {
        let mut newest = Coalesce::new(Recorder::default(), by_partition_key);
        let mut batch = batch(&[
            ("a", "a1"),
            ("every", "x1"),
            ("b", "b1"),
            ("a", "a2"),
            ("every", "x2"),
            ("b", "b2"),
            ("c", "c1"),
            ("a", "a3"),
        ]);
        batch.behind = Some(Duration::from_secs(7));
        newest.handle(&batch).await.expect("handled");
        newest.handle(&super::super::testing::batch(&[("a", "a4")])).await.expect("handled");
        assert_eq!(newest.inner.batches, [vec!["x1", "x2", "b2", "c1", "a3"], vec!["a4"]]);
        assert_eq!(newest.inner.behind, [Some(Duration::from_secs(7)), None]);
    }

    #[tokio::test]
    async fn the_handler_hears_of_everything_else() {
        let mut newest = Coalesce::new(Recorder::default(), by_partition_key);
        hear_everything(&mut newest).await;
        assert_eq!(
            newest.inner.heard,
            ["started", "ended", "lost", "stopping", "snapshot", "restore"]
        );
    }
}
