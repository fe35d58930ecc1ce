//! The program `tramline`. See [`tramline::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    tramline::cli::main()
}
