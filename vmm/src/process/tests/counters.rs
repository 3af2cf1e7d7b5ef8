// SPDX-License-Identifier: Apache-2.0

//! Performance counters that a guest would have without a bit of CPUID.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VmFd};
use protocol::CpuFeatures;

use crate::{machine, vcpu::cpuid};

/// Event selectors: the first of AMD (APM vol. 2, 13.2), which exists whatever CPUID says, and the first of Intel.
const SELECTORS: [u32; 2] = [0xc001_0000, 0x186];

/// An event, cycles, without the bit that enables counting.
const CYCLES: u64 = 0x76;

/// The selectors that keep a written value.
fn kept(kvm: &Kvm, vm: &VmFd) -> Vec<u32> {
    let vcpu = vm.create_vcpu(0).unwrap();
    // All CPUID bits of the host, those of counters among them: the test is not about CPUID.
    vcpu.set_cpuid2(&cpuid::supported(kvm).unwrap()).unwrap();
    let keeps = |selector: &u32| {
        let entry = |data| kvm_msr_entry { index: *selector, data, ..kvm_msr_entry::default() };
        let mut read = Msrs::from_entries(&[entry(0)]).unwrap();
        vcpu.set_msrs(&Msrs::from_entries(&[entry(CYCLES)]).unwrap()).is_ok_and(|count| count == 1)
            && vcpu.get_msrs(&mut read).is_ok_and(|count| count == 1)
            && read.as_slice()[0].data == CYCLES
    };
    SELECTORS.into_iter().filter(keeps).collect()
}

/// On a host with KVM that offers counters (`kvm.enable_pmu`), a VM of ours has none all the same.
#[test]
fn a_vm_has_no_performance_counters() {
    let kvm = Kvm::new().expect("/dev/kvm is needed");
    let others = kept(&kvm, &kvm.create_vm().unwrap());
    let ours = kept(&kvm, &machine::create_vm(&kvm, CpuFeatures::default()).unwrap());
    println!("a VM has the selectors {others:#x?}, one of ours {ours:#x?}");
    assert!(ours.is_empty(), "{ours:#x?}, of {others:#x?}");
}
