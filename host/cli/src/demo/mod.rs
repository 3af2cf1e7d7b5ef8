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
    process::ExitCode,
};

use api::ProblemCode;
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::{
    demo_error::{DemoError, KVM, PATIENCE, RECORDED},
    error::CliError,
    output::Format,
};
use private_agent::PrivateAgent;
use report::Report;
use text::is_active;

#[derive(Debug, Args)]
pub struct DemoArgs {
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
