//! One connection of a reader, whatever it is made of.

use std::{fmt, time::Duration};

use futures_util::FutureExt as _;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    time::{Instant, sleep_until, timeout},
};

use super::{
    dispatch::NotSent,
    hub::Joined,
    protocol::{self, Lines},
};
use crate::{feed::Format, ocs::EOT, record::Message};

/// A reader that takes nothing for so long is told about.
const PATIENCE: Duration = Duration::from_secs(10);
/// And so is one that takes everything, but acknowledges nothing.
const PATIENCE_FOR_ACKS: Duration = Duration::from_secs(60);
/// How long a last word to a reader may take.
const LAST_WORD_LIMIT: Duration = Duration::from_secs(1);

/// How messages are written to a reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// A line each.
    Lines(Format),
    /// A line each, with the serial number to be acknowledged.
    Numbered,
    /// The OCS text and an EOT byte, as OCS does it.
    Frames,
}

impl Encoding {
    fn write(self, serial: u64, message: &Message, out: &mut Vec<u8>) {
        match self {
            Self::Lines(format) => format.write(message, out),
            Self::Numbered => Format::write_numbered(serial, message, out),
            Self::Frames => {
                out.extend_from_slice(&message.raw_bytes());
                out.push(EOT);
            }
        }
    }
}

pub(super) type Input = Box<dyn AsyncRead + Send + Unpin>;
pub(super) type Output = Box<dyn AsyncWrite + Send + Unpin>;

/// What is heard from a reader.
pub(super) enum Hearing {
    /// Acknowledgements.
    Acks(Lines<Input>),
    /// Whatever it says is for nobody; its end says that it has gone.
    End(Input),
    /// Nothing: others see when it has gone.
    Nothing,
}

/// Why a connection ended.
#[derive(Debug)]
pub(super) enum End {
    Gone(String),
    /// It said what it must not.
    Refused(String),
    Displaced,
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gone(why) => write!(f, "the reader has gone ({why})"),
            Self::Refused(why) => write!(f, "the reader is disconnected: {why}"),
            Self::Displaced => {
                f.write_str("the reader connected again, and this is the old connection")
            }
        }
    }
}

impl Hearing {
    /// The next acknowledgement. If the call is dropped, nothing is lost.
    async fn acknowledgement(&mut self) -> Result<u64, End> {
        let gone = || End::Gone("it closed the connection".to_owned());
        match self {
            Self::Acks(lines) => match lines.next().await {
                Ok(Some(line)) => protocol::acknowledged(&line).map_err(End::Refused),
                Ok(None) => Err(gone()),
                Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {
                    Err(End::Refused(error.to_string()))
                }
                Err(error) => Err(End::Gone(error.to_string())),
            },
            Self::End(input) => {
                let mut ignored = [0; 1024];
                loop {
                    match input.read(&mut ignored).await {
                        Ok(0) => return Err(gone()),
                        Ok(_) => {}
                        Err(error) => return Err(End::Gone(error.to_string())),
                    }
                }
            }
            Self::Nothing => std::future::pending().await,
        }
    }
}

/// Notices a reader that has something to do and does not get on with it.
struct Progress {
    since: Instant,
    told: bool,
}

impl Progress {
    fn made(&mut self) {
        self.since = Instant::now();
        if std::mem::take(&mut self.told) {
            tracing::info!("the reader gets on again");
        }
    }

    fn tell_stall(&mut self, what: &str, unfinished: usize) {
        self.told = true;
        let secs = self.since.elapsed().as_secs();
        tracing::warn!(unfinished, secs, "the reader {what} nothing: its messages wait for it");
    }
}

/// Writes messages to a reader and hears what it has finished, until it has gone.
pub(super) async fn serve(
    joined: &mut Joined,
    hearing: &mut Hearing,
    output: &mut Output,
    encoding: Encoding,
) -> End {
    let (mut out, mut written) = (Vec::new(), 0);
    // Without acknowledgements: the last message of what is being written.
    let mut taken = None;
    let displaced = joined.displaced();
    let mut progress = Progress { since: Instant::now(), told: false };
    loop {
        if written == out.len() {
            if let Some(serial) = taken.take()
                && !joined.has_acks()
                && joined.finish(serial).is_err()
            {
                // It was sent. So this is not reached.
                return End::Displaced;
            }
            out.clear();
            written = 0;
            let write = |serial, message: &Message, out: &mut Vec<u8>| {
                encoding.write(serial, message, out);
            };
            taken = joined.fill(&mut out, write);
        }
        let is_writing = written < out.len();
        let is_busy = is_writing || joined.unfinished() > 0;
        if !is_busy {
            progress.made();
        }
        let (what, patience) = match is_writing {
            true => ("takes", PATIENCE),
            false => ("acknowledges", PATIENCE_FOR_ACKS),
        };
        tokio::select! {
            biased;
            () = displaced.cancelled() => {
                // Its last words may wait in the socket: they came before the connection that displaced it.
                while let Some(Ok(serial)) = hearing.acknowledgement().now_or_never() {
                    if joined.finish(serial).is_err() {
                        break;
                    }
                }
                return End::Displaced;
            }
            heard = hearing.acknowledgement() => match heard.map(|serial| joined.finish(serial)) {
                Ok(Ok(())) => progress.made(),
                Ok(Err(NotSent(last))) => {
                    let told = format!("it acknowledged a message beyond the last one sent, {last}");
                    return End::Refused(told);
                }
                Err(end) => return end,
            },
            length = output.write(&out[written..]), if is_writing => match length {
                Ok(0) => return End::Gone("it takes no more".to_owned()),
                Ok(length) => {
                    written += length;
                    progress.made();
                }
                Err(error) => return End::Gone(error.to_string()),
            },
            () = joined.changed(), if !is_writing => {}
            () = sleep_until(progress.since + patience), if is_busy && !progress.told => {
                progress.tell_stall(what, joined.unfinished());
            }
        }
    }
}

/// Logs the end of a connection, and tells the reader if it did something wrong.
pub(super) async fn end(end: End, joined: Joined, output: &mut Output) {
    let unfinished = joined.unfinished();
    match &end {
        End::Gone(_) if unfinished == 0 => tracing::info!("{end}"),
        End::Gone(_) | End::Refused(_) => tracing::warn!(
            unfinished,
            "{end}: what it has not finished waits for it to come back, or for another reader"
        ),
        End::Displaced => tracing::warn!("{end}"),
    }
    drop(joined);
    let last_word = match end {
        End::Gone(_) => return,
        End::Refused(why) => why,
        End::Displaced => "another connection of this reader's name took its place".to_owned(),
    };
    refuse(output, &last_word).await;
}

/// Tells a reader why it is disconnected, and holds it for a moment: one that tries again at once fills
/// no log.
pub(super) async fn refuse(output: &mut Output, why: &str) {
    let line = protocol::refusal(why);
    let _ = timeout(LAST_WORD_LIMIT, output.write_all(line.as_bytes())).await;
    let _ = timeout(LAST_WORD_LIMIT, output.shutdown()).await;
    tokio::time::sleep(LAST_WORD_LIMIT).await;
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncBufReadExt as _, BufReader, duplex, split};
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::{
        feed::readers::{dispatch::Spread, hub::Hub},
        handler::{Handler as _, testing::batch},
    };

    #[tokio::test]
    async fn p1_what_a_reader_said_last_counts_although_it_has_connected_again() {
        let hub = Hub::new(Spread::One, true);
        let mut handler = hub.handler(CancellationToken::new());
        let Ok(()) = handler.handle(&batch(&[("a", "1"), ("a", "2")])).await;
        let mut old = hub.join("green").await.expect("a place");
        let (ours, theirs) = duplex(64 * 1024);
        let (input, output) = split(ours);
        let mut hearing = Hearing::Acks(Lines::new(Box::new(input)));
        let mut output: Output = Box::new(output);
        let serving = tokio::spawn(async move {
            let end = serve(&mut old, &mut hearing, &mut output, Encoding::Numbered).await;
            end.to_string()
        });
        let mut reader = BufReader::new(theirs);
        for _ in 0..2 {
            reader.read_line(&mut String::new()).await.expect("a message");
        }
        reader.write_all(b"{\"ack\":1}\n").await.expect("taken");
        // The old connection has not heard it yet.
        let mut new = hub.join("green").await.expect("a place");
        assert!(serving.await.expect("no panic").contains("connected again"));
        let mut given = Vec::new();
        new.fill(&mut given, |_, message, given| given.extend(message.raw_bytes().iter()));
        assert_eq!(given, b"2");
    }
}
