//! Where a standalone worker's messages go.

mod archive;
mod format;
mod stdout;

pub use archive::{Archive, ArchiveError, ArchiveHandler};
pub use format::Format;
pub use stdout::Stdout;
