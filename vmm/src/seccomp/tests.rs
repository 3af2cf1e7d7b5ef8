// SPDX-License-Identifier: Apache-2.0

//! Compares the compiled filters with their files.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use kvm_bindings::*;
use serde_json::Value;

use super::*;

const THREADS: [Thread; 10] = [
    Thread::Main,
    Thread::Vcpu,
    Thread::Io(Calls::None),
    Thread::Io(Calls::Disk),
    Thread::Io(Calls::Network),
    Thread::Io(Calls::Port),
    Thread::Function(ThreadKind::Relay),
    Thread::Function(ThreadKind::Function),
    Thread::Function(ThreadKind::SimulatedVf),
    Thread::SimulatedPf,
];

/// Builds request numbers as `asm-generic/ioctl.h` does.
fn number(direction: u64, kind: u64, number: u64, size: usize) -> u64 {
    direction << 30 | (size as u64) << 16 | kind << 8 | number
}

/// The numbers by their names in `linux/kvm.h` and `linux/vfio.h`.
fn requests() -> BTreeMap<&'static str, u64> {
    const KVM: u64 = 0xae;
    const VFIO: u64 = b';' as u64;
    let (none, write, read) = (0, 1, 2);
    BTreeMap::from([
        ("KVM_RUN", number(none, KVM, 0x80, 0)),
        ("KVM_KVMCLOCK_CTRL", number(none, KVM, 0xad, 0)),
        ("KVM_SET_USER_MEMORY_REGION", number(write, KVM, 0x46, size_of::<kvm_userspace_memory_region>())),
        // The kernel declares the wrong direction, and keeps it.
        ("KVM_SET_IRQCHIP", number(read, KVM, 0x63, size_of::<kvm_irqchip>())),
        ("KVM_SET_GSI_ROUTING", number(write, KVM, 0x6a, size_of::<kvm_irq_routing>())),
        ("KVM_IRQFD", number(write, KVM, 0x76, size_of::<kvm_irqfd>())),
        ("KVM_IOEVENTFD", number(write, KVM, 0x79, size_of::<kvm_ioeventfd>())),
        ("KVM_SET_REGS", number(write, KVM, 0x82, size_of::<kvm_regs>())),
        ("KVM_GET_SREGS", number(read, KVM, 0x83, size_of::<kvm_sregs>())),
        ("KVM_SET_SREGS", number(write, KVM, 0x84, size_of::<kvm_sregs>())),
        ("KVM_SET_MSRS", number(write, KVM, 0x89, size_of::<kvm_msrs>())),
        ("KVM_SET_FPU", number(write, KVM, 0x8d, size_of::<kvm_fpu>())),
        ("KVM_SET_LAPIC", number(write, KVM, 0x8f, size_of::<kvm_lapic_state>())),
        ("KVM_SET_MP_STATE", number(write, KVM, 0x99, size_of::<kvm_mp_state>())),
        ("KVM_SET_PIT2", number(write, KVM, 0xa0, size_of::<kvm_pit_state2>())),
        ("KVM_SET_VCPU_EVENTS", number(write, KVM, 0xa0, size_of::<kvm_vcpu_events>())),
        ("KVM_SET_DEBUGREGS", number(write, KVM, 0xa2, size_of::<kvm_debugregs>())),
        ("KVM_SET_XCRS", number(write, KVM, 0xa7, size_of::<kvm_xcrs>())),
        ("VFIO_DEVICE_SET_IRQS", number(none, VFIO, 110, 0)),
        ("VFIO_DEVICE_RESET", number(none, VFIO, 111, 0)),
        ("BLKDISCARD", number(none, 0x12, 119, 0)),
        ("TUNSETOFFLOAD", number(write, u64::from(b'T'), 208, size_of::<u32>())),
        ("TUNSETQUEUE", number(write, u64::from(b'T'), 217, size_of::<i32>())),
        ("FIONBIO", 0x5421),
    ])
}

/// The verdict of a filter: the kernel's interpreter, as far as filters use it.
fn verdict(filter: &[(u16, u8, u8, u32)], number: u32, arguments: [u64; 6]) -> u32 {
    let data = |offset: u32| match offset {
        0 => number,
        4 => 0xc000_003e,
        _ => {
            let (argument, high) = ((offset - 16) / 8, offset % 8 == 4);
            let value = arguments[argument as usize];
            u32::try_from(if high { value >> 32 } else { value & 0xffff_ffff }).unwrap()
        }
    };
    let (mut a, mut at) = (0, 0);
    loop {
        let (code, jt, jf, k) = filter[at];
        at += 1;
        let mut jump = |yes: bool| at += usize::from(if yes { jt } else { jf });
        match code {
            0x20 => a = data(k),
            0x54 => a &= k,
            0x05 => at += k as usize,
            0x15 => jump(a == k),
            0x25 => jump(a > k),
            0x35 => jump(a >= k),
            0x06 => return k,
            other => panic!("instruction {other:#x}"),
        }
    }
}

/// The rules of a file with those that it includes.
fn rules_of(name: &str) -> Vec<Value> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/seccomp");
    let text = fs::read_to_string(root.join(name).with_extension("json")).unwrap();
    let mut file: Value = serde_json::from_str(&text).unwrap();
    let included = file["include"].as_array().into_iter().flatten();
    let mut rules: Vec<Value> = included.flat_map(|name| rules_of(name.as_str().unwrap())).collect();
    let Value::Array(own) = file["filter"].take() else { panic!("{name}") };
    rules.extend(own);
    rules
}

/// Whether a condition holds.
fn holds(condition: &Value, arguments: [u64; 6]) -> bool {
    let argument = arguments[usize::try_from(condition["index"].as_u64().unwrap()).unwrap()] & 0xffff_ffff;
    let mask = condition["op"]["masked_eq"].as_u64().unwrap_or(0xffff_ffff);
    argument & mask == condition["val"].as_u64().unwrap()
}

#[test]
fn each_filter_allows_what_its_file_says_and_nothing_else() {
    // The system calls of `libc` that the files name.
    let numbers: BTreeMap<&str, i64> = BTreeMap::from([
        ("read", libc::SYS_read),
        ("ioctl", libc::SYS_ioctl),
        ("mmap", libc::SYS_mmap),
        ("mprotect", libc::SYS_mprotect),
        ("tgkill", libc::SYS_tgkill),
        ("futex", libc::SYS_futex),
        ("exit_group", libc::SYS_exit_group),
        ("getsockopt", libc::SYS_getsockopt),
        ("prlimit64", libc::SYS_prlimit64),
        ("socketpair", libc::SYS_socketpair),
        ("fcntl", libc::SYS_fcntl),
        ("fallocate", libc::SYS_fallocate),
        ("ftruncate", libc::SYS_ftruncate),
        ("lseek", libc::SYS_lseek),
        ("statx", libc::SYS_statx),
    ]);
    for thread in THREADS {
        let filter = thread.filter();
        let rules = rules_of(thread.name());
        // Every value that a rule compares an argument with, and others.
        let mut values: Vec<u64> = rules
            .iter()
            .flat_map(|rule| rule["args"].as_array().into_iter().flatten())
            .map(|c| c["val"].as_u64().unwrap())
            .collect();
        values.extend([0, 1, 2, 3, 7, 4096, u64::MAX, 1 << 32]);
        values.sort_unstable();
        values.dedup();
        for (name, number) in &numbers {
            let number = u32::try_from(*number).unwrap();
            for &first in &values {
                for &second in &values {
                    for third in [0, 3, 4, 6, 17, 34, 4096] {
                        let arguments = [first, second, third, 0, 0, 0];
                        let allowed = rules.iter().filter(|rule| rule["syscall"] == **name).any(|rule| {
                            rule["args"]
                                .as_array()
                                .into_iter()
                                .flatten()
                                .all(|condition| holds(condition, arguments))
                        });
                        let said = verdict(filter, number, arguments);
                        let expected = if allowed { 0x7fff_0000 } else { 0x8000_0000 };
                        assert_eq!(said, expected, "{} on {}: {arguments:x?}", name, thread.name());
                    }
                }
            }
        }
        let plain = rules.iter().map(|rule| rule["syscall"].as_str().unwrap()).collect::<BTreeSet<_>>().len();
        let conditional = |number| verdict(filter, number, [u64::MAX; 6]) == 0x7fff_0000;
        let allowed = (0..1000).filter(|number| conditional(*number)).count();
        assert!(allowed <= plain && allowed > 15, "{}: {allowed} of {plain}", thread.name());
    }
}

/// The threat model names each request to KVM that a vmm for users can make.
#[test]
fn the_threat_model_names_the_requests_to_kvm() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/threat-model.md");
    let text = fs::read_to_string(path).unwrap();
    let allowed: BTreeSet<String> = THREADS
        .iter()
        .flat_map(|thread| rules_of(thread.name()))
        .filter(|rule| rule["syscall"] == "ioctl")
        .map(|rule| rule["args"][0]["comment"].as_str().unwrap().to_owned())
        .filter(|name| name.starts_with("KVM_"))
        .collect();
    let named: BTreeSet<String> =
        text.split('`').filter(|word| word.starts_with("KVM_")).map(str::to_owned).collect();
    assert_eq!(named, allowed);
}

fn rules() -> Vec<(String, Value)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/seccomp");
    let mut rules = Vec::new();
    for entry in fs::read_dir(root).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let mut file: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        let Value::Array(own) = file["filter"].take() else { panic!("{}", path.display()) };
        rules.extend(own.into_iter().map(|rule| (path.display().to_string(), rule)));
    }
    rules
}

#[test]
fn every_request_has_the_number_of_its_name() {
    let known = requests();
    let mut seen = 0;
    for (path, rule) in rules().iter().filter(|(_, rule)| rule["syscall"] == "ioctl") {
        let [condition] = &rule["args"].as_array().unwrap()[..] else { panic!("{path}: {rule}") };
        let name = condition["comment"].as_str().unwrap();
        assert_eq!(condition["index"], 1, "{path}: {name}");
        assert_eq!(condition["op"], "eq", "{path}: {name}");
        assert_eq!(condition["val"].as_u64(), known.get(name).copied(), "{path}: {name}");
        seen += 1;
    }
    assert!(seen > 15, "only {seen} requests");
}

#[test]
fn nothing_that_makes_code_processes_or_ways_out_is_allowed() {
    for (path, rule) in rules() {
        let name = rule["syscall"].as_str().unwrap();
        for never in [
            "clone",
            "clone3",
            "fork",
            "vfork",
            "execve",
            "execveat",
            "open",
            "openat",
            "openat2",
            "socket",
            "connect",
            "bind",
            "ptrace",
            "kill",
            "tkill",
            "bpf",
            "unshare",
            "setns",
            "mount",
            "prctl",
            "seccomp",
            "io_uring_setup",
            "memfd_create",
            "userfaultfd",
            "process_vm_readv",
            "pidfd_open",
            "pidfd_getfd",
            "readlink",
            "keyctl",
            "sendmmsg",
            // The place of a VM: its status relies on it.
            "sched_setaffinity",
            "mbind",
            "set_mempolicy",
            "set_mempolicy_home_node",
            "migrate_pages",
            "move_pages",
        ] {
            assert_ne!(name, never, "{path}");
        }
        if matches!(name, "mmap" | "mprotect") {
            let prot = &rule["args"][0];
            let (mask, value) = (&prot["op"]["masked_eq"], &prot["val"]);
            assert_eq!((prot["index"].as_u64(), mask.as_u64(), value.as_u64()), (Some(2), Some(4), Some(0)));
        }
        // Only a simulated PF passes descriptors to the agent.
        assert!(name != "sendmsg" || path.ends_with("simulated-pf.json"), "{path}");
        if name == "tgkill" {
            assert_eq!(
                rule["args"][0]["val"].as_u64(),
                Some(OWN_PID.into()),
                "{path}: only to the process itself"
            );
        }
    }
}

#[test]
fn each_filter_names_its_own_process_where_it_signals() {
    for thread in THREADS {
        assert!(thread.filter().iter().any(|(_, _, _, k)| *k == OWN_PID), "{}", thread.name());
        assert!(thread.filter().len() < 1000, "{}", thread.name());
    }
}
