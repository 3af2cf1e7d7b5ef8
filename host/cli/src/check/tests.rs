// SPDX-License-Identifier: Apache-2.0

use sriov::{Bdf, fake::FakeSysfs};

use super::*;

const PF: Bdf = Bdf::new(0, 1, 0, 0).unwrap();

const OFF: FlowControl = FlowControl { receive: false, send: false };

/// A host made of files.
struct MadeUp {
    directory: tempfile::TempDir,
    sysfs: FakeSysfs,
    flow_control: fn(&str) -> io::Result<Option<FlowControl>>,
}

impl MadeUp {
    /// With all that there should be.
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("sys")).unwrap();
        let sysfs = FakeSysfs::new(directory.path().join("sys"));
        sysfs.add_igb(PF, "eth0");
        sysfs.sysfs().set_num_vfs(PF, 2, None).unwrap();
        let made_up = MadeUp { directory, sysfs, flow_control: |_| Ok(Some(OFF)) };
        for (path, text) in [
            ("dev/kvm", ""),
            ("dev/vfio/vfio", ""),
            ("proc/cpuinfo", "vendor_id\t: GenuineIntel\nflags\t\t: fpu vmx\n"),
            ("proc/cmdline", "quiet\n"),
            (
                "proc/self/limits",
                "Max locked memory         unlimited            unlimited            bytes\n",
            ),
            ("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "512\n"),
            ("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "500\n"),
            ("sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages", "4\n"),
            ("sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages", "3\n"),
            ("sys/devices/system/node/online", "0-1\n"),
            ("sys/devices/system/node/node0/cpulist", "0-3\n"),
            ("sys/devices/system/node/node0/meminfo", "Node 0 MemTotal:  8388608 kB\n"),
            ("sys/devices/system/node/node1/cpulist", "4-7\n"),
            ("sys/devices/system/node/node1/meminfo", "Node 1 MemTotal:  4194304 kB\n"),
            ("sys/module/kvm_intel/parameters/nested", "Y\n"),
            ("sys/module/kvm/parameters/enable_pmu", "Y\n"),
            ("sys/bus/event_source/devices/cpu/type", "4\n"),
            ("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory hugetlb pids\n"),
        ] {
            made_up.write(path, text);
        }
        made_up.sysfs.set_numa_node(PF, 1);
        made_up
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.directory.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn remove(&self, path: &str) {
        let path = self.directory.path().join(path);
        if path.is_dir() { fs::remove_dir_all(path).unwrap() } else { fs::remove_file(path).unwrap() }
    }

    /// A device of the host beside a VF of the PF.
    fn share_group(&self, device: u8, function: u8) {
        let vf = Bdf::new(0, 1, device, function).unwrap();
        let group = self.sysfs.sysfs().device(vf).unwrap().iommu_group;
        let other = Bdf::new(0, 3, function, 0).unwrap();
        self.sysfs.add_device(other, (0x8086, 0x1234), 0x01_0000, group, Some("ahci"));
    }

    fn findings(&self) -> Vec<Finding> {
        let users = UserArgs { vmm_uid_base: 900_000, vmm_uid_count: 4096 };
        let host = Host { flow_control: self.flow_control, ..Host::new(self.directory.path()) };
        examine(&host, &users, &AssignableList::default())
    }

    fn verdict(&self) -> Result<(), CliError> {
        verdict(&self.findings())
    }
}

#[test]
fn a_host_with_all_that_there_should_be() {
    let host = MadeUp::new();
    let findings = host.findings();
    let wrong: Vec<_> = findings.iter().filter(|finding| finding.verdict != Verdict::Ok).collect();
    assert!(wrong.is_empty(), "{wrong:?}");
    let checks: Vec<_> = findings.iter().map(|finding| finding.check).collect();
    let all = [
        "kvm",
        "iommu",
        "interrupt_remapping",
        "vfio-pci",
        "memlock",
        "hugepages",
        "hugepages_1gib",
        "numa",
        "numa",
        "nested",
        "pmu",
        "cgroup",
        "user_ids",
        "pf",
        "flow_control",
        "vfs",
        "policy",
    ];
    assert_eq!(checks, all);
    let policy = &findings.last().unwrap().found;
    assert!(
        policy.contains("igb enforces forged_transmits=reject") && policy.contains("not blocked"),
        "{policy}"
    );
    host.verdict().unwrap();
}

#[test]
fn flow_control_of_a_pf_is_warned_of() {
    let mut host = MadeUp::new();
    let found = |host: &MadeUp| host.findings().into_iter().find(|finding| finding.check == "flow_control");
    for (flow_control, on) in [
        ((|_| Ok(Some(FlowControl { receive: true, send: true }))) as fn(&str) -> _, "on (rx and tx)"),
        (|_| Ok(Some(FlowControl { receive: true, ..OFF })), "on (rx)"),
        (|_| Ok(Some(FlowControl { send: true, ..OFF })), "on (tx)"),
    ] {
        host.flow_control = flow_control;
        let finding = found(&host).unwrap();
        assert_eq!((finding.verdict, finding.subject.as_deref()), (Verdict::Warn, Some("eth0")));
        assert!(finding.found.starts_with(on), "{finding:?}");
        assert_eq!(finding.fix.as_deref(), Some("ethtool -A eth0 rx off tx off"));
        host.verdict().unwrap();
    }
    host.flow_control = |_| Err(io::Error::from_raw_os_error(95));
    let finding = found(&host).unwrap();
    assert!(finding.verdict == Verdict::Warn && finding.found.contains("cannot be read"), "{finding:?}");
    host.flow_control = |_| Ok(None);
    assert_eq!(found(&host), None);
}

#[test]
fn each_thing_that_is_missing_is_told_with_what_mends_it() {
    use Verdict::*;
    struct Case {
        check: &'static str,
        verdict: Verdict,
        fix: &'static str,
        breaks: fn(&MadeUp),
    }
    let case = |check, verdict, fix, breaks| Case { check, verdict, fix, breaks };
    for Case { check, verdict, fix, breaks } in [
        case("kvm", Fail, "modprobe kvm_intel", |host| host.remove("dev/kvm")),
        case("kvm", Fail, "modprobe kvm_amd", |host| {
            host.remove("dev/kvm");
            host.write("proc/cpuinfo", "vendor_id : AuthenticAMD\nflags : svm\n");
        }),
        case("kvm", Fail, "enable virtualization", |host| {
            host.remove("dev/kvm");
            host.write("proc/cpuinfo", "vendor_id : GenuineIntel\nflags : fpu\n");
        }),
        case("cgroup", Warn, "systemd.unified_cgroup_hierarchy=1", |host| host.remove("sys/fs/cgroup")),
        case("cgroup", Warn, "hierarchies of version 1", |host| {
            host.write("sys/fs/cgroup/cgroup.controllers", "cpu memory pids\n");
        }),
        case("iommu", Fail, "intel_iommu=on /' /etc/default/grub && update-grub", |host| {
            host.remove("sys/kernel/iommu_groups");
        }),
        case("iommu", Fail, "in the firmware", |host| {
            host.remove("sys/kernel/iommu_groups");
            host.write("proc/cmdline", "quiet intel_iommu=on\n");
        }),
        // Linux has no amd_iommu=on.
        case("iommu", Fail, "enable the IOMMU (AMD-Vi", |host| {
            host.remove("sys/kernel/iommu_groups");
            host.write("proc/cpuinfo", "vendor_id : AuthenticAMD\nflags : svm\n");
        }),
        case("iommu", Fail, "sed -i 's/ *amd_iommu=off//'", |host| {
            host.remove("sys/kernel/iommu_groups");
            host.write("proc/cpuinfo", "vendor_id : AuthenticAMD\nflags : svm\n");
            host.write("proc/cmdline", "quiet amd_iommu=off\n");
        }),
        case("interrupt_remapping", Fail, "allow_unsafe_interrupts", |host| {
            host.sysfs.set_interrupt_chip("PCI-MSI");
        }),
        case("interrupt_remapping", Warn, "echo 0 >/sys", |host| {
            host.sysfs.set_interrupt_chip("PCI-MSI");
            host.write("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "Y\n");
        }),
        case("vfio-pci", Fail, "modprobe vfio-pci &&", |host| host.sysfs.unload_driver("vfio-pci")),
        case("vfio-pci", Fail, "modprobe vfio_iommu_type1", |host| host.remove("dev/vfio/vfio")),
        case("memlock", Warn, "ulimit -l unlimited", |host| {
            host.write("proc/self/limits", "Max locked memory  8388608  8388608  bytes\n");
        }),
        case("hugepages", Warn, "sysctl -w vm.nr_hugepages=512", |host| {
            host.write("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "0\n");
        }),
        case("hugepages_1gib", Warn, "hugepages-1048576kB/nr_hugepages", |host| {
            host.write("sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages", "0\n");
        }),
        case("user_ids", Fail, "portcullis serve --vmm-uid-base 2100000000", |host| {
            host.write("etc/subuid", "user1:100000:65536\nuser13:886432:65536\n");
        }),
        case("pf", Fail, "ip link set eth0 up", |host| host.sysfs.set_interface_up(PF, "eth0", false)),
        case("pf", Fail, "modprobe \"$(cat /sys/bus/pci/devices/0000:01:00.0/modalias)\"", |host| {
            host.remove("sys/bus/pci/devices/0000:01:00.0/driver");
        }),
        case("vfs", Fail, "portcullis pf set-vfs eth0 4 || echo 4 >/sys", |host| {
            host.sysfs.sysfs().set_num_vfs(PF, 0, None).unwrap();
        }),
        case("vfs", Warn, "the driver igbvf or ixgbevf", |host| {
            host.write("sys/bus/pci/devices/0000:01:10.0/device", "0x154c\n");
        }),
        case("vfs", Warn, "a slot of its own", |host| host.share_group(0x10, 0)),
        case("vfs", Fail, "a slot of its own", |host| {
            host.share_group(0x10, 0);
            host.share_group(0x10, 2);
        }),
    ] {
        let host = MadeUp::new();
        breaks(&host);
        let findings = host.findings();
        let finding = findings.iter().find(|finding| finding.check == check).unwrap();
        let text = finding.fix.as_deref().unwrap_or_default();
        assert!(finding.verdict == verdict && text.contains(fix), "{fix}: {finding:?}");
        let others: Vec<_> =
            findings.iter().filter(|other| other.check != check && other.verdict != Ok).collect();
        assert!(others.is_empty(), "{fix}: {others:?}");
        assert_eq!(host.verdict().err().map(|error| error.code()), (verdict == Fail).then_some(1), "{fix}");
        assert_command(text);
    }
}

#[test]
fn the_place_of_vms_is_told_with_what_the_host_can() {
    let host = MadeUp::new();
    let found = |host: &MadeUp, check: &str| -> Vec<String> {
        let findings = host.findings().into_iter().filter(|finding| finding.check == check);
        findings
            .map(|finding| format!("{}: {}", finding.subject.unwrap_or_default(), finding.found))
            .collect()
    };
    assert_eq!(found(&host, "numa"), ["node0: CPUs 0-3, 8192 MiB", "node1: CPUs 4-7, 4096 MiB, eth0"]);
    assert_eq!(found(&host, "hugepages_1gib"), [": 3 of 4 huge pages of 1 GiB are free: 3072 MiB"]);
    assert!(found(&host, "nested")[0].contains("kvm_intel has it"));
    assert!(found(&host, "pmu")[0].contains("have performance counters"));

    host.write("sys/devices/system/cpu/isolated", "2-5\n");
    host.write("sys/devices/system/node/node1/cpulist", "\n");
    host.write("sys/devices/system/node/node1/meminfo", "Node 1 MemTotal:  0 kB\n");
    assert_eq!(
        found(&host, "numa"),
        ["node0: CPUs 0-3 (isolated: 2-3), 8192 MiB", "node1: no CPUs, no memory, eth0"]
    );
    host.write("sys/module/kvm_intel/parameters/nested", "N\n");
    host.write("sys/module/kvm/parameters/enable_pmu", "N\n");
    assert!(found(&host, "nested")[0].contains("cannot be booted"));
    assert!(found(&host, "pmu")[0].contains("enable_pmu"));
    host.remove("sys/bus/event_source");
    assert!(found(&host, "pmu")[0].contains("no counters"));
    host.remove("sys/kernel/mm/hugepages/hugepages-1048576kB");
    assert!(found(&host, "hugepages_1gib")[0].contains("processor or the kernel has none"));
    host.remove("sys/devices/system/node");
    assert!(found(&host, "numa")[0].contains("no NUMA nodes"));
    host.verdict().unwrap();
}

/// A fix is a command that can be pasted, but for what no command does.
fn assert_command(fix: &str) {
    if ["enable ", "put the adapter ", "use an adapter "].iter().any(|prose| fix.starts_with(prose)) {
        return;
    }
    let programs = [
        "dmesg",
        "echo",
        "ip",
        "ls",
        "modprobe",
        "mount",
        "portcullis",
        "sed",
        "sysctl",
        "ulimit",
        "usermod",
    ];
    assert!(programs.contains(&fix.split(' ').next().unwrap()), "{fix}");
    let checked = std::process::Command::new("bash").args(["-n", "-c", fix]).output().unwrap();
    assert!(checked.status.success() && checked.stderr.is_empty(), "{fix}: {checked:?}");
}

#[test]
fn an_assignable_function_is_told_with_its_reset_and_its_use() {
    let host = MadeUp::new();
    let device = Bdf::new(0, 5, 0, 0).unwrap();
    host.sysfs.add_device(device, (0x1b36, 0x0010), 0x01_0802, Some(9), Some("nvme"));
    let found = |word: &str| {
        let list: AssignableList = vec![word.parse::<Assignable>().unwrap()].into();
        let users = UserArgs { vmm_uid_base: 900_000, vmm_uid_count: 4096 };
        let findings = examine(&Host::new(host.directory.path()), &users, &list);
        findings.into_iter().find(|finding| finding.check == "assignable")
    };
    assert_eq!(found("0000:06:00.0"), None);
    assert_eq!(found("1b36:0010").unwrap().verdict, Verdict::Ok);
    host.remove("sys/bus/pci/devices/0000:05:00.0/reset");
    let refused = found("1b36:0010").unwrap();
    assert_eq!((refused.verdict, refused.subject.as_deref()), (Verdict::Warn, Some("0000:05:00.0")));
    assert_command(&refused.fix.unwrap());
    let allowed = found("0000:05:00.0,no-reset").unwrap();
    assert!(allowed.verdict == Verdict::Warn && allowed.found.contains("state and data"), "{allowed:?}");
    host.write("sys/bus/pci/devices/0000:05:00.0/net/eth5/flags", "0x1003\n");
    assert!(found("1b36:0010").unwrap().found.contains("eth5"), "the host uses it");
}

#[test]
fn one_pf_that_can_be_used_is_enough() {
    let breaks: [fn(&MadeUp); 3] = [
        |host| host.sysfs.set_interface_up(PF, "eth0", false),
        |host| host.sysfs.sysfs().set_num_vfs(PF, 0, None).unwrap(),
        |host| {
            host.share_group(0x10, 0);
            host.share_group(0x10, 2);
        },
    ];
    for (n, breaks) in breaks.into_iter().enumerate() {
        let host = MadeUp::new();
        breaks(&host);
        assert!(host.verdict().is_err(), "{n}");
        let other = Bdf::new(0, 2, 0, 0).unwrap();
        host.sysfs.add_igb(other, "eth1");
        assert!(host.verdict().is_err(), "{n}: it has no VFs");
        host.sysfs.sysfs().set_num_vfs(other, 1, None).unwrap();
        // The made-up one is in the group of the other PF's VF.
        host.remove("sys/kernel/iommu_groups/20/devices/0000:02:10.0");
        host.remove("sys/bus/pci/devices/0000:02:10.0/iommu_group");
        let findings = host.findings();
        let wrong: Vec<_> = findings.iter().filter(|finding| finding.verdict != Verdict::Ok).collect();
        assert!(
            matches!(wrong.as_slice(), [one] if one.verdict == Verdict::Warn && one.subject.as_deref() == Some("eth0")),
            "{n}: {wrong:?}"
        );
        host.verdict().unwrap();
    }
}

#[test]
fn without_an_adapter_simulated_ones_need_kvm_alone() {
    let host = MadeUp::new();
    host.sysfs.sysfs().set_num_vfs(PF, 0, None).unwrap();
    host.sysfs.remove_device(PF);
    host.remove("sys/kernel/iommu_groups");
    host.sysfs.unload_driver("vfio-pci");
    let findings = host.findings();
    let pf = findings.iter().find(|finding| finding.check == "pf").unwrap();
    assert!(pf.verdict == Verdict::Warn && pf.fix.as_ref().unwrap().contains("--sim-pf"), "{pf:?}");
    host.verdict().unwrap();
    host.remove("dev/kvm");
    assert_eq!(
        host.verdict().unwrap_err().to_string(),
        "Failed checks of this host: 1; see the lines that say FAIL"
    );
}

#[test]
fn people_and_programs_are_told() {
    let host = MadeUp::new();
    host.remove("dev/kvm");
    let findings = host.findings();
    let told = |format| {
        let mut bytes = Vec::new();
        show(&findings, &mut Output::new(format, &mut bytes)).unwrap();
        String::from_utf8(bytes).unwrap()
    };
    let table = told(Format::Table);
    assert!(table.contains("FAIL  kvm"), "{table}");
    assert!(table.contains("/dev/kvm does not exist. Fix: modprobe kvm_intel\n"), "{table}");
    assert!(table.contains("ok    pf eth0"), "{table}");
    let json: serde_json::Value = serde_json::from_str(&told(Format::Json)).unwrap();
    let kvm = serde_json::json!({
        "check": "kvm", "verdict": "fail", "found": "/dev/kvm does not exist", "fix": "modprobe kvm_intel"
    });
    assert_eq!(json[0], kvm);
    assert_eq!(json[13]["subject"], "eth0");
}
