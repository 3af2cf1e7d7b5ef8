// SPDX-License-Identifier: Apache-2.0

//! Starting the threads of an assigned function, with what their process wants each to do first.

use std::{
    io,
    sync::Arc,
    thread::{Builder, JoinHandle},
};

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// A mailbox relay.
    Relay,
    /// A function's own, which does what may block.
    Function,
    /// A simulated VF.
    SimulatedVf,
}

/// What a new thread does before anything else.
pub type First = Box<dyn FnOnce() + Send>;

/// What threads do before anything else: a vmm confines each of them to the system calls of its kind. The default is nothing.
#[derive(Clone, Default)]
pub struct ThreadStart(Option<Arc<dyn Fn(ThreadKind) -> First + Send + Sync>>);

impl ThreadStart {
    /// `prepare` is called before a thread is started, by whoever starts it; the thread then calls what it gave.
    pub fn new(prepare: impl Fn(ThreadKind) -> First + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(prepare)))
    }

    pub(crate) fn spawn(
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
