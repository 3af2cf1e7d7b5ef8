// SPDX-License-Identifier: Apache-2.0

//! `portcullis demo`: an agent of its own with a simulated adapter, two VMs with the small guest, and the path of a guest's
//! request, step by step. It uses the REST API only, and leaves nothing behind.

mod console;
mod private_agent;
mod report;
mod scenario;

use std::{
    fs::OpenOptions,
    io::{self, IsTerminal, Write},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use api::{ClientError, ProblemCode};
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::{error::CliError, output::Format};
use private_agent::PrivateAgent;
use report::Report;
use text::is_active;

/// The time limit of the whole demonstration, longer than it takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long to wait for the record of a decision, which follows the response to its request.
const RECORDED: Duration = Duration::from_secs(5);
const KVM: &str = "/dev/kvm";

#[derive(Debug, Args)]
pub(super) struct DemoArgs {
    /// One JSON object at the end in place of the narration (like --output json).
    #[arg(long)]
    json: bool,
    /// As of `serve`: shows that the demonstration would notice it.
    #[cfg(feature = "test-support")]
    #[arg(long)]
    policy_bypass_for_tests: bool,
}

impl DemoArgs {
    /// The options of its agent beside those of every demonstration.
    fn options(&self) -> &'static [&'static str] {
        #[cfg(feature = "test-support")]
        if self.policy_bypass_for_tests {
            return &["--policy-bypass-for-tests"];
        }
        &[]
    }
}

/// The reason why the demonstration failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum DemoError {
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

/// Runs the demonstration.
pub(super) fn run(args: &DemoArgs, format: Format) -> ExitCode {
    let format = if args.json { Format::Json } else { format };
    let stdout = io::stdout();
    let colour = stdout.is_terminal()
        && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
        && std::env::var_os("TERM").is_none_or(|value| value != "dumb");
    let mut report = Report::new(Box::new(stdout), format, colour);
    let result = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .map_err(CliError::Runtime)
        .and_then(|runtime| runtime.block_on(perform(&mut report, args.options())).map_err(CliError::Demo));
    let told = report.end(result.as_ref().err().map(ToString::to_string));
    match result.and(told.map_err(CliError::Output)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => error.report(format),
    }
}

async fn perform(report: &mut Report, options: &[&str]) -> Result<(), DemoError> {
    OpenOptions::new().read(true).write(true).open(KVM).map_err(DemoError::NoKvm)?;
    // Before the agent's start, so that a signal from now on leads to the clean-up.
    let interrupted = interrupted().map_err(DemoError::Start)?;
    let agent = PrivateAgent::start(options)?;
    let result = tokio::select! {
        result = scenario::play(&agent, report) => result,
        () = interrupted => Err(DemoError::Interrupted),
        () = tokio::time::sleep(PATIENCE) => Err(DemoError::TooLong),
    };
    agent.stop().await;
    match result.map_err(unfit) {
        Ok(()) if report.failures() > 0 => Err(DemoError::NotAsExpected(report.failures())),
        other => other,
    }
}

/// Gives the API's problem with KVM the cure for a demonstration.
fn unfit(error: DemoError) -> DemoError {
    match &error {
        DemoError::Client(client) => match client.problem() {
            Some(problem) if problem.code == ProblemCode::KvmUnavailable => {
                DemoError::UnfitKvm(problem.detail.clone())
            }
            _ => error,
        },
        _ => error,
    }
}

/// Completes with the first signal that asks to end.
fn interrupted() -> io::Result<impl Future<Output = ()>> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    })
}

/// The last lines of an untrusted text, without the characters on which a terminal acts.
fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    let last = all.get(all.len().saturating_sub(lines)..).unwrap_or_default();
    last.join("\n").chars().filter(|c| *c == '\n' || !is_active(*c)).collect()
}

/// Writes a text and flushes it. The demonstration goes on after an error, which means that its reader is gone.
fn say(to: &mut dyn Write, text: &str) -> io::Result<()> {
    to.write_all(text.as_bytes())?;
    to.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tails_are_short_and_tame() {
        assert_eq!(tail("a\nb\nc\n", 2), "b\nc");
        assert_eq!(tail("\x1b[2Jx\r\n", 5), "[2Jx");
        assert_eq!(tail("", 5), "");
    }

    #[test]
    fn what_is_missing_names_the_lab() {
        for error in [
            DemoError::NoKvm(io::Error::from(io::ErrorKind::NotFound)),
            unfit(DemoError::Client(
                Box::new(api::Problem::new(ProblemCode::KvmUnavailable, "No irqchip.")).into(),
            )),
        ] {
            let text = error.to_string();
            assert!(text.ends_with("resources/lab/run -- target/release/portcullis demo"), "{text}");
        }
        let other = Box::new(api::Problem::new(ProblemCode::NotFound, "x"));
        assert!(matches!(unfit(DemoError::Client(other.into())), DemoError::Client(_)));
    }
}
