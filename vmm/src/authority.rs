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
pub enum Said {
    /// To be asked of the agent.
    Question(Question),
    /// To be reported to the agent, now or when it is back.
    Notice(Notice),
}

/// The event loop's end.
#[derive(Debug)]
pub struct Authorities {
    receiver: Receiver<(String, Said)>,
    sender: Sender<(String, Said)>,
    signal: Arc<EventFd>,
    connected: Arc<AtomicBool>,
}

/// One relay's end.
#[derive(Debug)]
pub struct AgentAuthority {
    adapter: String,
    /// A lock only because the trait wants to be shared; one relay thread uses it.
    sender: Mutex<Sender<(String, Said)>>,
    signal: Arc<EventFd>,
    connected: Arc<AtomicBool>,
}

impl Authorities {
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
    pub fn drain(&self) -> Vec<(String, Said)> {
        // The eventfd first: the other order could lose a wake-up.
        let _ = self.signal.read();
        self.receiver.try_iter().collect()
    }

    /// The end for the relay of `adapter`.
    #[must_use]
    pub fn of(&self, adapter: &str) -> AgentAuthority {
        AgentAuthority {
            adapter: adapter.to_owned(),
            sender: Mutex::new(self.sender.clone()),
            signal: Arc::clone(&self.signal),
            connected: Arc::clone(&self.connected),
        }
    }
}

impl AgentAuthority {
    fn say(&self, said: Said) {
        let sender = self.sender.lock().unwrap_or_else(PoisonError::into_inner);
        if sender.send((self.adapter.clone(), said)).is_ok() {
            // A full counter means that the loop has been told.
            let _ = self.signal.write(1);
        }
    }
}

impl Authority for AgentAuthority {
    fn ask(&self, question: Question) -> Result<(), Unreachable> {
        if !self.connected.load(Ordering::Acquire) {
            return Err(Unreachable);
        }
        self.say(Said::Question(question));
        Ok(())
    }

    fn notice(&self, notice: Notice) {
        self.say(Said::Notice(notice));
    }
}

#[cfg(test)]
mod tests {
    use netpolicy::Request;

    use super::*;

    #[test]
    fn questions_need_an_agent_and_notices_do_not() {
        let authorities = Authorities::new().unwrap();
        let relay = authorities.of("eth0");
        let question = Question { seq: 1, request: Request::Reset };
        assert_eq!(relay.ask(question.clone()), Err(Unreachable));
        relay.notice(Notice::PfReset);
        authorities.set_connected(true);
        relay.ask(question.clone()).unwrap();
        let said = authorities.drain();
        assert!(matches!(&said[0], (adapter, Said::Notice(Notice::PfReset)) if adapter == "eth0"));
        assert!(matches!(&said[1], (_, Said::Question(asked)) if *asked == question));
        assert!(authorities.signal().read().is_err(), "the signal is consumed with what it stood for");
        assert!(authorities.drain().is_empty());
    }
}
