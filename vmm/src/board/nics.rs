// SPDX-License-Identifier: Apache-2.0

//! NICs of a machine, from its specification and files.

use std::{
    collections::BTreeMap,
    fs::File,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use devices::device::Device;
use netpolicy::Mtu;
use protocol::{NicSpec, NicStats, files};
use virtio::net::{Counters, Net, Options, Wire, tap::Tap};

use super::{
    Board, BoardError, Parts,
    port::PortWire,
    virtio::{failed, insert},
};

/// Counters of a machine's NICs, by their names.
#[derive(Default)]
pub struct Nics(BTreeMap<String, Arc<Counters>>);

impl Nics {
    /// The counters' values.
    #[must_use]
    pub fn stats(&self) -> BTreeMap<String, NicStats> {
        self.0.iter().map(|(id, counters)| (id.clone(), read(counters))).collect()
    }
}

fn read(counters: &Counters) -> NicStats {
    let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    NicStats {
        received: read(&counters.received),
        received_bytes: read(&counters.received_bytes),
        sent: read(&counters.sent),
        sent_bytes: read(&counters.sent_bytes),
        dropped: read(&counters.dropped),
        refused: read(&counters.refused),
    }
}

/// Builds the NICs, in their order.
pub(super) fn build(board: &Board, parts: &mut Parts<'_>) -> Result<Vec<Arc<dyn Device>>, BoardError> {
    let specs = &parts.spec.nics;
    specs.iter().map(|spec| nic(board, parts, spec)).collect()
}

/// The other side of a NIC: the port with its name, or the interface with its files.
fn wire(parts: &mut Parts<'_>, spec: &NicSpec) -> Result<Box<dyn Wire>, BoardError> {
    if let Some((port, driver)) = parts.ports.remove(&spec.id) {
        let mtu = Mtu::new(spec.mtu).map_err(|error| failed(&spec.id)(error.into()))?;
        let wire = PortWire::new(&spec.id, port, driver, spec.mac, mtu);
        return Ok(Box::new(wire.map_err(|error| failed(&spec.id)(error.into()))?));
    }
    let file = |number| parts.files.require(&files::nic(&spec.id, number)).map(File::from);
    let queues: Result<Vec<File>, _> = (0..usize::from(spec.queues)).map(file).collect();
    let queues = queues.map_err(|error| failed(&spec.id)(error.into()))?;
    Ok(Box::new(Tap::new(queues, parts.files.take(&files::nic_lock(&spec.id)))))
}

fn nic(board: &Board, parts: &mut Parts<'_>, spec: &NicSpec) -> Result<Arc<dyn Device>, BoardError> {
    let wire = wire(parts, spec)?;
    let options = Options { id: spec.id.clone(), mac: spec.mac.bytes(), mtu: Some(spec.mtu) };
    let counters = Arc::<Counters>::default();
    parts.nics.0.insert(spec.id.clone(), Arc::clone(&counters));
    let net = Net::new(wire, options, counters);
    Ok(insert(board, parts, net.identity(), net.configuration(), Box::new(net))?)
}
