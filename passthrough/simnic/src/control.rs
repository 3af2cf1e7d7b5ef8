// SPDX-License-Identifier: Apache-2.0

//! The agent's connection to the control socket of a simulated PF.

use std::{
    collections::BTreeMap,
    io,
    mem::MaybeUninit,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use netpolicy::PfCapabilities;
use rustix::{
    io::Errno,
    net::{
        self, AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketAddrUnix,
        SocketFlags, SocketType,
        sockopt::{Timeout, set_socket_timeout},
    },
};
use serde::{Deserialize, Serialize};
use sriov::{PfControl, PfError, VfChange, VfSettings};

/// Version of the requests and answers below.
pub(super) const VERSION: u32 = 1;
/// Longest request or answer in bytes.
pub(super) const MAX_MESSAGE: usize = 64 * 1024;
/// The time that the process has to answer. It never waits itself.
const PATIENCE: Duration = Duration::from_secs(2);

/// A request of the agent to the process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Request {
    Hello { version: u32 },
    Read,
    Set { vf: u16, change: VfChange },
    Counters,
    Attach { vf: u16 },
    Detach { vf: u16 },
    SetLink { up: bool },
    Stop,
}

/// The process's answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Answer {
    Hello {
        version: u32,
        about: About,
    },
    Settings(BTreeMap<u16, VfSettings>),
    Counters(BTreeMap<u16, VfCounters>),
    /// Success. For [`Request::Attach`], the VF's connection comes with it.
    Done,
    /// An error number.
    Refused {
        errno: i32,
    },
}

/// Events of one VF since the PF's start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VfCounters {
    /// Mailbox messages taken.
    pub messages: u64,
    /// Messages answered with a NACK.
    pub refused: u64,
    /// Resets (VTCTRL.RST and function level).
    pub resets: u64,
    /// Frames from the VF that the adapter forwarded.
    pub sent: u64,
    /// Dropped frames from the VF: the source address or VLAN was not its own.
    pub spoofed: u64,
    /// Frames from the VF dropped for another reason: not enabled, above its rate, malformed.
    pub not_sent: u64,
    /// Frames delivered to the VF.
    pub received: u64,
    /// Frames for the VF dropped because it did not read them.
    pub lost: u64,
}

/// The description of a simulated PF.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// Its name.
    pub name: String,
    /// The number of its VFs.
    pub vfs: u16,
    /// Whether a tap device is its uplink.
    pub uplink: bool,
    /// Whether its link is up.
    pub link_up: bool,
    /// Its process id.
    pub pid: u32,
    /// The VFs that a process is connected to. Processes up to version 0.2 do not list them.
    #[serde(default)]
    pub attached: Vec<u16>,
}

/// A connection to a simulated PF. Several connections to the same PF are possible.
#[derive(Debug)]
pub struct SimPf {
    socket: OwnedFd,
    path: PathBuf,
    about: About,
}

impl SimPf {
    /// Connects to the process that listens at `path`.
    ///
    /// # Errors
    /// [`PfError::Io`] (`NotFound`, `ConnectionRefused`: no such process), [`PfError::Protocol`] for a process of
    /// another version.
    pub fn connect(path: &Path) -> Result<Self, PfError> {
        let name = path.display().to_string();
        let failed = |source: io::Error| PfError::Io { pf: name.clone(), source };
        let socket = connect(path).map_err(failed)?;
        let nobody =
            About { name: name.clone(), vfs: 0, uplink: false, link_up: false, pid: 0, attached: Vec::new() };
        let mut pf = Self { socket, path: path.to_owned(), about: nobody };
        match pf.call(&Request::Hello { version: VERSION })? {
            (Answer::Hello { version: VERSION, about }, _) => pf.about = about,
            _ => {
                let what = format!(
                    "it is a process of another version (this is {VERSION}); stop its VMs, and the agent \
                     starts it again"
                );
                return Err(PfError::Protocol { pf: name, what });
            }
        }
        Ok(pf)
    }

    /// The description at the time of the connection.
    #[must_use]
    pub fn about(&self) -> &About {
        &self.about
    }

    /// The path of its control socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes a new connection of VF `vf`, for [`SimVf::new`](super::SimVf::new). An earlier one is closed: the VF of
    /// its holder fails.
    ///
    /// # Errors
    /// [`PfError::NoVf`], or the process does not answer.
    pub fn attach(&mut self, vf: u16) -> Result<OwnedFd, PfError> {
        match self.call(&Request::Attach { vf })? {
            (Answer::Done, Some(connection)) => Ok(connection),
            (Answer::Refused { .. }, _) => Err(PfError::NoVf { pf: self.about.name.clone(), vf }),
            _ => Err(self.nonsense()),
        }
    }

    /// Closes the connection of a VF, if it has one: its adapter fails. The VF is reset. As on hardware, the
    /// administrator's settings and the VF's further addresses stay.
    ///
    /// # Errors
    /// [`PfError::NoVf`], or the process does not answer.
    pub fn detach(&mut self, vf: u16) -> Result<(), PfError> {
        let answer = self.call(&Request::Detach { vf })?.0;
        self.done(answer, || PfError::NoVf { pf: String::new(), vf })
    }

    /// Counters of all VFs.
    ///
    /// # Errors
    /// The process does not answer.
    pub fn counters(&mut self) -> Result<BTreeMap<u16, VfCounters>, PfError> {
        match self.call(&Request::Counters)?.0 {
            Answer::Counters(counters) => Ok(counters),
            _ => Err(self.nonsense()),
        }
    }

    /// Connects or disconnects the cable of the PF.
    ///
    /// # Errors
    /// The process does not answer.
    pub fn set_link(&mut self, up: bool) -> Result<(), PfError> {
        let answer = self.call(&Request::SetLink { up })?.0;
        self.about.link_up = up;
        self.done(answer, || PfError::NoInterface { pf: String::new() })
    }

    /// Ends the process; all of its VFs fail.
    ///
    /// # Errors
    /// The process does not answer.
    pub fn stop(&mut self) -> Result<(), PfError> {
        let answer = self.call(&Request::Stop)?.0;
        self.done(answer, || PfError::NoInterface { pf: String::new() })
    }

    fn done(&self, answer: Answer, refused: impl FnOnce() -> PfError) -> Result<(), PfError> {
        match (answer, refused()) {
            (Answer::Done, _) => Ok(()),
            (Answer::Refused { .. }, PfError::NoVf { vf, .. }) => {
                Err(PfError::NoVf { pf: self.about.name.clone(), vf })
            }
            _ => Err(self.nonsense()),
        }
    }

    fn nonsense(&self) -> PfError {
        let what = "it sent a response to another request".to_owned();
        PfError::Protocol { pf: self.about.name.clone(), what }
    }

    fn call(&self, request: &Request) -> Result<(Answer, Option<OwnedFd>), PfError> {
        let pf = || self.about.name.clone();
        let io = |errno: Errno| match errno {
            Errno::AGAIN => PfError::Timeout { pf: pf() },
            errno => PfError::Io { pf: pf(), source: errno.into() },
        };
        let protocol = |what: String| PfError::Protocol { pf: pf(), what };
        let bytes = serde_json::to_vec(request).map_err(|error| protocol(error.to_string()))?;
        net::send(&self.socket, &bytes, SendFlags::NOSIGNAL).map_err(io)?;
        let mut bytes = vec![0; MAX_MESSAGE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        // Only the answer to `Attach` has a descriptor. Closing any other one could block this thread.
        let mut control = match request {
            Request::Attach { .. } => RecvAncillaryBuffer::new(&mut space),
            _ => RecvAncillaryBuffer::default(),
        };
        let got = net::recvmsg(
            &self.socket,
            &mut [io::IoSliceMut::new(&mut bytes)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )
        .map_err(io)?;
        let mut connection = None;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(mut rights) = message {
                connection = rights.next().or(connection);
            }
        }
        if got.bytes == 0 {
            return Err(io(Errno::CONNRESET));
        }
        if got.flags.contains(net::ReturnFlags::CTRUNC) {
            return Err(protocol("it sent unrequested descriptors".to_owned()));
        }
        let answer = serde_json::from_slice(bytes.get(..got.bytes).unwrap_or_default());
        Ok((answer.map_err(|error| protocol(error.to_string()))?, connection))
    }
}

fn connect(path: &Path) -> io::Result<OwnedFd> {
    let socket = net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE))?;
    set_socket_timeout(&socket, Timeout::Send, Some(PATIENCE))?;
    net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

impl PfControl for SimPf {
    fn name(&self) -> &str {
        &self.about.name
    }

    fn capabilities(&mut self) -> Result<PfCapabilities, PfError> {
        Ok(PfCapabilities::simulated())
    }

    fn read_all(&mut self) -> Result<BTreeMap<u16, VfSettings>, PfError> {
        match self.call(&Request::Read)?.0 {
            Answer::Settings(settings) => Ok(settings),
            _ => Err(self.nonsense()),
        }
    }

    fn set(&mut self, vf: u16, change: VfChange) -> Result<(), PfError> {
        let pf = self.about.name.clone();
        let errno = match self.call(&Request::Set { vf, change })?.0 {
            Answer::Done => return Ok(()),
            Answer::Refused { errno } => errno,
            _ => return Err(self.nonsense()),
        };
        Err(match errno {
            libc::ENODEV => PfError::NoVf { pf, vf },
            libc::EOPNOTSUPP | libc::EPROTONOSUPPORT => PfError::Unsupported { pf, vf, change },
            errno => PfError::Refused {
                pf,
                vf,
                change,
                message: None,
                cure: "the value is out of range for an 82576, or its link is down",
                source: io::Error::from_raw_os_error(errno),
            },
        })
    }
}
