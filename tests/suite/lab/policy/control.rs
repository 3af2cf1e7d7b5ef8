// SPDX-License-Identifier: Apache-2.0

//! Repeats the scenarios with a relay that grants every request: each must fail, and for that reason.
//!
//! igb itself refuses much, above all a changed address. A scenario that passes without a policy proves nothing about
//! ours.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::{BY_POLICY, Relay, address, limits};

fn fails_without_policy(scenario: fn(Relay)) {
    let failure = catch_unwind(AssertUnwindSafe(|| scenario(Relay::GrantingAll)));
    let failure =
        failure.expect_err("the scenario passes although every request is granted: it shows nothing");
    let message = failure
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| failure.downcast_ref::<&str>().map(ToString::to_string))
        .unwrap_or_default();
    assert!(message.contains(BY_POLICY), "the scenario fails for another reason: {message}");
}

#[test]
fn an_address_is_not_refused() {
    fails_without_policy(address::refused);
}

#[test]
fn an_address_is_not_refused_silently() {
    fails_without_policy(address::refused_silently);
}

#[test]
fn an_address_off_the_list_is_not_refused() {
    fails_without_policy(address::listed);
}

#[test]
fn an_address_is_not_taken_back() {
    fails_without_policy(address::tightened);
}

#[test]
fn a_filter_on_an_access_port_is_not_refused() {
    fails_without_policy(limits::access_vlan);
}

#[test]
fn a_vlan_out_of_the_trunk_is_not_refused() {
    fails_without_policy(limits::trunk);
}

#[test]
fn frames_and_multicast_are_not_limited() {
    fails_without_policy(limits::frames_and_multicast);
}
