//! Where a standalone worker's messages go.

mod format;
mod stdout;

pub use format::Format;
pub use stdout::Stdout;
