// SPDX-License-Identifier: Apache-2.0

//! Records of decisions.

use netpolicy::{Committed, Decision, Outcome, Reason};
use uuid::Uuid;

use crate::fixture::{host, port_id};

fn denied(id: u128, requested: &str, now_ms: u64) -> Decision {
    let state = host("{}");
    let new = Decision::new(
        Uuid::from_u128(id),
        state.port(port_id(1)).unwrap(),
        "set_mac",
        Outcome::Denied,
        now_ms,
    );
    Decision { reason: Some(Reason::MacChangesRejected), requested: Some(requested.into()), ..new }
}

#[test]
fn equal_decisions_are_counted_in_one() {
    let mut record = denied(1, "02:00:00:00:00:09", 1000);
    record.absorb(denied(2, "02:00:00:00:00:09", 3000)).unwrap();
    record.absorb(denied(3, "02:00:00:00:00:09", 2000)).unwrap();
    assert_eq!(
        (record.id, record.count, record.first_ms, record.last_ms),
        (Uuid::from_u128(1), 3, 1000, 3000)
    );
    let other = denied(4, "02:00:00:00:00:0a", 4000);
    assert_eq!(record.absorb(other.clone()), Err(other));
    let other = Decision { committed: Committed::Failed, ..denied(5, "02:00:00:00:00:09", 4000) };
    assert_eq!(record.absorb(other.clone()), Err(other));
    assert_eq!((record.count, record.last_ms), (3, 3000));
}

#[test]
fn a_decision_survives_the_store() {
    let record = denied(1, "02:00:00:00:00:09", 1000);
    let json = serde_json::to_value(&record).unwrap();
    assert_eq!(
        (&json["reason"], &json["outcome"], &json["vf"]["pf"]),
        (&"mac_changes_rejected".into(), &"denied".into(), &"pf0".into())
    );
    assert_eq!(serde_json::from_value::<Decision>(json).unwrap(), record);
}

/// The database and the API have these words.
#[test]
fn outcomes_keep_their_stored_words() {
    for (outcome, word) in [
        (Outcome::Allowed, "allowed"),
        (Outcome::Denied, "denied"),
        (Outcome::Revoked, "taken_back"),
        (Outcome::Repaired, "repaired"),
        (Outcome::Reverted, "reverted"),
    ] {
        assert_eq!(serde_json::to_value(outcome).unwrap(), word);
        assert_eq!(serde_json::from_value::<Outcome>(word.into()).unwrap(), outcome);
    }
}
