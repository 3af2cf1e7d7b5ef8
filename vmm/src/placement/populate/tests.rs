// SPDX-License-Identifier: Apache-2.0

use std::os::unix::fs::FileExt;

use vm_memory::{GuestAddress, MmapRegion};

use super::*;

const ORDINARY: u64 = 4096;

fn memory(len: usize) -> GuestMemoryMmap<()> {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), len)]).unwrap()
}

/// How many ordinary pages of the memory exist (Documentation/admin-guide/mm/pagemap.rst, bit 63).
fn present(memory: &GuestMemoryMmap<()>) -> u64 {
    let pagemap = File::open("/proc/self/pagemap").unwrap();
    let pages = memory.iter().flat_map(|region| {
        let start = region.as_ptr() as u64 / ORDINARY;
        start..start + region.len() / ORDINARY
    });
    pages
        .map(|page| {
            let mut entry = [0; 8];
            pagemap.read_exact_at(&mut entry, page * 8).unwrap();
            u64::from_le_bytes(entry) >> 63
        })
        .sum()
}

/// In tests a piece is small, so that several threads work here.
#[test]
fn each_page_exists_afterwards() {
    let memory = memory(34 << 20);
    assert_eq!(present(&memory), 0);
    populate(&memory, ORDINARY).unwrap();
    assert_eq!(present(&memory), (34 << 20) / ORDINARY);
}

#[test]
fn a_kernel_without_the_advice_provides_the_same_pages() {
    let memory = memory(4 << 20);
    let region = memory.iter().next().unwrap();
    touch(&Piece { region, start: 2 << 20, len: 2 << 20 }, ORDINARY).unwrap();
    assert_eq!(present(&memory), (2 << 20) / ORDINARY);
}

/// A mapping of huge pages that nothing has reserved: the first access by this process's own code would end the process.
#[test]
fn a_page_that_the_pool_lacks_is_an_error_and_no_signal() {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let flags = flags | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;
    // More than any host of these tests has.
    let len = 1 << 40;
    let Ok(region) = MmapRegion::build(None, len, libc::PROT_READ | libc::PROT_WRITE, flags) else {
        panic!("the kernel has no huge pages of 2 MiB");
    };
    let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").unwrap();
    if free.trim() != "0" {
        // Another program's pool is left alone.
        return;
    }
    let piece = Piece { region: &region, start: 0, len: 2 << 20 };
    assert!(advise(&piece).is_err());
    assert!(matches!(touch(&piece, 2 << 20), Err(PopulateError::NoPage(_))));
    let memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
    assert!(matches!(populate(&memory, 2 << 20), Err(PopulateError::NoPage(_))));
}

/// A larger pool does not help against a limit of memory.
#[test]
fn only_a_fault_means_that_the_pool_lacks_pages() {
    let of = |errno| of_kernel(io::Error::from_raw_os_error(errno));
    assert!(matches!(of(libc::EFAULT), PopulateError::NoPage(_)));
    assert!(matches!(of(libc::ENOMEM), PopulateError::Work(_)));
}
