use std::{io::Write as _, path::PathBuf};

use clap::Args;
use tokio_util::sync::CancellationToken;

use super::Outcome;
use crate::local::{Local, LocalSettings};

/// Run embedded Kinesis, DynamoDB and S3 until Ctrl-C
///
/// On loopback ports. Prints the environment variables that point any AWS tool at them, then `ready`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tramline local
  tramline local --dir ./local-aws > env.sh &    # then, after `ready`: source <(grep export env.sh)
  aws kinesis create-stream --stream-name ctd-ocs-raw-messages --shard-count 2")]
pub(super) struct LocalServers {
    /// Keep the data of all three here, and find it again at the next start
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

impl LocalServers {
    pub(super) async fn run(self, stop: CancellationToken) -> Outcome {
        let local = Local::start(LocalSettings { dir: self.dir, ..Default::default() }).await?;
        {
            let mut stdout = std::io::stdout().lock();
            for (name, value) in local.environment() {
                writeln!(stdout, "export {name}={value}")?;
            }
            writeln!(stdout, "ready")?;
            stdout.flush()?;
        }
        stop.cancelled().await;
        Ok(())
    }
}
