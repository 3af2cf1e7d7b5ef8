// SPDX-License-Identifier: Apache-2.0

//! How relays reach the agent: their questions and notices travel to the event loop by a channel and an eventfd, and
//! from there over the control connection.

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

/// What a relay says.
#[derive(Debug)]
pub enum RelayMessage {
    /// To be asked of the agent.
    Question(Question),
    /// To be reported to the agent, now or when it is back.
    Notice(Notice),
}

/// The event loop's end.
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
    /// A lock only because the trait wants to be shared; one relay thread uses it.
    sender: Mutex<Sender<(String, RelayMessage)>>,
    signal: Arc<EventFd>,
    connected: Arc<AtomicBool>,
}

impl RelayReceiver {
    /// An end without an agent.
    ///
    /// # Errors
    /// Those of `eventfd`.
    pub fn new() -> io::Result<Self> {
        let signal = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        let (sender, receiver) = mpsc::channel();
        Ok(Self { receiver, sender, signal, connected: Arc::default() })
    }

    /// Whether an agent is there to be asked.
    pub fn set_connected(&self, connected: bool) {
        self.connected.store(connected, Ordering::Release);
    }

    /// Readable when relays may have said something.
    #[must_use]
    pub fn signal(&self) -> &EventFd {
        &self.signal
    }

    /// What relays said since the last call, by adapter. The number is bounded by the relays' own rates.
    pub fn drain(&self) -> Vec<(String, RelayMessage)> {
        // The eventfd first: the other order could lose a wake-up.
        let _ = self.signal.read();
        self.receiver.try_iter().collect()
    }

    /// The end for the relay of `adapter`.
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
            // A full counter means that the loop has been told.
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
