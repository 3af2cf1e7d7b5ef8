// SPDX-License-Identifier: Apache-2.0

//! Interrupt routes of the in-kernel controllers: IOAPIC pins first, then message-signalled vectors.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::fd::AsRawFd,
    sync::{Arc, Mutex, PoisonError},
};

use devices::interrupt::{MsiMessage, MsiRouter, RouteId};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use crate::layout::IOAPIC_PINS;

/// KVM's limit. Our machines need far fewer routes.
const ROUTES_MAX: u32 = 4096;

/// Routes of one machine. Implements [`MsiRouter`] over irqfds.
pub struct Routes {
    vm: Arc<VmFd>,
    /// Held for one or two ioctls.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    allocated: BTreeSet<u32>,
    messages: BTreeMap<u32, MsiMessage>,
    /// Routes whose trigger has an irqfd. The eventfd's number identifies the trigger.
    connected: BTreeMap<u32, i32>,
}

impl Routes {
    /// Makes the routes of a VM that has its irqchip.
    #[must_use]
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self { vm, state: Mutex::new(State::default()) }
    }

    /// Makes an eventfd that raises an IOAPIC pin, edge triggered.
    ///
    /// # Errors
    /// Those of `eventfd` and `KVM_IRQFD`.
    pub fn pin(&self, pin: u32) -> io::Result<EventFd> {
        let trigger = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        self.vm.register_irqfd(&trigger, pin)?;
        Ok(trigger)
    }

    fn install(&self, state: &State) -> io::Result<()> {
        let entries = table(&state.messages);
        let routing =
            KvmIrqRouting::from_entries(&entries).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        self.vm.set_gsi_routing(&routing).map_err(Into::into)
    }
}

/// Builds the whole routing table: KVM replaces it as one.
fn table(messages: &BTreeMap<u32, MsiMessage>) -> Vec<kvm_irq_routing_entry> {
    let mut entries = Vec::with_capacity(IOAPIC_PINS as usize + 16 + messages.len());
    for pin in 0..IOAPIC_PINS {
        if pin < 16 {
            let (chip, pin_of_chip) =
                if pin < 8 { (KVM_IRQCHIP_PIC_MASTER, pin) } else { (KVM_IRQCHIP_PIC_SLAVE, pin - 8) };
            entries.push(chip_entry(pin, chip, pin_of_chip));
        }
        entries.push(chip_entry(pin, KVM_IRQCHIP_IOAPIC, pin));
    }
    for (&gsi, message) in messages {
        let mut entry =
            kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..kvm_irq_routing_entry::default() };
        #[expect(clippy::cast_possible_truncation, reason = "low and high half of the address")]
        {
            entry.u.msi.address_lo = message.address as u32;
            entry.u.msi.address_hi = (message.address >> 32) as u32;
        }
        entry.u.msi.data = message.data;
        entries.push(entry);
    }
    entries
}

fn chip_entry(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry =
        kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..kvm_irq_routing_entry::default() };
    entry.u.irqchip.irqchip = irqchip;
    entry.u.irqchip.pin = pin;
    entry
}

impl MsiRouter for Routes {
    fn allocate(&self) -> io::Result<RouteId> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let free = (IOAPIC_PINS..ROUTES_MAX)
            .find(|gsi| !state.allocated.contains(gsi))
            .ok_or_else(|| io::Error::new(io::ErrorKind::OutOfMemory, "No interrupt route is left"))?;
        state.allocated.insert(free);
        Ok(RouteId(free))
    }

    fn connect(&self, route: RouteId, trigger: &EventFd, message: MsiMessage) -> io::Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !state.allocated.contains(&route.0) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "The interrupt route is not allocated"));
        }
        let before = state.messages.insert(route.0, message);
        if before != Some(message)
            && let Err(error) = self.install(&state)
        {
            match before {
                Some(old) => state.messages.insert(route.0, old),
                None => state.messages.remove(&route.0),
            };
            return Err(error);
        }
        if state.connected.get(&route.0) != Some(&trigger.as_raw_fd()) {
            self.vm.register_irqfd(trigger, route.0)?;
            state.connected.insert(route.0, trigger.as_raw_fd());
        }
        Ok(())
    }

    fn disconnect(&self, route: RouteId, trigger: &EventFd) -> io::Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.connected.remove(&route.0).is_some() {
            self.vm.unregister_irqfd(trigger, route.0)?;
        }
        Ok(())
    }

    fn release(&self, route: RouteId) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.allocated.remove(&route.0);
        // The table keeps the entry until its next change: an unused route does no harm, an ioctl here would.
        state.messages.remove(&route.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_every_pin_and_every_message() {
        let message = MsiMessage { address: 0xfee0_1004, data: 0x4031 };
        let entries = table(&BTreeMap::from([(30, message)]));
        assert_eq!(entries.len(), 16 + 24 + 1);
        let pin_9 = entries.iter().filter(|entry| entry.gsi == 9).collect::<Vec<_>>();
        // SAFETY: `chip_entry` wrote the irqchip member of these entries.
        let chips = pin_9.iter().map(|entry| unsafe { entry.u.irqchip }).collect::<Vec<_>>();
        assert_eq!(
            chips.iter().map(|chip| (chip.irqchip, chip.pin)).collect::<Vec<_>>(),
            [(KVM_IRQCHIP_PIC_SLAVE, 1), (KVM_IRQCHIP_IOAPIC, 9)]
        );
        let last = entries.last().unwrap();
        // SAFETY: `table` wrote the msi member of this entry.
        let msi = unsafe { last.u.msi };
        assert_eq!((last.gsi, msi.address_lo, msi.address_hi, msi.data), (30, 0xfee0_1004, 0, 0x4031));
    }
}
