// SPDX-License-Identifier: Apache-2.0

//! Disks in qcow2 images.

use std::{
    fs::{self, File},
    thread,
    time::Duration,
};

use api::{
    problem::ProblemCode,
    types::{VmAction, VmState},
};
use serde_json::json;

use super::disks::{SIZE, boot, kills, qemu_img, sector, spec};
use crate::fixture::{Agent, SmallGuest, host};

#[test]
fn an_overlay_keeps_changes_and_its_base_stays_as_it_is() {
    let agent = Agent::start();
    agent.image("base.raw", &[b'b'; 1 << 20]);
    let base = agent.directory().join("images/base.raw");
    let overlay = agent.directory().join("disks/web1.qcow2");
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-F",
        "raw",
        "-b",
        base.to_str().unwrap(),
        overlay.to_str().unwrap(),
    ]);
    let backing = json!([{"path": "base.raw", "format": "raw"}]);
    let disks =
        json!([{"id": "root", "path": "web1.qcow2", "format": "qcow2", "backing": backing, "discard": true}]);
    let mut guest = boot(&agent, &spec(&agent, "web1", disks));
    assert!(guest.ask("disk-probe").ends_with(" sectors=2048"));
    assert!(guest.ask("disk-read 7").starts_with("ok bbb"));
    assert_eq!(guest.ask("disk-write 5 hello count=2"), "ok");
    assert_eq!(guest.ask("disk-flush"), "ok");
    assert_eq!(guest.ask("disk-discard 1024 count=1024"), "ok");
    assert_eq!(guest.ask("disk-read 1024"), "ok ", "a discarded cluster does not show its backing file");
    // Not flushed by the guest: an orderly end keeps it.
    assert_eq!(guest.ask("disk-write 300 unflushed"), "ok");
    agent.act("web1", VmAction::Stop).unwrap();
    let flat = agent.directory().join("flat.raw");
    qemu_img(&["convert", "-O", "raw", overlay.to_str().unwrap(), flat.to_str().unwrap()]);
    assert_eq!(
        (sector(&flat, 5), sector(&flat, 6), sector(&flat, 300)),
        ("hello".into(), "hello".into(), "unflushed".into())
    );
    assert_eq!(sector(&flat, 8), "b".repeat(512));
    qemu_img(&["check", "-q", overlay.to_str().unwrap()]);
    assert!(fs::read(&base).unwrap().iter().all(|byte| *byte == b'b'));
    agent.act("web1", VmAction::Boot).unwrap();
    guest.guest.begin_anew();
    guest.wait_for_ready();
    guest.ask("disk-probe");
    assert_eq!(guest.ask("disk-read 5"), "ok hello");
}

/// The kills come at any moment of a guest's writes into new clusters.
#[test]
fn an_overlay_survives_any_kill() {
    let agent = Agent::start();
    let image = agent.directory().join("disks/web1.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", image.to_str().unwrap(), "64M"]);
    let disks = json!([{"id": "root", "path": "web1.qcow2", "format": "qcow2"}]);
    agent.create(&spec(&agent, "web1", disks)).unwrap();
    for round in 0..kills() {
        agent.act("web1", VmAction::Boot).unwrap();
        let mut guest = SmallGuest { guest: crate::fixture::Guest::new(&agent, "web1".to_owned()) };
        guest.guest.wait_for("ready\n");
        guest.ask("disk-probe");
        let at = 100 + 64 * round;
        assert_eq!(guest.ask(&format!("disk-write {at} round{round} count=8")), "ok");
        assert_eq!(guest.ask("disk-flush"), "ok");
        for n in 0..20 {
            guest
                .guest
                .type_line(&format!("disk-write {} more count=8; disk-flush", 10_000 + 8 * (20 * round + n)));
        }
        thread::sleep(Duration::from_millis(7 * round % 40));
        let pid = agent.vm("web1").status.pid.unwrap();
        host::run("kill", &["-KILL", &pid.to_string()]);
        agent.wait_for_state("web1", VmState::Failed);
        // Leaks alone have the status 3: they are harmless, and repaired here.
        qemu_img(&["check", "-q", "-r", "leaks", image.to_str().unwrap()]);
        qemu_img(&["check", "-q", image.to_str().unwrap()]);
        let flat = agent.directory().join("flat.raw");
        qemu_img(&["convert", "-O", "raw", image.to_str().unwrap(), flat.to_str().unwrap()]);
        for earlier in 0..=round {
            assert_eq!(sector(&flat, 100 + 64 * earlier), format!("round{earlier}"));
        }
    }
}

/// Its live clusters are at the end of a file that is longer than its disk.
#[test]
fn an_image_that_had_a_snapshot_is_written_up_to_its_end() {
    let agent = Agent::start();
    let path = agent.directory().join("disks/web1.qcow2");
    let image = path.to_str().unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", image, "48M"]);
    for (byte, then) in [("1", Some("-c")), ("2", Some("-d")), ("3", None)] {
        host::run("qemu-io", &["-f", "qcow2", "-c", &format!("write -q -P {byte} 0 48M"), image]);
        if let Some(flag) = then {
            qemu_img(&["snapshot", flag, "before", image]);
        }
    }
    // As after crashes that have leaked clusters: new ones come behind the end.
    let long = 2 << 30;
    File::options().write(true).open(&path).unwrap().set_len(long).unwrap();
    let disks = json!([{"id": "root", "path": "web1.qcow2", "format": "qcow2"}]);
    let mut guest = boot(&agent, &spec(&agent, "web1", disks));
    let pid = agent.vm("web1").status.pid.unwrap();
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let longest = limits.lines().find_map(|line| line.strip_prefix("Max file size")).unwrap();
    let longest: u64 = longest.split_whitespace().next().unwrap().parse().unwrap();
    assert!(longest >= long + (48 << 20), "{longest}");
    guest.ask("disk-probe");
    for at in (0..96).map(|n| n * 1024) {
        assert_eq!(guest.ask(&format!("disk-write {at} new count=8")), "ok", "sector {at}");
    }
    assert_eq!(guest.ask("disk-flush"), "ok");
    agent.act("web1", VmAction::Stop).unwrap();
    qemu_img(&["check", "-q", image]);
}

/// A guest can write any header into its disk. The files that a header names are never opened.
#[test]
fn a_header_that_names_another_file_gets_an_error_and_not_the_file() {
    let agent = Agent::start();
    agent.image("base.raw", &[b'b'; 1 << 20]);
    let secret = agent.directory().join("secret");
    fs::write(&secret, [b's'; 1 << 20]).unwrap();
    let image = agent.directory().join("disks/web1.qcow2");
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-F",
        "raw",
        "-b",
        secret.to_str().unwrap(),
        image.to_str().unwrap(),
    ]);
    for (name, backing, code) in [
        ("none", json!([]), ProblemCode::DiskInvalid),
        (
            "two",
            json!([{"path": "web1.qcow2", "format": "qcow2"}, {"path": "base.raw", "format": "raw"}]),
            ProblemCode::DiskInUse,
        ),
    ] {
        let disks = json!([{"id": "root", "path": "web1.qcow2", "format": "qcow2", "backing": backing}]);
        agent.create(&spec(&agent, name, disks)).unwrap();
        let problem = agent.act(name, VmAction::Boot).unwrap_err();
        assert_eq!(problem.code, code, "{problem}");
    }
    let as_raw = json!([{"id": "root", "path": "web1.qcow2", "format": "raw"}]);
    let mut guest = boot(&agent, &spec(&agent, "raw", as_raw));
    guest.ask("disk-probe");
    assert!(guest.ask("disk-read 0").starts_with("ok QFI"), "a raw disk is what its bytes are");
    agent.act("raw", VmAction::Stop).unwrap();
    let given = json!([{"id": "root", "path": "web1.qcow2", "format": "qcow2", "backing": [{"path": "base.raw", "format": "raw"}]}]);
    let mut guest = boot(&agent, &spec(&agent, "given", given));
    guest.ask("disk-probe");
    assert!(guest.ask("disk-read 0").starts_with("ok bbb"), "the specification's file, not the header's");
    agent.act("given", VmAction::Stop).unwrap();
    let small = agent.directory().join("disks/small.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", small.to_str().unwrap(), "1M"]);
    agent
        .create(&spec(&agent, "small", json!([{"id": "root", "path": "small.qcow2", "format": "qcow2"}])))
        .unwrap();
    let problem = agent.act("small", VmAction::Boot).unwrap_err();
    assert!(problem.detail.contains("clusters of 512 bytes"), "{problem}");
    agent.disk("zero.raw", SIZE);
    let not_qcow2 = json!([{"id": "root", "path": "zero.raw", "format": "qcow2"}]);
    agent.create(&spec(&agent, "zero", not_qcow2)).unwrap();
    let problem = agent.act("zero", VmAction::Boot).unwrap_err();
    assert!(
        problem.code == ProblemCode::DiskInvalid && problem.detail.contains("is not in the format qcow2"),
        "{problem}"
    );
}
