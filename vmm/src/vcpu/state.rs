// SPDX-License-Identifier: Apache-2.0

//! A vCPU's registers: power-on state, and the state at the boot protocol's entry.

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_dtable, kvm_fpu, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{Kvm, VcpuFd};

use crate::layout;

/// The boot processor's entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 64-bit Linux entry (Documentation/arch/x86/boot.rst): long mode, identity paging, zero page in RSI.
    Linux64 {
        /// Address of the first instruction.
        rip: u64,
    },
    /// PVH (xen/include/public/arch-x86/hvm/start_info.h): 32-bit protected mode without paging, start info in EBX.
    Pvh {
        /// Address of the first instruction, below 4 GiB.
        rip: u64,
    },
}

const MSR_IA32_FEATURE_CONTROL: u32 = 0x3a;
const MSR_EFER: u32 = 0xc000_0080;
const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// RFLAGS bit 1 always reads as one.
const RFLAGS: u64 = 2;

/// The state of a vCPU right after its creation, which a reset restores.
pub(crate) struct PowerOn {
    regs: kvm_regs,
    sregs: kvm_sregs,
    fpu: kvm_fpu,
    lapic: kvm_lapic_state,
    mp: kvm_mp_state,
    events: kvm_vcpu_events,
    debug: kvm_debugregs,
    xcrs: Option<kvm_xcrs>,
    msrs: Vec<kvm_msr_entry>,
    /// The vCPU has nested virtualization.
    nested: bool,
}

impl PowerOn {
    /// Reads the state of a vCPU that has not run.
    pub(crate) fn capture(kvm: &Kvm, fd: &VcpuFd, nested: bool) -> Result<Self, kvm_ioctls::Error> {
        let mut msrs = Vec::new();
        let mut wanted: Vec<kvm_msr_entry> = kvm
            .get_msr_index_list()?
            .as_slice()
            .iter()
            .map(|&index| kvm_msr_entry { index, ..kvm_msr_entry::default() })
            .collect();
        while let Ok(mut some) = Msrs::from_entries(&wanted)
            && !wanted.is_empty()
        {
            // KVM stops at the first register that this vCPU lacks: go on behind it.
            let count = fd.get_msrs(&mut some)?;
            msrs.extend(some.as_slice().iter().take(count));
            wanted.drain(..wanted.len().min(count.saturating_add(1)));
        }
        Ok(Self {
            regs: fd.get_regs()?,
            sregs: fd.get_sregs()?,
            fpu: fd.get_fpu()?,
            lapic: fd.get_lapic()?,
            mp: fd.get_mp_state()?,
            events: fd.get_vcpu_events()?,
            debug: fd.get_debug_regs()?,
            xcrs: fd.get_xcrs().ok(),
            msrs,
            nested,
        })
    }

    /// Restores the state.
    pub(crate) fn restore(&self, fd: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
        if self.nested {
            leave_nested(fd);
        }
        fd.set_mp_state(self.mp)?;
        fd.set_regs(&self.regs)?;
        fd.set_sregs(&self.sregs)?;
        fd.set_fpu(&self.fpu)?;
        if let Some(xcrs) = &self.xcrs {
            fd.set_xcrs(xcrs)?;
        }
        for entry in &self.msrs {
            if let Ok(one) = Msrs::from_entries(std::slice::from_ref(entry)) {
                // Read-only registers refuse the write, and need none.
                let _ = fd.set_msrs(&one);
            }
        }
        fd.set_lapic(&self.lapic)?;
        fd.set_debug_regs(&self.debug)?;
        fd.set_vcpu_events(&self.events)
    }
}

/// Takes the vCPU out of a nested guest and out of VMX or SVM operation. In these states KVM refuses the power-on state or
/// sets it in the nested guest. KVM leaves VMX operation when its user clears the first register, and SVM operation when
/// its user clears SVME in the second one (`vmx_set_msr`, `svm_set_efer`).
fn leave_nested(fd: &VcpuFd) {
    for index in [MSR_IA32_FEATURE_CONTROL, MSR_EFER] {
        if let Ok(one) = Msrs::from_entries(&[kvm_msr_entry { index, ..kvm_msr_entry::default() }]) {
            // The other vendor's vCPUs lack the register.
            let _ = fd.set_msrs(&one);
        }
    }
}

/// A flat segment of 4 GiB.
fn flat(type_: u8, selector: u16, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        s: 1,
        db: u8::from(!long),
        l: u8::from(long),
        g: 1,
        ..kvm_segment::default()
    }
}

/// The guest's descriptors at [`layout::GDT`]: null, unused, code (0x10), data (0x18), TSS (0x20).
#[must_use]
pub fn gdt(entry: Entry) -> [u64; 5] {
    let code = match entry {
        Entry::Linux64 { .. } => 0x00af_9b00_0000_ffff,
        Entry::Pvh { .. } => 0x00cf_9b00_0000_ffff,
    };
    [0, 0, code, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067]
}

/// Sets the boot processor's registers for `entry`; memory is set up by [`crate::boot`].
pub(crate) fn enter(fd: &VcpuFd, entry: Entry) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = fd.get_sregs()?;
    let long = matches!(entry, Entry::Linux64 { .. });
    let data = flat(0x3, 0x18, false);
    sregs.cs = flat(0xb, 0x10, long);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, selector: 0x20, type_: 0xb, present: 1, ..kvm_segment::default() };
    sregs.gdt = kvm_dtable { base: layout::GDT, limit: 5 * 8 - 1, ..kvm_dtable::default() };
    sregs.idt = kvm_dtable { base: 0, limit: 0, ..kvm_dtable::default() };
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    sregs.efer = 0;
    let mut regs = kvm_regs { rflags: RFLAGS, ..kvm_regs::default() };
    match entry {
        Entry::Linux64 { rip } => {
            sregs.cr0 |= CR0_PG;
            sregs.cr3 = layout::PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
            regs.rip = rip;
            regs.rsi = layout::BOOT_PARAMS;
            regs.rsp = layout::STACK;
            regs.rbp = layout::STACK;
        }
        Entry::Pvh { rip } => {
            regs.rip = rip;
            regs.rbx = layout::BOOT_PARAMS;
        }
    }
    fd.set_sregs(&sregs)?;
    fd.set_regs(&regs)?;
    let msrs =
        [kvm_msr_entry { index: MSR_IA32_MISC_ENABLE, data: MISC_ENABLE_FAST_STRING, ..Default::default() }];
    if let Ok(msrs) = Msrs::from_entries(&msrs) {
        // AMD has no such register. KVM accepts it there, and nothing depends on it.
        let _ = fd.set_msrs(&msrs);
    }
    Ok(())
}
