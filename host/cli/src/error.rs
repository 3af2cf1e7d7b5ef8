// SPDX-License-Identifier: Apache-2.0

//! The errors of the command line, and the exit codes that scripts rely on.

use std::{error::Error, io, process::ExitCode};

use api::{ClientError, Problem, RemoteError, types::VmState};
use options::token_file::TokenFileError;
use serde::Serialize;
use text::{printable, printable_lines};

use super::{
    demo_error::DemoError,
    output::{self, Format, warn},
};

/// The reason that a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The agent cannot be reached, or refused the request.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A file cannot be read.
    #[error("Cannot read {path}")]
    Read {
        /// As the user wrote it.
        path: String,
        /// The cause.
        source: io::Error,
    },
    /// A file cannot be written.
    #[error("Cannot write {path}")]
    Write {
        /// The path.
        path: String,
        /// The cause.
        source: io::Error,
    },
    /// The agent's address, or a file for its use, is invalid.
    #[error(transparent)]
    Remote(#[from] RemoteError),
    /// The tokens cannot be read.
    #[error(transparent)]
    Tokens(#[from] TokenFileError),
    /// The command line says too little, or contradicts itself, in a way that its parser does not see.
    #[error("{0}")]
    Usage(String),
    /// A file's content has the wrong form.
    #[error("{path} is not {what}: {why}")]
    NotASpec {
        /// As the user wrote it.
        path: String,
        /// The expected content, such as `a VM's specification`.
        what: &'static str,
        /// The fault, with its place.
        why: String,
    },
    /// The page cannot listen on its port.
    #[error("Cannot listen on port {port} of 127.0.0.1: choose another one (--port)")]
    Port {
        /// As the user wrote it; 0 is any.
        port: u16,
        /// The cause.
        source: io::Error,
    },
    /// An object in a file of `apply` cannot be made as the file describes it.
    #[error("Cannot apply {file}")]
    Apply {
        /// The file.
        file: String,
        /// The cause.
        source: Box<CliError>,
    },
    /// The VM did not reach the awaited state in time.
    #[error("The VM {vm} is {state} after {waited} s: see `portcullis vm show {vm}`")]
    TooSlow {
        /// Its name.
        vm: String,
        /// Its state.
        state: VmState,
        /// The length of the wait in seconds.
        waited: u64,
    },
    /// `run` was to boot a VM that is not at rest.
    #[error(
        "The VM {vm} is already {state}, so `run` did not boot it: `portcullis console {vm}` shows its \
         console, `portcullis vm stop {vm}` ends it"
    )]
    Up {
        /// Its name.
        vm: String,
        /// Its state.
        state: VmState,
    },
    /// `check` found that the host lacks something.
    #[error("Failed checks of this host: {0}; see the lines that say FAIL")]
    Unfit(usize),
    /// The agent cannot do its work.
    #[error("The agent cannot do its work: {0}")]
    Unwell(String),
    /// The terminal cannot be used.
    #[error("The terminal cannot be used")]
    Terminal(#[source] io::Error),
    /// The VM that `run` watched failed.
    #[error("The VM {vm} failed: {why}")]
    VmFailed {
        /// Its name.
        vm: String,
        /// Its cause.
        why: String,
    },
    /// A signal ended the command.
    #[error("Ended by signal {signal}")]
    Signalled {
        /// Its number.
        signal: i32,
    },
    /// The demonstration failed.
    #[error(transparent)]
    Demo(#[from] DemoError),
    /// The output cannot be written.
    #[error("Cannot write the output")]
    Output(#[from] io::Error),
    /// The async runtime cannot be started.
    #[error("Cannot start")]
    Runtime(#[source] io::Error),
}

impl CliError {
    /// The exit code: 1 failure, 2 usage, 3 agent unreachable, 4 not found, 5 conflict, 6 timeout.
    pub fn code(&self) -> u8 {
        match self {
            CliError::Client(ClientError::Problem(problem)) => match problem.status {
                404 => 4,
                409 | 412 => 5,
                _ => 1,
            },
            CliError::Client(ClientError::Strange { .. }) => 1,
            CliError::Client(_) => 3,
            CliError::Read { .. }
            | CliError::Usage(_)
            | CliError::NotASpec { .. }
            | CliError::Port { .. } => 2,
            CliError::Remote(_) | CliError::Tokens(_) => 2,
            CliError::Apply { source, .. } => source.code(),
            CliError::Up { .. } => 5,
            CliError::TooSlow { .. } => 6,
            // As shells do it.
            CliError::Signalled { signal } => u8::try_from(128 + signal).unwrap_or(1),
            CliError::Write { .. } | CliError::Unfit(_) | CliError::Unwell(_) | CliError::Terminal(_) => 1,
            CliError::VmFailed { .. } | CliError::Demo(_) | CliError::Output(_) | CliError::Runtime(_) => 1,
        }
    }

    /// Writes the error to stderr and returns the exit code. A closed pipe (`| head`) is no failure.
    pub(super) fn report(&self, format: Format) -> ExitCode {
        if matches!(self, CliError::Output(error) if error.kind() == io::ErrorKind::BrokenPipe) {
            return ExitCode::SUCCESS;
        }
        warn(self.text(format));
        ExitCode::from(self.code())
    }

    /// The agent's problem, and the file of `apply` that it is about.
    fn problem(&self) -> Option<(&Problem, Option<&str>)> {
        match self {
            CliError::Client(error) => Some((error.problem()?, None)),
            CliError::Apply { file, source } => Some((source.problem()?.0, Some(file.as_str()))),
            _ => None,
        }
    }

    /// The error in a form: a problem of the API as JSON or YAML, everything else as lines for people.
    #[must_use]
    pub fn text(&self, format: Format) -> String {
        if let Some((problem, file)) = self.problem() {
            let told = Told { problem, file };
            let written = match format {
                Format::Json => output::json(&told).ok(),
                Format::Yaml => output::yaml(&told).ok(),
                Format::Table => None,
            };
            return written.map(|text| text.trim_end().to_owned()).unwrap_or_else(|| {
                let context = file.map(|_| format!("{self}: ")).unwrap_or_default();
                printable(&format!("portcullis: {context}{}", problem_text(problem)))
            });
        }
        let mut text = format!("portcullis: {self}");
        let mut source = self.source();
        while let Some(error) = source {
            text.push_str(&format!(": {error}"));
            source = error.source();
        }
        // A log or a place in a file has lines. None of them looks like a line of this program's own.
        printable_lines(&text).replace('\n', "\n    ")
    }
}

/// A problem in the form for programs.
#[derive(Serialize)]
struct Told<'a> {
    #[serde(flatten)]
    problem: &'a Problem,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<&'a str>,
}

fn problem_text(problem: &Problem) -> String {
    let request = problem.request_id.as_ref().map(|id| format!(" (request {id})")).unwrap_or_default();
    format!("{} ({}): {}{request}", problem.title, problem.code, problem.detail)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use api::ProblemCode;

    use super::*;
    use text::is_printable;

    fn check(error: impl Into<CliError>, code: u8, text: &str) {
        let error = error.into();
        assert_eq!((error.code(), error.text(Format::Table).as_str()), (code, text));
    }

    /// Paths, names and causes in errors come from specifications and from vmm processes.
    #[test]
    fn no_error_controls_the_terminal() {
        let hostile = "/x\x1b]0;title\x07\x1b[2J\u{9b}2J\u{202e}\r\nportcullis: all is well";
        let refused =
            CliError::from(ClientError::from(Box::new(Problem::new(ProblemCode::NotFound, hostile))));
        let apply = CliError::Apply { file: hostile.to_owned(), source: Box::new(refused) };
        let failed = CliError::VmFailed { vm: "web1".into(), why: hostile.to_owned() };
        let spec = CliError::NotASpec { path: hostile.into(), what: "a file", why: hostile.into() };
        for error in [apply, failed, spec] {
            let text = error.text(Format::Table);
            assert!(is_printable(&text), "{text:?}");
            assert!(text.lines().skip(1).all(|line| line.starts_with("    ")), "{text:?}");
        }
        let refused = ClientError::from(Box::new(Problem::new(ProblemCode::NotFound, hostile)));
        let refused = CliError::from(refused);
        assert_eq!(refused.text(Format::Table).lines().count(), 1);
        for format in [Format::Json, Format::Yaml] {
            assert!(is_printable(&refused.text(format)), "{format:?}");
        }
    }

    #[test]
    fn exit_codes_and_texts() {
        let refused = |code| ClientError::from(Box::new(Problem::new(code, "Do this.")));
        check(refused(ProblemCode::NotFound), 4, "portcullis: Not found (not_found): Do this.");
        check(refused(ProblemCode::VfInUse), 5, "portcullis: The VF is in use (vf_in_use): Do this.");
        check(
            refused(ProblemCode::RevisionMismatch),
            5,
            "portcullis: The object has changed (revision_mismatch): Do this.",
        );
        check(
            refused(ProblemCode::KvmUnavailable),
            1,
            "portcullis: KVM is not available (kvm_unavailable): Do this.",
        );
        let problem = Problem {
            request_id: Some("r-1".into()),
            ..Problem::new(ProblemCode::PortGroupNotFound, "Do this.")
        };
        let applied = CliError::Apply {
            file: "a.toml".into(),
            source: Box::new(ClientError::from(Box::new(problem.clone())).into()),
        };
        let json: serde_json::Value = serde_json::from_str(&applied.text(Format::Json)).unwrap();
        let mut whole = serde_json::to_value(&problem).unwrap();
        whole["file"] = "a.toml".into();
        assert_eq!(json, whole, "all of the problem, and the file");
        let yaml = applied.text(Format::Yaml);
        assert!(yaml.contains("code: port_group_not_found\n") && yaml.ends_with("file: a.toml"), "{yaml}");
        let text = format!(
            "portcullis: Cannot apply a.toml: {} (port_group_not_found): Do this. (request r-1)",
            problem.title
        );
        check(applied, 1, &text);
        let source = io::Error::from(io::ErrorKind::NotFound);
        check(
            ClientError::NoAgent { socket: PathBuf::from("/s"), source },
            3,
            "portcullis: No agent listens on /s: start one with `portcullis serve`, or name its socket with \
             --socket: entity not found",
        );
        check(
            CliError::NotASpec { path: "a.toml".into(), what: "a VM's specification", why: "cpus: 0".into() },
            2,
            "portcullis: a.toml is not a VM's specification: cpus: 0",
        );
    }
}
