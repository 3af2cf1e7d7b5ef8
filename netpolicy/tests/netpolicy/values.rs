// SPDX-License-Identifier: Apache-2.0

//! Values that cannot be invalid.

use netpolicy::{MacAddress, MacPattern, Mtu, Name, Qos, Rate, Settings, VlanId, VlanPolicy, VlanSet};
use proptest::prelude::*;

use crate::fixture::{mac, vlan};

#[test]
fn addresses_from_text() {
    for bad in [
        "",
        "02",
        "02:00:00:00:00",
        "02:00:00:00:00:11:22",
        "2:0:0:0:0:11",
        "+2:00:00:00:00:11",
        "02-00-00-00-00-11",
        "0g:00:00:00:00:00",
        "02:00:00:00:00:é",
    ] {
        assert!(bad.parse::<MacAddress>().is_err(), "{bad}");
    }
    let address = mac("02:00:00:00:AA:11");
    assert_eq!(
        (address.bytes(), address.to_string().as_str()),
        ([2, 0, 0, 0, 0xaa, 0x11], "02:00:00:00:aa:11")
    );
    assert!(address.is_locally_administered() && address.is_assignable());
    assert!(!mac("00:1b:21:00:00:01").is_locally_administered());
    assert!(!mac("03:00:00:00:00:01").is_assignable() && !MacAddress::ZERO.is_assignable());
}

#[test]
fn patterns() {
    let vrrp: MacPattern = "00:00:5e:00:01:00/ff:ff:ff:ff:ff:00".parse().unwrap();
    assert!(vrrp.matches(mac("00:00:5e:00:01:ff")) && !vrrp.matches(mac("00:00:5e:00:02:00")));
    let one: MacPattern = "02:00:00:00:00:01".parse().unwrap();
    assert!(one.matches(mac("02:00:00:00:00:01")) && !one.matches(mac("02:00:00:00:00:00")));
    assert!("00:00:5e:00:01:07/ff:ff:ff:ff:ff:00".parse::<MacPattern>().is_err());
    assert!("00:00:5e:00:01:00/ff".parse::<MacPattern>().is_err());
}

#[test]
fn numbers() {
    assert!([0, 4095, u16::MAX].into_iter().all(|id| VlanId::new(id).is_err()));
    assert!([1, 4094].into_iter().all(|id| VlanId::new(id).is_ok()));
    assert!(Qos::new(7).is_ok() && Qos::new(8).is_err());
    assert!([67, 9217, u16::MAX].into_iter().all(|mtu| Mtu::new(mtu).is_err()));
    assert_eq!(Mtu::new(1500).unwrap().max_frame(), 1526);
}

#[test]
fn names() {
    for good in ["a", "0", "web-1", "a.b_c", &"x".repeat(63)] {
        assert!(Name::new(good).is_ok(), "{good}");
    }
    for bad in ["", "-a", ".a", "A", "a b", "a/b", "ä", "a\n", &"x".repeat(64)] {
        assert!(Name::new(bad).is_err(), "{bad}");
    }
}

#[test]
fn settings_in_json() {
    let text = r#"{"mac_changes":{"list":["00:00:5e:00:01:00/ff:ff:ff:ff:ff:00"]},"mac_sharing":"same_vm","forged_transmits":"accept","promiscuous":"multicast","vlan":{"trunk":[7,"100-200"]},"multicast_limit":10,"unicast_limit":3,"vlan_limit":32,"mtu":9000,"rate":{"max_tx_mbit":100},"on_denied":"silent","blocked":false}"#;
    let settings: Settings = serde_json::from_str(text).unwrap();
    assert_eq!(serde_json::to_string(&settings).unwrap(), text);
    assert_eq!(settings.present().count(), netpolicy::Setting::ALL.len());
    assert_eq!(serde_json::to_string(&Settings::default()).unwrap(), "{}");
    for (text, vlan) in [
        (r#""none""#, VlanPolicy::None),
        (
            r#"{"access":{"id":10}}"#,
            VlanPolicy::Access(netpolicy::AccessVlan { id: vlan(10), qos: Qos::default() }),
        ),
    ] {
        assert_eq!(serde_json::from_str::<VlanPolicy>(text).unwrap(), vlan);
        assert_eq!(serde_json::to_string(&vlan).unwrap(), text);
    }
    assert_eq!(serde_json::to_string(&Rate::Unlimited).unwrap(), r#""unlimited""#);
}

#[test]
fn settings_that_cannot_be() {
    for (text, hint) in [
        (r#"{"mac_change": "reject"}"#, "mac_change"),
        (r#"{"mac_changes": "maybe"}"#, "maybe"),
        (r#"{"vlan": {"access": {"id": 4095}}}"#, "use 1 to 4094"),
        (r#"{"vlan": {"access": {"id": 5, "qos": 8}}}"#, "use 0 to 7"),
        (r#"{"vlan": {"trunk": []}}"#, "at least one VLAN"),
        (r#"{"vlan": {"trunk": ["200-100"]}}"#, "swap"),
        (r#"{"vlan": {"trunk": ["x"]}}"#, "like 100-200"),
        (r#"{"vlan": {"trunk": [70000]}}"#, "VLAN 70000 does not exist: use 1 to 4094"),
        (r#"{"vlan": {"trunk": [true]}}"#, "like"),
        (r#"{"vlan": {"access": {"id": 70000}}}"#, "VLAN 70000 does not exist: use 1 to 4094"),
        (r#"{"vlan": {"access": {"id": 5, "qos": 256}}}"#, "VLAN priority 256 does not exist: use 0 to 7"),
        (r#"{"multicast_limit": -1}"#, "-1 is out of range: use 0 to 30"),
        (r#"{"mtu": 70000}"#, "70000 is out of range: use 68 to 9216"),
        (r#"{"multicast_limit": 31}"#, "use 0 to 30"),
        (r#"{"unicast_limit": 4}"#, "use 0 to 3"),
        (r#"{"vlan_limit": 33}"#, "use 0 to 32"),
        (r#"{"mtu": 10000}"#, "use 68 to 9216"),
        (r#"{"rate": {"max_tx_mbit": 0}}"#, "nonzero"),
    ] {
        let error = serde_json::from_str::<Settings>(text).expect_err(text).to_string();
        assert!(error.contains(hint), "{text}: {error}");
    }
    let many = format!(
        r#"{{"mac_changes": {{"list": [{}"02:00:00:00:00:01"]}}}}"#,
        r#""02:00:00:00:00:01","#.repeat(64)
    );
    assert!(serde_json::from_str::<Settings>(&many).is_err());
    let gaps: Vec<u16> = (0..129).map(|n| 1 + 2 * n).collect();
    assert!(serde_json::from_value::<VlanSet>(gaps.into()).is_err());
}

proptest! {
    #[test]
    fn a_mac_survives_its_text(bytes: [u8; 6]) {
        let address = MacAddress::new(bytes);
        prop_assert_eq!(address.to_string().parse(), Ok(address));
        prop_assert_eq!(address.is_unicast(), bytes[0] % 2 == 0);
    }

    #[test]
    fn any_text_parses_or_fails(text in "\\PC{0,40}") {
        if let Ok(address) = text.parse::<MacAddress>() {
            prop_assert_eq!(address.to_string(), text.to_lowercase());
        }
        let _ = text.parse::<MacPattern>();
        let _ = text.parse::<VlanSet>();
    }

    #[test]
    fn a_set_has_exactly_its_ranges(pairs in prop::collection::vec((1_u16..=4094, 0_u16..300), 1..20), probes in prop::collection::vec(1_u16..=4094, 100)) {
        let pairs: Vec<_> = pairs.into_iter().map(|(first, more)| (first, (first + more).min(4094))).collect();
        let set = VlanSet::new(pairs.iter().map(|(a, b)| (vlan(*a), vlan(*b)))).unwrap();
        let edges = pairs.iter().flat_map(|(a, b)| [*a, *b, a.saturating_sub(1).max(1), (b + 1).min(4094)]);
        for probe in probes.into_iter().chain(edges) {
            let expect = pairs.iter().any(|(a, b)| (*a..=*b).contains(&probe));
            prop_assert_eq!(set.contains(vlan(probe)), expect, "{} in {}", probe, set);
        }
        prop_assert!(set.ranges().windows(2).all(|pair| pair[0].1.get() + 1 < pair[1].0.get()), "{} not separate", set);
        prop_assert_eq!(set.to_string().parse(), Ok(set.clone()));
        let json = serde_json::to_string(&set).unwrap();
        prop_assert_eq!(serde_json::from_str::<VlanSet>(&json).unwrap(), set);
    }
}
