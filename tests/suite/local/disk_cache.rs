// SPDX-License-Identifier: Apache-2.0

//! Disks without the host's page cache.

use std::{fs, os::unix::fs::MetadataExt as _, path::Path};

use api::{problem::ProblemCode, types::VmAction};
use serde_json::json;

use super::disks::{SIZE, boot, sector, spec};
use crate::fixture::{Agent, host};

/// A flag of open(2), on x86.
const O_DIRECT: i32 = 0o40000;

/// The flags of a process's descriptor of a file (`O_…`).
fn flags_of(pid: u32, file: &Path) -> i32 {
    let wanted = fs::metadata(file).unwrap().ino();
    let mut fds = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().map(|entry| entry.unwrap().path());
    let fd = fds.find(|fd| fs::metadata(fd).is_ok_and(|data| data.ino() == wanted)).expect("it has the file");
    let name = fd.file_name().unwrap().to_str().unwrap();
    let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{name}")).unwrap();
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
    i32::from_str_radix(flags.trim(), 8).unwrap()
}

#[test]
fn a_disk_without_the_hosts_cache_works_as_any_other() {
    let agent = Agent::start();
    let (raw, other) = (agent.disk("a.raw", SIZE), agent.disk("c.raw", SIZE));
    agent.disk("odd.raw", SIZE + 512);
    let image = raw.with_file_name("b.qcow2");
    let options = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "c.raw"];
    host::run("qemu-img", &[&options[..], &[image.to_str().unwrap(), "1M"]].concat());
    let disks = json!([
        {"id": "a", "path": "a.raw", "format": "raw", "cache": "none"},
        {"id": "b", "path": "b.qcow2", "format": "qcow2", "backing": [{"path": "c.raw", "format": "raw"}], "cache": "none"},
    ]);
    let mut guest = boot(&agent, &spec(&agent, "web1", disks));
    let pid = agent.vm("web1").status.pid.unwrap();
    for (file, direct) in [(&raw, true), (&image, true), (&other, false)] {
        assert_eq!(flags_of(pid, file) & O_DIRECT != 0, direct, "{}", file.display());
    }
    for index in 0..2 {
        guest.ask(&format!("disk-probe {index}"));
        // The guest's buffers are aligned to sectors, not to blocks of 4 KiB.
        for (sector, count) in [(0, 8), (9, 1), (2043, 5), (100, 3)] {
            assert_eq!(guest.ask(&format!("disk-write {sector} at{sector} count={count}")), "ok");
        }
        assert_eq!(guest.ask("disk-zero 2 count=3"), "ok");
        assert_eq!(guest.ask("disk-flush"), "ok");
        assert_eq!(guest.ask("disk-read 0 count=6"), "ok at0|at0||||at0");
        assert_eq!(guest.ask("disk-read 8 count=3"), "ok |at9|");
        assert_eq!(guest.ask("disk-read 2042 count=6"), "ok |at2043|at2043|at2043|at2043|at2043");
    }
    assert_eq!((sector(&raw, 102), fs::metadata(&raw).unwrap().len()), ("at100".into(), SIZE));
    agent.act("web1", VmAction::Stop).unwrap();
    host::run("qemu-img", &["check", "-q", image.to_str().unwrap()]);
    let mut odd =
        spec(&agent, "web2", json!([{"id": "a", "path": "odd.raw", "format": "raw", "cache": "none"}]));
    agent.create(&odd).unwrap();
    let problem = agent.act("web2", VmAction::Boot).unwrap_err();
    assert_eq!(problem.code, ProblemCode::DiskInvalid);
    assert!(problem.detail.contains("--size=%4096"), "{}", problem.detail);
    odd["name"] = json!("web3");
    odd["disks"][0]["ephemeral"] = json!(true);
    assert_eq!(agent.create(&odd).unwrap_err().field.as_deref(), Some("disks[0].cache"));
}
