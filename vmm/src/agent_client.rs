// SPDX-License-Identifier: Apache-2.0

//! The relays' connection to the agent.
//!
//! A relay's thread sends a request itself, because its guest's driver waits for the verdict. Events go through the
//! event loop, which keeps them until the agent has noted them. A request does not overtake an earlier event: while
//! one waits for the loop, requests wait behind it.
//!
//! This module is apart from the event loop, because relay threads call it and must never wait for the loop.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use failpoints::{Point, reach};
use passthrough::relay::{Authority, GuestRequest, RelayEvent, Unreachable};
use protocol::{AgentRequest, Channel, ChannelError, ToAgent};
use vmm_sys_util::eventfd::EventFd;

/// A message of a relay.
#[derive(Debug)]
pub enum RelayMessage {
    /// A request for the agent's verdict.
    Request(GuestRequest),
    /// An event for the agent, now or when it is back.
    Event(RelayEvent),
}

/// The messages for the event loop, and the connection for requests, which need not wait for the loop.
#[derive(Debug, Default)]
struct Outbox {
    waiting: Vec<(String, RelayMessage)>,
    /// The loop has taken messages and not sent all of them yet.
    sending: bool,
    agent: Option<Arc<Channel>>,
    /// The number of the last request.
    last_request: u64,
}

impl Outbox {
    fn request(&mut self, adapter: &str, guest_request: &GuestRequest) -> Result<(), ChannelError> {
        let Some(agent) = &self.agent else { return Err(ChannelError::Closed) };
        reach(Point::VmmAsking);
        self.last_request += 1;
        let request =
            AgentRequest::Mailbox { adapter: adapter.to_owned(), guest_request: guest_request.clone() };
        agent.send(&ToAgent::Request { id: self.last_request, request }, &[])
    }
}

/// The event loop's end, for the messages of all relays.
#[derive(Debug)]
pub struct RelayReceiver {
    /// Locked for a system call at most.
    outbox: Arc<Mutex<Outbox>>,
    signal: Arc<EventFd>,
}

/// One relay's end.
#[derive(Debug)]
pub struct AgentClient {
    adapter: String,
    outbox: Arc<Mutex<Outbox>>,
    signal: Arc<EventFd>,
}

impl RelayReceiver {
    /// Makes the receiving end. No agent is connected yet.
    ///
    /// # Errors
    /// Those of `eventfd`.
    pub fn new() -> io::Result<Self> {
        let signal = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        Ok(Self { outbox: Arc::default(), signal })
    }

    /// Sets the connection to the agent. While there is none, relays get [`Unreachable`] for their requests.
    pub fn set_agent(&self, agent: Option<Arc<Channel>>) {
        self.outbox().agent = agent;
    }

    /// Becomes readable when relays have sent messages.
    #[must_use]
    pub fn signal(&self) -> &EventFd {
        &self.signal
    }

    /// The relays' messages since the last call, each with its adapter. The relays' own rates bound their number. Until
    /// [`sent`](Self::sent) is called, requests wait behind them.
    pub fn drain(&self) -> Vec<(String, RelayMessage)> {
        // Read the eventfd first: the other order could lose a wake-up.
        let _ = self.signal.read();
        let mut outbox = self.outbox();
        outbox.sending = true;
        std::mem::take(&mut outbox.waiting)
    }

    /// Notes that the messages of the last [`drain`](Self::drain) were sent. Returns whether others have come.
    #[must_use]
    pub fn sent(&self) -> bool {
        let mut outbox = self.outbox();
        outbox.sending = !outbox.waiting.is_empty();
        outbox.sending
    }

    /// Sends a request that has waited.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn request(&self, adapter: &str, guest_request: &GuestRequest) -> Result<(), ChannelError> {
        self.outbox().request(adapter, guest_request)
    }

    /// Makes the end for the relay of `adapter`.
    #[must_use]
    pub fn client_for(&self, adapter: &str) -> AgentClient {
        AgentClient {
            adapter: adapter.to_owned(),
            outbox: Arc::clone(&self.outbox),
            signal: Arc::clone(&self.signal),
        }
    }

    fn outbox(&self) -> MutexGuard<'_, Outbox> {
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AgentClient {
    fn outbox(&self) -> MutexGuard<'_, Outbox> {
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn leave_to_loop(&self, mut outbox: MutexGuard<'_, Outbox>, message: RelayMessage) {
        outbox.waiting.push((self.adapter.clone(), message));
        drop(outbox);
        // If the counter is full, the loop's wake-up is already pending.
        let _ = self.signal.write(1);
    }
}

impl Authority for AgentClient {
    fn request(&self, guest_request: GuestRequest) -> Result<(), Unreachable> {
        let mut outbox = self.outbox();
        if outbox.agent.is_none() {
            return Err(Unreachable);
        }
        let behind = outbox.sending || !outbox.waiting.is_empty();
        // If the connection fails, the loop drops it.
        if behind || outbox.request(&self.adapter, &guest_request).is_err() {
            self.leave_to_loop(outbox, RelayMessage::Request(guest_request));
        }
        Ok(())
    }

    fn event(&self, event: RelayEvent) {
        self.leave_to_loop(self.outbox(), RelayMessage::Event(event));
    }
}

#[cfg(test)]
mod tests {
    use netpolicy::Request;

    use super::*;
    use protocol::Listener;

    fn guest_request(seq: u64) -> GuestRequest {
        GuestRequest { seq, request: Request::Reset }
    }

    fn connected(relays: &RelayReceiver) -> (tempfile::TempDir, Channel) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let listener = Listener::bind(&path).unwrap();
        let agent = Channel::connect(&path).unwrap();
        relays.set_agent(Some(Arc::new(listener.accept().unwrap())));
        (dir, agent)
    }

    fn asked(agent: &Channel) -> Option<u64> {
        match agent.receive::<ToAgent>() {
            Ok((ToAgent::Request { request: AgentRequest::Mailbox { guest_request, .. }, .. }, _)) => {
                Some(guest_request.seq)
            }
            Err(ChannelError::WouldBlock) => None,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_request_needs_an_agent_and_no_event_loop() {
        let relays = RelayReceiver::new().unwrap();
        let relay = relays.client_for("eth0");
        assert_eq!(relay.request(guest_request(1)), Err(Unreachable));
        let (_dir, agent) = connected(&relays);
        relay.request(guest_request(1)).unwrap();
        assert_eq!(asked(&agent), Some(1));
        assert!(relays.signal().read().is_err(), "the loop has nothing to do");
        relays.set_agent(None);
        assert_eq!(relay.request(guest_request(2)), Err(Unreachable));
        relay.event(RelayEvent::PfReset);
        assert!(
            matches!(&relays.drain()[0], (adapter, RelayMessage::Event(RelayEvent::PfReset)) if adapter == "eth0")
        );
    }

    #[test]
    fn a_request_does_not_overtake_an_event() {
        let relays = RelayReceiver::new().unwrap();
        let relay = relays.client_for("eth0");
        let (_dir, agent) = connected(&relays);
        relay.event(RelayEvent::PfReset);
        relay.request(guest_request(1)).unwrap();
        let taken = relays.drain();
        assert!(matches!(
            taken[..],
            [
                (_, RelayMessage::Event(RelayEvent::PfReset)),
                (_, RelayMessage::Request(GuestRequest { seq: 1, .. }))
            ]
        ));
        assert!(relays.signal().read().is_err(), "the signal is consumed with what it stood for");
        // The loop has not sent the event yet.
        relay.request(guest_request(2)).unwrap();
        assert_eq!(asked(&agent), None);
        assert!(relays.sent(), "more has come");
        assert!(matches!(relays.drain()[..], [(_, RelayMessage::Request(GuestRequest { seq: 2, .. }))]));
        assert!(!relays.sent());
        relay.request(guest_request(3)).unwrap();
        assert_eq!(asked(&agent), Some(3));
    }

    #[test]
    fn a_request_that_cannot_be_sent_is_left_to_the_loop() {
        let relays = RelayReceiver::new().unwrap();
        let relay = relays.client_for("eth0");
        let (_dir, agent) = connected(&relays);
        drop(agent);
        relay.request(guest_request(1)).unwrap();
        assert_eq!(relays.drain().len(), 1);
    }
}
