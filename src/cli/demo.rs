use std::{
    collections::HashMap,
    fmt,
    io::Write as _,
    net::SocketAddr,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use clap::Args;
use hdrhistogram::Histogram;
use indicatif::ProgressBar;
use jiff::Timestamp;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    Outcome,
    generate::{Traffic, progress_bar},
};
use crate::{
    Batch, Handler, ListenerSettings, OcsListener, PartitionKey, ProducerReport, ProducerSettings,
    Retrieval, SequencePer, Spool, Worker,
    feed::{Format, Stdout},
    local::{Local, LocalSettings},
};

const STREAM: &str = "ctd-ocs-raw-messages";
const APPLICATION: &str = "tramline-demo";
/// The demo has failed when no message came for this long.
const PATIENCE: Duration = Duration::from_secs(30);
/// An hour: what took longer is counted as that.
const LATENCY_LIMIT_MICROS: u64 = 3_600_000_000;

/// Show the whole way of a message on embedded servers
///
/// All in one process, over real sockets: a traffic generator connects to
/// the producer, the producer writes to an embedded Kinesis, and a worker with leases in an embedded
/// DynamoDB reads from it. Messages go to stdout, one JSON object a line. The exit code is 0 only if
/// every message came out, in the order of its connection.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tramline demo
  tramline demo --messages 20000 --rate 0 --shards 4 --connections 8
  tramline demo --profile morning --retrieval polling > messages.jsonl")]
pub(super) struct Demo {
    #[command(flatten)]
    traffic: Traffic,

    /// How many shards the stream has
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=500))]
    shards: u32,

    /// How the worker fetches records
    #[arg(long, value_enum, default_value_t)]
    retrieval: Retrieval,
}

impl Demo {
    pub(super) async fn run(self, stop: CancellationToken) -> Outcome {
        let local = Local::start(LocalSettings::default()).await?;
        let config = local.sdk_config();
        local.create_stream(STREAM, self.shards).await?;

        // With readable partition keys the messages of a connection can be told by its address.
        let settings = ListenerSettings {
            partition_key: PartitionKey::Connection,
            // Each of its senders counts for itself, and all have one address.
            sequence_per: SequencePer::Connection,
            producer: ProducerSettings { spool: Spool::Memory, ..Default::default() },
            ..Default::default()
        };
        let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
        let producer = OcsListener::bind(&config, STREAM, any_port, settings).await?;
        let address = producer.local_addr()?;
        let producer_stop = CancellationToken::new();
        let producing = tokio::spawn(producer.run(producer_stop.clone().cancelled_owned()));

        let progress = progress_bar(self.traffic.messages, "messages");
        let senders = self.traffic.connect(&address.to_string()).await?;
        let mut checker = Checker::new();
        for (n, sender) in (0..).zip(&senders) {
            let peer = sender.socket.get_ref().local_addr()?;
            let key = format!("{{{address} -> {peer}}}");
            checker.expect(key, self.traffic.messages_of(n));
        }
        let checker = Arc::new(Mutex::new(checker));

        let stdout = Stdout::new(Format::Json)?;
        let handler =
            Check { stdout: stdout.clone(), checker: checker.clone(), progress: progress.clone() };
        let building = Worker::builder(&config, STREAM, APPLICATION)
            .retrieval(self.retrieval)
            .handler(move |_| handler.clone())
            .build();
        let sending = self.traffic.send(senders, |_| {});
        let working = async {
            let shutdown = async {
                tokio::select! {
                    () = all_seen(&checker) => {}
                    () = stop.cancelled() => {}
                    () = stdout.closed() => {}
                }
            };
            building.await?.run(shutdown).await
        };
        // The traffic starts at once; the worker finds what came before it. A worker that ends early
        // ends the demo.
        let (mut sending, mut working) = (pin!(sending), pin!(working));
        let worked = tokio::select! {
            biased;
            worked = &mut working => worked,
            sent = &mut sending => {
                sent?;
                working.await
            }
        };
        worked?;
        producer_stop.cancel();
        let produced = producing.await??;
        progress.finish_and_clear();

        let checker = lock(&checker);
        let summary = Summary { checker: &checker, produced, shards: self.shards };
        // A closed stderr is no reason to fail.
        let _ = write!(std::io::stderr().lock(), "{summary}");
        match checker.passed() {
            true => Ok(()),
            false => Err("not every message came out in order: see the summary".into()),
        }
    }
}

/// Completes when every message was seen, or when none came for a long time.
async fn all_seen(checker: &Mutex<Checker>) {
    let mut last = (0, Instant::now());
    loop {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let (seen, expected) = {
            let checker = lock(checker);
            (checker.seen, checker.expected)
        };
        if seen != last.0 {
            last = (seen, Instant::now());
        }
        if seen >= expected || last.1.elapsed() > PATIENCE {
            return;
        }
    }
}

/// Prints messages, and checks and times them.
#[derive(Clone)]
struct Check {
    stdout: Stdout,
    checker: Arc<Mutex<Checker>>,
    progress: ProgressBar,
}

impl Handler for Check {
    type Error = std::io::Error;

    async fn handle(&mut self, batch: &Batch) -> Result<(), Self::Error> {
        let now = Timestamp::now();
        self.stdout.handle(batch).await?;
        let mut checker = lock(&self.checker);
        for message in batch {
            if let Some(received) = message.time() {
                let micros = now.duration_since(received).as_micros();
                checker.latency_micros.saturating_record(u64::try_from(micros).unwrap_or(0));
            }
            checker.see(message.partition_key(), message.raw());
        }
        self.progress.set_position(checker.seen);
        Ok(())
    }
}

/// Holds what came out against what went in.
struct Checker {
    connections: HashMap<String, Expected>,
    expected: u64,
    /// Distinct messages that came out.
    seen: u64,
    duplicates: u64,
    out_of_order: u64,
    /// Messages that nobody sent.
    unknown: u64,
    latency_micros: Histogram<u64>,
}

/// The messages of one connection, by their place, and the place that is due.
#[derive(Default)]
struct Expected {
    place: HashMap<String, usize>,
    seen: Vec<bool>,
    due: usize,
}

impl Checker {
    fn new() -> Self {
        Self {
            connections: HashMap::new(),
            expected: 0,
            seen: 0,
            duplicates: 0,
            out_of_order: 0,
            unknown: 0,
            latency_micros: Histogram::new_with_max(LATENCY_LIMIT_MICROS, 3)
                .expect("three digits are within the allowed five"),
        }
    }

    fn expect(&mut self, partition_key: String, messages: impl Iterator<Item = String>) {
        let place: HashMap<String, usize> = messages.zip(0..).collect();
        self.expected += place.len() as u64;
        let seen = vec![false; place.len()];
        self.connections.insert(partition_key, Expected { place, seen, due: 0 });
    }

    fn see(&mut self, partition_key: &str, raw: &str) {
        let connection = self.connections.get_mut(partition_key);
        let Some((connection, place)) =
            connection.and_then(|c| c.place.get(raw).copied().map(|place| (c, place)))
        else {
            self.unknown += 1;
            return;
        };
        if std::mem::replace(&mut connection.seen[place], true) {
            self.duplicates += 1;
            return;
        }
        self.seen += 1;
        if place != connection.due {
            self.out_of_order += 1;
        }
        connection.due = place + 1;
    }

    fn passed(&self) -> bool {
        self.seen == self.expected && self.out_of_order == 0 && self.unknown == 0
    }
}

struct Summary<'a> {
    checker: &'a Checker,
    produced: ProducerReport,
    shards: u32,
}

impl fmt::Display for Summary<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Checker { expected, seen, duplicates, out_of_order, unknown, latency_micros, .. } =
            self.checker;
        let millis = |micros: u64| micros as f64 / 1000.0;
        let quantile = |q| millis(latency_micros.value_at_quantile(q));
        writeln!(f, "messages      {seen} of {expected}")?;
        writeln!(f, "connections   {}", self.produced.connections)?;
        writeln!(f, "shards        {}", self.shards)?;
        writeln!(f, "records       {}", self.produced.records)?;
        writeln!(f, "bytes         {}", self.produced.bytes)?;
        writeln!(f, "duplicates    {duplicates}")?;
        writeln!(f, "out of order  {out_of_order}")?;
        if *unknown > 0 {
            writeln!(f, "unknown       {unknown}")?;
        }
        writeln!(
            f,
            "latency       p50 {:.1} ms, p99 {:.1} ms, p99.9 {:.1} ms, max {:.1} ms (TCP read to handler)",
            quantile(0.5),
            quantile(0.99),
            quantile(0.999),
            millis(latency_micros.max())
        )?;
        let verdict =
            if self.checker.passed() { "every message came out, in order" } else { "FAILED" };
        writeln!(f, "verdict       {verdict}")
    }
}

fn lock(checker: &Mutex<Checker>) -> MutexGuard<'_, Checker> {
    checker.lock().unwrap_or_else(|poison| poison.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(seen: &[&str]) -> Checker {
        let mut checker = Checker::new();
        checker.expect("key".into(), ["a", "b", "c"].map(str::to_owned).into_iter());
        for raw in seen {
            checker.see("key", raw);
        }
        checker
    }

    #[test]
    fn the_demo_passes_only_when_every_message_came_in_order() {
        assert!(checked(&["a", "b", "c"]).passed());
        assert!(checked(&["a", "b", "b", "a", "c"]).passed(), "repeats are allowed, and counted");
        assert_eq!(checked(&["a", "b", "b", "a", "c"]).duplicates, 2);
        assert!(!checked(&["a", "b"]).passed());
        assert!(!checked(&["a", "c", "b"]).passed());
        assert!(!checked(&["a", "b", "c", "d"]).passed());
    }

    #[test]
    fn a_message_of_another_connection_is_unknown() {
        let mut checker = checked(&["a", "b", "c"]);
        checker.see("other", "a");
        assert!(!checker.passed());
    }
}
