// SPDX-License-Identifier: Apache-2.0

//! The relay in front of a simulated VF: the same tables as for every other PF.

use std::time::Duration;

use netpolicy::MacAddress;
use passthrough::relay::{
    Config,
    testing::{
        Bus, Driver,
        conformance::{Agent, Page, pf_differences, relay_differences},
        table::EFFECTIVE,
    },
};
use sriov::VfChange;

use super::fixture::{Adapter, mac};

#[test]
fn messages_are_answered_as_the_tables_say() {
    let mut adapter = Adapter::new(1);
    let (vf, _memory) = adapter.vf(0, MacAddress::new(EFFECTIVE));
    assert_eq!(pf_differences(vf.clone()), [] as [String; 0]);
    assert_eq!(relay_differences(vf), [] as [String; 0]);
}

#[test]
fn the_guest_hears_of_the_link_and_of_a_new_address() {
    let mut adapter = Adapter::new(1);
    let (vf, _memory) = adapter.vf(0, MacAddress::new(EFFECTIVE));
    let (relay, agent) = Agent::with_relay(Config::default(), vf);
    let mut driver = Driver::new(Page(relay.page()));
    driver.probe();
    assert!(!driver.watchdog());
    adapter.pf.set_link(false).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(driver.bus.read(8) & 2, 0);
    adapter.pf.set_link(true).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(driver.bus.read(8) & 2, 2);
    // The administrator's commit appears at the next reset.
    adapter.apply(0, VfChange::Mac(Some(mac(0x22))));
    *agent.effective.lock().unwrap() = mac(0x22);
    relay.set_effective_mac(mac(0x22));
    driver.reset_hw().unwrap();
    assert_eq!(driver.perm, mac(0x22));
}
