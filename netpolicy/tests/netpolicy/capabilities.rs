// SPDX-License-Identifier: Apache-2.0

//! PF drivers, and the settings that they cannot enforce.

use netpolicy::{Change, PfCapabilities, Source};

use crate::fixture::{host, port_id};

fn check(pf: &PfCapabilities, policy: &str, expect: Option<&str>) {
    let policy_of_port = host(policy).effective_policy(port_id(1)).unwrap();
    let setting = pf.check(&policy_of_port).err().map(|error| {
        assert!(error.to_string().contains(&pf.driver), "{error}");
        assert_eq!(error.source_level, policy_of_port.source(error.setting));
        error.setting.name()
    });
    assert_eq!(setting, expect, "{policy} on {pf:?}");
}

#[test]
fn settings_that_a_pf_cannot_enforce() {
    let (i82576, i350, ixgbe) =
        (PfCapabilities::of("igb", 0x10c9), PfCapabilities::of("igb", 0x1521), PfCapabilities::ixgbe());
    let unknown = PfCapabilities::of("mystery", 1);
    assert_eq!((&i82576, &i350), (&PfCapabilities::igb_82576(), &PfCapabilities::igb_i350()));
    for pf in [
        &i82576,
        &i350,
        &ixgbe,
        &unknown,
        &PfCapabilities::i40e(),
        &PfCapabilities::ice(),
        &PfCapabilities::simulated(),
    ] {
        check(pf, "{}", None);
        check(pf, r#"{"vlan": {"access": {"id": 7}}, "mac_changes": "accept"}"#, None);
    }
    let rate = r#"{"rate": {"max_tx_mbit": 100}}"#;
    let blocked = r#"{"blocked": true}"#;
    let (multicast, promiscuous) = (r#"{"promiscuous": "multicast"}"#, r#"{"promiscuous": "accept"}"#);
    let trunk = r#"{"vlan": {"trunk": ["1-9"]}}"#;
    let loose_trunk = r#"{"vlan": {"trunk": ["1-9"]}, "forged_transmits": "accept"}"#;
    let unicast = r#"{"mac_changes": "accept", "unicast_limit": 1}"#;
    let loose_unicast = r#"{"mac_changes": "accept", "unicast_limit": 1, "forged_transmits": "accept"}"#;
    let loose_access = r#"{"vlan": {"access": {"id": 7}}, "forged_transmits": "accept"}"#;
    for (policy, on_82576, on_i350, on_ixgbe, on_unknown) in [
        (rate, None, Some("rate"), None, Some("rate")),
        (blocked, Some("blocked"), Some("blocked"), None, Some("blocked")),
        (multicast, None, None, Some("promiscuous"), Some("promiscuous")),
        (promiscuous, Some("promiscuous"), Some("promiscuous"), Some("promiscuous"), Some("promiscuous")),
        (trunk, None, None, None, Some("vlan")),
        (loose_access, None, None, Some("forged_transmits"), None),
        (
            loose_trunk,
            Some("forged_transmits"),
            Some("forged_transmits"),
            Some("forged_transmits"),
            Some("vlan"),
        ),
        (unicast, None, None, Some("unicast_limit"), Some("unicast_limit")),
        (loose_unicast, None, None, Some("unicast_limit"), Some("unicast_limit")),
    ] {
        check(&i82576, policy, on_82576);
        check(&i350, policy, on_i350);
        check(&ixgbe, policy, on_ixgbe);
        check(&unknown, policy, on_unknown);
    }
}

/// No trust can be switched on for a running guest where that makes the PF ignore the guest, so no policy may need it.
#[test]
fn a_pf_whose_trust_needs_a_reset_offers_nothing_that_needs_trust() {
    let mac = netpolicy::MacAddress::new([2, 0, 0, 0, 0, 1]);
    let unicast = netpolicy::PromiscuousMode { multicast: false, unicast: true };
    for pf in [
        PfCapabilities::igb_82576(),
        PfCapabilities::igb_i350(),
        PfCapabilities::ixgbe(),
        PfCapabilities::i40e(),
        PfCapabilities::ice(),
        PfCapabilities::simulated(),
        PfCapabilities::unknown("mystery"),
    ] {
        for change in [Change::AddUnicast(mac), Change::SetPromiscuous(unicast)] {
            assert!(change.needs_trust());
            assert!(!pf.trust_needs_reset || !pf.can_make(&change), "{change:?} on {}", pf.driver);
        }
    }
    assert!(PfCapabilities::ixgbe().trust_needs_reset);
}

#[test]
fn the_level_of_the_setting_is_named() {
    let error = PfCapabilities::igb_i350()
        .check(&host(r#"{"rate": {"max_tx_mbit": 100}}"#).effective_policy(port_id(1)).unwrap())
        .unwrap_err();
    assert_eq!(error.source_level, Source::PortGroup);
    assert!(error.to_string().contains("Setting rate (from port_group)"), "{error}");
}

#[test]
fn what_a_checked_policy_needs_can_be_made_or_left_out() {
    let state = host("{}");
    let pf = PfCapabilities::igb_i350();
    let changes = state.baseline(port_id(1)).unwrap().changes();
    let (made, left): (Vec<_>, Vec<_>) = changes.into_iter().partition(|change| pf.can_make(change));
    assert_eq!(made.len(), 4);
    assert_eq!(left, [Change::SetMaxTxRate(None), Change::SetLink(netpolicy::LinkState::Auto)]);
}
