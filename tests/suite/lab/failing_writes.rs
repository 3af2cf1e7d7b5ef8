// SPDX-License-Identifier: Apache-2.0

//! Disks in a file system whose device loses writes: the kernel's `dm-flakey`
//! (Documentation/admin-guide/device-mapper/dm-flakey.rst).

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use api::types::{VmAction, VmState};
use serde_json::json;

use crate::fixture::{Agent, Guest, SmallGuest, host};

const BYTES: u64 = 24 << 20;
/// Writes succeed, and change nothing: what a host leaves that loses its power.
const DROP: &str = "1 drop_writes";
/// Writes fail.
const ERROR: &str = "1 error_writes";

/// A file system on a device that loses writes on demand.
struct Flakey {
    below: String,
    name: String,
    place: PathBuf,
}

impl Flakey {
    fn new(directory: &Path) -> Self {
        let (file, place) = (directory.join("flakey.img"), directory.join("flakey"));
        fs::File::create(&file).unwrap().set_len(BYTES).unwrap();
        fs::create_dir(&place).unwrap();
        let below = host::run("losetup", &["--find", "--show", file.to_str().unwrap()]).trim().to_owned();
        let device = Self { below, name: format!("flakey{}", std::process::id()), place };
        let table = device.table("linear", "");
        host::run("dmsetup", &["create", "--noudevsync", &device.name, "--table", &table]);
        host::run("mke2fs", &["-q", "-t", "ext4", device.node().to_str().unwrap()]);
        device.mount();
        device
    }

    fn table(&self, target: &str, features: &str) -> String {
        // An interval of 0 seconds as `linear` does, and then one without an end.
        let intervals = if target == "flakey" { "0 3600" } else { "" };
        format!("0 {} {target} {} 0 {intervals} {features}", BYTES / 512, self.below)
    }

    /// Without udev, there is no link in /dev/mapper.
    fn node(&self) -> PathBuf {
        let devices = fs::read_dir("/sys/block").unwrap().map(|entry| entry.unwrap());
        let name = |path: PathBuf| fs::read_to_string(path.join("dm/name")).unwrap_or_default();
        let device = devices.into_iter().find(|entry| name(entry.path()).trim() == self.name).unwrap();
        Path::new("/dev").join(device.file_name())
    }

    /// Changes the device under its file system, which notices nothing.
    fn change(&self, table: &str) {
        host::run("dmsetup", &["suspend", "--nolockfs", "--noudevsync", &self.name]);
        host::run("dmsetup", &["load", &self.name, "--table", table]);
        host::run("dmsetup", &["resume", "--noudevsync", &self.name]);
    }

    fn mount(&self) {
        host::run("mount", &[self.node().to_str().unwrap(), self.place.to_str().unwrap()]);
    }

    /// Forgets all writes that the device has not taken, and makes the device good again.
    fn repair(&self) {
        host::run("umount", &[self.place.to_str().unwrap()]);
        self.change(&self.table("linear", ""));
        self.mount();
    }

    fn file(&self, name: &str) -> String {
        self.place.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Flakey {
    fn drop(&mut self) {
        let end = |program: &str, arguments: &[&str]| {
            let _ = Command::new(program).args(arguments).stderr(Stdio::null()).status();
        };
        end("umount", &["--lazy", self.place.to_str().unwrap()]);
        end("dmsetup", &["remove", "--noudevsync", &self.name]);
        end("losetup", &["--detach", &self.below]);
    }
}

/// Types commands as one line, and returns their results: each line costs the lab a while.
fn ask(guest: &mut SmallGuest<'_>, commands: &[&str]) -> Vec<String> {
    guest.guest.type_line(&commands.join("; "));
    commands.iter().map(|command| guest.result(command)).collect()
}

fn begin(agent: &Agent) -> SmallGuest<'_> {
    agent.act("web1", VmAction::Boot).unwrap();
    let mut guest = SmallGuest { guest: Guest::new(agent, "web1".to_owned()) };
    guest.wait_for_ready();
    guest
}

#[test]
fn flushed_data_survives_a_device_that_drops_writes_and_one_that_fails_them() {
    const PROBE: [&str; 2] = ["disk-probe 0", "disk-probe 1"];
    let agent = Agent::start();
    let device = Flakey::new(agent.directory());
    agent.image("base.raw", &[b'b'; 1 << 20]);
    let (raw, overlay) = (device.file("raw"), device.file("overlay.qcow2"));
    // Its sectors have room, so that only data are written.
    fs::write(&raw, vec![0; 1 << 20]).unwrap();
    let base = agent.directory().join("images/base.raw");
    let base = base.to_str().unwrap();
    host::run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, &overlay]);
    host::run("sync", &["--file-system", &raw]);
    let mut spec = SmallGuest::spec(&agent, "web1", json!([]), "");
    spec["disks"] = json!([
        { "id": "raw", "path": raw, "format": "raw" },
        { "id": "overlay", "path": overlay, "format": "qcow2", "backing": [{ "path": "base.raw", "format": "raw" }] },
    ]);
    agent.create(&spec).unwrap();
    // The rounds write different clusters: 128 and 384 are kept, 256 and 512 are lost.
    for (fault, write, kept, lost) in [
        (DROP, "disk-write 128 dropped", "disk-read 128", "disk-write 256 lost count=8"),
        (ERROR, "disk-write 384 failed", "disk-read 384", "disk-write 512 lost count=8"),
    ] {
        let mut guest = begin(&agent);
        for probe in PROBE {
            let said = ask(&mut guest, &[probe, write, "disk-flush", kept]);
            let text = write.rsplit(' ').next().unwrap();
            assert_eq!(said[1..], ["ok", "ok", &format!("ok {text}")]);
        }
        device.change(&device.table("flakey", fault));
        for (disk, probe) in ["raw", "overlay"].into_iter().zip(PROBE) {
            // The host's cache may take the data.
            let said = ask(&mut guest, &[probe, lost, "disk-flush", "disk-flush"]);
            assert!(said[1] == "ok" || (fault, said[1].as_str()) == (ERROR, "io-error"), "{said:?}");
            let flushed = if fault == ERROR { "io-error" } else { "ok" };
            assert_eq!(said[2..], [flushed; 2], "{disk}: no later flush hides the loss");
        }
        let errors = agent.stats("web1").disks.values().filter(|disk| disk.errors >= 2).count();
        assert_eq!(errors, if fault == ERROR { 2 } else { 0 });
        let status = agent.vm("web1").status;
        assert_eq!(status.state, VmState::Running);
        // As the host without power would end it.
        host::run("kill", &["-KILL", &status.pid.unwrap().to_string()]);
        agent.wait_for_state("web1", VmState::Failed);
        device.repair();
        // Leaks are harmless, and repaired here; anything else is an error.
        host::run("qemu-img", &["check", "-q", "-r", "leaks", &overlay]);
    }
    let mut guest = begin(&agent);
    for probe in PROBE {
        let commands = [probe, "disk-read 128", "disk-read 384", "disk-write 640 again", "disk-flush"];
        assert_eq!(ask(&mut guest, &commands)[1..], ["ok dropped", "ok failed", "ok", "ok"], "{probe}");
    }
    agent.act("web1", VmAction::Stop).unwrap();
    host::run("qemu-img", &["check", "-q", &overlay]);
}
