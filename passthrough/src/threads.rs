// SPDX-License-Identifier: Apache-2.0

//! The start of an assigned function's threads, with a first action chosen by their process.

use std::{
    io,
    sync::Arc,
    thread::{Builder, JoinHandle},
};

/// The purpose of a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// A mailbox relay.
    Relay,
    /// A function's own thread, for work that may block.
    Function,
    /// A simulated VF.
    SimulatedVf,
}

/// The first action of a new thread.
pub type First = Box<dyn FnOnce() + Send>;

/// The first action of each thread: a vmm confines it to the system calls of its kind. The default is nothing.
#[derive(Clone, Default)]
pub struct ThreadStart(Option<Arc<dyn Fn(ThreadKind) -> First + Send + Sync>>);

impl ThreadStart {
    /// Calls `prepare` on the starting thread before each new thread; the new thread then runs the returned action.
    pub fn new(prepare: impl Fn(ThreadKind) -> First + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(prepare)))
    }

    /// Starts a thread of this kind.
    ///
    /// # Errors
    /// Those of the system: no memory, or too many threads.
    pub fn spawn(
        &self,
        kind: ThreadKind,
        name: String,
        body: impl FnOnce() + Send + 'static,
    ) -> io::Result<JoinHandle<()>> {
        let first = self.0.as_ref().map(|prepare| prepare(kind));
        Builder::new().name(name).spawn(move || {
            if let Some(first) = first {
                first();
            }
            body();
        })
    }
}
