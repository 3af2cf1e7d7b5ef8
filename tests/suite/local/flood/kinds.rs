// SPDX-License-Identifier: Apache-2.0

//! The kinds of message that a vmm may send.

use std::collections::BTreeSet;

use passthrough::relay::{GuestRequest, RelayEvent};
use protocol::{AgentRequest, Outcome, ToAgent, VmmEvent};
use serde_json::{Value, from_value, json};

/// A part of a message that the table describes.
#[derive(Clone, Copy)]
pub(super) enum Says {
    /// A guest's request.
    Request(fn(u64) -> Value),
    /// An event, for the VM's function.
    Event(fn(u64, &str) -> Value),
    /// A message of which an honest vmm sends none unasked.
    Unasked(fn(u64) -> Value),
}

pub(super) use Says::{Event as E, Request as Q, Unasked as U};

/// A kind of message: its name, its highest honest rate in messages per second, and the message `n`.
///
/// A relay takes 50 messages of its guest in a second, each of which is at most two events. A guest resets itself twice in a
/// second, and each time the machine has two states to report. 0 is once.
pub(super) struct Kind(pub(super) &'static str, pub(super) u32, pub(super) Says);

pub(super) const KINDS: &[Kind] = &[
    Kind("hello", 0, U(|_| json!({ "type": "hello", "version": 3, "state": "running", "boots": 1 }))),
    Kind("refused", 0, U(|_| json!({ "type": "refused", "reason": "no" }))),
    Kind("done/done", 0, U(|n| done(n, json!({ "outcome": "done" })))),
    Kind("done/console_taken", 0, U(|n| done(n, json!({ "outcome": "console_taken", "taken": 0 })))),
    Kind(
        "done/stats",
        0,
        U(|n| done(n, json!({ "outcome": "stats", "exits": {}, "devices": {}, "memory": 1, "boots": 1 }))),
    ),
    Kind(
        "done/taken_back",
        0,
        U(|n| done(n, json!({ "outcome": "taken_back", "failed": [], "deferred": false }))),
    ),
    Kind("ask/mailbox/reset", 50, Q(|_| json!("reset"))),
    Kind("ask/mailbox/set_mac", 50, Q(|n| json!({ "set_mac": mac(n % 2) }))),
    Kind("ask/mailbox/clear_unicast_filters", 50, Q(|_| json!("clear_unicast_filters"))),
    Kind("ask/mailbox/add_unicast_filter", 50, Q(|n| json!({ "add_unicast_filter": mac(n) }))),
    Kind(
        "ask/mailbox/set_multicast",
        50,
        Q(|n| json!({ "set_multicast": { "count": 2, "hashes": [n % 4096, 7] } })),
    ),
    Kind("ask/mailbox/set_vlan", 50, Q(|n| json!({ "set_vlan": { "vid": n % 4095, "add": n % 2 == 0 } }))),
    Kind("ask/mailbox/set_max_frame", 50, Q(|n| json!({ "set_max_frame": 1518 + n % 8000 }))),
    Kind(
        "ask/mailbox/set_promiscuous",
        50,
        Q(|n| json!({ "set_promiscuous": { "multicast": n % 2 == 0, "unicast": n % 3 == 0 } })),
    ),
    Kind("ask/mailbox/unknown", 50, Q(|n| json!({ "unknown": { "opcode": n % 65536 } }))),
    Kind(
        "report/state",
        4,
        E(|n, _| {
            let state = if n % 2 == 0 { "running" } else { "rebooting" };
            json!({ "report": "state", "state": state, "boots": n })
        }),
    ),
    Kind(
        "report/ended",
        0,
        E(|n, _| json!({ "report": "ended", "end": { "end": "failed", "detail": format!("{n}") } })),
    ),
    Kind(
        "report/device_lost",
        4,
        E(|_, bdf| json!({ "report": "device_lost", "bdf": bdf, "why": "failed" })),
    ),
    Kind("report/disk_full", 4, E(|_, _| json!({ "report": "disk_full", "disk": "root" }))),
    Kind(
        "report/relay/cancelled",
        100,
        E(|n, _| relay(json!({ "notice": "cancelled", "seq": n, "request": "reset", "why": "deadline" }))),
    ),
    Kind(
        "report/relay/forwarded",
        100,
        E(|n, _| relay(json!({ "notice": "forwarded", "seq": n, "outcome": "accepted" }))),
    ),
    Kind(
        "report/relay/refused",
        100,
        E(|n, _| {
            relay(json!({
                "notice": "refused", "request": { "set_mac": mac(n) }, "word": n % 65536, "reason": "rate_limited",
                "count": 1,
            }))
        }),
    ),
    Kind(
        "report/relay/declined",
        100,
        E(|n, _| {
            relay(json!({
                "notice": "declined", "mac": mac(n), "reason": "mac_changes_rejected", "silent": false,
            }))
        }),
    ),
    Kind("report/relay/guest_mac", 100, E(|n, _| relay(json!({ "notice": "guest_mac", "mac": mac(n) })))),
    // A PF is reset, or comes back, once in a while.
    Kind("report/relay/pf_reset", 1, E(|_, _| relay(json!({ "notice": "pf_reset" })))),
    Kind(
        "report/relay/taken_back",
        100,
        E(|n, _| relay(json!({ "notice": "taken_back", "id": n, "failed": ["reset"], "deferred": false }))),
    ),
];

fn done(n: u64, outcome: Value) -> Value {
    json!({ "type": "done", "id": (1_u64 << 40) + n, "result": { "Ok": outcome } })
}

fn relay(event: Value) -> Value {
    json!({ "report": "relay", "adapter": "eth0", "notice": event })
}

fn mac(n: u64) -> String {
    let [.., a, b] = n.to_be_bytes();
    format!("02:00:00:00:{a:02x}:{b:02x}")
}

/// The names that a type's variants have, from the error of an attempt to read another one.
fn variants<T>(tried: serde_json::Result<T>) -> Vec<String> {
    let error = tried.map(drop).unwrap_err().to_string();
    let expected = error.split_once("expected").unwrap_or_else(|| panic!("{error}")).1.to_owned();
    expected.split('`').skip(1).step_by(2).map(ToOwned::to_owned).collect()
}

/// A message that is new to the protocol needs a row here.
#[test]
fn the_table_has_each_kind_of_message() {
    let mut all = BTreeSet::new();
    for kind in variants(from_value::<ToAgent>(json!({ "type": "?" }))) {
        let parts = match kind.as_str() {
            "done" => variants(from_value::<Outcome>(json!({ "outcome": "?" }))),
            "ask" => {
                assert_eq!(variants(from_value::<AgentRequest>(json!({ "ask": "?" }))), ["mailbox"]);
                let requests = variants(from_value::<GuestRequest>(json!({ "seq": 1, "request": "?" })));
                requests.iter().map(|request| format!("mailbox/{request}")).collect()
            }
            "report" => variants(from_value::<VmmEvent>(json!({ "report": "?" }))),
            _ => vec![String::new()],
        };
        for part in parts {
            if part == "relay" {
                let events = variants(from_value::<RelayEvent>(json!({ "notice": "?" })));
                all.extend(events.iter().map(|event| format!("{kind}/relay/{event}")));
            } else if part.is_empty() {
                all.insert(kind.clone());
            } else {
                all.insert(format!("{kind}/{part}"));
            }
        }
    }
    let table: BTreeSet<String> = KINDS.iter().map(|Kind(name, ..)| (*name).to_owned()).collect();
    assert_eq!(table, all);
}
