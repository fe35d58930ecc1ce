//! The command line: one file per subcommand, and one model for flags, environment and file.

mod application;
mod check;
mod config;
mod consume;
#[cfg(feature = "local")]
mod demo;
mod fleet;
mod generate;
mod lease;
#[cfg(feature = "local")]
mod local;
mod produce;
mod redrive;
mod replay;
mod signals;
mod status;
mod values;

use std::{error::Error, io::IsTerminal as _, net::SocketAddr, process::ExitCode};

use aws_config::{BehaviorVersion, Region, SdkConfig};
use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use tracing_appender::non_blocking::WorkerGuard;
use tracing_subscriber::{
    filter::{LevelFilter, Targets},
    layer::SubscriberExt as _,
    util::SubscriberInitExt as _,
};

use crate::telemetry::{Recent, RecentLayer};

#[derive(Debug, Parser)]
#[command(
    name = "tramline",
    version,
    about = "Carries OCS train messages through Amazon Kinesis: in order, and without losing one",
    after_help = "Every flag can also be set by an environment variable (--lease-table by \
                  TRAMLINE_LEASE_TABLE) or by a key of the config file (lease-table, at its top or in \
                  a table named after the command). A flag wins over the environment, the environment \
                  over the file.\n\n\
                  AWS endpoints and credentials come from the usual AWS variables and files.\n\n\
                  Examples:\n  \
                  tramline demo\n  \
                  tramline produce --listen 0.0.0.0:8001 --stream ctd-ocs-raw-messages\n  \
                  tramline consume --stream ctd-ocs-raw-messages --app rtr-green"
)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct Global {
    /// Read settings from this TOML or (if its name ends in .json) JSON file
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<std::path::PathBuf>,

    /// How log lines on stderr are written
    #[arg(long, global = true, value_enum, default_value_t)]
    log_format: LogFormat,

    /// Log more: -v details such as each subscription and put, -vv also the AWS SDK
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,

    /// Log less: -q warnings and errors, -qq errors only
    #[arg(short, long, global = true, action = ArgAction::Count)]
    quiet: u8,

    /// Serve health, metrics and a status page on this address, while consume or produce runs
    #[arg(long, global = true, value_name = "ADDRESS")]
    http: Option<SocketAddr>,

    /// The AWS region [default: that of the AWS environment or profile]
    #[arg(long, global = true, value_name = "REGION")]
    region: Option<String>,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
enum LogFormat {
    /// One line of text for each event
    #[default]
    Text,
    /// One JSON object for each event
    Json,
}

/// Without docs of their own, variants show those of their structs: the first line in the list of
/// commands, all of it in a command's `--help`.
#[derive(Debug, Subcommand)]
enum Command {
    #[cfg(feature = "local")]
    Demo(demo::Demo),
    #[cfg(feature = "local")]
    Local(local::LocalServers),
    Produce(produce::Produce),
    Consume(Box<consume::Consume>),
    Status(status::Status),
    Check(check::Check),
    Lease(lease::Lease),
    Redrive(redrive::Redrive),
    Replay(replay::Replay),
    Generate(generate::Generate),
}

/// Where a command is to tell how it is doing, and the latest of what it logged.
struct Watched {
    address: SocketAddr,
    recent: Recent,
}

/// What a command gives to `main`: its error is one line for the person who reads the log.
type Outcome = Result<(), Box<dyn Error + Send + Sync>>;

/// Parses the command line, runs the command and gives the exit code: 0 done, 1 failed, 2 wrong usage.
pub fn main() -> ExitCode {
    let parsed = match config::parse(std::env::args_os(), &config::process_environment()) {
        Ok(parsed) => parsed,
        Err(error) => {
            // To stdout for --help and --version, else to stderr; a closed one is no reason to fail.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let cli: Cli = parsed.cli;
    let recent = Recent::default();
    let _log = start_logging(&cli.global, recent.clone());
    for warning in parsed.warnings {
        tracing::warn!("{warning}");
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!("cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(run(cli, recent));
    // A write to a full pipe may be stuck in a thread of its own; nothing waits for it any more.
    runtime.shutdown_background();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(cli: Cli, recent: Recent) -> Outcome {
    let stop = signals::stop_token();
    let watched = cli.global.http.map(|address| Watched { address, recent });
    match cli.command {
        #[cfg(feature = "local")]
        Command::Demo(demo) => demo.run(stop).await,
        #[cfg(feature = "local")]
        Command::Local(local) => local.run(stop).await,
        Command::Produce(produce) => produce.run(&aws_config(&cli.global).await?, stop).await,
        Command::Consume(consume) => {
            consume.run(&aws_config(&cli.global).await?, watched, stop).await
        }
        Command::Status(status) => status.run(&aws_config(&cli.global).await?, stop).await,
        // It tells itself if there is no region.
        Command::Check(check) => check.run(&load_aws_config(&cli.global).await, stop).await,
        Command::Lease(lease) => lease.run(&aws_config(&cli.global).await?, stop).await,
        Command::Redrive(redrive) => redrive.run(&aws_config(&cli.global).await?, stop).await,
        Command::Replay(replay) => replay.run(&cli.global, stop).await,
        Command::Generate(generate) => generate.run(stop).await,
    }
}

async fn load_aws_config(global: &Global) -> SdkConfig {
    let mut loader = aws_config::defaults(BehaviorVersion::latest());
    if let Some(region) = &global.region {
        loader = loader.region(Region::new(region.clone()));
    }
    loader.load().await
}

async fn aws_config(global: &Global) -> Result<SdkConfig, Box<dyn Error + Send + Sync>> {
    let config = load_aws_config(global).await;
    if config.region().is_none() {
        return Err("no AWS region is set; pass --region, set AWS_REGION or add one to the AWS \
                    profile"
            .into());
    }
    Ok(config)
}

/// Starts to log to stderr, by a thread of its own: a reader of stderr that does not read costs log
/// lines, and nothing else. The guard writes what is left when it is dropped.
fn start_logging(global: &Global, recent: Recent) -> WorkerGuard {
    let level = match i16::from(global.verbose) - i16::from(global.quiet) {
        ..=-2 => LevelFilter::ERROR,
        -1 => LevelFilter::WARN,
        0 => LevelFilter::INFO,
        1.. => LevelFilter::DEBUG,
    };
    // What goes wrong below us comes back as an error, which is told once and better.
    let others = if global.verbose >= 2 { LevelFilter::DEBUG } else { LevelFilter::ERROR };
    let filter = Targets::new().with_default(others).with_target("tramline", level);
    let (writer, guard) = tracing_appender::non_blocking(std::io::stderr());
    let registry = tracing_subscriber::registry().with(filter).with(RecentLayer(recent));
    match global.log_format {
        LogFormat::Text => {
            let terminal = std::io::stderr().is_terminal();
            let layer = tracing_subscriber::fmt::layer()
                .with_writer(writer)
                .with_ansi(terminal)
                .with_target(false);
            registry.with(layer).init();
        }
        LogFormat::Json => {
            let layer = tracing_subscriber::fmt::layer()
                .with_writer(writer)
                .json()
                .flatten_event(true)
                .with_target(false);
            registry.with(layer).init();
        }
    }
    guard
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn every_command_has_a_line_in_the_list_and_more_in_its_help() {
        fn look_at(command: &clap::Command) {
            for command in command.get_subcommands() {
                let name = command.get_name();
                let short = command.get_about().map(ToString::to_string).unwrap_or_default();
                let long = command.get_long_about().map(ToString::to_string).unwrap_or_default();
                assert!(!short.is_empty() && !short.contains('\n'), "{name}: {short}");
                assert!(long.starts_with(&short) && long.len() > short.len(), "{name}: {long}");
                look_at(command);
            }
        }
        look_at(&Cli::command());
    }
}
