//! Feeds for readers: sockets that they connect to, ports that are connected to, and child processes.
//!
//! [`dispatch`] decides which reader gets which message and when it is finished; [`hub`] is where the
//! shards of a worker and the connections of readers meet in it; [`session`] is one connection, and the
//! others make connections. What is said on them is in [`protocol`] and docs/feeds.md.

mod child;
mod dispatch;
mod hub;
mod protocol;
mod server;
mod session;
mod target;

use std::{io, path::PathBuf};

use tokio_util::task::AbortOnDropHandle;

pub(crate) use child::run as run_command;
pub(crate) use dispatch::Spread;
pub(crate) use hub::Hub;
pub(crate) use server::{Doors, Server};
pub(crate) use session::Encoding;
pub(crate) use target::send as send_to;

/// The connections to readers of a feed. They are closed when this is dropped.
pub(crate) struct Connections {
    _task: AbortOnDropHandle<()>,
    /// Not in the task: the process may end before that is dropped.
    _file: Option<server::SocketFile>,
}

/// Why there is no feed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FeedError {
    #[error("cannot listen at {place}: {source}")]
    Listen { place: String, source: io::Error },
    #[error("cannot listen at unix://{}: another process does; give each its own path", path.display())]
    InUse { path: PathBuf },
    #[error(
        "cannot listen at unix://{}: there is a file that is no socket, which is left alone; remove it, or \
         use another path", path.display()
    )]
    NoSocket { path: PathBuf },
    #[error("the command `{command}` cannot be run: {reason}; the shell says above why")]
    Command { command: String, reason: String },
}
