// SPDX-License-Identifier: Apache-2.0

//! Time from "start" to the guest's init, beside QEMU with the same kernel, VF and memory in the same run.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use api::types::VmAction;
use serde_json::json;

use super::{as_debian_does, bare_spec};
use crate::fixture::{Agent, Guest, host};

const RUNS: usize = 3;
const MARK: &str = "portcullis-guest: init reached";

fn qemu() -> Duration {
    let begun = Instant::now();
    let mut child = Command::new(host::lab_tool("qemu-guest"))
        .args(["--vf", host::VF0, "--memory", "256M", "--initrd"])
        .arg(host::initramfs())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).split(b'\n').map_while(Result::ok);
    let reached = lines.any(|line| String::from_utf8_lossy(&line).contains(MARK));
    let took = begun.elapsed();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(reached, "QEMU's guest did not reach its init");
    took
}

fn ours(agent: &Agent) -> Duration {
    let begun = Instant::now();
    agent.act("web1", VmAction::Boot).unwrap();
    let mut guest = Guest::new(agent, "web1".into());
    guest.begin_anew();
    guest.wait_for(MARK);
    let took = begun.elapsed();
    agent.act("web1", VmAction::Stop).unwrap();
    took
}

#[test]
fn the_guests_init_is_reached_sooner_than_under_qemu() {
    let agent = Agent::start();
    let mut spec = bare_spec(&agent, "web1");
    as_debian_does(&agent, &mut spec);
    spec["boot"]["cmdline"] = json!("console=ttyS0 quiet panic=-1");
    spec["adapters"] = json!([{ "id": "eth0", "vf": host::VF0 }]);
    agent.create(&spec).unwrap();
    let mut times: Vec<(Duration, Duration)> = (0..RUNS).map(|_| (ours(&agent), qemu())).collect();
    println!("boot to init, s (ours, QEMU q35): {times:.2?}");
    times.sort_by(|a, b| {
        (a.0.as_secs_f64() / a.1.as_secs_f64()).total_cmp(&(b.0.as_secs_f64() / b.1.as_secs_f64()))
    });
    let (ours, qemu) = times[RUNS / 2];
    println!(
        "median pair: ours {:.2} s, QEMU q35 {:.2} s, ratio {:.2}",
        ours.as_secs_f64(),
        qemu.as_secs_f64(),
        ours.as_secs_f64() / qemu.as_secs_f64()
    );
    assert!(ours < qemu);
    host::unbind(host::VF0);
}
