// SPDX-License-Identifier: Apache-2.0

//! The CPUs of a machine's threads, the node of its memory, and features of its CPUs.

use std::{collections::BTreeMap, fs};

use kvm_ioctls::Kvm;

use super::*;
use crate::vcpu::cpuid;

/// The CPUs of the threads of this test's process, by their names. Other tests may have threads in it, too.
fn cpus_of_threads() -> BTreeMap<String, Vec<String>> {
    let mut found: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for task in fs::read_dir("/proc/self/task").unwrap() {
        let Ok(status) = fs::read_to_string(task.unwrap().path().join("status")) else { continue };
        let member = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.trim().to_owned()
        };
        found.entry(member("Name:")).or_default().push(member("Cpus_allowed_list:"));
    }
    found
}

/// The CPUs of the test's thread, which those of the VM inherit.
fn free() -> String {
    let status = fs::read_to_string("/proc/thread-self/status").unwrap();
    status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap().trim().to_owned()
}

/// The first and the last CPU of the test: different ones on a host with several.
fn two_cpus() -> (u16, u16) {
    let list = free();
    let mut numbers = list.split([',', '-']).map(|number| number.parse().unwrap());
    let first = numbers.next().unwrap();
    (first, numbers.next_back().unwrap_or(first))
}

#[test]
fn threads_run_on_the_cpus_of_the_specification() {
    let (free, (first, last)) = (free(), two_cpus());
    let mut vm = Fixture::new();
    let mut spec = vm.spec(Vec::new());
    spec.entropy = true;
    spec.placement.cpus = vec![(1, vec![(last, last)])];
    spec.placement.io_cpus = vec![(first, first)];
    vm.configure_as(spec, &guest!(guest_hello, guest_hello_end), &[]).unwrap();
    let threads = cpus_of_threads();
    assert!(threads["vcpu0"].contains(&free), "it has no CPUs of its own: {threads:?}");
    assert!(threads["vcpu1"].contains(&last.to_string()), "{threads:?}");
    assert!(threads["entropy"].contains(&first.to_string()), "a device's thread: {threads:?}");
    // A thread without a name has that of the thread that started it.
    let own = fs::read_to_string("/proc/thread-self/comm").unwrap();
    let event_loop = &threads[own.trim_end()];
    assert!(event_loop.contains(&first.to_string()), "the event loop's thread: {threads:?}");
    vm.command(VmmCommand::Run, &[]).unwrap();
    vm.wait_for(|event| matches!(event, VmmEvent::Ended { end: End::PoweredOff }));
    vm.exit();
}

#[test]
fn cpus_that_the_host_lacks_are_refused_by_name() {
    for (vcpus, io_cpus) in [(vec![(1, vec![(8000, 8000)])], vec![]), (vec![], vec![(8000, 8000)])] {
        let mut vm = Fixture::new();
        let mut spec = vm.spec(Vec::new());
        (spec.placement.cpus, spec.placement.io_cpus) = (vcpus, io_cpus);
        let failure = vm.configure_as(spec, &guest!(guest_hello, guest_hello_end), &[]).unwrap_err();
        assert_eq!(failure.code, FailureCode::Placement);
        assert!(failure.detail.contains("CPUs 8000"), "{failure}");
        vm.exit();
    }
}

#[test]
fn guest_memory_is_bound_to_the_node_of_the_specification() {
    let bound = || fs::read_to_string("/proc/self/numa_maps").unwrap().matches(" bind:0 ").count();
    let before = bound();
    let mut vm = Fixture::new();
    let mut spec = vm.spec(Vec::new());
    spec.placement.node = Some(0);
    vm.configure_as(spec, &guest!(guest_hello, guest_hello_end), &[]).unwrap();
    assert_eq!(bound(), before + 1);
    vm.command(VmmCommand::Run, &[]).unwrap();
    vm.wait_for(|event| matches!(event, VmmEvent::Ended { end: End::PoweredOff }));
    vm.exit();

    let mut vm = Fixture::new();
    let mut spec = vm.spec(Vec::new());
    spec.placement.node = Some(1023);
    let failure = vm.configure_as(spec, &guest!(guest_hello, guest_hello_end), &[]).unwrap_err();
    assert_eq!(failure.code, FailureCode::Placement);
    assert!(failure.detail.contains("NUMA node 1023"), "{failure}");
    vm.exit();
}

/// No host has so many.
#[test]
fn huge_pages_that_the_host_lacks_are_refused_with_their_size() {
    for (giant_pages, size) in [(false, "2048kB"), (true, "1048576kB")] {
        let mut vm = Fixture::new();
        let mut spec = vm.spec(Vec::new());
        (spec.memory, spec.hugepages, spec.placement.giant_pages) = (64 << 40, true, giant_pages);
        let failure = vm.configure_as(spec, &guest!(guest_hello, guest_hello_end), &[]).unwrap_err();
        assert_eq!(failure.code, FailureCode::Memory);
        assert!(failure.detail.contains(size), "{failure}");
        vm.exit();
    }
}

/// The guest boots and reboots with each feature that this host's KVM has, and is refused with each other one.
#[test]
fn features_are_had_or_refused() {
    let supported = cpuid::supported(&Kvm::new().expect("/dev/kvm is needed")).unwrap();
    for (features, has) in [
        (CpuFeatures { nested: true, pmu: false }, cpuid::has_nested(&supported)),
        (CpuFeatures { nested: false, pmu: true }, cpuid::has_pmu(&supported)),
    ] {
        println!("{features:?}: {has}");
        let mut vm = Fixture::new();
        let spec = MachineSpec { features, ..vm.spec(Vec::new()) };
        let result = vm.configure_as(spec, &guest!(guest_clock, guest_clock_end), &[]);
        if has {
            result.unwrap();
            vm.command(VmmCommand::Run, &[]).unwrap();
            vm.wait_for(|event| matches!(event, VmmEvent::Ended { end: End::PoweredOff }));
        } else if let Err(failure) = result {
            assert_eq!(failure.code, FailureCode::CpuFeature, "{failure}");
            assert!(failure.detail.contains("cpu_features."), "{failure}");
        } else {
            assert!(features.pmu, "only counters can exist without a bit of CPUID");
            vm.command(VmmCommand::Stop, &[]).unwrap();
        }
        vm.exit();
    }
}
