// SPDX-License-Identifier: Apache-2.0

//! The handler of a vCPU's accesses to the trapped mailbox page.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use super::shared::Shared;
use crate::{
    channel::mailbox::{layout::Access, registers::Read},
    family::Family,
    function::BarHandler,
    hardware::VfHardware,
};

/// Handles a guest's accesses to the trapped mailbox page. Accesses to registers that the family
/// [passes](crate::channel::mailbox::layout::Layout::passes) reach the hardware without a lock. The relay emulates
/// all other registers, behind their lock. The handler waits for nothing else.
pub struct MailboxPage {
    shared: Arc<Shared>,
    hardware: Arc<dyn VfHardware>,
    family: &'static Family,
    counts_passed: bool,
}

impl MailboxPage {
    pub(crate) fn new(shared: Arc<Shared>, hardware: Arc<dyn VfHardware>, family: &'static Family) -> Self {
        Self { shared, hardware, family, counts_passed: family.layout.is_shared() }
    }

    /// Holds the lock of the registers.
    #[cfg(test)]
    pub(crate) fn lock_registers_for_test(&self) -> std::sync::MutexGuard<'_, super::shared::State> {
        self.shared.lock()
    }

    fn count(&self, counter: &AtomicU64) {
        if self.counts_passed {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Logs the first access to each unknown register of the page.
    fn log_unknown(&self, first: bool, offset: u64) {
        if first {
            tracing::debug!(
                offset,
                driver = self.family.driver,
                "The guest accessed a VF register that is not emulated"
            );
        }
    }
}

impl BarHandler for MailboxPage {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let layout = &self.family.layout;
        if layout.passes(offset, data.len(), Access::Read) {
            self.count(&self.shared.passed.reads);
            return self.hardware.bar_read(layout.bar, offset, data);
        }
        data.fill(0);
        match self.shared.read(offset, data.len()) {
            Read::Shadow { value, .. } => {
                for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
                    *to = from;
                }
            }
            Read::Unknown { first } => self.log_unknown(first, offset),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let layout = &self.family.layout;
        if layout.passes(offset, data.len(), Access::Write) {
            self.count(&self.shared.passed.writes);
            return self.hardware.bar_write(layout.bar, offset, data);
        }
        let value = <[u8; 4]>::try_from(data).map_or(0, u32::from_le_bytes);
        let first = self.shared.write(offset, data.len(), value);
        self.log_unknown(first, offset);
    }

    fn before_reset(&self) {
        self.shared.function_reset();
    }

    fn after_reset(&self) {
        self.shared.function_reset();
    }
}
