use std::{
    io::{self, BufWriter, ErrorKind, Write as _},
    time::Duration,
};

use aws_config::SdkConfig;
use clap::Args;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use super::{Outcome, generate::progress_bar, values};
use crate::{
    handler::{DeadLetters, Destination, Kind},
    redrive::{self, Counts, JournalPlace, Letter, Selection, Settings},
};

/// Put dead letters back into a stream
///
/// Each is put once, as a record of its own, with the partition key, the bytes and so the event id that it
/// had. The letters of a key keep their order: by stream, shard and sequence number. Without --reason,
/// what no consumer can read is left out.
///
/// What was put is noted in a journal, so that the same command again, also after a kill in the middle,
/// puts only what is not in the stream yet. Copies of a letter, which a worker leaves after a crash, are
/// put once too. The exit code is 0 only if all was put.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tramline redrive --from s3://rtr-dead-letters/green --to ctd-ocs-raw-messages --dry-run
  tramline redrive --from file:///var/lib/rtr/letters.jsonl --to ctd-ocs-raw-messages
  tramline redrive --from kinesis://letters --state redriven.jsonl --to ctd-ocs-raw-messages
  tramline redrive --from s3://rtr-dead-letters/green --to ctd-ocs-raw-messages \\
      --reason undecodable --since 2025-07-02T06:00:00Z --until 2025-07-02T07:00:00Z")]
pub(super) struct Redrive {
    /// Where the letters are: kinesis://STREAM, s3://BUCKET/PREFIX or file:///PATH
    #[arg(long, value_name = "URL", value_parser = values::dead_letters)]
    from: DeadLetters,

    /// The stream to put them into
    #[arg(long, value_name = "NAME", value_parser = values::stream_name)]
    to: String,

    /// Only print what would be put
    #[arg(long)]
    dry_run: bool,

    /// Only letters of this kind, and those also if no consumer can read them
    #[arg(long, value_name = "KIND", value_enum)]
    reason: Option<Kind>,

    /// Only letters that were given up at this time or later
    #[arg(long, value_name = "TIME", value_parser = values::time)]
    since: Option<Timestamp>,

    /// Only letters that were given up before this time
    #[arg(long, value_name = "TIME", value_parser = values::time)]
    until: Option<Timestamp>,

    /// Only letters with this partition key
    #[arg(long, value_name = "KEY")]
    key: Option<String>,

    /// The journal of what was put: a file, or s3://BUCKET/FOLDER [default: beside the letters,
    /// FILE.redriven or s3://BUCKET/PREFIX/redriven; none for a stream of letters]
    #[arg(long, value_name = "FILE", value_parser = journal)]
    state: Option<JournalPlace>,

    /// How long a put may still arrive after the redrive that sent it was killed, or its answer was lost;
    /// AWS takes one for up to five minutes after it was sent, should the network have held it back
    #[arg(long, value_name = "DURATION", value_parser = values::duration, default_value = "30s")]
    settle: Duration,
}

fn journal(text: &str) -> Result<JournalPlace, String> {
    text.parse().map_err(str::to_owned)
}

impl Redrive {
    pub(super) async fn run(self, config: &SdkConfig, stop: CancellationToken) -> Outcome {
        if matches!(&self.from.0, Destination::Kinesis { stream } if *stream == self.to) {
            return Err(format!(
                "--from and --to are the same stream, {}; --to is where the consumers of the messages \
                 read",
                self.to
            )
            .into());
        }
        let Some(journal) = self.state.or_else(|| JournalPlace::of(&self.from)) else {
            return Err(format!(
                "{} has no place for the journal of what was put; name a file with --state, and the \
                 same one each time",
                self.from
            )
            .into());
        };
        let settings = Settings {
            from: self.from,
            to: self.to.clone(),
            journal,
            selection: Selection {
                kind: self.reason,
                since: self.since,
                until: self.until,
                partition_key: self.key,
            },
            settle: self.settle,
        };
        let mut plan = redrive::Redrive::plan(config, settings, !self.dry_run, &stop).await?;
        let counts = std::mem::take(&mut plan.counts);
        for problem in &counts.told {
            tracing::warn!("{}: {}", problem.at, problem.why);
        }
        let (letters, found) = if self.dry_run {
            print(&plan.letters)?;
            if plan.uncertain() > 0 {
                tracing::info!(
                    "an earlier redrive was killed while it put {} letters; those of them that are in \
                     the stream would not be put again",
                    plan.uncertain()
                );
            }
            (plan.letters.len(), 0)
        } else {
            let letters = plan.letters.len();
            let progress = progress_bar(letters as u64, "put");
            let found = plan.put(&stop, |put| progress.set_position(put as u64)).await;
            progress.finish_and_clear();
            (letters, found?)
        };
        summary(&self.to, self.dry_run, letters, found, &counts)
    }
}

/// One line for each letter, in the order in which they would be put.
fn print(letters: &[Letter]) -> io::Result<()> {
    let mut stdout = BufWriter::new(io::stdout().lock());
    let printed = letters
        .iter()
        .try_for_each(|letter| writeln!(stdout, "{}", shown(letter)))
        .and_then(|()| stdout.flush());
    match printed {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error),
        _ => Ok(()),
    }
}

fn shown(letter: &Letter) -> String {
    let Letter { kind, place, record, event_id, .. } = letter;
    let number = |number: Option<u64>| number.map_or(String::new(), |number| format!("/{number}"));
    let event = event_id.as_ref().map_or("no event".to_owned(), |id| format!("event {id}"));
    format!(
        "{} {} {}{}{}: key {}, {event}, {} bytes, {}",
        place.stream,
        place.shard,
        place.sequence_number,
        number(place.user_record),
        number(place.sub_sequence_number),
        record.partition_key,
        record.data.len(),
        values::word(*kind)
    )
}

/// Says what was done. An error unless all was put that was to be put.
fn summary(stream: &str, dry_run: bool, letters: usize, found: usize, counts: &Counts) -> Outcome {
    if counts.not_messages > 0 {
        tracing::warn!(
            "{} letters are left out, for no consumer can read them; --reason undecodable puts them \
             back as they were",
            counts.not_messages
        );
    }
    if counts.connections > 0 {
        tracing::warn!(
            "{} letters are left out, for they came over OCS connections and were never in a stream",
            counts.connections
        );
    }
    tracing::info!(
        stream,
        letters = letters - found,
        put_before = counts.put_before + found as u64,
        repeats = counts.repeats,
        filtered = counts.filtered,
        left_out = counts.not_messages + counts.connections,
        unusable = counts.problems,
        "{}",
        if dry_run { "dry run: this would be put" } else { "letters put back" }
    );
    if counts.problems == 0 {
        return Ok(());
    }
    let told: Vec<&str> = counts.told.iter().map(|problem| problem.at.as_str()).collect();
    let more = if counts.problems > told.len() as u64 { ", and more" } else { "" };
    Err(format!(
        "{} lines or letters could not be used ({}{more}): everything else is put; look at them, and \
         run this again if they can be repaired",
        counts.problems,
        told.join("; ")
    )
    .into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handler::{Outgoing, Place, dead_letter_tests::letter};

    #[test]
    fn a_letter_is_shown_by_its_place_its_key_and_its_event_and_not_by_its_text() {
        let letter = letter(17, "{a -> b}", "secret");
        let Place::Record(place) = letter.place.clone() else { panic!("a record") };
        let record = Outgoing { partition_key: "{a -> b}".into(), data: letter.data.clone() };
        let event_id = Some("myH7t=".into());
        let letter = Letter { id: letter.id(), kind: letter.kind, place, record, event_id };
        assert_eq!(
            shown(&letter),
            "s shardId-0 17/0: key {a -> b}, event myH7t=, 6 bytes, handler-failed"
        );
        let whole = Letter { event_id: None, ..letter };
        assert!(shown(&whole).contains("no event"), "{}", shown(&whole));
    }
}
