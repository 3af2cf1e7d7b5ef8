// SPDX-License-Identifier: Apache-2.0

//! The relay: one thread per VF between its mailbox and the authority that decides.
//!
//! ```text
//!  vCPU threads                     relay thread                                    agent
//!  MailboxPage ──ring, reset──▶ Shared ──▶ StateMachine ──request───▶ Authority ═══════════▶ policy
//!      ▲      (registers, inbox:  ▲         │  ▲                                       │
//!      └──reads── one small lock) └─reply───┘  └──────── Relay::verdict ◀═════════════┘
//!                                           │ VfMailbox: forwarded messages, looks
//!                                           ▼
//!                                  the real mailbox (one reader and writer: this thread)
//! ```
//!
//! vCPU threads take only the lock of the registers. Under that lock they deny by themselves the requests that the
//! authority has denied in advance (`fast_deny`), without waiting for another thread. A guest's work is bounded: one
//! message in flight, token buckets for messages, resets and log lines, and one event a second about rejections.

mod authority;
mod disposition;
mod driver;
mod fast_deny;
mod log_limit;
mod mmio;
mod rejection_summary;
mod shared;
mod state_machine;
mod stats;
#[cfg(any(test, feature = "test-support"))]
pub mod testing;
#[cfg(test)]
mod tests;

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use netpolicy::{Change, MacAddress, StandingRefusal};

pub use self::{
    authority::{
        Authority, Cancelled, Decision, Forwarded, GuestRequest, How, RelayEvent, Unreachable, Verdict,
    },
    driver::{Answer, Driver},
    mmio::MailboxPage,
    stats::{BUCKETS_US, PassedAccesses, RelayStats, RoundTrips},
};
use self::{
    shared::{RelayCommand, Shared},
    state_machine::StateMachine,
};
pub use crate::token_bucket::{Rate, TokenBucket};
use crate::{
    channel::mailbox::{
        layout::PAGE_SIZE,
        vf_mailbox::{Clock, SystemClock},
    },
    family::Family,
    function::TrappedRange,
    hardware::VfHardware,
    threads::{ThreadKind, ThreadStart},
};

/// The configuration of a relay. The defaults fit drivers that give up after a second, as igbvf and ixgbevf do.
#[derive(Clone, Debug)]
pub struct Config {
    /// The adapter's name, for log lines.
    pub adapter: String,
    /// The time that the authority has for its verdict.
    pub ask_limit: Duration,
    /// The longest time from REQ to the response.
    pub message_limit: Duration,
    /// The time that the PF has to answer a forwarded message.
    pub exchange_limit: Duration,
    /// Interval between polls of the real mailbox when no guest read triggers one.
    pub look_period: Duration,
    /// Shortest time from one poll to the next one that a guest read triggers.
    pub look_gap: Duration,
    /// Rate of the guest's messages. The relay delays messages above it.
    pub messages: Rate,
    /// Rate of the guest's resets (VTCTRL.RST, and separately the reset message). The relay delays resets above it.
    pub resets: Rate,
    /// The relay rejects messages that it would have to delay for longer.
    pub longest_delay: Duration,
    /// Rate of log lines that the guest can cause.
    pub log_lines: Rate,
    /// Interval between two events to the authority about rejections with the same reason. The relay counts those
    /// in between.
    pub refusal_period: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            adapter: String::new(),
            ask_limit: Duration::from_millis(400),
            message_limit: Duration::from_millis(850),
            exchange_limit: Duration::from_millis(250),
            look_period: Duration::from_millis(250),
            look_gap: Duration::from_millis(20),
            messages: Rate { burst: 64, period: Duration::from_millis(20) },
            // Two per second. The relay slows down a guest that resets repeatedly, and never rejects its resets.
            resets: Rate { burst: 8, period: Duration::from_millis(500) },
            longest_delay: Duration::from_millis(500),
            log_lines: Rate { burst: 20, period: Duration::from_secs(1) },
            refusal_period: Duration::from_secs(1),
        }
    }
}

/// The most changes in one [`Relay::revoke`], and the most that wait for the guest's next reset.
pub const MAX_CHANGES: usize = 256;

/// The relay of one VF.
pub struct Relay {
    shared: Arc<Shared>,
    page: Arc<MailboxPage>,
    authority: Arc<dyn Authority>,
    family: &'static Family,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Relay {
    /// Starts the relay's thread. From then on no other code may access the real mailbox.
    ///
    /// # Errors
    /// Those of starting a thread.
    pub fn start(
        config: Config,
        family: &'static Family,
        hardware: Arc<dyn VfHardware>,
        authority: Arc<dyn Authority>,
        threads: &ThreadStart,
    ) -> io::Result<Self> {
        let (relay, machine) =
            Self::assemble(config, family, hardware, authority, Arc::new(SystemClock::default()));
        let thread = threads.spawn(ThreadKind::Relay, "relay".into(), move || machine.run())?;
        *relay.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        Ok(relay)
    }

    fn assemble(
        config: Config,
        family: &'static Family,
        hardware: Arc<dyn VfHardware>,
        authority: Arc<dyn Authority>,
        clock: Arc<dyn Clock>,
    ) -> (Self, StateMachine) {
        let shared = Arc::new(Shared::new(family, clock, config.look_gap));
        let page = Arc::new(MailboxPage::new(shared.clone(), hardware.clone(), family));
        let machine = StateMachine::new(config, family, hardware, authority.clone(), shared.clone());
        (Self { shared, page, authority, family, thread: Mutex::new(None) }, machine)
    }

    /// The mailbox page as the guest sees it: the handler of the trapped page.
    pub fn page(&self) -> Arc<MailboxPage> {
        self.page.clone()
    }

    /// The ranges that the relay traps, for [`AssignedFunction`](crate::function::AssignedFunction).
    pub fn trapped_ranges(&self) -> Vec<TrappedRange> {
        vec![TrappedRange { bar: self.family.layout.bar, range: 0..PAGE_SIZE, handler: self.page.clone() }]
    }

    /// Hands over the authority's verdict. A verdict that comes too late changes nothing.
    pub fn verdict(&self, verdict: Verdict) {
        self.shared.verdict(verdict);
    }

    /// Hands over a new effective address that no request has set: the host has changed it, or has rolled back the
    /// commit of a cancelled request.
    pub fn set_effective_mac(&self, mac: MacAddress) {
        self.shared.send(RelayCommand::EffectiveMac(mac));
    }

    /// Sets the changes that the authority denies in advance. The relay denies them without a request and sends
    /// [`RelayEvent::Declined`]. `None` lifts the denial.
    pub fn set_standing_refusal(&self, standing: Option<StandingRefusal>) {
        self.shared.standing_refusal(standing);
    }

    /// Makes corrections that need messages: changes with the mailbox as their [`route`](Change::route), except for
    /// a reset. They revoke a right, or reduce it to the part that is still allowed. [`RelayEvent::Revoked`] with
    /// this `id` follows.
    pub fn revoke(&self, id: u64, changes: Vec<Change>) {
        let refused = if changes.len() > MAX_CHANGES {
            Some((id, changes))
        } else {
            match self.shared.send(RelayCommand::Revoke { id, changes }) {
                Some(RelayCommand::Revoke { id, changes }) => Some((id, changes)),
                _ => None,
            }
        };
        if let Some((id, failed)) = refused {
            self.authority.event(RelayEvent::Revoked { id, failed, deferred: false });
        }
    }

    /// Makes the guest's driver reset its VF, within about two seconds if its link is up. The driver then learns
    /// the effective address.
    pub fn make_guest_reset(&self) {
        self.shared.send(RelayCommand::MakeGuestReset);
    }

    /// Notes that the device was reset (FLR, reboot): the message in flight is void, and the PF hears nothing until the
    /// guest's next reset message. The page calls this itself, as a [`BarHandler`](crate::function::BarHandler).
    pub fn hardware_reset(&self) {
        self.shared.function_reset();
    }

    /// Counters since the start.
    pub fn stats(&self) -> RelayStats {
        self.shared.stats()
    }

    /// Ends the thread and waits for it, at most for the duration of one exchange with the PF.
    pub fn stop(&self) {
        self.shared.stop();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("The relay thread had panicked");
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop();
    }
}
