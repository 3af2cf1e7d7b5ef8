// SPDX-License-Identifier: Apache-2.0

//! The place of a VM on its host: CPUs, NUMA node, huge pages, and further features of its CPUs.

use std::{collections::BTreeMap, fs, process::Command};

use api::{
    problem::ProblemCode,
    types::{CpuList, VcpuNumber, VmAction, VmState},
};
use serde_json::{Value, json};

use crate::fixture::{Agent, Options, SmallGuest, agent::binary};

/// The first and the last CPU that this test and its agents may use, and all of them.
fn cpus() -> (String, String, CpuList) {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap();
    let all = CpuList::of_kernel(allowed.trim()).unwrap();
    let online = fs::read_to_string("/sys/devices/system/cpu/online").unwrap();
    let online = CpuList::of_kernel(&online).unwrap();
    let numbers = || all.ranges().iter().flat_map(|(first, last)| *first..=*last);
    let mut usable = numbers().filter(|cpu| online.contains(*cpu));
    let first = usable.next().unwrap();
    let last = usable.next_back().unwrap_or(first);
    (first.to_string(), last.to_string(), all)
}

/// The CPUs of each thread of a process.
fn threads(pid: u32) -> BTreeMap<String, String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks
        .map(|task| {
            let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            let member = |name: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
                line.trim().to_owned()
            };
            (member("Name:"), member("Cpus_allowed_list:"))
        })
        .collect()
}

/// What the command line shows of a VM.
fn show(agent: &Agent, vm: &str) -> String {
    let socket = agent.directory().join("api.sock");
    let output = Command::new(binary()).arg("--socket").arg(socket).args(["vm", "show", vm]).output();
    String::from_utf8(output.unwrap().stdout).unwrap()
}

fn placed(agent: &Agent, name: &str, members: Value) -> Value {
    let mut spec = SmallGuest::spec(agent, name, json!([]), "");
    spec.as_object_mut().unwrap().extend(members.as_object().unwrap().clone());
    spec
}

#[test]
fn a_vm_runs_on_its_cpus_and_says_so() {
    let agent = Agent::start();
    let (first, last, all) = cpus();
    let placement = json!({ "cpus": { "1": last }, "io_cpus": first, "numa": 0 });
    let spec = placed(&agent, "web1", json!({ "cpus": 2, "entropy": true, "placement": placement }));
    let mut guest = SmallGuest { guest: agent.boot(&spec) };
    guest.wait_for_ready();
    let vm = agent.vm("web1");
    let found = threads(vm.status.pid.unwrap());
    assert_eq!(found["vcpu1"], last);
    assert_eq!(found["vcpu0"].parse::<CpuList>().unwrap(), all, "it has no CPUs of its own");
    assert_eq!(found["entropy"], first, "{found:?}");
    let place = vm.status.placement.unwrap();
    let listed = agent.ask(agent.client.list_vms()).unwrap();
    assert_eq!(
        (listed.len(), &listed[0].status.placement),
        (1, &None),
        "a list reads no file of each thread"
    );
    let vcpu = |number| place.cpus[&VcpuNumber(number)].to_string();
    assert_eq!((place.cpus.len(), vcpu(1)), (2, last.clone()));
    assert_eq!((place.io_cpus.unwrap().to_string(), place.numa), (first.clone(), Some(0)));
    assert_eq!(place.page_size.to_string(), "4KiB");
    let (vcpu, others) = (format!("vcpu 1:         CPUs {last}"), format!("other threads:  CPUs {first}"));
    let shown = show(&agent, "web1");
    for line in [vcpu, others, "memory place:   pages of 4KiB on NUMA node 0".to_owned()] {
        assert!(shown.lines().any(|shown| shown.trim_end() == line), "{line}: {shown}");
    }
    assert_eq!(guest.ask("reboot"), "ok");
    guest.wait_for_ready();
    // A machine that runs cannot move.
    let patch = json!({ "placement": null });
    let refused = agent.ask(agent.client.patch_vm("web1", &patch, None)).unwrap_err();
    assert_eq!(refused.code, ProblemCode::WrongState);
    agent.act("web1", VmAction::Stop).unwrap();
    assert_eq!(agent.vm("web1").status.placement, None);
    let vm = agent.ask(agent.client.patch_vm("web1", &patch, None)).unwrap();
    assert_eq!(vm.spec.placement, None);
    agent.act("web1", VmAction::Boot).unwrap();
    assert_eq!(agent.vm("web1").status.placement, None);
}

#[test]
fn a_place_that_the_host_lacks_is_refused_before_anything_is_touched() {
    let agent = Agent::start();
    let cases = [
        (json!({ "placement": { "cpus": { "0": "8000" } } }), "placement.cpus.0"),
        (json!({ "placement": { "io_cpus": "0,8000" } }), "placement.io_cpus"),
        (json!({ "placement": { "numa": 1023 } }), "placement.numa"),
        // No host has as many.
        (json!({ "hugepages": true, "memory": "64TiB" }), "hugepages"),
        (json!({ "hugepages": "1GiB", "memory": "64TiB" }), "hugepages"),
        (json!({ "hugepages": true, "memory": "64TiB", "placement": { "numa": 0 } }), "hugepages"),
        (json!({ "memory": "64TiB", "placement": { "numa": 0 } }), "memory"),
    ];
    for (members, field) in cases {
        agent.create(&placed(&agent, "web1", members.clone())).unwrap();
        let problem = agent.act("web1", VmAction::Boot).unwrap_err();
        let code = match field {
            "hugepages" | "memory" => ProblemCode::MemoryUnavailable,
            _ => ProblemCode::PlacementUnavailable,
        };
        assert_eq!((problem.code, problem.field.as_deref()), (code, Some(field)), "{members}: {problem:?}");
        let status = agent.vm("web1").status;
        assert_eq!((status.state, status.pid), (VmState::Defined, None), "{members}");
        agent.delete("web1").unwrap();
    }
}

#[test]
fn memory_with_simulated_adapters_is_not_placed_and_that_is_said() {
    let arguments = ["--sim-pf", "sim0=2"].map(ToString::to_string).into();
    let agent = Agent::start_with(Options { arguments, ..Options::default() });
    let members = json!({ "adapters": [{ "id": "eth0" }], "placement": { "numa": "of_adapters" } });
    let mut guest = SmallGuest { guest: agent.boot(&placed(&agent, "web1", members)) };
    guest.wait_for_ready();
    let place = agent.vm("web1").status.placement.unwrap();
    assert_eq!(place.numa, None);
    assert!(place.not_placed.unwrap().contains("simulated"));
    assert!(show(&agent, "web1").contains("not bound to a NUMA node: The host knows"));
}

/// Pages that this test has added to a pool of the host. They leave the pool at the end.
struct Pool {
    file: String,
    before: u64,
}

fn count(file: &str) -> Option<u64> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

impl Pool {
    /// None if the kernel or the processor has no pages of this size, this user may not add them, or other programs and the
    /// cache of files have the host's memory. Red otherwise for pages of 2 MiB.
    fn grow(kib: u64, pages: u64) -> Option<Self> {
        let file = format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages");
        let before = count(&file)?;
        let pool = Self { file, before };
        fs::write(&pool.file, (before + pages).to_string()).ok()?;
        if count(&pool.file)? < before + pages {
            // A page needs memory in one piece.
            let _ = fs::write("/proc/sys/vm/compact_memory", "1");
            fs::write(&pool.file, (before + pages).to_string()).ok()?;
        }
        if count(&pool.file)? == before + pages {
            return Some(pool);
        }
        // Free memory can be in too many pieces for a page of 1 GiB; it never is for pages of 2 MiB.
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap();
        let free = meminfo.lines().find_map(|line| line.strip_prefix("MemFree:")).unwrap();
        let free: u64 = free.trim().strip_suffix(" kB").unwrap().parse().unwrap();
        assert!(
            kib > 2048 || free < 8 * kib * pages,
            "{free} KiB are free, and no {pages} pages of {kib} KiB can be made"
        );
        None
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // Without the right to it the pool has not grown.
        let _ = fs::write(&self.file, self.before.to_string());
    }
}

/// The guest itself touches few of its pages.
#[test]
fn all_huge_pages_are_there_before_the_guest_runs() {
    let agent = Agent::start();
    for (kib, memory, hugepages, name) in
        [(2048, "14MiB", json!(true), "2MiB"), (1_048_576, "1GiB", json!("1GiB"), "1GiB")]
    {
        let pages = if kib == 2048 { 7 } else { 1 };
        let Some(pool) = Pool::grow(kib, pages) else {
            println!("skipped: the host has no pages of {name}, no right to add them, or no free memory");
            continue;
        };
        let members = json!({ "memory": memory, "hugepages": hugepages, "placement": { "numa": 0 } });
        let mut guest = SmallGuest { guest: agent.boot(&placed(&agent, "web1", members)) };
        guest.wait_for_ready();
        let status = agent.vm("web1").status;
        let process = fs::read_to_string(format!("/proc/{}/status", status.pid.unwrap())).unwrap();
        let line = process.lines().find_map(|line| line.strip_prefix("HugetlbPages:")).unwrap();
        assert_eq!(line.trim(), format!("{} kB", kib * pages));
        let place = status.placement.unwrap();
        assert_eq!((place.page_size.to_string(), place.numa), (name.to_owned(), Some(0)));
        assert_eq!(guest.ask("reboot"), "ok");
        guest.wait_for_ready();
        agent.delete("web1").unwrap();
        drop(pool);
    }
}

/// A feature that KVM of this host has is in the guest, and one that it lacks is refused.
#[test]
fn features_of_cpus_are_had_or_refused() {
    let agent = Agent::start();
    let on = |file: &str| fs::read_to_string(file).is_ok_and(|on| matches!(on.trim(), "1" | "Y"));
    let nested = ["intel", "amd"].iter().any(|cpu| on(&format!("/sys/module/kvm_{cpu}/parameters/nested")));
    for feature in ["nested", "pmu"] {
        agent.create(&placed(&agent, feature, json!({ "cpu_features": { feature: true } }))).unwrap();
        match agent.act(feature, VmAction::Boot) {
            Ok(vm) => {
                assert_eq!(vm.status.state, VmState::Running);
                assert!(nested || feature != "nested", "KVM has none: the agent did not ask for it");
            }
            Err(problem) => {
                assert_eq!(problem.code, ProblemCode::CpuFeatureUnavailable, "{problem:?}");
                assert!(problem.detail.contains(&format!("cpu_features.{feature}")), "{problem:?}");
            }
        }
    }
}
