use aws_config::SdkConfig;
use clap::{Args, ValueEnum};
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::{
    Outcome, consume, print,
    values::{self, Output, Place},
};
use crate::{
    Checkpoints, DeadLetters, Retrieval,
    check::{self, Line, Settings},
    permissions,
};

/// Check settings, credentials, permissions and resources
///
/// Looks at everything that a command (--for) needs with the same settings, and prints a line for each:
/// pass, fail or not tried; for a failure the IAM action that is missing, or what repairs it. It changes
/// nothing: a write is tried by a call that AWS must refuse after it has looked at the permission, such as
/// one whose condition never holds. Where there is no such call, the line says so.
///
/// In the config file, the settings of the table [consume] or [produce] apply here too. The exit code is 0 if
/// nothing failed.
#[derive(Debug, Args)]
#[command(
    after_long_help = "With --json, one object on one line:
  command, failed (how many)
  checks[]: outcome (pass, fail or not-tried), check (what was looked at), action (the IAM action that was
    tried, or null), detail, missing_action (the IAM action to grant, or null), repair (what to do, or null)

Examples:
  tramline check --stream ctd-ocs-raw-messages --app rtr-green
  tramline check --stream ctd-ocs-raw-messages --for produce
  tramline check --stream ctd-ocs-raw-messages --app rtr-green --json | jq '.checks[].missing_action'",
    after_help = "Examples:
  tramline check --stream ctd-ocs-raw-messages --app rtr-green
  tramline check --stream ctd-ocs-raw-messages --for produce
  tramline check --stream ctd-ocs-raw-messages --app rtr-green --json | jq '.checks[].missing_action'"
)]
pub(super) struct Check {
    /// Which command is to run
    #[arg(long = "for", value_name = "COMMAND", value_enum, default_value_t)]
    command: For,

    /// The stream to read or write; may be repeated
    #[arg(long, value_name = "NAME", required = true, value_delimiter = ',')]
    stream: Vec<String>,

    /// The application, for consume, status and lease
    #[arg(long, value_name = "NAME")]
    app: Option<String>,

    /// The DynamoDB table of the leases [default: the application's name]
    #[arg(long, value_name = "NAME")]
    lease_table: Option<String>,

    /// How records are fetched
    #[arg(long, value_enum, default_value_t)]
    retrieval: Retrieval,

    /// Where checkpoints are kept: dynamodb, s3://BUCKET/KEY or file:///PATH
    #[arg(long, value_name = "PLACE", value_parser = values::checkpoints, default_value = "dynamodb")]
    checkpoint: Checkpoints,

    /// No checkpoints are stored and no leases taken
    #[arg(long)]
    no_checkpoint: bool,

    /// Where dead letters go, or for redrive come from: kinesis://STREAM, s3://BUCKET/PREFIX or file:///PATH
    #[arg(long, value_name = "PLACE")]
    dead_letters: Option<DeadLetters>,

    /// Where messages go, as consume is told it
    #[arg(long, value_name = "[NAME=]PLACE", value_parser = values::output, default_value = "stdout")]
    output: Vec<Output>,

    /// The names of the readers of a socket, as consume is told them
    #[arg(long, value_name = "NAME", value_parser = values::name, value_delimiter = ',')]
    readers: Vec<String>,

    /// Print one JSON object on one line
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum For {
    /// tramline consume, or a service with the crate
    #[default]
    Consume,
    /// tramline produce
    Produce,
    /// tramline status
    Status,
    /// tramline lease
    Lease,
    /// tramline redrive
    Redrive,
    /// tramline replay, of a stream
    Replay,
}

/// With `--json`, what is printed.
#[derive(Serialize)]
struct Report<'a> {
    command: String,
    failed: usize,
    checks: &'a [Line],
}

impl Check {
    pub(super) async fn run(self, config: &SdkConfig, stop: CancellationToken) -> Outcome {
        let names = match (&self.app, self.command) {
            (Some(app), For::Consume) => consume::applications(app, &self.output, &self.readers),
            (Some(app), For::Status | For::Lease) => vec![app.clone()],
            _ => Vec::new(),
        };
        let app = self.app.as_deref().unwrap_or_default();
        let application = |name: String| check::Application {
            lease_table: consume::table_of(self.lease_table.as_deref(), app, &name),
            name,
        };
        let settings = Settings {
            command: match self.command {
                For::Consume => permissions::Command::Consume,
                For::Produce => permissions::Command::Produce,
                For::Status => permissions::Command::Status,
                For::Lease => permissions::Command::Lease,
                For::Redrive => permissions::Command::Redrive,
                For::Replay => permissions::Command::Replay,
            },
            applications: names.into_iter().map(application).collect(),
            streams: self.stream,
            retrieval: self.retrieval,
            checkpoints: (!self.no_checkpoint).then_some(self.checkpoint),
            dead_letters: self.dead_letters,
            archive: self.output.into_iter().find_map(|output| match output.place {
                Place::Archive { bucket, prefix } => Some((bucket, prefix)),
                _ => None,
            }),
        };
        let lines = tokio::select! {
            lines = check::run(config, &settings) => lines,
            () = stop.cancelled() => return Err("stopped before everything was looked at".into()),
        };
        let failed = lines.iter().filter(|line| line.outcome == check::Outcome::Fail).count();
        let text = if self.json {
            let command = settings.command.to_string();
            let report = Report { command, failed, checks: &lines };
            serde_json::to_string(&report)? + "\n"
        } else {
            lines.iter().map(text).collect()
        };
        print(text.as_bytes())?;
        match failed {
            0 => Ok(()),
            _ => Err(format!("{failed} of {} checks failed", lines.len()).into()),
        }
    }
}

fn text(line: &Line) -> String {
    let outcome = match line.outcome {
        check::Outcome::Pass => "pass",
        check::Outcome::Fail => "fail",
        check::Outcome::NotTried => "not tried",
    };
    let action = line.action.map_or_else(String::new, |action| format!(", {action}"));
    let repair = line.repair.as_ref().map_or_else(String::new, |repair| format!("; {repair}"));
    // One line each, whatever a server said.
    let told = format!("{}{action}: {}{repair}", line.check, line.detail);
    format!("{outcome:<9}  {}\n", told.split_whitespace().collect::<Vec<_>>().join(" "))
}
