// SPDX-License-Identifier: Apache-2.0

//! The relay thread's state machine. It never waits for the authority: [`StateMachine::turn`] takes the input, does the
//! work that is possible now and returns the time of the next call.
//!
//! ```text
//!            ring               bucket has a token        not local
//!   Idle ──────────▶ Queued ─────────────────────▶ begin ───────────▶ Asked
//!    ▲                 │ longest delay: refused      │ local            │ verdict: local, or forwarded
//!    │                 │                             │ or malformed     │ deadline: refused, cancelled
//!    └─────────────────┴──────── answered ◀──────────┴──────────────────┘
//!
//!   VTCTRL.RST, FLR: from any state to Idle, without an answer; a request is cancelled.
//! ```
//!
//! `cts` ("clear to send") is the PF's view of this VF: the guest's reset message sets it, and every reset of VF,
//! device or PF clears it. Without it the relay forwards only a reset message.

mod answer;
mod pf;
mod retry;

use std::{collections::VecDeque, sync::Arc, time::Duration};

use netpolicy::{Change, MacAddress, OnDenied, Reason, Request};

use super::{
    Config,
    authority::{Authority, Cancelled, Decision, GuestRequest, How, RelayEvent, Verdict},
    disposition::Disposition,
    fast_deny::{FastDenial, Permit},
    log_limit::LogLimit,
    rejection_summary::RejectionSummary,
    shared::{Posted, Shared},
};
use crate::{
    channel::mailbox::channel::{MailboxChannel, Response},
    family::{
        Family, Incoming, Malformed, ResetReply,
        address::{DriverAddress, Judgement},
    },
    hardware::VfHardware,
    token_bucket::TokenBucket,
};

/// A message without a reply yet.
struct Message {
    posted: Posted,
    decoded: Result<Incoming, Malformed>,
}

impl Message {
    fn seq(&self) -> u64 {
        self.posted.snapshot.seq
    }

    fn word(&self) -> u32 {
        self.posted.snapshot.words[0]
    }

    fn name(&self) -> &'static str {
        match &self.decoded {
            Ok(Incoming::Request(request)) => request.name(),
            Ok(Incoming::Protocol(protocol)) => protocol.name,
            Err(_) => "malformed",
        }
    }

    /// The guest's request; None for a message that no policy decides.
    fn request(&self) -> Option<&Request> {
        match &self.decoded {
            Ok(Incoming::Request(request)) => Some(request),
            _ => None,
        }
    }

    fn is_reset(&self) -> bool {
        self.request() == Some(&Request::Reset)
    }
}

enum Work {
    Idle,
    Queued(Message),
    Asked {
        message: Message,
        request: Request,
        deadline: Duration,
        /// The PF's reply to a reset.
        from_pf: Option<ResetReply>,
    },
    /// A request that the relay repeats by itself: see [`retry`].
    Retry {
        seq: u64,
        request: Request,
        deadline: Duration,
    },
}

/// The state of one relay.
pub(crate) struct StateMachine {
    config: Config,
    shared: Arc<Shared>,
    authority: Arc<dyn Authority>,
    channel: MailboxChannel,
    work: Work,
    cts: bool,
    /// The PF has forgotten this VF, and the guest does not know yet. The relay signals this when the PF's reset is
    /// over.
    lost: bool,
    effective: Option<MacAddress>,
    /// The address that the guest uses, as far as the authority knows.
    guest: Option<MacAddress>,
    driver: DriverAddress,
    /// The device has further unicast addresses, or may get some.
    filters: bool,
    undecided: retry::Undecided,
    reset_due: bool,
    next_look: Duration,
    deferred: VecDeque<(u64, Vec<Change>)>,
    messages: TokenBucket,
    resets: TokenBucket,
    reset_messages: TokenBucket,
    log: LogLimit,
    refusals: RejectionSummary,
}

impl StateMachine {
    pub(crate) fn new(
        config: Config,
        family: &'static Family,
        hardware: Arc<dyn VfHardware>,
        authority: Arc<dyn Authority>,
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            channel: MailboxChannel::new(family, hardware, shared.clock().clone()),
            messages: TokenBucket::new(config.messages),
            resets: TokenBucket::new(config.resets),
            reset_messages: TokenBucket::new(config.resets),
            log: LogLimit::new(config.log_lines),
            refusals: RejectionSummary::new(config.refusal_period),
            next_look: shared.clock().now(),
            config,
            shared,
            authority,
            work: Work::Idle,
            cts: false,
            lost: false,
            effective: None,
            guest: None,
            driver: DriverAddress::new(family.address),
            filters: false,
            undecided: retry::Undecided::default(),
            reset_due: false,
            deferred: VecDeque::new(),
        }
    }

    /// The body of the relay thread.
    pub(crate) fn run(mut self) {
        while let Some(next) = self.turn() {
            self.shared.wait(next);
        }
    }

    /// Does the work that is possible now. Returns the time of the next call, which new input brings forward; None at
    /// the end.
    pub(crate) fn turn(&mut self) -> Option<Duration> {
        let inbox = self.shared.take();
        for denial in inbox.denials {
            self.note_denial(denial);
        }
        if inbox.stop {
            self.drop_work(Cancelled::Stopped);
            return None;
        }
        if inbox.function_reset {
            self.drop_work(Cancelled::GuestReset);
            self.channel.forget();
            (self.cts, self.lost, self.reset_due) = (false, false, false);
            // The driver of the next boot takes the address of its first reset.
            self.guest = None;
            self.undecided.forget();
        }
        if inbox.vf_reset {
            self.drop_work(Cancelled::GuestReset);
            (self.cts, self.lost, self.reset_due) = (false, false, true);
            self.undecided.forget();
            let mut state = self.shared.lock();
            state.stats.resets = state.stats.resets.saturating_add(1);
        }
        if inbox.interrupt {
            self.channel.raise_interrupt();
        }
        if inbox.hint {
            self.next_look = self.now();
        }
        // Handle the verdict before the commands, because they may revoke the change that it grants.
        if let Some(verdict) = inbox.verdict {
            self.decided(verdict);
        }
        for command in inbox.commands {
            self.handle(command);
        }
        self.forward_reset();
        if let Some(posted) = inbox.posted {
            self.withdraw();
            self.work = Work::Queued(Message { decoded: self.channel.decode(&posted.snapshot), posted });
        }
        self.check_times();
        self.look();
        self.retry_undecided();
        let now = self.now();
        while let Some(event) = self.refusals.due(now) {
            self.authority.event(event);
        }
        self.shared.set_permit(self.permit(), self.effective);
        Some(self.next_turn())
    }

    /// The permit for a vCPU thread to deny the next message.
    fn permit(&self) -> Option<Permit> {
        let now = self.now();
        let ready = matches!(self.work, Work::Idle) && self.cts && !self.reset_due;
        let tokens = self.messages.tokens(now);
        self.effective.filter(|_| ready).map(|effective| Permit {
            family: self.channel.family(),
            session: self.channel.session(),
            effective,
            driver: self.driver,
            tokens,
        })
    }

    /// Notes a denial by a vCPU thread.
    fn note_denial(&mut self, FastDenial { mac, silent, reason }: FastDenial) {
        self.messages.take(self.now());
        self.driver.answered(silent);
        if silent {
            self.note_guest_mac(mac);
        }
        self.report_denial(mac, reason, silent);
    }

    /// Denies a request that the authority has denied in advance, but for which no vCPU thread had a permit.
    fn deny_standing(&mut self, message: &Message, mac: MacAddress, reason: Reason, on_denied: OnDenied) {
        let silent = on_denied == OnDenied::Silent && !self.driver.must_tell();
        self.answer(message, &Request::SetMac(mac), silent, Disposition::denied(silent));
        self.report_denial(mac, reason, silent);
    }

    fn report_denial(&mut self, mac: MacAddress, reason: Reason, silent: bool) {
        self.authority.event(RelayEvent::Declined { mac, reason, silent });
        self.log_refusal(Request::SetMac(mac).name(), reason, silent);
    }

    fn now(&self) -> Duration {
        self.shared.clock().now()
    }

    fn next_turn(&self) -> Duration {
        let now = self.now();
        let work = match &self.work {
            Work::Idle => None,
            Work::Queued(message) => Some(self.ready_at(message, now).min(self.delay_ends(message))),
            Work::Asked { deadline, .. } | Work::Retry { deadline, .. } => Some(*deadline),
        };
        let retry = self.undecided.due().filter(|_| self.may_retry());
        let reset = self.reset_due.then(|| self.resets.ready_at(now));
        [work, reset, retry, self.refusals.next()].into_iter().flatten().fold(self.next_look, Duration::min)
    }

    /// The time at which processing of the message may begin.
    fn ready_at(&self, message: &Message, now: Duration) -> Duration {
        let mut ready = self.messages.ready_at(now);
        if message.is_reset() {
            ready = ready.max(self.reset_messages.ready_at(now));
        }
        if self.reset_due { ready.max(self.resets.ready_at(now)) } else { ready }
    }

    fn delay_ends(&self, message: &Message) -> Duration {
        message.posted.at.saturating_add(self.config.longest_delay)
    }

    fn check_times(&mut self) {
        let now = self.now();
        match std::mem::replace(&mut self.work, Work::Idle) {
            Work::Idle => {}
            Work::Queued(message) => {
                if !self.reset_due && self.ready_at(&message, now) <= now {
                    self.messages.take(now);
                    if message.is_reset() {
                        self.reset_messages.take(now);
                    }
                    self.begin(message);
                } else if now >= self.delay_ends(&message) {
                    self.refuse_locally(&message, Reason::RateLimited, Disposition::RateLimited);
                } else {
                    self.work = Work::Queued(message);
                }
            }
            Work::Asked { message, request, deadline, from_pf } => {
                if now < deadline {
                    self.work = Work::Asked { message, request, deadline, from_pf };
                } else {
                    self.authority.event(RelayEvent::Cancelled {
                        seq: message.seq(),
                        request: request.clone(),
                        why: Cancelled::Deadline,
                    });
                    self.unreachable(&message, &request, from_pf, Disposition::Deadline);
                }
            }
            retry @ Work::Retry { deadline, .. } => {
                self.work = retry;
                if now >= deadline {
                    self.withdraw();
                }
            }
        }
    }

    /// Whether the guest's reset message has no reply yet. The reply carries the address.
    fn is_resetting(&self) -> bool {
        match &self.work {
            Work::Idle | Work::Retry { .. } => false,
            Work::Queued(message) => message.is_reset(),
            Work::Asked { request, .. } => *request == Request::Reset,
        }
    }

    fn drop_work(&mut self, why: Cancelled) {
        self.withdraw();
        if let Work::Asked { message, request, .. } = std::mem::replace(&mut self.work, Work::Idle) {
            self.shared.lock().stats.message(message.name(), Disposition::Dropped);
            self.authority.event(RelayEvent::Cancelled { seq: message.seq(), request, why });
        }
    }

    /// Processes a message that has passed the rate limits.
    fn begin(&mut self, message: Message) {
        let request = match &message.decoded {
            Ok(Incoming::Request(request)) => request.clone(),
            Ok(Incoming::Protocol(protocol)) => {
                let step = protocol.step.clone();
                return self.protocol(&message, &step);
            }
            Err(Malformed::Answer(_)) => {
                // Do as the PF does: acknowledge the message, and send no reply.
                self.refusals.add(Reason::MalformedMessage, message.word(), None);
                self.finish(&message, &Response::Acknowledgement, Disposition::Malformed);
                return;
            }
            Err(Malformed::Mac { mac, filter }) => {
                let request = if *filter { Request::AddUnicastFilter(*mac) } else { Request::SetMac(*mac) };
                self.refuse(&message, Some(request), Reason::MacInvalid, Disposition::Malformed);
                return;
            }
            Err(_) => {
                self.refuse(&message, None, Reason::MalformedMessage, Disposition::Malformed);
                return;
            }
        };
        match request {
            Request::Reset => self.reset(message),
            // The guest must reset first. Word 0 without "clear to send" makes its driver do so.
            _ if !self.cts => self.answer(&message, &request, false, Disposition::NotReset),
            Request::Unknown { .. } => {
                self.refuse(&message, Some(request), Reason::UnknownMessage, Disposition::Unknown)
            }
            Request::SetMac(mac) => match self.driver.judge(mac, self.effective) {
                Judgement::Equal => {
                    self.answer(&message, &request, true, Disposition::Equal);
                    self.note_guest_mac(mac);
                }
                Judgement::Stale => {
                    tracing::debug!(adapter = self.config.adapter, %mac, "Stale address of a guest's reset denied");
                    self.answer(&message, &request, false, Disposition::Stale);
                }
                Judgement::Ask => match self.shared.refusal_of(mac) {
                    Some((reason, on_denied)) => self.deny_standing(&message, mac, reason, on_denied),
                    None => self.request(message, request, None),
                },
            },
            Request::ClearUnicastFilters if !self.filters => {
                self.undecided.decided(&request, true);
                self.answer(&message, &request, true, Disposition::Local);
            }
            request => self.request(message, request, None),
        }
    }

    fn request(&mut self, message: Message, request: Request, from_pf: Option<ResetReply>) {
        let guest_request = GuestRequest { seq: message.seq(), request: request.clone() };
        if self.authority.request(guest_request).is_err() {
            self.refusals.add(Reason::AuthorityUnreachable, message.word(), Some(request.clone()));
            self.unreachable(&message, &request, from_pf, Disposition::Unreachable);
            return;
        }
        // Leave time to forward a granted message before the driver gives up.
        let latest = message
            .posted
            .at
            .saturating_add(self.config.message_limit.saturating_sub(self.config.exchange_limit));
        let deadline = self.now().saturating_add(self.config.ask_limit).min(latest);
        self.work = Work::Asked { message, request, deadline, from_pf };
    }

    fn decided(&mut self, verdict: Verdict) {
        let (message, request, from_pf) = match std::mem::replace(&mut self.work, Work::Idle) {
            Work::Asked { message, request, from_pf, .. } if message.seq() == verdict.seq => {
                (message, request, from_pf)
            }
            Work::Retry { seq, request, .. } if seq == verdict.seq => {
                self.effective = Some(verdict.effective_mac);
                return self.retry_decided(seq, &request, verdict.decision);
            }
            other => {
                self.work = other;
                return;
            }
        };
        self.effective = Some(verdict.effective_mac);
        self.undecided.decided(&request, matches!(verdict.decision, Decision::Grant { .. }));
        match verdict.decision {
            _ if request == Request::Reset => {
                self.guest = Some(verdict.effective_mac);
                self.answer_reset(&message, Some(verdict.effective_mac), from_pf, Disposition::Forwarded);
            }
            Decision::Grant { how: How::Local } => {
                self.answer(&message, &request, true, Disposition::Granted)
            }
            Decision::Grant { how: How::Forward } => self.forward(&message, &request),
            Decision::Refuse { tell, reason } => {
                self.note_in_use(&request, reason);
                let is_address = matches!(request, Request::SetMac(_));
                let silent = tell == OnDenied::Silent && !(is_address && self.driver.must_tell());
                // Answer before logging: a vCPU is busy-waiting.
                self.answer(&message, &request, silent, Disposition::denied(silent));
                self.log_refusal(request.name(), reason, silent);
            }
        }
    }

    /// The time left for an exchange with the PF.
    fn left(&self, message: &Message) -> Duration {
        let end = message.posted.at.saturating_add(self.config.message_limit);
        end.saturating_sub(self.now()).min(self.config.exchange_limit)
    }
}
