// SPDX-License-Identifier: Apache-2.0

use super::*;

#[test]
fn masks_have_the_cpus_of_their_ranges() {
    let mask = CpuMask::of(&[(9, 9), (4, 7), (63, 65), (8191, 8191), (8190, u16::MAX)]);
    assert_eq!(mask.ranges(), [(4, 7), (9, 9), (63, 65), (8190, 8191)]);
    assert_eq!(mask.to_string(), "4-7,9,63-65,8190-8191");
    assert_eq!(mask.count(), 4 + 1 + 3 + 2);
    assert_eq!(CpuMask::of(&[]).ranges(), []);
}

/// The start of a VM without a place costs nothing more than before.
#[test]
fn a_machine_that_names_no_cpus_stays_where_it_is() {
    let place = protocol::PlacementSpec { node: Some(0), giant_pages: true, ..Default::default() };
    let before = CpuMask::current().unwrap();
    assert!(Pinning::begin(&place, 2).unwrap().is_none());
    assert_eq!(CpuMask::current().unwrap(), before);
}

/// The first and the last CPU of the calling thread: different ones on a host with several.
fn two_cpus() -> (u16, u16) {
    let ranges = CpuMask::current().unwrap().ranges();
    (ranges[0].0, ranges[ranges.len() - 1].1)
}

/// The mask that the kernel keeps for the calling thread, with CPUs that are offline.
fn kept() -> String {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
    status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap().trim().to_owned()
}

#[test]
fn a_vcpu_without_cpus_has_those_of_the_future_or_of_a_limited_process() {
    let (first, last) = two_cpus();
    let (before, most) = (CpuMask::current().unwrap(), kept());
    let place = protocol::PlacementSpec { io_cpus: vec![(first, first)], ..Default::default() };
    let pinning = Pinning::begin(&place, 2).unwrap().unwrap();
    assert_eq!(kept(), first.to_string());
    pinning.for_vcpu(1).unwrap();
    assert_eq!((CpuMask::current().unwrap(), kept()), (before.clone(), most));
    CpuMask::ALL.enter().unwrap();
    let unlimited = CpuMask::current().unwrap() == before;
    go_to(&before).unwrap();
    assert_eq!(free().unwrap() == CpuMask::ALL, unlimited);
    go_to(&before).unwrap();
    // A host with one CPU limits nothing.
    go_to(&CpuMask::of(&[(last, last)])).unwrap();
    let limited = free().unwrap();
    assert_eq!(limited == CpuMask::ALL, before.count() == 1);
    assert!(limited == CpuMask::ALL || limited.ranges() == [(last, last)]);
    go_to(&before).unwrap();
}

#[test]
fn work_on_all_cpus_has_those_of_vcpus_without_cpus() {
    let ((first, last), before) = (two_cpus(), CpuMask::current().unwrap());
    let place = protocol::PlacementSpec {
        cpus: vec![(0, vec![(last, last)])],
        io_cpus: vec![(last, last)],
        ..Default::default()
    };
    for (vcpus, expect) in [(1, CpuMask::of(&[(last, last)])), (2, before.clone())] {
        let pinning = Pinning::begin(&place, vcpus).unwrap().unwrap();
        let work = || {
            assert_eq!(CpuMask::current().unwrap(), expect, "{vcpus} vCPUs, the first CPU is {first}");
            Ok::<_, PlacementError>(())
        };
        pinning.on_all_cpus(work).unwrap();
        go_to(&before).unwrap();
    }
}

#[test]
fn work_on_all_cpus_has_those_of_vcpus_and_of_the_others() {
    let ((first, last), before) = (two_cpus(), CpuMask::current().unwrap());
    let place = protocol::PlacementSpec {
        cpus: vec![(0, vec![(last, last)])],
        io_cpus: vec![(first, first)],
        ..Default::default()
    };
    let here = || CpuMask::current().unwrap();
    let pinning = Pinning::begin(&place, 1).unwrap().unwrap();
    assert_eq!(here(), CpuMask::of(&[(first, first)]));
    let work = || {
        assert_eq!(here(), CpuMask::of(&[(first, first), (last, last)]));
        Ok::<_, PlacementError>(())
    };
    pinning.on_all_cpus(work).unwrap();
    assert_eq!(here(), CpuMask::of(&[(first, first)]));
    go_to(&before).unwrap();
}

#[test]
fn a_thread_goes_to_its_cpus_or_says_which_it_lacks() {
    let before = CpuMask::current().unwrap();
    let (first, _) = before.ranges()[0];
    go_to(&CpuMask::of(&[(first, first)])).unwrap();
    let inherited = std::thread::spawn(|| CpuMask::current().unwrap()).join().unwrap();
    assert_eq!(inherited.ranges(), [(first, first)]);
    // No test runs on a host with so many.
    let error = go_to(&CpuMask::of(&[(8191, 8191)])).unwrap_err().to_string();
    assert!(error.contains("refuses the CPUs 8191"), "{error}");
    let error = go_to(&CpuMask::of(&[(first, first), (8000, 8001)])).unwrap_err().to_string();
    assert!(error.contains(&format!("all of the CPUs {first},8000-8001, only on {first}:")), "{error}");
    go_to(&before).unwrap();
}
