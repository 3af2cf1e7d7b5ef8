// SPDX-License-Identifier: Apache-2.0

//! Jobs: changes on the PF and through mailboxes. They take time, so they run beside the switch's task.

use std::{sync::Arc, time::Duration};

use failpoints::{Point, reach};
use netpolicy::{Change, Corrections, MacAddress, PfCapabilities, PortId, Route, VfRef};
use passthrough::relay::{Decision as RelayDecision, Forwarded, GuestRequest, How, Verdict};
use protocol::{AgentResponse, Outcome, VmmCommand};
use services::{line_rate::PortLog, metrics::Metrics, pf::PfHandle, vmm_process::CommandError};
use sriov::{VfChange, VfSettings};
use text::chain;
use tokio::{
    sync::oneshot,
    time::{Instant, sleep, timeout},
};

use super::{Timing, journal::Journal, port_queue::Revert, record::Attachment, vmm_client::Vmm};

/// The attempts to have the relay make a change, and the pause between two attempts.
const ATTEMPTS: u32 = 3;
const PAUSE: Duration = Duration::from_millis(300);

/// The context of a job.
pub(super) struct CommitContext {
    pub(super) pf: PfHandle,
    pub(super) journal: Journal,
    pub(super) vmm: Option<Arc<dyn Vmm>>,
    pub(super) timing: Timing,
    pub(super) metrics: Metrics,
    pub(super) log: PortLog,
    pub(super) port: PortId,
    pub(super) adapter: String,
    pub(super) vf: VfRef,
    pub(super) capabilities: Option<PfCapabilities>,
    /// The port's record that must be durable before the first change.
    pub(super) before: Attachment,
}

/// The result of a job.
pub(super) enum End {
    Request(RequestEnd),
    Reverted { revert: Revert, from: MacAddress, error: Option<String> },
    Corrected { corrections: Corrections, leftover: Vec<Change>, made: Applied },
    Repaired { found: Result<Vec<Drift>, String> },
    Rebooted { made: Applied },
    Told,
    Recovered { shown: Option<VfSettings> },
}

/// A request whose job has ended.
pub(super) struct RequestEnd {
    pub(super) id: u64,
    pub(super) guest_request: GuestRequest,
    pub(super) changes: Vec<Change>,
    /// The relay forwards the guest's message to the PF, and gives the PF's response to the guest.
    pub(super) forward: bool,
    pub(super) outcome: RequestOutcome,
}

/// The result of a request that needs changes.
#[derive(Debug)]
pub(super) enum RequestOutcome {
    /// All changes are made.
    Applied,
    /// The PF refused the forwarded message. The changes before it are made.
    RefusedByPf { made: Vec<Change> },
    /// The PF did not respond: changes that add something count as made.
    Unanswered { made: Vec<Change> },
    /// The request was cancelled before the message was sent.
    Withdrawn { made: Vec<Change> },
    /// A step failed before the PF responded to the guest's message.
    Failed { made: Vec<Change>, why: String },
}

/// A setting of the PF that was found to be wrong.
#[derive(Clone, Debug)]
pub(super) struct Drift {
    pub(super) wanted: Change,
    pub(super) old: String,
    /// The reason that it could not be corrected.
    pub(super) error: Option<String>,
}

/// The results of changes that are independent of each other.
#[derive(Debug, Default)]
pub(super) struct Applied {
    pub(super) done: Vec<Change>,
    pub(super) failed: Vec<(Change, String)>,
    /// The relay will make them at the guest's next reset.
    pub(super) deferred: Vec<Change>,
    /// Not confirmed: the vmm is not connected.
    pub(super) offline: bool,
}

impl CommitContext {
    fn adapter(&self) -> String {
        self.adapter.clone()
    }

    async fn set(&self, changes: Vec<VfChange>) -> Result<(), String> {
        self.pf.apply(&self.vf, changes).await.map_err(|error| chain(&error))
    }

    /// Starts the durable write of `before`. Call it on the switch's task, before the job runs: a running job would
    /// overwrite newer records.
    fn note(&self) -> oneshot::Receiver<Result<(), String>> {
        self.journal.save(self.port, &self.before)
    }

    /// Switches trust off again after a message. If this fails, the next comparison with the PF repeats it.
    async fn distrust(&self) {
        if let Err(why) = self.trust(false).await {
            self.log.line(self.port, |suppressed| {
                tracing::error!(port = %self.port, suppressed, "Trust could not be switched off after a message: {why}");
            });
        }
    }

    async fn trust(&self, on: bool) -> Result<(), String> {
        self.set(vec![VfChange::Trust(on)]).await
    }

    /// Whether to switch trust on around the messages.
    fn needs_trust<'a>(&self, mut messages: impl Iterator<Item = &'a Change>) -> bool {
        // With `trust_needs_reset`, the PF ignores the VF after a change of trust until the VF's next reset. It
        // would ignore the message, too.
        let at_once = self.capabilities.as_ref().is_none_or(|capabilities| !capabilities.trust_needs_reset);
        at_once && messages.any(Change::needs_trust)
    }

    fn can_make(&self, change: &Change) -> bool {
        self.capabilities.as_ref().is_none_or(|capabilities| capabilities.can_make(change))
    }

    /// Makes a request's changes: first by the PF's driver, then by the agent's own messages, and last by the
    /// guest's message.
    pub(super) fn request(
        self,
        id: u64,
        guest_request: GuestRequest,
        changes: Vec<Change>,
        effective_mac: MacAddress,
        forwarded: oneshot::Receiver<Forwarded>,
    ) -> impl Future<Output = End> + Send + 'static {
        let noted = self.note();
        let (pf, mut mailbox): (Vec<Change>, Vec<Change>) =
            changes.iter().cloned().partition(|change| change.route() == Route::Pf);
        let own = mailbox.pop();
        let forward = own.is_some();
        let verdict = Verdict {
            seq: guest_request.seq,
            effective_mac,
            decision: RelayDecision::Grant { how: How::Forward },
        };
        let begun = Instant::now();
        async move {
            let outcome = if matches!(noted.await, Ok(Ok(()))) {
                self.make_granted(id, pf, mailbox, own, verdict, forwarded).await
            } else {
                let why = "The change could not be stored in the database".into();
                RequestOutcome::Failed { made: Vec::new(), why }
            };
            self.metrics.committed(matches!(outcome, RequestOutcome::Applied), begun.elapsed());
            reach(Point::AskMade);
            End::Request(RequestEnd { id, guest_request, changes, forward, outcome })
        }
    }

    /// Makes the changes of a request, after they were stored.
    async fn make_granted(
        &self,
        id: u64,
        pf: Vec<Change>,
        mailbox: Vec<Change>,
        own: Option<Change>,
        verdict: Verdict,
        forwarded: oneshot::Receiver<Forwarded>,
    ) -> RequestOutcome {
        reach(Point::AskJournaled);
        #[cfg(feature = "test-support")]
        self.be_late(pf.iter().chain(&own)).await;
        if let Err(why) = self.set(pf.iter().filter_map(VfChange::of).collect()).await {
            return RequestOutcome::Failed { made: Vec::new(), why };
        }
        let mut made = pf;
        let Some(own) = own else { return RequestOutcome::Applied };
        let trust = self.needs_trust(mailbox.iter().chain([&own]));
        if trust && let Err(why) = self.trust(true).await {
            return RequestOutcome::Failed { made, why };
        }
        let outcome = self.exchange(id, &mut made, mailbox, verdict, forwarded).await;
        if trust {
            self.distrust().await;
        }
        match outcome {
            Ok(Some(Forwarded::Accepted)) => RequestOutcome::Applied,
            Ok(Some(Forwarded::Refused)) => RequestOutcome::RefusedByPf { made },
            Ok(Some(Forwarded::Unanswered)) => RequestOutcome::Unanswered { made },
            Ok(None) => RequestOutcome::Withdrawn { made },
            Err(why) => RequestOutcome::Failed { made, why },
        }
    }

    #[cfg(feature = "test-support")]
    async fn be_late(&self, mut changes: impl Iterator<Item = &Change>) {
        let late = self.timing.late;
        let late = changes.find_map(|change| match change {
            Change::SetMac(_) => Some(late.address),
            Change::SetMulticast(_) => Some(late.multicast),
            _ => None,
        });
        sleep(late.unwrap_or_default()).await;
    }

    /// Sends the messages. `Ok(None)` if the request was cancelled, or the vmm is not connected.
    async fn exchange(
        &self,
        id: u64,
        made: &mut Vec<Change>,
        before: Vec<Change>,
        verdict: Verdict,
        forwarded: oneshot::Receiver<Forwarded>,
    ) -> Result<Option<Forwarded>, String> {
        if !before.is_empty() {
            let sent = self.revoke(before.clone()).await.map_err(|error| error.to_string())?;
            made.extend(before.into_iter().filter(|change| !sent.0.contains(change)));
            if !sent.0.is_empty() || sent.1 {
                return Err("The PF did not confirm a removal that must come first".into());
            }
        }
        let Some(vmm) = &self.vmm else { return Ok(None) };
        vmm.respond(id, AgentResponse::Mailbox { adapter: self.adapter(), verdict });
        match timeout(self.timing.forwarded, forwarded).await {
            Ok(Ok(outcome)) => Ok(Some(outcome)),
            Ok(Err(_)) => Ok(None),
            // A vmm that reports no result may still have sent the message.
            Err(_) => Ok(Some(Forwarded::Unanswered)),
        }
    }

    /// Has the relay make changes by messages. Returns those that failed, and whether all are deferred to the guest's next
    /// reset.
    async fn revoke(&self, changes: Vec<Change>) -> Result<(Vec<Change>, bool), CommandError> {
        let vmm = self.vmm.as_ref().ok_or(CommandError::Lost)?;
        let command = VmmCommand::Revoke { adapter: self.adapter(), changes: changes.clone() };
        match vmm.command(command, self.timing.confirm).await? {
            Outcome::Revoked { failed, deferred } => Ok((failed, deferred)),
            // An outcome of another kind confirms nothing.
            _ => Ok((changes, false)),
        }
    }

    pub(super) fn correct(
        self,
        corrections: Corrections,
        leftover: Vec<Change>,
    ) -> impl Future<Output = End> + Send + 'static {
        let noted = self.note();
        async move {
            // Go on even if the write failed: a full disk must not prevent a revocation.
            drop(noted.await);
            let made = self.make([leftover.clone(), corrections.changes()].concat()).await;
            let address = made.done.iter().find_map(|change| match change {
                Change::SetMac(mac) => Some(*mac),
                _ => None,
            });
            if let Some(mac) = address {
                self.tell_address(mac, true).await;
            }
            End::Corrected { corrections, leftover, made }
        }
    }

    pub(super) async fn reboot(self, baseline: Vec<Change>, mailbox: Vec<Change>) -> End {
        let mac = baseline.iter().find_map(|change| match change {
            Change::SetMac(mac) => Some(*mac),
            _ => None,
        });
        let made = self.make([baseline, mailbox].concat()).await;
        if let Some(mac) = mac {
            self.tell_address(mac, false).await;
        }
        End::Rebooted { made }
    }

    /// Makes independent changes in their order. A failed change does not stop the others.
    async fn make(&self, changes: Vec<Change>) -> Applied {
        let mut made = Applied::default();
        let mut messages: Vec<Change> = Vec::new();
        for change in changes {
            match VfChange::of(&change) {
                None if change == Change::Reset => {}
                None => messages.push(change),
                Some(setting) => {
                    self.send(std::mem::take(&mut messages), &mut made).await;
                    if !self.can_make(&change) {
                        made.done.push(change);
                        continue;
                    }
                    match self.set(vec![setting]).await {
                        Ok(()) => made.done.push(change),
                        Err(why) => made.failed.push((change, why)),
                    }
                }
            }
        }
        self.send(messages, &mut made).await;
        made
    }

    /// Has the relay send messages, and repeats those that the PF did not confirm.
    async fn send(&self, mut messages: Vec<Change>, made: &mut Applied) {
        if messages.is_empty() {
            return;
        }
        let trust = self.needs_trust(messages.iter());
        if trust && let Err(why) = self.trust(true).await {
            made.failed.extend(messages.into_iter().map(|change| (change, why.clone())));
            return;
        }
        let mut why = "The PF did not confirm the change".to_owned();
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                sleep(PAUSE).await;
            }
            match self.revoke(messages.clone()).await {
                Ok((_, true)) => {
                    made.deferred.append(&mut messages);
                    break;
                }
                Ok((failed, false)) => {
                    made.done.extend(messages.iter().filter(|change| !failed.contains(change)).cloned());
                    messages.retain(|change| failed.contains(change));
                }
                Err(CommandError::Lost) => {
                    made.offline = true;
                    why = "The VM's process is not connected".into();
                    break;
                }
                Err(error) => {
                    why = chain(&error);
                    break;
                }
            }
            if messages.is_empty() {
                break;
            }
        }
        made.failed.extend(messages.into_iter().map(|change| (change, why.clone())));
        if trust {
            self.distrust().await;
        }
    }

    /// Sends the relay an address that the guest did not request.
    async fn tell_address(&self, mac: MacAddress, reset: bool) {
        let Some(vmm) = &self.vmm else { return };
        let mut commands = vec![VmmCommand::EffectiveMac { adapter: self.adapter(), mac }];
        commands.extend(reset.then(|| VmmCommand::MakeGuestReset { adapter: self.adapter() }));
        for command in commands {
            if let Err(error) = vmm.command(command, self.timing.confirm).await {
                // The guest learns the address at its next reset anyway, from the reply to the reset.
                self.log.line(self.port, |suppressed| { tracing::warn!(port = %self.port, suppressed, "Cannot send the VM its new address: {error}"); });
            }
        }
    }

    pub(super) async fn tell(self, mac: MacAddress) -> End {
        self.tell_address(mac, false).await;
        End::Told
    }

    pub(super) async fn revert(self, revert: Revert, from: MacAddress) -> End {
        let set = self.set(vec![VfChange::Mac(Some(revert.old))]).await;
        if set.is_ok() {
            self.tell_address(revert.old, false).await;
        }
        End::Reverted { revert, from, error: set.err() }
    }

    async fn shown(&self) -> Result<VfSettings, String> {
        let mut all = self.pf.read(&self.vf.pf).await.map_err(|error| chain(&error))?;
        let index = u16::try_from(self.vf.index).map_err(|error| error.to_string())?;
        all.remove(&index).ok_or_else(|| format!("PF {} has no such VF any more", self.vf.pf))
    }

    pub(super) async fn recover(self) -> End {
        let shown = self.shown().await;
        if let Err(why) = &shown {
            self.log.line(self.port, |suppressed| {
                tracing::warn!(port = %self.port, suppressed, "Cannot read the settings on the PF: {why}");
            });
        }
        End::Recovered { shown: shown.ok() }
    }

    /// Compares with the PF and corrects differences; with `all`, repeats settings that a reset of the PF may have lost
    /// although its driver shows them.
    pub(super) async fn repair(self, expected: Vec<Change>, all: bool) -> End {
        let shown = match self.shown().await {
            Ok(shown) => shown,
            Err(why) => return End::Repaired { found: Err(why) },
        };
        let mut found = Vec::new();
        for wanted in expected.into_iter().filter(|change| self.can_make(change)) {
            let Some(change) = VfChange::of(&wanted) else { continue };
            // Make the changes one by one: a setting that the PF refuses must not prevent the others.
            if let Some(old) = differs(&change, &shown) {
                found.push(Drift { wanted, old, error: self.set(vec![change]).await.err() });
            } else if all && let Err(why) = self.set(again(change)).await {
                self.log.line(self.port, |suppressed| { tracing::warn!(port = %self.port, suppressed, "A setting could not be restored after a reset of the PF: {why}"); });
            }
        }
        End::Repaired { found: Ok(found) }
    }
}

/// The changes that repeat a setting that a reset of the PF may have lost.
fn again(change: VfChange) -> Vec<VfChange> {
    match change {
        // A reset of the PF switches the check on in hardware, and the driver igb still shows it as off.
        VfChange::SpoofCheck(false) => vec![VfChange::SpoofCheck(true), VfChange::SpoofCheck(false)],
        VfChange::Mac(_) | VfChange::SpoofCheck(_) => vec![change],
        VfChange::Vlan(vlan) if vlan.id != 0 => vec![change],
        VfChange::TxRate { max, .. } if max != 0 => vec![change],
        _ => Vec::new(),
    }
}

/// The PF's value of the setting in `change`, if it differs. None if the driver does not show the setting.
fn differs(change: &VfChange, shown: &VfSettings) -> Option<String> {
    if change.holds(shown) {
        return None;
    }
    let on_off = |on: bool| if on { "on" } else { "off" }.to_owned();
    Some(match change {
        VfChange::Mac(_) => shown.mac.map_or_else(|| "none".to_owned(), |mac| mac.to_string()),
        VfChange::Vlan(_) => shown.vlan.id.to_string(),
        VfChange::SpoofCheck(_) => on_off(shown.spoof_check?),
        VfChange::Trust(_) => on_off(shown.trust?),
        VfChange::TxRate { .. } => format!("{} Mbit/s", shown.max_tx_rate),
        VfChange::Link(_) => format!("{:?}", shown.link_state?).to_lowercase(),
    })
}
