// SPDX-License-Identifier: Apache-2.0

//! A netlink socket for requests and their answers.

use std::{
    io,
    time::{Duration, Instant},
};

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::message::{Link, Message, parse};

/// Longer than any answer: an attribute has at most 64 KiB, and the list of VFs is by far the largest.
const LONGEST_ANSWER: usize = 256 * 1024;

/// Datagrams of other requests that are skipped before an answer is given up.
const MOST_STRAYS: usize = 64;

/// The reason why a request failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// The kernel's error number and message.
    Refused { errno: i32, text: Option<String> },
    /// No answer before the deadline.
    Timeout,
    /// The answer makes no sense or was lost.
    Protocol(String),
    /// The socket failed.
    Io(io::Error),
}

impl From<io::Error> for Failure {
    fn from(e: io::Error) -> Self {
        // The answer was made, but there was no memory for it. A request can be repeated; after a change, read the
        // state.
        if e.raw_os_error() == Some(libc::ENOBUFS) { Self::Timeout } else { Self::Io(e) }
    }
}

/// A connection to the kernel's rtnetlink, for one request at a time.
pub(super) struct Connection {
    socket: Socket,
    sequence: u32,
    patience: Duration,
    buffer: Vec<u8>,
}

impl Connection {
    pub(super) fn open(patience: Duration) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        // Receive from the kernel only.
        socket.connect(&SocketAddr::new(0, 0))?;
        socket.set_non_blocking(true)?;
        // Messages with the error numbers, without a repetition of the request. Old kernels lack both, which does no
        // harm.
        let _ = socket.set_ext_ack(true);
        let _ = socket.set_cap_ack(true);
        Ok(Self { socket, sequence: 0, patience, buffer: Vec::with_capacity(LONGEST_ANSWER) })
    }

    /// Sends a request that is answered by an acknowledgement.
    pub(super) fn order(&mut self, request: impl FnOnce(u32) -> Vec<u8>) -> Result<(), Failure> {
        self.exchange(request, acknowledged)
    }

    /// Sends a request that is answered by a link.
    pub(super) fn ask(&mut self, request: impl FnOnce(u32) -> Vec<u8>) -> Result<Link, Failure> {
        self.exchange(request, told)
    }

    /// Sends a request and waits for its answer. The kernel handles a request inside of `send`, under its lock for
    /// all network configuration: that wait has no bound, and the deadline covers the answer alone.
    fn exchange<T>(
        &mut self,
        request: impl FnOnce(u32) -> Vec<u8>,
        answer: impl Fn(Message, u32) -> Option<Result<T, Failure>>,
    ) -> Result<T, Failure> {
        // 0 marks events. An answer to a request that was given up has another number and is skipped.
        self.sequence = self.sequence.wrapping_add(1).max(1);
        let expected = self.sequence;
        self.socket.send(&request(expected), 0)?;
        let deadline = Instant::now() + self.patience;
        for _ in 0..MOST_STRAYS {
            if let Some(result) = pick(self.receive(deadline)?, expected, &answer) {
                return result;
            }
        }
        Err(Failure::Protocol(format!("{MOST_STRAYS} messages that belong to no request")))
    }

    fn receive(&mut self, deadline: Instant) -> Result<Vec<Message>, Failure> {
        loop {
            self.buffer.clear();
            // With MSG_TRUNC the result is the datagram's length, even if it does not fit.
            match self.socket.recv(&mut self.buffer, libc::MSG_TRUNC) {
                Ok(length) if length > self.buffer.len() => {
                    return Err(Failure::Protocol(format!("it has {length} bytes, which is too many")));
                }
                Ok(_) => return parse(&self.buffer).map_err(Failure::Protocol),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => wait(&self.socket, deadline)?,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

fn acknowledged(message: Message, expected: u32) -> Option<Result<(), Failure>> {
    match message {
        Message::Ack { sequence, errno: 0, .. } if sequence == expected => Some(Ok(())),
        _ => None,
    }
}

fn told(message: Message, expected: u32) -> Option<Result<Link, Failure>> {
    match message {
        Message::Link { sequence, link } if sequence == expected => Some(Ok(link)),
        Message::Done { sequence } | Message::Ack { sequence, .. } if sequence == expected => {
            Some(Err(Failure::Protocol("it has no content".to_owned())))
        }
        _ => None,
    }
}

/// The result for the request with the number `expected` among the messages; `None` if there is none.
fn pick<T>(
    messages: Vec<Message>,
    expected: u32,
    answer: impl Fn(Message, u32) -> Option<Result<T, Failure>>,
) -> Option<Result<T, Failure>> {
    messages.into_iter().find_map(|message| match message {
        Message::Ack { sequence, errno, text } if sequence == expected && errno != 0 => {
            Some(Err(Failure::Refused { errno, text }))
        }
        Message::Overrun => Some(Err(Failure::Timeout)),
        message => answer(message, expected),
    })
}

fn wait(socket: &Socket, deadline: Instant) -> Result<(), Failure> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(Failure::Timeout);
    }
    let left = Timespec::try_from(left).map_err(|_| Failure::Timeout)?;
    match poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&left)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(e) => Err(Failure::Io(e.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::message::get_link;

    fn ack(sequence: u32, errno: i32) -> Message {
        Message::Ack { sequence, errno, text: None }
    }

    /// An answer to a request that was given up must not be taken for the answer to the next one.
    #[test]
    fn only_the_answer_to_this_request_counts() {
        let check = |messages: Vec<Message>| match pick(messages, 5, acknowledged) {
            None => "nothing".to_owned(),
            Some(Ok(())) => "done".to_owned(),
            Some(Err(e)) => format!("{e:?}"),
        };
        assert_eq!(check(vec![]), "nothing");
        assert_eq!(check(vec![ack(4, 0), ack(6, 0), ack(4, libc::EINVAL), Message::Other]), "nothing");
        assert_eq!(check(vec![ack(4, libc::EINVAL), ack(5, 0)]), "done");
        assert_eq!(check(vec![ack(4, 0), ack(5, libc::EBUSY)]), "Refused { errno: 16, text: None }");
        assert_eq!(check(vec![Message::Overrun]), "Timeout");

        let link = |sequence, index| Message::Link { sequence, link: Link { index, ..Link::default() } };
        let told = |messages| pick(messages, 5, told).and_then(Result::ok).map(|link| link.index);
        assert_eq!(told(vec![link(4, 1), link(0, 2), link(5, 3)]), Some(3));
        assert_eq!(told(vec![link(4, 1), link(0, 2)]), None);
        assert_eq!(told(vec![ack(5, 0), link(5, 3)]), None);
    }

    /// The loopback interface exists everywhere, and reading it needs no privilege.
    #[test]
    fn the_kernel_answers() {
        let mut connection = Connection::open(Duration::from_secs(5)).unwrap();
        let link = connection.ask(|sequence| get_link(1, sequence)).unwrap();
        assert_eq!((link.index, link.name.as_deref(), link.vfs), (1, Some("lo"), None));
        for _ in 0..2 {
            let refused = connection.ask(|sequence| get_link(0x7fff_fff0, sequence)).unwrap_err();
            assert!(matches!(refused, Failure::Refused { errno: libc::ENODEV, .. }), "{refused:?}");
        }
    }

    #[test]
    fn waiting_ends_at_the_deadline() {
        let mut connection = Connection::open(Duration::from_secs(5)).unwrap();
        let started = Instant::now();
        let failure = connection.receive(started + Duration::from_millis(30)).unwrap_err();
        assert!(matches!(failure, Failure::Timeout), "{failure:?}");
        assert!(started.elapsed() >= Duration::from_millis(30));
    }
}
