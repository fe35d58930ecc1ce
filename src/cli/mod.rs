//! The command line: one file per subcommand, and one model for flags, environment and file.
//!
//! Public for the program `tramline` alone, which calls [`main`].

mod application;
mod check;
mod completions;
mod config;
mod consume;
#[cfg(feature = "local")]
mod demo;
#[cfg(test)]
mod documentation;
mod fleet;
mod generate;
mod lease;
#[cfg(feature = "local")]
mod local;
mod log;
mod man;
mod produce;
mod redrive;
mod replay;
mod schema;
mod screen;
mod signals;
mod status;
mod values;

use std::{
    error::Error,
    io::{ErrorKind, Write as _},
    net::SocketAddr,
    num::NonZero,
    process::ExitCode,
};

use aws_config::{BehaviorVersion, Region, SdkConfig};
use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};

use self::log::Log;
use crate::telemetry::Recent;

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
#[command(next_help_heading = "Options of every command")]
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
    Schema(schema::Schema),
    Completions(completions::Completions),
    Man(man::ManPages),
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
    let (log, _guard) = Log::start(&cli.global, recent.clone());
    for warning in parsed.warnings {
        tracing::warn!("{warning}");
    }
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    if let Some(threads) = threads(&cli.command) {
        runtime.worker_threads(threads);
    }
    let runtime = match runtime.enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!("cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(run(cli, recent, log));
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

/// How many threads run the tasks of a command; `None` leaves it to tokio: as many as `TOKIO_WORKER_THREADS`
/// says, or as the machine has processors. For `consume` that is too many: one takes in half a million
/// messages a second, and the allocator keeps for each what it has freed (docs/figures.md).
fn threads(command: &Command) -> Option<usize> {
    let consumes = matches!(command, Command::Consume(_));
    let processors = std::thread::available_parallelism().map_or(1, NonZero::get);
    (consumes && std::env::var_os("TOKIO_WORKER_THREADS").is_none())
        .then_some(processors.div_ceil(2))
}

async fn run(cli: Cli, recent: Recent, log: Log) -> Outcome {
    let stop = signals::stop_token();
    let _repeats = log.tell_repeats();
    if matches!(cli.command, Command::Produce(_) | Command::Consume(_)) {
        signals::on_hangup(move || reload(&log));
    }
    let watched = cli.global.http.map(|address| Watched { address, recent });
    match cli.command {
        #[cfg(feature = "local")]
        Command::Demo(demo) => demo.run(stop).await,
        #[cfg(feature = "local")]
        Command::Local(local) => local.run(stop).await,
        Command::Produce(produce) => {
            produce.run(&aws_config(&cli.global).await?, watched, stop).await
        }
        Command::Consume(consume) => {
            let config = aws_config(&cli.global).await?;
            // In a thread where what it waits for happens: in this one, each event would wake two.
            tokio::spawn(async move { consume.run(&config, watched, stop).await }).await?
        }
        Command::Status(status) => status.run(&aws_config(&cli.global).await?, stop).await,
        // It tells itself if there is no region.
        Command::Check(check) => check.run(&load_aws_config(&cli.global).await, stop).await,
        Command::Lease(lease) => lease.run(&aws_config(&cli.global).await?, stop).await,
        Command::Redrive(redrive) => redrive.run(&aws_config(&cli.global).await?, stop).await,
        Command::Replay(replay) => replay.run(&cli.global, stop).await,
        Command::Generate(generate) => generate.run(stop).await,
        Command::Schema(schema) => schema.run(),
        Command::Completions(completions) => completions.run(),
        Command::Man(man) => man.run(),
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

/// Reads the level of the log again, from where the process had it.
fn reload(log: &Log) {
    match config::parse(std::env::args_os(), &config::process_environment()) {
        Ok(parsed) => {
            log.set_level(&parsed.cli.global);
            tracing::info!("SIGHUP: the level of the log was read again");
        }
        Err(error) => tracing::warn!(
            "SIGHUP: the settings cannot be read, and stay as they were: {}",
            error.to_string().replace('\n', " ")
        ),
    }
}

/// Prints to stdout. A reader that has seen enough is no error.
fn print(bytes: &[u8]) -> Outcome {
    match std::io::stdout().lock().write_all(bytes) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => Ok(written?),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    /// Every command, with those that it is below.
    fn all(command: &clap::Command, path: &str, found: &mut Vec<(String, clap::Command)>) {
        found.push((path.to_owned(), command.clone()));
        for command in command.get_subcommands() {
            all(command, &format!("{path} {}", command.get_name()), found);
        }
    }

    /// The command lines that stand at the end of a help text.
    fn examples(help: &str) -> Vec<String> {
        let Some((_, examples)) = help.rsplit_once("Examples:\n") else { return Vec::new() };
        let lines = examples.replace("\\\n", " ");
        lines.lines().map(|line| line.trim().to_owned()).filter(|line| !line.is_empty()).collect()
    }

    #[test]
    fn every_help_ends_with_examples_that_are_valid() {
        let mut commands = Vec::new();
        all(&Cli::command(), "tramline", &mut commands);
        assert!(commands.len() > 12);
        for (path, command) in commands {
            // Not wrapped.
            let mut command = command.term_width(0);
            let long = command.render_long_help().to_string();
            let short = command.render_help().to_string();
            let examples = examples(&long);
            assert!((2..=4).contains(&examples.len()), "{path}: {examples:#?}");
            assert!(short.ends_with(&long[long.find("Examples:").expect("examples")..]), "{path}");
            for example in examples {
                // What the shell does with it does not concern us.
                let own =
                    example.split(" | ").find(|part| part.contains("tramline ")).unwrap_or("");
                let words = own.split([' ']).filter(|word| !word.is_empty());
                let words: Vec<&str> =
                    words.take_while(|word| !matches!(*word, ">" | "&")).collect();
                let Some(start) = words.iter().position(|word| *word == "tramline") else {
                    assert!(example.starts_with("aws "), "{example}");
                    continue;
                };
                let set = words[..start].iter().filter_map(|word| word.split_once('='));
                let environment = set.map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
                let args = words[start..].iter().map(std::ffi::OsString::from);
                if let Err(error) = config::parse(args, &environment) {
                    panic!("{example}: {error}");
                }
            }
        }
    }

    #[test]
    fn a_slip_suggests_what_was_meant() {
        for (args, meant) in [
            (vec!["tramline", "consum"], "'consume'"),
            (vec!["tramline", "lease", "rset"], "'reset'"),
            (vec!["tramline", "consume", "--strem", "s", "--app", "a"], "'--stream'"),
            (
                vec!["tramline", "consume", "--stream", "s", "--app", "a", "--format", "jsn"],
                "'json'",
            ),
            (vec!["tramline", "--log-fromat", "json", "demo"], "'--log-format'"),
        ] {
            let args = args.iter().map(std::ffi::OsString::from);
            let error = config::parse(args, &Default::default()).err().expect("an error");
            let error = error.to_string();
            assert!(error.contains("similar") && error.contains(meant), "{error}");
        }
    }

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
