// SPDX-License-Identifier: Apache-2.0

//! The command line as a whole: the agent, and the commands of [`cli`].

#[cfg(test)]
mod tests;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};
use cli::{Common, EXIT_CODES, warn};
use text::{is_active, printable};

/// Virtual machines with SR-IOV network adapters under the policy of port groups.
#[derive(Debug, Parser)]
#[command(name = "portcullis", version, propagate_version = true, arg_required_else_help = true, after_help = EXIT_CODES)]
pub struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the agent: serves the REST API, starts and supervises VMs.
    Serve(Box<crate::agent::ServeArgs>),
    #[command(flatten)]
    Other(cli::Command),
}

/// Reads the command line; ends the process if it is invalid. The parser prints wrong arguments as they are, and
/// scripts pass names of files and VMs that others chose. If an argument has characters on which a terminal acts, the
/// parser's text becomes one escaped line.
#[must_use]
pub fn parse() -> Cli {
    Cli::try_parse().unwrap_or_else(|error| {
        let active = std::env::args_os().any(|word| word.to_string_lossy().contains(is_active));
        if !active || !error.use_stderr() {
            error.exit();
        }
        warn(printable(error.render().to_string().trim_end()));
        std::process::exit(error.exit_code())
    })
}

/// Runs the command.
pub fn run(cli: Cli) -> ExitCode {
    let Cli { common, command } = cli;
    match command {
        Command::Serve(args) => match crate::agent::run(*args, common.socket(), common.token_file()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                warn(printable(&format!("portcullis: {error:#}")));
                ExitCode::FAILURE
            }
        },
        Command::Other(command) => cli::run(common, command, Cli::command()),
    }
}
