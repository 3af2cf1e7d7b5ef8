// SPDX-License-Identifier: Apache-2.0

//! The process of a simulated PF: `portcullis sim-pf NAME VFS tap|- SANDBOX`.
//!
//! Only the agent starts it. Its standard input is the listening socket to which agents connect.
//! Its standard output is the tap device, if it has one. It parses frames of guests, so it drops
//! its privileges before the first frame can reach it, as SANDBOX says (a [`SandboxSpec`] as JSON).

use std::{io, os::fd::AsFd, process::ExitCode, time::Duration};

use protocol::SandboxSpec;
use simnic::pf::{Options, serve};
use text::chain;
use vmm::{
    sandbox::{self, NewNamespaces},
    seccomp,
};

/// The word on the command line that makes `portcullis` this process.
pub const SUBCOMMAND: &str = "sim-pf";

/// Exit status of a process with wrong arguments.
const USAGE: u8 = 2;

/// The time for which the process stays without an agent and without a used VF. If its agent has
/// died, it ends by itself after the last VM.
const LINGER: Duration = Duration::from_secs(30);

/// Runs the process. `arguments` are those after [`SUBCOMMAND`].
#[must_use]
pub fn main(arguments: &[String]) -> ExitCode {
    sandbox::one_heap();
    let [name, vfs, tap, spec] = arguments else { return usage() };
    let (Ok(vfs), Ok(spec)) = (vfs.parse(), serde_json::from_str(spec)) else { return usage() };
    match run(name, vfs, tap == "tap", &spec) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(pf = name, "{}", chain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn usage() -> ExitCode {
    tracing::error!("Only the agent starts {SUBCOMMAND}, as: {SUBCOMMAND} NAME VFS tap|- SANDBOX");
    ExitCode::from(USAGE)
}

fn run(name: &str, vfs: u16, tap: bool, spec: &SandboxSpec) -> Result<(), Box<dyn std::error::Error>> {
    let listener = io::stdin().as_fd().try_clone_to_owned()?;
    let tap = if tap { Some(io::stdout().as_fd().try_clone_to_owned()?) } else { None };
    #[cfg(feature = "test-support")]
    vmm::attack::arm(&std::env::var(vmm::attack::VARIABLE).unwrap_or_default(), 0)?;
    let root = sandbox::private_root(spec, &[], NewNamespaces::begin()?)?;
    sandbox::empty_root(spec, root)?;
    sandbox::drop_privileges(spec)?;
    sandbox::limit_files(spec, 0)?;
    sandbox::forbid_threads(spec)?;
    if spec.seccomp {
        seccomp::Thread::SimulatedPf.confine()?;
    }
    #[cfg(feature = "test-support")]
    vmm::attack::strike(seccomp::Thread::SimulatedPf.name());
    serve(Options { name: name.to_owned(), vfs, listener, tap, linger: Some(LINGER) })?;
    Ok(())
}
