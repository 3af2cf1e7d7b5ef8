// SPDX-License-Identifier: Apache-2.0

//! The body of a fuzz target: it takes any bytes and asserts only laws. A property test runs it, too.
#![allow(clippy::panic, reason = "a broken law is to end the fuzzer")]

use std::{fs::File, io::Write, os::fd::OwnedFd};

use linux_loader::loader::bootparam::boot_params;
use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{Bytes, GuestAddress};

use super::{Payload, Source, acpi, load};
use crate::{
    layout,
    memory::{self, GuestMemory},
    vcpu::state::Entry,
};

/// The guest's memory in bytes.
const MEMORY: u64 = 4 << 20;

const CMDLINE: &str = "console=ttyS0";

thread_local! {
    /// One mapping for all runs: a new one would be most of the work. No run reads the rest of an earlier one.
    static GUEST: GuestMemory = memory::reserve(MEMORY, memory::Pages::Ordinary, None).unwrap_or_else(|error| panic!("{error}"));
}

fn file(bytes: &[u8]) -> File {
    let made = memfd_create("fuzz", MemfdFlags::CLOEXEC).map(|fd: OwnedFd| File::from(fd));
    let written =
        made.map_err(std::io::Error::from).and_then(|mut file| file.write_all(bytes).map(|()| file));
    written.unwrap_or_else(|error| panic!("{error}"))
}

/// Takes a kernel image, and an initramfs of some pages if the first byte says so. The loader must load or refuse it,
/// and leave its own tables intact.
pub fn fuzz_kernel(data: &[u8]) {
    let Some((pages, kernel)) = data.split_first() else { return };
    let initramfs = vec![0xa5; usize::from(*pages) * 4096 + 1];
    let initramfs = (*pages > 0).then_some(initramfs);
    let mut payload = Payload {
        source: Source::Files {
            kernel: file(kernel),
            initramfs: initramfs.as_deref().map(file).into_iter().collect(),
        },
        cmdline: CMDLINE.to_owned(),
        smbios: Vec::new(),
    };
    let machine = acpi::Description { cpus: 1, devices: Vec::new() };
    GUEST.with(|guest| {
        let Ok(entry) = load(guest, &mut payload, &machine) else { return };
        let read = |at: u64, len: usize| {
            let mut bytes = vec![0; len];
            let result = guest.read_slice(&mut bytes, GuestAddress(at));
            result.unwrap_or_else(|error| panic!("{at:#x}: {error}"));
            bytes
        };
        assert_eq!(read(layout::CMDLINE, CMDLINE.len() + 1), [CMDLINE.as_bytes(), b"\0"].concat());
        assert_eq!(read(layout::ACPI.start, 8), b"RSD PTR ");
        if let Entry::Linux64 { .. } = entry {
            let params: boot_params =
                guest.read_obj(GuestAddress(layout::BOOT_PARAMS)).unwrap_or_else(|error| panic!("{error}"));
            // A copy: the structure is packed.
            let (at, size) = (params.hdr.ramdisk_image, params.hdr.ramdisk_size);
            if let Some(initramfs) = &initramfs {
                assert_eq!(size as usize, initramfs.len());
                assert!(
                    read(at.into(), initramfs.len()) == *initramfs,
                    "the initramfs at {at:#x} is damaged"
                );
            }
        }
        // A second boot must load the same image.
        assert!(load(guest, &mut payload, &machine).is_ok(), "a second boot");
    });
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Images that are well-formed, or nearly.
    fn seeds() -> Vec<Vec<u8>> {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds/kernel");
        std::fs::read_dir(dir).unwrap().map(|entry| std::fs::read(entry.unwrap().path()).unwrap()).collect()
    }

    #[test]
    fn the_seeds_hold() {
        let seeds = seeds();
        assert!(seeds.len() >= 5);
        seeds.iter().for_each(|seed| fuzz_kernel(seed));
    }

    proptest! {
        #[test]
        fn whatever_is_in_the_headers(
            pick: prop::sample::Index,
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
            cut in prop::option::of(any::<prop::sample::Index>()),
        ) {
            let mut image = pick.get(&seeds()).clone();
            for (at, byte) in changes {
                let at = at.index(image.len());
                image[at] = byte;
            }
            if let Some(cut) = cut {
                image.truncate(cut.index(image.len()));
            }
            fuzz_kernel(&image);
        }
    }
}
