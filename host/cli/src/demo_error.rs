// SPDX-License-Identifier: Apache-2.0

//! The errors of the demonstration.

use std::{io, path::PathBuf, time::Duration};

use api::ClientError;

/// The time limit of the whole demonstration, longer than it takes on a busy machine.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);
/// How long to wait for the record of a decision, which follows the response to its request.
pub(super) const RECORDED: Duration = Duration::from_secs(5);
pub(super) const KVM: &str = "/dev/kvm";

/// The reason why the demonstration failed.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// There is no KVM for this user.
    #[error(
        "The demo boots two VMs and cannot use {KVM} ({0}). Give this user access to it (group kvm), or run the demo in \
         the lab, which brings its own KVM: resources/lab/run -- target/release/portcullis demo"
    )]
    NoKvm(io::Error),
    /// KVM is there, but cannot run the VMs.
    #[error(
        "KVM of this machine cannot run the demo's VMs ({0}). Run the demo in the lab, which brings its own KVM: \
         resources/lab/run -- target/release/portcullis demo"
    )]
    UnfitKvm(String),
    /// The agent's own directory.
    #[error("Cannot create the directory {path} for the demo's agent: set TMPDIR to a writable directory")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The agent's process.
    #[error("Cannot start the demo's agent")]
    Start(#[source] io::Error),
    /// The agent ended, or never served its API.
    #[error("The demo's agent does not serve its API. Its log ends in:\n{0}")]
    NoAgent(String),
    /// A call of the API was refused, or the agent is gone.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A guest does not respond.
    #[error("The guest of {vm} does not respond to {command:?}. Its console ends in:\n{said}")]
    Silent {
        /// The VM.
        vm: String,
        /// The command.
        command: String,
        /// The last lines of its console.
        said: String,
    },
    /// The agent has no record of a request.
    #[error(
        "The agent has no record of a decision about {mac} {} s after the guest's driver reported \
         {answer:?}. The agent's log ends in:\n{log}",
        RECORDED.as_secs()
    )]
    NotRecorded {
        /// The requested address.
        mac: String,
        /// The driver's outcome.
        answer: String,
        /// The last lines of the agent's log.
        log: String,
    },
    /// SIGINT, SIGTERM or SIGHUP.
    #[error("Interrupted")]
    Interrupted,
    /// The whole demonstration took too long.
    #[error("The demo did not end within {} s; the machine may be overloaded", PATIENCE.as_secs())]
    TooLong,
    /// Some expectations were not met.
    #[error("{0} of the demo's expectations were not met")]
    NotAsExpected(usize),
}
