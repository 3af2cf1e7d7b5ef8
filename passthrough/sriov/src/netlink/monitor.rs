// SPDX-License-Identifier: Apache-2.0

//! Events of interfaces: hints that a PF should be read again.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
};

use netlink_sys::{Socket, protocols::NETLINK_ROUTE};

use super::message::{Message, parse};

const RTNLGRP_LINK: u32 = 1;

/// Room for a burst of events, for example when a bridge with many ports goes down.
const BACKLOG: usize = 1 << 20;

/// The longest event: without a list of VFs it has a few KiB.
const LONGEST_NEWS: usize = 64 * 1024;

/// The most datagrams that one call reads: a program that changes interfaces without pause cannot keep the caller in
/// it.
const MOST_NEWS: usize = 256;

/// A possible change. Events never tell which setting of a VF changed, and are sent only for interfaces that are up:
/// read the PF.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hint {
    /// An interface was made, or changed.
    Changed {
        /// Its index.
        index: u32,
        /// Its name.
        name: Option<String>,
        /// Whether it is administratively up.
        up: bool,
    },
    /// An interface is gone.
    Gone {
        /// Its index.
        index: u32,
    },
    /// Events were lost: anything may have changed.
    All,
}

/// A subscription to the kernel's events of interfaces. It never blocks: wait with `poll` until its file descriptor is
/// readable, then call [`hints`](Self::hints).
#[derive(Debug)]
pub struct Monitor {
    socket: Socket,
    buffer: Vec<u8>,
}

impl Monitor {
    /// Subscribes.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.add_membership(RTNLGRP_LINK)?;
        socket.set_non_blocking(true)?;
        // Without the privilege for more, the system's default stays: events are lost earlier, and the loss is
        // reported.
        let _ = socket.set_rx_buf_sz(i32::try_from(BACKLOG).unwrap_or(i32::MAX));
        Ok(Self { socket, buffer: Vec::with_capacity(LONGEST_NEWS) })
    }

    /// The hints that have arrived, empty without events. When it returns early because there are so many, the file
    /// descriptor stays readable.
    ///
    /// # Errors
    /// Those of the socket. Lost events are no error but [`Hint::All`].
    pub fn hints(&mut self) -> io::Result<Vec<Hint>> {
        let mut hints = Vec::new();
        for _ in 0..MOST_NEWS {
            self.buffer.clear();
            match self.socket.recv_from(&mut self.buffer, libc::MSG_TRUNC) {
                Ok((_, from)) if from.port_number() != 0 => {}
                Ok((length, _)) if length > self.buffer.len() => hints.push(Hint::All),
                Ok(_) => match parse(&self.buffer) {
                    Ok(messages) => hints.extend(messages.into_iter().filter_map(hint)),
                    Err(_) => hints.push(Hint::All),
                },
                Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => hints.push(Hint::All),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(e),
            }
        }
        if hints.contains(&Hint::All) {
            return Ok(vec![Hint::All]);
        }
        hints.dedup();
        Ok(hints)
    }
}

fn hint(message: Message) -> Option<Hint> {
    match message {
        Message::Link { link, .. } => Some(Hint::Changed { index: link.index, name: link.name, up: link.up }),
        Message::LinkGone { index } => Some(Hint::Gone { index }),
        Message::Overrun => Some(Hint::All),
        Message::Ack { .. } | Message::Done { .. } | Message::Other => None,
    }
}

impl AsFd for Monitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Monitor {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}
