//! The process of a simulated PF: `portcullis sim-pf NAME VFS tap|- USER|-`.
//!
//! It is started by the agent only. Its standard input is the listening socket that agents connect to, its standard output
//! the tap device, if it has one. It parses frames of guests, so it gives up what it does not need before the first of
//! them can reach it: own namespaces, an empty root, a user of its own, no capability.

use std::{io, os::fd::AsFd, process::ExitCode, time::Duration};

use passthrough::sim::pf::{Options, serve};
use vmm::{control::SandboxSpec, sandbox};

use crate::vm::problem::chain;

/// The word on the command line that makes `portcullis` this process.
pub const SUBCOMMAND: &str = "sim-pf";

/// Exit status of a process that was called wrongly.
const USAGE: u8 = 2;

/// How long it stays when it has neither an agent nor a VF: one whose agent died ends by itself when the last VM has.
const LINGER: Duration = Duration::from_secs(30);

/// Runs the process. `arguments` are those after [`SUBCOMMAND`].
#[must_use]
pub fn main(arguments: &[String]) -> ExitCode {
    let [name, vfs, tap, user] = arguments else { return usage() };
    let Ok(vfs) = vfs.parse() else { return usage() };
    let user = match user.as_str() {
        "-" => None,
        user => match user.parse() {
            Ok(user) => Some(user),
            Err(_) => return usage(),
        },
    };
    match run(name, vfs, tap == "tap", user) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(pf = name, "{}", chain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn usage() -> ExitCode {
    tracing::error!("{SUBCOMMAND} is started by the agent only, as: {SUBCOMMAND} NAME VFS tap|- USER|-");
    ExitCode::from(USAGE)
}

fn run(name: &str, vfs: u16, tap: bool, user: Option<u32>) -> Result<(), Box<dyn std::error::Error>> {
    let listener = io::stdin().as_fd().try_clone_to_owned()?;
    let tap = if tap { Some(io::stdout().as_fd().try_clone_to_owned()?) } else { None };
    if user.is_some() {
        sandbox::private_root(&[])?;
        sandbox::empty_root()?;
    }
    sandbox::drop_privileges(&SandboxSpec { uid: user, gid: user })?;
    serve(Options { name: name.to_owned(), vfs, listener, tap, linger: Some(LINGER) })?;
    Ok(())
}
