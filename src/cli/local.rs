use std::{io::Write as _, path::PathBuf};

use clap::Args;
use tokio_util::sync::CancellationToken;

use super::{Outcome, values};
use crate::local::{Local, LocalSettings};

/// Run embedded Kinesis, DynamoDB and S3 until Ctrl-C
///
/// On loopback ports. Prints the environment variables that point any AWS tool at them, then `ready`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tramline local --stream ctd-ocs-raw-messages
  tramline local --stream ctd-ocs-raw-messages --shards 4 --bucket rtr-state --dir ./local-aws
  tramline local > env.sh &    # then, after `ready`: eval \"$(grep ^export env.sh)\"")]
pub(super) struct LocalServers {
    /// Keep the data of all three here, and find it again at the next start
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,

    /// Make this stream, unless it is there; may be repeated
    #[arg(long, value_name = "NAME", value_parser = values::stream_name, value_delimiter = ',')]
    stream: Vec<String>,

    /// How many shards a stream has that is made
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=500))]
    shards: u32,

    /// Make this bucket, unless it is there; may be repeated
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    bucket: Vec<String>,
}

impl LocalServers {
    pub(super) async fn run(self, stop: CancellationToken) -> Outcome {
        let local = Local::start(LocalSettings { dir: self.dir, ..Default::default() }).await?;
        for stream in &self.stream {
            local.create_stream(stream, self.shards).await?;
        }
        for bucket in &self.bucket {
            local.create_bucket(bucket).await?;
        }
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
