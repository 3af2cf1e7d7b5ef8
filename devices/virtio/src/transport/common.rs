// SPDX-License-Identifier: Apache-2.0

//! The common configuration structure (the specification, 4.1.4.3).

use std::sync::{
    Arc,
    atomic::{AtomicU16, Ordering},
};

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::EventFd;

use crate::{
    GuestMemory,
    engine::{Configuration, Identity},
    negotiation::{NEEDS_RESET, Negotiation, Step, feature},
    queue::{ActiveQueue, Interrupt, NO_VECTOR, QueueError, Registers},
    worker::Shared,
};

const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DEVICE_FEATURE: u64 = 0x04;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const CONFIG_VECTOR: u64 = 0x10;
const QUEUE_COUNT: u64 = 0x12;
const STATUS: u64 = 0x14;
const GENERATION: u64 = 0x15;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_NOTIFY: u64 = 0x1e;
const QUEUE_DESCRIPTORS: u64 = 0x20;
const QUEUE_AVAILABLE: u64 = 0x28;
const QUEUE_USED: u64 = 0x30;
const END: u64 = 0x38;

struct QueueRegisters {
    most: u16,
    set: Registers,
    enabled: bool,
    vector: Arc<AtomicU16>,
}

/// The registers of the structure.
pub(super) struct Common {
    negotiation: Negotiation,
    features: u64,
    device_select: u32,
    driver_select: u32,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
    vectors: Arc<[EventFd]>,
    change_vector: Arc<AtomicU16>,
    isr: Arc<AtomicU16>,
    /// The status that a driver reads until its reset is over.
    last_status: u8,
}

impl Common {
    pub(super) fn new(identity: &Identity, vectors: Arc<[EventFd]>) -> Self {
        let queue = |most: &u16| QueueRegisters {
            most: *most,
            set: Registers { size: *most, ..Registers::default() },
            enabled: false,
            vector: Arc::new(AtomicU16::new(NO_VECTOR)),
        };
        Self {
            negotiation: Negotiation::new(identity.features),
            features: identity.features,
            device_select: 0,
            driver_select: 0,
            queue_select: 0,
            queues: identity.queues.iter().take(super::MAX_QUEUES).map(queue).collect(),
            vectors,
            change_vector: Arc::new(AtomicU16::new(NO_VECTOR)),
            isr: Arc::default(),
            last_status: 0,
        }
    }

    /// The interrupt of configuration changes.
    pub(super) fn on_change(&self) -> Interrupt {
        self.interrupt(&self.change_vector)
    }

    fn interrupt(&self, vector: &Arc<AtomicU16>) -> Interrupt {
        let (vectors, isr) = (Arc::clone(&self.vectors), Arc::clone(&self.isr));
        Interrupt { vectors, vector: Arc::clone(vector), isr }
    }

    /// Whether a driver is ready.
    pub(super) fn runs(&self) -> bool {
        self.negotiation.runs()
    }

    pub(super) fn reset(&mut self) {
        self.negotiation = Negotiation::new(self.features);
        (self.device_select, self.driver_select, self.queue_select) = (0, 0, 0);
        for queue in &mut self.queues {
            queue.set = Registers { size: queue.most, ..Registers::default() };
            queue.enabled = false;
            queue.vector.store(NO_VECTOR, Ordering::Release);
        }
        self.change_vector.store(NO_VECTOR, Ordering::Release);
    }

    fn status(&self, shared: &Shared) -> u8 {
        if shared.resetting() {
            return self.last_status;
        }
        let broken = if shared.broken() { NEEDS_RESET } else { 0 };
        self.negotiation.status() | broken
    }

    fn selected(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::from(self.queue_select))
    }

    pub(super) fn read(&self, offset: u64, data: &mut [u8], shared: &Shared, configuration: &Configuration) {
        let mut bytes = [0_u8; 0x40];
        let mut put = |at: u64, value: &[u8]| {
            for (to, from) in bytes.iter_mut().skip(usize::try_from(at).unwrap_or(usize::MAX)).zip(value) {
                *to = *from;
            }
        };
        put(DEVICE_FEATURE_SELECT, &self.device_select.to_le_bytes());
        put(DEVICE_FEATURE, &self.negotiation.offered(self.device_select).to_le_bytes());
        put(DRIVER_FEATURE_SELECT, &self.driver_select.to_le_bytes());
        put(DRIVER_FEATURE, &self.negotiation.written(self.driver_select).to_le_bytes());
        put(CONFIG_VECTOR, &self.change_vector.load(Ordering::Acquire).to_le_bytes());
        put(QUEUE_COUNT, &u16::try_from(self.queues.len()).unwrap_or(0).to_le_bytes());
        put(STATUS, &[self.status(shared)]);
        put(GENERATION, &[configuration.generation()]);
        put(QUEUE_SELECT, &self.queue_select.to_le_bytes());
        // A queue that is not there has size 0 (4.1.4.3.1).
        if let Some(queue) = self.selected() {
            put(QUEUE_SIZE, &queue.set.size.to_le_bytes());
            put(QUEUE_VECTOR, &queue.vector.load(Ordering::Acquire).to_le_bytes());
            put(QUEUE_ENABLE, &u16::from(queue.enabled).to_le_bytes());
            put(QUEUE_NOTIFY, &self.queue_select.to_le_bytes());
            put(QUEUE_DESCRIPTORS, &queue.set.descriptors.to_le_bytes());
            put(QUEUE_AVAILABLE, &queue.set.available.to_le_bytes());
            put(QUEUE_USED, &queue.set.used.to_le_bytes());
        }
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (at, byte) in data.iter_mut().enumerate() {
            *byte = bytes.get(from.saturating_add(at)).copied().unwrap_or(0);
        }
    }

    /// Writes a register. A driver writes each field at once, except for the 64-bit fields, which it
    /// may write in halves (4.1.3.1).
    pub(super) fn write(&mut self, offset: u64, data: &[u8], shared: &Shared, memory: &Arc<GuestMemory>) {
        if shared.resetting() || offset >= END {
            return;
        }
        match (offset, data) {
            (DEVICE_FEATURE_SELECT, &[a, b, c, d]) => self.device_select = u32::from_le_bytes([a, b, c, d]),
            (DRIVER_FEATURE_SELECT, &[a, b, c, d]) => self.driver_select = u32::from_le_bytes([a, b, c, d]),
            (DRIVER_FEATURE, &[a, b, c, d]) => {
                self.negotiation.accept(self.driver_select, u32::from_le_bytes([a, b, c, d]));
            }
            (CONFIG_VECTOR, &[a, b]) => self.set_vector(&self.change_vector, u16::from_le_bytes([a, b])),
            (STATUS, &[status]) => self.write_status(status, shared, memory),
            (QUEUE_SELECT, &[a, b]) => self.queue_select = u16::from_le_bytes([a, b]),
            (QUEUE_VECTOR, &[a, b]) => {
                if let Some(queue) = self.selected() {
                    self.set_vector(&queue.vector, u16::from_le_bytes([a, b]));
                }
            }
            _ => self.write_queue(offset, data),
        }
    }

    /// A vector that is not there reads back as none (4.1.5.1.2.1).
    fn set_vector(&self, register: &AtomicU16, vector: u16) {
        let known = usize::from(vector) < self.vectors.len();
        register.store(if known { vector } else { NO_VECTOR }, Ordering::Release);
    }

    fn write_queue(&mut self, offset: u64, data: &[u8]) {
        if !self.negotiation.configures_queues() {
            return;
        }
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else { return };
        match (offset, data) {
            (QUEUE_ENABLE, &[1, 0]) => queue.enabled = true,
            _ if queue.enabled => {}
            (QUEUE_SIZE, &[a, b]) => queue.set.size = u16::from_le_bytes([a, b]),
            _ => {
                let (field, at) = match offset {
                    QUEUE_DESCRIPTORS..QUEUE_AVAILABLE => (&mut queue.set.descriptors, QUEUE_DESCRIPTORS),
                    QUEUE_AVAILABLE..QUEUE_USED => (&mut queue.set.available, QUEUE_AVAILABLE),
                    QUEUE_USED..END => (&mut queue.set.used, QUEUE_USED),
                    _ => return,
                };
                let mut bytes = field.to_le_bytes();
                let from = usize::try_from(offset - at).unwrap_or(usize::MAX);
                if matches!(data.len(), 4 | 8)
                    && let Some(part) = bytes.get_mut(from..from.saturating_add(data.len()))
                {
                    part.copy_from_slice(data);
                    *field = u64::from_le_bytes(bytes);
                }
            }
        }
    }

    fn write_status(&mut self, status: u8, shared: &Shared, memory: &Arc<GuestMemory>) {
        let (was, ran) = (self.status(shared), self.negotiation.runs());
        match self.negotiation.write(status) {
            Step::None => {}
            Step::Start => match self.start(memory) {
                Ok(queues) => shared.start(self.negotiation.features(), queues),
                Err(error) => shared.break_down(&error),
            },
            Step::Reset => {
                self.reset();
                // The worker has the rings if the driver was ready once.
                if ran {
                    self.last_status = was;
                    shared.stop();
                }
            }
        }
    }

    fn start(&self, memory: &Arc<GuestMemory>) -> Result<Vec<Option<ActiveQueue>>, QueueError> {
        let event_index = self.negotiation.features() & feature(VIRTIO_RING_F_EVENT_IDX) != 0;
        let start = |queue: &QueueRegisters| {
            let interrupt = self.interrupt(&queue.vector);
            let active =
                || ActiveQueue::new(queue.most, queue.set, event_index, Arc::clone(memory), interrupt);
            queue.enabled.then(active).transpose()
        };
        self.queues.iter().map(start).collect()
    }
}
