//! The command line without the code of any service; described in `docs/cli.md`.

use std::process::ExitCode;

fn main() -> ExitCode {
    headwater::cli::Cli::new().run()
}
