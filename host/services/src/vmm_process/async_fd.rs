// SPDX-License-Identifier: Apache-2.0

//! Descriptors that the runtime watches: the one place for tokio's unsafe registration.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use protocol::Channel;
use tokio::io::{Interest, unix::AsyncFd};

/// Types that own one descriptor, never replace it, and close it only when dropped.
pub(super) trait OwnsOne: AsRawFd {}

impl OwnsOne for OwnedFd {}
impl OwnsOne for Channel {}

/// Watches a descriptor. Panics outside of a tokio runtime.
pub(super) fn polled<T: OwnsOne>(inner: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    // SAFETY: by `OwnsOne` the descriptor is open, and stays the same one, as long as the `AsyncFd` owns `inner`.
    Ok(unsafe { AsyncFd::register_with_interest(inner, interest) }?)
}
