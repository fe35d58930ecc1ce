//! Acknowledging messages one by one, later, and in any order.

use std::fmt;

use tokio::sync::mpsc;

/// Says that one message is finished, or that it could not be handled.
///
/// Handed out by [`Batch::ack_later`](super::Batch::ack_later). The checkpoint passes a message when it
/// and all before it in its shard are finished. An `Ack` that is dropped counts as a failure, so that no
/// message is forgotten.
#[derive(Debug)]
#[must_use = "a message that is not acknowledged comes again"]
pub struct Ack {
    serial: u64,
    /// Taken when it is answered.
    to: Option<mpsc::UnboundedSender<Answer>>,
}

/// What became of a message.
#[derive(Debug)]
pub(crate) struct Answer {
    pub serial: u64,
    /// What went wrong, unless it is finished.
    pub failed: Option<String>,
}

impl Ack {
    pub(crate) fn new(serial: u64, to: mpsc::UnboundedSender<Answer>) -> Self {
        Self { serial, to: Some(to) }
    }

    /// The message is finished.
    pub fn ack(mut self) {
        self.answer(None);
    }

    /// The message could not be handled. It is offered again, alone, as a batch that failed is, and then
    /// the worker's policy applies.
    pub fn nack(mut self, reason: impl fmt::Display) {
        self.answer(Some(reason.to_string()));
    }

    fn answer(&mut self, failed: Option<String>) {
        if let Some(to) = self.to.take() {
            // Nobody listens when the shard is not read here any more.
            let _ = to.send(Answer { serial: self.serial, failed });
        }
    }
}

impl Drop for Ack {
    fn drop(&mut self) {
        self.answer(Some("it was dropped without an acknowledgement".to_owned()));
    }
}
