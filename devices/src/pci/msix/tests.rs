// SPDX-License-Identifier: Apache-2.0

use std::sync::Mutex;

use super::*;
use crate::interrupt::RouteId;

/// The message of each route.
#[derive(Default)]
struct Router {
    routes: Mutex<Vec<Option<MsiMessage>>>,
    refuse: bool,
}

impl MsiRouter for Router {
    fn allocate(&self) -> io::Result<RouteId> {
        if self.refuse {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let mut routes = self.routes.lock().unwrap();
        let id = RouteId(routes.len().try_into().unwrap());
        routes.push(None);
        Ok(id)
    }
    fn connect(&self, route: RouteId, _trigger: &EventFd, message: MsiMessage) -> io::Result<()> {
        self.routes.lock().unwrap()[route.0 as usize] = Some(message);
        Ok(())
    }
    fn disconnect(&self, route: RouteId, _trigger: &EventFd) -> io::Result<()> {
        self.routes.lock().unwrap()[route.0 as usize] = None;
        Ok(())
    }
    fn release(&self, route: RouteId) {
        assert_eq!(self.routes.lock().unwrap()[route.0 as usize], None, "released while connected");
    }
}

impl Router {
    /// The data of the currently connected messages.
    fn delivered(&self) -> Vec<u32> {
        self.routes.lock().unwrap().iter().flatten().map(|message| message.data).collect()
    }
}

fn fixture(count: u16) -> (Arc<Router>, Msix) {
    let router = Arc::new(Router::default());
    let msix = Msix::new(count, router.clone()).unwrap();
    (router, msix)
}

fn program(msix: &mut Msix, vector: u64, data: u32, mask: u32) {
    for (field, value) in [0xfee0_0000, 0, data, mask].into_iter().enumerate() {
        msix.table_write(vector * ENTRY + field as u64 * 4, &u32::to_le_bytes(value));
    }
}

fn pba(msix: &Msix) -> u8 {
    let mut data = [0; 8];
    msix.pba_read(0, &mut data);
    data[0]
}

#[test]
fn control_tells_the_size_and_keeps_the_two_bits() {
    let (_, mut msix) = fixture(3);
    assert_eq!(msix.control(), 2);
    assert_eq!(msix.write_control(0xffff), Transition::Enabled(3));
    assert_eq!(msix.control(), ENABLE | FUNCTION_MASK | 2);
    assert_eq!(msix.write_control(ENABLE), Transition::None);
    assert_eq!(msix.write_control(0), Transition::Disabled);
    assert_eq!(Msix::new(0, Arc::new(Router::default())).unwrap().control(), 0);
}

#[test]
fn the_table_takes_dwords_and_quadwords_only() {
    let (_, mut msix) = fixture(2);
    let read = |msix: &Msix, offset, len| {
        let mut data = vec![0; len];
        msix.table_read(offset, &mut data);
        data
    };
    assert_eq!(read(&msix, 12, 4), [1, 0, 0, 0], "masked at power-on");
    msix.table_write(0, &[1, 2, 3, 4, 5, 6, 7, 8]);
    msix.table_write(12, &[0xff; 4]);
    assert_eq!(read(&msix, 0, 8), [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(read(&msix, 12, 4), [1, 0, 0, 0], "only the mask bit exists");
    msix.table_write(2, &[9, 9]);
    msix.table_write(2, &[9, 9, 9, 9]);
    msix.table_write(4, &[9; 8]);
    assert_eq!(read(&msix, 0, 4), [1, 2, 3, 4]);
    assert_eq!(read(&msix, 2, 2), [0xff; 2]);
    assert_eq!(read(&msix, 32, 4), [0xff; 4], "after the table");
    msix.table_write(u64::MAX - 7, &[0; 8]);
    msix.reset();
    assert_eq!(read(&msix, 0, 4), [0; 4]);
}

#[test]
fn a_vector_is_delivered_while_nothing_masks_it() {
    let (router, mut msix) = fixture(2);
    program(&mut msix, 0, 40, 0);
    program(&mut msix, 1, 41, 1);
    assert_eq!(router.delivered(), [0u32; 0], "disabled");
    msix.write_control(ENABLE | FUNCTION_MASK);
    assert_eq!(router.delivered(), [0u32; 0], "function masked");
    msix.write_control(ENABLE);
    assert_eq!(router.delivered(), [40]);
    program(&mut msix, 1, 41, 0);
    assert_eq!(router.delivered(), [40, 41]);
    program(&mut msix, 0, 42, 0);
    assert_eq!(router.delivered(), [42, 41], "moved while unmasked");
    program(&mut msix, 0, 42, 1);
    assert_eq!(router.delivered(), [41]);
    msix.write_control(0);
    assert_eq!(router.delivered(), [0u32; 0]);
}

#[test]
fn signals_of_masked_vectors_are_pending_until_unmasked_or_disabled() {
    let (_, mut msix) = fixture(2);
    program(&mut msix, 0, 40, 0);
    msix.write_control(ENABLE);
    msix.triggers()[0].write(1).unwrap();
    msix.triggers()[1].write(1).unwrap();
    assert_eq!(pba(&msix), 0b10, "vector 0 is delivered, vector 1 waits");
    assert_eq!(pba(&msix), 0b10, "reading does not consume");
    program(&mut msix, 1, 41, 0);
    assert_eq!(pba(&msix), 0);
    msix.write_control(ENABLE | FUNCTION_MASK);
    assert_eq!(pba(&msix), 0b11);
    msix.write_control(0);
    assert_eq!(pba(&msix), 0);
    assert!(msix.triggers()[0].read().is_err(), "forgotten");
}

#[test]
fn a_router_without_routes_leaves_interrupts_pending() {
    let mut msix = Msix::new(1, Arc::new(Router { refuse: true, ..Router::default() })).unwrap();
    program(&mut msix, 0, 40, 0);
    msix.write_control(ENABLE);
    msix.triggers()[0].write(1).unwrap();
    assert_eq!(pba(&msix), 1);
}

#[test]
fn lengths_cover_whole_entries_and_quadwords() {
    let check = |count, table, pba| {
        let (_, msix) = fixture(count);
        assert_eq!((msix.table_len(), msix.pba_len()), (table, pba), "{count}");
    };
    check(1, 16, 8);
    check(64, 1024, 8);
    check(65, 1040, 16);
}
