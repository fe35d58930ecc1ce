//! From a stream into a TCP port: a worker that stores nothing, with a handler that sends.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, MutexGuard, OnceLock},
    time::Duration,
};

use aws_types::SdkConfig;
use jiff::Timestamp;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::{Interrupt, ReplayError, Speed, Summary, outlet::Outlet};
use crate::{Batch, Handler, Retries, ShardId, StartPosition, Tenure, Worker, record::Message};

/// A shard's messages are sent in pieces of so many bytes, so that shards take turns.
const PIECE_BYTES: usize = 64 * 1024;
/// A shard may wait for hours until a message is due: that is no reason to start it again.
const NEVER_STUCK: Duration = Duration::MAX;

/// What to replay of a stream.
#[derive(Debug)]
pub(crate) struct StreamReplay {
    pub stream: String,
    pub start: StartPosition,
    /// Where it ends; without, it goes on until it is stopped.
    pub until: Option<Timestamp>,
    pub speed: Speed,
}

/// Sends a stream's messages, those of each shard in their order. With a pace, those of different
/// shards come by their times; without, as they are read.
pub(crate) async fn replay_stream(
    config: &SdkConfig,
    replay: StreamReplay,
    to: &str,
    stop: &CancellationToken,
    progress: impl Fn(u64) + Send + Sync + 'static,
) -> Result<Summary, ReplayError> {
    let outlet = tokio::select! {
        outlet = Outlet::connect(to) => outlet
            .map_err(|source| ReplayError::Connect { to: to.to_owned(), source })?,
        () = stop.cancelled() => return Ok(Summary { stopped: true, ..Summary::default() }),
    };
    let shared = Arc::new(Shared {
        speed: replay.speed,
        outlet: tokio::sync::Mutex::new(outlet),
        first: OnceLock::new(),
        sent: Mutex::default(),
        stop: stop.child_token(),
        progress: Box::new(progress),
    });
    let mut worker = Worker::builder(config, replay.stream, "replay")
        .start(replay.start)
        .no_checkpoint()
        .watchdog(NEVER_STUCK)
        // A receiver that went away ends it, by the stop; until then there is nothing else to do.
        .retries(Retries { attempts: u32::MAX, time_limit: None, ..Retries::default() });
    if let Some(until) = replay.until {
        worker = worker.until(until);
    }
    let sender = shared.clone();
    let worker = tokio::select! {
        built = worker.handler(move |_: &ShardId| Forward { shared: sender.clone() }).build() => built?,
        () = stop.cancelled() => return Ok(Summary { stopped: true, ..Summary::default() }),
    };
    let ran = worker.run(shared.stop.clone().cancelled_owned()).await;
    let Sent { messages, shards, failed } = std::mem::take(&mut *shared.sent());
    if let Some(source) = failed {
        let resume = match resume_at(&shards) {
            Some(time) => format!("--start {time} goes on, and sends some again"),
            None => "start it again as it was: a shard had not sent anything yet".to_owned(),
        };
        return Err(ReplayError::Gone { to: to.to_owned(), messages, resume, source });
    }
    let report = ran?;
    let stopped = stop.is_cancelled();
    Ok(Summary { messages, bad_lines: report.undecodable, stopped, ..Summary::default() })
}

/// Everything that arrived before was sent: the earliest of what the shards sent last. `None` if one
/// has sent nothing.
fn resume_at(shards: &BTreeMap<ShardId, Option<Timestamp>>) -> Option<Timestamp> {
    shards.values().copied().min().flatten()
}

/// How long after the first message another one is due. What is from before it is late.
fn due_after(speed: Speed, first: Timestamp, at: Timestamp) -> Duration {
    speed.scaled(Duration::try_from(at.duration_since(first)).unwrap_or(Duration::ZERO))
}

struct Shared {
    speed: Speed,
    outlet: tokio::sync::Mutex<Outlet<(ShardId, Option<Timestamp>)>>,
    /// When the first message was sent, and its time: the others are due by it.
    first: OnceLock<(Instant, Timestamp)>,
    sent: Mutex<Sent>,
    stop: CancellationToken,
    progress: Box<dyn Fn(u64) + Send + Sync>,
}

#[derive(Default)]
struct Sent {
    messages: u64,
    /// When what each shard sent last had arrived in the stream.
    shards: BTreeMap<ShardId, Option<Timestamp>>,
    failed: Option<io::Error>,
}

impl Shared {
    fn sent(&self) -> MutexGuard<'_, Sent> {
        self.sent.lock().unwrap_or_else(|poison| poison.into_inner())
    }

    /// When a message is due; `None` at once.
    fn due(&self, message: &Message) -> Option<Instant> {
        let at = message.time().or(message.arrived_at())?;
        let (began, first) = self.first.get_or_init(|| (Instant::now(), at));
        began.checked_add(due_after(self.speed, *first, at))
    }

    async fn flush(
        &self,
        outlet: &mut Outlet<(ShardId, Option<Timestamp>)>,
    ) -> Result<(), Interrupt> {
        let flushed = outlet.flush(|(shard, arrived_at)| {
            let mut sent = self.sent();
            sent.messages += 1;
            if arrived_at.is_some() {
                sent.shards.insert(shard, arrived_at);
            }
            (self.progress)(sent.messages);
        });
        flushed.await.map_err(Interrupt::Gone)
    }
}

/// Sends the messages of one shard.
struct Forward {
    shared: Arc<Shared>,
}

impl Forward {
    async fn send(&self, batch: &Batch) -> Result<(), Interrupt> {
        let shared = &self.shared;
        let mut messages = batch.iter().peekable();
        while let Some(next) = messages.peek() {
            if let Some(due) = shared.due(next).filter(|due| *due > Instant::now()) {
                sleep_until(due).await;
            }
            let mut outlet = shared.outlet.lock().await;
            while let Some(message) = messages.next_if(|message| {
                outlet.waiting_bytes() < PIECE_BYTES
                    && shared.due(message).is_none_or(|due| due <= Instant::now())
            }) {
                let mark = (message.shard().clone(), message.arrived_at());
                outlet.push(&message.raw_bytes(), mark);
            }
            shared.flush(&mut outlet).await?;
        }
        Ok(())
    }
}

impl Handler for Forward {
    type Error = io::Error;

    async fn started(&mut self, tenure: &Tenure) {
        self.shared.sent().shards.entry(tenure.shard.clone()).or_default();
    }

    async fn handle(&mut self, batch: &Batch) -> Result<(), io::Error> {
        let stop = self.shared.stop.clone();
        let sent = tokio::select! {
            biased;
            () = stop.cancelled() => return Err(io::Error::other("the replay stops")),
            sent = self.send(batch) => sent,
        };
        match sent {
            Err(Interrupt::Gone(error)) => {
                let told = io::Error::new(error.kind(), error.to_string());
                self.shared.sent().failed.get_or_insert(error);
                stop.cancel();
                Err(told)
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_all_shards_are_due_by_their_times_since_the_first_one() {
        let at = |text: &str| text.parse::<Timestamp>().expect("a time");
        let first = at("2025-07-02T06:00:00Z");
        for (time, seconds) in [
            ("2025-07-02T06:00:00Z", 0.0),
            ("2025-07-02T06:01:00Z", 30.0),
            ("2025-07-02T05:59:00Z", 0.0),
        ] {
            let due = due_after(Speed::Times(2.0), first, at(time));
            assert_eq!(due, Duration::from_secs_f64(seconds), "{time}");
        }
    }

    #[test]
    fn it_goes_on_where_the_shard_is_that_is_least_far() {
        let at = |text: &str| text.parse::<Timestamp>().ok();
        let shards = |times: [Option<Timestamp>; 2]| {
            ["a", "b"].map(ShardId::from).into_iter().zip(times).collect()
        };
        let (early, late) = (at("2025-07-02T06:00:00Z"), at("2025-07-02T06:00:01Z"));
        assert_eq!(resume_at(&shards([late, early])), early);
        assert_eq!(resume_at(&shards([late, None])), None);
        assert_eq!(resume_at(&BTreeMap::new()), None);
    }
}
