// SPDX-License-Identifier: Apache-2.0

//! The NUMA node of guest memory.

use std::io;

use vm_memory::MmapRegion;

/// The words of a mask for 1024 nodes, the most that Linux can be built for (`NODES_SHIFT`).
const WORDS: usize = 1024 / 64;

/// Makes the kernel take all pages of a region from one NUMA node (mbind(2), `MPOL_BIND`). Call it before the first
/// access: pages that exist stay where they are.
///
/// # Errors
/// Those of the kernel: there is no such node, it has no memory, or the process's cpuset lacks it.
pub(crate) fn bind(region: &MmapRegion, node: u16) -> io::Result<()> {
    let mut mask = [0_u64; WORDS];
    let word = mask.get_mut(usize::from(node / 64)).ok_or(io::ErrorKind::InvalidInput)?;
    *word = 1 << (node % 64);
    // The kernel takes one off the number of bits (`get_nodes`, mm/mempolicy.c).
    let bits: libc::c_ulong = 1024 + 1;
    let (policy, flags): (libc::c_long, libc::c_ulong) = (libc::MPOL_BIND.into(), 0);
    // SAFETY: the range is a mapping that `region` owns, and the policy does not change its contents. The kernel reads 1024
    // bits of the mask, which has as many.
    let result = unsafe {
        libc::syscall(libc::SYS_mbind, region.as_ptr(), region.size(), policy, mask.as_ptr(), bits, flags)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
