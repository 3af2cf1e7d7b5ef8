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
use protocol::MachineSpec;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

use crate::{
    layout,
    placement::{self, PopulateError},
};

/// Guest memory: anonymous mappings, no dirty bitmap.
pub type GuestMemory = GuestMemoryMmap<()>;

const PAGE: u64 = 4096;

/// The pages of guest memory on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    /// The kernel chooses them, and may swap them.
    Ordinary,
    /// Huge pages of 2 MiB from the host's pool.
    Huge,
    /// Huge pages of 1 GiB from the host's pool.
    Giant,
}

impl Pages {
    /// The pages of a specification.
    #[must_use]
    pub fn of(spec: &MachineSpec) -> Self {
        match (spec.hugepages, spec.placement.giant_pages) {
            (false, _) => Self::Ordinary,
            (true, false) => Self::Huge,
            (true, true) => Self::Giant,
        }
    }

    /// The size in MiB of a huge page; None for ordinary pages.
    fn mib(self) -> Option<u64> {
        match self {
            Self::Ordinary => None,
            Self::Huge => Some(2),
            Self::Giant => Some(1024),
        }
    }

    /// The unit of guest memory in bytes.
    fn step(self) -> u64 {
        self.mib().map_or(layout::MEMORY_STEP, |mib| mib << 20)
    }

    fn flags(self) -> libc::c_int {
        match self {
            Self::Ordinary => libc::MAP_NORESERVE,
            Self::Huge => libc::MAP_HUGETLB | libc::MAP_HUGE_2MB,
            Self::Giant => libc::MAP_HUGETLB | libc::MAP_HUGE_1GB,
        }
    }
}

/// Errors of guest memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Not a multiple of the page size, or too small.
    #[error("Guest memory of {0} bytes is not a multiple of {1} MiB; round it up")]
    Size(u64, u64),
    /// `mmap` failed for ordinary pages.
    #[error("Cannot reserve {0} MiB of guest memory; free memory on the host or make the VM smaller")]
    Reserve(u64, #[source] vm_memory::mmap::MmapRegionError),
    /// `mmap` failed for huge pages.
    #[error(
        "Cannot reserve {mib} MiB of guest memory in huge pages of {page} MiB; raise \
         /sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages by {pages}, raise hugetlb.*.max and hugetlb.*.rsvd.max of the \
         control groups above the VM's, or turn hugepages off",
        kib = page << 10, pages = mib.div_ceil(*page)
    )]
    HugePages {
        /// Guest memory in MiB.
        mib: u64,
        /// The size of a page in MiB.
        page: u64,
        /// The kernel's error.
        source: vm_memory::mmap::MmapRegionError,
    },
    /// The host's pool of huge pages has none left, or none on the node, or a control group may not have more.
    #[error(
        "The host has too few free huge pages of {page} MiB for {mib} MiB of guest memory{on}; raise nr_hugepages in {pool}, \
         raise hugetlb.*.max of the control groups above the VM's, choose another node or turn hugepages off",
        on = node.map(|node| format!(" on NUMA node {node}")).unwrap_or_default(),
        pool = pool(*node, *page),
    )]
    NoPages {
        /// Guest memory in MiB.
        mib: u64,
        /// The size of a page in MiB.
        page: u64,
        /// The node.
        node: Option<u16>,
        /// The kernel's error.
        source: io::Error,
    },
    /// Huge pages cannot be filled, though the pool may have enough.
    #[error(
        "Cannot fill {0} MiB of guest memory in huge pages; check the limits of memory (memory.max) and of threads (pids.max) of \
         the VM's control group and those above it, and free memory on the host"
    )]
    Fill(u64, #[source] io::Error),
    /// The kernel refuses a NUMA node.
    #[error(
        "The host's kernel refuses guest memory on NUMA node {0}: name a node that has memory and is in the cpuset of the \
         VM's process (/sys/devices/system/node/has_memory)"
    )]
    Node(u16, #[source] io::Error),
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

/// The directory of a pool of huge pages of `page` MiB.
fn pool(node: Option<u16>, page: u64) -> String {
    let of = node.map_or("kernel/mm".into(), |node| format!("devices/system/node/node{node}"));
    format!("/sys/{of}/hugepages/hugepages-{}kB", page << 10)
}

/// Reserves guest memory, on the NUMA `node` if there is one. The host's kernel provides pages on first touch; for huge
/// pages, call [`populate`] before the guest runs.
///
/// # Errors
/// See [`MemoryError`].
pub fn reserve(size: u64, pages: Pages, node: Option<u16>) -> Result<GuestMemory, MemoryError> {
    let wrong = || MemoryError::Size(size, pages.step() >> 20);
    if size < layout::MEMORY_MIN || !size.is_multiple_of(pages.step()) {
        return Err(wrong());
    }
    let mib = size >> 20;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | pages.flags();
    let mut regions = Vec::new();
    for range in layout::ram(size) {
        let len = usize::try_from(range.end - range.start).map_err(|_| wrong())?;
        let region =
            MmapRegion::build(None, len, libc::PROT_READ | libc::PROT_WRITE, flags).map_err(|source| {
                match pages.mib() {
                    Some(page) => MemoryError::HugePages { mib, page, source },
                    None => MemoryError::Reserve(mib, source),
                }
            })?;
        if let Some(node) = node {
            placement::bind(&region, node).map_err(|source| MemoryError::Node(node, source))?;
        }
        keep_out_of_core_dumps(&region);
        regions.push(GuestRegionMmap::new(region, GuestAddress(range.start)).ok_or_else(wrong)?);
    }
    GuestMemory::from_regions(regions).map_err(MemoryError::Regions)
}

/// Makes the host's kernel provide all huge pages, so that none is missing while the guest runs. Does nothing for ordinary
/// pages. It starts threads, and has ended them when it returns.
///
/// # Errors
/// [`MemoryError::NoPages`] and [`MemoryError::Fill`].
pub fn populate(memory: &GuestMemory, pages: Pages, node: Option<u16>) -> Result<(), MemoryError> {
    let Some(page) = pages.mib() else { return Ok(()) };
    let mib = memory.iter().map(|region| region.len() >> 20).fold(0, u64::saturating_add);
    placement::populate(memory, page << 20).map_err(|error| match error {
        PopulateError::NoPage(source) => MemoryError::NoPages { mib, page, node, source },
        PopulateError::Work(source) => MemoryError::Fill(mib, source),
    })
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
        let reserve = |size, pages| reserve(size, pages, None);
        assert!(matches!(reserve((2 << 20) + 4096, Pages::Ordinary), Err(MemoryError::Size(_, 2))));
        assert!(matches!(reserve(0, Pages::Ordinary), Err(MemoryError::Size(0, 2))));
        assert!(matches!(reserve(1026 << 20, Pages::Giant), Err(MemoryError::Size(_, 1024))));
        assert_eq!(reserve(4 << 20, Pages::Ordinary).unwrap().num_regions(), 1);
    }

    /// No host has so many pages.
    #[test]
    fn a_pool_that_is_too_small_is_named_with_its_pages() {
        for (pages, cure) in [
            (Pages::Huge, "hugepages-2048kB/nr_hugepages by 33554432"),
            (Pages::Giant, "hugepages-1048576kB/nr_hugepages by 65536"),
        ] {
            let error = reserve(64 << 40, pages, None).unwrap_err();
            assert!(error.to_string().contains(cure), "{error}");
        }
    }

    #[test]
    fn a_node_that_the_host_lacks_is_refused() {
        let error = reserve(4 << 20, Pages::Ordinary, Some(1023)).unwrap_err();
        assert!(matches!(error, MemoryError::Node(1023, _)), "{error}");
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
