// SPDX-License-Identifier: Apache-2.0

//! Two hundred lives of VMs, eight at a time: they leave nothing.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use api::types::{VmAction, VmSpec};
use serde_json::json;
use tokio::task::JoinSet;

use crate::fixture::{Agent, Options, SmallGuest};

const AT_ONCE: usize = 8;
const ROUNDS: usize = 25;
/// Rounds after which the agent has its threads, and most of its allocator's reserve.
const WARM: usize = 5;

/// The most growth of the agent after that, in KiB. 20 rounds are 160 lives, 5 KiB each, until the database's pages
/// fill their caches and the events their bound (at about 400 lives); the agent's state of one VM is 12 KiB.
const GROWTH: u64 = 2048;

/// VMs that are left on purpose, to show that the test sees a leak of as many.
const LEFT: usize = 250;

/// The visible state of an agent and its VMs from outside.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    /// Processes of VMs.
    vmms: usize,
    /// Open files of the agent, and of its simulated PFs.
    fds: [usize; 2],
    /// All files of the run directory, except those that grow with the log.
    files: BTreeSet<PathBuf>,
    /// Claimed VFs, ports, VMs.
    objects: [usize; 3],
}

impl Seen {
    fn of(agent: &Agent) -> Self {
        let run = agent.directory().join("run");
        let mut files = BTreeSet::new();
        list(&run, &mut files);
        let pfs = processes_of(agent, "sim-pf");
        assert_eq!(pfs.len(), 2, "{pfs:?}");
        let vfs = agent.vfs().into_iter().filter(|vf| vf.owner.is_some()).count();
        let ports = agent.ask(agent.client.list_ports()).unwrap().len();
        let vms = agent.ask(agent.client.list_vms()).unwrap().len();
        Self {
            vmms: processes_of(agent, "vmm").len(),
            fds: [fds(agent.pid()), pfs.into_iter().map(fds).sum()],
            files,
            objects: [vfs, ports, vms],
        }
    }

    /// The same, with as many descriptors as `other` if it has fewer: a client's connection may have been closed
    /// meanwhile.
    fn or_as_many_descriptors_as(self, other: &Self) -> Self {
        let [agent, pfs] = self.fds;
        Self { fds: [agent.max(other.fds[0]), pfs.max(other.fds[1])], ..self }
    }
}

fn list(directory: &Path, into: &mut BTreeSet<PathBuf>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            list(&entry.path(), into);
        }
        into.insert(entry.path());
    }
}

/// Processes that this agent has started, by their first argument.
fn processes_of(agent: &Agent, kind: &str) -> Vec<u32> {
    let child = |pid: &u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let parent = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1)?.parse().ok());
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        parent == Some(agent.pid()) && line.split(|byte| *byte == 0).nth(1) == Some(kind.as_bytes())
    };
    let all = fs::read_dir("/proc").unwrap();
    all.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).filter(child).collect()
}

fn fds(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// The agent's own memory in KiB: anonymous pages (`smaps_rollup`, proc(5)). Pages of its program do not count: the
/// number of its processes decides how many of them are its own.
fn memory(agent: &Agent) -> u64 {
    let text = fs::read_to_string(format!("/proc/{}/smaps_rollup", agent.pid())).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("Pss_Anon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

fn spec(agent: &Agent, n: usize) -> VmSpec {
    let adapters = json!([{"id": "eth0"}]);
    serde_json::from_value(SmallGuest::spec(agent, &format!("vm{n}"), adapters, "")).unwrap()
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Begin,
    End,
    Both,
}

/// Runs a part of the VMs' lives side by side: create and boot, or end, or both in turn.
fn live(agent: &Agent, specs: &[VmSpec], part: Part) {
    agent
        .wait_on(async {
            let mut lives = JoinSet::new();
            for spec in specs.iter().cloned() {
                let client = agent.client.clone();
                lives.spawn(async move {
                    let name = spec.name.as_str();
                    if part != Part::End {
                        client.create_vm(&spec).await?;
                        client.act(name, VmAction::Boot, Duration::from_secs(60)).await?;
                    }
                    if part != Part::Begin {
                        client.delete_vm(name, None).await?;
                    }
                    Ok::<_, api::ClientError>(())
                });
            }
            while let Some(life) = lives.join_next().await {
                life.unwrap()?;
            }
            Ok(())
        })
        .unwrap_or_else(|error| panic!("{error}\n{}", agent.log()));
}

#[test]
fn two_hundred_lives_leave_nothing_behind() {
    // As many user ids as VMs: the next VM would lack one that is not released.
    let count = AT_ONCE.to_string();
    let arguments = ["--sim-pf", "sim0=7", "--sim-pf", "sim1=1", "--vmm-uid-count", &count];
    let arguments = arguments.map(ToString::to_string).into();
    let agent = Agent::start_with(Options { arguments, ..Options::default() });
    let specs: Vec<VmSpec> = (0..AT_ONCE).map(|n| spec(&agent, n)).collect();
    let begun = Instant::now();
    for _ in 0..WARM {
        live(&agent, &specs, Part::Both);
    }
    let (before, memory_before) = (Seen::of(&agent), memory(&agent));
    assert_eq!((before.vmms, before.objects), (0, [0, 0, 0]), "{before:?}");

    // The state below shows VMs while they exist.
    live(&agent, &specs, Part::Begin);
    let during = Seen::of(&agent);
    assert_eq!((during.vmms, during.objects), (AT_ONCE, [AT_ONCE; 3]), "{during:?}");
    assert!(during.fds[0] >= before.fds[0] + AT_ONCE && during.fds[1] > before.fds[1], "{during:?}");
    assert!(during.files.len() >= before.files.len() + AT_ONCE, "{during:?}");
    live(&agent, &specs, Part::End);

    for _ in WARM + 1..ROUNDS {
        live(&agent, &specs, Part::Both);
    }
    let took = begun.elapsed();
    // The last connections of the client may still be open.
    let deadline = Instant::now() + Duration::from_secs(5);
    while Seen::of(&agent).or_as_many_descriptors_as(&before) != before && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(50));
    }
    let after = Seen::of(&agent).or_as_many_descriptors_as(&before);
    assert_eq!(after, before, "{}", agent.log());
    let memory_after = memory(&agent);
    println!(
        "{} lives in {took:.1?}; the agent's memory: {memory_before} KiB, then {memory_after} KiB",
        ROUNDS * AT_ONCE
    );
    assert!(
        memory_after <= memory_before + GROWTH,
        "the agent has grown from {memory_before} KiB to {memory_after} KiB"
    );

    // The test sees a leak: VMs that are not deleted are one.
    let left: Vec<VmSpec> =
        (0..LEFT).map(|n| VmSpec { name: format!("left{n}").parse().unwrap(), ..specs[0].clone() }).collect();
    left.iter().for_each(|spec| drop(agent.ask(agent.client.create_vm(spec)).unwrap()));
    let memory_with = memory(&agent);
    println!("with {LEFT} VMs: {memory_with} KiB");
    assert!(memory_with > memory_after + GROWTH, "{memory_with} KiB");
    left.iter().for_each(|spec| agent.delete(spec.name.as_str()).unwrap());
}
