// SPDX-License-Identifier: Apache-2.0

//! seccomp: the system calls that each thread may make.
//!
//! `resources/seccomp` has one filter for each kind of thread; the build compiles them. A thread installs its own
//! before it does anything else. The event loop's thread starts all others, so it installs its own once they are
//! there, and before it reads the kernel image. No filter lets a thread start a thread or a program. A forbidden
//! system call ends the whole process by SIGSYS.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
        mpsc::{self, Receiver, Sender},
    },
    time::Duration,
};

use devices::io_thread::Calls;
use passthrough::threads::{ThreadKind, ThreadStart};
use seccompiler::sock_filter;

/// Filters as `(code, jt, jf, k)`.
mod compiled {
    include!(concat!(env!("OUT_DIR"), "/seccomp.rs"));
}

/// The placeholder for the process's own id, which is known only at run time. No process can have this id
/// (`PID_MAX_LIMIT`).
const OWN_PID: u32 = 0x7fff_ffff;

/// The longest time that a thread may take to install its filter.
const PATIENCE: Duration = Duration::from_secs(10);

/// Errors of installing filters.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// The kernel refused.
    #[error(
        "Cannot install the seccomp filter of thread {thread}; the host's kernel needs CONFIG_SECCOMP_FILTER"
    )]
    Refused {
        /// The thread's name.
        thread: &'static str,
        /// The cause.
        source: seccompiler::Error,
    },
    /// A thread has not confirmed its filter.
    #[error("A thread has not installed its seccomp filter in time")]
    Silent,
}

/// The kinds of confined threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    /// The event loop's thread.
    Main,
    /// A vCPU's thread.
    Vcpu,
    /// An I/O thread of a device.
    Io(Calls),
    /// A thread of a passthrough function.
    Function(ThreadKind),
    /// The process of a simulated PF.
    SimulatedPf,
}

impl Thread {
    /// The filter's file in `resources/seccomp`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::Vcpu => "vcpu",
            Self::Io(Calls::None) => "io-thread",
            Self::Io(Calls::Disk) => "disk-thread",
            Self::Io(Calls::Network) => "network-thread",
            Self::Io(Calls::Port) => "port-thread",
            Self::Function(ThreadKind::Relay) => "relay",
            Self::Function(ThreadKind::Function) => "function-thread",
            Self::Function(ThreadKind::SimulatedVf) => "simulated-vf",
            Self::SimulatedPf => "simulated-pf",
        }
    }

    fn filter(self) -> &'static [(u16, u8, u8, u32)] {
        match self {
            Self::Main => compiled::MAIN,
            Self::Vcpu => compiled::VCPU,
            Self::Io(Calls::None) => compiled::IO,
            Self::Io(Calls::Disk) => compiled::DISK,
            Self::Io(Calls::Network) => compiled::NETWORK,
            Self::Io(Calls::Port) => compiled::PORT,
            Self::Function(ThreadKind::Relay) => compiled::RELAY,
            Self::Function(ThreadKind::Function) => compiled::FUNCTION,
            Self::Function(ThreadKind::SimulatedVf) => compiled::SIMULATED_VF,
            Self::SimulatedPf => compiled::SIMULATED_PF,
        }
    }

    /// Confines the calling thread for good.
    ///
    /// # Errors
    /// [`SeccompError::Refused`].
    pub fn confine(self) -> Result<(), SeccompError> {
        let own = std::process::id();
        let patch = |k: u32| if k == OWN_PID { own } else { k };
        let program: Vec<sock_filter> = self
            .filter()
            .iter()
            .map(|&(code, jt, jf, k)| sock_filter { code, jt, jf, k: patch(k) })
            .collect();
        seccompiler::apply_filter(&program)
            .map_err(|source| SeccompError::Refused { thread: self.name(), source })
    }
}

/// Confines the threads of a machine as they start, and waits until all are confined.
pub struct Confinement {
    on: bool,
    expected: Arc<AtomicUsize>,
    sender: Sender<Result<(), SeccompError>>,
    results: Receiver<Result<(), SeccompError>>,
}

impl Confinement {
    /// Confines threads only if `on`.
    #[must_use]
    pub fn new(on: bool) -> Self {
        let (sender, results) = mpsc::channel();
        Self { on, expected: Arc::default(), sender, results }
    }

    /// Returns the first work of a thread that is about to start: it confines the thread.
    pub fn prepare(&self, thread: Thread) -> impl FnOnce() + Send + 'static {
        prepare(self.on, &self.expected, self.sender.clone(), thread)
    }

    /// Returns the same for the threads of passthrough functions.
    #[must_use]
    pub fn for_functions(&self) -> ThreadStart {
        let (on, expected, sender) = (self.on, Arc::clone(&self.expected), Mutex::new(self.sender.clone()));
        ThreadStart::new(move |kind| {
            let sender = sender.lock().unwrap_or_else(PoisonError::into_inner).clone();
            Box::new(prepare(on, &expected, sender, Thread::Function(kind)))
        })
    }

    /// Waits until every thread that was started is confined.
    ///
    /// # Errors
    /// The first failure of a thread.
    pub fn wait(&self) -> Result<(), SeccompError> {
        for _ in 0..self.expected.swap(0, Ordering::AcqRel) {
            self.results.recv_timeout(PATIENCE).map_err(|_| SeccompError::Silent)??;
        }
        Ok(())
    }

    /// Confines the calling thread, which must start no other from now on.
    ///
    /// # Errors
    /// [`SeccompError::Refused`].
    pub fn confine(&self, thread: Thread) -> Result<(), SeccompError> {
        if self.on {
            thread.confine()?;
        }
        #[cfg(feature = "attacks")]
        crate::attack::strike(thread.name());
        Ok(())
    }
}

fn prepare(
    on: bool,
    expected: &AtomicUsize,
    sender: Sender<Result<(), SeccompError>>,
    thread: Thread,
) -> impl FnOnce() + Send + 'static {
    if on {
        expected.fetch_add(1, Ordering::AcqRel);
    }
    move || {
        let result = if on { thread.confine() } else { Ok(()) };
        // A vCPU's attack runs at its first run.
        #[cfg(feature = "attacks")]
        if thread != Thread::Vcpu {
            crate::attack::strike(thread.name());
        }
        if on {
            // If the machine could not be built, there is no receiver any more.
            let _ = sender.send(result);
        }
    }
}

#[cfg(test)]
mod tests;
