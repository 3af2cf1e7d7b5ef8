// SPDX-License-Identifier: Apache-2.0

//! A disk of a VM on a block device that fails, and grows: the kernel's `scsi_debug`
//! (Documentation/scsi/scsi_debug.rst, and `modinfo scsi_debug`).

use std::{fs, path::PathBuf};

use api::{
    problem::ProblemCode,
    types::{VmAction, VmState},
};
use serde_json::json;

use crate::fixture::{Agent, Guest, SmallGuest, host};

/// Bit of `opts`: reads of ten sectors from [`BAD`] on fail.
const MEDIUM_ERRORS: &str = "2";
const BAD: u64 = 0x1234;

/// The device of `scsi_debug`. Its settings are the defaults again when this value ends.
struct Faulty(String);

impl Faulty {
    fn find() -> Self {
        let disks = fs::read_dir("/sys/block").unwrap().map(|entry| entry.unwrap().file_name());
        let mut names = disks.map(|name| name.into_string().unwrap());
        let is_faulty = |name: &String| {
            fs::read_to_string(format!("/sys/block/{name}/device/model"))
                .is_ok_and(|model| model.trim() == "scsi_debug")
        };
        Self(names.find(is_faulty).expect("the lab's host has loaded scsi_debug"))
    }

    fn path(&self) -> PathBuf {
        PathBuf::from("/dev").join(&self.0)
    }

    fn set(&self, setting: &str, value: &str) {
        let file = match setting {
            "wp" => "/sys/module/scsi_debug/parameters/wp".to_owned(),
            "rescan" => format!("/sys/block/{}/device/rescan", self.0),
            other => format!("/sys/bus/pseudo/drivers/scsi_debug/{other}"),
        };
        fs::write(&file, value).unwrap_or_else(|error| panic!("{file}: {error}"));
    }
}

impl Drop for Faulty {
    fn drop(&mut self) {
        for (setting, value) in [("opts", "0"), ("wp", "0"), ("virtual_gb", "0"), ("rescan", "1")] {
            self.set(setting, value);
        }
    }
}

#[test]
fn a_device_that_fails_fails_requests_and_one_that_grows_makes_its_disk_grow() {
    let (device, agent) = (Faulty::find(), Agent::start());
    let mut spec = SmallGuest::spec(&agent, "web1", json!([]), "");
    spec["disks"] = json!([{ "id": "data", "path": device.path(), "format": "raw" }]);
    let mut guest = SmallGuest { guest: agent.boot(&spec) };
    guest.wait_for_ready();
    assert!(guest.ask("disk-probe").ends_with(" sectors=16384"));
    assert_eq!(guest.ask("disk-write 100 kept"), "ok");
    assert_eq!(guest.ask("disk-flush"), "ok");

    device.set("opts", MEDIUM_ERRORS);
    assert_eq!(guest.ask(&format!("disk-read {BAD}")), "io-error");
    assert_eq!(guest.ask("disk-read 100"), "ok kept");
    assert_eq!(agent.stats("web1").disks["data"].errors, 1);
    device.set("opts", "0");
    assert_eq!(guest.ask(&format!("disk-read {BAD}")), "ok ");

    // The host's cache takes a write, and the device then does not. No later flush may hide that.
    device.set("wp", "1");
    assert_eq!(guest.ask("disk-write 200 lost"), "ok");
    assert_eq!(guest.ask("disk-flush"), "io-error");
    device.set("wp", "0");
    assert_eq!(guest.ask("disk-flush"), "io-error", "the data of sector 200 is lost");
    assert_eq!(agent.vm("web1").status.state, VmState::Running);

    agent.act("web1", VmAction::Stop).unwrap();
    let without_cache =
        json!([{ "id": "data", "path": device.path(), "format": "raw", "cache": "none", "discard": true }]);
    agent.ask(agent.client.patch_vm("web1", &json!({ "disks": without_cache }), None)).unwrap();
    agent.act("web1", VmAction::Boot).unwrap();
    guest.guest = Guest::new(&agent, "web1".to_owned());
    guest.wait_for_ready();
    guest.ask("disk-probe");
    assert_eq!(guest.ask("disk-read 100"), "ok kept");
    device.set("wp", "1");
    assert_eq!(guest.ask("disk-write 300 never"), "io-error", "at once");
    device.set("wp", "0");
    assert_eq!(guest.ask("disk-write 300 again"), "ok");
    assert_eq!(guest.ask("disk-flush"), "ok");

    let resize = |size: &str| {
        let wanted = serde_json::from_value(json!({ "disk": "data", "size": size })).unwrap();
        agent.ask(agent.client.resize_disk("web1", &wanted))
    };
    let problem = resize("1GiB").unwrap_err();
    assert_eq!(problem.code, ProblemCode::DiskInvalid);
    assert!(problem.detail.contains("enlarge it first"), "{}", problem.detail);
    device.set("virtual_gb", "1");
    device.set("rescan", "1");
    resize("1GiB").unwrap();
    assert_eq!(guest.ask("disk-size"), "changed sectors=2097152");
    assert_eq!(guest.ask("disk-read 300"), "ok again");
    agent.act("web1", VmAction::Stop).unwrap();
    host::run("sync", &[]);
}
