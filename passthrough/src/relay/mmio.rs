// SPDX-License-Identifier: Apache-2.0

//! The handler of a vCPU's accesses to the trapped mailbox page.

use std::sync::Arc;

use super::shared::Shared;
use crate::{
    channel::mailbox::{layout::Layout, registers::Read},
    function::BarHandler,
    hardware::VfHardware,
};

/// Handles a guest's accesses to the trapped mailbox page. It takes the registers' lock and, for status and
/// statistics, reads one register of the hardware. It waits for nothing else.
pub struct MailboxPage {
    shared: Arc<Shared>,
    hardware: Arc<dyn VfHardware>,
    layout: &'static Layout,
}

impl MailboxPage {
    pub(crate) fn new(shared: Arc<Shared>, hardware: Arc<dyn VfHardware>, layout: &'static Layout) -> Self {
        Self { shared, hardware, layout }
    }

    /// Logs the first access to each unknown register of the page.
    fn log_unknown(&self, first: bool, offset: u64) {
        if first {
            tracing::debug!(
                offset,
                driver = self.layout.driver,
                "The guest accessed a VF register that is not emulated"
            );
        }
    }
}

impl BarHandler for MailboxPage {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match self.shared.read(offset, data.len()) {
            Read::Shadow { value, .. } => {
                for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
                    *to = from;
                }
            }
            Read::Hardware => self.hardware.bar_read(self.layout.bar, offset, data),
            Read::Unknown { first } => self.log_unknown(first, offset),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
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
