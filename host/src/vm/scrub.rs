// SPDX-License-Identifier: Apache-2.0

//! Scrubs a VF between two tenants, also after its vmm has crashed.
//!
//! VLANs and further addresses outlive the VF's driver, a reset and the process: the PF's driver
//! removes them only at a request of the VF itself. So the agent takes the vmm's place for a
//! moment. The VF is still bound to vfio-pci (or simulated), no other process has it open, and the
//! agent sends the messages that the relay would have sent.

use std::{sync::Arc, time::Duration};

use netpolicy::{Change, MacAddress, Route};
use passthrough::{
    channel::mailbox::{
        channel::{MailboxChannel, SendError},
        vf_mailbox::{Clock, SystemClock, VfMailboxError},
    },
    family::Family,
    hardware::VfHardware,
};
use services::pf::{PfFailure, PfHandle};
use sriov::{Bdf, PfError, VfChange};
use text::chain;

use crate::backend::FunctionBackend;
use switch::{Leftover, SwitchError};

/// The longest wait for the PF's response to one message.
const EXCHANGE: Duration = Duration::from_millis(500);

/// Attempts to reset the VF. The PF's driver learns of a reset by an interrupt and ignores earlier
/// messages, so the message is sent again.
const RESETS: u32 = 6;

/// A VF to be scrubbed.
pub struct ScrubVf {
    /// Its backend, which has [taken](FunctionBackend::take_for_scrub) it.
    pub backend: Arc<dyn FunctionBackend>,
    /// Its address.
    pub bdf: Bdf,
}

/// Removes a tenant's leftovers from a VF. No other process may have it open.
///
/// # Errors
/// [`SwitchError::NotCleaned`] with the cure. The VF must then stay with its last owner; the call
/// may be repeated.
pub async fn clean(pf: &PfHandle, vf: ScrubVf, leftover: &Leftover) -> Result<(), SwitchError> {
    let mut messages: Vec<Change> =
        leftover.changes.iter().filter(|c| c.route() == Route::Mailbox).cloned().collect();
    // A reset alone needs no message: opening or closing the device does it.
    if messages.iter().all(|change| *change == Change::Reset) {
        return Ok(());
    }
    let ScrubVf { backend, bdf } = vf;
    let failed = |why: String| SwitchError::NotCleaned { vf: bdf.to_string(), why };
    let mut trust = messages.iter().any(Change::needs_trust);
    let set_trust = |on| pf.apply(&leftover.vf, vec![VfChange::Trust(on)]);
    if trust && let Err(error) = set_trust(true).await {
        if !cannot_trust(&error) {
            return Err(failed(chain(&error)));
        }
        // Such a driver never granted the VF a setting that needs trust.
        messages.retain(|change| !change.needs_trust());
        trust = false;
    }
    let mac = leftover.effective_mac;
    let scrub = move || {
        let clock = Arc::new(SystemClock::default());
        backend.scrub(bdf, &mut |vf| send(vf, clock.clone(), &messages, mac))
    };
    let sent = tokio::task::spawn_blocking(scrub).await.unwrap_or_else(|error| Err(error.to_string()));
    let distrusted = if trust { set_trust(false).await } else { Ok(()) };
    sent.map_err(failed)?;
    distrusted.map_err(|error| failed(chain(&error)))
}

/// Whether the PF's driver has no setting for trust.
fn cannot_trust(error: &PfFailure) -> bool {
    matches!(error, PfFailure::Apply(error) if matches!(*error.source, PfError::Unsupported { .. }))
}

/// Resets the VF and sends all messages, even after a failure. Returns the first failure.
fn send(
    vf: Arc<dyn VfHardware>,
    clock: Arc<dyn Clock>,
    messages: &[Change],
    mac: MacAddress,
) -> Result<(), String> {
    // The ids of a VF may read as all-ones (PCI SR-IOV 3.4.1.1); VFIO fills in the real ones.
    let mut ids = [0xff; 4];
    vf.config_read(0, &mut ids);
    let [a, b, c, d] = ids;
    let (vendor, device) = (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
    let family = Family::of(vendor, device)
        .ok_or_else(|| format!("no family of VFs has the ids {vendor:04x}:{device:04x}"))?;
    let mut channel = MailboxChannel::new(family, vf, Arc::clone(&clock));
    reset(&mut channel, &*clock)?;
    let mut failure = None;
    for change in messages {
        let result = match channel.send_change(change, mac, EXCHANGE) {
            Ok(reply) if reply.outcome.accepted => Ok(()),
            // Such a change is not made by a message, so no message takes it back.
            Err(SendError::NoMessage) => Ok(()),
            Ok(_) => Err(format!("the PF refused {change:?}")),
            Err(error) => Err(error.to_string()),
        };
        failure = failure.or(result.err());
    }
    // Disable the queues again, because no driver reads them now.
    channel.reset_vf();
    failure.map_or(Ok(()), Err)
}

fn reset(channel: &mut MailboxChannel, clock: &dyn Clock) -> Result<(), String> {
    let mut last = SendError::Mailbox(VfMailboxError::NoReply);
    for attempt in 0..RESETS {
        if attempt > 0 {
            clock.sleep(EXCHANGE / 5);
        }
        channel.reset_vf();
        clock.sleep(EXCHANGE / 50);
        match channel.reset(EXCHANGE) {
            Ok(_) => return Ok(()),
            Err(SendError::OtherReply) => {}
            Err(error) => last = error,
        }
    }
    Err(last.to_string())
}

#[cfg(test)]
mod tests {
    use netpolicy::VlanId;
    use passthrough::relay::testing::{FakeClock, FakeVf};

    use super::*;

    /// A VF as a guest left it, and the changes that remove all leftovers.
    fn left() -> (Arc<FakeVf>, Arc<FakeClock>, Vec<Change>) {
        let clock = Arc::new(FakeClock::default());
        let mac = MacAddress::new([2, 0, 0, 0, 0, 1]);
        let vf = FakeVf::new(mac, clock.clone());
        vf.with_pf(|pf| {
            pf.trusted = true;
            pf.vlans = [100, 101].into();
            pf.filters = vec![MacAddress::new([2, 0, 0, 0, 0, 9])];
            pf.multicast = vec![7];
        });
        let leave = |id| Change::LeaveVlan(VlanId::new(id).unwrap());
        let changes = vec![
            Change::Reset,
            leave(100),
            leave(101),
            Change::ClearUnicast,
            Change::SetMulticast(Vec::new()),
        ];
        (vf, clock, changes)
    }

    const MAC: MacAddress = MacAddress::new([2, 0, 0, 0, 0, 1]);

    #[test]
    fn a_vf_whose_driver_is_gone_is_cleaned_by_its_own_mailbox() {
        let (vf, clock, changes) = left();
        send(vf.clone(), clock, &changes, MAC).unwrap();
        let pf = vf.pf();
        assert!(pf.vlans.is_empty() && pf.filters.is_empty() && pf.multicast.is_empty(), "{pf:?}");
        assert_eq!((pf.unhandled, pf.mac), (0, MAC));
    }

    #[test]
    fn what_the_pf_does_not_confirm_is_an_error_and_the_rest_is_done_all_the_same() {
        let (vf, clock, changes) = left();
        vf.with_pf(|pf| pf.trusted = false);
        let error = send(vf.clone(), clock, &changes, MAC).unwrap_err();
        assert!(error.contains("ClearUnicast"), "{error}");
        assert!(vf.pf().vlans.is_empty() && !vf.pf().filters.is_empty());

        let (vf, clock, changes) = left();
        vf.with_pf(|pf| pf.down = true);
        let error = send(vf, clock, &changes, MAC).unwrap_err();
        assert!(error.contains("interface up"), "{error}");
    }
}
