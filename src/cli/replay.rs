use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use super::{Global, Outcome, aws_config, generate::progress_target, values};
use crate::{
    StartPosition,
    handler::is_stream_name,
    replay::{Log, LogReplay, Speed, StreamReplay, Summary, replay_stream},
};

/// Send a logged day, or what is in a stream, to a TCP port as OCS would
///
/// A log has a message on each line: an archive's (MM/dd/yy,HH:mm:ss, and the OCS text), an OCS text
/// alone, or JSON, an event or what `tramline consume` prints; all plain or in gzip, which is told by what
/// is in it. Lines are sent in their order. A line that cannot be read is told with its number and left
/// out, and then the exit code is 1.
///
/// The pace is that of the log, by the time that a line begins with, the event's, or else the time of day
/// in the OCS text. A line whose time is before that of an earlier line is sent at once.
///
/// Of a stream, the messages of each shard are sent in their order; those of different shards by the
/// times of their events, or as they are read with --speed max. It has no end unless --until is given.
/// Nothing is stored.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tramline replay 20250702.txt --to 127.0.0.1:8001
  tramline replay day.jsonl.gz --to 127.0.0.1:8001 --speed 60
  cat 2025-07-02/*/*/*.txt | tramline replay - --to 127.0.0.1:8001 --speed max
  tramline replay kinesis://ctd-ocs-raw-messages --to 127.0.0.1:8001 \\
      --start 2025-07-02T06:00:00Z --until 2025-07-02T07:00:00Z")]
pub(super) struct Replay {
    /// A file, - for standard input, or kinesis://STREAM
    #[arg(value_name = "LOG", value_parser = from)]
    from: Origin,

    /// The host and port to connect to
    #[arg(long, value_name = "ADDRESS")]
    to: String,

    /// How many times as fast as it was, such as 0.5 or 60; max, or 0, is as fast as the receiver takes it
    #[arg(long, value_name = "X", value_parser = speed, default_value = "1")]
    speed: Speed,

    /// Where to begin in a log, and to go on after an interruption, which tells the number
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), default_value_t = 1)]
    from_line: u64,

    /// Where to begin in a stream: latest, trim-horizon, service-day or an RFC 3339 time
    #[arg(long, value_name = "POSITION", value_parser = values::start, default_value = "trim-horizon")]
    start: StartPosition,

    /// Where to end in a stream: nothing that arrived at this time or later is sent [default: no end]
    #[arg(long, value_name = "TIME", value_parser = values::time)]
    until: Option<Timestamp>,
}

/// Where messages come from.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Origin {
    Log(Log),
    Stream(String),
}

fn from(text: &str) -> Result<Origin, String> {
    match text.strip_prefix("kinesis://") {
        Some(stream) if is_stream_name(stream) => Ok(Origin::Stream(stream.to_owned())),
        Some(_) => Err("write a file, - or kinesis://STREAM".to_owned()),
        None if text == "-" => Ok(Origin::Log(Log::Stdin)),
        None => Ok(Origin::Log(Log::File(text.into()))),
    }
}

fn speed(text: &str) -> Result<Speed, String> {
    text.parse().map_err(str::to_owned)
}

impl Replay {
    pub(super) async fn run(self, global: &Global, stop: CancellationToken) -> Outcome {
        let bar = ProgressBar::with_draw_target(None, progress_target());
        let (summary, is_log) = match self.from {
            Origin::Log(log) => {
                let replay = LogReplay::open(log)?;
                show(&bar, replay.length_bytes);
                let progress = |at: crate::replay::Progress| {
                    bar.set_position(at.read_bytes);
                    bar.set_message(format!("line {}", at.line));
                };
                let sent = replay.send(&self.to, self.speed, self.from_line, &stop, progress).await;
                (sent, true)
            }
            Origin::Stream(stream) => {
                let config = aws_config(global).await?;
                let (start, until, speed) = (self.start, self.until, self.speed);
                let replay = StreamReplay { stream, start, until, speed };
                show(&bar, None);
                let shown = bar.clone();
                let progress = move |messages| shown.set_message(format!("{messages} messages"));
                let sent = replay_stream(&config, replay, &self.to, &stop, progress).await;
                (sent, false)
            }
        };
        bar.finish_and_clear();
        report(&summary?, &self.to, is_log)
    }
}

fn show(bar: &ProgressBar, length_bytes: Option<u64>) {
    let template = match length_bytes {
        Some(length_bytes) => {
            bar.set_length(length_bytes);
            "{bar:30} {bytes}/{total_bytes}, {msg}, {elapsed}"
        }
        None => "{spinner} {msg}, {elapsed}",
    };
    bar.set_style(ProgressStyle::with_template(template).unwrap_or(ProgressStyle::default_bar()));
    bar.enable_steady_tick(Duration::from_millis(250));
}

/// Says what was sent. An error unless everything was that was to be.
fn report(summary: &Summary, to: &str, is_log: bool) -> Outcome {
    let Summary { messages, line, bad_lines, told, stopped } = summary;
    match (stopped, is_log) {
        (true, true) => tracing::info!(
            to,
            messages,
            "stopped after line {line}; --from-line {} goes on",
            line + 1
        ),
        (true, false) => tracing::info!(to, messages, "stopped"),
        (false, _) => tracing::info!(to, messages, "everything is sent"),
    }
    if *bad_lines == 0 {
        return Ok(());
    }
    let (what, which) = if is_log {
        let numbers: Vec<String> = told.iter().map(u64::to_string).collect();
        let more = if *bad_lines > told.len() as u64 { " and more" } else { "" };
        ("lines", format!(" ({}{more})", numbers.join(", ")))
    } else {
        ("parts of records", String::new())
    };
    Err(format!("{bad_lines} {what} could not be read{which}: they are left out, the rest is sent")
        .into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_and_streams_are_told_apart() {
        assert_eq!(from("-"), Ok(Origin::Log(Log::Stdin)));
        assert_eq!(from("a/day.txt"), Ok(Origin::Log(Log::File("a/day.txt".into()))));
        assert_eq!(from("kinesis://ocs"), Ok(Origin::Stream("ocs".into())));
        assert!(from("kinesis://").is_err());
    }
}
