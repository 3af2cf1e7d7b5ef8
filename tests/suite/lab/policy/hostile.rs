// SPDX-License-Identifier: Apache-2.0

//! A guest without a driver sends any messages to its mailbox.

use std::time::Duration;

use serde_json::json;

use super::{
    BY_POLICY, INITIAL, Relay, X, agent_with, configure, decisions, guest_in_group, in_group, ping, raw,
    raw_granted, spec, spec_in_group, without_driver,
};
use crate::fixture::{Agent, Guest, Options, host, registers};

/// The interval of the emulated host's ticks in ms: a measurement is late by up to one.
const TICK: f64 = 4.0;

/// igb's complaints about unexpected messages.
fn complaints() -> Vec<String> {
    host::run("dmesg", &[])
        .lines()
        .filter(|line| line.contains("igb"))
        .filter(|line| {
            ["Unhandled", "attempted", "malformed", "nvalid", "denied", "Spoof"]
                .iter()
                .any(|word| line.contains(word))
        })
        .map(str::to_owned)
        .collect()
}

fn new_complaints(before: &[String]) -> Vec<String> {
    complaints().into_iter().filter(|line| !before.contains(line)).collect()
}

/// A guest on VF 0 that has unbound its driver.
fn hostile_guest(agent: &Agent, cpus: u8) -> Guest<'_> {
    let mut spec = spec_in_group(agent, "web1");
    spec["cpus"] = json!(cpus);
    let mut guest = agent.boot(&spec);
    guest.wait_for_shell();
    guest.must("ip link set eth0 up");
    without_driver(&mut guest);
    raw(&mut guest, "reset");
    guest
}

fn percentile(text: &str, percent: usize) -> f64 {
    let mut times: Vec<f64> = text
        .lines()
        .filter_map(|line| line.split("time=").nth(1)?.split_whitespace().next()?.parse().ok())
        .collect();
    assert!(times.len() > 200, "pings are answered: {}\n{text}", times.len());
    times.sort_by(f64::total_cmp);
    times[times.len() * percent / 100]
}

/// The 99th percentile of many pings of the neighbour, in ms.
fn neighbours_p99(neighbour: &mut Guest<'_>) -> f64 {
    let text = neighbour
        .run_quietly(&format!("ping -c 300 -i 0.02 -W 5 {}", host::GATEWAY), Duration::from_secs(8))
        .text;
    assert!(text.contains(" 0% packet loss"), "{text}");
    percentile(&text, 99)
}

#[test]
fn a_hostile_guest_gets_nothing_and_hurts_nobody() {
    let agent = agent_with(Relay::Policed, &json!({}));
    let mut other = spec(&agent, "web2", host::VF1);
    other["adapters"] = json!([{ "id": "eth0", "port_group": "web", "vf": host::VF1 }]);
    let mut neighbour = agent.boot(&other);
    neighbour.wait_for_shell();
    configure(&mut neighbour, "10.0.2.22");
    let mut guest = hostile_guest(&agent, 1);
    // A CPU for each, as important guests have. Besides, the lab's emulated processor confuses two guests that take
    // turns on one CPU thousands of times a second: one of them then dies of a triple fault.
    host::pin(&agent.vm("web2").id.to_string(), "0");
    host::pin(&agent.vm("web1").id.to_string(), "1");
    let complaints_before = complaints();

    // Every opcode, bad lengths, counts above 30, flags.
    let swept = raw(&mut guest, "sweep");
    println!("{swept}");
    let granted = swept.split("granted: ").nth(1).unwrap().lines().next().unwrap();
    for word in granted.split_whitespace() {
        // Multicast lists within the limit, removing filters, and leaving promiscuous mode.
        let harmless = ["00000003", "00010003", "00020003", "00030003", "00010002", "00000006"];
        assert!(harmless.contains(&word), "{BY_POLICY}: {word} is granted");
    }
    assert!(swept.contains(&format!("address {INITIAL}")), "{swept}");
    got_nothing();

    // Floods, resets of a message in flight, an FLR in the middle of a flood.
    let quiet = neighbours_p99(&mut neighbour);
    let log_before = agent.log().len();
    guest.type_line("vf-mailbox $(cat /run/vf) flood 10");
    let flooded = neighbours_p99(&mut neighbour);
    let count = guest.wait_for("flood: ");
    let count = format!("{count}{}", guest.wait_for(" requests"));
    println!("neighbour's ping: p99 {quiet:.2} ms, during a flood {flooded:.2} ms; {}", count.trim());
    let aborted = raw(&mut guest, "abort 12");
    assert!(aborted.contains(&format!("address {INITIAL}")), "{aborted}");
    guest.must(
        "vf-mailbox $(cat /run/vf) flood 4 & sleep 1; echo 1 >/sys/bus/pci/devices/$(cat /run/vf)/reset; wait",
    );
    let log = agent.log();
    let grown = &log[log_before..];
    println!("the log grew by {} lines, {} bytes", grown.lines().count(), grown.len());
    assert!(grown.lines().count() < 200, "{grown}");
    got_nothing();
    // Allow at most one tick, and none if ticks are small beside the measurement.
    let limit = (2.0 * quiet + TICK).min(2.0 * quiet.max(5.0));
    assert!(flooded <= limit, "p99 {quiet} ms before, {flooded} ms during the flood");

    assert_eq!(new_complaints(&complaints_before), [] as [String; 0], "the PF's driver is never bothered");
    assert!(decisions(&agent, "denied").len() < 200);

    // The VF works afterwards.
    let text = raw(&mut guest, "reset");
    assert!(text.contains(INITIAL), "{text}");
    guest.must("cat /run/vf > /sys/bus/pci/drivers/igbvf/bind; sleep 1");
    configure(&mut guest, "10.0.2.21");
    ping(&mut guest, host::GATEWAY, 5);
}

#[test]
fn requests_from_two_vcpus_at_once_get_nothing() {
    let agent = agent_with(Relay::Policed, &json!({}));
    let mut guest = hostile_guest(&agent, 2);
    let complaints_before = complaints();
    let log_before = agent.log().lines().count();
    println!("{}", raw(&mut guest, "race 2"));
    got_nothing();
    assert!(agent.log().lines().count() < log_before + 100, "{}", agent.log());
    assert_eq!(new_complaints(&complaints_before), [] as [String; 0]);
    assert!(raw(&mut guest, "reset").contains(INITIAL));
    assert!(!raw_granted(&mut guest, "00000002 00000002 0000010a"), "{BY_POLICY}: an address");
    assert_eq!(host::vf_mac(0), INITIAL);
}

fn got_nothing() {
    let vf = host::vf(0);
    assert_eq!(
        (&vf["address"], &vf["spoofchk"], &vf["trust"]),
        (&json!(INITIAL), &json!(true), &json!(false))
    );
    assert_eq!(registers::addresses_of(0), [INITIAL.to_owned()].into());
    assert_eq!(registers::vlans_of(0), [] as [u32; 0]);
    assert!(!registers::all_multicast(0));
}

/// igbvf does not read the answer to a multicast list, and sends its next message as soon as the list is
/// acknowledged.
#[test]
fn a_message_right_behind_a_late_answer_arrives() {
    let agent = Agent::start_with(Options::for_tests(&["--late-multicast-for-tests", "100"]));
    let agent = in_group(agent, &json!({ "mac_changes": "accept" }));
    let mut guest = guest_in_group(&agent, "web1");
    without_driver(&mut guest);
    let text = raw(&mut guest, "late 00010003 00000230 -- 00000002 00000002 0000010a");
    let after = text.split("first true after ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
    assert!(after.parse::<u32>().unwrap() >= 100, "ms until the acknowledgement: {text}");
    assert!(text.contains("second a0000002"), "{text}");
    assert!(registers::multicast_hash(0x230));
    assert_eq!(host::vf_mac(0), X);
}
