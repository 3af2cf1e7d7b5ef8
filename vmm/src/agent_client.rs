// SPDX-License-Identifier: Apache-2.0

//! The relays' way to the agent. Relays send their questions and events over a channel and an eventfd to the event
//! loop, which passes them on over the control connection.
//!
//! Apart from the event loop because relay threads use it and must never wait for the loop.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, Sender},
    },
};

use passthrough::relay::{Authority, Notice, Question, Unreachable};
use vmm_sys_util::eventfd::EventFd;

/// A message of a relay.
#[derive(Debug)]
pub enum RelayMessage {
    /// The agent decides it.
    Question(Question),
    /// The agent records it, now or when it is back.
    Notice(Notice),
}

/// The event loop's end, for the messages of all relays.
#[derive(Debug)]
pub struct RelayReceiver {
    receiver: Receiver<(String, RelayMessage)>,
    sender: Sender<(String, RelayMessage)>,
    signal: Arc<EventFd>,
    connected: Arc<AtomicBool>,
}

/// One relay's end.
#[derive(Debug)]
pub struct AgentClient {
    adapter: String,
    /// Locked only because the trait is `Sync`; one relay thread uses it.
    sender: Mutex<Sender<(String, RelayMessage)>>,
    signal: Arc<EventFd>,
    connected: Arc<AtomicBool>,
}

impl RelayReceiver {
    /// Makes the receiving end. No agent is connected yet.
    ///
    /// # Errors
    /// Those of `eventfd`.
    pub fn new() -> io::Result<Self> {
        let signal = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        let (sender, receiver) = mpsc::channel();
        Ok(Self { receiver, sender, signal, connected: Arc::default() })
    }

    /// Sets whether an agent is connected. While none is, relays get [`Unreachable`] for their questions.
    pub fn set_connected(&self, connected: bool) {
        self.connected.store(connected, Ordering::Release);
    }

    /// Becomes readable when relays have sent messages.
    #[must_use]
    pub fn signal(&self) -> &EventFd {
        &self.signal
    }

    /// The relays' messages since the last call, by adapter. The relays' own rates bound their number.
    pub fn drain(&self) -> Vec<(String, RelayMessage)> {
        // Read the eventfd first: the other order could lose a wake-up.
        let _ = self.signal.read();
        self.receiver.try_iter().collect()
    }

    /// Makes the end for the relay of `adapter`.
    #[must_use]
    pub fn client_for(&self, adapter: &str) -> AgentClient {
        AgentClient {
            adapter: adapter.to_owned(),
            sender: Mutex::new(self.sender.clone()),
            signal: Arc::clone(&self.signal),
            connected: Arc::clone(&self.connected),
        }
    }
}

impl AgentClient {
    fn send(&self, message: RelayMessage) {
        let sender = self.sender.lock().unwrap_or_else(PoisonError::into_inner);
        if sender.send((self.adapter.clone(), message)).is_ok() {
            // If the counter is full, the loop's wake-up is already pending.
            let _ = self.signal.write(1);
        }
    }
}

impl Authority for AgentClient {
    fn ask(&self, question: Question) -> Result<(), Unreachable> {
        if !self.connected.load(Ordering::Acquire) {
            return Err(Unreachable);
        }
        self.send(RelayMessage::Question(question));
        Ok(())
    }

    fn notice(&self, notice: Notice) {
        self.send(RelayMessage::Notice(notice));
    }
}

#[cfg(test)]
mod tests {
    use netpolicy::Request;

    use super::*;

    #[test]
    fn questions_need_an_agent_and_notices_do_not() {
        let relays = RelayReceiver::new().unwrap();
        let relay = relays.client_for("eth0");
        let question = Question { seq: 1, request: Request::Reset };
        assert_eq!(relay.ask(question.clone()), Err(Unreachable));
        relay.notice(Notice::PfReset);
        relays.set_connected(true);
        relay.ask(question.clone()).unwrap();
        let message = relays.drain();
        assert!(matches!(&message[0], (adapter, RelayMessage::Notice(Notice::PfReset)) if adapter == "eth0"));
        assert!(matches!(&message[1], (_, RelayMessage::Question(asked)) if *asked == question));
        assert!(relays.signal().read().is_err(), "the signal is consumed with what it stood for");
        assert!(relays.drain().is_empty());
    }
}
