use std::path::PathBuf;

use clap::{Args, CommandFactory as _};
use clap_mangen::Man;

use super::{Cli, Outcome, print};

/// Write the manual pages
///
/// The page of tramline itself to stdout, or that and one for each command into a folder.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tramline man | man -l -
  tramline man /usr/local/share/man/man1")]
pub(super) struct ManPages {
    /// The folder, which must be there
    #[arg(value_name = "DIR")]
    dir: Option<PathBuf>,
}

impl ManPages {
    pub(super) fn run(self) -> Outcome {
        let Some(dir) = self.dir else {
            let mut page = Vec::new();
            // `help` has no page.
            Man::new(Cli::command().disable_help_subcommand(true)).render(&mut page)?;
            return print(&page);
        };
        clap_mangen::generate_to(Cli::command(), &dir).map_err(|error| {
            format!("the manual pages cannot be written to {}: {error}", dir.display()).into()
        })
    }
}
