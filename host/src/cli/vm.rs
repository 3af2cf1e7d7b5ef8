// SPDX-License-Identifier: Apache-2.0

//! `portcullis vm …` and `portcullis run`.

use std::time::Duration;

use api::{Client, ClientError, ProblemCode, Progress, types::*};
use clap::{Args, Subcommand};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::{
    console,
    error::CliError,
    output::{Output, or_dash, warn},
    progress::{self, DELETING, verb_of},
    spec_file, vm_edit,
};
use crate::text::printable;

#[derive(Debug, Subcommand)]
pub(super) enum VmCommand {
    /// Creates a VM; it holds nothing of the host until it is booted.
    Create {
        /// Its specification: a .toml, .yaml or .json file, or - for standard input.
        file: String,
    },
    /// Lists the VMs.
    List,
    /// Shows a VM.
    Show(VmName),
    /// Replaces a VM's whole specification. Unless it is at rest, only `restart` and `autostart` may differ.
    Set {
        #[command(flatten)]
        vm: VmName,
        /// Its specification: a .toml, .yaml or .json file, or - for standard input.
        #[arg(long, short)]
        file: String,
        /// Only if it is at this revision.
        #[arg(long, value_name = "REVISION")]
        if_match: Option<u64>,
    },
    /// Changes a part of a VM's specification. Unless it is at rest, only `restart` and `autostart` may change.
    Patch(Box<vm_edit::PatchArgs>),
    /// Gives a VM that is at rest another name.
    Rename {
        #[command(flatten)]
        vm: VmName,
        /// Its new name.
        new_name: Name,
    },
    /// Creates a VM like another one, whose adapters have addresses and VFs of their own.
    Clone {
        #[command(flatten)]
        vm: VmName,
        /// The name of the new one.
        new_name: Name,
    },
    /// Waits until a VM is in a state.
    Wait(vm_edit::WaitArgs),
    /// Boots a VM.
    Boot(ActionArgs),
    /// Pauses a running VM.
    Pause(ActionArgs),
    /// Lets a paused VM go on.
    Resume(ActionArgs),
    /// Resets a VM and boots it again.
    Reboot(ActionArgs),
    /// Presses a VM's power button.
    Shutdown(ActionArgs),
    /// Ends a VM at once.
    Stop(ActionArgs),
    /// Deletes a VM; stops it if it runs.
    Delete {
        #[command(flatten)]
        vm: VmName,
        /// Only if it is at this revision.
        #[arg(long, value_name = "REVISION")]
        if_match: Option<u64>,
        /// Waits at most this many seconds for it to be gone; its deletion goes on if it is not (exit code 6). With 0 it is only begun.
        #[arg(long, visible_alias = "timeout", value_name = "SECONDS", default_value_t = 60,
            value_parser = clap::value_parser!(u64).range(0..=api::router::MAX_WAIT_SECONDS))]
        wait: u64,
    },
    /// Shows a VM's counters.
    Stats(VmName),
}

#[derive(Debug, Args)]
pub(super) struct VmName {
    /// The VM's name or id.
    #[arg(value_name = "NAME")]
    pub(super) name: String,
}

#[derive(Debug, Args)]
pub(super) struct ActionArgs {
    #[command(flatten)]
    vm: VmName,
    /// Waits at most this many seconds for the action to complete; it goes on if it has not (exit code 6). With 0 it is only begun.
    #[arg(long, visible_alias = "timeout", value_name = "SECONDS", default_value_t = 60,
        value_parser = clap::value_parser!(u64).range(0..=api::router::MAX_WAIT_SECONDS))]
    wait: u64,
}

#[derive(Debug, Args)]
pub(super) struct RunArgs {
    /// The VM's specification: a .toml, .yaml or .json file, or - for standard input.
    file: String,
    /// Deletes the VM when it has ended, could not be booted, or this command ends by TERM, INT or HUP, unless it was there before. A
    /// console that is detached by its key leaves it.
    #[arg(long)]
    rm: bool,
    /// Waits at most this many seconds for it to be booted, whose console is then shown all the same, and with --rm to be deleted.
    #[arg(long, visible_alias = "timeout", value_name = "SECONDS", default_value_t = 60,
        value_parser = clap::value_parser!(u64).range(1..=api::router::MAX_WAIT_SECONDS))]
    wait: u64,
    /// Shows what the guest writes and sends nothing to it, as without a terminal.
    #[arg(long)]
    no_input: bool,
}

pub(super) async fn run(
    client: &Client,
    output: &mut Output<'_>,
    command: VmCommand,
) -> Result<(), CliError> {
    let (args, action) = match command {
        VmCommand::Create { file } => {
            let vm = client.create_vm(&spec_file::read_vm(&file)?).await?;
            return Ok(output.object(&vm, brief)?);
        }
        VmCommand::List => {
            let vms = client.list_vms().await?;
            let header = ["NAME", "STATE", "CPUS", "MEMORY", "VFS", "ADDRESSES", "SINCE"];
            return Ok(output.table(&vms, header, row)?);
        }
        VmCommand::Show(vm) => return Ok(output.object(&client.get_vm(&vm.name).await?, details)?),
        VmCommand::Delete { vm, if_match, wait } => return delete(client, &vm.name, if_match, wait).await,
        VmCommand::Stats(vm) => return Ok(output.object(&client.stats(&vm.name).await?, counters)?),
        VmCommand::Set { vm, file, if_match } => {
            let vm = client.put_vm(&vm.name, &spec_file::read_vm(&file)?, if_match).await?;
            return Ok(output.object(&vm, brief)?);
        }
        VmCommand::Patch(args) => {
            return Ok(output.object(&vm_edit::patch(client, *args).await?, brief)?);
        }
        VmCommand::Rename { vm, new_name } => {
            let patch = serde_json::json!({ "name": new_name });
            return Ok(output.object(&client.patch_vm(&vm.name, &patch, None).await?, brief)?);
        }
        VmCommand::Clone { vm, new_name } => {
            let copy = client.clone_vm(&vm.name, &CloneSpec { name: new_name }).await?;
            return Ok(output.object(&copy, brief)?);
        }
        VmCommand::Wait(args) => {
            return Ok(output.object(&vm_edit::wait(client, args).await?, brief)?);
        }
        VmCommand::Boot(args) => (args, VmAction::Boot),
        VmCommand::Pause(args) => (args, VmAction::Pause),
        VmCommand::Resume(args) => (args, VmAction::Resume),
        VmCommand::Reboot(args) => (args, VmAction::Reboot),
        VmCommand::Shutdown(args) => (args, VmAction::Shutdown),
        VmCommand::Stop(args) => (args, VmAction::Stop),
    };
    let progress = act(client, &args.vm.name, action, args.wait).await?;
    output.object(&progress.vm, brief)?;
    if progress.complete || args.wait == 0 {
        return Ok(());
    }
    let (vm, state) = (progress.vm.name.to_string(), progress.vm.status.state);
    Err(CliError::TooSlow { vm, state, waited: args.wait })
}

async fn act(client: &Client, vm: &str, action: VmAction, wait: u64) -> Result<Progress, ClientError> {
    let request = client.act(vm, action, Duration::from_secs(wait));
    progress::of_vm(client, vm, verb_of(action), request).await
}

/// The time for a deletion request with `--wait 0` to reach the agent.
const BEGINNING: Duration = Duration::from_secs(1);

async fn delete(client: &Client, vm: &str, if_match: Option<u64>, wait: u64) -> Result<(), CliError> {
    let limit = Duration::from_secs(wait).max(BEGINNING);
    let request = client.delete_vm_within(vm, if_match, limit);
    match tokio::time::timeout(limit, progress::of_vm(client, vm, DELETING, request)).await {
        Ok(done) => Ok(done?),
        // Deleted or not: the agent goes on with it.
        Err(_) if wait == 0 => Ok(()),
        Err(_) => match client.get_vm(vm).await {
            Ok(vm) => {
                Err(CliError::TooSlow { vm: vm.name.to_string(), state: vm.status.state, waited: wait })
            }
            Err(error) if error.problem().is_some_and(|problem| problem.code == ProblemCode::NotFound) => {
                Ok(())
            }
            Err(error) => Err(error.into()),
        },
    }
}

/// Creates and boots a VM and follows its console to its end.
pub(super) async fn run_file(
    client: &Client,
    output: &mut Output<'_>,
    args: RunArgs,
) -> Result<(), CliError> {
    let spec = spec_file::read_vm(&args.file)?;
    // Before there is a VM that must not be left.
    let signals = if args.rm { Some(Signals::new()?) } else { None };
    let (vm, created) = match client.create_vm(&spec).await {
        Ok(vm) => (vm, true),
        Err(error) => (same_vm(client, &spec, error).await?, false),
    };
    let (name, state) = (vm.name.to_string(), vm.status.state);
    if !state.is_at_rest() {
        return Err(CliError::Up { vm: name, state });
    }
    // What this command did not make is somebody else's.
    let remove = args.rm && created;
    if args.rm && !created {
        warn(format_args!("portcullis: the VM {name} was there before: --rm does not delete it"));
    }
    let id = vm.id.to_string();
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

    /// The number of the next one.
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
        match remove {
            true => remove_after(client, name, id, args.wait).await,
            false => warn(format_args!(
                "portcullis: the VM {name} is there all the same: `portcullis vm delete {name}`, or mend it and boot it"
            )),
        }
        return Err(error.into());
    }
    match console::attach(client, output, name, id, args.no_input).await? {
        console::End::Rest => {}
        // The caller hears the same signal.
        console::End::Signalled if args.rm => std::future::pending().await,
        // It runs on.
        console::End::Detached | console::End::Signalled => return Ok(()),
    }
    let status = client.get_vm(id).await?.status;
    if status.state == VmState::Failed {
        if remove {
            remove_after(client, name, id, args.wait).await;
        }
        let why = status.cause.map_or_else(|| "no cause is known".to_owned(), |cause| cause.detail);
        return Err(CliError::VmFailed { vm: name.to_owned(), why });
    }
    if remove {
        delete(client, id, None, args.wait).await?;
    }
    Ok(())
}

/// Deletes the VM of a command that has failed: why that has is what the command ends with, so that what deleting says is told beside it.
async fn remove_after(client: &Client, name: &str, id: &str, wait: u64) {
    if let Err(error) = delete(client, id, None, wait).await {
        warn(printable(&format!(
            "portcullis: the VM {name} is not deleted (`portcullis vm delete {name}`): {error}"
        )));
    }
}

/// The VM of an earlier run with the same file, whose name is taken; else the error.
async fn same_vm(client: &Client, spec: &VmSpec, error: ClientError) -> Result<Vm, CliError> {
    if error.problem().is_none_or(|problem| problem.code != ProblemCode::NameTaken) {
        return Err(error.into());
    }
    match client.get_vm(spec.name.as_str()).await {
        Ok(vm) if vm.spec == *spec => Ok(vm),
        _ => Err(error.into()),
    }
}

fn brief(vm: &Vm) -> Vec<(String, String)> {
    let mut lines =
        vec![("name".to_owned(), vm.name.to_string()), ("state".to_owned(), vm.status.state.to_string())];
    lines.extend(vm.status.cause.iter().map(cause_line));
    lines.extend(vm.status.operation.iter().map(operation_line));
    lines
}

fn row(vm: &Vm) -> [String; 7] {
    let adapters = &vm.status.adapters;
    let joined = |parts: Vec<String>| if parts.is_empty() { "-".to_owned() } else { parts.join(",") };
    [
        vm.name.to_string(),
        vm.status.state.to_string(),
        vm.spec.cpus.to_string(),
        vm.spec.memory.to_string(),
        joined(adapters.iter().filter_map(|adapter| adapter.vf).map(|vf| vf.to_string()).collect()),
        joined(adapters.iter().map(|adapter| adapter.mac.to_string()).collect()),
        vm.status.since.to_string(),
    ]
}

fn cause_line(cause: &Cause) -> (String, String) {
    ("cause".to_owned(), cause.detail.clone())
}

fn operation_line(operation: &VmOperation) -> (String, String) {
    let VmOperation { action, stage, since, step, steps } = operation;
    ("operation".to_owned(), format!("{action}: {stage} ({step}/{steps}) since {since}"))
}

fn details(vm: &Vm) -> Vec<(String, String)> {
    let (spec, status) = (&vm.spec, &vm.status);
    let mut lines: Vec<(String, String)> = [
        ("name", vm.name.to_string()),
        ("id", vm.id.to_string()),
        ("revision", vm.revision.to_string()),
        ("created", vm.created.to_string()),
        ("state", format!("{} since {}", status.state, status.since)),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into();
    lines.extend(status.cause.iter().map(cause_line));
    lines.extend(status.operation.iter().map(operation_line));
    lines.extend(
        [
            ("pid", status.pid.map(|pid| pid.to_string()).unwrap_or_default()),
            ("boots", status.boots.to_string()),
            ("restart", restart(vm)),
            ("autostart", if spec.autostart { "yes" } else { "" }.to_owned()),
            ("cpus", spec.cpus.to_string()),
            ("memory", format!("{}{}", spec.memory, if spec.hugepages { " in huge pages" } else { "" })),
            ("kernel", spec.boot.kernel.clone()),
            ("initramfs", spec.boot.initramfs.clone().unwrap_or_default()),
            ("cmdline", spec.boot.cmdline.clone()),
            (
                "console",
                format!("{} bytes, of which the last {} are kept", status.console.end, kept(status.console)),
            ),
        ]
        .map(|(name, value)| (name.to_owned(), value)),
    );
    if !status.sandbox.off.is_empty() {
        let off: Vec<&str> = status.sandbox.off.iter().map(|off| off.as_str()).collect();
        lines.push(("sandbox".to_owned(), format!("without {}", off.join(", "))));
    }
    for adapter in &status.adapters {
        let place = match (adapter.vf, &adapter.pf) {
            (Some(vf), Some(pf)) => {
                let group = adapter.iommu_group.map(|group| format!(", IOMMU group {group}"));
                format!(", {vf} (VF {} of {pf}{})", or_dash(adapter.vf_index), group.unwrap_or_default())
            }
            _ => String::new(),
        };
        lines.push((
            format!("adapter {}", adapter.id),
            format!("{}{place}{}{}", adapter.mac, lost(&adapter.lost), unchecked(&adapter.unchecked)),
        ));
    }
    for device in &status.devices {
        let group =
            device.iommu_group.map(|group| format!("IOMMU group {group}")).unwrap_or("assigned".to_owned());
        lines.push((format!("device {}", device.bdf), format!("{group}{}", lost(&device.lost))));
    }
    lines
}

/// The policy, unless it is that of all, and what the agent does by it.
fn restart(vm: &Vm) -> String {
    let policy = match (vm.spec.restart, &vm.status.restart) {
        (RestartPolicy::Never, None) => return String::new(),
        (policy, _) => policy.as_str(),
    };
    let Some(restart) = &vm.status.restart else { return policy.to_owned() };
    let next = restart.next.map(|next| format!(", next at {next}")).unwrap_or_default();
    format!("{policy}, {} so far{next}", restart.attempts)
}

fn kept(console: ConsoleStatus) -> u64 {
    console.end.saturating_sub(console.start)
}

fn unchecked(unchecked: &Option<Unchecked>) -> String {
    let text = |unchecked: &Unchecked| {
        format!(", not compared with its PF since {}: {}", unchecked.since, unchecked.detail)
    };
    unchecked.as_ref().map(text).unwrap_or_default()
}

fn lost(cause: &Option<Cause>) -> String {
    cause.as_ref().map(|cause| format!(", lost: {}", cause.detail)).unwrap_or_default()
}

fn counters(stats: &VmStats) -> Vec<(String, String)> {
    let mut lines = vec![
        ("memory".to_owned(), ByteSize::new(stats.memory).to_string()),
        ("boots".to_owned(), stats.boots.to_string()),
        (
            "first entry".to_owned(),
            stats.first_entry_ns.map(|ns| format!("{} us", ns / 1000)).unwrap_or_default(),
        ),
    ];
    lines.extend(stats.exits.iter().map(|(reason, count)| (format!("exits {reason}"), count.to_string())));
    for (bdf, device) in &stats.devices {
        let name =
            device.adapter.as_ref().map_or_else(|| bdf.clone(), |adapter| format!("{bdf} ({adapter})"));
        lines.push((format!("{name} config exits"), device.config_exits.to_string()));
        for (page, count) in &device.bar_exits {
            lines.push((format!("{name} exits of BAR:page {page}"), count.to_string()));
        }
        for (message, count) in &device.mailbox {
            lines.push((format!("{name} mailbox {message}"), count.to_string()));
        }
    }
    lines
}
