// SPDX-License-Identifier: Apache-2.0

//! The I/O threads of a machine's devices. They exist from the machine's construction to its end; a
//! machine whose devices ask for none has none.
//!
//! ```text
//!            run                       event: work
//!   Parked ─────────▶ Waiting ◀──────────────────────────▶ Working
//!     ▲  ◀───────────────│ park (acknowledged)
//!     └── forget: pending events are dropped        closed channel: the thread ends
//! ```

use std::{
    cell::Cell,
    io,
    os::fd::AsRawFd,
    sync::mpsc::{self, Receiver, Sender, TryRecvError},
    thread,
    time::{Duration, Instant},
};

use devices::io_thread::{IoEvent, IoThread};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::seccomp::{self, Confinement};

/// The longest time until a thread has parked or ended: a device's work must not block longer.
const ACKNOWLEDGE: Duration = Duration::from_secs(if cfg!(test) { 2 } else { 10 });
/// The interval at which the end of a thread is looked for.
const LOOK_AGAIN: Duration = Duration::from_micros(200);
/// The token of the control eventfd. Tokens of a device's eventfds are their indices.
const CONTROL: u64 = u64::MAX;
/// Events of one turn. The rest stays pending.
const BATCH: usize = 16;

/// Errors of I/O threads.
#[derive(Debug, thiserror::Error)]
pub enum IoThreadError {
    /// The thread, or its eventfds, cannot be set up.
    #[error("Cannot start I/O thread {name}")]
    Start {
        /// The thread's name.
        name: String,
        /// The cause.
        source: io::Error,
    },
    /// A thread does not acknowledge.
    #[error("I/O thread {0} does not answer: a file or network of its device hangs")]
    Silent(String),
}

enum Command {
    Run,
    /// The thread acknowledges with this number.
    Park(u64),
}

/// The machine's end of one thread.
struct Handle {
    name: String,
    events: Vec<IoEvent>,
    commands: Sender<Command>,
    /// Wakes the thread for a command.
    control: IoEvent,
    acknowledged: Receiver<u64>,
    /// The number of the last command to park. An acknowledgement with another number came too late
    /// for its command.
    parks: Cell<u64>,
    thread: Option<thread::JoinHandle<()>>,
}

/// All I/O threads of a machine.
pub struct IoThreads(Vec<Handle>);

impl IoThreads {
    /// Starts the threads, parked.
    ///
    /// # Errors
    /// [`IoThreadError::Start`].
    pub fn start(requests: Vec<IoThread>, confinement: &Confinement) -> Result<Self, IoThreadError> {
        let start = |request: IoThread| {
            let name = request.name.clone();
            Handle::start(request, confinement).map_err(|source| IoThreadError::Start { name, source })
        };
        Ok(Self(requests.into_iter().map(start).collect::<Result<_, _>>()?))
    }

    /// Lets the threads work.
    ///
    /// # Errors
    /// [`IoThreadError::Silent`].
    pub fn run(&self) -> Result<(), IoThreadError> {
        self.0.iter().try_for_each(|handle| handle.send(Command::Run))
    }

    /// Stops the threads between two pieces of work. Events stay pending.
    ///
    /// # Errors
    /// [`IoThreadError::Silent`]: the thread parks later. [`Self::run`] undoes that, too.
    pub fn park(&self) -> Result<(), IoThreadError> {
        for handle in &self.0 {
            handle.parks.set(handle.parks.get().wrapping_add(1));
            handle.send(Command::Park(handle.parks.get()))?;
        }
        self.0.iter().try_for_each(Handle::wait)
    }

    /// Drops the events of the last boot. The threads are parked.
    pub fn forget(&self) {
        for event in self.0.iter().flat_map(|handle| &handle.events) {
            event.take();
        }
    }

    /// Ends the threads. Does nothing the second time.
    pub fn end(&mut self) {
        for handle in &mut self.0 {
            // Closing the channel ends the thread at its next check.
            let (closed, _) = mpsc::channel();
            handle.commands = closed;
            handle.control.signal();
        }
        let deadline = Instant::now() + ACKNOWLEDGE;
        for mut handle in self.0.drain(..) {
            let Some(thread) = handle.thread.take() else { continue };
            while !thread.is_finished() && Instant::now() < deadline {
                thread::sleep(LOOK_AGAIN);
            }
            if !thread.is_finished() {
                tracing::error!(thread = handle.name, "An I/O thread does not end: it is left behind");
            } else if thread.join().is_err() {
                tracing::error!(thread = handle.name, "An I/O thread had panicked");
            }
        }
    }
}

impl Drop for IoThreads {
    fn drop(&mut self) {
        self.end();
    }
}

impl Handle {
    fn start(request: IoThread, confinement: &Confinement) -> io::Result<Self> {
        let IoThread { name, events, work } = request;
        let control = IoEvent::new()?;
        let epoll = Epoll::new()?;
        for (token, event) in (0..).zip(&events).chain([(CONTROL, &control)]) {
            let fd = event.eventfd().as_raw_fd();
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token))?;
        }
        let (commands, inbox) = mpsc::channel();
        let (acknowledge, acknowledged) = mpsc::channel();
        let worker =
            Worker { name: name.clone(), epoll, control: control.clone(), events: events.clone(), work };
        let confine = confinement.prepare(seccomp::Thread::Io);
        let thread = thread::Builder::new().name(name.clone()).spawn(move || {
            confine();
            worker.serve(&inbox, &acknowledge);
        })?;
        Ok(Self { name, events, commands, control, acknowledged, parks: Cell::new(0), thread: Some(thread) })
    }

    fn silent(&self) -> IoThreadError {
        IoThreadError::Silent(self.name.clone())
    }

    fn send(&self, command: Command) -> Result<(), IoThreadError> {
        self.commands.send(command).map_err(|_| self.silent())?;
        self.control.signal();
        Ok(())
    }

    fn wait(&self) -> Result<(), IoThreadError> {
        let deadline = Instant::now() + ACKNOWLEDGE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if self.acknowledged.recv_timeout(left).map_err(|_| self.silent())? == self.parks.get() {
                return Ok(());
            }
        }
    }
}

/// The state of the thread itself.
struct Worker {
    name: String,
    epoll: Epoll,
    control: IoEvent,
    events: Vec<IoEvent>,
    work: Box<dyn FnMut(usize) + Send>,
}

impl Worker {
    fn serve(mut self, commands: &Receiver<Command>, acknowledge: &Sender<u64>) {
        let mut running = false;
        loop {
            let command =
                if running { commands.try_recv() } else { commands.recv().map_err(TryRecvError::from) };
            match command {
                Ok(Command::Run) => running = true,
                Ok(Command::Park(number)) => {
                    running = false;
                    if acknowledge.send(number).is_err() {
                        return;
                    }
                }
                // A command that comes now has signalled `control`, or will.
                Err(TryRecvError::Empty) => {
                    if !self.turn() {
                        return;
                    }
                }
                Err(TryRecvError::Disconnected) => return,
            }
        }
    }

    /// Waits for events and does their work. Returns false if the thread cannot go on.
    fn turn(&mut self) -> bool {
        let mut ready = [EpollEvent::default(); BATCH];
        let count = match self.epoll.wait(-1, &mut ready) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => {
                tracing::error!(thread = self.name, %error, "An I/O thread cannot wait for its events");
                return false;
            }
        };
        let ready = ready.get(..count).unwrap_or_default();
        if ready.iter().any(|event| event.data() == CONTROL) {
            // The command comes first. The other events are level triggered, and are seen again.
            self.control.take();
            return true;
        }
        for event in ready {
            let Ok(index) = usize::try_from(event.data()) else { continue };
            if self.events.get(index).is_some_and(IoEvent::take) {
                (self.work)(index);
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A thread of two events that sends the index of each.
    fn start(events: [&IoEvent; 2]) -> (IoThreads, Receiver<usize>) {
        let (sender, work) = mpsc::channel();
        let request = IoThread {
            name: "io test".into(),
            events: events.map(IoEvent::clone).to_vec(),
            work: Box::new(move |index| sender.send(index).unwrap()),
        };
        (IoThreads::start(vec![request], &Confinement::new(false)).unwrap(), work)
    }

    const SOON: Duration = Duration::from_secs(5);
    const NOT: Duration = Duration::from_millis(30);

    #[test]
    fn events_are_served_while_the_thread_runs_and_stay_pending_while_it_is_parked() {
        let (first, second) = (IoEvent::new().unwrap(), IoEvent::new().unwrap());
        let (mut threads, work) = start([&first, &second]);
        first.signal();
        assert!(work.recv_timeout(NOT).is_err(), "a new thread is parked");
        threads.run().unwrap();
        assert_eq!(work.recv_timeout(SOON), Ok(0));
        second.eventfd().write(3).unwrap();
        assert_eq!(work.recv_timeout(SOON), Ok(1));
        assert!(work.recv_timeout(NOT).is_err(), "once for each signal");
        threads.park().unwrap();
        second.signal();
        assert!(work.recv_timeout(NOT).is_err());
        threads.park().unwrap();
        threads.run().unwrap();
        threads.run().unwrap();
        assert_eq!(work.recv_timeout(SOON), Ok(1));
        threads.end();
        first.signal();
        assert!(work.recv().is_err(), "the thread and its work are gone");
        threads.end();
    }

    #[test]
    fn a_forgotten_event_is_never_served() {
        let (first, second) = (IoEvent::new().unwrap(), IoEvent::new().unwrap());
        let (threads, work) = start([&first, &second]);
        threads.run().unwrap();
        threads.park().unwrap();
        first.signal();
        threads.forget();
        second.signal();
        threads.run().unwrap();
        assert_eq!(work.recv_timeout(SOON), Ok(1));
        assert!(work.recv_timeout(NOT).is_err());
    }

    /// A thread whose work says when it begins, and then waits.
    fn start_slow(event: &IoEvent) -> (IoThreads, Receiver<()>, Sender<()>) {
        let (begin, begun) = mpsc::channel();
        let (proceed, may_proceed) = mpsc::channel();
        let request = IoThread {
            name: "io slow".into(),
            events: vec![event.clone()],
            work: Box::new(move |_| {
                begin.send(()).unwrap();
                may_proceed.recv().unwrap();
            }),
        };
        (IoThreads::start(vec![request], &Confinement::new(false)).unwrap(), begun, proceed)
    }

    #[test]
    fn a_thread_that_works_parks_after_this_piece() {
        let event = IoEvent::new().unwrap();
        let (threads, begun, proceed) = start_slow(&event);
        threads.run().unwrap();
        event.signal();
        begun.recv_timeout(SOON).unwrap();
        // The threads come back: their end would wait for the work, too.
        let park = thread::spawn(move || (threads.park(), threads));
        thread::sleep(NOT);
        assert!(!park.is_finished(), "it waits for the work");
        proceed.send(()).unwrap();
        park.join().unwrap().0.unwrap();
    }

    #[test]
    fn a_thread_that_hangs_is_named_and_its_late_answer_is_not_taken_for_the_next() {
        let event = IoEvent::new().unwrap();
        let (threads, begun, proceed) = start_slow(&event);
        threads.run().unwrap();
        event.signal();
        begun.recv_timeout(SOON).unwrap();
        let error = threads.park().unwrap_err();
        assert!(matches!(&error, IoThreadError::Silent(name) if name == "io slow"), "{error}");
        // It goes on, and is busy again.
        threads.run().unwrap();
        proceed.send(()).unwrap();
        event.signal();
        begun.recv_timeout(SOON).unwrap();
        // The threads come back: their end would wait for the work, too.
        let park = thread::spawn(move || (threads.park(), threads));
        thread::sleep(NOT);
        assert!(!park.is_finished(), "the answer to the first command has come meanwhile");
        proceed.send(()).unwrap();
        park.join().unwrap().0.unwrap();
    }
}
