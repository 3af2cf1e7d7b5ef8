// SPDX-License-Identifier: Apache-2.0

//! A simulated VF as the vmm puts it on the guest's bus: function, hardware access, relay, MSI-X.

use std::{
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use devices::{
    interrupt::{MsiMessage, MsiRouter, RouteId},
    memory::{GuestMapper, HostMemory, MappingId},
    pci::PciFunction,
};
use netpolicy::MacAddress;
use passthrough::{
    family::igb::IGBVF,
    function::{AssignedFunction, HardwareAccess},
    relay::{
        Authority, Config, Decision, GuestRequest, How, Relay, RelayEvent, Unreachable, Verdict,
        testing::{Bus, Driver},
    },
    threads::ThreadStart,
};
use vmm_sys_util::eventfd::EventFd;

use super::fixture::{Adapter, eventually, mac};
use crate::vf::IDS;

const BAR0: u64 = 0xc000_0000;
const BAR3: u64 = 0xc000_4000;

struct NoWindows;

impl GuestMapper for NoWindows {
    fn map(&self, _gpa: u64, _memory: Arc<dyn HostMemory>) -> io::Result<MappingId> {
        panic!("nothing of a simulated VF is memory")
    }
    fn unmap(&self, _id: MappingId) -> io::Result<()> {
        Ok(())
    }
    fn forbid(&self, _start: u64, _len: u64) {}
}

#[derive(Default)]
struct Routes {
    connected: Mutex<Vec<(RouteId, EventFd, MsiMessage)>>,
    next: Mutex<u32>,
}

impl MsiRouter for Routes {
    fn allocate(&self) -> io::Result<RouteId> {
        let mut next = self.next.lock().unwrap();
        *next += 1;
        Ok(RouteId(*next))
    }
    fn connect(&self, route: RouteId, trigger: &EventFd, message: MsiMessage) -> io::Result<()> {
        self.connected.lock().unwrap().push((route, trigger.try_clone()?, message));
        Ok(())
    }
    fn disconnect(&self, route: RouteId, _trigger: &EventFd) -> io::Result<()> {
        self.connected.lock().unwrap().retain(|(connected, ..)| *connected != route);
        Ok(())
    }
    fn release(&self, _route: RouteId) {}
}

/// Grants everything.
#[derive(Default)]
struct Agent(Mutex<Option<std::sync::Weak<Relay>>>);

impl Authority for Agent {
    fn request(&self, guest_request: GuestRequest) -> Result<(), Unreachable> {
        let relay = self.0.lock().unwrap().as_ref().and_then(std::sync::Weak::upgrade).ok_or(Unreachable)?;
        let decision = Decision::Grant { how: How::Forward };
        relay.verdict(Verdict { seq: guest_request.seq, effective_mac: mac(0x10), decision });
        Ok(())
    }
    fn event(&self, _event: RelayEvent) {}
}

struct Cpu(Arc<AssignedFunction>);

impl Bus for Cpu {
    fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        assert!(self.0.mmio_read(BAR0 + offset, &mut data));
        u32::from_le_bytes(data)
    }
    fn write(&mut self, offset: u64, value: u32) {
        assert!(self.0.mmio_write(BAR0 + offset, &value.to_le_bytes()));
    }
    fn delay(&mut self, time: Duration) {
        std::thread::sleep(time);
    }
}

#[test]
fn a_guest_drives_it_through_its_pci_function() {
    let mut adapter = Adapter::new(1);
    let (vf, _memory) = adapter.vf(0, mac(0x10));
    let access = HardwareAccess::new(vf);
    let agent = Arc::new(Agent::default());
    let relay = Arc::new(
        Relay::start(Config::default(), &IGBVF, access.clone(), agent.clone(), &ThreadStart::default())
            .unwrap(),
    );
    *agent.0.lock().unwrap() = Some(Arc::downgrade(&relay));
    let routes = Arc::new(Routes::default());
    let windows: Arc<[std::ops::Range<u64>]> = [BAR0..0xd000_0000, 1 << 32..1 << 33].into();
    let traps = relay.trapped_ranges();
    let function = AssignedFunction::new(
        "sim",
        access,
        windows,
        &traps,
        Arc::new(NoWindows),
        routes.clone(),
        &ThreadStart::default(),
    )
    .unwrap();
    let function = Arc::new(function);
    assert_eq!(
        function.bars().iter().map(|(bar, layout)| (*bar, layout.size)).collect::<Vec<_>>(),
        [(0, 0x4000), (3, 0x4000)]
    );
    let start = |function: &AssignedFunction| {
        function.config_write(0x10, &(BAR0 as u32).to_le_bytes());
        function.config_write(0x1c, &(BAR3 as u32).to_le_bytes());
        function.config_write(4, &[6, 0]);
        // Vector n has data n; then MSI-X is switched on.
        for vector in 0..3u8 {
            for (offset, value) in [(0, 0xfee0_0000), (4, 0), (8, u32::from(vector)), (12, 0)] {
                assert!(
                    function.mmio_write(BAR3 + 16 * u64::from(vector) + offset, &u32::to_le_bytes(value))
                );
            }
        }
        function.config_write(0x72, &[0, 0x80]);
    };
    function.assign_bar(0, BAR0).unwrap();
    function.assign_bar(3, BAR3).unwrap();
    start(&function);
    let mut ids = [0; 4];
    function.config_read(0, &mut ids);
    assert_eq!(u32::from_le_bytes(ids), u32::from(IDS.0) | u32::from(IDS.1) << 16);
    let mut driver = Driver::new(Cpu(function.clone()));
    driver.probe();
    assert_eq!(driver.netdev, mac(0x10));
    assert_eq!(driver.call(&[0x1_0004, 100]), Ok(0xa001_0004));
    assert_eq!(driver.call(&[0x0007]), Ok(0x6000_0007));

    let fires = |driver: &mut Driver<Cpu>, vector: u32| {
        driver.bus.write(0x1524, 7);
        driver.bus.write(0x1520, 1 << vector);
        let connected = routes.connected.lock().unwrap();
        connected.iter().any(|(_, trigger, message)| message.data == vector && trigger.read().is_ok())
    };
    assert!((0..3).all(|vector| fires(&mut driver, vector)));

    // The guest's FLR: all-ones until its end, then a fresh start.
    let resets = function.stats().resets;
    function.config_write(0xa8, &[0, 0x80]);
    assert!(eventually(|| function.stats().resets > resets));
    assert!(eventually(|| {
        let mut ids = [0; 4];
        function.config_read(0, &mut ids);
        ids != [0xff; 4]
    }));
    start(&function);
    driver.probe();
    assert_eq!(driver.netdev, mac(0x10));
    assert!(fires(&mut driver, 2));
    assert_ne!(driver.netdev, MacAddress::ZERO);
    relay.stop();
    function.shutdown();
}
