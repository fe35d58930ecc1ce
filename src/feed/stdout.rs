use std::{io, sync::Arc};

use tokio::{io::AsyncWriteExt as _, sync::Mutex};
use tokio_util::sync::CancellationToken;

use super::Format;
use crate::handler::{Batch, Handler};

/// Writes messages to standard output, one line each. Made once and cloned for every shard.
#[derive(Clone)]
pub struct Stdout {
    format: Format,
    out: Arc<Mutex<tokio::io::Stdout>>,
    closed: CancellationToken,
}

impl Stdout {
    /// Writes in `format`.
    pub fn new(format: Format) -> Self {
        Self {
            format,
            out: Arc::new(Mutex::new(tokio::io::stdout())),
            closed: CancellationToken::new(),
        }
    }

    /// Completes when the reader of standard output has gone.
    pub async fn closed(&self) {
        self.closed.cancelled().await;
    }
}

impl Handler for Stdout {
    type Error = io::Error;

    /// Finished when the system has taken the lines.
    async fn handle(&mut self, batch: &Batch) -> Result<(), io::Error> {
        let mut lines = Vec::new();
        for message in batch {
            self.format.write(message, &mut lines);
        }
        // A task of its own: a lost lease drops this call, but must not cut a line in the middle.
        let out = self.out.clone();
        let written = tokio::spawn(async move {
            let mut out = out.lock().await;
            out.write_all(&lines).await?;
            out.flush().await
        });
        let result = written.await.map_err(io::Error::other)?;
        if result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::BrokenPipe) {
            self.closed.cancel();
        }
        result
    }
}
