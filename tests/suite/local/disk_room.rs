// SPDX-License-Identifier: Apache-2.0

//! Disks on a file system of the host that is full.

use std::{
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use api::types::{CauseCode, VmAction, VmState};
use serde_json::{Value, json};

use super::disks::{boot, qemu_img, sector, spec};
use crate::fixture::{Agent, SmallGuest, host};

/// A small file system below the agent's directory.
pub(super) struct Small(PathBuf);

impl Small {
    pub(super) fn mount(agent: &Agent) -> Self {
        let path = agent.directory().join("small");
        fs::create_dir(&path).unwrap();
        host::run("mount", &["-t", "tmpfs", "-o", "size=8m,mode=755", "none", path.to_str().unwrap()]);
        Self(path)
    }

    pub(super) fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    pub(super) fn fill(&self) {
        let mut file = File::create(self.0.join("filler")).unwrap();
        while file.write_all(&[1; 4096]).is_ok() {}
    }

    pub(super) fn make_room(&self) {
        fs::remove_file(self.0.join("filler")).unwrap();
    }

    /// Free bytes.
    pub(super) fn room(&self) -> u64 {
        let stat = rustix::fs::statvfs(&self.0).unwrap();
        stat.f_bfree * stat.f_frsize
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // A process that a failed test has left may still use it.
        host::run("umount", &["--lazy", self.0.to_str().unwrap()]);
    }
}

/// A guest with a raw disk and an image.
fn start<'a>(agent: &'a Agent, small: &Small, on_full: &str) -> SmallGuest<'a> {
    File::create(small.path("raw")).unwrap().set_len(1 << 20).unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", &small.path("image"), "1M"]);
    let disk = |id: &str, format: &str| -> Value {
        json!({"id": id, "path": small.path(id), "format": format, "on_full": on_full})
    };
    boot(agent, &spec(agent, "web1", json!([disk("raw", "raw"), disk("image", "qcow2")])))
}

#[test]
fn a_vm_is_paused_while_its_file_system_is_full_and_loses_nothing() {
    let agent = Agent::start();
    let small = Small::mount(&agent);
    let mut guest = start(&agent, &small, "pause");
    for (index, name) in [(0, "raw"), (1, "image")] {
        guest.ask(&format!("disk-probe {index}"));
        assert_eq!(guest.ask("disk-write 5 before"), "ok");
        small.fill();
        guest.guest.type_line(&format!("disk-write 800 {name} count=8 patience=60"));
        agent.wait_for_state("web1", VmState::Paused);
        let cause = agent.vm("web1").status.cause.unwrap();
        assert_eq!(cause.code, CauseCode::DiskFull);
        for word in [name, &small.path(name), "make room", "portcullis vm resume web1"] {
            assert!(cause.detail.contains(word), "{word}: {}", cause.detail);
        }
        // Without room a request to go on leads to another pause.
        agent.act("web1", VmAction::Resume).unwrap();
        agent.wait_for_state("web1", VmState::Paused);
        thread::sleep(Duration::from_millis(200));
        assert_eq!(agent.vm("web1").status.state, VmState::Paused);
        small.make_room();
        agent.wait_for_state("web1", VmState::Running);
        assert_eq!(guest.result(&format!("disk-write 800 {name} count=8 patience=60")), "ok");
        assert_eq!(agent.vm("web1").status.cause, None);
        assert_eq!(guest.ask("disk-flush"), "ok");
        assert_eq!(guest.ask("disk-read 5"), "ok before");
        assert_eq!(guest.ask("disk-read 807"), format!("ok {name}"));
        assert_eq!(agent.stats("web1").disks[name].errors, 0);
    }
    agent.act("web1", VmAction::Stop).unwrap();
    assert_eq!(sector(Path::new(&small.path("raw")), 803), "raw");
    qemu_img(&["check", "-q", &small.path("image")]);
    let flat = agent.directory().join("flat.raw");
    qemu_img(&["convert", "-O", "raw", &small.path("image"), flat.to_str().unwrap()]);
    assert_eq!((sector(&flat, 5), sector(&flat, 800)), ("before".into(), "image".into()));
}

#[test]
fn a_disk_can_report_a_full_file_system_to_its_guest() {
    let agent = Agent::start();
    let small = Small::mount(&agent);
    let mut guest = start(&agent, &small, "error");
    guest.ask("disk-probe");
    small.fill();
    assert_eq!(guest.ask("disk-write 800 text count=8"), "io-error");
    assert_eq!(agent.vm("web1").status.state, VmState::Running);
    assert_eq!(agent.stats("web1").disks["raw"].errors, 1);
    small.make_room();
    assert_eq!(guest.ask("disk-write 800 text count=8"), "ok");
}
