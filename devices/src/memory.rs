// SPDX-License-Identifier: Apache-2.0

//! Mapping of host memory (pages of a BAR) into the guest's physical address space.

use std::{io, sync::Arc};

/// Host memory that stays mapped, at one address, for the life of the object.
///
/// # Safety
/// `address()..address() + len()` is a valid mapping of this process until the object is dropped, both are
/// multiples of the page size, and nothing in this process holds Rust references into it.
pub unsafe trait HostMemory: Send + Sync {
    /// The start of the mapping in this process.
    fn address(&self) -> u64;
    /// Its length in bytes.
    fn len(&self) -> u64;
    /// Whether the mapping has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A mapping made by [`GuestMapper::map`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MappingId(pub u32);

/// Makes and removes windows in the guest's physical address space. The guest reaches host memory through them
/// without an exit.
///
/// The vmm implements it over `KVM_SET_USER_MEMORY_REGION`. It refuses a window that overlaps guest memory,
/// another window, or a range that a device has declared as trapped ([`GuestMapper::forbid`]).
pub trait GuestMapper: Send + Sync {
    /// Maps `memory` into the guest at `gpa` (page aligned).
    ///
    /// # Errors
    /// `InvalidInput` for a refused window, otherwise those of the kernel.
    fn map(&self, gpa: u64, memory: Arc<dyn HostMemory>) -> io::Result<MappingId>;

    /// Removes a window. After the return no vCPU can reach the memory through it.
    ///
    /// # Errors
    /// Those of the kernel.
    fn unmap(&self, id: MappingId) -> io::Result<()>;

    /// Declares host memory addresses `[start, start + len)` as never to be mapped: the mailbox page of a VF.
    /// `map` checks against them, so that a mistake elsewhere cannot expose that page to the guest.
    fn forbid(&self, start: u64, len: u64);
}
