use std::io::{self, Write as _};

use clap::Args;

use super::Outcome;
use crate::ocs::{BATCH_EVENT_TYPE, EVENT_TYPE, event_schema};

/// Print the JSON Schema of an event type
///
/// Prints the schema (draft 2020-12) of the type, or, without one, the types that there are.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tramline schema
  tramline schema com.mbta.ocs.raw_message > com.mbta.ocs.raw_message.json")]
pub(super) struct Schema {
    /// The event type
    #[arg(value_name = "TYPE", value_parser = [EVENT_TYPE, BATCH_EVENT_TYPE])]
    event_type: Option<String>,
}

impl Schema {
    pub(super) fn run(self) -> Outcome {
        let mut out = io::stdout().lock();
        let written = match self.event_type.as_deref().map(event_schema) {
            Some(schema) => out.write_all(schema.unwrap_or_default().as_bytes()),
            None => writeln!(out, "{EVENT_TYPE}\n{BATCH_EVENT_TYPE}"),
        };
        match written.and_then(|()| out.flush()) {
            // Whoever reads has seen enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            written => Ok(written?),
        }
    }
}
