//! The worker as a stream of messages, and as something to poll: other fronts of the same engine, by a
//! handler that hands its messages on and acknowledges them when it is told to.

use std::{
    fmt,
    ops::Deref,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{sync::mpsc, task::JoinHandle, time::Instant};
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;

use super::{Observer, Report, WorkerBuilder, WorkerError};
use crate::{
    handler::{Ack, Batch, Handler},
    record::Message,
    shard::ShardId,
};

/// How many messages wait between the worker and whoever takes them.
const WAITING_MESSAGES: usize = 1024;

impl WorkerBuilder<()> {
    /// Starts the worker, and gives its messages as a stream, instead of a handler being called.
    ///
    /// Each message is to be acknowledged; the checkpoint of its shard stays before the first one that is
    /// not. Within a shard messages come in order. Reading waits while as many messages as
    /// [`max_unacked`](Self::max_unacked) of a shard are not acknowledged. There is no time limit for
    /// them, whatever [`retries`](Self::retries) says.
    ///
    /// ```no_run
    /// # async fn example(aws: aws_config::SdkConfig) -> Result<(), tramline::WorkerError> {
    /// use tokio_stream::StreamExt as _;
    /// use tramline::Worker;
    ///
    /// let mut messages = Worker::builder(&aws, "ctd-ocs-raw-messages", "rtr-green").messages().await?;
    /// while let Some(message) = messages.next().await {
    ///     println!("{}", message.raw());
    ///     message.ack();
    /// }
    /// messages.finish().await?; // Why the stream ended.
    /// # Ok(())
    /// # }
    /// ```
    pub async fn messages(self) -> Result<Messages, WorkerError> {
        let (to, from_worker) = mpsc::channel(WAITING_MESSAGES);
        let worker = self
            .without_time_limit()
            .handler(move |_: &ShardId| HandOn(to.clone()))
            .build()
            .await?;
        let observer = worker.observer();
        let stop = CancellationToken::new();
        let running = tokio::spawn(worker.run(stop.clone().cancelled_owned()));
        let _stop = stop.clone().drop_guard();
        Ok(Messages { from_worker, running: Some(running), observer, _stop, stop })
    }

    /// Starts the worker, to be polled for messages. For the rest it is as [`messages`](Self::messages) is.
    ///
    /// ```no_run
    /// # async fn example(aws: aws_config::SdkConfig) -> Result<(), tramline::WorkerError> {
    /// use std::time::Duration;
    /// use tramline::Worker;
    ///
    /// let mut poller = Worker::builder(&aws, "ctd-ocs-raw-messages", "rtr-green").poller().await?;
    /// for message in poller.poll(Some(Duration::from_secs(1))).await? {
    ///     println!("{}", message.raw());
    /// } // The next poll acknowledges these.
    /// poller.finish().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn poller(self) -> Result<Poller, WorkerError> {
        Ok(Poller { messages: self.messages().await?, unacked: Vec::new() })
    }
}

/// Hands messages on.
struct HandOn(mpsc::Sender<Received>);

/// Nobody takes messages any more.
struct NobodyTakes;

impl fmt::Display for NobodyTakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the stream of messages was dropped")
    }
}

impl Handler for HandOn {
    type Error = NobodyTakes;

    async fn handle(&mut self, batch: &Batch) -> Result<(), NobodyTakes> {
        for (message, ack) in batch.iter().zip(batch.ack_later()) {
            let received = Received { message: message.clone(), ack };
            self.0.send(received).await.map_err(|_| NobodyTakes)?;
        }
        Ok(())
    }
}

/// A message that is to be acknowledged. One that is dropped instead counts as failed.
#[derive(Debug)]
#[must_use = "a message that is not acknowledged comes again"]
pub struct Received {
    message: Message,
    ack: Ack,
}

impl Received {
    /// The message is finished.
    pub fn ack(self) {
        self.ack.ack();
    }

    /// The message could not be handled: it comes again, as often as
    /// [`Retries`](crate::Retries) says, and then the policy applies.
    pub fn nack(self, reason: impl fmt::Display) {
        self.ack.nack(reason);
    }

    /// Both apart, to acknowledge elsewhere.
    pub fn into_parts(self) -> (Message, Ack) {
        (self.message, self.ack)
    }
}

impl Deref for Received {
    type Target = Message;

    fn deref(&self) -> &Message {
        &self.message
    }
}

/// The messages of a worker, of all its shards. Made by [`WorkerBuilder::messages`].
///
/// It ends when the worker does, also by an error: [`finish`](Self::finish) tells. Dropping it stops the
/// worker in the background.
#[derive(Debug)]
#[must_use = "the worker stops when this is dropped"]
pub struct Messages {
    from_worker: mpsc::Receiver<Received>,
    running: Option<JoinHandle<Result<Report, WorkerError>>>,
    observer: Observer,
    stop: CancellationToken,
    _stop: tokio_util::sync::DropGuard,
}

impl Messages {
    /// Tells how the worker is doing.
    pub fn observer(&self) -> Observer {
        self.observer.clone()
    }

    /// Stops the worker cleanly: no new messages are read. Those that were are still given out, and
    /// their acknowledgements waited for within the shutdown limit.
    pub fn stop(&self) {
        self.stop.cancel();
    }

    /// Stops the worker, and tells what it did, or why it ended. Messages that were not taken are read
    /// again by the next worker.
    pub async fn finish(mut self) -> Result<Report, WorkerError> {
        self.stop();
        self.from_worker.close();
        while self.from_worker.try_recv().is_ok() {}
        self.ended().await
    }

    async fn ended(&mut self) -> Result<Report, WorkerError> {
        match self.running.take() {
            Some(running) => running.await.unwrap_or_else(|error| {
                Err(WorkerError::Panic { shard: "unknown".into(), reason: error.to_string() })
            }),
            None => Ok(Report::default()),
        }
    }
}

impl Stream for Messages {
    type Item = Received;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Received>> {
        self.from_worker.poll_recv(context)
    }
}

/// A worker that is polled. Made by [`WorkerBuilder::poller`]. Dropping it stops the worker in the
/// background.
#[derive(Debug)]
#[must_use = "the worker stops when this is dropped"]
pub struct Poller {
    messages: Messages,
    /// Of what the last poll gave.
    unacked: Vec<Ack>,
}

impl Poller {
    /// Gives everything that has come since the last poll, in the order of its shards, and acknowledges
    /// what that one gave. If nothing has, it waits for up to `timeout`, or for ever if that is `None`. An
    /// empty list says that nothing came; an error, why the worker ended.
    pub async fn poll(&mut self, timeout: Option<Duration>) -> Result<Vec<Message>, WorkerError> {
        self.acknowledge();
        let first = match timeout.map(|timeout| Instant::now() + timeout) {
            Some(until) => {
                match tokio::time::timeout_at(until, self.messages.from_worker.recv()).await {
                    Ok(first) => first,
                    Err(_) => return Ok(Vec::new()),
                }
            }
            None => self.messages.from_worker.recv().await,
        };
        let Some(first) = first else {
            return self.messages.ended().await.map(|_| Vec::new());
        };
        let mut polled = Vec::new();
        let mut next = Some(first);
        while let Some(received) = next {
            let (message, ack) = received.into_parts();
            polled.push(message);
            self.unacked.push(ack);
            next = self.messages.from_worker.try_recv().ok();
        }
        Ok(polled)
    }

    /// Acknowledges what the last poll gave, before the next one does.
    pub fn acknowledge(&mut self) {
        self.unacked.drain(..).for_each(Ack::ack);
    }

    /// Says that what the last poll gave could not be handled: it comes again.
    pub fn refuse(&mut self, reason: impl fmt::Display) {
        for ack in self.unacked.drain(..) {
            ack.nack(&reason);
        }
    }

    /// Stops the worker, and tells what it did. What the last poll gave and was not acknowledged is read
    /// again.
    pub async fn finish(mut self) -> Result<Report, WorkerError> {
        self.unacked.clear();
        self.messages.finish().await
    }
}
