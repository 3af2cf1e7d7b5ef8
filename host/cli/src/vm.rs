// SPDX-License-Identifier: Apache-2.0

//! `portcullis vm …`.

mod create;
mod disk;
mod edit;

use std::time::Duration;

use api::{Client, ClientError, ProblemCode, Progress, types::*};
use clap::{Args, Subcommand};

use super::{
    error::CliError,
    output::{Output, or_dash},
    progress::{self, DELETING, verb_of},
    spec_file,
};

#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Creates a VM from a file or from options; it holds nothing of the host until it is booted.
    Create(Box<create::CreateArgs>),
    /// Lists the VMs.
    List,
    /// Shows a VM.
    Show(VmName),
    /// Replaces a VM's whole specification. Unless the VM is stopped, only `restart`, `autostart` and
    /// the limits of disks may differ.
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
    /// Changes a part of a VM's specification. Unless the VM is stopped, only `restart`, `autostart`
    /// and the limits of disks may change.
    Patch(Box<edit::PatchArgs>),
    /// Replaces the limits of a disk, also of a running VM. Without options the disk has none.
    DiskLimits(disk::LimitsArgs),
    /// Enlarges a disk of a running VM, whose guest learns the new size at once.
    DiskResize {
        #[command(flatten)]
        vm: VmName,
        /// The disk's id.
        disk: Name,
        /// The new size, as 20GiB. A disk never becomes smaller.
        size: ByteSize,
    },
    /// Renames a stopped VM.
    Rename {
        #[command(flatten)]
        vm: VmName,
        /// Its new name.
        new_name: Name,
    },
    /// Creates a VM like another one. Its adapters have addresses and VFs of their own.
    Clone {
        #[command(flatten)]
        vm: VmName,
        /// The name of the new one.
        new_name: Name,
    },
    /// Waits until a VM is in a state.
    Wait(edit::WaitArgs),
    /// Boots a VM.
    Boot(ActionArgs),
    /// Pauses a running VM.
    Pause(ActionArgs),
    /// Resumes a paused VM.
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
        /// Waits at most this many seconds for the deletion; after that the deletion goes on (exit
        /// code 6). With 0 it is only begun.
        #[arg(long, visible_alias = "timeout", value_name = "SECONDS", default_value_t = 60,
            value_parser = clap::value_parser!(u64).range(0..=api::router::MAX_WAIT_SECONDS))]
        wait: u64,
    },
    /// Shows a VM's counters.
    Stats(VmName),
}

#[derive(Debug, Args)]
pub struct VmName {
    /// The VM's name or id.
    #[arg(value_name = "NAME")]
    pub(super) name: String,
}

#[derive(Debug, Args)]
pub struct ActionArgs {
    #[command(flatten)]
    vm: VmName,
    /// Waits at most this many seconds for the action to complete; after that the action goes on
    /// (exit code 6). With 0 it is only begun.
    #[arg(long, visible_alias = "timeout", value_name = "SECONDS", default_value_t = 60,
        value_parser = clap::value_parser!(u64).range(0..=api::router::MAX_WAIT_SECONDS))]
    wait: u64,
}

pub(super) async fn run(
    client: &Client,
    output: &mut Output<'_>,
    command: VmCommand,
) -> Result<(), CliError> {
    let (args, action) = match command {
        VmCommand::Create(args) => {
            let vm = client.create_vm(&create::spec(*args)?).await?;
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
            return Ok(output.object(&edit::patch(client, *args).await?, brief)?);
        }
        VmCommand::DiskLimits(args) => {
            return Ok(output.object(&disk::limits(client, args).await?, brief)?);
        }
        VmCommand::DiskResize { vm, disk, size } => {
            let grown = client.resize_disk(&vm.name, &DiskSize { disk, size }).await?;
            return Ok(output.object(&grown, disk::size)?);
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
            return Ok(output.object(&edit::wait(client, args).await?, brief)?);
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

pub(super) async fn act(
    client: &Client,
    vm: &str,
    action: VmAction,
    wait: u64,
) -> Result<Progress, ClientError> {
    let request = client.act(vm, action, Duration::from_secs(wait));
    progress::of_vm(client, vm, verb_of(action), request).await
}

/// The time for a deletion request with `--wait 0` to reach the agent.
const BEGINNING: Duration = Duration::from_secs(1);

pub(super) async fn delete(
    client: &Client,
    vm: &str,
    if_match: Option<u64>,
    wait: u64,
) -> Result<(), CliError> {
    let limit = Duration::from_secs(wait).max(BEGINNING);
    let request = client.delete_vm_within(vm, if_match, limit);
    match tokio::time::timeout(limit, progress::of_vm(client, vm, DELETING, request)).await {
        Ok(done) => Ok(done?),
        // The agent completes it, whether or not it has begun.
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

fn brief(vm: &Vm) -> Vec<(String, String)> {
    let mut lines =
        vec![("name".to_owned(), vm.name.to_string()), ("state".to_owned(), vm.status.state.to_string())];
    lines.extend(vm.status.cause.iter().map(cause_line));
    lines.extend(vm.status.operation.iter().map(operation_line));
    lines
}

/// The VF of an adapter or of a NIC of a port group, and its troubles.
fn port(status: &AdapterStatus) -> String {
    let place = match (status.vf, &status.pf) {
        (Some(vf), Some(pf)) => {
            let group = status.iommu_group.map(|group| format!(", IOMMU group {group}"));
            format!(", {vf} (VF {} of {pf}{})", or_dash(status.vf_index), group.unwrap_or_default())
        }
        _ => String::new(),
    };
    format!("{place}{}{}", lost(&status.lost), unchecked(&status.unchecked))
}

fn row(vm: &Vm) -> [String; 7] {
    let of_nics = vm.status.nics.iter().filter_map(|nic| nic.port.as_ref());
    let adapters: Vec<_> = vm.status.adapters.iter().chain(of_nics).collect();
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

/// The kernel's file, or the disk that has it.
fn kernel(boot: &BootSpec) -> String {
    let disk = || boot.disk.as_ref().map(|disk| format!("installed on disk {disk}"));
    boot.kernel.clone().or_else(disk).unwrap_or_default()
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
            ("lease", lease(status.lease)),
            ("autostart", if spec.autostart { "yes" } else { "" }.to_owned()),
            ("cpus", spec.cpus.to_string()),
            ("memory", memory(spec)),
            ("kernel", kernel(&spec.boot)),
            (
                "initramfs",
                spec.boot.initramfs.as_ref().map_or_else(String::new, |files| files.paths().join(", ")),
            ),
            ("cmdline", spec.boot.cmdline.clone()),
            (
                "console",
                format!("{} bytes, of which the last {} are kept", status.console.end, kept(status.console)),
            ),
        ]
        .map(|(name, value)| (name.to_owned(), value)),
    );
    if !spec.cpu_features.is_default() {
        let features = [("nested", spec.cpu_features.nested), ("pmu", spec.cpu_features.pmu)];
        let on: Vec<&str> = features.into_iter().filter(|(_, on)| *on).map(|(name, _)| name).collect();
        lines.push(("cpu features".to_owned(), on.join(", ")));
    }
    lines.extend(status.placement.iter().flat_map(place));
    if !status.sandbox.off.is_empty() {
        let off: Vec<&str> = status.sandbox.off.iter().map(|off| off.as_str()).collect();
        lines.push(("sandbox".to_owned(), format!("without {}", off.join(", "))));
    }
    for adapter in &status.adapters {
        lines.push((format!("adapter {}", adapter.id), format!("{}{}", adapter.mac, port(adapter))));
    }
    for disk in &spec.disks {
        lines.push((format!("disk {}", disk.id), disk::line(disk)));
    }
    for (nic, status) in spec.nics.iter().zip(&status.nics) {
        let place = nic.interface().map(|interface| format!("{} {}", interface.kind(), interface.name()));
        let mac = status.mac.map(|mac| mac.to_string()).unwrap_or("address of the interface".to_owned());
        let place = place.or(nic.port_group.as_ref().map(|group| format!("port group {group}")));
        let own = match (nic.interface(), &status.interface, &status.port) {
            (Some(NicInterface::Bridge(_)), Some(tap), _) => format!(" ({tap})"),
            (_, _, Some(of_group)) => port(of_group),
            _ => String::new(),
        };
        lines.push((format!("nic {}", nic.id), format!("{mac}, {}{own}", place.unwrap_or_default())));
    }
    if let Some(seed) = &spec.cloud_init {
        let texts = [
            ("user data", &seed.user_data),
            ("meta data", &seed.meta_data),
            ("network configuration", &seed.network_config),
        ];
        let given: Vec<&str> =
            texts.into_iter().filter(|(_, text)| text.is_some()).map(|(name, _)| name).collect();
        lines.push(("cloud-init".to_owned(), given.join(", ")));
    }
    if !spec.credentials.is_empty() {
        let names: Vec<&str> = spec.credentials.keys().map(|name| name.as_str()).collect();
        lines.push(("credentials".to_owned(), names.join(", ")));
    }
    for device in &status.devices {
        let group =
            device.iommu_group.map(|group| format!("IOMMU group {group}")).unwrap_or("assigned".to_owned());
        lines.push((format!("device {}", device.bdf), format!("{group}{}", lost(&device.lost))));
    }
    lines
}

fn memory(spec: &VmSpec) -> String {
    match spec.hugepages.size() {
        None => spec.memory.to_string(),
        Some(size) => format!("{} in huge pages of {size}", spec.memory),
    }
}

/// The actual place of a VM.
fn place(place: &PlacementStatus) -> Vec<(String, String)> {
    let mut lines: Vec<(String, String)> =
        place.cpus.iter().map(|(vcpu, cpus)| (format!("vcpu {}", vcpu.0), format!("CPUs {cpus}"))).collect();
    lines.extend(place.io_cpus.iter().map(|cpus| ("other threads".to_owned(), format!("CPUs {cpus}"))));
    let node = match (place.numa, &place.not_placed) {
        (Some(node), _) => format!(" on NUMA node {node}"),
        (None, Some(why)) => format!(", not bound to a NUMA node: {why}"),
        (None, None) => String::new(),
    };
    lines.push(("memory place".to_owned(), format!("pages of {}{node}", place.page_size)));
    lines
}

/// The restart policy, unless it is the default, and the agent's restarts by it.
fn restart(vm: &Vm) -> String {
    let policy = match (vm.spec.restart, &vm.status.restart) {
        (RestartPolicy::Never, None) => return String::new(),
        (policy, _) => policy.as_str(),
    };
    let Some(restart) = &vm.status.restart else { return policy.to_owned() };
    let next = restart.next.map(|next| format!(", next at {next}")).unwrap_or_default();
    format!("{policy}, {} so far{next}", restart.attempts)
}

/// The state of the lease; empty for a VM without one.
fn lease(lease: Option<VmLease>) -> String {
    match lease {
        None => String::new(),
        Some(VmLease { until: None }) => "held: the agent deletes the VM when its client ends".to_owned(),
        Some(VmLease { until: Some(until) }) => format!("without a client: the VM is deleted at {until}"),
    }
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
    for (id, disk) in &stats.disks {
        let counts = [
            ("reads", disk.reads),
            ("writes", disk.writes),
            ("flushes", disk.flushes),
            ("discards", disk.discards),
            ("bytes read", disk.read_bytes),
            ("bytes written", disk.written_bytes),
            ("errors", disk.errors),
            ("busy us", disk.busy_ns / 1000),
        ];
        lines.extend(counts.map(|(name, count)| (format!("disk {id} {name}"), count.to_string())));
    }
    for (id, nic) in &stats.nics {
        let counts = [
            ("frames received", nic.received),
            ("bytes received", nic.received_bytes),
            ("frames sent", nic.sent),
            ("bytes sent", nic.sent_bytes),
            ("frames dropped", nic.dropped),
            ("requests refused", nic.refused),
        ];
        lines.extend(counts.map(|(name, count)| (format!("nic {id} {name}"), count.to_string())));
    }
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
        let passed = [("reads", device.passed_reads), ("writes", device.passed_writes)];
        for (access, count) in passed.into_iter().filter(|(_, count)| *count > 0) {
            lines.push((format!("{name} {access} of registers beside the mailbox"), count.to_string()));
        }
    }
    lines
}
