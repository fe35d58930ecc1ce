//! Where a standalone worker's messages go.

mod archive;
mod format;
#[cfg(feature = "cli")]
pub(crate) mod readers;
mod stdout;

pub use archive::{Archive, ArchiveError, ArchiveHandler};
pub use format::Format;
pub use stdout::Stdout;
