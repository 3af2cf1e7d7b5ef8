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
use protocol::{NicSpec, NicStats, files};
use virtio::net::{self, Counters, Net, Options, tap::Tap};

use super::{
    Board, BoardError, Parts,
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

fn nic(board: &Board, parts: &mut Parts<'_>, spec: &NicSpec) -> Result<Arc<dyn Device>, BoardError> {
    let file = |number| parts.files.require(&files::nic(&spec.id, number)).map(File::from);
    let queues: Result<Vec<File>, _> = (0..usize::from(spec.queues)).map(file).collect();
    let queues = queues.map_err(|error| failed(&spec.id)(error.into()))?;
    let lock = parts.files.take(&files::nic_lock(&spec.id));
    let pairs = queues.len();
    let options = Options { id: spec.id.clone(), mac: spec.mac.bytes(), mtu: Some(spec.mtu) };
    let counters = Arc::<Counters>::default();
    parts.nics.0.insert(spec.id.clone(), Arc::clone(&counters));
    let (identity, configuration) = (net::identity(&options, pairs), net::configuration(&options, pairs));
    let engine = Box::new(Net::new(Box::new(Tap::new(queues, lock)), options, counters));
    Ok(insert(board, parts, identity, configuration, engine)?)
}
