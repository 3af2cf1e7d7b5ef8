// SPDX-License-Identifier: Apache-2.0

//! The small guest: a kernel of a few kilobytes that drives a VF by a script (`resources/guest/README.md`). It is the
//! guest of tests and demonstrations on hosts that have nothing but KVM.

/// An ELF image with a PVH entry. It runs in 2 MiB and reads its script from the kernel command line.
pub const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/small-guest.elf"));
