// SPDX-License-Identifier: Apache-2.0

//! Changing the number of a PF's VFs.

use thiserror::Error;

use super::{Bdf, InventoryError, Sysfs, sysfs::SysfsError};

/// The reason why the number of VFs cannot be changed.
#[derive(Debug, Error)]
pub enum VfCountError {
    /// The number exceeds the adapter's.
    #[error("{pf} can have at most {total} VFs, not {count}")]
    TooMany {
        /// The PF.
        pf: Bdf,
        /// The requested number.
        count: u16,
        /// The most VFs that it can have.
        total: u16,
    },
    /// The kernel changes the number only from or to zero.
    #[error(
        "{pf} has {current} VFs and the kernel changes their number only from or to 0: set it to 0 first"
    )]
    NotZero {
        /// The PF.
        pf: Bdf,
        /// The current number.
        current: u16,
    },
    /// The PF has no driver.
    #[error(
        "{0} has no driver, which would create the VFs: load the adapter's driver (for example `modprobe igb`)"
    )]
    NoDriver(Bdf),
    /// The PF's driver cannot make VFs.
    #[error(
        "The driver {driver} of {pf} does not support SR-IOV or has it disabled: use the adapter's own driver"
    )]
    Unsupported {
        /// The PF.
        pf: Bdf,
        /// Its driver.
        driver: String,
    },
    /// Another program uses the VFs, or is changing their number.
    #[error("The driver of {0} is busy: end all use of its VFs and try again")]
    Busy(Bdf),
    /// The kernel accepted the number but made another one.
    #[error(
        "{pf} has {current} VFs instead of the requested {count}: see the messages of its driver in the \
         kernel's log"
    )]
    NotTaken {
        /// The PF.
        pf: Bdf,
        /// The requested number.
        count: u16,
        /// The current number.
        current: u16,
    },
    /// The PF does not exist or is no PF.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
    /// sysfs cannot be read, or the kernel refuses for another reason.
    #[error(transparent)]
    Sysfs(#[from] SysfsError),
}

impl Sysfs {
    /// Gives the PF `count` VFs. Does nothing if it has that many. `autoprobe` sets whether drivers of the host bind
    /// the new VFs automatically (`None` leaves that unchanged). The kernel keeps this setting per PF.
    ///
    /// Removing VFs takes them away from their users: check first.
    ///
    /// # Errors
    /// See [`VfCountError`]. The state is then unchanged, except for `autoprobe` and [`VfCountError::NotTaken`].
    pub fn set_num_vfs(&self, bdf: Bdf, count: u16, autoprobe: Option<bool>) -> Result<(), VfCountError> {
        let pf = self.pf(bdf)?;
        if count > pf.total_vfs {
            return Err(VfCountError::TooMany { pf: bdf, count, total: pf.total_vfs });
        }
        if pf.num_vfs == count {
            return Ok(());
        }
        if pf.num_vfs != 0 && count != 0 {
            return Err(VfCountError::NotZero { pf: bdf, current: pf.num_vfs });
        }
        let Some(driver) = pf.device.driver else { return Err(VfCountError::NoDriver(bdf)) };
        let dir = self.device_dir(bdf);
        if let (Some(wanted), Some(is)) = (autoprobe, pf.autoprobe)
            && count != 0
            && wanted != is
        {
            self.write(&dir.join("sriov_drivers_autoprobe"), if wanted { "1" } else { "0" })?;
        }
        self.write(&dir.join("sriov_numvfs"), &count.to_string()).map_err(|e| match &e {
            SysfsError::Write { source, .. } => match source.raw_os_error() {
                Some(libc::ENOENT) => VfCountError::Unsupported { pf: bdf, driver },
                Some(libc::EBUSY) => VfCountError::Busy(bdf),
                Some(libc::ERANGE) => VfCountError::TooMany { pf: bdf, count, total: pf.total_vfs },
                _ => e.into(),
            },
            _ => e.into(),
        })?;
        // A driver may make fewer VFs than requested.
        let current = self.pf(bdf)?.num_vfs;
        if current == count { Ok(()) } else { Err(VfCountError::NotTaken { pf: bdf, count, current }) }
    }
}
