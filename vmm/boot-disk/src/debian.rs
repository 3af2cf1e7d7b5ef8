// SPDX-License-Identifier: Apache-2.0

//! The links that Debian and Ubuntu keep to their newest kernel, in the root directory or in `/boot`.

use crate::{entry::Draft, error::Fault, filesystem::FileSystem};

/// Links to the kernel, each with those to its initramfs.
const LINKS: [(&str, &[&str]); 2] =
    [("/vmlinuz", &["/initrd.img"]), ("/boot/vmlinuz", &["/boot/initrd.img", "/boot/initrd"])];

/// The kernel behind the first link that leads to one, with its initramfs if there is one. This place has no command line.
pub(crate) fn find(files: &dyn FileSystem) -> Result<Draft, Fault> {
    for (kernel, initramfs) in LINKS {
        let opened = match files.open(kernel) {
            Err(fault) if fault.is_absence() => continue,
            opened => opened?,
        };
        let mut parts = Vec::new();
        for path in initramfs {
            match files.open(path) {
                Err(fault) if fault.is_absence() => {}
                part => {
                    parts.push(part?);
                    break;
                }
            }
        }
        return Ok(Draft::files(kernel, opened, parts));
    }
    Err(Fault::Absent("/vmlinuz or /boot/vmlinuz".to_owned()))
}
