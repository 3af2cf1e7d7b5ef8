// SPDX-License-Identifier: Apache-2.0

//! The I/O threads of a machine's devices. They exist from the machine's construction to its end.
//! If no device asks for one, there is none.
//!
//! ```text
//!            run                       event: work
//!   Parked ─────────▶ Waiting ◀──────────────────────────▶ Working
//!     ▲  ◀───────────────│ park (acknowledged)
//!     └── forget: pending events are dropped        closed channel: the thread ends
//! ```

use std::{
    cell::Cell,
    collections::BTreeSet,
    io,
    os::fd::AsRawFd,
    sync::{
        Arc,
        mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError},
    },
    thread,
    time::{Duration, Instant},
};

use devices::io_thread::{IoEvent, IoSource, IoThread};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::{
    seccomp::{self, Confinement},
    vcpu::{Event, Events},
};

/// The longest time until all threads have parked, or have ended. The event loop serves nothing
/// else meanwhile, so this must stay below the agent's limits: 5 s for a revocation (`confirm` in
/// `host/switch/src/lib.rs`), 15 s for a stop (`STOP` in `host/src/vm/actor.rs`).
const ACKNOWLEDGE: Duration = Duration::from_secs(if cfg!(test) { 2 } else { 3 });
/// The interval between checks for the end of a thread.
const LOOK_AGAIN: Duration = Duration::from_micros(200);
/// The token of the control eventfd. Tokens of a device's eventfds are their indices.
const CONTROL: u64 = u64::MAX;
/// The events of one turn: only one, so that a command waits for one piece of work at most. The
/// others stay pending, and the kernel returns them in turn.
const BATCH: usize = 1;

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
    /// A thread does not acknowledge in time. It may do so later.
    #[error("I/O thread {0} is busy: a file or network of its device is slow, or hangs; try again")]
    Silent(String),
    /// A thread has ended, so its device can never work again.
    #[error("I/O thread {0} has ended; this is a bug of Portcullis")]
    Ended(String),
}

enum Command {
    Run,
    /// The thread acknowledges with this number.
    Park(u64),
}

/// The machine's end of one thread.
struct Handle {
    name: String,
    /// The number of the device on the board.
    device: usize,
    sources: Vec<IoSource>,
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
    /// Starts the threads, parked. Each request comes with the number of its device. A thread that
    /// ends by itself sends [`Event::IoThreadEnded`] to `end`.
    ///
    /// # Errors
    /// [`IoThreadError::Start`].
    pub fn start(
        requests: Vec<(usize, IoThread)>,
        end: &Arc<Events>,
        confinement: &Confinement,
    ) -> Result<Self, IoThreadError> {
        let start = |(device, request): (usize, IoThread)| {
            let name = request.name.clone();
            Handle::start(device, request, end, confinement)
                .map_err(|source| IoThreadError::Start { name, source })
        };
        Ok(Self(requests.into_iter().map(start).collect::<Result<_, _>>()?))
    }

    /// Lets the threads work.
    ///
    /// # Errors
    /// [`IoThreadError::Ended`].
    pub fn run(&self) -> Result<(), IoThreadError> {
        self.0.iter().try_for_each(|handle| handle.send(Command::Run))
    }

    /// The longest time that [`Self::park`] may take.
    pub const LONGEST: Duration = ACKNOWLEDGE;

    /// Stops the threads between two pieces of work. Events stay pending. Takes the time `within` at
    /// most, for all threads together.
    ///
    /// # Errors
    /// [`IoThreadError::Silent`]: the thread parks later, and a call of [`Self::run`] makes it go
    /// on. [`IoThreadError::Ended`].
    pub fn park(&self, within: Duration) -> Result<(), IoThreadError> {
        for handle in &self.0 {
            handle.parks.set(handle.parks.get().wrapping_add(1));
            handle.send(Command::Park(handle.parks.get()))?;
        }
        let deadline = Instant::now() + within;
        self.0.iter().try_for_each(|handle| handle.wait(deadline))
    }

    /// Drops the pending events of the last boot. The threads are parked.
    pub fn forget(&self) {
        for source in self.0.iter().flat_map(|handle| &handle.sources) {
            source.take();
        }
    }

    /// Ends the threads, and waits for all of them together for up to 3 s. Returns the numbers of
    /// the devices with a thread that has not ended: it is left behind. A second call does nothing.
    pub fn end(&mut self) -> BTreeSet<usize> {
        let mut left_behind = BTreeSet::new();
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
                left_behind.insert(handle.device);
                tracing::error!(thread = handle.name, "An I/O thread does not end: it is left behind");
            } else if thread.join().is_err() {
                tracing::error!(thread = handle.name, "An I/O thread had panicked");
            }
        }
        left_behind
    }
}

impl Drop for IoThreads {
    fn drop(&mut self) {
        self.end();
    }
}

impl Handle {
    fn start(
        device: usize,
        request: IoThread,
        end: &Arc<Events>,
        confinement: &Confinement,
    ) -> io::Result<Self> {
        let IoThread { name, calls, sources, work, end: last } = request;
        let control = IoEvent::new()?;
        let epoll = Epoll::new()?;
        for (token, source) in (0..).zip(&sources).chain([(CONTROL, &IoSource::Event(control.clone()))]) {
            let edge = if source.is_edge_triggered() { EventSet::EDGE_TRIGGERED } else { EventSet::empty() };
            let wanted = EpollEvent::new(EventSet::IN | edge, token);
            epoll.ctl(ControlOperation::Add, source.as_raw_fd(), wanted)?;
        }
        let (commands, inbox) = mpsc::channel();
        let (acknowledge, acknowledged) = mpsc::channel();
        let worker =
            Worker { name: name.clone(), epoll, control: control.clone(), sources: sources.clone(), work };
        let obituary = Obituary { name: name.clone(), end: Arc::clone(end), expected: false };
        let confine = confinement.prepare(seccomp::Thread::Io(calls));
        let thread = thread::Builder::new().name(name.clone()).spawn(move || {
            // Move the whole value, so that it is dropped in this thread.
            let mut obituary = obituary;
            confine();
            obituary.expected = worker.serve(&inbox, &acknowledge);
            if obituary.expected {
                last();
            }
        })?;
        let (parks, thread) = (Cell::new(0), Some(thread));
        Ok(Self { name, device, sources, commands, control, acknowledged, parks, thread })
    }

    fn ended(&self) -> IoThreadError {
        IoThreadError::Ended(self.name.clone())
    }

    fn send(&self, command: Command) -> Result<(), IoThreadError> {
        self.commands.send(command).map_err(|_| self.ended())?;
        self.control.signal();
        Ok(())
    }

    fn wait(&self, deadline: Instant) -> Result<(), IoThreadError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.acknowledged.recv_timeout(left) {
                Ok(number) if number == self.parks.get() => return Ok(()),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => return Err(IoThreadError::Silent(self.name.clone())),
                Err(RecvTimeoutError::Disconnected) => return Err(self.ended()),
            }
        }
    }
}

/// Sends an event when its thread ends or panics, unless the machine has ended the thread.
struct Obituary {
    name: String,
    end: Arc<Events>,
    expected: bool,
}

impl Drop for Obituary {
    fn drop(&mut self) {
        if !self.expected {
            self.end.send(Event::IoThreadEnded { name: std::mem::take(&mut self.name) });
        }
    }
}

/// The state of the thread itself.
struct Worker {
    name: String,
    epoll: Epoll,
    control: IoEvent,
    sources: Vec<IoSource>,
    work: Box<dyn FnMut(usize) + Send>,
}

impl Worker {
    /// Works until the machine closes the channel. Returns false if the thread cannot go on.
    fn serve(mut self, commands: &Receiver<Command>, acknowledge: &Sender<u64>) -> bool {
        let mut running = false;
        loop {
            let command =
                if running { commands.try_recv() } else { commands.recv().map_err(TryRecvError::from) };
            match command {
                Ok(Command::Run) => running = true,
                Ok(Command::Park(number)) => {
                    running = false;
                    if acknowledge.send(number).is_err() {
                        return true;
                    }
                }
                // The sender of a command that comes now signals `control`, which ends the wait.
                Err(TryRecvError::Empty) => {
                    if !self.turn() {
                        return false;
                    }
                }
                Err(TryRecvError::Disconnected) => return true,
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
            // The command comes first. It came alone (`BATCH`), so no other event is lost.
            self.control.take();
            return true;
        }
        for event in ready {
            let Ok(index) = usize::try_from(event.data()) else { continue };
            if self.sources.get(index).is_some_and(IoSource::take) {
                (self.work)(index);
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write as _, os::unix::net::UnixStream};

    use devices::io_thread::{Calls, IoTimer};

    use super::*;

    /// Starts the threads of as many devices, and returns the receiver of their events.
    fn start_all(requests: Vec<IoThread>) -> (IoThreads, Receiver<Event>) {
        let (end, ended, _) = Events::pair().unwrap();
        let requests = requests.into_iter().enumerate().collect();
        (IoThreads::start(requests, &Arc::new(end), &Confinement::new(false)).unwrap(), ended)
    }

    /// A thread of two events that sends the index of each.
    fn start(events: [&IoEvent; 2]) -> (IoThreads, Receiver<usize>) {
        let (sender, work) = mpsc::channel();
        let request = IoThread {
            name: "io test".into(),
            calls: Calls::None,
            sources: events.map(|event| IoSource::Event(event.clone())).to_vec(),
            work: Box::new(move |index| sender.send(index).unwrap()),
            end: Box::new(|| {}),
        };
        (start_all(vec![request]).0, work)
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
        threads.park(ACKNOWLEDGE).unwrap();
        second.signal();
        assert!(work.recv_timeout(NOT).is_err());
        threads.park(ACKNOWLEDGE).unwrap();
        threads.run().unwrap();
        threads.run().unwrap();
        assert_eq!(work.recv_timeout(SOON), Ok(1));
        threads.end();
        first.signal();
        assert!(work.recv().is_err(), "the thread and its work are gone");
        threads.end();
    }

    #[test]
    fn timers_and_files_wake_a_thread_once_for_each_change() {
        let timer = IoTimer::new().unwrap();
        let (file, mut peer) = UnixStream::pair().unwrap();
        let (sender, work) = mpsc::channel();
        let sources = vec![IoSource::Timer(timer.clone()), IoSource::Readable(Arc::new(file.into()))];
        let (calls, work_of) = (Calls::None, Box::new(move |index| sender.send(index).unwrap()));
        let name = "io sources".into();
        let request = IoThread { name, calls, sources, work: work_of, end: Box::new(|| {}) };
        let (threads, _ended) = start_all(vec![request]);
        threads.run().unwrap();
        assert!(work.recv_timeout(NOT).is_err(), "the timer is not set, and the file is empty");
        timer.set(Duration::ZERO).unwrap();
        assert_eq!(work.recv_timeout(SOON), Ok(0));
        for _ in 0..2 {
            peer.write_all(b"frame").unwrap();
            assert_eq!(work.recv_timeout(SOON), Ok(1), "although the first one was not read");
        }
        assert!(work.recv_timeout(NOT).is_err(), "each change is one event");
        threads.park(ACKNOWLEDGE).unwrap();
        timer.set(Duration::ZERO).unwrap();
        peer.write_all(b"frame").unwrap();
        assert!(work.recv_timeout(NOT).is_err(), "the thread is parked");
        threads.run().unwrap();
        let after = BTreeSet::from([work.recv_timeout(SOON).unwrap(), work.recv_timeout(SOON).unwrap()]);
        assert_eq!(after, BTreeSet::from([0, 1]), "nothing is lost");
        threads.park(ACKNOWLEDGE).unwrap();
        timer.set(Duration::ZERO).unwrap();
        thread::sleep(NOT);
        threads.forget();
        threads.run().unwrap();
        assert!(work.recv_timeout(NOT).is_err(), "the timer of the last boot is forgotten");
    }

    #[test]
    fn a_forgotten_event_is_never_served() {
        let (first, second) = (IoEvent::new().unwrap(), IoEvent::new().unwrap());
        let (threads, work) = start([&first, &second]);
        threads.run().unwrap();
        threads.park(ACKNOWLEDGE).unwrap();
        first.signal();
        threads.forget();
        second.signal();
        threads.run().unwrap();
        assert_eq!(work.recv_timeout(SOON), Ok(1));
        assert!(work.recv_timeout(NOT).is_err());
    }

    /// A thread whose work says when it begins, and then waits.
    fn slow(events: &[&IoEvent]) -> (IoThread, Receiver<()>, Sender<()>) {
        let (begin, begun) = mpsc::channel();
        let (proceed, may_proceed) = mpsc::channel();
        let request = IoThread {
            name: "io slow".into(),
            calls: Calls::None,
            sources: events.iter().map(|event| IoSource::Event((*event).clone())).collect(),
            work: Box::new(move |_| {
                begin.send(()).unwrap();
                may_proceed.recv().unwrap();
            }),
            end: Box::new(|| {}),
        };
        (request, begun, proceed)
    }

    fn start_slow(event: &IoEvent) -> (IoThreads, Receiver<()>, Sender<()>) {
        let (request, begun, proceed) = slow(&[event]);
        (start_all(vec![request]).0, begun, proceed)
    }

    #[test]
    fn a_thread_parks_after_one_piece_of_work_although_more_is_pending() {
        let events = [(); 8].map(|()| IoEvent::new().unwrap());
        let (request, begun, proceed) = slow(&events.each_ref());
        let (threads, _ended) = start_all(vec![request]);
        events.iter().for_each(IoEvent::signal);
        threads.run().unwrap();
        begun.recv_timeout(SOON).unwrap();
        let park = thread::spawn(move || (threads.park(ACKNOWLEDGE), threads));
        thread::sleep(NOT);
        proceed.send(()).unwrap();
        let (parked, threads) = park.join().unwrap();
        parked.unwrap();
        assert!(begun.recv_timeout(NOT).is_err(), "no second piece");
        threads.run().unwrap();
        for _ in 1..events.len() {
            begun.recv_timeout(SOON).unwrap();
            proceed.send(()).unwrap();
        }
        assert!(begun.recv_timeout(NOT).is_err(), "all others were pending, once each");
    }

    /// The agent's patience does not grow with the number of threads.
    #[test]
    fn all_threads_together_have_one_time_to_park() {
        let events = [(); 2].map(|()| IoEvent::new().unwrap());
        let [(late, late_begun, proceed_late), (hung, hung_begun, proceed_hung)] =
            events.each_ref().map(|event| slow(&[event]));
        let (threads, _ended) = start_all(vec![late, hung]);
        threads.run().unwrap();
        events.iter().for_each(IoEvent::signal);
        late_begun.recv_timeout(SOON).unwrap();
        hung_begun.recv_timeout(SOON).unwrap();
        let late = thread::spawn(move || {
            thread::sleep(ACKNOWLEDGE * 3 / 4);
            proceed_late.send(()).unwrap();
        });
        let begun = Instant::now();
        assert!(matches!(threads.park(ACKNOWLEDGE), Err(IoThreadError::Silent(_))));
        assert!(begun.elapsed() < ACKNOWLEDGE * 3 / 2, "{:?}", begun.elapsed());
        proceed_hung.send(()).unwrap();
        late.join().unwrap();
    }

    #[test]
    fn a_thread_that_ends_by_itself_sends_an_event_and_is_not_silent() {
        let event = IoEvent::new().unwrap();
        let (request, begun, proceed) = slow(&[&event]);
        let (mut threads, ended) = start_all(vec![request]);
        threads.run().unwrap();
        drop(proceed);
        event.signal();
        begun.recv_timeout(SOON).unwrap();
        let end = ended.recv_timeout(SOON).unwrap();
        assert!(matches!(&end, Event::IoThreadEnded { name } if name == "io slow"), "{end:?}");
        assert!(matches!(threads.park(ACKNOWLEDGE), Err(IoThreadError::Ended(name)) if name == "io slow"));
        assert!(threads.end().is_empty(), "nothing is left behind");
    }

    #[test]
    fn the_end_that_the_machine_orders_sends_no_event_and_names_devices_in_use() {
        let events = [(); 2].map(|()| IoEvent::new().unwrap());
        let [(good, ..), (hung, begun, proceed)] = events.each_ref().map(|event| slow(&[event]));
        let (mut threads, ended) = start_all(vec![good, hung]);
        threads.run().unwrap();
        events[1].signal();
        begun.recv_timeout(SOON).unwrap();
        assert_eq!(threads.end(), BTreeSet::from([1]));
        proceed.send(()).unwrap();
        assert!(ended.recv_timeout(SOON).is_err(), "all senders are gone");
    }

    #[test]
    fn a_thread_that_works_parks_after_this_piece() {
        let event = IoEvent::new().unwrap();
        let (threads, begun, proceed) = start_slow(&event);
        threads.run().unwrap();
        event.signal();
        begun.recv_timeout(SOON).unwrap();
        // The threads come back: their end would wait for the work, too.
        let park = thread::spawn(move || (threads.park(ACKNOWLEDGE), threads));
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
        let error = threads.park(ACKNOWLEDGE).unwrap_err();
        assert!(matches!(&error, IoThreadError::Silent(name) if name == "io slow"), "{error}");
        // It goes on, and is busy again.
        threads.run().unwrap();
        proceed.send(()).unwrap();
        event.signal();
        begun.recv_timeout(SOON).unwrap();
        // The threads come back: their end would wait for the work, too.
        let park = thread::spawn(move || (threads.park(ACKNOWLEDGE), threads));
        thread::sleep(NOT);
        assert!(!park.is_finished(), "the answer to the first command has come meanwhile");
        proceed.send(()).unwrap();
        park.join().unwrap().0.unwrap();
    }
}
