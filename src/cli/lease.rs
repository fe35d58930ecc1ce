use std::{
    collections::{BTreeMap, BTreeSet},
    error::Error,
    io::{ErrorKind, Write as _},
};

use aws_config::SdkConfig;
use clap::{Args, Subcommand};
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use super::{
    Outcome,
    application::{Application, Keeps, Look, refusal},
    values::{self, ResetPosition},
};
use crate::{
    Checkpoints, ShardId,
    checkpoint::Checkpoint,
    lease::{
        Lease as LeaseRow, LeaseError,
        reset::{ResetTo, Rewrite, moves, plan_release, plan_reset, write_release, write_reset},
    },
    shard::Shard,
    source::{Place, Streams},
};

/// Move checkpoints and give up leases
///
/// Both commands only print what they would do, until they are given --yes.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tramline lease reset --stream ctd-ocs-raw-messages --app rtr-green --to trim-horizon
  tramline lease release --stream ctd-ocs-raw-messages --app rtr-green --yes")]
pub(super) struct Lease {
    #[command(subcommand)]
    command: LeaseCommand,
}

#[derive(Debug, Subcommand)]
enum LeaseCommand {
    Reset(Reset),
    Release(Release),
}

/// Move checkpoints, so that shards are read from another place
///
/// Moves the checkpoints of an application's shards, forth or back, and prints the changes. Nothing is
/// written without --yes, nor while a worker renews one of the leases, unless with --force: then that
/// worker may go on for up to 4 s, and what it handles in that time comes again or out of order.
///
/// What follows a shard that is read again is read again after it, so child shards are reset with their
/// parents (to the same time, or to their first record); shards that were finished and forgotten get
/// leases again. `latest` skips what has not been read and leaves finished shards and children alone.
///
/// State of handlers that an object or a file keeps with a checkpoint (--checkpoint) is dropped with it: they
/// start without. Such a document is not written while a worker was seen to write it, or if it was written
/// since it was looked at. An idle worker cannot be seen in an object of S3: it ends with an error when it
/// next writes.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tramline lease reset --stream ctd-ocs-raw-messages --app rtr-green --to trim-horizon
  tramline lease reset --stream ctd-ocs-raw-messages --app rtr-green --to 2025-07-02T06:00:00Z --yes
  tramline lease reset --stream ctd-ocs-raw-messages --app rtr-green --to latest \\
      --shard shardId-000000000000 --shard shardId-000000000001 --yes
  tramline lease reset --stream ctd-ocs-raw-messages --app rtr-green --to trim-horizon \\
      --checkpoint s3://rtr-state/green.state")]
struct Reset {
    #[command(flatten)]
    application: Application,

    /// Where reading goes on: latest, trim-horizon, an RFC 3339 time, or a sequence number of the one
    /// --shard, after which reading goes on
    #[arg(long, value_name = "POSITION", value_parser = values::reset_position)]
    to: ResetPosition,

    /// Where the application's workers keep checkpoints: dynamodb, s3://BUCKET/KEY or file:///PATH, as they
    /// are told it
    #[arg(long, value_name = "PLACE", value_parser = values::checkpoints, default_value = "dynamodb")]
    checkpoint: Checkpoints,

    #[command(flatten)]
    how: How,
}

/// Free leases, so that other workers take them at once
///
/// Takes leases from their owners, so that other workers take them at once instead of when they have
/// run out; checkpoints stay. Nothing is written without --yes, nor while a worker renews one of the
/// leases, unless with --force: then that worker may go on for up to 4 s beside the next one.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tramline lease release --stream ctd-ocs-raw-messages --app rtr-green
  tramline lease release --stream ctd-ocs-raw-messages --app rtr-green --shard shardId-000000000003 --yes")]
struct Release {
    #[command(flatten)]
    application: Application,

    #[command(flatten)]
    how: How,
}

#[derive(Debug, Args)]
struct How {
    /// Only this shard; may be repeated [default: all shards]
    #[arg(long, value_name = "ID")]
    shard: Vec<String>,

    /// Write the changes, instead of only printing them
    #[arg(long)]
    yes: bool,

    /// Write them also under workers that read the shards
    #[arg(long)]
    force: bool,
}

impl How {
    /// The shards that are named: by what Kinesis calls them, or, as `status` shows them where several
    /// streams are read, with the stream before it.
    fn shards(&self, listed: &[Shard]) -> Result<BTreeSet<ShardId>, String> {
        self.shard.iter().map(|id| named(id, listed)).collect()
    }
}

fn named(id: &str, listed: &[Shard]) -> Result<ShardId, String> {
    let of_that_name: Vec<&ShardId> =
        listed.iter().map(|shard| &shard.id).filter(|shard| shard.name() == id).collect();
    match of_that_name.as_slice() {
        [] => Ok(id.into()),
        [only] => Ok((*only).clone()),
        [first, ..] => Err(format!(
            "several streams have a shard {id}; name it with its stream, such as {first}"
        )),
    }
}

impl Lease {
    pub(super) async fn run(self, config: &SdkConfig, stop: CancellationToken) -> Outcome {
        match self.command {
            LeaseCommand::Reset(reset) => reset.run(config, stop).await,
            LeaseCommand::Release(release) => release.run(config, stop).await,
        }
    }
}

impl Reset {
    async fn run(self, config: &SdkConfig, stop: CancellationToken) -> Outcome {
        let Self { application, to, checkpoint, how } = self;
        if how.force && checkpoint != Checkpoints::LeaseTable {
            return Err(
                "--force is for the lease table: a worker whose state is moved under it ends \
                        with an error; stop it first"
                    .into(),
            );
        }
        let now = Timestamp::now();
        let to = match to {
            ResetPosition::Latest => ResetTo::Latest { from: Place::pin_time(now) },
            ResetPosition::TrimHorizon => ResetTo::TrimHorizon,
            ResetPosition::Time(at) => ResetTo::Time(at),
            ResetPosition::SequenceNumber(number) => ResetTo::SequenceNumber(number),
        };
        let Some(Observed { streams, listed, look }) =
            observed(&application, &checkpoint, config, &stop).await?
        else {
            return Ok(());
        };
        let only = how.shards(&listed)?;
        let saved = if look.table.is_some() { look.saved() } else { BTreeMap::new() };
        let rewrites = plan_reset(&listed, &look.leases, &saved, &only, &to, now)?;
        if let (ResetTo::SequenceNumber(number), Some(shard)) = (&to, only.first()) {
            // A worker could not open the shard at a number that is not in it.
            if let Some(stream) = streams.of(shard) {
                stream.check_place(shard, &Place::At(number.clone())).await?;
            }
        }
        let seen = rewrites.iter().filter_map(|rewrite| rewrite.seen.as_ref());
        let live = look.live(seen, application.observe);
        let lines: Vec<String> = rewrites.iter().map(shown_rewrite).collect();
        if !confirmed(&lines, &live, &how, "reset", look.keeps())? {
            return Ok(());
        }
        // Before the leases: who opens a shard goes on where its document says.
        if let Some((_, state)) = &look.state {
            state.reset(&look.documents, &moves(&rewrites)).await?;
        }
        let written = match &look.table {
            Some(table) => write_reset(table, &look.leases, &rewrites, how.force).await,
            None => Ok(()),
        };
        done(written, "reset", rewrites.len())
    }
}

impl Release {
    async fn run(self, config: &SdkConfig, stop: CancellationToken) -> Outcome {
        let Self { application, how } = self;
        let place = Checkpoints::LeaseTable;
        let observed = observed(&application, &place, config, &stop).await?;
        let Some(Observed { listed, look: look @ Look { table: Some(table), .. }, .. }) = &observed
        else {
            return Ok(());
        };
        let held = plan_release(&look.leases, &how.shards(listed)?)?;
        let live = look.live(&held, application.observe);
        let lines: Vec<String> = held.iter().map(shown_release).collect();
        if !confirmed(&lines, &live, &how, "release", look.keeps())? {
            return Ok(());
        }
        let written = write_release(table, &look.leases, &held, how.force).await;
        done(written, "released", held.len())
    }
}

struct Observed {
    streams: Streams,
    listed: Vec<Shard>,
    look: Look,
}

/// The shards and the leases, watched for long enough to know whose owner lives. `None` if the command is
/// stopped before.
async fn observed(
    application: &Application,
    checkpoint: &Checkpoints,
    config: &SdkConfig,
    stop: &CancellationToken,
) -> Result<Option<Observed>, Box<dyn Error + Send + Sync>> {
    let observe = async {
        let streams = application.streams(config).await?;
        let listed = streams.shards().await?;
        let mut look = application.look(config, &streams, checkpoint)?;
        look.watch(&listed, application.observe).await?;
        Ok(Observed { streams, listed, look })
    };
    tokio::select! {
        observed = observe => observed.map(Some),
        () = stop.cancelled() => Ok(None),
    }
}

/// Prints the changes, and tells whether to write them. An error if they must not be.
fn confirmed(
    lines: &[String],
    live: &[&LeaseRow],
    how: &How,
    doing: &str,
    keeps: Keeps,
) -> Result<bool, Box<dyn Error + Send + Sync>> {
    let refused = !live.is_empty() && !how.force;
    if how.yes && refused {
        return Err(refusal(live, doing, keeps).into());
    }
    let mut text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    if lines.is_empty() {
        text.push_str(&format!("nothing to {doing}\n"));
    } else if !how.yes {
        let command: Vec<String> = std::env::args().collect();
        text.push_str(&format!("nothing is written yet; to do it:\n  {}\n", with_yes(&command)));
        if refused {
            text.push_str(&format!("as it is, that is refused: {}\n", refusal(live, doing, keeps)));
        }
    }
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => return Err(error.into()),
        _ => {}
    }
    Ok(how.yes && !lines.is_empty())
}

fn done(written: Result<(), LeaseError>, what: &str, count: usize) -> Outcome {
    match written {
        Ok(()) => {
            tracing::info!("{count} lease{} {what}", if count == 1 { "" } else { "s" });
            Ok(())
        }
        Err(error) => Err(format!(
            "{error}; some leases may be {what} and others not: look at them with `tramline status`, \
             and run this again"
        )
        .into()),
    }
}

fn shown_rewrite(rewrite: &Rewrite) -> String {
    let Rewrite { seen, wanted, follows } = rewrite;
    let old = seen.as_ref().map_or("no lease".to_owned(), shown_checkpoint);
    let owner = seen.as_ref().and_then(LeaseRow::reader);
    let taken = owner.map_or(String::new(), |owner| format!(", taken from {owner}"));
    let why = if *follows { ", because it follows a shard that is read again" } else { "" };
    format!("{}: {old} -> {}{taken}{why}", wanted.shard, shown_checkpoint(wanted))
}

fn shown_checkpoint(lease: &LeaseRow) -> String {
    match (&lease.checkpoint, lease.start_at) {
        (Checkpoint::Latest | Checkpoint::AtTimestamp, Some(at)) => {
            format!("{} {at}", lease.checkpoint)
        }
        _ => lease.checkpoint.to_string(),
    }
}

fn shown_release(lease: &LeaseRow) -> String {
    let asked = match (&lease.checkpoint_owner, &lease.owner) {
        (Some(_), Some(owner)) => format!(" (asked for by {owner})"),
        _ => String::new(),
    };
    format!("{}: {}{asked} -> free", lease.shard, lease.reader().unwrap_or("nobody"))
}

/// A command line with `--yes`, to be pasted into a shell.
fn with_yes(command: &[String]) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=+,@".contains(c);
    let quoted = |word: &String| match !word.is_empty() && word.chars().all(plain) {
        true => word.clone(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    };
    let words: Vec<String> = command.iter().map(quoted).collect();
    format!("{} --yes", words.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{lease::Change, shard::Shard};

    fn lease(checkpoint: &str) -> LeaseRow {
        let shard = Shard {
            id: "shard-a".into(),
            parents: vec![],
            hash_key_range: None,
            closed: false,
            begins: None,
        };
        LeaseRow::new(&shard, Checkpoint::parse(checkpoint, 0).expect("a checkpoint"), None)
    }

    #[test]
    fn changes_are_shown_as_old_and_new() {
        let seen =
            lease("17").after(&Change::Take { worker: "w1".into(), at: Timestamp::UNIX_EPOCH });
        let start_at = "2025-07-02T15:00:00Z".parse().ok();
        let reset = Change::Reset { checkpoint: Checkpoint::Latest, start_at };
        let wanted = seen.after(&reset);
        let rewrite = Rewrite { seen: Some(seen.clone()), wanted, follows: false };
        assert_eq!(
            shown_rewrite(&rewrite),
            "shard-a: 17 -> LATEST 2025-07-02T15:00:00Z, taken from w1"
        );
        let new = Rewrite { seen: None, wanted: lease("TRIM_HORIZON"), follows: true };
        assert_eq!(
            shown_rewrite(&new),
            "shard-a: no lease -> TRIM_HORIZON, because it follows a shard that is read again"
        );
        assert_eq!(shown_release(&seen), "shard-a: w1 -> free");
        let asked = seen.after(&Change::Ask { worker: "w2".into() });
        assert_eq!(shown_release(&asked), "shard-a: w1 (asked for by w2) -> free");
    }

    #[test]
    fn the_command_to_run_can_be_pasted() {
        let command = ["tramline", "lease", "reset", "--app", "it's"].map(str::to_owned);
        assert_eq!(with_yes(&command), r"tramline lease reset --app 'it'\''s' --yes");
    }
}
