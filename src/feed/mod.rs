//! Where a standalone worker's messages go.
//!
//! Handlers for [`WorkerBuilder::handler`](crate::WorkerBuilder::handler): [`Stdout`] writes lines to standard
//! output in a [`Format`], an [`Archive`] the day's log to S3. Sockets and child processes are with the
//! program, `tramline consume --output`.

mod archive;
mod format;
#[cfg(feature = "cli")]
pub(crate) mod readers;
mod stdout;

pub use archive::{Archive, ArchiveError, ArchiveHandler};
pub use format::Format;
pub use stdout::Stdout;
