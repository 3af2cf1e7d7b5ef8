//! The command line: a client of the REST API, and the way to start the agent.
//!
//! Exit codes: 0 done, 1 the request failed, 2 the command line or a file is wrong, 3 the agent cannot be reached, 4 not
//! found, 5 conflict (in use, name taken, wrong state, changed meanwhile).

mod console;
mod decisions;
mod demo;
mod error;
mod events;
mod host;
mod output;
mod port;
mod port_group;
mod remote;
mod settings;
mod spec_file;
mod switch;
#[cfg(test)]
mod tests;
mod ui;
mod vm;

use std::{
    io::{self, Write as _},
    path::PathBuf,
    process::ExitCode,
};

use api::Client;
use clap::{Parser, Subcommand};

use error::CliError;
use output::{Format, Output};

/// Virtual machines with SR-IOV network adapters under the policy of port groups.
#[derive(Debug, Parser)]
#[command(name = "portcullis", version, propagate_version = true, arg_required_else_help = true)]
pub struct Cli {
    /// The agent's socket.
    #[arg(long, global = true, value_name = "PATH", env = "PORTCULLIS_SOCKET", default_value = api::DEFAULT_SOCKET)]
    socket: PathBuf,
    #[command(flatten)]
    remote: remote::RemoteArgs,
    /// How answers are written.
    #[arg(long, global = true, value_enum, default_value_t = Format::Table)]
    output: Format,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the agent: serves the REST API, starts and supervises VMs.
    Serve(Box<crate::agent::ServeArgs>),
    /// Shows on a simulated adapter what a guest may change and what not: needs /dev/kvm, and leaves nothing behind.
    Demo(demo::DemoArgs),
    /// Writes the small guest, a kernel image for tests (`resources/guest`), to standard output.
    #[command(hide = true)]
    GuestImage,
    #[command(flatten)]
    Client(Request),
}

/// What is asked of an agent.
#[derive(Debug, Subcommand)]
enum Request {
    /// Creates a VM from a file, boots it and shows its console until it ends.
    Run(vm::RunArgs),
    /// Virtual machines.
    #[command(subcommand)]
    Vm(vm::VmCommand),
    /// Shows a VM's serial console.
    Console(console::ConsoleArgs),
    /// Physical functions: the host's SR-IOV adapters.
    #[command(subcommand)]
    Pf(host::PfCommand),
    /// Virtual functions.
    #[command(subcommand)]
    Vf(host::VfCommand),
    /// Switches: uplinks, and what port groups start from.
    #[command(subcommand)]
    Switch(switch::SwitchCommand),
    /// Port groups: what guests may do with their VFs.
    #[command(subcommand)]
    PortGroup(port_group::PortGroupCommand),
    /// Ports: the adapters of VMs in their port groups.
    #[command(subcommand)]
    Port(port::PortCommand),
    /// Lists what guests asked for and what came out, the latest first.
    Decisions(decisions::DecisionsArgs),
    /// Shows what happens: VMs' states, decisions, objects that change.
    Events(events::EventsArgs),
    /// Serves a page about all of it to a browser of this host, until it is interrupted.
    Ui(ui::UiArgs),
}

/// Does what the command line says.
pub fn run(cli: Cli) -> ExitCode {
    let command = match cli.command {
        Command::Serve(args) => {
            return match crate::agent::run(*args, &cli.socket, cli.remote.token_file.as_deref()) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("portcullis: {error:#}");
                    ExitCode::FAILURE
                }
            };
        }
        Command::Demo(args) => return demo::run(&args, cli.output),
        Command::GuestImage => {
            return match io::stdout().lock().write_all(crate::small_guest::IMAGE) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => CliError::Output(error).report(cli.output),
            };
        }
        Command::Client(command) => command,
    };
    let client = match cli.remote.client(cli.socket) {
        Ok(client) => client,
        Err(error) => return error.report(cli.output),
    };
    let mut stdout = io::stdout().lock();
    let mut output = Output::new(cli.output, &mut stdout);
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return CliError::Runtime(error).report(cli.output),
    };
    match runtime.block_on(request(&client, &mut output, command)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => error.report(cli.output),
    }
}

async fn request(client: &Client, output: &mut Output<'_>, command: Request) -> Result<(), CliError> {
    match command {
        Request::Run(args) => vm::run_file(client, output, args).await,
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
