use std::{
    error::Error,
    io::{ErrorKind, Write as _},
    time::Duration,
};

use aws_config::SdkConfig;
use clap::Args;
use futures_util::{StreamExt as _, stream};
use jiff::Timestamp;
use serde::Serialize;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    Outcome,
    application::{Application, Look},
    screen::Screen,
    values,
};
use crate::{
    Checkpoints,
    checkpoint::{Checkpoint, StateDocument},
    lease::{
        Lease,
        overview::{self, ShardOverview, State, WorkerOverview},
    },
    source::{Lag, Place, Stream, Streams},
};

const REDRAW_INTERVAL: Duration = Duration::from_secs(2);
/// How many shards are asked for their lag at once.
const CONCURRENT_LAGS: usize = 8;
const TABLE_WIDTH: usize = 80;
/// Of a sequence number, only the last digits differ from one hour to the next.
const CHECKPOINT_WIDTH: usize = 14;

/// Show an application's shards, who reads them and how far
///
/// And its workers. It reads the lease table, or the documents that keep checkpoints, and lists the stream's
/// shards, and writes nothing.
///
/// The table has no times, so whether an owner lives shows only in that it renews its leases: the table
/// is looked at each second until every owner was seen to, for --observe at most.
#[derive(Debug, Args)]
#[command(
    after_long_help = "States:
  reading        its owner was seen to renew the lease
  not renewed    it was not: others take the shard when the lease has run out
  held           it has an owner that was not watched for long enough (--quick)
  handing over   the owner was asked to let go of it for another worker
  waiting        nobody has it, because a parent is not finished
  free           nobody has it; the next worker takes it
  finished       it is read to its end
  expired        the stream does not list it any more
  no lease       no worker has made a lease for it yet
  unreadable     its row cannot be read as a lease

Where one object or file holds every shard (--checkpoint without {shard}), there are no leases: `reading`
says that it was seen to be written, `free` that it was not, so that its worker is idle or gone.

With --json, one object on one line:
  stream, application, table (null where one document holds every shard)
  documents[]: place, writer, written_at
  shards[]: stream, shard, parents[], closed, state (words joined by hyphens), owner, next_owner (during
    a hand-over), renewed (true, false, or null if not watched for long enough), waiting_for[],
    checkpoint (a sequence number or a word of the KCL's), sub_sequence_number, start_at, since (when the
    owner took it), renewals (since then), last_error, last_error_at, last_error_is_over, counter (how
    often the lease was written), owner_switches_since_checkpoint; with --lag checkpoint_arrived_at,
    checkpoint_age_ms, lag_ms, lag_records (0, or null: Kinesis tells no number), lag_error
  workers[]: worker, shards, asked_for, renews

Examples:
  tramline status --stream ctd-ocs-raw-messages --app rtr-green --lag
  tramline status --stream ctd-ocs-raw-messages --app rtr-green --watch
  tramline status --stream ctd-ocs-raw-messages --app rtr-green --quick --json | jq '.workers'",
    after_help = "Examples:
  tramline status --stream ctd-ocs-raw-messages --app rtr-green --lag
  tramline status --stream ctd-ocs-raw-messages --app rtr-green --watch
  tramline status --stream ctd-ocs-raw-messages --app rtr-green --quick --json | jq '.workers'"
)]
pub(super) struct Status {
    #[command(flatten)]
    application: Application,

    /// Where the application's workers keep checkpoints: dynamodb, s3://BUCKET/KEY or file:///PATH, as they
    /// are told it
    #[arg(long, value_name = "PLACE", value_parser = values::checkpoints, default_value = "dynamodb")]
    checkpoint: Checkpoints,

    /// Print one JSON object on one line
    #[arg(long)]
    json: bool,

    /// Show it every 2 s until Ctrl-C
    #[arg(long)]
    watch: bool,

    /// Look once, and do not wait for renewals: one scan of the table
    #[arg(long)]
    quick: bool,

    /// Ask the stream how old each checkpoint is and how far it is behind: a GetShardIterator and one or
    /// two GetRecords of one record for each shard, which count towards its five reads a second
    #[arg(long)]
    lag: bool,
}

/// What one look found; with `--json` as it is.
#[derive(Debug, Serialize)]
struct Report {
    at: Timestamp,
    stream: String,
    application: String,
    table: Option<String>,
    documents: Vec<DocumentReport>,
    shards: Vec<ShardReport>,
    workers: Vec<WorkerOverview>,
}

/// A document with checkpoints.
#[derive(Debug, Serialize)]
struct DocumentReport {
    place: String,
    writer: String,
    written_at: Timestamp,
}

impl DocumentReport {
    fn new(document: &StateDocument) -> Self {
        Self {
            place: document.place.clone(),
            writer: document.writer().to_owned(),
            written_at: document.written_at(),
        }
    }
}

#[derive(Debug, Serialize)]
struct ShardReport {
    stream: String,
    #[serde(flatten)]
    shard: ShardOverview,
    #[serde(flatten)]
    lag: Option<LagReport>,
}

/// What the stream told of a shard.
#[derive(Debug, Default, Serialize)]
struct LagReport {
    checkpoint_arrived_at: Option<Timestamp>,
    checkpoint_age_ms: Option<u64>,
    lag_ms: Option<u64>,
    lag_records: Option<u64>,
    lag_error: Option<String>,
}

impl LagReport {
    fn new(lag: Lag, now: Timestamp) -> Self {
        let age = lag.finished_arrived_at.map(|at| now.duration_since(at).as_millis());
        Self {
            checkpoint_arrived_at: lag.finished_arrived_at,
            checkpoint_age_ms: age.map(|age| u64::try_from(age).unwrap_or(0)),
            lag_ms: lag.behind.map(|lag| u64::try_from(lag.as_millis()).unwrap_or(u64::MAX)),
            lag_records: lag.records,
            lag_error: None,
        }
    }
}

impl Status {
    pub(super) async fn run(self, config: &SdkConfig, stop: CancellationToken) -> Outcome {
        tokio::select! {
            result = self.show(config) => result,
            () = stop.cancelled() => Ok(()),
        }
    }

    async fn show(&self, config: &SdkConfig) -> Outcome {
        let streams = self.application.streams(config).await?;
        let mut look = self.application.look(config, &streams, &self.checkpoint)?;
        // What never worked is a mistake; what worked once may work again.
        let mut report = self.report(&streams, &mut look).await?;
        if !self.watch {
            self.print(&report)?;
            return Ok(());
        }
        let screen = if self.json { None } else { Screen::open()? };
        let mut failure = None;
        loop {
            match &screen {
                Some(screen) => screen.draw(&watched(&report, failure.as_deref(), self.lag))?,
                None if failure.is_some() => {}
                None if !self.print(&report)? => return Ok(()),
                None => {}
            }
            tokio::time::sleep(REDRAW_INTERVAL).await;
            failure = match self.report(&streams, &mut look).await {
                Ok(next) => {
                    report = next;
                    None
                }
                Err(error) => Some(error.to_string()),
            };
            if let (None, Some(failure)) = (&screen, &failure) {
                tracing::warn!("{failure}; trying again");
            }
        }
    }

    async fn report(
        &self,
        streams: &Streams,
        look: &mut Look,
    ) -> Result<Report, Box<dyn Error + Send + Sync>> {
        let listed = streams.shards().await?;
        let limit = self.application.observe;
        if self.watch || self.quick {
            look.once(&listed, limit).await?;
        } else {
            look.watch(&listed, limit).await?;
        }
        let shards = overview::shards(&listed, &look.leases, &look.observed, limit, Instant::now());
        let workers = overview::workers(&shards);
        let shards = stream::iter(shards)
            .map(async |shard| {
                let lease = look.leases.iter().find(|lease| lease.shard == shard.shard);
                let lag = match lease {
                    Some(lease) if self.lag => match streams.of(&lease.shard) {
                        Some(stream) => Some(lag(stream, lease, shard.state).await),
                        None => Some(LagReport::default()),
                    },
                    _ => self.lag.then(LagReport::default),
                };
                let stream = streams.of(&shard.shard).map_or("", Stream::name).to_owned();
                ShardReport { stream, shard, lag }
            })
            .buffered(CONCURRENT_LAGS)
            .collect()
            .await;
        Ok(Report {
            at: Timestamp::now(),
            stream: self.application.stream.join(", "),
            application: self.application.app.clone(),
            table: look.table.as_ref().map(|_| self.application.table_name().to_owned()),
            documents: look.documents.iter().map(DocumentReport::new).collect(),
            shards,
            workers,
        })
    }

    /// Prints a report; `false` if nobody reads it any more.
    fn print(&self, report: &Report) -> Result<bool, Box<dyn Error + Send + Sync>> {
        let text = match (self.json, self.watch) {
            (true, _) => format!("{}\n", serde_json::to_string(report)?),
            (false, false) => text(report, self.lag),
            (false, true) => watched(report, None, self.lag) + "\n",
        };
        let mut stdout = std::io::stdout().lock();
        match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

async fn lag(stream: &Stream, lease: &Lease, state: State) -> LagReport {
    let place = match (&lease.checkpoint, lease.start_at) {
        _ if matches!(state, State::Finished | State::Expired | State::Unreadable) => None,
        (Checkpoint::At(position), _) => Some(Place::At(position.sequence_number.clone())),
        (Checkpoint::TrimHorizon, _) => Some(Place::TrimHorizon),
        (_, at) => at.map(Place::Time),
    };
    let Some(place) = place else { return LagReport::default() };
    let now = Timestamp::now();
    match stream.lag(&lease.shard, &place, now).await {
        Ok(lag) => LagReport::new(lag, now),
        Err(error) => LagReport { lag_error: Some(error.to_string()), ..LagReport::default() },
    }
}

/// What `--watch` shows: the last look that worked, and why there is no newer one.
fn watched(report: &Report, failure: Option<&str>, with_lag: bool) -> String {
    let mut text =
        format!("looked at    {:.0}, every {REDRAW_INTERVAL:?} until Ctrl-C\n", report.at);
    if let Some(failure) = failure {
        text.push_str(&wrapped(&format!(
            "OLD: the looks since then failed: {failure}; trying again"
        )));
    }
    text + &self::text(report, with_lag)
}

/// A text in lines that are no wider than a table, each with its end.
fn wrapped(text: &str) -> String {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let mut rest: Vec<char> = word.chars().collect();
        while !rest.is_empty() {
            let used = lines.last().map_or(0, |line| width(line));
            let room = TABLE_WIDTH.saturating_sub(used + usize::from(used > 0));
            // A word is cut where it has a line of its own and is longer than that.
            if room < rest.len() && used > 0 {
                lines.push(String::new());
                continue;
            }
            let cut = rest.len().min(room);
            let part: String = rest.drain(..cut).collect();
            if let Some(line) = lines.last_mut() {
                if used > 0 {
                    line.push(' ');
                }
                line.push_str(&part);
            }
        }
    }
    lines.join("\n") + "\n"
}

fn text(report: &Report, with_lag: bool) -> String {
    let Report { at, stream, application, table, documents, shards, workers } = report;
    let mut text = head("stream", stream) + &head("application", application);
    if let Some(table) = table {
        text.push_str(&head("lease table", table));
    }
    match documents.as_slice() {
        [one] if table.is_none() => {
            let ago = age_since(one.written_at, *at);
            let state = format!("{}, written {ago} ago by {}", one.place, one.writer);
            text.push_str(&head("state", &state));
        }
        _ => {}
    }
    text.push('\n');
    text.push_str(&shard_table(shards, with_lag, *at));
    if !workers.is_empty() {
        let mut columns = [
            Column::new("WORKER", 12),
            Column::new("SHARDS", 6),
            Column::new("ASKED FOR", 9),
            Column::new("RENEWS", 6),
        ];
        for worker in workers {
            let renews = worker.renews.map_or("?", |renews| if renews { "yes" } else { "no" });
            columns[0].push([worker.worker.clone()]);
            columns[1].push([worker.shards.to_string()]);
            columns[2].push([worker.asked_for.to_string()]);
            columns[3].push([renews.to_owned()]);
        }
        text.push('\n');
        text.push_str(&table_text(&columns, &[0]));
    }
    for ShardReport { shard, .. } in shards {
        if let (Some(error), Some(since)) = (&shard.last_error, shard.last_error_at) {
            let age = age_since(since, *at);
            let when = match shard.last_error_is_over {
                Some(true) => format!("over for {age}"),
                _ => format!("for {age}"),
            };
            let told = format!("{} ({when}): {error}", shard.shard.name());
            text.push_str(&format!("\n{}", wrapped(&told)));
        }
    }
    for shard in shards {
        if let Some(error) = shard.lag.as_ref().and_then(|lag| lag.lag_error.as_ref()) {
            text.push_str(&format!("\n{}", wrapped(&format!("lag unknown: {error}"))));
        }
    }
    text
}

/// A line of the head, or several if what it says is long.
fn head(name: &str, says: &str) -> String {
    let line = format!("{name:<13}{says}\n");
    if width(line.trim_end()) <= TABLE_WIDTH { line } else { wrapped(&format!("{name}: {says}")) }
}

fn shard_table(shards: &[ShardReport], with_lag: bool, at: Timestamp) -> String {
    let mut columns = vec![
        Column::new("SHARD", 13),
        Column::new("STATE", 12),
        Column { joint: " -> ", ..Column::new("OWNER", 12) },
        Column::new("CHECKPOINT", 9),
    ];
    // In the order of what is shortened first.
    let mut shorten = vec![0, 3, 2];
    let with_parents = shards.iter().any(|shard| !shard.shard.parents.is_empty());
    // Lag and parents leave no room for it.
    let with_since = !(with_lag && with_parents);
    if with_since {
        columns.push(Column::new("SINCE", 5));
    }
    if with_lag {
        columns.extend([Column::new("AGE", 5), Column::new("LAG", 5)]);
    }
    if with_parents {
        shorten.insert(0, columns.len());
        columns.push(Column::new("PARENTS", 11));
    }
    let several = shards.iter().any(|shard| shard.shard.shard.stream().is_some());
    for ShardReport { stream, shard, lag } in shards {
        let owners = [&shard.owner, &shard.next_owner].into_iter().flatten().cloned();
        let checkpoint = match (&shard.checkpoint, shard.sub_sequence_number) {
            (Some(text), 0) => text.clone(),
            (Some(text), sub) => format!("{text}/{sub}"),
            (None, _) => String::new(),
        };
        let name = shard.shard.name().to_owned();
        columns[0].push(if several { vec![stream.clone(), name] } else { vec![name] });
        columns[1].push([state(shard.state).to_owned()]);
        columns[2].push(owners);
        columns[3].push([shortened(&checkpoint, CHECKPOINT_WIDTH)]);
        if with_since {
            columns[4].push([shard.since.map_or(String::new(), |since| age_since(since, at))]);
        }
        if with_lag {
            let shown = |millis: Option<u64>| millis.map_or("?".to_owned(), age);
            let lag = lag.as_ref();
            let is_over = matches!(shard.state, State::Finished | State::Expired);
            let cell = |millis| if is_over { String::new() } else { shown(millis) };
            let first = 4 + usize::from(with_since);
            columns[first].push([cell(lag.and_then(|lag| lag.checkpoint_age_ms))]);
            columns[first + 1].push([cell(lag.and_then(|lag| lag.lag_ms))]);
        }
        if with_parents && let Some(column) = columns.last_mut() {
            column.push(shard.parents.iter().map(|parent| parent.name().to_owned()));
        }
    }
    table_text(&columns, &shorten)
}

fn state(state: State) -> &'static str {
    match state {
        State::Reading => "reading",
        State::Held => "held",
        State::NotRenewed => "not renewed",
        State::HandingOver => "handing over",
        State::Waiting => "waiting",
        State::Free => "free",
        State::Finished => "finished",
        State::Expired => "expired",
        State::NoLease => "no lease",
        State::Unreadable => "unreadable",
    }
}

/// How long ago something was; clocks of different machines may differ.
fn age_since(since: Timestamp, now: Timestamp) -> String {
    age(u64::try_from(now.duration_since(since).as_millis()).unwrap_or(0))
}

/// A length of time in five characters.
fn age(millis: u64) -> String {
    let (secs, minutes) = (millis / 1000, millis / 60_000);
    let (hours, days) = (minutes / 60, minutes / 60 / 24);
    match () {
        () if millis < 1000 => format!("{millis}ms"),
        () if secs < 10 => format!("{secs}.{}s", millis % 1000 / 100),
        () if secs < 100 => format!("{secs}s"),
        () if minutes < 100 => format!("{minutes}m"),
        () if hours < 100 => format!("{hours}h"),
        () => format!("{days}d"),
    }
}

/// A column of a table. A cell may have parts, each of which is shortened by itself.
struct Column {
    title: &'static str,
    joint: &'static str,
    least_width: usize,
    cells: Vec<Vec<String>>,
}

impl Column {
    fn new(title: &'static str, least_width: usize) -> Self {
        Self { title, joint: " ", least_width, cells: Vec::new() }
    }

    fn push(&mut self, parts: impl IntoIterator<Item = String>) {
        self.cells.push(parts.into_iter().collect());
    }

    fn width(&self) -> usize {
        let cells = self.cells.iter().map(|parts| width(&parts.join(self.joint)));
        cells.chain([self.title.len()]).max().unwrap_or(0)
    }

    fn cell(&self, row: usize, limit: usize) -> String {
        let Some(parts) = self.cells.get(row) else { return String::new() };
        let whole = parts.join(self.joint);
        if width(&whole) <= limit {
            return whole;
        }
        let joints = self.joint.len() * parts.len().saturating_sub(1);
        let each = limit.saturating_sub(joints) / parts.len().max(1);
        let parts: Vec<String> = parts.iter().map(|part| shortened(part, each)).collect();
        parts.join(self.joint)
    }
}

/// The columns beside each other; those of `shorten` give way, in this order, until all fit.
fn table_text(columns: &[Column], shorten: &[usize]) -> String {
    let mut widths: Vec<usize> = columns.iter().map(Column::width).collect();
    for &n in shorten {
        let needed = widths.iter().sum::<usize>() + 2 * widths.len().saturating_sub(1);
        let excess = needed.saturating_sub(TABLE_WIDTH);
        let least = columns[n].least_width.min(widths[n]);
        widths[n] = widths[n].saturating_sub(excess).max(least);
    }
    let rows = columns.iter().map(|column| column.cells.len()).max().unwrap_or(0);
    let line = |cells: Vec<String>| {
        let padded: Vec<String> = cells
            .iter()
            .zip(&widths)
            .map(|(cell, limit)| format!("{cell}{}", " ".repeat(limit.saturating_sub(width(cell)))))
            .collect();
        format!("{}\n", padded.join("  ").trim_end())
    };
    let mut text = line(columns.iter().map(|column| column.title.to_owned()).collect());
    for row in 0..rows {
        let cells = columns.iter().zip(&widths).map(|(column, limit)| column.cell(row, *limit));
        text.push_str(&line(cells.collect()));
    }
    text
}

fn width(text: &str) -> usize {
    text.chars().count()
}

/// The end of a text, which tells shards, workers and sequence numbers apart; of a shard, if there is
/// room, also what it is. Of a word of the KCL's the beginning.
fn shortened(text: &str, limit: usize) -> String {
    const SHARD: &str = "shardId-";
    let length = width(text);
    if length <= limit {
        return text.to_owned();
    }
    if text.bytes().all(|b| b.is_ascii_uppercase() || b == b'_') {
        return format!("{}…", &text[..limit.saturating_sub(1)]);
    }
    let start = if text.starts_with(SHARD) && limit > SHARD.len() + 4 { SHARD } else { "" };
    let keep = limit.saturating_sub(start.len() + 1);
    let end: String = text.chars().skip(length - keep.min(length)).collect();
    format!("{start}…{end}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shard(n: usize, state: State, owner: Option<&str>, parents: &[usize]) -> ShardReport {
        let id = |n: &usize| format!("shardId-{n:012}").into();
        ShardReport {
            stream: "s".into(),
            shard: ShardOverview {
                shard: id(&n),
                parents: parents.iter().map(id).collect(),
                closed: false,
                state,
                owner: owner.map(str::to_owned),
                next_owner: None,
                renewed: None,
                waiting_for: Vec::new(),
                checkpoint: Some("49590338271490256608559692538361571095921575989136588898".into()),
                sub_sequence_number: 0,
                start_at: None,
                since: Some(Timestamp::UNIX_EPOCH),
                renewals: Some(2),
                last_error: None,
                last_error_at: None,
                last_error_is_over: None,
                counter: Some(7),
                owner_switches_since_checkpoint: 0,
            },
            lag: Some(LagReport {
                checkpoint_age_ms: Some(61_000),
                lag_ms: Some(1_250),
                ..LagReport::default()
            }),
        }
    }

    fn report(shards: Vec<ShardReport>) -> Report {
        let overviews: Vec<ShardOverview> = shards.iter().map(|s| s.shard.clone()).collect();
        Report {
            at: Timestamp::from_second(7200).expect("a time"),
            stream: "s".into(),
            application: "a".into(),
            table: Some("t".into()),
            documents: Vec::new(),
            workers: overview::workers(&overviews),
            shards,
        }
    }

    #[test]
    fn a_small_table_is_not_shortened() {
        let report = report(vec![
            shard(0, State::Reading, Some("w1"), &[]),
            shard(1, State::Free, None, &[]),
        ]);
        let expected = "\
stream       s
application  a
lease table  t

SHARD                 STATE    OWNER  CHECKPOINT      SINCE
shardId-000000000000  reading  w1     …5989136588898  2h
shardId-000000000001  free            …5989136588898  2h

WORKER  SHARDS  ASKED FOR  RENEWS
w1      1       0          ?
";
        assert_eq!(text(&report, false), expected);
    }

    #[test]
    fn the_widest_table_has_80_columns() {
        let worker = "ip-10-10-10-10.us-east-1.compute.internal-12345-0a1b2c3d";
        let mut handing_over = shard(4, State::HandingOver, Some(worker), &[2, 3]);
        handing_over.shard.next_owner = Some(worker.replace("0a1b2c3d", "99999999"));
        let mut new = shard(0, State::Reading, Some(worker), &[]);
        new.shard.checkpoint = Some("TRIM_HORIZON".to_owned());
        let text = text(&report(vec![new, handing_over]), true);
        fits(&text);
        assert!(text.contains("shardId-…0004"), "{text}");
        assert!(text.contains("…0002 …0003"), "{text}");
        assert!(text.contains("61s  1.2s"), "{text}");
        assert!(text.contains("  TRIM_HOR…  "), "{text}");
    }

    #[test]
    fn ages_have_five_characters() {
        for (millis, shown) in [
            (0, "0ms"),
            (999, "999ms"),
            (1_250, "1.2s"),
            (61_000, "61s"),
            (100_000, "1m"),
            (3 * 3_600_000, "3h"),
            (30 * 86_400_000, "30d"),
        ] {
            assert_eq!(age(millis), shown);
        }
    }

    fn fits(text: &str) {
        for line in text.lines() {
            assert!(width(line) <= TABLE_WIDTH, "{line}");
        }
    }

    #[test]
    fn nothing_that_is_watched_is_wider_than_80_columns() {
        let long =
            "no answer from https://kinesis.us-east-1.amazonaws.com ".repeat(5) + &"x".repeat(200);
        let mut failing = shard(1, State::Reading, Some(&"w".repeat(300)), &[0]);
        failing.shard.last_error = Some(long.clone());
        failing.shard.last_error_at = Some(Timestamp::UNIX_EPOCH);
        let lag = LagReport { lag_error: Some(long.clone()), ..LagReport::default() };
        failing.lag = Some(lag);
        let mut report = report(vec![shard(0, State::Finished, None, &[]), failing]);
        report.stream = ["a".repeat(128), "b".repeat(128)].join(", ");
        report.application = "a".repeat(128);
        report.table = Some("t".repeat(255));
        for (failure, with_lag) in [(None, false), (Some(&*long), true)] {
            let text = watched(&report, failure, with_lag);
            fits(&text);
            assert!(text.starts_with("looked at    1970-01-01T02:00:00Z, every 2s until Ctrl-C\n"));
            assert_eq!(text.contains("OLD: the looks since then failed: no answer"), with_lag);
        }
        report.table = None;
        let place = format!("s3://bucket/{}", "k".repeat(1000));
        let (writer, written_at) = ("w".repeat(200), Timestamp::UNIX_EPOCH);
        report.documents = vec![DocumentReport { place, writer, written_at }];
        fits(&text(&report, true));
    }
}
