// SPDX-License-Identifier: Apache-2.0

//! Doorbells of devices over ioeventfds.

use std::{io, sync::Arc};

use devices::{
    device::Space,
    doorbell::{Doorbell, Doorbells, Ring},
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

/// The doorbells of one machine.
pub struct KvmDoorbells(Arc<VmFd>);

impl KvmDoorbells {
    /// Makes the doorbells of a VM.
    #[must_use]
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self(vm)
    }
}

fn address(doorbell: Doorbell) -> IoEventAddress {
    match doorbell.space {
        Space::Ports => IoEventAddress::Pio(doorbell.address),
        Space::Memory => IoEventAddress::Mmio(doorbell.address),
    }
}

impl Doorbells for KvmDoorbells {
    fn connect(&self, doorbell: Doorbell, event: &EventFd) -> io::Result<()> {
        let at = address(doorbell);
        let result = match doorbell.ring {
            Ring::Any => self.0.register_ioevent(event, &at, NoDatamatch),
            Ring::Byte(value) => self.0.register_ioevent(event, &at, value),
            Ring::Word(value) => self.0.register_ioevent(event, &at, value),
            Ring::Dword(value) => self.0.register_ioevent(event, &at, value),
            Ring::Qword(value) => self.0.register_ioevent(event, &at, value),
        };
        result.map_err(Into::into)
    }

    fn disconnect(&self, doorbell: Doorbell, event: &EventFd) -> io::Result<()> {
        let at = address(doorbell);
        let result = match doorbell.ring {
            Ring::Any => self.0.unregister_ioevent(event, &at, NoDatamatch),
            Ring::Byte(value) => self.0.unregister_ioevent(event, &at, value),
            Ring::Word(value) => self.0.unregister_ioevent(event, &at, value),
            Ring::Dword(value) => self.0.unregister_ioevent(event, &at, value),
            Ring::Qword(value) => self.0.unregister_ioevent(event, &at, value),
        };
        result.map_err(Into::into)
    }
}
