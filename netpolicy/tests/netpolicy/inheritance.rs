// SPDX-License-Identifier: Apache-2.0

//! Inheritance from switch to port group to port.

use netpolicy::{MacChanges, Setting, Source, StateError};

use crate::fixture::{GROUP, SWITCH, host, port_id, settings};

/// Checks mac_changes of port 1 and its source, with these settings of the levels and with or without permission to
/// override.
fn check(levels: [Option<&str>; 3], may_override: bool, expect: (MacChanges, Source)) {
    let level = |value: Option<&str>| {
        value.map_or(settings("{}"), |v| settings(&format!(r#"{{"mac_changes": "{v}"}}"#)))
    };
    let mut state = host("{}");
    let mut switch = state.switch(SWITCH).unwrap().clone();
    switch.settings = level(levels[0]);
    let _ = state.update_switch(switch).unwrap();
    // The override is made while it is allowed. Then some cases withdraw the permission.
    let _ = state.update_port(port_id(1), level(levels[2])).unwrap();
    let mut group = state.port_group(GROUP).unwrap().clone();
    group.settings = level(levels[1]);
    if !may_override {
        group.port_overrides.remove(&Setting::MacChanges);
    }
    let _ = state.update_port_group(group).unwrap();
    let policy = state.effective_policy(port_id(1)).unwrap();
    assert_eq!(
        (policy.mac_changes.value.clone(), policy.mac_changes.source),
        expect,
        "{levels:?} {may_override}"
    );
    assert_eq!(policy.source(Setting::MacChanges), expect.1);
    assert_eq!(policy.source(Setting::Mtu), Source::Default);
}

#[test]
fn the_nearest_level_decides() {
    use MacChanges::{Accept, Reject};
    let (a, r) = (Some("accept"), Some("reject"));
    check([None, None, None], true, (Reject, Source::Default));
    check([a, None, None], true, (Accept, Source::Switch));
    check([a, r, None], true, (Reject, Source::PortGroup));
    check([None, a, None], true, (Accept, Source::PortGroup));
    check([a, r, a], true, (Accept, Source::Port));
    check([None, None, a], true, (Accept, Source::Port));
    check([a, r, a], false, (Reject, Source::PortGroup));
    check([None, None, a], false, (Reject, Source::Default));
}

#[test]
fn an_override_needs_permission_but_a_block() {
    let mut state = host("{}");
    let mut group = state.port_group(GROUP).unwrap().clone();
    group.port_overrides = [Setting::Mtu].into();
    let _ = state.update_port_group(group).unwrap();
    let mut update = |json: &str| state.update_port(port_id(1), settings(json)).map(|c| c.changes());
    assert_eq!(update(r#"{"mtu": 9000}"#).unwrap(), []);
    let denied = |setting| {
        Err(StateError::OverrideNotAllowed { group: "web".to_string().try_into().unwrap(), setting })
    };
    assert_eq!(update(r#"{"mac_changes": "accept"}"#), denied(Setting::MacChanges));
    assert_eq!(update(r#"{"blocked": false}"#), denied(Setting::Blocked));
    assert_eq!(
        update(r#"{"blocked": true}"#).unwrap(),
        [netpolicy::Change::SetLink(netpolicy::LinkState::Down)]
    );
    let policy = state.effective_policy(port_id(1)).unwrap();
    assert_eq!((policy.blocked.value, policy.blocked.source), (true, Source::Port));
    assert_eq!(policy.mtu.source, Source::Default, "a refused update must not have gone half way");
}

#[test]
fn a_port_lifts_the_block_of_its_group_only_with_permission() {
    let mut state = host(r#"{"blocked": true}"#);
    let _ = state.update_port(port_id(1), settings(r#"{"blocked": false}"#)).unwrap();
    assert!(!state.effective_policy(port_id(1)).unwrap().blocked.value);
    let mut group = state.port_group(GROUP).unwrap().clone();
    group.port_overrides.clear();
    let _ = state.update_port_group(group).unwrap();
    assert!(state.effective_policy(port_id(1)).unwrap().blocked.value);
}
