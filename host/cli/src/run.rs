// SPDX-License-Identifier: Apache-2.0

//! `portcullis run`.

use std::time::Duration;

use api::{Client, ClientError, ProblemCode, types::*};
use clap::Args;
use text::printable;
use tokio::signal::unix::{Signal, SignalKind, signal};
use uuid::Uuid;

use super::{
    console,
    error::CliError,
    lease::{Kept, is_others},
    output::{Output, warn},
    spec_file,
    vm::{act, delete},
};

/// The wait of `run --rm` for an agent that is restarted: as long as the agent waits for this command.
const AGENT_AWAY: Duration = Duration::from_secs(60);

#[derive(Debug, Args)]
pub struct RunArgs {
    /// The VM's specification: a .toml, .yaml or .json file, or - for standard input.
    file: String,
    /// Deletes the VM when it ends, when its boot fails, or when this command ends, even if the
    /// command is killed or loses its connection. A VM that existed before stays, as does the VM of
    /// a console that Ctrl-] detaches. While the agent restarts, the VM stays: the command waits
    /// 60 s for the agent, and the agent for the command.
    #[arg(long)]
    rm: bool,
    /// Waits at most this many seconds for the VM's boot, and with --rm for its deletion. The console is shown even if
    /// the boot takes longer.
    #[arg(long, visible_alias = "timeout", value_name = "SECONDS", default_value_t = 60,
        value_parser = clap::value_parser!(u64).range(1..=api::router::MAX_WAIT_SECONDS))]
    wait: u64,
    /// Shows the guest's output and sends nothing to the guest, as without a terminal.
    #[arg(long)]
    no_input: bool,
}

/// Creates and boots a VM and follows its console to its end.
pub(super) async fn run_file(
    client: &Client,
    output: &mut Output<'_>,
    args: RunArgs,
) -> Result<(), CliError> {
    let spec = spec_file::read_vm(&args.file)?;
    // Before the VM's creation, so that no signal leaves the VM behind.
    let signals = if args.rm { Some(Signals::new()?) } else { None };
    // Another command with the same file is another holder, so one of them gets the lease.
    let holder = Uuid::new_v4();
    let create = async {
        match args.rm {
            // The agent deletes the VM if this process ends before it has the lease.
            true => client.create_leased_vm(&spec, Some(holder)).await,
            false => client.create_vm(&spec).await,
        }
    };
    let (vm, created) = match create.await {
        Ok(vm) => (vm, true),
        Err(error) => (same_vm(client, &spec, error).await?, false),
    };
    let (name, state) = (vm.name.to_string(), vm.status.state);
    if !state.is_at_rest() {
        return Err(CliError::Up { vm: name, state });
    }
    let id = vm.id.to_string();
    // The agent is about to delete a VM that waits for any client: this one takes it over.
    let abandoned = vm.status.lease.is_some();
    if abandoned && !args.rm {
        let _mine = Kept::take(client, id.clone(), holder).await?;
        client.end_lease(&id).await?;
    }
    // This command deletes only a VM that it has made or taken over.
    let remove = args.rm && (created || abandoned);
    if args.rm && !remove {
        warn(format_args!("portcullis: the VM {name} existed before: --rm does not delete it"));
    }
    let _lease = if remove { hold(client, &name, &id, holder).await? } else { None };
    let Some(mut signals) = signals else {
        return boot_and_follow(client, output, &args, &name, &id, false).await;
    };
    let signal = tokio::select! {
        result = boot_and_follow(client, output, &args, &name, &id, remove) => return result,
        signal = signals.next() => signal,
    };
    if remove {
        // A second signal ends the wait for the deletion, which the agent completes.
        tokio::select! {
            () = remove_after(client, &name, &id, args.wait) => {}
            _ = signals.next() => {}
        }
    }
    Err(CliError::Signalled { signal })
}

/// Takes the lease of a VM that this command is to delete. None after a failure: a killed command then leaves the VM,
/// which is no reason not to run it.
///
/// # Errors
/// The VM lives by the lease of another command.
async fn hold(client: &Client, name: &str, id: &str, holder: Uuid) -> Result<Option<Kept>, CliError> {
    match Kept::take(client, id.to_owned(), holder).await {
        Ok(lease) => Ok(Some(lease)),
        Err(error) if is_others(&error) => Err(error.into()),
        Err(error) => {
            warn(printable(&format!(
                "portcullis: the VM {name} is not deleted if this command is killed: {error}"
            )));
            // Otherwise the agent would delete the VM for want of a client.
            drop(client.end_lease(id).await);
            Ok(None)
        }
    }
}

/// The signals that end a command in the ordinary way.
struct Signals([(i32, Signal); 3]);

impl Signals {
    fn new() -> Result<Self, CliError> {
        let listen = |kind: SignalKind| signal(kind).map(|signal| (kind.as_raw_value(), signal));
        let signals = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()].map(listen);
        let [Ok(terminate), Ok(interrupt), Ok(hangup)] = signals else {
            return Err(CliError::Terminal(std::io::Error::other("signals cannot be handled")));
        };
        Ok(Self([terminate, interrupt, hangup]))
    }

    /// Waits for the next signal and returns its number.
    async fn next(&mut self) -> i32 {
        let [(terminate, first), (interrupt, second), (hangup, third)] = &mut self.0;
        tokio::select! {
            _ = first.recv() => *terminate,
            _ = second.recv() => *interrupt,
            _ = third.recv() => *hangup,
        }
    }
}

async fn boot_and_follow(
    client: &Client,
    output: &mut Output<'_>,
    args: &RunArgs,
    name: &str,
    id: &str,
    remove: bool,
) -> Result<(), CliError> {
    if let Err(error) = act(client, id, VmAction::Boot, args.wait).await {
        // In the wrong state, the VM was booted by another command, which has it now.
        let is_others = error.problem().is_some_and(|problem| problem.code == ProblemCode::WrongState);
        match remove {
            true if is_others => {}
            true => remove_after(client, name, id, args.wait).await,
            false => warn(format_args!(
                "portcullis: the VM {name} still exists: delete it (`portcullis vm delete {name}`), or \
                 correct and boot it"
            )),
        }
        return Err(error.into());
    }
    let patience = if remove { AGENT_AWAY } else { Duration::ZERO };
    match console::attach(client, output, name, id, args.no_input, patience).await? {
        console::End::Rest => {}
        // The caller gets the same signal.
        console::End::Signalled if args.rm => std::future::pending().await,
        console::End::Detached if remove => return Ok(client.end_lease(id).await?),
        // The VM runs on.
        console::End::Detached | console::End::Signalled => return Ok(()),
    }
    let status = client.get_vm(id).await?.status;
    if status.state == VmState::Failed {
        if remove {
            remove_after(client, name, id, args.wait).await;
        }
        let why = status.cause.map_or_else(|| "the cause is unknown".to_owned(), |cause| cause.detail);
        return Err(CliError::VmFailed { vm: name.to_owned(), why });
    }
    if remove {
        delete(client, id, None, args.wait).await?;
    }
    Ok(())
}

/// Deletes the VM of a failed command. The command ends with its first error, so an error of the deletion is a warning.
async fn remove_after(client: &Client, name: &str, id: &str, wait: u64) {
    if let Err(error) = delete(client, id, None, wait).await {
        warn(printable(&format!(
            "portcullis: cannot delete the VM {name} (`portcullis vm delete {name}` tries again): {error}"
        )));
    }
}

/// The VM of an earlier run with the same file, if `error` says that its name is taken; else `error`. A VM that lives
/// by the lease of another command belongs to that command.
async fn same_vm(client: &Client, spec: &VmSpec, error: ClientError) -> Result<Vm, CliError> {
    if error.problem().is_none_or(|problem| problem.code != ProblemCode::NameTaken) {
        return Err(error.into());
    }
    match client.get_vm(spec.name.as_str()).await {
        Ok(vm) if vm.spec == *spec && vm.status.lease.is_none_or(|lease| lease.until.is_some()) => Ok(vm),
        _ => Err(error.into()),
    }
}
