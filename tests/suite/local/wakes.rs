// SPDX-License-Identifier: Apache-2.0

//! The way of a granted address, counted: threads that wake for it, and durable writes.
//!
//! A thread that waits gives up its processor, and the kernel counts that. So a stop more on the way shows here, whoever
//! adds it. ARCHITECTURE.md has the way.

use std::{collections::BTreeMap, fs, thread, time::Duration};

use serde_json::json;

use super::adapter::{port_group, start};
use crate::fixture::{SmallGuest, host};

/// Fewer than a guest may send at once.
const COUNT: u64 = 50;
const ROUNDS: u8 = 3;

/// The most waits of each thread for one address. The agent's workers and the store wait for other things as well: the
/// store for the disk, several times for each of its two writes. All threads that are not named here have no part in it.
const MOST: [(&str, f64); 6] = [
    // The guest's message, and the verdict. Besides, it looks at the mailbox now and then.
    ("vmm/relay", 3.2),
    // The verdict.
    ("vmm/exe", 1.4),
    // The request, the stored change, the PF's answer; and the end of the second write, which nobody waits for.
    ("agent/tokio-rt-worker", 6.0),
    ("agent/store", 20.0),
    // Its command, and three exchanges with the process of the simulated PF.
    ("agent/pf", 5.5),
    // The record, after the answer.
    ("agent/decisions", 4.0),
];

/// Times that the threads of a process have waited, by the threads' name.
fn waits(pid: u32) -> BTreeMap<String, u64> {
    let mut waits = BTreeMap::new();
    for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten() {
        // A thread may end meanwhile.
        let read = |file| fs::read_to_string(task.path().join(file));
        let (Ok(name), Ok(status)) = (read("comm"), read("status")) else { continue };
        let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        *waits.entry(name.trim().to_owned()).or_default() += count.unwrap().trim().parse::<u64>().unwrap();
    }
    waits
}

#[test]
fn a_granted_address_wakes_few_threads() {
    let agent = start();
    port_group(&agent, json!({"mac_changes": "accept"}));
    let adapters = json!([{"id": "eth0", "port_group": "tests", "mac": "02:00:00:00:0a:01"}]);
    let mut guest = SmallGuest::boot(&agent, "alice", adapters);
    assert!(guest.ask("up").starts_with("ok "));
    let vmms = host::processes_of(agent.directory()).into_iter().filter(|(_, words)| words.contains(" vmm "));
    let vmm: Vec<u32> = vmms.map(|(pid, _)| pid).collect();
    let [vmm] = vmm[..] else { panic!("{vmm:?}") };
    let seen = || {
        let mut all = BTreeMap::new();
        for (process, pid) in [("agent", agent.pid()), ("vmm", vmm)] {
            for (name, count) in waits(pid) {
                all.insert(format!("{process}/{name}"), count);
            }
        }
        all
    };
    // A busy machine makes a thread wait more often for the same work, never less often. So each
    // thread counts as in the best of a few rounds.
    let mut least: BTreeMap<String, f64> = BTreeMap::new();
    for round in 0..ROUNDS {
        let before = seen();
        let addresses = [0x11 + 2 * round, 0x12 + 2 * round].map(|last| format!("02:00:00:00:0a:{last:02x}"));
        let result = guest.ask(&format!("time-mac {} {} count={COUNT}", addresses[0], addresses[1]));
        let after = seen();
        assert!(result.starts_with(&format!("granted={COUNT} ")), "{result}");
        let waits: BTreeMap<String, f64> = after
            .into_iter()
            .map(|(name, count)| {
                let waits = (count - before.get(&name).unwrap_or(&0)) as f64 / COUNT as f64;
                (name, waits)
            })
            .collect();
        println!("{result}, waits for each address: {waits:.2?}");
        for (name, waits) in waits {
            least.entry(name).and_modify(|least| *least = least.min(waits)).or_insert(waits);
        }
        // The relay lets a guest send again soon.
        thread::sleep(Duration::from_secs(2));
    }
    for (name, waits) in &least {
        let most = MOST.iter().find(|(known, _)| known == name).map_or(0.3, |(_, most)| *most);
        assert!(*waits <= most, "{name}: {waits:.2}, at most {most}; {least:.2?}");
    }
    for (name, _) in MOST {
        assert!(least.contains_key(name), "{name} is not there: {least:.2?}");
    }
}
