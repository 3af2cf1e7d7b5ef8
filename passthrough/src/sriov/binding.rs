// SPDX-License-Identifier: Apache-2.0

//! Taking a PCI function from its driver for VFIO, and giving it back.
//!
//! Each operation is a series of small steps, and each step may be the last one before a crash: repeating the whole
//! operation always completes it. What must be known for the way back is therefore read
//! ([`Sysfs::current_binding`]) and stored by the caller before [`Sysfs::bind_vfio`] changes anything.

use std::{
    fs, io,
    path::PathBuf,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{Bdf, Sysfs, sysfs::SysfsError};
use crate::failpoints::{Point, reach};

/// The driver that gives functions to user space.
pub const VFIO_PCI: &str = "vfio-pci";

/// How long a driver may take to let go of a device, or to take it. vfio-pci holds on as long as a process has the
/// device open.
const PATIENCE: Duration = Duration::from_secs(10);

/// How a function was bound before it was taken.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreviousBinding {
    /// Its driver.
    pub driver: Option<String>,
    /// Its `driver_override`.
    pub driver_override: Option<String>,
}

/// Why a function cannot be bound.
#[derive(Debug, Error)]
pub enum BindError {
    /// There is no such function. To restore the binding of a function that is gone is nothing to worry about.
    #[error("There is no PCI device {0}: it may have been removed, or its PF's VFs were")]
    NoDevice(Bdf),
    /// The driver is not there.
    #[error("The driver {driver} for {bdf} is not loaded: run `modprobe {driver}`")]
    NoDriver {
        /// The function.
        bdf: Bdf,
        /// The driver.
        driver: String,
    },
    /// The current driver does not let go.
    #[error("The driver {driver} did not release {bdf} within {} s: end the process that uses the device", PATIENCE.as_secs())]
    NotReleased {
        /// The function.
        bdf: Bdf,
        /// The driver that holds it.
        driver: String,
    },
    /// The driver did not take the function.
    #[error(
        "The driver {driver} did not take {bdf}, which has {}: see the kernel's log for what {driver} says",
        has.as_deref().unwrap_or("no driver")
    )]
    NotTaken {
        /// The function.
        bdf: Bdf,
        /// The driver that should have it.
        driver: String,
        /// The driver that has it.
        has: Option<String>,
        /// The kernel's answer, if it gave one.
        source: Option<io::Error>,
    },
    /// The function has a driver of the host, whose business a reset is.
    #[error("{bdf} is not reset: the host's driver {driver} has it")]
    HasDriver {
        /// The function.
        bdf: Bdf,
        /// The driver.
        driver: String,
    },
    /// Nothing waits for the kernel: no thread could be started.
    #[error("Cannot start a thread that waits for the kernel")]
    Thread(#[source] io::Error),
    /// sysfs cannot be read or written.
    #[error(transparent)]
    Sysfs(#[from] SysfsError),
}

impl Sysfs {
    /// How the function is bound now: what [`restore`](Self::restore) needs later. Store it before
    /// [`bind_vfio`](Self::bind_vfio).
    ///
    /// # Errors
    /// [`BindError::NoDevice`], or sysfs is unreadable.
    pub fn current_binding(&self, bdf: Bdf) -> Result<PreviousBinding, BindError> {
        self.exists(bdf)?;
        Ok(PreviousBinding { driver: self.driver(bdf)?, driver_override: self.driver_override(bdf)? })
    }

    /// Binds the function to vfio-pci and says how it was bound before this call (after a crash that is not how it was
    /// bound at first: see [`current_binding`](Self::current_binding)). May be repeated.
    ///
    /// # Errors
    /// See [`BindError`]. The function may be left with no driver: [`restore`](Self::restore) it.
    pub fn bind_vfio(&self, bdf: Bdf) -> Result<PreviousBinding, BindError> {
        let previous = self.current_binding(bdf)?;
        self.bind(bdf, VFIO_PCI)?;
        Ok(previous)
    }

    /// Binds the function as it was. May be repeated. The process that used it must have ended.
    ///
    /// # Errors
    /// See [`BindError`]. [`BindError::NoDevice`] means that there is nothing left to restore.
    pub fn restore(&self, bdf: Bdf, previous: &PreviousBinding) -> Result<(), BindError> {
        self.exists(bdf)?;
        match &previous.driver {
            Some(driver) => self.bind(bdf, driver)?,
            None => self.unbind(bdf)?,
        }
        // Last: `bind` needs the override for itself, and a driver that is bound is not disturbed by it.
        self.set_override(bdf, previous.driver_override.as_deref())
    }

    /// Resets the function (FLR, where it has one) through sysfs. It must not be open through VFIO, and have no driver but
    /// vfio-pci: the kernel asks the driver to prepare, and igbvf (6.12) waits for ever then while its interface is down.
    ///
    /// # Errors
    /// [`BindError::NoDevice`], [`BindError::HasDriver`], or the kernel's answer: a function without a reset has no such
    /// attribute.
    pub fn reset(&self, bdf: Bdf) -> Result<(), BindError> {
        self.exists(bdf)?;
        if let Some(driver) = self.driver(bdf)?.filter(|driver| driver != VFIO_PCI) {
            return Err(BindError::HasDriver { bdf, driver });
        }
        Ok(self.write(&self.device_dir(bdf).join("reset"), "1")?)
    }

    /// Whether the kernel can reset the function: by FLR, by its power state, or by the reset of a bus that it is alone on.
    pub fn can_reset(&self, bdf: Bdf) -> bool {
        self.device_dir(bdf).join("reset").exists()
    }

    fn exists(&self, bdf: Bdf) -> Result<(), BindError> {
        if self.has_device(bdf) { Ok(()) } else { Err(BindError::NoDevice(bdf)) }
    }

    fn driver(&self, bdf: Bdf) -> Result<Option<String>, SysfsError> {
        self.link_name(&self.device_dir(bdf).join("driver"))
    }

    fn bind(&self, bdf: Bdf, driver: &str) -> Result<(), BindError> {
        if self.driver(bdf)?.as_deref() == Some(driver) {
            return Ok(());
        }
        // Before the old driver is taken away.
        if !self.path("bus/pci/drivers").join(driver).exists() {
            return Err(BindError::NoDriver { bdf, driver: driver.to_owned() });
        }
        // Even a driver that knows the device needs the override: where a PF's VFs are not to be probed
        // (sriov_drivers_autoprobe), only the driver named in it is.
        self.set_override(bdf, Some(driver))?;
        reach(Point::BindOverridden);
        self.unbind(bdf)?;
        reach(Point::BindUnbound);
        let answer = match self.write(&self.path("bus/pci/drivers_probe"), &bdf.to_string()) {
            Ok(()) => None,
            Err(SysfsError::Write { source, .. }) => Some(source),
            Err(e) => return Err(e.into()),
        };
        // The driver's own link is the truth, whatever the answer was: someone else may have bound it meanwhile.
        let has = match &answer {
            None => self.await_driver(bdf, |has| has == Some(driver))?,
            Some(_) => self.driver(bdf)?,
        };
        if has.as_deref() == Some(driver) {
            reach(Point::BindBound);
            return Ok(());
        }
        Err(BindError::NotTaken { bdf, driver: driver.to_owned(), has, source: answer })
    }

    fn unbind(&self, bdf: Bdf) -> Result<(), BindError> {
        let Some(driver) = self.driver(bdf)? else { return Ok(()) };
        if driver.contains("vfio") && !self.await_closed(bdf)? {
            return Err(BindError::NotReleased { bdf, driver });
        }
        let path = self.device_dir(bdf).join("driver/unbind");
        match self.write_with_patience(path, bdf.to_string())? {
            Some(Ok(())) => {}
            // Someone was faster.
            Some(Err(e)) if self.driver(bdf)?.as_ref() == Some(&driver) => return Err(e.into()),
            Some(Err(_)) => {}
            None => return Err(BindError::NotReleased { bdf, driver }),
        }
        match self.await_driver(bdf, |has| has.is_none())? {
            None => Ok(()),
            Some(driver) => Err(BindError::NotReleased { bdf, driver }),
        }
    }

    /// Waits for the function's group to be closed by everybody; false if it is still open. To unbind a function that is
    /// open through VFIO would hang without a way to give up: not even the process that tries could end.
    fn await_closed(&self, bdf: Bdf) -> Result<bool, SysfsError> {
        let Some(group) = self.link_name(&self.device_dir(bdf).join("iommu_group"))? else { return Ok(true) };
        let node = self.group_node(&group);
        let deadline = Instant::now() + PATIENCE;
        loop {
            // A group can be open once; whoever has a device of it open has the group open too.
            match fs::OpenOptions::new().read(true).write(true).open(&node) {
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
                _ => return Ok(true),
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn set_override(&self, bdf: Bdf, driver: Option<&str>) -> Result<(), BindError> {
        if self.driver_override(bdf)?.as_deref() == driver {
            return Ok(());
        }
        // An empty line clears it; an empty write would not reach the kernel.
        let value = format!("{}\n", driver.unwrap_or_default());
        Ok(self.write(&self.device_dir(bdf).join("driver_override"), &value)?)
    }

    /// Waits a moment for the driver to be as wanted and returns what it is.
    fn await_driver(
        &self,
        bdf: Bdf,
        wanted: impl Fn(Option<&str>) -> bool,
    ) -> Result<Option<String>, SysfsError> {
        // Both writes are synchronous in the kernel; only a driver that probes asynchronously needs the wait.
        let deadline = Instant::now() + Duration::from_secs(1);
        loop {
            let has = self.driver(bdf)?;
            if wanted(has.as_deref()) || Instant::now() >= deadline {
                return Ok(has);
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// A write that may wait for other processes. `None` if it is not done in time; it then goes on in its thread, which
    /// nothing can interrupt.
    fn write_with_patience(
        &self,
        path: PathBuf,
        value: String,
    ) -> Result<Option<Result<(), SysfsError>>, BindError> {
        let (sender, receiver) = mpsc::sync_channel(1);
        let sysfs = self.clone();
        thread::Builder::new()
            .name("sysfs-write".to_owned())
            .spawn(move || {
                let _ = sender.send(sysfs.write(&path, &value));
            })
            .map_err(BindError::Thread)?;
        Ok(receiver.recv_timeout(PATIENCE).ok())
    }
}
