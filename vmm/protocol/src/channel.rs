// SPDX-License-Identifier: Apache-2.0

//! Bounded, typed packets with file descriptors over a `SOCK_SEQPACKET` Unix socket.

use std::{
    cell::RefCell,
    fmt,
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    path::Path,
};

use rustix::{
    io::Errno,
    net::{
        self, AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
    },
};
use serde::{Serialize, de::DeserializeOwned};

use super::files;

/// The longest packet in bytes. The kernel's default socket buffer holds several.
pub const FRAME_MAX: usize = 64 * 1024;

/// The most file descriptors beside one packet: the files of every machine, its initramfs, a connection for each function
/// of a VM, all of which may be simulated, its disks, their overlays and backing files, the disk for cloud-init, and the
/// queues of NICs with their locks. A new file of a device adds to it.
pub const FDS_MAX: usize = files::OF_EVERY_MACHINE.len() + 16 + 16 + 16 + 16 + 32 + 1 + 8 * 5;

thread_local! {
    /// The receive buffer. It is reused: a new one for each packet would be zeroed each time, on a path where a guest
    /// waits.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// The longest queue of connections that are not yet accepted.
const BACKLOG: i32 = 4;

/// Errors of a control channel. All but [`ChannelError::WouldBlock`] end the connection.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The non-blocking socket has nothing to read, or no room to write. Try again once it is ready.
    #[error("The control socket is not ready")]
    WouldBlock,
    /// The peer closed the connection.
    #[error("The peer closed the control connection")]
    Closed,
    /// The peer sent more than [`FRAME_MAX`] bytes or [`FDS_MAX`] descriptors.
    #[error("The peer sent an oversized control message")]
    Oversized,
    /// The peer sent descriptors to a side that accepts none. The kernel has closed them.
    #[error("The peer sent file descriptors, which only the agent may send")]
    Descriptors,
    /// The peer sent a packet that is no message of the protocol.
    #[error("The peer sent a malformed control message")]
    Malformed(#[source] serde_json::Error),
    /// Our own message does not fit: a bug, or a specification out of bounds.
    #[error(
        "A control message of {0} is too long: at most {FRAME_MAX} bytes with {FDS_MAX} files are possible"
    )]
    TooLong(MessageSize),
    /// The socket failed.
    #[error("The control socket failed")]
    Socket(#[from] io::Error),
}

/// The size of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MessageSize {
    /// Its length in bytes.
    pub bytes: usize,
    /// Files beside it.
    pub files: usize,
}

impl fmt::Display for MessageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes with {} files", self.bytes, self.files)
    }
}

impl From<Errno> for ChannelError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::AGAIN => Self::WouldBlock,
            Errno::PIPE | Errno::CONNRESET => Self::Closed,
            other => Self::Socket(other.into()),
        }
    }
}

/// The listening end. The agent binds it and the vmm keeps it.
#[derive(Debug)]
pub struct Listener(OwnedFd);

impl Listener {
    /// Binds a listening socket at `path`, which must not exist. Close-on-exec, non-blocking.
    ///
    /// # Errors
    /// Those of `socket`, `bind` and `listen`.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let fd = socket()?;
        net::bind(&fd, &SocketAddrUnix::new(path)?)?;
        net::listen(&fd, BACKLOG)?;
        Ok(Self(fd))
    }

    /// Takes over a listening socket that this process inherited.
    #[must_use]
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Accepts the next connection.
    ///
    /// # Errors
    /// [`ChannelError::WouldBlock`] if there is none.
    pub fn accept(&self) -> Result<Channel, ChannelError> {
        let fd = net::accept_with(&self.0, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
        Ok(Channel(fd))
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// One connection. Non-blocking: callers wait for readiness with their own event loop.
#[derive(Debug)]
pub struct Channel(OwnedFd);

impl Channel {
    /// Connects to the vmm that listens at `path`.
    ///
    /// # Errors
    /// Those of `socket` and `connect`; `ConnectionRefused` when no process holds the listener any more.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let fd = socket()?;
        net::connect(&fd, &SocketAddrUnix::new(path)?)?;
        Ok(Self(fd))
    }

    /// The peer's process, user and group id at the time of `connect` (or of `listen`, on the connecting side).
    ///
    /// # Errors
    /// Those of `getsockopt(SO_PEERCRED)`.
    pub fn peer(&self) -> io::Result<rustix::net::UCred> {
        Ok(net::sockopt::socket_peercred(&self.0)?)
    }

    /// Sends one message with descriptors beside it.
    ///
    /// # Errors
    /// [`ChannelError::TooLong`] and [`ChannelError::WouldBlock`] send nothing and leave the connection usable.
    pub fn send<M: Serialize>(&self, message: &M, fds: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        let bytes = serde_json::to_vec(message).map_err(ChannelError::Malformed)?;
        let size = MessageSize { bytes: bytes.len(), files: fds.len() };
        if size.bytes > FRAME_MAX || size.files > FDS_MAX {
            return Err(ChannelError::TooLong(size));
        }
        if fds.is_empty() {
            // The filter of a vmm has no `sendmsg`, so that a compromised vmm cannot pass descriptors.
            net::send(&self.0, &bytes, SendFlags::NOSIGNAL)?;
            return Ok(());
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(ChannelError::TooLong(size));
        }
        net::sendmsg(&self.0, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Receives one message and the descriptors beside it (close-on-exec).
    ///
    /// # Errors
    /// Drop the connection after every error but [`ChannelError::WouldBlock`].
    pub fn receive<M: DeserializeOwned>(&self) -> Result<(M, Vec<OwnedFd>), ChannelError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let (message, _, control_truncated) = self.receive_with(&mut control)?;
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if control_truncated { Err(ChannelError::Oversized) } else { Ok((message, fds)) }
    }

    /// Receives one message from a peer that must not send descriptors, with the message's length in bytes.
    ///
    /// The last close of a VFIO device, of its container or of a KVM VM takes from milliseconds to a minute, on the
    /// closing thread. This call gives the kernel no buffer for descriptors, so the kernel installs none in this
    /// process.
    ///
    /// # Errors
    /// Drop the connection after every error but [`ChannelError::WouldBlock`].
    pub fn receive_alone<M: DeserializeOwned>(&self) -> Result<(M, usize), ChannelError> {
        match self.receive_with(&mut RecvAncillaryBuffer::default())? {
            (_, _, true) => Err(ChannelError::Descriptors),
            (message, length, false) => Ok((message, length)),
        }
    }

    /// Receives a message. Returns its length, and whether the kernel dropped descriptors that did not fit `control`.
    fn receive_with<M: DeserializeOwned>(
        &self,
        control: &mut RecvAncillaryBuffer<'_>,
    ) -> Result<(M, usize, bool), ChannelError> {
        BUFFER.with_borrow_mut(|bytes| {
            bytes.resize(FRAME_MAX, 0);
            let mut receive =
                || net::recvmsg(&self.0, &mut [IoSliceMut::new(bytes)], control, RecvFlags::CMSG_CLOEXEC);
            // If the peer has left messages unread, the kernel reports its end first, once, and then delivers its last
            // messages (net/unix/af_unix.c, unix_release_sock).
            let got = match receive() {
                Err(Errno::CONNRESET) => receive(),
                got => got,
            }?;
            if got.flags.contains(net::ReturnFlags::TRUNC) {
                return Err(ChannelError::Oversized);
            }
            if got.bytes == 0 {
                return Err(ChannelError::Closed);
            }
            let message = serde_json::from_slice(bytes.get(..got.bytes).unwrap_or_default())
                .map_err(ChannelError::Malformed)?;
            Ok((message, got.bytes, got.flags.contains(net::ReturnFlags::CTRUNC)))
        })
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

fn socket() -> io::Result<OwnedFd> {
    Ok(net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::message::{ToVmm, VmmCommand};

    fn pair() -> (tempfile::TempDir, Channel, Channel) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let listener = Listener::bind(&path).unwrap();
        let near = Channel::connect(&path).unwrap();
        let far = listener.accept().unwrap();
        (dir, near, far)
    }

    #[test]
    fn message_and_descriptors_arrive_together() {
        let (_dir, near, far) = pair();
        let sent = ToVmm::Command { id: 7, command: VmmCommand::Pause };
        let file = File::open("/dev/null").unwrap();
        near.send(&sent, &[file.as_fd(), file.as_fd()]).unwrap();
        let (got, fds) = far.receive::<ToVmm>().unwrap();
        assert_eq!(got, sent);
        assert_eq!(fds.len(), 2);
        assert!(matches!(far.receive::<ToVmm>(), Err(ChannelError::WouldBlock)));
    }

    #[test]
    fn descriptors_to_a_side_that_takes_none_are_closed_and_an_error() {
        let (_dir, near, far) = pair();
        let (read, write) = rustix::pipe::pipe().unwrap();
        near.send(&ToVmm::Noted { upto: 1 }, &[write.as_fd()]).unwrap();
        drop(write);
        assert!(matches!(far.receive_alone::<ToVmm>(), Err(ChannelError::Descriptors)));
        // The other end of the pipe is closed: neither the queue nor this process has a copy of it.
        assert_eq!(rustix::io::read(&read, &mut [0; 1]).unwrap(), 0);
        let message = ToVmm::Noted { upto: 2 };
        near.send(&message, &[]).unwrap();
        let length = serde_json::to_vec(&message).unwrap().len();
        assert_eq!(far.receive_alone().unwrap(), (message, length));
    }

    #[test]
    fn a_closed_peer_is_seen() {
        let (_dir, near, far) = pair();
        drop(near);
        assert!(matches!(far.receive::<ToVmm>(), Err(ChannelError::Closed)));
    }

    #[test]
    fn the_last_messages_of_a_peer_that_left_ours_unread_arrive() {
        let (_dir, near, far) = pair();
        near.send(&ToVmm::Noted { upto: 1 }, &[]).unwrap();
        far.send(&ToVmm::Noted { upto: 2 }, &[]).unwrap();
        drop(far);
        assert!(matches!(near.receive_alone(), Ok((ToVmm::Noted { upto: 2 }, _))));
        assert!(matches!(near.receive_alone::<ToVmm>(), Err(ChannelError::Closed)));
    }

    #[test]
    fn oversized_and_malformed_packets_are_refused() {
        let (_dir, near, far) = pair();
        let long = "x".repeat(FRAME_MAX);
        assert!(matches!(near.send(&long, &[]), Err(ChannelError::TooLong(_))));
        let file = File::open("/dev/null").unwrap();
        let error = near.send(&ToVmm::Noted { upto: 1 }, &[file.as_fd(); FDS_MAX + 1]).unwrap_err();
        assert!(error.to_string().contains(&format!("with {} files is too long", FDS_MAX + 1)), "{error}");
        net::send(&near.0, &vec![b'x'; FRAME_MAX + 1], SendFlags::NOSIGNAL).unwrap();
        assert!(matches!(far.receive::<ToVmm>(), Err(ChannelError::Oversized)));
        near.send(&"nonsense", &[]).unwrap();
        assert!(matches!(far.receive::<ToVmm>(), Err(ChannelError::Malformed(_))));
    }

    #[test]
    fn the_peer_is_known() {
        let (_dir, near, far) = pair();
        assert_eq!(far.peer().unwrap().pid, rustix::process::getpid());
        assert_eq!(near.peer().unwrap().uid, rustix::process::getuid());
    }
}
