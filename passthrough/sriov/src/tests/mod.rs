// SPDX-License-Identifier: Apache-2.0

//! Tests of the host side against fakes, by topic.

mod binding;
mod control;
mod group;
mod inventory;

use super::{
    fake::{FakePf, FakeSysfs},
    *,
};

fn bdf(text: &str) -> Bdf {
    text.parse().unwrap()
}

/// An 82576 with `vfs` VFs bound to igbvf, an NVMe drive alone in its group, and two e1000 behind a bridge.
fn machine(vfs: u16) -> (tempfile::TempDir, FakeSysfs) {
    let dir = tempfile::tempdir().unwrap();
    let fake = FakeSysfs::new(dir.path());
    fake.add_igb(bdf("0000:01:00.0"), "eth0");
    fake.add_device(bdf("0000:02:00.0"), (0x1b36, 0x0010), 0x01_0802, Some(2), Some("nvme"));
    fake.add_device(bdf("0000:04:00.0"), (0x1b36, 0x000e), 0x06_0400, Some(4), Some("pcieport"));
    fake.add_device(bdf("0000:05:01.0"), (0x8086, 0x100e), 0x02_0000, Some(4), Some("e1000"));
    fake.add_device(bdf("0000:05:02.0"), (0x8086, 0x100e), 0x02_0000, Some(4), Some("e1000"));
    fake.add_device(bdf("0000:00:1f.0"), (0x8086, 0x2918), 0x06_0100, None, None);
    if vfs > 0 {
        fake.sysfs().set_num_vfs(bdf("0000:01:00.0"), vfs, None).unwrap();
    }
    fake.take_writes();
    (dir, fake)
}
