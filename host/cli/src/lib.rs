// SPDX-License-Identifier: Apache-2.0

//! The command line: a client of the REST API, and commands that need no agent. The command that
//! runs the agent is not here.
//!
//! Exit codes: `EXIT_CODES`.

mod apply;
mod check;
mod console;
mod decisions;
mod demo;
mod demo_error;
mod error;
mod events;
mod generate;
mod host;
mod lease;
mod output;
mod port;
mod port_group;
mod progress;
mod remote;
mod run;
mod settings;
pub mod small_guest;
mod spec_file;
mod switch;
mod ui;
mod vm;

use std::{
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use api::Client;
use clap::{Args, Subcommand};

pub use error::CliError;
pub use events::Stream as EventStream;
pub use output::{Format, Output, warn};

/// The exit codes, on which scripts can rely.
pub const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  the request was refused or failed
  2  the command line or a file is wrong
  3  the agent cannot be reached
  4  not found
  5  conflict: in use, name taken, wrong state, changed meanwhile
  6  not complete in time; the action goes on";

/// The options of all commands.
#[derive(Debug, Args)]
pub struct Common {
    /// The agent's socket.
    #[arg(long, global = true, value_name = "PATH", env = "PORTCULLIS_SOCKET", default_value = api::DEFAULT_SOCKET)]
    socket: PathBuf,
    #[command(flatten)]
    remote: remote::RemoteArgs,
    /// The form of the output.
    #[arg(long, global = true, value_enum, default_value_t = Format::Table)]
    output: Format,
}

impl Common {
    /// The agent's socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The file with tokens.
    #[must_use]
    pub fn token_file(&self) -> Option<&Path> {
        self.remote.token_file.as_deref()
    }

    /// The form of the output.
    #[must_use]
    pub fn format(&self) -> Format {
        self.output
    }
}

/// Every command but the one that runs the agent.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Shows on a simulated adapter which changes of a guest the policy allows and which it denies:
    /// needs /dev/kvm, and leaves nothing behind. Exits non-zero if an expectation is not met. As
    /// root its processes have user ids from 2100100000 to 2100115999.
    Demo(demo::DemoArgs),
    /// Checks, without an agent, that this host has all that VMs with VFs need. Shows a command
    /// that fixes each fault.
    Check(check::CheckArgs),
    /// Writes completions for a shell to standard output.
    #[command(visible_alias = "completion")]
    Completions(generate::CompletionsArgs),
    /// Writes the man pages of all commands into a directory.
    #[command(hide = true)]
    Man(generate::ManArgs),
    /// Writes the small guest, a kernel image for tests (`resources/guest`), to standard output.
    #[command(hide = true)]
    GuestImage,
    /// A command that calls an agent.
    #[command(flatten)]
    Client(Request),
}

/// Commands that call an agent.
#[derive(Debug, Subcommand)]
pub enum Request {
    /// Creates a VM from a file, boots it and attaches its console, until it ends or Ctrl-]
    /// detaches. The VM stays. A VM that already exists, does not run and matches the file is
    /// booted.
    Run(run::RunArgs),
    /// Makes switches, port groups and VMs agree with files. Objects that no file describes stay as they are.
    Apply(apply::ApplyArgs),
    /// Shows whether the agent can do its work.
    Health,
    /// Virtual machines.
    #[command(subcommand)]
    Vm(vm::VmCommand),
    /// A VM's serial console; Ctrl-] detaches.
    Console(console::ConsoleArgs),
    /// Physical functions: the host's SR-IOV adapters.
    #[command(subcommand)]
    Pf(host::PfCommand),
    /// Virtual functions.
    #[command(subcommand)]
    Vf(host::VfCommand),
    /// Switches: uplinks, and the settings that port groups start from.
    #[command(subcommand)]
    Switch(switch::SwitchCommand),
    /// Port groups: the policies for guests' VFs.
    #[command(subcommand)]
    PortGroup(port_group::PortGroupCommand),
    /// Ports: the adapters of VMs in their port groups.
    #[command(subcommand)]
    Port(port::PortCommand),
    /// Lists the requests of guests and the decisions on them, the latest first.
    Decisions(decisions::DecisionsArgs),
    /// Shows events: states of VMs, decisions, changes of objects.
    Events(events::EventsArgs),
    /// Serves a web page about all of this to a browser on this host, until it is interrupted.
    Ui(ui::UiArgs),
}

/// Runs a command. `whole` is the definition of the command line that has it.
#[must_use]
pub fn run(common: Common, command: Command, whole: clap::Command) -> ExitCode {
    let Common { socket, remote, output: format } = common;
    let command = match command {
        Command::Demo(args) => return demo::run(&args, format),
        Command::GuestImage => {
            return match io::stdout().lock().write_all(crate::small_guest::IMAGE) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => CliError::Output(error).report(format),
            };
        }
        Command::Check(args) => return ended(check::run(&args, format), format),
        Command::Completions(args) => {
            return ended(generate::completions(&args, whole, &mut io::stdout().lock()), format);
        }
        Command::Man(args) => return ended(generate::man(&args, whole), format),
        Command::Client(command) => command,
    };
    let client = match remote.client(socket) {
        Ok(client) => client,
        Err(error) => return error.report(format),
    };
    let mut stdout = io::stdout().lock();
    let mut output = Output::new(format, &mut stdout);
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return CliError::Runtime(error).report(format),
    };
    ended(runtime.block_on(request(&client, &mut output, command)), format)
}

fn ended(result: Result<(), CliError>, format: Format) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => error.report(format),
    }
}

/// Runs a command that calls an agent.
///
/// # Errors
/// Those of the command; see [`CliError::code`].
pub async fn request(client: &Client, output: &mut Output<'_>, command: Request) -> Result<(), CliError> {
    match command {
        Request::Run(args) => run::run_file(client, output, args).await,
        Request::Apply(args) => apply::run(client, output, args).await,
        Request::Health => health(client, output).await,
        Request::Vm(command) => vm::run(client, output, command).await,
        Request::Console(args) => console::run(client, output, args).await,
        Request::Pf(command) => host::run_pf(client, output, command).await,
        Request::Vf(command) => host::run_vf(client, output, command).await,
        Request::Switch(command) => switch::run(client, output, command).await,
        Request::PortGroup(command) => port_group::run(client, output, command).await,
        Request::Port(command) => port::run(client, output, command).await,
        Request::Decisions(args) => decisions::run(client, output, args).await,
        Request::Events(args) => events::run(client, output, args).await,
        Request::Ui(args) => ui::run(client, output, args).await,
    }
}

async fn health(client: &Client, output: &mut Output<'_>) -> Result<(), CliError> {
    let complaints = client.health().await?;
    if complaints.is_empty() {
        let answer = serde_json::json!({ "healthy": true });
        return Ok(output.object(&answer, |_| vec![("agent".to_owned(), "ok".to_owned())])?);
    }
    Err(CliError::Unwell(complaints.join("; ")))
}
