// SPDX-License-Identifier: Apache-2.0

//! A PF of the host, configured through rtnetlink.

use std::{collections::BTreeMap, io, thread, time::Duration};

use netpolicy::PfCapabilities;

use super::{
    message::{get_link, set_vf},
    socket::{Connection, Failure},
};
use crate::{
    Bdf, InventoryError, Sysfs,
    control::{PfControl, PfError, VfChange, VfSettings},
};

/// The time that an answer may take once the kernel has handled the request.
const PATIENCE: Duration = Duration::from_secs(2);

/// Drivers that reset a VF to configure it (i40e) refuse other changes meanwhile.
const BUSY_RETRIES: u32 = 5;
const BUSY_PAUSE: Duration = Duration::from_millis(100);

/// Access to a PF through the kernel's rtnetlink. Needs CAP_NET_ADMIN in the PF's network namespace.
///
/// The PCI address identifies the PF. Its interface is looked up for every operation, because names and indices
/// change when drivers are loaded again or interfaces renamed.
pub struct NetlinkPf {
    sysfs: Sysfs,
    bdf: Bdf,
    name: String,
    connection: Connection,
}

impl NetlinkPf {
    /// Opens the access to the PF at `bdf`.
    ///
    /// # Errors
    /// The function is no PF, it has no interface, or there is no netlink socket.
    pub fn open(sysfs: &Sysfs, bdf: Bdf) -> Result<Self, PfError> {
        let pf = sysfs.pf(bdf)?;
        let name = pf.name();
        if pf.interface().is_none() {
            return Err(PfError::NoInterface { pf: name });
        }
        let connection =
            Connection::open(PATIENCE).map_err(|source| PfError::Io { pf: name.clone(), source })?;
        Ok(Self { sysfs: sysfs.clone(), bdf, name, connection })
    }

    /// The PF's PCI address.
    pub fn bdf(&self) -> Bdf {
        self.bdf
    }

    fn index(&mut self) -> Result<u32, PfError> {
        let found = self.sysfs.first_interface(self.bdf).map_err(InventoryError::from)?;
        let (name, index) = found.ok_or_else(|| PfError::NoInterface { pf: self.name.clone() })?;
        self.name = name;
        Ok(index)
    }

    fn fail(&self, failure: Failure) -> PfError {
        let pf = self.name.clone();
        match failure {
            Failure::Refused { errno: libc::EPERM | libc::EACCES, .. } => PfError::NotPermitted { pf },
            Failure::Refused { errno: libc::ENODEV, .. } => PfError::NoInterface { pf },
            Failure::Refused { errno, .. } => PfError::Io { pf, source: io::Error::from_raw_os_error(errno) },
            Failure::Timeout => PfError::Timeout { pf },
            Failure::Protocol(what) => PfError::Protocol { pf, what },
            Failure::Io(source) => PfError::Io { pf, source },
        }
    }

    fn refuse(&self, vf: u16, change: VfChange, errno: i32, text: Option<String>) -> PfError {
        let pf = self.name.clone();
        match errno {
            libc::EOPNOTSUPP | libc::EPROTONOSUPPORT => PfError::Unsupported { pf, vf, change },
            libc::EPERM | libc::EACCES | libc::ENODEV => self.fail(Failure::Refused { errno, text }),
            _ => PfError::Refused {
                pf,
                vf,
                change,
                message: text,
                cure: cure(change, errno),
                source: io::Error::from_raw_os_error(errno),
            },
        }
    }
}

/// The user's cure after a driver's refusal.
fn cure(change: VfChange, errno: i32) -> &'static str {
    match (change, errno) {
        (VfChange::TxRate { .. }, libc::EINVAL) => {
            "bring the PF's link up, and choose a rate below the link's that its driver accepts (most have no minimum)"
        }
        (VfChange::Mac(_), libc::EINVAL) => "the address must be unicast, and the VF must exist",
        (_, libc::EBUSY | libc::EAGAIN) => "its driver is busy with the VF; try again",
        (_, libc::EINVAL | libc::ERANGE) => "the value is out of range for its driver, or the VF is gone",
        _ => "see the messages of its driver in the kernel's log",
    }
}

impl PfControl for NetlinkPf {
    fn name(&self) -> &str {
        &self.name
    }

    fn capabilities(&mut self) -> Result<PfCapabilities, PfError> {
        let pf = self.sysfs.pf(self.bdf)?;
        let driver = pf.device.driver.ok_or_else(|| PfError::NoInterface { pf: self.name.clone() })?;
        Ok(PfCapabilities::of(&driver, pf.device.device))
    }

    fn read_all(&mut self) -> Result<BTreeMap<u16, VfSettings>, PfError> {
        let index = self.index()?;
        let link = self
            .connection
            .ask(|sequence| get_link(index, sequence))
            .map_err(|failure| self.fail(failure))?;
        if link.index != index {
            let what = format!("it is about interface {} instead of {index}", link.index);
            return Err(self.fail(Failure::Protocol(what)));
        }
        // A PF without VFs has no list.
        Ok(link.vfs.unwrap_or_default())
    }

    fn set(&mut self, vf: u16, change: VfChange) -> Result<(), PfError> {
        let index = self.index()?;
        let mut attempts = 0;
        loop {
            match self.connection.order(|sequence| set_vf(index, vf, change, sequence)) {
                Ok(()) => return Ok(()),
                Err(Failure::Refused { errno: libc::EAGAIN, .. }) if attempts < BUSY_RETRIES => {
                    attempts += 1;
                    thread::sleep(BUSY_PAUSE);
                }
                Err(Failure::Refused { errno, text }) => return Err(self.refuse(vf, change, errno, text)),
                Err(failure) => return Err(self.fail(failure)),
            }
        }
    }
}
