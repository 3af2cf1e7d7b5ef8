// SPDX-License-Identifier: Apache-2.0

//! Examples of bodies for the document. They are values of the types that the routes take and return, so none can
//! be wrong; a test asserts that each operation has them.

use std::collections::BTreeMap;

use netpolicy::{Committed, DecidedBy, EffectivePolicy, Outcome, Reason, Setting, Source};
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::openapi::{Content, RefOr, path::Operation};
use uuid::Uuid;

use crate::types::*;

/// A VM that runs, with an adapter under policy.
fn vm() -> Option<Vm> {
    let id = id(1);
    Some(Vm {
        id,
        name: "web1".parse().ok()?,
        revision: 3,
        created: moment(0),
        spec: spec()?.masked(),
        status: VmStatus {
            state: VmState::Running,
            since: moment(5),
            cause: None,
            operation: None,
            pid: Some(4711),
            boots: 1,
            restart: None,
            lease: None,
            adapters: vec![AdapterStatus {
                id: "eth0".parse().ok()?,
                mac: "02:00:00:00:00:11".parse().ok()?,
                pf: Some("enp1s0".to_owned()),
                vf: "0000:01:10.0".parse().ok(),
                vf_index: Some(0),
                iommu_group: Some(30),
                lost: None,
                unchecked: None,
            }],
            devices: Vec::new(),
            nics: vec![NicStatus {
                id: "mgmt0".parse().ok()?,
                mac: "02:00:00:00:00:22".parse().ok(),
                interface: Some("pc0000000001n0".to_owned()),
                port: None,
            }],
            console: ConsoleStatus { start: 0, end: 1234 },
            sandbox: SandboxStatus::default(),
            placement: None,
        },
    })
}

/// The same while an action goes on, if the action takes time.
fn going_on(id: &str) -> Option<Vm> {
    let (state, action, stage, step, steps) = match id {
        "boot_vm" => (VmState::Starting, OperationAction::Boot, Stage::BuildingMachine, 6, 7),
        "reboot_vm" => (VmState::Running, OperationAction::Reboot, Stage::ResettingMachine, 1, 1),
        "shutdown_vm" => (VmState::Running, OperationAction::Shutdown, Stage::AskingGuest, 1, 4),
        "stop_vm" => (VmState::Stopping, OperationAction::Stop, Stage::EndingProcess, 1, 3),
        _ => return None,
    };
    let mut vm = vm()?;
    vm.status.state = state;
    vm.status.operation = Some(VmOperation { action, stage, since: moment(5), step, steps });
    Some(vm)
}

fn spec() -> Option<VmSpec> {
    Some(VmSpec {
        name: "web1".parse().ok()?,
        cpus: 2,
        memory: "512MiB".parse().ok()?,
        hugepages: HugePages::Off,
        boot: BootSpec {
            kernel: Some("vmlinuz".to_owned()),
            disk: None,
            initramfs: Some("initrd.img".into()),
            cmdline: "console=ttyS0".to_owned(),
        },
        adapters: vec![AdapterSpec {
            id: "eth0".parse().ok()?,
            port_group: "default".parse().ok(),
            mac: "02:00:00:00:00:11".parse().ok(),
            vf: None,
        }],
        devices: Vec::new(),
        disks: vec![DiskSpec {
            id: "root".parse().ok()?,
            path: "web1.qcow2".to_owned(),
            format: DiskFormat::Qcow2,
            backing: vec![BackingSpec { path: "debian-12.raw".to_owned(), format: DiskFormat::Raw }],
            read_only: false,
            ephemeral: false,
            serial: None,
            discard: true,
            cache: DiskCache::default(),
            on_full: OnFull::Pause,
            limits: Some(DiskLimits {
                bytes_per_second: Some(ByteSize::mib(200)),
                operations_per_second: Some(5000),
                ..DiskLimits::default()
            }),
        }],
        nics: vec![NicSpec {
            id: "mgmt0".parse().ok()?,
            bridge: Some("br-mgmt".to_owned()),
            tap: None,
            port_group: None,
            macvtap: None,
            mac: "02:00:00:00:00:22".parse().ok(),
            mtu: None,
            queues: 1,
        }],
        entropy: false,
        cloud_init: Some(CloudInitSpec {
            user_data: Some(Secret::new("#cloud-config\nhostname: web1\n".to_owned())),
            ..CloudInitSpec::default()
        }),
        credentials: BTreeMap::from([(
            "ssh.authorized_keys.root".parse().ok()?,
            Secret::new("ssh-ed25519 AAAA alice".to_owned()),
        )]),
        restart: RestartPolicy::OnFailure,
        autostart: true,
        limits: None,
        placement: None,
        cpu_features: CpuFeatures::default(),
    })
}

fn stats() -> VmStats {
    let device = VmDeviceStats {
        adapter: Some("eth0".to_owned()),
        bar_exits: BTreeMap::from([("0:0".to_owned(), 40)]),
        config_exits: 120,
        mailbox: BTreeMap::from([("set_mac:refused".to_owned(), 1), ("reset:granted".to_owned(), 2)]),
        passed_reads: 0,
        passed_writes: 0,
    };
    let disk = VmDiskStats {
        reads: 900,
        writes: 100,
        flushes: 20,
        read_bytes: 30 << 20,
        written_bytes: 2 << 20,
        busy_ns: 80_000_000,
        ..VmDiskStats::default()
    };
    let nic = VmNicStats {
        received: 400,
        received_bytes: 90_000,
        sent: 300,
        sent_bytes: 40_000,
        ..VmNicStats::default()
    };
    VmStats {
        exits: BTreeMap::from([("io_out".to_owned(), 2000), ("mmio_write".to_owned(), 40)]),
        devices: BTreeMap::from([("0000:01:10.0".to_owned(), device)]),
        disks: BTreeMap::from([("root".to_owned(), disk)]),
        nics: BTreeMap::from([("mgmt0".to_owned(), nic)]),
        memory: 512 << 20,
        boots: 1,
        first_entry_ns: Some(9_000_000),
    }
}

fn pf() -> Option<Pf> {
    Some(Pf {
        id: host_id("0000:01:00.0".parse().ok()?),
        name: "enp1s0".to_owned(),
        revision: 1,
        created: moment(0),
        spec: PfSpec { vfs: 7 },
        status: PfStatus {
            bdf: "0000:01:00.0".parse().ok()?,
            driver: Some("igb".to_owned()),
            simulated: false,
            device: "8086:10c9".to_owned(),
            mac: Some("00:1b:21:00:00:01".to_owned()),
            up: true,
            carrier: Some(true),
            mtu: Some(1500),
            vfs: 7,
            vfs_in_use: 1,
            max_vfs: 7,
        },
    })
}

fn vf() -> Option<Vf> {
    Some(Vf {
        id: host_id("0000:01:10.0".parse().ok()?),
        bdf: "0000:01:10.0".parse().ok()?,
        pf: "enp1s0".to_owned(),
        index: 0,
        device: "8086:10ca".to_owned(),
        simulated: false,
        driver: Some("vfio-pci".to_owned()),
        iommu_group: Some(30),
        mac: Some("02:00:00:00:00:11".to_owned()),
        owner: Some(owner()),
        used_by: None,
    })
}

fn switch() -> Option<Switch> {
    Some(Switch {
        id: id(2),
        name: "default".parse().ok()?,
        revision: 2,
        created: moment(0),
        spec: switch_spec(),
        status: SwitchStatus { port_groups: 2, ports: 1 },
    })
}

fn switch_spec() -> SwitchSpec {
    SwitchSpec { uplinks: ["enp1s0".to_owned()].into(), ..SwitchSpec::default() }
}

fn port_group() -> Option<PortGroup> {
    Some(PortGroup {
        id: id(3),
        name: "web".parse().ok()?,
        revision: 4,
        created: moment(0),
        spec: port_group_spec()?,
        status: PortGroupStatus { ports: 1, policy: EffectivePolicy::of_defaults() },
    })
}

fn port_group_spec() -> Option<PortGroupSpec> {
    Some(PortGroupSpec {
        switch: "default".parse().ok()?,
        settings: serde_json::from_value(json!({ "mac_changes": "reject", "on_denied": "silent" })).ok()?,
        port_overrides: [Setting::Mtu].into(),
    })
}

fn port() -> Option<Port> {
    let (initial, wished) = ("02:00:00:00:00:11".parse().ok()?, "02:00:00:00:00:99".parse().ok()?);
    Some(Port {
        id: id(4),
        name: "web1/eth0".to_owned(),
        revision: 5,
        created: moment(0),
        spec: PortSpec::default(),
        status: PortStatus {
            owner: owner(),
            switch: "default".parse().ok()?,
            port_group: "web".parse().ok()?,
            pf: Some("enp1s0".to_owned()),
            vf: "0000:01:10.0".parse().ok(),
            vf_index: Some(0),
            initial_mac: initial,
            effective_mac: initial,
            guest_mac: wished,
            policy: EffectivePolicy::of_defaults(),
            unchecked: None,
            pending: None,
            unmade: Vec::new(),
            counters: PortCounters { allowed: 3, denied: 1, taken_back: 0, repaired: 0 },
        },
    })
}

fn decision() -> Option<Decision> {
    Some(Decision {
        id: id(5),
        owner: owner(),
        port: id(4),
        pf: Some("enp1s0".to_owned()),
        vf_index: Some(0),
        request: "set_mac".to_owned(),
        verdict: Outcome::Denied,
        reason: Some(Reason::MacChangesRejected),
        decided_by: Some(DecidedBy { setting: Setting::MacChanges, source: Source::PortGroup }),
        old: Some("02:00:00:00:00:11".to_owned()),
        requested: Some("02:00:00:00:00:99".to_owned()),
        effective_mac: "02:00:00:00:00:11".parse().ok()?,
        committed: Committed::Nothing,
        detail: Some("The response to the guest reports success".to_owned()),
        edited_by: None,
        count: 1,
        first: moment(60),
        last: moment(60),
    })
}

fn owner() -> Owner {
    Owner { vm: id(1), name: "web1".to_owned(), adapter: Some("eth0".to_owned()) }
}

/// Ids that people can distinguish at a glance.
fn id(n: u128) -> Uuid {
    Uuid::from_u128(0x8a6e_0804_2bd0_4672_b79d_d970_27f9_0000 + n)
}

/// The time this number of seconds after the morning of the examples.
fn moment(seconds: u64) -> Timestamp {
    Timestamp::from_unix_ms(1_767_254_400_000 + seconds * 1000)
}

fn value(example: impl Serialize) -> Option<Value> {
    // An example that could not be made (`None`) is no example.
    serde_json::to_value(example).ok().filter(|value| !value.is_null())
}

fn disk_size() -> Value {
    json!({ "disk": "root", "size": "20GiB" })
}

fn list(example: impl Serialize) -> Option<Value> {
    Some(json!({ "items": [value(example)?] }))
}

/// An example of an operation's request body.
fn request(operation: &str) -> Option<Value> {
    match operation {
        "create_vm" | "put_vm" => value(spec()),
        "patch_vm" => value(json!({ "memory": "1GiB", "restart": "always" })),
        "clone_vm" => value(json!({ "name": "web2" })),
        "resize_disk" => value(disk_size()),
        "write_console" => value("ls\n"),
        "set_vfs" => value(VfCount { count: 7 }),
        "put_switch" => value(switch_spec()),
        "put_port_group" => value(port_group_spec()),
        "patch_port_group" => value(json!({ "settings": { "mac_changes": "accept", "mtu": null } })),
        "patch_port" => value(json!({ "settings": { "mtu": 1400 } })),
        _ => None,
    }
}

/// An example of the response body of a completed operation.
fn answer(operation: &str) -> Option<Value> {
    match operation {
        "create_vm" | "get_vm" | "put_vm" | "patch_vm" | "clone_vm" => value(vm()),
        "boot_vm" | "pause_vm" | "resume_vm" | "reboot_vm" | "shutdown_vm" | "stop_vm" => value(vm()),
        "list_vms" => list(vm()),
        "resize_disk" => value(disk_size()),
        "vm_stats" => value(stats()),
        "lease_vm" => value("\n"),
        "read_console" => value("[    0.000000] Linux version 6.1.0\r\n"),
        "write_console" => value(ConsoleTaken { taken: 3 }),
        "list_pfs" => list(pf()),
        "get_pf" | "set_vfs" => value(pf()),
        "list_vfs" => list(vf()),
        "list_switches" => list(switch()),
        "get_switch" | "put_switch" => value(switch()),
        "list_port_groups" => list(port_group()),
        "get_port_group" | "put_port_group" | "patch_port_group" => value(port_group()),
        "list_ports" => list(port()),
        "get_port" | "patch_port" => value(port()),
        "list_decisions" => list(decision()),
        "events" => {
            let what = EventKind::Decision { decision: Box::new(decision()?) };
            let event = Event { id: 1_767_254_460_000_000, time: moment(60), what };
            let data = serde_json::to_string(&event).ok()?;
            value(format!("id: {}\nevent: {}\ndata: {data}\n\n", event.id, event.what.name()))
        }
        _ => None,
    }
}

/// The name in a path, as in the other examples.
pub(super) fn parameter(template: &str, name: &str) -> Option<Value> {
    let object = match template.split('/').nth(2)? {
        "vms" => "web1",
        "pfs" => "enp1s0",
        "switches" | "port-groups" => "default",
        "ports" => return (name == "id").then(|| json!(id(4))),
        _ => return None,
    };
    (name == "name").then(|| json!(object))
}

/// Adds the examples to an operation.
pub(super) fn add(operation: &mut Operation) {
    let Some(id) = operation.operation_id.clone() else { return };
    if let (Some(RefOr::T(body)), Some(example)) = (&mut operation.request_body, request(&id)) {
        fill(body.content.values_mut(), &example);
    }
    let Some(example) = answer(&id) else { return };
    let accepted = going_on(&id).and_then(value).unwrap_or_else(|| example.clone());
    for (status, response) in &mut operation.responses.responses {
        if let RefOr::T(response) = response
            && status.starts_with('2')
        {
            let example = if status == "202" { &accepted } else { &example };
            fill(response.content.values_mut(), example);
        }
    }
}

fn fill<'a>(contents: impl Iterator<Item = &'a mut RefOr<Content>>, example: &Value) {
    for content in contents {
        if let RefOr::T(content) = content {
            content.example = Some(example.clone());
        }
    }
}
