// SPDX-License-Identifier: Apache-2.0

//! Errors of VFIO, with messages that name the cure.

use std::io;

use vfio_ioctls::VfioError;

/// The reason why a VFIO container or device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `/dev/vfio/vfio` does not exist or may not be opened.
    #[error(
        "VFIO container /dev/vfio/vfio cannot be opened: load the module vfio-pci, and check its permissions"
    )]
    Container(#[source] io::Error),
    /// The kernel has no type 1 IOMMU driver for VFIO.
    #[error("VFIO has no type 1 IOMMU driver: load the module vfio_iommu_type1, and enable the IOMMU")]
    NoIommuDriver(#[source] VfioError),
    /// The device has no `iommu_group` link.
    #[error(
        "PCI device {bdf} has no IOMMU group: enable the IOMMU in firmware and on the kernel command line"
    )]
    NoGroup {
        /// The host's PCI address.
        bdf: String,
        /// The error of reading the link.
        #[source]
        source: io::Error,
    },
    /// `/dev/vfio/N` does not exist or may not be opened.
    #[error(
        "IOMMU group {group} of PCI device {bdf} cannot be opened: bind the device to vfio-pci, and check the permissions of /dev/vfio/{group}"
    )]
    GroupOpen {
        /// The host's PCI address.
        bdf: String,
        /// Number of the group.
        group: u32,
        /// The error of opening.
        #[source]
        source: io::Error,
    },
    /// Another process has the group open.
    #[error("IOMMU group {group} of PCI device {bdf} is in use by another process: stop that process or VM")]
    GroupBusy {
        /// The host's PCI address.
        bdf: String,
        /// Number of the group.
        group: u32,
    },
    /// Other members of the group have host drivers.
    #[error(
        "IOMMU group {group} of PCI device {bdf} is not viable: bind all of its devices to vfio-pci or to no driver"
    )]
    GroupNotViable {
        /// The host's PCI address.
        bdf: String,
        /// Number of the group.
        group: u32,
    },
    /// The group cannot be attached because interrupt remapping is off.
    #[error(
        "IOMMU group {group} of PCI device {bdf} cannot be attached: interrupt remapping is off; enable it in firmware and on the kernel command line (intel_iommu=on, intremap=on)"
    )]
    NoInterruptRemapping {
        /// The host's PCI address.
        bdf: String,
        /// Number of the group.
        group: u32,
    },
    /// The group cannot join the container.
    #[error("IOMMU group {group} of PCI device {bdf} cannot be attached to the VM's VFIO container")]
    Attach {
        /// The host's PCI address.
        bdf: String,
        /// Number of the group.
        group: u32,
        /// The error from vfio-ioctls.
        #[source]
        source: VfioError,
    },
    /// The group does not hand out the device.
    #[error(
        "PCI device {bdf} cannot be opened through VFIO: check that it is bound to vfio-pci and that nothing else uses it"
    )]
    Device {
        /// The host's PCI address.
        bdf: String,
        /// The error from vfio-ioctls.
        #[source]
        source: VfioError,
    },
    /// The device's answers make no sense.
    #[error("PCI device {bdf} cannot be used through VFIO: {what}")]
    Unusable {
        /// The host's PCI address.
        bdf: String,
        /// The fault.
        what: &'static str,
    },
    /// A system call on the open device failed.
    #[error("PCI device {bdf}: {what} failed")]
    DeviceCall {
        /// The host's PCI address.
        bdf: String,
        /// The failed action.
        what: &'static str,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// RLIMIT_MEMLOCK is too small.
    #[error(
        "Guest memory of {needed} bytes cannot be locked for DMA: RLIMIT_MEMLOCK is {limit}; raise it above {needed} (LimitMEMLOCK= of the service, ulimit -l)"
    )]
    Memlock {
        /// Bytes of guest memory that have to be locked.
        needed: u64,
        /// The limit as text: bytes or `unlimited`.
        limit: String,
        /// The error from vfio-ioctls.
        #[source]
        source: VfioError,
    },
    /// Guest memory cannot be mapped for another reason.
    #[error("Guest memory at {address:#x} ({len:#x} bytes) cannot be mapped for DMA")]
    Map {
        /// Guest-physical address.
        address: u64,
        /// Bytes.
        len: u64,
        /// The error from vfio-ioctls.
        #[source]
        source: VfioError,
    },
}
