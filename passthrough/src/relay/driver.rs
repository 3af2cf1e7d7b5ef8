// SPDX-License-Identifier: Apache-2.0

//! A VF's driver in this process, in place of a guest's: for a device that a VM sees as something else than a VF.
//!
//! ```text
//!   device of the machine ──▶ Driver ──accesses──▶ MailboxPage ──▶ relay ──▶ PF
//! ```
//!
//! The driver sends its messages to the page that the relay traps, as the driver of a guest does. So the relay decides,
//! denies, delays and counts them in the same way.

use std::{io, sync::Arc, time::Duration};

use devices::memory::HostMemory;
use netpolicy::{MacAddress, Request};
use vmm_sys_util::eventfd::EventFd;

use super::{MailboxPage, Relay, shared::Shared};
use crate::{
    channel::mailbox::{
        channel::{MailboxChannel, SendError},
        layout::PAGE_SIZE,
        vf_mailbox::{Observed, SystemClock},
    },
    function::BarHandler as _,
    hardware::{BarInfo, IrqKind, VfHardware},
};

/// The time for one message. A relay replies within 850 ms, see [`super::Config`].
const PATIENCE: Duration = Duration::from_secs(1);

/// The registers as a guest has them: the relay's page, and the hardware behind it.
struct GuestView {
    page: Arc<MailboxPage>,
    hardware: Arc<dyn VfHardware>,
    bar: usize,
}

impl GuestView {
    fn traps(&self, index: usize, offset: u64) -> bool {
        index == self.bar && offset < PAGE_SIZE
    }
}

impl VfHardware for GuestView {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.hardware.config_read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        self.hardware.config_write(offset, data);
    }

    fn bar(&self, index: usize) -> BarInfo {
        self.hardware.bar(index)
    }

    fn bar_read(&self, index: usize, offset: u64, data: &mut [u8]) {
        if self.traps(index, offset) {
            self.page.read(offset, data);
        } else {
            self.hardware.bar_read(index, offset, data);
        }
    }

    fn bar_write(&self, index: usize, offset: u64, data: &[u8]) {
        if self.traps(index, offset) {
            self.page.write(offset, data);
        } else {
            self.hardware.bar_write(index, offset, data);
        }
    }

    fn map_bar(&self, _index: usize, _offset: u64, _len: u64) -> io::Result<Arc<dyn HostMemory>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn irq_count(&self, kind: IrqKind) -> u32 {
        self.hardware.irq_count(kind)
    }

    fn enable_irqs(&self, kind: IrqKind, triggers: &[EventFd]) -> io::Result<()> {
        self.hardware.enable_irqs(kind, triggers)
    }

    fn disable_irqs(&self, kind: IrqKind) -> io::Result<()> {
        self.hardware.disable_irqs(kind)
    }

    fn reset(&self) -> io::Result<()> {
        self.hardware.reset()
    }
}

/// The PF's response to a request, through the relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Whether it was granted. A silent denial looks like a grant.
    pub granted: bool,
    /// Whether the VF must be [started](Driver::start) again before its next request.
    pub needs_start: bool,
}

/// A driver of one VF. Each call takes about one second at most.
pub struct Driver {
    channel: MailboxChannel,
    relay: Arc<Shared>,
    /// The address in the last reset reply, or the one that was granted since.
    address: Option<MacAddress>,
}

impl Driver {
    /// A driver for the VF of a relay. It has sent nothing yet.
    #[must_use]
    pub fn new(relay: &Relay, hardware: Arc<dyn VfHardware>) -> Self {
        let view = GuestView { page: relay.page(), hardware, bar: relay.family.layout.bar };
        let clock = Arc::new(SystemClock::default());
        let channel = MailboxChannel::new(relay.family, Arc::new(view), clock);
        Self { channel, relay: Arc::clone(&relay.shared), address: None }
    }

    /// The VF's address as this driver knows it; before its start, the effective one. None if nobody knows it yet.
    #[must_use]
    pub fn address(&self) -> Option<MacAddress> {
        self.address.or_else(|| self.relay.effective())
    }

    /// Turns the queues off, and forgets the address. The PF listens to nothing until [`Driver::start`].
    pub fn stop(&mut self) {
        self.address = None;
        self.channel.reset_vf();
    }

    /// Resets the VF and turns its queues on. Returns its address, if the PF has one for it.
    ///
    /// # Errors
    /// See [`SendError`]: the PF is down, being reset or gone.
    pub fn start(&mut self) -> Result<Option<MacAddress>, SendError> {
        self.channel.reset_vf();
        self.address = self.channel.reset(PATIENCE)?.mac;
        Ok(self.address)
    }

    /// Sends a request.
    ///
    /// # Errors
    /// See [`SendError`]: whether it was carried out is not known.
    pub fn request(&mut self, request: &Request) -> Result<Answer, SendError> {
        let effective = self.address.unwrap_or(MacAddress::ZERO);
        let outcome = self.channel.send(request, effective, PATIENCE)?.outcome;
        if let (true, Request::SetMac(mac)) = (outcome.accepted, request) {
            self.address = Some(*mac);
        }
        Ok(Answer { granted: outcome.accepted, needs_start: !outcome.clear_to_send })
    }

    /// The request to receive these multicast addresses in place of those before.
    #[must_use]
    pub fn multicast(&self, groups: &[MacAddress]) -> Request {
        let codec = self.channel.family().codec;
        Request::SetMulticast {
            count: u16::try_from(groups.len()).unwrap_or(u16::MAX),
            hashes: groups.iter().map(|group| codec.multicast_hash(*group)).collect(),
        }
    }

    /// Looks for messages of the PF. Returns whether the VF must be [started](Driver::start) again: the PF has been reset, or
    /// has revoked a right of the VF.
    pub fn needs_start(&mut self) -> bool {
        let Observed { reset_done, message, resetting, gone } = self.channel.poll();
        let lost = message.is_some_and(|message| !message.clear_to_send);
        !gone && !resetting && (reset_done || lost)
    }
}
