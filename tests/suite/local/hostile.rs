// SPDX-License-Identifier: Apache-2.0

//! Thousands of seeded runs of a guest that attacks its VF and its machine.
//!
//! A guest may harm itself: a ring of receive descriptors in its own code ends a boot. It must not make its vmm
//! panic, hang or stop responding, nor harm a neighbour.

use std::{
    fs,
    io::Write,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use api::{
    problem::ProblemCode,
    types::{CauseCode, PortGroupSpec, VmAction, VmState},
};
use serde_json::json;

use crate::fixture::{Agent, Options, SmallGuest, wire};

const BOOTS: u32 = 4;
const BATCHES: u32 = 10;
/// The runs of one batch, each with its own seed.
const SEEDS: u32 = 54;
const STEPS: u32 = 20;

/// The longest time of a batch. It takes a fraction of a second on /dev/kvm, some seconds in the lab.
const PATIENCE: Duration = Duration::from_secs(60);

const TARGETS: [&str; 9] =
    ["mailbox", "registers", "vectors", "descriptors", "bars", "config", "memory", "ports", "all"];
const DEEDS: [&str; 8] =
    ["rings", "indices", "buffers", "endless", "messages", "resets", "widths", "spurious"];

fn guest<'a>(agent: &'a Agent, name: &str, last: u8) -> SmallGuest<'a> {
    let mac = format!("02:00:00:00:0d:{last:02x}");
    let adapters = json!([{"id": "eth0", "port_group": "tests", "mac": mac}]);
    let mut guest = SmallGuest::boot(agent, name, adapters);
    assert_eq!(guest.ask("up"), format!("ok mac={mac} reply={mac}"));
    assert_eq!(guest.ask(&format!("address 10.0.0.{last}")), "ok");
    guest
}

/// All logs of the agent's processes.
fn logs(directory: &Path) -> String {
    let mut text = String::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            text.push_str(&logs(&path));
        } else if path.extension().is_some_and(|extension| extension == "log") {
            text.push_str(&String::from_utf8_lossy(&fs::read(&path).unwrap_or_default()));
        }
    }
    text
}

fn assert_nobody_panicked(agent: &Agent) {
    let text = logs(agent.directory());
    for word in ["panicked", "RUST_BACKTRACE", "SIGABRT"] {
        let line = text.lines().find(|line| line.contains(word));
        assert!(line.is_none(), "{line:?}");
    }
}

/// Whether the guest reaches `mark`. It may also end, reset or hang on the way.
fn reaches(guest: &mut SmallGuest<'_>, mark: &str, boots: u64) -> bool {
    let agent = guest.guest.agent;
    let deadline = Instant::now() + PATIENCE;
    loop {
        if guest.guest.unread().contains(mark) {
            guest.guest.wait_for(mark);
            return true;
        }
        let status = agent.vm(&guest.guest.name).status;
        match status.state {
            VmState::Running if status.boots == boots => {}
            VmState::Running | VmState::Starting | VmState::Rebooting => return false,
            _ => {
                let cause = status.cause.unwrap();
                // A guest may jump by mistake to an instruction that KVM's emulator does not know.
                let own = match cause.code {
                    CauseCode::PoweredOff => true,
                    CauseCode::MachineFailed => cause.detail.contains("KVM cannot emulate"),
                    _ => false,
                };
                assert!(own, "{cause:?}");
                return false;
            }
        }
        if Instant::now() > deadline {
            // For example, it received frames into its own code. The vmm must still control its machine.
            println!(
                "the guest hangs before {mark:?}: {:?}, {:?}",
                guest.guest.unread(),
                agent.stats(&guest.guest.name)
            );
            for action in [VmAction::Pause, VmAction::Resume] {
                agent.act(&guest.guest.name, action).unwrap();
            }
            return false;
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Ends the VM's boot, and boots it again with its queues up.
fn begin_anew(guest: &mut SmallGuest<'_>) {
    let agent = guest.guest.agent;
    let name = guest.guest.name.clone();
    agent.act(&name, VmAction::Stop).unwrap();
    agent.act(&name, VmAction::Boot).unwrap();
    guest.guest.begin_anew();
    guest.wait_for_ready();
    assert!(guest.ask("up").starts_with("ok "));
}

#[test]
fn thousands_of_attacks_hurt_neither_the_vmm_nor_a_neighbour() {
    let arguments = vec!["--sim-pf".into(), "sim0=4".into()];
    let agent = Agent::start_with(Options { arguments, ..Options::default() });
    let spec: PortGroupSpec = serde_json::from_value(json!({"switch": "default", "settings": {}})).unwrap();
    agent.ask(agent.client.put_port_group("tests", &spec, None)).unwrap();
    let mut bob = guest(&agent, "bob", 2);
    let _carol = guest(&agent, "carol", 3);
    let mut mallory = guest(&agent, "mallory", 1);
    // A slow client, served during the attack: its body does not arrive.
    let mut slow = wire::connect(&agent.directory().join("api.sock"));
    slow.write_all(b"POST /v1/vms HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 9\r\n\r\n{")
        .unwrap();
    let started = Instant::now();
    let (mut whole, mut cut_short) = (0, 0);
    for boot in 0..BOOTS {
        for batch in 0..BATCHES {
            let number = boot * BATCHES + batch;
            let target = TARGETS[number as usize % TARGETS.len()];
            let deed = DEEDS[number as usize % DEEDS.len()];
            // In another form than the guest's echo of a wrong command.
            let mark = format!("\nend of batch {number}\n");
            let boots = agent.vm("mallory").status.boots;
            // On a VF with working queues, if the relay, which may still throttle this guest, lets it have them.
            mallory.guest.type_line("down-up");
            mallory
                .guest
                .type_line(&format!("fuzz {target} seed={} steps={STEPS} runs={SEEDS}", number * SEEDS));
            mallory.guest.type_line(&format!("hostile {deed}; echo end of batch {number}"));
            if reaches(&mut mallory, &mark, boots) {
                whole += 1;
            } else {
                cut_short += 1;
                begin_anew(&mut mallory);
            }
            // The vmm answers, and the guest's resources are still there.
            agent.stats("mallory");
            assert_eq!(agent.vm("mallory").status.adapters[0].lost, None);
            assert_nobody_panicked(&agent);
            let ping = bob.ask("ping 10.0.0.3 count=2 timeout=5000");
            assert!(
                ping.starts_with("sent=2 received=2 lost=0 "),
                "after batch {number}, {target}, {deed}: {ping}; {:?}",
                ["mallory", "bob", "carol"].map(|vm| agent.stats(vm))
            );
        }
        begin_anew(&mut mallory);
    }
    let runs = whole * SEEDS;
    println!(
        "{runs} whole runs, {cut_short} batches cut short by the guest's own end, {:?}",
        started.elapsed()
    );
    assert!(runs >= BOOTS * BATCHES * SEEDS / 2, "only {runs} runs came to their end");
    // The guest works as before. A guest that a spurious interrupt deafens (see its start.S) would count as cut
    // short.
    assert_eq!(mallory.ask("hostile spurious"), "ok");
    assert!(mallory.ask("up").starts_with("ok "));
    assert_eq!(mallory.ask("address 10.0.0.1"), "ok");
    let ping = bob.ask("ping 10.0.0.1 count=5");
    assert!(ping.starts_with("sent=5 received=5 lost=0 "), "{ping}");
    let answer = wire::Answer::read(slow);
    assert_eq!((answer.status, answer.code()), (408, ProblemCode::RequestTimeout));
    for vm in ["mallory", "bob", "carol"] {
        assert_eq!(agent.vm(vm).status.state, VmState::Running, "{vm}");
    }
}
