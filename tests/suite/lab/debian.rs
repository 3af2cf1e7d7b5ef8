// SPDX-License-Identifier: Apache-2.0

//! A Debian with systemd that boots from its disk, and drives its VF under policy.

use std::{process::Command, time::Instant};

use api::types::{VmAction, VmState};
use serde_json::{Value, json};

use super::policy::in_group;
use crate::fixture::{Agent, Guest, agent::PATIENCE, host};

fn spec(agent: &Agent) -> Value {
    json!({
        "name": "debian",
        "cpus": 1,
        "memory": "512MiB",
        "entropy": true,
        "boot": {
            "kernel": agent.link_image("vmlinux", &host::kernel(true)),
            "initramfs": agent.link_image("initrd-for-disk", &host::initramfs_for_disk()),
            "cmdline": "console=ttyS0 quiet mitigations=off nokaslr",
        },
        "disks": [{ "id": "root", "path": host::DEBIAN, "format": "raw" }],
        "adapters": [{ "id": "eth0", "port_group": "web", "mac": "02:00:00:00:0a:01" }],
    })
}

/// Waits for the prompt, logs in, and leaves a shell without echo.
fn log_in(guest: &mut Guest<'_>) {
    guest.wait_for_within("login: ", PATIENCE * 3);
    guest.type_line("root");
    guest.wait_for("# ");
    // The prompt in two parts: the echo of this line is none.
    guest.type_line("bind 'set enable-bracketed-paste off'; stty -echo cols 1000; PS1='guest''# '");
    guest.wait_for("guest# ");
}

/// Checks the file system on the disk, and lets the check replay its journal: a killed guest leaves one.
fn file_system_is_whole() {
    for arguments in [&["-p", host::DEBIAN], &["-fn", host::DEBIAN]] {
        let output = Command::new("e2fsck").args(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
    }
}

#[test]
fn a_debian_boots_from_its_disk_keeps_its_data_and_obeys_policy() {
    let agent = in_group(Agent::start(), &json!({ "mac_changes": "reject" }));
    let begun = Instant::now();
    let mut guest = agent.boot(&spec(&agent));
    log_in(&mut guest);
    println!("login after {:?}", begun.elapsed());
    guest.must("mountpoint -q / && grep -q '/dev/vda / ext4 rw' /proc/mounts");
    assert_eq!(guest.must("cat /sys/block/vda/serial"), "root");
    assert!(guest.must("cat /sys/class/misc/hw_random/rng_available").contains("virtio_rng"));

    // udev names it after its slot.
    let vf = guest.must("ls /sys/class/net | grep -v lo");
    let refused = guest.run(&format!("ip link set dev {vf} address 02:00:00:00:0a:77"));
    assert!(refused.status != 0 && refused.text.contains("Cannot assign requested address"), "{refused:?}");
    guest.must("dd if=/dev/urandom of=/root/data bs=64k count=32 conv=fsync 2>/dev/null");
    let sum = guest.must("sha256sum /root/data");

    // A kill loses only what the guest had not flushed.
    let pid = agent.vm("debian").status.pid.unwrap();
    host::run("kill", &["-KILL", &pid.to_string()]);
    agent.wait_for_state("debian", VmState::Failed);
    file_system_is_whole();
    agent.act("debian", VmAction::Boot).unwrap();
    guest.begin_anew();
    log_in(&mut guest);
    assert_eq!(guest.must("sha256sum /root/data"), sum);
    guest.must("echo second >/root/second; sync /root/second");

    guest.type_line("reboot");
    log_in(&mut guest);
    assert_eq!(guest.must("sha256sum /root/data; cat /root/second"), format!("{sum}\nsecond"));
    let stats = agent.stats("debian").disks["root"];
    assert!(stats.reads > 100 && stats.writes > 10 && stats.flushes > 0 && stats.errors == 0, "{stats:?}");

    guest.type_line("poweroff");
    agent.wait_for_state("debian", VmState::Stopped);
    file_system_is_whole();
}
