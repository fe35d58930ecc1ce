use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

use super::{Cli, Outcome, print};

/// Print what a shell needs to complete tramline's commands and flags
///
/// The script follows the flags of this very program: make it anew with each version.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tramline completions bash > /etc/bash_completion.d/tramline
  tramline completions zsh > /usr/local/share/zsh/site-functions/_tramline
  tramline completions fish > ~/.config/fish/completions/tramline.fish")]
pub(super) struct Completions {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

impl Completions {
    pub(super) fn run(self) -> Outcome {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "tramline", &mut script);
        print(&script)
    }
}
