use std::{
    io::{self, IsTerminal as _},
    time::Duration,
};

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::{
    io::{AsyncWriteExt as _, BufWriter},
    net::TcpStream,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::Outcome;
use crate::ocs::{
    EOT,
    generate::{Generator, Item, Profile},
};

/// Send realistic OCS traffic to a TCP port
///
/// Every message type, sequence numbers, heartbeats. The same seed gives the same bytes.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tramline generate --to 127.0.0.1:8001
  tramline generate --to 127.0.0.1:8001 --messages 5000 --rate 0 --connections 4
  tramline generate --to 127.0.0.1:8001 --profile morning --seed 7")]
pub(super) struct Generate {
    /// The host and port to connect to
    #[arg(long, value_name = "ADDRESS")]
    to: String,

    /// What to send, and how fast
    #[command(flatten)]
    traffic: Traffic,
}

/// What to send, and how fast.
#[derive(Debug, Clone, Args)]
pub(super) struct Traffic {
    /// How many messages to send, heartbeats not counted
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub messages: u64,

    /// Messages a second over all connections; 0 is as fast as possible
    #[arg(long, value_name = "N", default_value_t = 400)]
    pub rate: u32,

    /// How many connections to send them over, in turn
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub connections: u32,

    /// Which traffic: the same number gives the same bytes
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,

    /// What the traffic looks like
    #[arg(long, value_enum, default_value_t)]
    pub profile: Profile,
}

impl Generate {
    pub(super) async fn run(self, stop: CancellationToken) -> Outcome {
        let progress = progress_bar(self.traffic.messages, "sent");
        let sending = async {
            let senders = self.traffic.connect(&self.to).await?;
            self.traffic.send(senders, |_| progress.inc(1)).await
        };
        tokio::select! {
            sent = sending => sent.map_err(|error| {
                format!("cannot send to {}: {error}; is `tramline produce` listening there?", self.to)
            })?,
            () = stop.cancelled() => {}
        }
        progress.finish_and_clear();
        tracing::info!(to = self.to, messages = progress.position(), "traffic sent");
        Ok(())
    }
}

/// One OCS sender: its connection and what it has to say.
pub(super) struct Sender {
    pub socket: BufWriter<TcpStream>,
    generator: Generator,
}

impl Traffic {
    /// The messages that connection `n` sends, in order.
    pub fn messages_of(&self, n: u32) -> impl Iterator<Item = String> + use<> {
        let (n, connections) = (u64::from(n), u64::from(self.connections));
        let count = self.messages.saturating_sub(n).div_ceil(connections);
        let generator = Generator::new(self.seed, n as u32, self.profile);
        let messages = generator.filter_map(|item| match item {
            Item::Message(line) => Some(line),
            Item::Heartbeat => None,
        });
        messages.take(count as usize)
    }

    /// Opens the connections.
    pub async fn connect(&self, to: &str) -> io::Result<Vec<Sender>> {
        let mut senders = Vec::new();
        for n in 0..self.connections {
            let socket = TcpStream::connect(to).await?;
            socket.set_nodelay(true)?;
            senders.push(Sender {
                socket: BufWriter::with_capacity(16 * 1024, socket),
                generator: Generator::new(self.seed, n, self.profile),
            });
        }
        Ok(senders)
    }

    /// Sends everything, one message from each connection in turn, and closes the connections.
    pub async fn send(&self, mut senders: Vec<Sender>, sent: impl Fn(u64)) -> io::Result<()> {
        let began = Instant::now();
        for n in 0..self.messages {
            if self.rate > 0 {
                let due = began + Duration::from_secs_f64(n as f64 / f64::from(self.rate));
                if due > Instant::now() {
                    for sender in &mut senders {
                        sender.socket.flush().await?;
                    }
                    sleep_until(due).await;
                }
            }
            let turn = (n % u64::from(self.connections)) as usize;
            let Sender { socket, generator } = &mut senders[turn];
            for item in generator {
                let heartbeat = matches!(item, Item::Heartbeat);
                let text = match &item {
                    Item::Message(line) => line,
                    Item::Heartbeat => "HEARTBEAT",
                };
                socket.write_all(text.as_bytes()).await?;
                socket.write_all(&[EOT]).await?;
                if !heartbeat {
                    break;
                }
            }
            sent(n + 1);
        }
        for sender in &mut senders {
            sender.socket.shutdown().await?;
        }
        Ok(())
    }
}

/// A bar on stderr if that is a terminal, else nothing.
pub(super) fn progress_bar(length: u64, what: &'static str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(length), progress_target());
    let template = "{bar:30} {pos}/{len} {msg}, {per_sec}, {eta} left";
    bar.set_style(ProgressStyle::with_template(template).unwrap_or(ProgressStyle::default_bar()));
    bar.with_message(what)
}

/// Where progress is shown: on stderr if that is a terminal, else nowhere.
pub(super) fn progress_target() -> ProgressDrawTarget {
    if io::stderr().is_terminal() {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::hidden()
    }
}
