// SPDX-License-Identifier: Apache-2.0

//! The device's side of its I/O thread: it owns the rings while a driver uses them.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering},
};

use devices::io_thread::{IoEvent, IoSource};

use crate::{
    disk::Disk,
    engine::{Configuration, Engine},
    queue::{ActiveQueue, ISR_CONFIG, Interrupt},
};

/// The most faults of drivers to log. The guest can make any count of them.
const LOGGED: u64 = 8;

/// A command of the transport.
pub(crate) enum Command {
    /// A driver is ready.
    Start {
        features: u64,
        /// By their indices. None for one that the driver does not use.
        queues: Vec<Option<ActiveQueue>>,
    },
    /// The driver resets the device.
    Stop,
}

/// The state that transport and worker share. No lock is held for longer than a few instructions.
pub(crate) struct Shared {
    name: String,
    /// The last command that the worker has not taken yet.
    command: Mutex<Option<Command>>,
    /// The worker has not finished a reset.
    resetting: AtomicBool,
    /// The driver has broken the device: DEVICE_NEEDS_RESET.
    broken: AtomicBool,
    /// The engine has stalled.
    stalled: AtomicBool,
    /// The machine runs again: the engine is to try again.
    retry: AtomicBool,
    /// The function may access guest memory (the command register's bus master bit).
    pub(crate) bus_master: AtomicBool,
    pub(crate) isr: Arc<AtomicU16>,
    /// The interrupt of configuration changes.
    pub(crate) on_change: Interrupt,
    /// The event of commands, then one for each queue.
    pub(crate) events: Vec<IoEvent>,
    faults: AtomicU64,
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(crate) fn new(name: &str, events: Vec<IoEvent>, on_change: Interrupt) -> Self {
        Self {
            name: name.to_owned(),
            command: Mutex::new(None),
            resetting: AtomicBool::new(false),
            broken: AtomicBool::new(false),
            stalled: AtomicBool::new(false),
            retry: AtomicBool::new(false),
            bus_master: AtomicBool::new(false),
            isr: Arc::clone(&on_change.isr),
            on_change,
            events,
            faults: AtomicU64::new(0),
        }
    }

    fn command(&self, command: Command) {
        *lock(&self.command) = Some(command);
        self.events.iter().take(1).for_each(IoEvent::signal);
    }

    pub(crate) fn start(&self, features: u64, queues: Vec<Option<ActiveQueue>>) {
        self.command(Command::Start { features, queues });
    }

    /// Begins a reset. [`Self::resetting`] tells when it is over.
    pub(crate) fn stop(&self) {
        self.resetting.store(true, Ordering::Release);
        self.command(Command::Stop);
    }

    /// Whether a reset is under way.
    pub(crate) fn resetting(&self) -> bool {
        self.resetting.load(Ordering::Acquire)
    }

    pub(crate) fn broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// The driver has done a thing that no driver does: the device stops until a reset.
    pub(crate) fn break_down(&self, error: &dyn std::error::Error) {
        if self.faults.fetch_add(1, Ordering::Relaxed) < LOGGED {
            tracing::warn!(device = self.name, "A device waits for its driver's reset: {error}");
        }
        if !self.broken.swap(true, Ordering::AcqRel) {
            self.on_change.raise(ISR_CONFIG);
        }
    }

    /// Rings the doorbell of a queue.
    pub(crate) fn ring(&self, queue: usize) {
        if let Some(event) = self.events.get(queue.saturating_add(1)) {
            event.signal();
        }
    }

    /// The machine goes on after a pause.
    pub(crate) fn resume(&self) {
        if self.stalled.swap(false, Ordering::AcqRel) {
            self.retry.store(true, Ordering::Release);
            self.ring_all();
        }
    }

    /// Rings all doorbells.
    pub(crate) fn ring_all(&self) {
        self.events.iter().skip(1).for_each(IoEvent::signal);
    }
}

/// The worker's own state. Its thread holds the lock during its work, and the machine takes it
/// while the thread is parked.
pub(crate) struct Worker {
    shared: Arc<Shared>,
    engine: Box<dyn Engine>,
    queues: Vec<Option<ActiveQueue>>,
    /// The queues that the engine's own sources stand for, in the sources' order.
    woken: Vec<usize>,
    configuration: Arc<Configuration>,
    /// The generation of the configuration that the driver knows.
    known: u8,
}

impl Worker {
    pub(crate) fn new(
        shared: Arc<Shared>,
        engine: Box<dyn Engine>,
        configuration: Arc<Configuration>,
    ) -> Self {
        let known = configuration.generation();
        Self { shared, engine, queues: Vec::new(), woken: Vec::new(), configuration, known }
    }

    /// The engine's own sources. Their events come behind those of the queues.
    pub(crate) fn sources(&mut self) -> Vec<IoSource> {
        let (woken, sources) = self.engine.sources().into_iter().unzip();
        self.woken = woken;
        sources
    }

    /// The engine's own source that an event stands for.
    fn source_of(&self, event: usize) -> Option<usize> {
        event.checked_sub(self.shared.events.len())
    }

    /// The queue that an event stands for. None for the event of commands.
    fn queue_of(&self, event: usize) -> Option<usize> {
        match self.source_of(event) {
            Some(source) => self.woken.get(source).copied(),
            None => event.checked_sub(1),
        }
    }

    /// The work for an event. Commands come first: an event may be one of the last driver's.
    pub(crate) fn work(&mut self, event: usize) {
        let command = lock(&self.shared.command).take();
        let starts = matches!(command, Some(Command::Start { .. }));
        match command {
            Some(Command::Start { features, queues }) => {
                self.queues = queues;
                self.engine.start(features);
                self.report_change();
                // The driver may have filled its rings before.
                self.shared.ring_all();
            }
            Some(Command::Stop) => self.stop(),
            None => {}
        }
        if let Some(source) = self.source_of(event) {
            self.engine.wake(source);
            self.report_change();
            self.engine.settled();
        }
        // A start may take its time. Its doorbells come next.
        let Some(index) = self.queue_of(event).filter(|_| !starts) else { return };
        if self.shared.broken() || !self.shared.bus_master.load(Ordering::Acquire) {
            return;
        }
        let Some(queue) = self.queues.get_mut(index).and_then(Option::as_mut) else { return };
        if self.shared.retry.swap(false, Ordering::AcqRel) {
            self.engine.retry();
        }
        let result = self.engine.serve(index, queue);
        if self.engine.is_stalled() {
            self.shared.stalled.store(true, Ordering::Release);
        }
        match result {
            Ok(true) => self.shared.ring(index),
            Ok(false) => {}
            Err(error) => self.shared.break_down(&error),
        }
    }

    /// Interrupts the driver if the configuration has changed since its reset (the specification, 4.1.4.5.1). A driver that
    /// has not started may have read the old one already: it is told when it starts.
    fn report_change(&mut self) {
        if self.queues.is_empty() {
            return;
        }
        let generation = self.configuration.generation();
        if std::mem::replace(&mut self.known, generation) != generation {
            self.shared.on_change.raise(ISR_CONFIG);
        }
    }

    fn stop(&mut self) {
        self.engine.stop();
        self.queues.clear();
        self.known = self.configuration.generation();
        self.shared.broken.store(false, Ordering::Release);
        self.shared.isr.store(0, Ordering::Release);
        self.shared.resetting.store(false, Ordering::Release);
    }

    /// The disk behind the device. The thread is parked.
    pub(crate) fn disk(&mut self) -> Option<&mut dyn Disk> {
        self.engine.disk()
    }

    /// The machine's end, on the thread.
    pub(crate) fn close(&mut self) {
        self.engine.close();
    }

    /// The machine's reset. The thread is parked.
    pub(crate) fn power_on(&mut self) {
        lock(&self.shared.command).take();
        self.stop();
        self.engine.power_on();
        // The driver of the next boot has read nothing yet.
        self.known = self.configuration.generation();
        self.shared.bus_master.store(false, Ordering::Release);
    }
}
