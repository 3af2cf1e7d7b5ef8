// SPDX-License-Identifier: Apache-2.0

//! The process of a simulated PF: one thread that serves control connections, VFs and the tap.

use std::{
    collections::VecDeque,
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{
        self, AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
        SocketFlags, SocketType,
    },
};

use super::{Frame, Port, SimPfState};
use crate::{
    control::{About, Answer, MAX_MESSAGE, Request, VERSION},
    wire::{self, MAX_PACKET, Packet},
};

/// The most connections of agents at a time: one, another while it restarts, and tools of users.
const MAX_AGENTS: usize = 8;
const BACKLOG: i32 = 8;
/// Packets taken from one VF or the tap before the others get their turn.
const BATCH: usize = 32;
/// The most packets other than frames that wait for a VF to read: one answer to a message, and link events.
const MAX_WAITING: usize = 8;

/// The parts of a simulated PF.
#[derive(Debug)]
pub struct Options {
    /// The PF's name.
    pub name: String,
    /// Its VFs, [`MAX_VFS`](crate::MAX_VFS) at most.
    pub vfs: u16,
    /// The socket for agents: see [`listen`]. A process that can connect there controls the PF.
    pub listener: OwnedFd,
    /// A tap device as uplink: see [`open_tap`](super::open_tap).
    pub tap: Option<OwnedFd>,
    /// Ends the process after this time without an agent or a VF. None: only an agent ends it.
    pub linger: Option<Duration>,
}

/// Makes a control socket at `path`, which must not exist. Only the agent may have access to its directory.
///
/// # Errors
/// Those of `socket`, `bind` and `listen`.
pub fn listen(path: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Runs the PF until an agent stops it (or see [`Options::linger`]).
///
/// # Errors
/// `poll` or the listening socket fails. A VF can cause neither.
pub fn serve(options: Options) -> io::Result<()> {
    rustix::io::ioctl_fionbio(&options.listener, true)?;
    if let Some(tap) = &options.tap {
        rustix::io::ioctl_fionbio(tap, true)?;
    }
    let state = SimPfState::new(options.vfs);
    let links = (0..state.vf_count()).map(|_| None).collect();
    let mut process = Process {
        state,
        links: Links { vfs: links, tap: options.tap, buffer: Vec::new() },
        agents: Vec::new(),
        listener: options.listener,
        name: options.name,
        linger: options.linger,
        idle_since: Instant::now(),
        start: Instant::now(),
        stopped: false,
    };
    while !process.stopped {
        process.turn()?;
    }
    Ok(())
}

struct Process {
    state: SimPfState,
    links: Links,
    agents: Vec<OwnedFd>,
    listener: OwnedFd,
    name: String,
    linger: Option<Duration>,
    idle_since: Instant,
    start: Instant,
    stopped: bool,
}

/// The outputs.
struct Links {
    vfs: Vec<Option<VfLink>>,
    tap: Option<OwnedFd>,
    buffer: Vec<u8>,
}

/// A VF's connection. While a packet other than a frame waits, the VF's packets are not read.
struct VfLink {
    socket: OwnedFd,
    waiting: VecDeque<Vec<u8>>,
}

/// A source of input.
#[derive(Clone, Copy)]
enum Source {
    Listener,
    Tap,
    Agent(usize),
    Vf(usize),
}

impl Process {
    fn turn(&mut self) -> io::Result<()> {
        let (sources, ready) = {
            let (sources, mut fds) = self.sources();
            let timeout = self.timeout();
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            let ready: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
            (sources, ready)
        };
        let mut ended = Vec::new();
        for (source, ready) in sources.into_iter().zip(ready) {
            if ready.is_empty() {
                continue;
            }
            match source {
                Source::Listener => self.accept()?,
                Source::Tap => self.read_tap(),
                Source::Agent(index) => {
                    if !self.agent(index) {
                        ended.push(index);
                    }
                }
                Source::Vf(index) => self.read_vf(index),
            }
        }
        for index in ended.into_iter().rev() {
            self.agents.remove(index);
        }
        let idle = self.agents.is_empty() && self.links.vfs.iter().all(Option::is_none);
        if !idle {
            self.idle_since = Instant::now();
        } else if self.linger.is_some_and(|linger| self.idle_since.elapsed() >= linger) {
            tracing::info!(pf = self.name, "Simulated PF ends: it has neither an agent nor a VF");
            self.stopped = true;
        }
        Ok(())
    }

    fn sources(&self) -> (Vec<Source>, Vec<PollFd<'_>>) {
        let mut all: Vec<(Source, BorrowedFd<'_>, PollFlags)> = Vec::new();
        all.push((Source::Listener, self.listener.as_fd(), PollFlags::IN));
        all.extend(self.links.tap.as_ref().map(|tap| (Source::Tap, tap.as_fd(), PollFlags::IN)));
        for (index, agent) in self.agents.iter().enumerate() {
            all.push((Source::Agent(index), agent.as_fd(), PollFlags::IN));
        }
        for (index, link) in self.links.vfs.iter().enumerate() {
            if let Some(link) = link {
                let wanted = if link.waiting.is_empty() { PollFlags::IN } else { PollFlags::OUT };
                all.push((Source::Vf(index), link.socket.as_fd(), wanted));
            }
        }
        all.into_iter().map(|(source, fd, wanted)| (source, PollFd::from_borrowed_fd(fd, wanted))).unzip()
    }

    fn timeout(&self) -> Option<Timespec> {
        let left = self.linger?.saturating_sub(self.idle_since.elapsed());
        // Never zero: the deadline itself must have passed.
        Timespec::try_from(left + Duration::from_millis(1)).ok()
    }

    fn accept(&mut self) -> io::Result<()> {
        match net::accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(agent) if self.agents.len() < MAX_AGENTS => self.agents.push(agent),
            // Drop the newest connection: the agent's own are older.
            Ok(_) => tracing::warn!(pf = self.name, "Too many control connections"),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED | Errno::MFILE | Errno::NFILE) => {}
            Err(errno) => return Err(errno.into()),
        }
        Ok(())
    }

    /// Answers an agent; returns false when its connection has ended.
    fn agent(&mut self, index: usize) -> bool {
        let Some(agent) = self.agents.get(index) else { return false };
        let mut bytes = vec![0; MAX_MESSAGE];
        let len = match net::recv(agent, bytes.as_mut_slice(), RecvFlags::empty()) {
            Ok((_, 0)) => return false,
            Ok((_, len)) => len.min(MAX_MESSAGE),
            Err(Errno::AGAIN | Errno::INTR) => return true,
            Err(_) => return false,
        };
        let Ok(request) = serde_json::from_slice(bytes.get(..len).unwrap_or_default()) else { return false };
        let (answer, connection) = self.answer(request);
        let Ok(bytes) = serde_json::to_vec(&answer) else { return false };
        let Some(agent) = self.agents.get(index) else { return false };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let rights = [connection.as_ref().map_or(agent.as_fd(), AsFd::as_fd)];
        if connection.is_some() && !control.push(SendAncillaryMessage::ScmRights(&rights)) {
            return false;
        }
        // One request, one answer: the socket has room for it, unless the agent does not read.
        net::sendmsg(agent, &[io::IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL).is_ok()
    }

    fn answer(&mut self, request: Request) -> (Answer, Option<OwnedFd>) {
        let done = |result: Result<(), i32>| match result {
            Ok(()) => Answer::Done,
            Err(errno) => Answer::Refused { errno },
        };
        let answer = match request {
            // The caller compares the versions.
            Request::Hello { .. } => {
                let about = About {
                    name: self.name.clone(),
                    vfs: self.state.vf_count(),
                    uplink: self.links.tap.is_some(),
                    link_up: self.state.link_up(),
                    pid: std::process::id(),
                    attached: (0..)
                        .zip(&self.links.vfs)
                        .filter_map(|(vf, link)| link.as_ref().map(|_| vf))
                        .collect(),
                };
                Answer::Hello { version: VERSION, about }
            }
            Request::Read => Answer::Settings(self.state.settings()),
            Request::Counters => Answer::Counters(self.state.counters()),
            Request::Set { vf, change } => done(self.state.set(vf, change)),
            Request::Attach { vf } => match self.attach(vf) {
                Ok(connection) => return (Answer::Done, Some(connection)),
                Err(errno) => Answer::Refused { errno },
            },
            Request::Detach { vf } => done(self.detach(vf)),
            Request::SetLink { up } => {
                self.set_link(up);
                Answer::Done
            }
            Request::Stop => {
                self.stopped = true;
                Answer::Done
            }
        };
        (answer, None)
    }

    fn attach(&mut self, vf: u16) -> Result<OwnedFd, i32> {
        self.detach(vf)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) = net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .map_err(Errno::raw_os_error)?;
        let place = self.links.vfs.get_mut(usize::from(vf)).ok_or(libc::ENODEV)?;
        *place = Some(VfLink { socket: ours, waiting: VecDeque::new() });
        let up = self.state.link_up();
        self.links.post(usize::from(vf), &Packet::Link { up });
        Ok(theirs)
    }

    fn detach(&mut self, vf: u16) -> Result<(), i32> {
        let place = self.links.vfs.get_mut(usize::from(vf)).ok_or(libc::ENODEV)?;
        if place.take().is_some() {
            self.state.vf_reset(vf, self.start.elapsed());
        }
        Ok(())
    }

    fn set_link(&mut self, up: bool) {
        if self.state.link_up() == up {
            return;
        }
        self.state.set_link(up);
        for vf in 0..self.state.vf_count() {
            self.links.post(usize::from(vf), &Packet::Link { up });
            if let Some(words) = self.state.ping(vf) {
                self.links.post(usize::from(vf), &Packet::Post { seq: 0, words });
            }
        }
    }

    fn read_tap(&mut self) {
        let mut bytes = vec![0; MAX_PACKET];
        for _ in 0..BATCH {
            let Some(tap) = &self.links.tap else { return };
            match rustix::io::read(tap, bytes.as_mut_slice()) {
                Err(Errno::AGAIN | Errno::INTR) => return,
                Ok(len) if len > 0 => {
                    let frame = bytes.get(..len).unwrap_or_default();
                    let mut lost = Vec::new();
                    let links = &mut self.links;
                    self.state.receive(frame, &mut |port, frame| {
                        lost.extend(links.deliver(port, frame, false));
                    });
                    lost.into_iter().for_each(|vf| self.state.lost(vf));
                }
                // EBADFD after the interface was deleted.
                result => {
                    tracing::warn!(pf = self.name, ?result, "The tap device of a simulated PF is gone");
                    self.links.tap = None;
                }
            }
        }
    }

    fn read_vf(&mut self, index: usize) {
        if !self.links.flush(index) {
            return self.end(index);
        }
        let mut bytes = [0; MAX_PACKET + 1];
        for _ in 0..BATCH {
            let Some(link) = self.links.vfs.get(index).and_then(Option::as_ref) else { return };
            if !link.waiting.is_empty() {
                return;
            }
            let len = match net::recv(&link.socket, bytes.as_mut_slice(), RecvFlags::empty()) {
                Ok((_, 0)) => return self.end(index),
                Ok((_, len)) => len,
                Err(Errno::AGAIN | Errno::INTR) => return,
                Err(_) => return self.end(index),
            };
            // A malformed packet comes from a vmm that its guest has taken over: drop it.
            if let Some(packet) = wire::decode(bytes.get(..len).unwrap_or_default()) {
                self.packet(index, &packet);
            }
        }
    }

    fn packet(&mut self, index: usize, packet: &Packet<'_>) {
        let Ok(vf) = u16::try_from(index) else { return };
        let now = self.start.elapsed();
        match packet {
            Packet::Reset => self.state.vf_reset(vf, now),
            Packet::Message { seq, words } => {
                let packet = match self.state.message(vf, words, now) {
                    Some(words) => Packet::Post { seq: *seq, words },
                    None => Packet::Taken { seq: *seq },
                };
                self.links.post(index, &packet);
            }
            Packet::Frame { frame, .. } => {
                let links = &mut self.links;
                let mut lost = Vec::new();
                self.state.transmit(vf, *frame, now, &mut |port, frame| {
                    lost.extend(links.deliver(port, frame, true));
                });
                lost.into_iter().for_each(|vf| self.state.lost(vf));
            }
            // Only the PF sends these.
            Packet::Taken { .. } | Packet::Post { .. } | Packet::Link { .. } => {}
        }
    }

    /// Notes that the VF's vmm has ended.
    fn end(&mut self, index: usize) {
        if let Ok(vf) = u16::try_from(index) {
            // The VF exists, because it had a connection.
            let _ = self.detach(vf);
        }
    }
}

impl Links {
    /// Hands a frame over. Returns the VF that did not take it.
    fn deliver(&mut self, port: Port, frame: Frame<'_>, looped: bool) -> Option<u16> {
        match port {
            Port::Uplink => {
                if let Some(tap) = &self.tap {
                    // A wire loses frames: EIO while the interface is down, EAGAIN when its queue is full.
                    let _ = rustix::io::write(tap, frame.bytes);
                }
                None
            }
            Port::Vf(vf) => {
                let link = self.vfs.get(usize::from(vf)).and_then(Option::as_ref);
                let Some(link) = link.filter(|link| link.waiting.is_empty()) else { return Some(vf) };
                Packet::Frame { frame, looped }.encode(&mut self.buffer);
                let sent = net::send(&link.socket, &self.buffer, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
                sent.is_err().then_some(vf)
            }
        }
    }

    /// Sends a packet that must not be lost, as soon as the VF reads.
    fn post(&mut self, index: usize, packet: &Packet<'_>) {
        if let Some(link) = self.vfs.get_mut(index).and_then(Option::as_mut) {
            // A VF that does not read gets no more answers, so packets beyond the limit are link events: drop
            // them.
            if link.waiting.len() < MAX_WAITING {
                let mut bytes = Vec::new();
                packet.encode(&mut bytes);
                link.waiting.push_back(bytes);
            }
        }
        // An error appears at the next read of the socket.
        self.flush(index);
    }

    /// Sends the waiting packets; returns false when the connection has ended.
    fn flush(&mut self, index: usize) -> bool {
        let Some(link) = self.vfs.get_mut(index).and_then(Option::as_mut) else { return true };
        while let Some(bytes) = link.waiting.front() {
            match net::send(&link.socket, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(_) => drop(link.waiting.pop_front()),
                Err(Errno::AGAIN | Errno::INTR | Errno::NOBUFS) => return true,
                Err(_) => return false,
            }
        }
        true
    }
}
