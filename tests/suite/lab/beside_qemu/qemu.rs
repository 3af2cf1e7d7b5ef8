// SPDX-License-Identifier: Apache-2.0

//! The peer: a guest under QEMU.

use std::{
    io::Read,
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::Instant,
};

use super::{BRIDGE, Host, MARKS, MEMORY, QEMUS, Times, cmdline, make_disks};
use crate::fixture::{agent::PATIENCE, host};

const TAP: &str = "qemu0";

/// A process with its guest, and its tap. They go with this value.
pub struct Qemu(Child);

impl Qemu {
    /// Boots a guest from a fresh disk. Returns the times from the command to the marks of the boot, too.
    pub fn boot(test_host: &Host, initramfs: &Path) -> (Self, Times) {
        let [system, scratch] = ["system.raw", "scratch.raw"].map(|name| test_host.path(name));
        make_disks(&system, &scratch);
        host::run("ip", &["tuntap", "add", TAP, "mode", "tap", "vnet_hdr"]);
        host::run("ip", &["link", "set", TAP, "master", BRIDGE, "up"]);
        let disk = |id: &str, path: &Path| {
            let drive = format!("if=none,id={id},format=raw,cache=writeback,file={}", path.display());
            let device = format!("virtio-blk-pci,drive={id},iothread=disks");
            ["-drive".to_owned(), drive, "-device".to_owned(), device]
        };
        let begun = Instant::now();
        let mut child = Command::new(host::lab_tool("qemu-guest"))
            .args(["--memory", MEMORY, "--append", &cmdline(), "--initrd"])
            .arg(initramfs)
            .args(["--", "-object", "iothread,id=disks", "-device", "virtio-rng-pci"])
            .args(disk("system", &system))
            .args(disk("scratch", &scratch))
            .args(["-netdev", &format!("tap,id=nic,ifname={TAP},script=no,downscript=no,vhost=off")])
            .args(["-device", &format!("virtio-net-pci,netdev=nic,mac={},romfile=", QEMUS.0)])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = child.stdout.take().unwrap();
        let qemu = Self(child);
        let (sender, receiver) = mpsc::channel();
        // It reads until the process ends: the guest's console must not get full.
        thread::spawn(move || {
            let mut portion = [0; 4096];
            while let Ok(len @ 1..) = output.read(&mut portion) {
                let text = String::from_utf8_lossy(&portion[..len]).into_owned();
                let _ = sender.send((Instant::now(), text));
            }
        });
        let deadline = Instant::now() + PATIENCE;
        let mut said = String::new();
        let times = MARKS.map(|mark| {
            let mut at = begun;
            while !said.contains(mark) {
                let left = deadline.saturating_duration_since(Instant::now());
                match receiver.recv_timeout(left) {
                    Ok((moment, text)) => {
                        at = moment;
                        said.push_str(&text);
                    }
                    Err(error) => panic!("QEMU's guest does not say {mark:?} ({error}); it said:\n{said}"),
                }
            }
            at.duration_since(begun).as_secs_f64()
        });
        (qemu, times)
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
        let _ = Command::new("ip").args(["link", "delete", TAP]).status();
    }
}
