// SPDX-License-Identifier: Apache-2.0

//! Disks that grow while their guests run.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
    time::Duration,
};

use api::{
    problem::{Problem, ProblemCode},
    types::VmAction,
};
use serde_json::json;

use super::disks::{SIZE, boot, sector, spec};
use crate::fixture::{Agent, Options, host};

/// A guest sees its disk grow, over a reboot too. The file is as long as the disk. The lab has a process with limits: to raise
/// them takes CAP_SYS_RESOURCE, which root in a container may lack.
#[test]
fn a_disk_grows_while_its_guest_runs() {
    let agent = Agent::start_with(Options::for_tests(&["--sandbox-off", "limits"]));
    let raw = agent.disk("a.raw", SIZE);
    let base = agent.disk("base.raw", 2 * SIZE);
    File::options().write(true).open(&base).unwrap().write_all_at(b"hidden", SIZE).unwrap();
    let image = base.with_file_name("b.qcow2");
    let options = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base.raw"];
    host::run("qemu-img", &[&options[..], &[image.to_str().unwrap(), "1M"]].concat());
    let disks = json!([
        {"id": "a", "path": "a.raw", "format": "raw"},
        {"id": "b", "path": "b.qcow2", "format": "qcow2", "backing": [{"path": "base.raw", "format": "raw"}]},
        {"id": "c", "path": "base.raw", "format": "raw", "read_only": true},
    ]);
    let mut guest = boot(&agent, &spec(&agent, "web1", disks));
    let resize = |disk: &str, size: &str| {
        let wanted = serde_json::from_value(json!({"disk": disk, "size": size})).unwrap();
        agent.ask(agent.client.resize_disk("web1", &wanted))
    };
    let problem = |refused: Result<_, Problem>| refused.unwrap_err();
    let last = |size: u64| size / 512 - 1;
    for (index, disk, size) in [(0, "a", 64 << 20), (1, "b", 4 << 30)] {
        guest.ask(&format!("disk-probe {index}"));
        assert_eq!(guest.ask("disk-size"), "same sectors=2048");
        resize(disk, &size.to_string()).unwrap();
        assert_eq!(guest.ask("disk-size"), format!("changed sectors={}", size / 512));
        assert_eq!(guest.ask("disk-read 2048"), "ok ", "{disk}: the new part is empty");
        assert_eq!(guest.ask(&format!("disk-write {} end", last(size))), "ok");
        assert_eq!(guest.ask("disk-flush"), "ok");
        resize(disk, &size.to_string()).unwrap();
        assert_eq!(guest.ask("disk-size"), format!("same sectors={}", size / 512));
        let smaller = problem(resize(disk, "1MiB"));
        assert_eq!(smaller.code, ProblemCode::DiskInvalid);
        assert!(smaller.detail.contains("cannot become smaller"), "{}", smaller.detail);
    }
    assert_eq!((fs::metadata(&raw).unwrap().len(), sector(&raw, last(64 << 20))), (64 << 20, "end".into()));
    assert_eq!(
        problem(resize("b", "9223372036854775296")).code,
        ProblemCode::DiskInvalid,
        "the format's limit"
    );
    assert_eq!(problem(resize("a", "1000")).code, ProblemCode::InvalidRequest);
    assert_eq!(problem(resize("c", "4MiB")).code, ProblemCode::DiskInvalid, "it is read-only");
    assert_eq!(problem(resize("d", "4MiB")).code, ProblemCode::NotFound);
    assert_eq!(guest.ask("reboot"), "ok");
    guest.wait_for_ready();
    assert!(guest.ask("disk-probe 1").ends_with(" sectors=8388608"));
    assert_eq!(guest.ask(&format!("disk-read {}", last(4 << 30))), "ok end");
    agent.act("web1", VmAction::Pause).unwrap();
    assert_eq!(problem(resize("a", "128MiB")).code, ProblemCode::WrongState);
    agent.act("web1", VmAction::Stop).unwrap();
    assert_eq!(problem(resize("a", "128MiB")).code, ProblemCode::WrongState);
    host::run("qemu-img", &["check", "-q", image.to_str().unwrap()]);
}

/// To hide a long base takes seconds, which nobody has to wait for.
#[test]
fn a_pause_or_a_stop_ends_a_growth_and_the_disk_keeps_its_size() {
    let agent = Agent::start_with(Options::for_tests(&["--sandbox-off", "limits"]));
    let base = agent.disk("base.raw", 1 << 40);
    let image = base.with_file_name("b.qcow2");
    let options = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-F", "raw", "-b", "base.raw"];
    host::run("qemu-img", &[&options[..], &[image.to_str().unwrap(), "1M"]].concat());
    let disks = json!([
        {"id": "b", "path": "b.qcow2", "format": "qcow2", "backing": [{"path": "base.raw", "format": "raw"}]},
    ]);
    let mut guest = boot(&agent, &spec(&agent, "web1", disks));
    guest.ask("disk-probe");
    let wanted = serde_json::from_value(json!({"disk": "b", "size": "1TiB"})).unwrap();
    for action in [VmAction::Pause, VmAction::Stop] {
        let both = async {
            let later = async {
                tokio::time::sleep(Duration::from_millis(300)).await;
                agent.client.act("web1", action, Duration::from_secs(20)).await
            };
            let (grown, ended) = tokio::join!(agent.client.resize_disk("web1", &wanted), later);
            ended.and(grown)
        };
        let problem = agent.ask(both).unwrap_err();
        assert_eq!(problem.code, ProblemCode::WrongState, "{problem}");
        if action == VmAction::Pause {
            agent.act("web1", VmAction::Resume).unwrap();
            assert_eq!(guest.ask("disk-size"), "same sectors=2048");
            assert_eq!(guest.ask("disk-write 2047 end"), "ok");
            assert_eq!(guest.ask("disk-flush"), "ok");
        }
    }
    host::run("qemu-img", &["check", "-q", image.to_str().unwrap()]);
    let info = host::run("qemu-img", &["info", "--output=json", image.to_str().unwrap()]);
    assert!(info.contains("\"virtual-size\": 1048576"), "{info}");
}
