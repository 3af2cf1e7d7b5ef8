// SPDX-License-Identifier: Apache-2.0

//! Moving a PCI function from its driver to VFIO, and back.
//!
//! Each operation is a series of small steps, and a crash may follow any of them: repeating the whole operation always
//! completes it. The caller therefore reads the former state ([`Sysfs::current_binding`]) and stores it before
//! [`Sysfs::bind_vfio`] changes anything.

use std::{
    fs, io,
    path::PathBuf,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use failpoints::{Point, reach};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{Bdf, Sysfs, sysfs::SysfsError};

/// The driver that gives functions to user space.
pub const VFIO_PCI: &str = "vfio-pci";

/// The time that a driver has to release a device, or to take it. vfio-pci keeps it as long as a process has the device
/// open.
const PATIENCE: Duration = Duration::from_secs(10);

/// The former binding of a function.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreviousBinding {
    /// Its driver.
    pub driver: Option<String>,
    /// Its `driver_override`.
    pub driver_override: Option<String>,
}

/// The reason why a function cannot be bound.
#[derive(Debug, Error)]
pub enum BindError {
    /// There is no such function. While restoring a binding, this is no problem.
    #[error("There is no PCI device {0}: it, or the VFs of its PF, may have been removed")]
    NoDevice(Bdf),
    /// The driver does not exist.
    #[error("The driver {driver} for {bdf} is not loaded: run `modprobe {driver}`")]
    NoDriver {
        /// The function.
        bdf: Bdf,
        /// The driver.
        driver: String,
    },
    /// The current driver does not release the function.
    #[error("The driver {driver} did not release {bdf} within {} s: end the process that uses the device", PATIENCE.as_secs())]
    NotReleased {
        /// The function.
        bdf: Bdf,
        /// The driver that holds it.
        driver: String,
    },
    /// The driver did not take the function.
    #[error(
        "The driver {driver} did not take {bdf}, which has {}: see the messages of {driver} in the kernel's \
         log",
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
    /// The function has a driver of the host, which alone may reset it.
    #[error("{bdf} is not reset: the host's driver {driver} has it")]
    HasDriver {
        /// The function.
        bdf: Bdf,
        /// The driver.
        driver: String,
    },
    /// The thread that waits for the kernel could not be started.
    #[error("Cannot start a thread that waits for the kernel")]
    Thread(#[source] io::Error),
    /// sysfs cannot be read or written.
    #[error(transparent)]
    Sysfs(#[from] SysfsError),
}

impl Sysfs {
    /// The present binding of the function, for a later [`restore`](Self::restore). Store it before
    /// [`bind_vfio`](Self::bind_vfio).
    ///
    /// # Errors
    /// [`BindError::NoDevice`], or sysfs is unreadable.
    pub fn current_binding(&self, bdf: Bdf) -> Result<PreviousBinding, BindError> {
        self.exists(bdf)?;
        Ok(PreviousBinding { driver: self.driver(bdf)?, driver_override: self.driver_override(bdf)? })
    }

    /// Binds the function to vfio-pci and returns its binding before this call (after a crash that is not the original
    /// one: see [`current_binding`](Self::current_binding)). May be repeated.
    ///
    /// # Errors
    /// See [`BindError`]. The function may be left with no driver: [`restore`](Self::restore) it.
    pub fn bind_vfio(&self, bdf: Bdf) -> Result<PreviousBinding, BindError> {
        let previous = self.current_binding(bdf)?;
        self.bind(bdf, VFIO_PCI)?;
        Ok(previous)
    }

    /// Restores the function's binding. May be repeated. The process that used the function must have ended.
    ///
    /// # Errors
    /// See [`BindError`]. [`BindError::NoDevice`] means that there is nothing left to restore.
    pub fn restore(&self, bdf: Bdf, previous: &PreviousBinding) -> Result<(), BindError> {
        self.exists(bdf)?;
        match &previous.driver {
            Some(driver) => self.bind(bdf, driver)?,
            None => self.unbind(bdf)?,
        }
        // Last: `bind` needs the override for itself, and it does not affect a bound driver.
        self.set_override(bdf, previous.driver_override.as_deref())
    }

    /// Resets the function (FLR, if it has one) through sysfs. It must not be open through VFIO, and its only driver
    /// may be vfio-pci: the kernel asks the driver to prepare, and igbvf (6.12) then waits for ever while its interface
    /// is down.
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

    /// Whether the kernel can reset the function: by FLR, by its power state, or by the reset of a bus that has no
    /// other function.
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
        // Check before the old driver loses the function.
        if !self.path("bus/pci/drivers").join(driver).exists() {
            return Err(BindError::NoDriver { bdf, driver: driver.to_owned() });
        }
        // Even a driver that knows the device needs the override: on a PF that does not probe its VFs
        // (sriov_drivers_autoprobe), the kernel probes only the driver in the override.
        self.set_override(bdf, Some(driver))?;
        reach(Point::BindOverridden);
        self.unbind(bdf)?;
        reach(Point::BindUnbound);
        let answer = match self.write(&self.path("bus/pci/drivers_probe"), &bdf.to_string()) {
            Ok(()) => None,
            Err(SysfsError::Write { source, .. }) => Some(source),
            Err(e) => return Err(e.into()),
        };
        // Trust the driver link, whatever the answer was: another program may have bound the function meanwhile.
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
            // Another program was faster.
            Some(Err(e)) if self.driver(bdf)?.as_ref() == Some(&driver) => return Err(e.into()),
            Some(Err(_)) => {}
            None => return Err(BindError::NotReleased { bdf, driver }),
        }
        match self.await_driver(bdf, |has| has.is_none())? {
            None => Ok(()),
            Some(driver) => Err(BindError::NotReleased { bdf, driver }),
        }
    }

    /// Waits until every process has closed the function's group; false if it is still open. Unbinding a function that
    /// is open through VFIO would hang beyond recovery: not even the unbinding process could end.
    fn await_closed(&self, bdf: Bdf) -> Result<bool, SysfsError> {
        let Some(group) = self.link_name(&self.device_dir(bdf).join("iommu_group"))? else { return Ok(true) };
        let node = self.group_node(&group);
        let deadline = Instant::now() + PATIENCE;
        loop {
            // A group can be open only once, and a process with one of its devices has the group open.
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

    /// Waits a moment for the wanted driver and returns the actual one.
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

    /// A write that may wait for other processes. `None` if it does not end in time; it then continues in its thread,
    /// which nothing can interrupt.
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
