// SPDX-License-Identifier: Apache-2.0

//! The time until a guest has the answer to a change of its address, beside QEMU, which has no policy.

use std::{
    fs,
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    time::Duration,
};

use serde_json::json;

use super::{Relay, X, Y, agent_with, edit, guest_in_group, without_driver};
use crate::fixture::{
    Guest,
    agent::PATIENCE,
    host::{self, FreeCpu},
};

/// Messages in each series.
const COUNT: usize = 200;
/// The most series of denials, of which the best counts: the machine under the lab takes its processors away for milliseconds,
/// sometimes for tens of them, which is no property of the denial.
const SERIES: usize = 12;

/// QEMU's median on an otherwise idle machine, in us.
const USUAL: u64 = 300;

/// The figures in a line of `vf-mailbox time`: granted, median in us, 99th percentile in us.
fn figures(text: &str) -> (usize, u64, u64) {
    let line = text.lines().find(|line| line.contains("time: ")).unwrap_or_else(|| panic!("{text}"));
    let numbers: Vec<u64> =
        line.split(|c: char| !c.is_ascii_digit()).filter_map(|word| word.parse().ok()).collect();
    // "time: N messages, N granted, median N us, p99 N us"
    let [.., granted, median, _p99, p99] = numbers[..] else { panic!("{line}") };
    (usize::try_from(granted).unwrap(), median, p99)
}

fn ours(guest: &mut Guest<'_>) -> (usize, u64, u64) {
    let command = format!("vf-mailbox $(cat /run/vf) time {COUNT} {X} {Y}");
    let output = guest.run_quietly(&command, Duration::from_secs(8));
    assert_eq!(output.status, 0, "{}", output.text);
    figures(&output.text)
}

fn qemu() -> (usize, u64, u64) {
    let script = std::env::temp_dir().join("time-mailbox");
    let text = format!(
        "#!/bin/sh\nvf=$(basename $(readlink -f /sys/class/net/eth0/device))\n\
         echo $vf >/sys/class/net/eth0/device/driver/unbind\nvf-mailbox $vf time {COUNT} {X} {Y}\n"
    );
    fs::write(&script, text).unwrap();
    let initramfs = host::initramfs_with("timed", &[], &[&format!("{}:/bin/time-mailbox", script.display())]);
    // igb lets no VF change an address that an administrator has set.
    host::run("ip", &["link", "set", host::PF, "vf", "0", "mac", "00:00:00:00:00:00"]);
    let mut child = Command::new("taskset")
        .args(["-c", "1"])
        .arg(host::lab_tool("qemu-guest"))
        .args([
            "--vf",
            host::VF0,
            "--memory",
            "256M",
            "--append",
            "portcullis.run=\"sh /bin/time-mailbox\"",
            "--initrd",
        ])
        .arg(initramfs)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).split(b'\n').map_while(Result::ok);
    let mut said = String::new();
    for line in lines {
        said.push_str(&String::from_utf8_lossy(&line));
        said.push('\n');
        if said.contains("run ended with") {
            break;
        }
    }
    child.kill().unwrap();
    child.wait().unwrap();
    host::unbind(host::VF0);
    figures(&said)
}

#[test]
fn refusals_are_timed_beside_qemu() {
    let peer = qemu();
    println!(
        "QEMU (no policy, igb's own answer): median {} us, p99 {} us, {} granted",
        peer.1, peer.2, peer.0
    );
    assert_eq!(peer.0, COUNT, "igb grants every change");
    // The bound holds also here, where every instruction is emulated twice. A slower machine slows both.
    let limit = 10_000 * peer.1.max(USUAL) / USUAL;

    let agent = agent_with(Relay::Policed, &json!({ "mac_changes": "accept" }));
    let mut guest = guest_in_group(&agent, "web1");
    without_driver(&mut guest);
    let _free = FreeCpu::new(&agent);
    host::pin(&agent.vm("web1").id.to_string(), "1");
    let accepted = ours(&mut guest);
    println!("accepted and committed: median {} us, p99 {} us", accepted.1, accepted.2);
    assert_eq!(accepted.0, COUNT, "every change is granted\n{}", agent.log());
    edit(&agent, &json!({ "mac_changes": "reject" }));
    super::eventually(&agent, PATIENCE, "the address is revoked", || host::vf_mac(0) == super::INITIAL);
    let mut best = u64::MAX;
    for _ in 0..SERIES {
        let (granted, median, p99) = ours(&mut guest);
        let ratio = median as f64 / peer.1 as f64;
        println!("refused: median {median} us, {ratio:.2} of QEMU's, p99 {p99} us");
        assert_eq!(granted, 0);
        best = best.min(p99);
        if best < limit {
            break;
        }
    }
    assert!(best < limit, "the 99th percentile of a refusal is {best} us, of {limit} at most");
}
