//! The command line: one file per subcommand, and one model for flags, environment and file.

mod application;
mod config;
mod consume;
#[cfg(feature = "local")]
mod demo;
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

use std::{error::Error, io::IsTerminal as _, process::ExitCode};

use aws_config::{BehaviorVersion, Region, SdkConfig};
use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use tracing_appender::non_blocking::WorkerGuard;
use tracing_subscriber::{
    filter::{LevelFilter, Targets},
    layer::SubscriberExt as _,
    util::SubscriberInitExt as _,
};

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

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the whole way of a message on embedded servers
    #[cfg(feature = "local")]
    Demo(demo::Demo),
    /// Run embedded Kinesis, DynamoDB and S3 until Ctrl-C
    #[cfg(feature = "local")]
    Local(local::LocalServers),
    /// Receive OCS connections and write their messages to a stream
    Produce(produce::Produce),
    /// Read a stream and write its messages to stdout
    Consume(Box<consume::Consume>),
    /// Show an application's shards, who reads them and how far
    Status(status::Status),
    /// Move checkpoints and give up leases
    Lease(lease::Lease),
    Redrive(redrive::Redrive),
    Replay(replay::Replay),
    /// Send realistic OCS traffic to a TCP port
    Generate(generate::Generate),
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
    let _log = start_logging(&cli.global);
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
    let outcome = runtime.block_on(run(cli));
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

async fn run(cli: Cli) -> Outcome {
    let stop = signals::stop_token();
    match cli.command {
        #[cfg(feature = "local")]
        Command::Demo(demo) => demo.run(stop).await,
        #[cfg(feature = "local")]
        Command::Local(local) => local.run(stop).await,
        Command::Produce(produce) => produce.run(&aws_config(&cli.global).await?, stop).await,
        Command::Consume(consume) => consume.run(&aws_config(&cli.global).await?, stop).await,
        Command::Status(status) => status.run(&aws_config(&cli.global).await?, stop).await,
        Command::Lease(lease) => lease.run(&aws_config(&cli.global).await?, stop).await,
        Command::Redrive(redrive) => redrive.run(&aws_config(&cli.global).await?, stop).await,
        Command::Replay(replay) => replay.run(&cli.global, stop).await,
        Command::Generate(generate) => generate.run(stop).await,
    }
}

async fn aws_config(global: &Global) -> Result<SdkConfig, Box<dyn Error + Send + Sync>> {
    let mut loader = aws_config::defaults(BehaviorVersion::latest());
    if let Some(region) = &global.region {
        loader = loader.region(Region::new(region.clone()));
    }
    let config = loader.load().await;
    if config.region().is_none() {
        return Err("no AWS region is set; pass --region, set AWS_REGION or add one to the AWS \
                    profile"
            .into());
    }
    Ok(config)
}

/// Starts to log to stderr, by a thread of its own: a reader of stderr that does not read costs log
/// lines, and nothing else. The guard writes what is left when it is dropped.
fn start_logging(global: &Global) -> WorkerGuard {
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
    let registry = tracing_subscriber::registry().with(filter);
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
