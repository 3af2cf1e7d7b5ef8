// SPDX-License-Identifier: Apache-2.0

//! KVM, IOMMU, VFIO and memory.

use std::{fs::File, io};

use options::user_ids::{self, UserArgs};
use sriov::InterruptRemapping;

use super::{Finding, Host, Verdict};

/// The processor's vendor.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Vendor {
    Intel,
    Amd,
    Unknown,
}

fn vendor(host: &Host) -> Vendor {
    let cpuinfo = host.text("proc/cpuinfo").unwrap_or_default();
    match () {
        () if cpuinfo.contains("GenuineIntel") => Vendor::Intel,
        () if cpuinfo.contains("AuthenticAMD") => Vendor::Amd,
        () => Vendor::Unknown,
    }
}

pub(super) fn kvm(host: &Host) -> Finding {
    let fail = |found: String, fix: &str| Finding::wrong(Verdict::Fail, "kvm", found, fix);
    match File::options().read(true).write(true).open(host.path("dev/kvm")) {
        Ok(_) => Finding::ok("kvm", "/dev/kvm can be opened"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let cpuinfo = host.text("proc/cpuinfo").unwrap_or_default();
            let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
            if !flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm") {
                let fix =
                    "enable virtualization (VT-x, AMD-V) in the firmware; in a VM, let its host nest KVM";
                return fail(
                    "/dev/kvm does not exist, and the processor does not show vmx or svm".to_owned(),
                    fix,
                );
            }
            let module = if vendor(host) == Vendor::Amd { "kvm_amd" } else { "kvm_intel" };
            fail("/dev/kvm does not exist".to_owned(), &format!("modprobe {module}"))
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => fail(
            "this user may not open /dev/kvm".to_owned(),
            // Root runs the fix; this user joins the group.
            &format!(
                "usermod -aG kvm \"$(id -nu {})\"  # then log in again; or run the agent as root",
                rustix::process::getuid().as_raw()
            ),
        ),
        Err(error) => fail(format!("/dev/kvm cannot be opened ({error})"), "dmesg | grep -i kvm  # says why"),
    }
}

pub(super) fn iommu(host: &Host, needed: Verdict) -> Finding {
    let groups = host.entries("sys/kernel/iommu_groups");
    if groups > 0 {
        return Finding::ok("iommu", format!("{groups} IOMMU groups"));
    }
    let cmdline = host.text("proc/cmdline").unwrap_or_default();
    let has = |option: &str| cmdline.split_whitespace().any(|word| word == option);
    if let Some(option) =
        ["iommu=off", "intel_iommu=off", "amd_iommu=off"].into_iter().find(|option| has(option))
    {
        let found = format!("no IOMMU group: the kernel was started with {option}");
        let fix = format!("sed -i 's/ *{option}//' /etc/default/grub && update-grub && reboot");
        return Finding::wrong(needed, "iommu", found, fix);
    }
    // Linux uses AMD's by default (there is no amd_iommu=on), Intel's only on some distributions.
    if vendor(host) == Vendor::Amd || has("intel_iommu=on") {
        let found = "no IOMMU group, though the kernel would use an IOMMU";
        return Finding::wrong(needed, "iommu", found, "enable the IOMMU (AMD-Vi, VT-d) in the firmware");
    }
    let fix = "sed -i 's/^GRUB_CMDLINE_LINUX=\"/&intel_iommu=on /' /etc/default/grub && update-grub && reboot  # with VT-d \
               enabled in the firmware";
    Finding::wrong(needed, "iommu", "no IOMMU group: the IOMMU is off", fix)
}

pub(super) fn interrupt_remapping(host: &Host, needed: Verdict) -> Finding {
    const CHECK: &str = "interrupt_remapping";
    let allowed = host.sysfs.unsafe_interrupts_allowed().unwrap_or(false);
    match host.sysfs.interrupt_remapping() {
        Ok(InterruptRemapping::On) => Finding::ok(CHECK, "on"),
        Ok(InterruptRemapping::Off) if allowed => Finding::wrong(
            Verdict::Warn,
            CHECK,
            "off, and VFIO allows that: a guest with a VF can raise any interrupt of the host",
            "echo 0 >/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts  # once it is enabled in the firmware \
             (x2APIC, VT-d)",
        ),
        Ok(InterruptRemapping::Off) => Finding::wrong(
            needed,
            CHECK,
            "off: VFIO refuses VFs",
            "enable it in the firmware (x2APIC, VT-d); or, where all guests are trusted: echo 1 \
             >/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts",
        ),
        Ok(InterruptRemapping::Unknown) => Finding::wrong(
            Verdict::Warn,
            CHECK,
            "the kernel does not report it",
            "dmesg | grep -e DMAR-IR -e AMD-Vi  # shows the state",
        ),
        Err(error) => Finding::wrong(Verdict::Warn, CHECK, error.to_string(), "mount -t sysfs sysfs /sys"),
    }
}

pub(super) fn vfio(host: &Host, needed: Verdict) -> Finding {
    const FIX: &str = "modprobe vfio-pci && echo vfio-pci >/etc/modules-load.d/vfio-pci.conf";
    if !host.has("sys/bus/pci/drivers/vfio-pci") {
        return Finding::wrong(needed, "vfio-pci", "the driver vfio-pci is not loaded", FIX);
    }
    if !host.has("dev/vfio/vfio") {
        return Finding::wrong(
            needed,
            "vfio-pci",
            "/dev/vfio/vfio does not exist",
            "modprobe vfio_iommu_type1",
        );
    }
    Finding::ok("vfio-pci", "loaded")
}

/// The limit of this process is also that of an agent started from here, unless the agent is a service.
pub(super) fn memlock(host: &Host) -> Finding {
    const FIX: &str =
        "ulimit -l unlimited  # in the shell that starts the agent; a service has LimitMEMLOCK=infinity";
    let limits = host.text("proc/self/limits").unwrap_or_default();
    let line = limits.lines().find_map(|line| line.strip_prefix("Max locked memory"));
    let mut words = line.unwrap_or_default().split_whitespace();
    match words.nth(1) {
        Some("unlimited") => Finding::ok("memlock", "lockable memory is not limited"),
        Some(hard) => match hard.parse::<u64>() {
            Ok(bytes) => {
                let found = format!(
                    "{} MiB can be locked, but guests with VFs lock all their memory; an agent that is root \
                     raises the limit",
                    bytes >> 20
                );
                Finding::wrong(Verdict::Warn, "memlock", found, FIX)
            }
            Err(_) => Finding::wrong(Verdict::Warn, "memlock", format!("the limit is {hard:?}"), FIX),
        },
        None => Finding::wrong(Verdict::Warn, "memlock", "/proc/self/limits does not show the limit", FIX),
    }
}

/// The controllers of version 2 that limit VMs' processes, and the loss without each.
const CONTROLLERS: [(&str, &str); 3] = [
    ("cpu", "VMs with limits of processor time cannot be booted"),
    ("memory", "a VM's process under the control of its guest can take all memory"),
    ("hugetlb", "a VM's process under the control of its guest can take all free huge pages"),
];

pub(super) fn control_groups(host: &Host) -> Finding {
    const CHECK: &str = "cgroup";
    let warn = |found: String, fix: &str| Finding::wrong(Verdict::Warn, CHECK, found, fix);
    let Some(available) = host.text("sys/fs/cgroup/cgroup.controllers") else {
        let found = "no control groups of version 2 at /sys/fs/cgroup: VMs with limits cannot be booted, and \
                     other VMs have no limits";
        let fix = "enable version 2 (kernel option systemd.unified_cgroup_hierarchy=1), or name its \
                   directory: serve --cgroup-parent DIR";
        return warn(found.to_owned(), fix);
    };
    let has = |controller: &str| available.split_ascii_whitespace().any(|word| word == controller);
    let missing: Vec<_> = CONTROLLERS.iter().filter(|(controller, _)| !has(controller)).collect();
    if missing.is_empty() {
        return Finding::ok(CHECK, "processor time, memory and huge pages of VMs' processes can be limited");
    }
    let found: Vec<_> = missing.iter().map(|(controller, loss)| format!("no {controller}: {loss}")).collect();
    let fix =
        "enable them in the kernel, and remove them from hierarchies of version 1 (/proc/cgroups shows both)";
    warn(found.join("; "), fix)
}

/// Whether the user ids of VMs' processes belong to no other user. An agent that is root does not start
/// otherwise.
pub(super) fn user_ids(host: &Host, users: &UserArgs) -> Finding {
    let range = users.range(0);
    match user_ids::check(&host.root, &range) {
        Ok(()) => Finding::ok("user_ids", format!("{} to {} are free", range.start(), range.end())),
        Err(overlap) => {
            let fix = match overlap.proposed() {
                Some(base) => format!("portcullis serve --vmm-uid-base {base}"),
                None => "give the agent other ids (--vmm-uid-base) or fewer (--vmm-uid-count)".to_owned(),
            };
            Finding::wrong(Verdict::Fail, "user_ids", overlap.to_string(), fix)
        }
    }
}
