// SPDX-License-Identifier: Apache-2.0

//! Guest memory and KVM's memory slots.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use devices::memory::{GuestMapper, HostMemory, MappingId};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::layout;

/// Guest memory: anonymous mappings, no dirty bitmap.
pub type GuestMemory = GuestMemoryMmap<()>;

const PAGE: u64 = 4096;

/// Errors of guest memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Not a multiple of 2 MiB, or too small.
    #[error("Guest memory of {0} bytes is not a multiple of 2 MiB; round it up")]
    Size(u64),
    /// `mmap` failed for ordinary pages.
    #[error("Cannot reserve {0} MiB of guest memory; free memory on the host or make the VM smaller")]
    Reserve(u64, #[source] vm_memory::mmap::MmapRegionError),
    /// `mmap` failed for huge pages.
    #[error(
        "Cannot reserve {0} MiB of guest memory in 2 MiB huge pages; raise /proc/sys/vm/nr_hugepages \
         by {pages} or turn hugepages off", pages = .0.div_ceil(2)
    )]
    HugePages(u64, #[source] vm_memory::mmap::MmapRegionError),
    /// The regions overlap: a bug.
    #[error("Guest memory regions overlap")]
    Regions(#[source] vm_memory::GuestRegionCollectionError),
    /// KVM refused a memory slot.
    #[error("KVM refused a memory slot at {gpa:#x}")]
    Slot {
        /// Guest-physical address.
        gpa: u64,
        /// KVM's error.
        source: io::Error,
    },
}

/// Reserves guest memory. The host's kernel allocates pages on first touch.
///
/// # Errors
/// See [`MemoryError`].
pub fn reserve(size: u64, hugepages: bool) -> Result<GuestMemory, MemoryError> {
    if size < layout::MEMORY_MIN || !size.is_multiple_of(layout::MEMORY_STEP) {
        return Err(MemoryError::Size(size));
    }
    let mib = size >> 20;
    let mut flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    flags |= if hugepages { libc::MAP_HUGETLB | libc::MAP_HUGE_2MB } else { libc::MAP_NORESERVE };
    let mut regions = Vec::new();
    for range in layout::ram(size) {
        let len = usize::try_from(range.end - range.start).map_err(|_| MemoryError::Size(size))?;
        let region =
            MmapRegion::build(None, len, libc::PROT_READ | libc::PROT_WRITE, flags).map_err(|e| {
                if hugepages { MemoryError::HugePages(mib, e) } else { MemoryError::Reserve(mib, e) }
            })?;
        keep_out_of_core_dumps(&region);
        regions.push(GuestRegionMmap::new(region, GuestAddress(range.start)).ok_or(MemoryError::Size(size))?);
    }
    GuestMemory::from_regions(regions).map_err(MemoryError::Regions)
}

/// Keeps a crash of this process from writing a guest's memory to the host's disk.
fn keep_out_of_core_dumps(region: &MmapRegion) {
    // SAFETY: the range is a mapping that `region` owns; MADV_DONTDUMP does not change its contents.
    let result = unsafe {
        rustix::mm::madvise(region.as_ptr().cast(), region.size(), rustix::mm::Advice::LinuxDontDump)
    };
    if let Err(errno) = result {
        tracing::warn!(%errno, "Cannot keep guest memory out of core dumps");
    }
}

/// KVM's memory slots: guest memory first, then windows into devices.
///
/// Refuses a window that overlaps RAM, another window, the machine's own devices, or host memory that a device has
/// forbidden. No other code makes memory visible to the guest.
pub struct Slots {
    vm: Arc<VmFd>,
    ram: Vec<Range<u64>>,
    /// The devices' windows. Hold the lock for a few instructions and one ioctl at most: vCPU threads wait for it.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    windows: BTreeMap<u32, Window>,
    free: BTreeSet<u32>,
    next: u32,
    forbidden: Vec<Range<u64>>,
}

struct Window {
    gpa: Range<u64>,
    host: u64,
    /// Keeps the host mapping alive for as long as KVM uses it.
    _memory: Arc<dyn HostMemory>,
}

impl Slots {
    /// Maps all of `memory` into the guest.
    ///
    /// # Errors
    /// [`MemoryError::Slot`].
    pub fn new(vm: Arc<VmFd>, memory: &GuestMemory) -> Result<Self, MemoryError> {
        let mut ram = Vec::new();
        let mut next = 0;
        for region in memory.iter() {
            use vm_memory::GuestMemoryRegion;
            let gpa = region.start_addr().0;
            let slot = kvm_userspace_memory_region {
                slot: next,
                flags: 0,
                guest_phys_addr: gpa,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the region is a mapping owned by `memory`, which lives as long as the machine and its VM.
            unsafe { vm.set_user_memory_region(slot) }
                .map_err(|e| MemoryError::Slot { gpa, source: e.into() })?;
            ram.push(gpa..gpa.saturating_add(region.len()));
            next += 1;
        }
        Ok(Self { vm, ram, state: Mutex::new(State { next, ..State::default() }) })
    }

    fn set(&self, slot: u32, gpa: u64, len: u64, host: u64) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: gpa,
            memory_size: len,
            userspace_addr: host,
        };
        // SAFETY: callers pass a mapping that they keep in `state.windows` until the slot is removed, or a length
        // of zero, which removes the slot.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(Into::into)
    }
}

fn overlaps(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

fn refused(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why.to_owned())
}

/// Checks a window. Needs no KVM, so that tests can call it.
fn check(
    gpa: &Range<u64>,
    host: &Range<u64>,
    ram: &[Range<u64>],
    windows: impl Iterator<Item = Range<u64>>,
    forbidden: &[Range<u64>],
) -> io::Result<()> {
    if gpa.start >= gpa.end || !gpa.start.is_multiple_of(PAGE) || !gpa.end.is_multiple_of(PAGE) {
        return Err(refused("The window is empty or not page aligned"));
    }
    if ram.iter().any(|range| overlaps(range, gpa)) {
        return Err(refused("The window overlaps guest memory"));
    }
    if overlaps(&layout::ECAM, gpa) || overlaps(&(u64::from(layout::IOAPIC)..layout::RAM_64), gpa) {
        return Err(refused("The window overlaps the machine's own devices"));
    }
    let mut windows = windows;
    if windows.any(|window| overlaps(&window, gpa)) {
        return Err(refused("The window overlaps another window"));
    }
    if forbidden.iter().any(|range| overlaps(range, host)) {
        return Err(refused("The window would show a trapped page to the guest"));
    }
    Ok(())
}

impl GuestMapper for Slots {
    fn map(&self, gpa: u64, memory: Arc<dyn HostMemory>) -> io::Result<MappingId> {
        let end = gpa.checked_add(memory.len()).ok_or_else(|| refused("The window wraps around"))?;
        let range = gpa..end;
        let host = memory.address()..memory.address().saturating_add(memory.len());
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        check(
            &range,
            &host,
            &self.ram,
            state.windows.values().map(|window| window.gpa.clone()),
            &state.forbidden,
        )?;
        let slot = if let Some(slot) = state.free.pop_first() {
            slot
        } else {
            let slot = state.next;
            state.next = slot.checked_add(1).ok_or_else(|| refused("No memory slot is left"))?;
            slot
        };
        if let Err(error) = self.set(slot, gpa, memory.len(), memory.address()) {
            state.free.insert(slot);
            return Err(error);
        }
        state.windows.insert(slot, Window { gpa: range, host: memory.address(), _memory: memory });
        Ok(MappingId(slot))
    }

    fn unmap(&self, id: MappingId) -> io::Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(window) = state.windows.get(&id.0) else { return Ok(()) };
        self.set(id.0, window.gpa.start, 0, window.host)?;
        state.windows.remove(&id.0);
        state.free.insert(id.0);
        Ok(())
    }

    fn forbid(&self, start: u64, len: u64) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let range = start..start.saturating_add(len);
        if !state.forbidden.contains(&range) {
            state.forbidden.push(range);
        }
    }
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "lists of ranges, some of one range")]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_huge_pages_could_not_hold_are_refused() {
        assert!(matches!(reserve((2 << 20) + 4096, false), Err(MemoryError::Size(_))));
        assert!(matches!(reserve(0, false), Err(MemoryError::Size(0))));
        assert_eq!(reserve(4 << 20, false).unwrap().num_regions(), 1);
    }

    #[test]
    fn windows_keep_out_of_everything_else() {
        let ram = [0..0x20_0000];
        let other = 0xc001_0000..0xc001_4000;
        let forbidden = [0x7000_0000..0x7000_1000];
        let try_window = |gpa: Range<u64>, host: u64| {
            let host = host..host + (gpa.end - gpa.start);
            check(&gpa, &host, &ram, [other.clone()].into_iter(), &forbidden)
        };
        assert!(try_window(0xc000_0000..0xc000_3000, 0x7000_1000).is_ok());
        for (gpa, host) in [
            (0x1f_f000..0x20_1000, 0x1000_0000),     // RAM
            (0xc001_3000..0xc001_5000, 0x1000_0000), // another window
            (0xe000_0000..0xe000_1000, 0x1000_0000), // ECAM
            (0xfee0_0000..0xfee0_1000, 0x1000_0000), // local APIC
            (0xc000_0800..0xc000_1800, 0x1000_0000), // not aligned
            (0xc000_0000..0xc000_0000, 0x1000_0000), // empty
            (0xc000_0000..0xc000_2000, 0x6fff_f000), // shows the forbidden page
        ] {
            assert!(try_window(gpa.clone(), host).is_err(), "{gpa:x?}");
        }
    }
}
