// SPDX-License-Identifier: Apache-2.0

//! Runs the tables that simulated PFs and VFs must pass on an adapter and its stock PF driver: the lab's, or a
//! host's.
//!
//! `tests/hardware` prepares the adapter and names it in the environment.

use std::{env, path::Path, sync::Arc};

use passthrough::{
    relay::testing::{
        conformance::{pf_differences, relay_differences},
        table::EFFECTIVE,
    },
    vfio::Container,
};

use crate::fixture::host;

/// A VF at vfio-pci with the address that the tables assume. Dropping it restores the VF.
struct Prepared {
    pf: String,
    vf: String,
}

impl Prepared {
    fn new() -> Self {
        let [pf, vf] = ["PORTCULLIS_HARDWARE_PF", "PORTCULLIS_HARDWARE_VF"]
            .map(|name| env::var(name).unwrap_or_else(|_| panic!("{name} is set by tests/hardware")));
        let prepared = Self { pf, vf };
        prepared.set_mac(&EFFECTIVE.map(|byte| format!("{byte:02x}")).join(":"));
        host::bind_vfio(&prepared.vf);
        prepared
    }

    fn set_mac(&self, mac: &str) {
        host::run("ip", &["link", "set", &self.pf, "vf", "0", "mac", mac]);
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        host::unbind(&self.vf);
        self.set_mac("00:00:00:00:00:00");
    }
}

#[test]
fn the_pf_and_the_relay_answer_as_the_tables_say() {
    let prepared = Prepared::new();
    let container = Container::new(None).unwrap();
    let vf = Arc::new(container.open(&Path::new("/sys/bus/pci/devices").join(&prepared.vf)).unwrap());
    let none: [String; 0] = [];
    let [pf, relay] = [pf_differences(vf.clone()), relay_differences(vf)];
    assert_eq!((pf.as_slice(), relay.as_slice()), (&none[..], &none[..]));
}
