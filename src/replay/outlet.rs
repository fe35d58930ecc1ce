//! The connection that messages are sent over.

use std::{collections::VecDeque, io, time::Duration};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    time::timeout,
};

use crate::ocs::EOT;

/// A receiver that takes nothing for so long is told about.
const PATIENCE: Duration = Duration::from_secs(10);

/// A connection to a receiver of OCS messages. `M` marks a message, to know which were sent.
#[derive(Debug)]
pub(super) struct Outlet<M> {
    reader: OwnedReadHalf,
    writer: OwnedWriteHalf,
    frames: Vec<u8>,
    /// How much of the frames TCP has taken.
    sent_bytes: usize,
    /// Where each frame ends, of those that are not sent wholly.
    ends: VecDeque<(usize, M)>,
}

impl<M> Outlet<M> {
    pub(super) async fn connect(to: &str) -> io::Result<Self> {
        let socket = TcpStream::connect(to).await?;
        socket.set_nodelay(true)?;
        let (reader, writer) = socket.into_split();
        Ok(Self { reader, writer, frames: Vec::new(), sent_bytes: 0, ends: VecDeque::new() })
    }

    /// Adds a message to be sent with the next flush.
    pub(super) fn push(&mut self, raw: &[u8], mark: M) {
        self.frames.extend_from_slice(raw);
        self.frames.push(EOT);
        self.ends.push_back((self.frames.len(), mark));
    }

    /// How many bytes wait for a flush.
    pub(super) fn waiting_bytes(&self) -> usize {
        self.frames.len() - self.sent_bytes
    }

    /// Sends what waits, and calls `sent` for each message that TCP has taken. If the call is dropped,
    /// the next one goes on where it was.
    pub(super) async fn flush(&mut self, mut sent: impl FnMut(M)) -> io::Result<()> {
        let mut told = false;
        while self.sent_bytes < self.frames.len() {
            let write = async {
                tokio::select! {
                    biased;
                    gone = gone(&mut self.reader) => Err(gone),
                    length = self.writer.write(&self.frames[self.sent_bytes..]) => length,
                }
            };
            match timeout(PATIENCE, write).await {
                Ok(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(length) => self.sent_bytes += length?,
                Err(_) if !std::mem::replace(&mut told, true) => {
                    tracing::warn!(
                        "the receiver has taken nothing for {PATIENCE:?}; waiting for it"
                    );
                }
                Err(_) => {}
            }
            while self.ends.front().is_some_and(|(end, _)| *end <= self.sent_bytes) {
                self.ends.pop_front().into_iter().for_each(|(_, mark)| sent(mark));
            }
        }
        self.frames.clear();
        self.sent_bytes = 0;
        Ok(())
    }

    /// Completes when the receiver has gone. Between two messages nothing else would show it, and the
    /// next ones would be lost.
    pub(super) async fn gone(&mut self) -> io::Error {
        gone(&mut self.reader).await
    }

    /// Closes the connection; the receiver reads all that was sent, and then the end.
    pub(super) async fn finish(mut self) -> io::Result<()> {
        self.writer.shutdown().await
    }
}

async fn gone(reader: &mut OwnedReadHalf) -> io::Error {
    let mut answer = [0; 1024];
    loop {
        match reader.read(&mut answer).await {
            Ok(0) => {
                return io::Error::new(io::ErrorKind::ConnectionAborted, "the receiver closed it");
            }
            // Receivers of OCS messages say nothing; what one says all the same is for nobody.
            Ok(_) => {}
            Err(error) => return error,
        }
    }
}
