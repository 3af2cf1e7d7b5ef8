// SPDX-License-Identifier: Apache-2.0

//! The tables that simulated PFs and VFs are held to, on the lab's adapter and its stock PF driver.

use std::{path::Path, sync::Arc};

use passthrough::{
    relay::testing::{
        conformance::{pf_differences, relay_differences},
        table::EFFECTIVE,
    },
    vfio::Container,
};

use crate::fixture::host;

/// A VF at vfio-pci with the address that the tables assume; as before when it is dropped.
struct Prepared;

impl Prepared {
    fn new() -> Self {
        let mac = EFFECTIVE.map(|byte| format!("{byte:02x}")).join(":");
        host::run("ip", &["link", "set", host::PF, "vf", "0", "mac", &mac]);
        host::bind_vfio(host::VF0);
        Self
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        host::unbind(host::VF0);
        host::run("ip", &["link", "set", host::PF, "vf", "0", "mac", "00:00:00:00:00:00"]);
    }
}

#[test]
fn igb_and_the_relay_in_front_of_it_answer_as_the_tables_say() {
    let _prepared = Prepared::new();
    let container = Container::new(None).unwrap();
    let vf = Arc::new(container.open(&Path::new("/sys/bus/pci/devices").join(host::VF0)).unwrap());
    let none: [String; 0] = [];
    let [pf, relay] = [pf_differences(vf.clone()), relay_differences(vf)];
    assert_eq!((pf.as_slice(), relay.as_slice()), (&none[..], &none[..]));
}
