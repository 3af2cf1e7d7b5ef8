// SPDX-License-Identifier: Apache-2.0

//! The guest's CPUID: the features that KVM supports on this host, with our topology.
//!
//! The topology is one socket, one thread a core, as many cores as vCPUs; a vCPU's index is its APIC id. Nested
//! virtualization and performance counters are left out unless the specification asks for them: both are large parts
//! of KVM, and most of its escapes were in the first.

use kvm_bindings::{CpuId, KVM_CAP_PMU_CAPABILITY, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};
use protocol::CpuFeatures;

/// Leaf 1 ECX: TSC-deadline timer. KVM emulates it but does not list it.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1 ECX: running under a hypervisor.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 ECX: VMX, and `IA32_PERF_CAPABILITIES` (Intel SDM vol. 2A, CPUID leaf 01H).
const VMX: u32 = 1 << 5;
const PDCM: u32 = 1 << 15;
/// Fn8000_0001 ECX: SVM, and performance counter extensions of the core, the northbridge and the last cache (AMD APM vol. 3).
const SVM: u32 = 1 << 2;
const PERF_CTR_CORE: u32 = 1 << 23;
const PERF_CTR: u32 = PERF_CTR_CORE | 1 << 24 | 1 << 28;
/// The leaf that describes SVM.
const OF_NESTED: u32 = 0x8000_000a;
/// Leaves that describe performance monitoring of Intel (0xa, 0x23) and AMD (Fn8000_0022).
const OF_PMU: [u32; 3] = [0xa, 0x23, 0x8000_0022];
/// Leaf 1 EDX: leaf 1 EBX and leaf 4 describe more than one logical processor.
const HTT: u32 = 1 << 28;
/// The address bits of a CPU without leaf `0x8000_0008`.
const DEFAULT_PHYSICAL_BITS: u8 = 36;

/// A feature that the specification asks for and KVM lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FeatureError {
    /// No nested virtualization.
    #[error(
        "KVM on this host has no nested virtualization, which cpu_features.nested asks for: load kvm_intel or kvm_amd with \
         nested=1 (/sys/module/kvm_intel/parameters/nested), or turn cpu_features.nested off"
    )]
    Nested,
    /// No performance counters.
    #[error(
        "KVM on this host has no performance counters, which cpu_features.pmu asks for: load kvm with enable_pmu=1 on a host \
         whose processor shows counters, or turn cpu_features.pmu off"
    )]
    Pmu,
}

/// Checks that KVM has the features that a specification asks for.
///
/// # Errors
/// The first that it lacks.
pub fn check(kvm: &Kvm, supported: &CpuId, features: CpuFeatures) -> Result<(), FeatureError> {
    if features.nested && !has_nested(supported) {
        return Err(FeatureError::Nested);
    }
    // The capability came with Linux 5.18. Since then it is absent if KVM has no counters.
    let has_capability = || kvm.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into()) > 0;
    if features.pmu && !has_pmu(supported) && !has_capability() {
        return Err(FeatureError::Pmu);
    }
    Ok(())
}

/// Whether KVM lists VMX or SVM: only if its module has the parameter `nested`.
#[must_use]
pub fn has_nested(supported: &CpuId) -> bool {
    supported.as_slice().iter().any(|entry| match entry.function {
        1 => entry.ecx & VMX != 0,
        0x8000_0001 => entry.ecx & SVM != 0,
        _ => false,
    })
}

/// Whether KVM lists performance counters: a version of architectural monitoring, or AMD's six counters. AMD's older four
/// have no bit.
#[must_use]
pub fn has_pmu(supported: &CpuId) -> bool {
    supported.as_slice().iter().any(|entry| match entry.function {
        0xa => entry.eax & 0xff != 0,
        0x8000_0001 => entry.ecx & PERF_CTR_CORE != 0,
        _ => false,
    })
}

/// Reads the CPUID that KVM supports on this host.
///
/// # Errors
/// Those of `KVM_GET_SUPPORTED_CPUID`.
pub fn supported(kvm: &Kvm) -> Result<CpuId, kvm_ioctls::Error> {
    let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    let deadline_timer = kvm.check_extension(Cap::TscDeadlineTimer);
    for entry in cpuid.as_mut_slice() {
        if entry.function == 1 {
            entry.ecx |= HYPERVISOR;
            if deadline_timer {
                entry.ecx |= TSC_DEADLINE;
            }
        }
    }
    Ok(cpuid)
}

/// The physical address bits of the guest's CPUs.
#[must_use]
pub fn physical_bits(cpuid: &CpuId) -> u8 {
    cpuid
        .as_slice()
        .iter()
        .find(|entry| entry.function == 0x8000_0008)
        .map_or(DEFAULT_PHYSICAL_BITS, |entry| entry.eax.to_le_bytes()[0])
}

/// Builds the CPUID of vCPU `index` of `count`, with these features as far as KVM has them.
#[must_use]
pub fn of_vcpu(supported: &CpuId, index: u8, count: u8, features: CpuFeatures) -> Vec<kvm_cpuid_entry2> {
    let mut entries: Vec<kvm_cpuid_entry2> =
        supported.as_slice().iter().filter(|entry| !matches!(entry.function, 0xb | 0x1f)).copied().collect();
    for entry in &mut entries {
        set_topology(entry, index, count);
        if !features.nested {
            leave_out_nested(entry);
        }
        if !features.pmu {
            leave_out_pmu(entry);
        }
    }
    // Extended topology leaves repeat the topology in the form that current kernels read first.
    let highest = entries.iter().find(|entry| entry.function == 0).map_or(0, |entry| entry.eax);
    for function in [0xb, 0x1f] {
        if function <= highest {
            entries.extend((0..3).map(|level| extended_topology(function, level, index, count)));
        }
    }
    entries
}

fn leave_out_nested(entry: &mut kvm_cpuid_entry2) {
    match entry.function {
        1 => entry.ecx &= !VMX,
        0x8000_0001 => entry.ecx &= !SVM,
        OF_NESTED => clear(entry),
        _ => {}
    }
}

fn leave_out_pmu(entry: &mut kvm_cpuid_entry2) {
    match entry.function {
        1 => entry.ecx &= !PDCM,
        0x8000_0001 => entry.ecx &= !PERF_CTR,
        leaf if OF_PMU.contains(&leaf) => clear(entry),
        _ => {}
    }
}

fn clear(entry: &mut kvm_cpuid_entry2) {
    (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
}

/// The bits of an APIC id that number the core.
fn core_bits(count: u8) -> u32 {
    u32::from(count).next_power_of_two().trailing_zeros()
}

fn set_topology(entry: &mut kvm_cpuid_entry2, index: u8, count: u8) {
    let last_core = u32::from(count.saturating_sub(1));
    match entry.function {
        // Intel SDM vol. 2A, CPUID leaf 01H: initial APIC id, logical processors in the package.
        1 => {
            let logical = if count > 1 { u32::from(count) } else { 1 };
            entry.ebx = (entry.ebx & 0x0000_ffff) | u32::from(index) << 24 | logical.min(255) << 16;
            entry.edx = if count > 1 { entry.edx | HTT } else { entry.edx & !HTT };
        }
        // Leaf 04H: cores in the package (bits 31:26), logical processors that share the cache (25:14).
        4 if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 0x7;
            let sharing = if level >= 3 { last_core } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | sharing << 14 | last_core.min(63) << 26;
        }
        // AMD APM vol. 3, Fn8000_0008 ECX: cores (7:0) and the size of the core id (15:12).
        0x8000_0008 => entry.ecx = (entry.ecx & !0xf0ff) | last_core | core_bits(count) << 12,
        // Fn8000_001D: logical processors that share the cache (25:14).
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 0x7;
            let sharing = if level >= 3 { last_core } else { 0 };
            entry.eax = (entry.eax & !(0xfff << 14)) | sharing << 14;
        }
        // Fn8000_001E: extended APIC id; core id and threads a core; one node.
        0x8000_001e => {
            entry.eax = u32::from(index);
            entry.ebx = u32::from(index);
            entry.ecx = 0;
        }
        _ => {}
    }
}

fn extended_topology(function: u32, level: u32, index: u8, count: u8) -> kvm_cpuid_entry2 {
    // Level 0: threads (type 1), one a core. Level 1: cores (type 2). Level 2 ends the list.
    let (kind, shift, processors) = match level {
        0 => (1, 0, 1),
        1 => (2, core_bits(count), u32::from(count)),
        _ => (0, 0, 0),
    };
    kvm_cpuid_entry2 {
        function,
        index: level,
        flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: processors,
        ecx: level | kind << 8,
        edx: u32::from(index),
        ..kvm_cpuid_entry2::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> CpuId {
        let entry = |function, index, eax| kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx: 0xffff_ff00,
            ecx: 0xffff_ffff,
            edx: 0xffff_ffff,
            ..kvm_cpuid_entry2::default()
        };
        CpuId::from_entries(&[
            entry(0, 0, 0x1f),
            entry(1, 0, 0),
            entry(4, 0, 1 << 5 | 1),
            entry(4, 1, 3 << 5 | 3),
            entry(0xa, 0, 77),
            entry(0xb, 0, 77),
            entry(0x8000_0001, 0, 77),
            entry(0x8000_000a, 0, 77),
            entry(0x8000_0022, 0, 77),
            entry(0x8000_0008, 0, 0x3024),
            entry(0x8000_001e, 0, 77),
        ])
        .unwrap()
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries.iter().find(|entry| entry.function == function && entry.index == index).unwrap()
    }

    #[test]
    fn every_leaf_tells_the_same_topology() {
        for (index, count, bits) in [(0, 1, 0), (3, 4, 2), (31, 32, 5), (4, 6, 3)] {
            let entries = of_vcpu(&host(), index, count, CpuFeatures::default());
            let apic_id = u32::from(index);
            assert_eq!(find(&entries, 1, 0).ebx >> 24, apic_id);
            assert_eq!(find(&entries, 1, 0).ebx >> 16 & 0xff, u32::from(count));
            assert_eq!(find(&entries, 1, 0).edx & HTT != 0, count > 1);
            assert_eq!(find(&entries, 4, 0).eax >> 26, u32::from(count) - 1, "cores");
            assert_eq!(find(&entries, 4, 0).eax >> 14 & 0xfff, 0, "first-level cache is private");
            assert_eq!(find(&entries, 4, 1).eax >> 14 & 0xfff, u32::from(count) - 1, "last level is shared");
            assert_eq!(find(&entries, 0x8000_0008, 0).ecx & 0xff, u32::from(count) - 1);
            assert_eq!(find(&entries, 0x8000_0008, 0).ecx >> 12 & 0xf, bits);
            assert_eq!(find(&entries, 0x8000_001e, 0).eax, apic_id);
            for leaf in [0xb, 0x1f] {
                assert_eq!(find(&entries, leaf, 0).edx, apic_id, "the host's own leaf is replaced");
                assert_eq!(find(&entries, leaf, 1).eax, bits);
                assert_eq!(find(&entries, leaf, 1).ebx, u32::from(count));
                assert_eq!(find(&entries, leaf, 2).ecx >> 8, 0, "end of list");
            }
        }
    }

    #[test]
    fn guests_have_nested_virtualization_and_performance_counters_only_if_asked_for() {
        let all = !0;
        let (svm, counters) = (all ^ 1 << 2, all ^ (1 << 23 | 1 << 24 | 1 << 28));
        for (nested, pmu, one, extended) in [
            (false, false, all ^ (1 << 5 | 1 << 15), svm & counters),
            (true, false, all ^ 1 << 15, counters),
            (false, true, all ^ 1 << 5, svm),
            (true, true, all, all),
        ] {
            let entries = of_vcpu(&host(), 0, 1, CpuFeatures { nested, pmu });
            assert_eq!(find(&entries, 1, 0).ecx, one, "{nested} {pmu}");
            assert_eq!(find(&entries, 0x8000_0001, 0).ecx, extended, "{nested} {pmu}");
            for (leaf, kept) in [(0xa, pmu), (0x8000_000a, nested), (0x8000_0022, pmu)] {
                let entry = find(&entries, leaf, 0);
                let empty = [entry.eax, entry.ebx, entry.ecx, entry.edx] == [0; 4];
                assert_eq!(empty, !kept, "{leaf:#x} {nested} {pmu}");
            }
        }
    }

    #[test]
    fn a_host_says_by_its_cpuid_which_features_it_has() {
        let of = |function, eax, ecx| {
            let entry = kvm_cpuid_entry2 { function, eax, ecx, ..kvm_cpuid_entry2::default() };
            let cpuid = CpuId::from_entries(&[entry]).unwrap();
            (has_nested(&cpuid), has_pmu(&cpuid))
        };
        assert_eq!(of(1, 0, VMX), (true, false));
        assert_eq!(of(1, !0, !VMX), (false, false));
        assert_eq!(of(0x8000_0001, 0, SVM), (true, false));
        assert_eq!(of(0x8000_0001, 0, PERF_CTR_CORE), (false, true));
        assert_eq!(of(0xa, 2, 0), (false, true));
        assert_eq!(of(0xa, 0x700, !0), (false, false), "version 0: no counters");
    }

    #[test]
    fn address_bits_come_from_the_cpu() {
        assert_eq!(physical_bits(&host()), 36);
        assert_eq!(physical_bits(&CpuId::new(0).unwrap()), DEFAULT_PHYSICAL_BITS);
    }
}
