// SPDX-License-Identifier: Apache-2.0

//! The effect of a vCPU's exit: a function on plain data, without KVM.

use std::sync::atomic::{AtomicU64, Ordering};

use devices::machine::MachineEvent;
use protocol::Stats;

/// The buses that an exit may reach.
pub trait Ports: Send + Sync {
    /// Reads a port; false if no device is there.
    fn port_read(&self, port: u16, data: &mut [u8]) -> bool;
    /// Writes a port. Returns the machine's event, if the access caused one.
    fn port_write(&self, port: u16, data: &[u8]) -> Option<MachineEvent>;
    /// Reads guest-physical memory outside of RAM; false if no device is there.
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) -> bool;
    /// Writes guest-physical memory outside of RAM. Returns the machine's event, if the access caused one.
    fn mmio_write(&self, gpa: u64, data: &[u8]) -> Option<MachineEvent>;
}

/// An exit, without KVM's types.
#[derive(Debug)]
pub enum Exit<'a> {
    /// IN, or INS: `data` holds several accesses of `width` bytes, all of them to the same port.
    PortRead {
        /// The port.
        port: u16,
        /// Bytes of one access: 1, 2 or 4.
        width: usize,
        /// The buffer that the guest reads.
        data: &'a mut [u8],
    },
    /// OUT, or OUTS.
    PortWrite {
        /// The port.
        port: u16,
        /// Bytes of one access: 1, 2 or 4.
        width: usize,
        /// The bytes that the guest wrote.
        data: &'a [u8],
    },
    /// A load from a device.
    MmioRead(u64, &'a mut [u8]),
    /// A store to a device.
    MmioWrite(u64, &'a [u8]),
    /// Triple fault.
    Shutdown,
    /// `KVM_EXIT_SYSTEM_EVENT`.
    SystemEvent(u32),
    /// A signal, or nothing to do.
    Interrupted,
    /// KVM cannot run this guest any further, with KVM's reason.
    Broken(String),
}

/// The next step of the vCPU thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Enters the guest again.
    Continue,
    /// Stops this vCPU and sends the event to the event loop.
    Event(MachineEvent),
    /// Stops this vCPU for good.
    Broken(String),
}

/// Exits by reason, for one machine. The ordering is relaxed: counts are only added up.
#[derive(Debug, Default)]
pub struct Counters {
    io_in: AtomicU64,
    io_out: AtomicU64,
    mmio_read: AtomicU64,
    mmio_write: AtomicU64,
    shutdown: AtomicU64,
    system_event: AtomicU64,
    interrupted: AtomicU64,
    broken: AtomicU64,
}

impl Counters {
    fn of(&self, exit: &Exit<'_>) -> &AtomicU64 {
        match exit {
            Exit::PortRead { .. } => &self.io_in,
            Exit::PortWrite { .. } => &self.io_out,
            Exit::MmioRead(..) => &self.mmio_read,
            Exit::MmioWrite(..) => &self.mmio_write,
            Exit::Shutdown => &self.shutdown,
            Exit::SystemEvent(_) => &self.system_event,
            Exit::Interrupted => &self.interrupted,
            Exit::Broken(_) => &self.broken,
        }
    }

    /// Adds the counts to `stats`.
    pub fn report(&self, stats: &mut Stats) {
        for (name, count) in [
            ("io_in", &self.io_in),
            ("io_out", &self.io_out),
            ("mmio_read", &self.mmio_read),
            ("mmio_write", &self.mmio_write),
            ("shutdown", &self.shutdown),
            ("system_event", &self.system_event),
            ("interrupted", &self.interrupted),
            ("internal_error", &self.broken),
        ] {
            stats.exits.insert(name.to_owned(), count.load(Ordering::Relaxed));
        }
    }
}

/// Serves one exit.
pub fn handle(exit: Exit<'_>, ports: &dyn Ports, counters: &Counters) -> Step {
    counters.of(&exit).fetch_add(1, Ordering::Relaxed);
    let event = match exit {
        // A port or address without a device reads as all-ones, like a bus without a driver.
        Exit::PortRead { port, width, data } => {
            for data in data.chunks_mut(width.max(1)) {
                if !ports.port_read(port, data) {
                    data.fill(0xff);
                }
            }
            None
        }
        Exit::MmioRead(gpa, data) => {
            if !ports.mmio_read(gpa, data) {
                data.fill(0xff);
            }
            None
        }
        // Drop the accesses after an event: they come too late.
        Exit::PortWrite { port, width, data } => {
            data.chunks(width.max(1)).find_map(|data| ports.port_write(port, data))
        }
        Exit::MmioWrite(gpa, data) => ports.mmio_write(gpa, data),
        Exit::Shutdown => Some(MachineEvent::Reset),
        Exit::SystemEvent(kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN) => Some(MachineEvent::PowerOff),
        Exit::SystemEvent(kvm_bindings::KVM_SYSTEM_EVENT_RESET) => Some(MachineEvent::Reset),
        Exit::SystemEvent(other) => {
            return Step::Broken(format!("KVM raised the unknown system event {other}"));
        }
        Exit::Interrupted => None,
        Exit::Broken(what) => return Step::Broken(what),
    };
    event.map_or(Step::Continue, Step::Event)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Board;

    impl Ports for Board {
        fn port_read(&self, port: u16, data: &mut [u8]) -> bool {
            data.fill(0x5a);
            port == 0x3f8
        }
        fn port_write(&self, port: u16, _: &[u8]) -> Option<MachineEvent> {
            (port == 0x64).then_some(MachineEvent::Reset)
        }
        fn mmio_read(&self, gpa: u64, data: &mut [u8]) -> bool {
            data.fill(0xa5);
            gpa == 0xc000_0000
        }
        fn mmio_write(&self, _: u64, _: &[u8]) -> Option<MachineEvent> {
            None
        }
    }

    fn read(port: u16, width: usize, data: &mut [u8]) -> Exit<'_> {
        Exit::PortRead { port, width, data }
    }

    fn write(port: u16, width: usize, data: &[u8]) -> Exit<'_> {
        Exit::PortWrite { port, width, data }
    }

    /// Counts accesses: a read returns its number, and written bytes are kept.
    #[derive(Default)]
    struct Counting(std::sync::Mutex<(u8, Vec<Vec<u8>>)>);

    impl Ports for Counting {
        fn port_read(&self, _: u16, data: &mut [u8]) -> bool {
            let mut state = self.0.lock().unwrap();
            state.0 += 1;
            data.fill(state.0);
            true
        }
        fn port_write(&self, _: u16, data: &[u8]) -> Option<MachineEvent> {
            let mut state = self.0.lock().unwrap();
            state.1.push(data.to_vec());
            (data[0] == 0xfe).then_some(MachineEvent::Reset)
        }
        fn mmio_read(&self, _: u64, _: &mut [u8]) -> bool {
            false
        }
        fn mmio_write(&self, _: u64, _: &[u8]) -> Option<MachineEvent> {
            None
        }
    }

    #[test]
    fn string_instructions_are_accesses_of_one_port() {
        let (counters, ports) = (Counters::default(), Counting::default());
        let mut data = [0; 6];
        handle(read(0x3f8, 2, &mut data), &ports, &counters);
        assert_eq!(data, [1, 1, 2, 2, 3, 3]);
        handle(write(0x3f8, 1, b"ab"), &ports, &counters);
        handle(write(0x3f8, 4, b"abcd"), &ports, &counters);
        assert_eq!(ports.0.lock().unwrap().1, [b"a".to_vec(), b"b".to_vec(), b"abcd".to_vec()]);
        let step = handle(write(0x64, 1, &[1, 0xfe, 2]), &ports, &counters);
        assert_eq!(step, Step::Event(MachineEvent::Reset));
        assert_eq!(ports.0.lock().unwrap().1.len(), 5, "nothing after the event");
    }

    #[test]
    fn reads_reach_devices_or_yield_all_ones() {
        let counters = Counters::default();
        let mut data = [0; 4];
        assert_eq!(handle(read(0x3f8, 1, &mut data[..1]), &Board, &counters), Step::Continue);
        assert_eq!(data, [0x5a, 0, 0, 0]);
        assert_eq!(handle(read(0x80, 2, &mut data[..2]), &Board, &counters), Step::Continue);
        assert_eq!(data, [0xff, 0xff, 0, 0]);
        handle(Exit::MmioRead(0xc000_0000, &mut data), &Board, &counters);
        assert_eq!(data, [0xa5; 4]);
        handle(Exit::MmioRead(0xc000_1000, &mut data), &Board, &counters);
        assert_eq!(data, [0xff; 4]);
        let mut stats = Stats::default();
        counters.report(&mut stats);
        assert_eq!((stats.exits["io_in"], stats.exits["mmio_read"], stats.exits["io_out"]), (2, 2, 0));
    }

    #[test]
    fn machine_events_and_failures_stop_the_vcpu() {
        let counters = Counters::default();
        let step = |exit| handle(exit, &Board, &counters);
        assert_eq!(step(write(0x64, 1, &[0xfe])), Step::Event(MachineEvent::Reset));
        assert_eq!(step(write(0x80, 1, &[0])), Step::Continue);
        assert_eq!(step(Exit::Shutdown), Step::Event(MachineEvent::Reset));
        assert_eq!(
            step(Exit::SystemEvent(kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN)),
            Step::Event(MachineEvent::PowerOff)
        );
        assert!(matches!(step(Exit::SystemEvent(99)), Step::Broken(_)));
        assert_eq!(step(Exit::Broken("x".into())), Step::Broken("x".into()));
        assert_eq!(step(Exit::Interrupted), Step::Continue);
    }
}
