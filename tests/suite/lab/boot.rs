// SPDX-License-Identifier: Apache-2.0

//! Boot Linux with a real VF through the REST API.

use api::{problem::ProblemCode, types::VmAction};
use serde_json::json;

use super::{as_debian_does, bare_spec, configure, ping, spec};
use crate::fixture::{Agent, host};

fn boots_and_pings(cpus: u8) {
    let agent = Agent::start();
    let mut spec = spec(&agent, "web1", host::VF0);
    as_debian_does(&agent, &mut spec);
    spec["cpus"] = json!(cpus);
    let mut guest = agent.boot(&spec);
    guest.wait_for_shell();

    let status = agent.vm("web1").status;
    let mac = status.adapters[0].mac.to_string();
    assert_eq!(guest.must("cat /sys/class/net/eth0/address"), mac);
    assert_eq!(host::vf_mac(0), mac);
    let vf = host::vf(0);
    assert_eq!((&vf["spoofchk"], &vf["trust"]), (&json!(true), &json!(false)), "{vf}");
    assert!(guest.must("readlink /sys/class/net/eth0/device/driver").ends_with("/igbvf"));
    assert_eq!(guest.must("nproc"), cpus.to_string());
    let cores = guest.must("grep -m1 'cpu cores' /proc/cpuinfo");
    assert!(cores.ends_with(&format!(": {cpus}")), "{cores}");

    // Longer than the UART's FIFO, and than Linux' reads from it in one interrupt.
    for length in [20, 200, 260, 300, 480, 900] {
        let typed = "x".repeat(length);
        assert_eq!(guest.must(&format!("typed={typed}; echo ${{#typed}}")), length.to_string());
    }
    configure(&mut guest, "10.0.2.21");
    ping(&mut guest, host::GATEWAY, 20);
    let interrupts = guest.must("grep eth0- /proc/interrupts");
    for vector in ["eth0-rx-0", "eth0-tx-0"] {
        let line = interrupts.lines().find(|line| line.ends_with(vector));
        let line = line.unwrap_or_else(|| panic!("{interrupts}"));
        assert!(line.contains("PCI-MSIX"), "{line}");
        let counts = line.split_whitespace().skip(1).take(usize::from(cpus));
        assert!(counts.map(|count| count.parse::<u64>().unwrap()).sum::<u64>() > 0, "{line}");
    }
}

#[test]
fn one_cpu_boots_and_pings_through_its_vf() {
    boots_and_pings(1);
}

#[test]
fn four_cpus_boot_and_ping_through_their_vf() {
    boots_and_pings(4);
}

#[test]
fn two_vms_have_a_vf_each_and_reach_each_other() {
    let agent = Agent::start();
    let mut web1 = agent.boot(&spec(&agent, "web1", host::VF0));
    let mut web2 = agent.boot(&spec(&agent, "web2", host::VF1));
    web1.wait_for_shell();
    web2.wait_for_shell();
    configure(&mut web1, "10.0.2.21");
    configure(&mut web2, "10.0.2.22");
    ping(&mut web1, host::GATEWAY, 5);
    ping(&mut web2, host::GATEWAY, 5);
    ping(&mut web1, "10.0.2.22", 10);
    assert_ne!(host::vf_mac(0), host::vf_mac(1));
}

#[test]
fn the_kernel_boots_as_elf_by_pvh_with_huge_pages_and_an_address_of_its_own() {
    let agent = Agent::start();
    std::fs::write("/proc/sys/vm/nr_hugepages", "140").unwrap();
    let mut spec = spec(&agent, "web1", host::VF0);
    as_debian_does(&agent, &mut spec);
    spec["boot"]["kernel"] = json!(agent.link_image("vmlinux", &host::kernel(true)));
    spec["hugepages"] = json!(true);
    spec["adapters"][0]["mac"] = json!("02:00:00:00:00:11");
    let mut guest = agent.boot(&spec);
    guest.wait_for_shell();
    assert_eq!(guest.must("cat /sys/class/net/eth0/address"), "02:00:00:00:00:11");
    assert_eq!(host::vf_mac(0), "02:00:00:00:00:11");
    configure(&mut guest, "10.0.2.21");
    ping(&mut guest, host::GATEWAY, 3);
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").unwrap();
    assert_eq!(free.trim(), "12", "128 of 140 huge pages hold the guest");
    // Its process cannot take the other twelve, whatever the guest makes of it.
    let vm = agent.vm("web1");
    let group = std::path::Path::new("/sys/fs/cgroup/portcullis").join(vm.id.to_string());
    for limit in ["hugetlb.2MB.max", "hugetlb.2MB.rsvd.max"] {
        let most = std::fs::read_to_string(group.join(limit)).unwrap();
        assert_eq!(most.trim(), vm.spec.memory.bytes().to_string(), "{limit}");
    }
    agent.delete("web1").unwrap();
    std::fs::write("/proc/sys/vm/nr_hugepages", "0").unwrap();

    // The emulated processor has no counters.
    let mut spec = bare_spec(&agent, "web1");
    spec["cpu_features"] = json!({ "pmu": true });
    agent.create(&spec).unwrap();
    let problem = agent.act("web1", VmAction::Boot).unwrap_err();
    assert_eq!(problem.code, ProblemCode::CpuFeatureUnavailable, "{problem:?}");
}

#[test]
fn the_data_path_has_no_exits() {
    let agent = Agent::start();
    let mut guest = agent.boot(&spec(&agent, "web1", host::VF0));
    guest.wait_for_shell();
    configure(&mut guest, "10.0.2.21");
    ping(&mut guest, host::GATEWAY, 200);
    let stats = agent.stats("web1");
    assert!(stats.exits["io_out"] > 0, "exits are counted: {:?}", stats.exits);
    let exits = &stats.devices[host::VF0].bar_exits;
    assert!(exits["0:0"] > 0, "the mailbox page is trapped and counted: {exits:?}");
    for page in ["0:1", "0:2", "0:3"] {
        assert_eq!(exits.get(page).copied().unwrap_or(0), 0, "{exits:?}");
    }
}
