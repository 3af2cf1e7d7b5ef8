// SPDX-License-Identifier: Apache-2.0

//! Devices other than network VFs: any MSI-X or MSI function works with its stock driver.

use std::{
    path::Path,
    sync::{Arc, Barrier},
    thread,
};

use passthrough::{hardware::VfHardware, vfio::Container};
use serde_json::json;

use super::bare_spec;
use crate::fixture::{Agent, Guest, host};

/// Writes a pattern to a disk, reads it back past the page cache, and checks that its interrupts count.
fn write_and_read(guest: &mut Guest<'_>, disk: &str, interrupt: &str) {
    guest.wait_for_shell();
    guest.must(&format!("for i in $(seq 200); do [ -b {disk} ] && break; sleep 0.05; done; [ -b {disk} ]"));
    guest.must("dd if=/dev/urandom of=/run/out bs=64k count=16 2>/dev/null");
    guest.must(&format!("dd if=/run/out of={disk} bs=64k seek=3 conv=fsync 2>/dev/null"));
    guest.must("echo 3 >/proc/sys/vm/drop_caches");
    guest.must(&format!("dd if={disk} of=/run/in bs=64k skip=3 count=16 2>/dev/null"));
    guest.must("cmp /run/in /run/out");
    let counted = guest.must(&format!("grep {interrupt} /proc/interrupts"));
    let total: u64 =
        counted.lines().filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).sum();
    assert!(total > 0 && counted.contains("PCI-MSI"), "{counted}");
}

fn with_device(name: &str, bdf: &str) -> (Agent, String) {
    let agent = Agent::with_assignable(&[bdf]);
    let before = host::driver(bdf);
    let mut spec = bare_spec(&agent, name);
    spec["devices"] = json!([bdf]);
    let initramfs = host::initramfs_with("disks", &["nvme", "ahci", "sd_mod"], &[]);
    spec["boot"]["initramfs"] = json!(agent.link_image("initrd-disks", &initramfs));
    agent.create(&spec).unwrap_or_else(|problem| panic!("{problem:?}"));
    (agent, format!("{before:?}"))
}

fn device_works(bdf: &str, disk: &str, interrupt: &str) {
    let (agent, before) = with_device("disk1", bdf);
    agent
        .act("disk1", api::types::VmAction::Boot)
        .unwrap_or_else(|problem| panic!("{problem:?}\n{}", agent.log()));
    let mut guest = Guest::new(&agent, "disk1".into());
    write_and_read(&mut guest, disk, interrupt);
    agent.delete("disk1").unwrap();
    assert_eq!(format!("{:?}", host::driver(bdf)), before);
}

#[test]
fn an_nvme_controller_reads_and_writes_with_its_stock_driver() {
    device_works(host::NVME, "/dev/nvme0n1", "nvme0q1");
}

#[test]
fn a_controller_with_msi_only_reads_and_writes_with_its_stock_driver() {
    device_works(host::AHCI, "/dev/sda", "ahci");
}

/// The relay's thread and the thread that builds the machine do this. The kernel claims a BAR at its first access,
/// and does not expect two at once.
#[test]
fn two_threads_that_touch_a_bar_first_at_the_same_time_both_get_it() {
    host::bind_vfio(host::VF0);
    for round in 0..40 {
        let container = Container::new(None).unwrap();
        let vf = Arc::new(container.open(&Path::new("/sys/bus/pci/devices").join(host::VF0)).unwrap());
        let start = Arc::new(Barrier::new(2));
        let reader = {
            let (vf, start) = (Arc::clone(&vf), Arc::clone(&start));
            thread::spawn(move || {
                start.wait();
                vf.bar_read(0, 8, &mut [0; 4]);
            })
        };
        start.wait();
        let mapped = vf.map_bar(0, 0x1000, 0x1000).map(drop);
        reader.join().unwrap();
        assert!(mapped.is_ok(), "round {round}: {mapped:?}");
        assert_eq!(vf.failures(), 0, "round {round}: the read");
    }
    host::unbind(host::VF0);
}
