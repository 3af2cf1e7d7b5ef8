// SPDX-License-Identifier: Apache-2.0

use std::{collections::BTreeMap, sync::Mutex};

use super::*;
use crate::interrupt::RouteId;

#[derive(Default)]
struct Router(Mutex<BTreeMap<RouteId, Option<MsiMessage>>>);

impl MsiRouter for Router {
    fn allocate(&self) -> io::Result<RouteId> {
        let mut routes = self.0.lock().unwrap();
        let id = RouteId(routes.len().try_into().unwrap());
        routes.insert(id, None);
        Ok(id)
    }
    fn connect(&self, route: RouteId, _trigger: &EventFd, message: MsiMessage) -> io::Result<()> {
        self.0.lock().unwrap().insert(route, Some(message));
        Ok(())
    }
    fn disconnect(&self, route: RouteId, _trigger: &EventFd) -> io::Result<()> {
        self.0.lock().unwrap().insert(route, None);
        Ok(())
    }
    fn release(&self, _route: RouteId) {}
}

fn fixture(control: u16) -> (Arc<Router>, Msi) {
    let router = Arc::new(Router::default());
    let msi = Msi::new(MsiShape::from_control(control), router.clone()).unwrap();
    (router, msi)
}

fn delivered(router: &Router) -> Vec<(u64, u32)> {
    router.0.lock().unwrap().values().flatten().map(|m| (m.address, m.data)).collect()
}

fn read(msi: &Msi, offset: u16, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    msi.read(offset, &mut data);
    data
}

#[test]
fn shapes_have_the_sizes_of_the_specification() {
    let check = |control, size| assert_eq!(MsiShape::from_control(control).size(), size, "{control:#x}");
    check(0, 10);
    check(IS_64BIT, 14);
    check(PER_VECTOR_MASK, 20);
    check(IS_64BIT | PER_VECTOR_MASK, 24);
    assert_eq!(MsiShape::from_control(7 << 1).messages_log2, 5);
}

#[test]
fn read_only_bits_stay() {
    let (_, mut msi) = fixture(IS_64BIT | PER_VECTOR_MASK | 3 << 1);
    msi.write(2, &[0xff, 0xff]);
    assert_eq!(read(&msi, 2, 2), (IS_64BIT | PER_VECTOR_MASK | 3 << 1 | 7 << 4 | 1).to_le_bytes());
    msi.write(4, &[0xff; 4]);
    assert_eq!(read(&msi, 4, 4), [0xfc, 0xff, 0xff, 0xff]);
    msi.reset();
    assert_eq!(read(&msi, 2, 2), (IS_64BIT | PER_VECTOR_MASK | 3 << 1).to_le_bytes());
}

#[test]
fn one_message_is_delivered_as_written() {
    for (control, data) in [(0, 8), (IS_64BIT, 12)] {
        let (router, mut msi) = fixture(control);
        msi.write(4, &0xfee0_1000u32.to_le_bytes());
        msi.write(data, &0x4031u16.to_le_bytes());
        assert_eq!(delivered(&router), []);
        assert_eq!(msi.write(2, &[1, 0]), Transition::Enabled(1));
        assert_eq!(delivered(&router), [(0xfee0_1000, 0x4031)]);
        assert_eq!(msi.write(data, &0x4032u16.to_le_bytes()), Transition::None);
        assert_eq!(delivered(&router), [(0xfee0_1000, 0x4032)]);
        assert_eq!(msi.write(2, &[0, 0]), Transition::Disabled);
        assert_eq!(delivered(&router), []);
    }
}

#[test]
fn several_messages_differ_in_the_low_bits_and_can_be_masked() {
    let (router, mut msi) = fixture(IS_64BIT | PER_VECTOR_MASK | 3 << 1);
    msi.write(4, &0xfee0_0000u32.to_le_bytes());
    msi.write(12, &0x43u16.to_le_bytes());
    assert_eq!(msi.write(2, &(1u16 | 2 << 4).to_le_bytes()), Transition::Enabled(4));
    let data = |router: &Router| delivered(router).into_iter().map(|(_, data)| data).collect::<Vec<_>>();
    assert_eq!(data(&router), [0x40, 0x41, 0x42, 0x43]);
    msi.write(16, &[0b0101, 0, 0, 0]);
    assert_eq!(data(&router), [0x41, 0x43]);
    for trigger in &msi.triggers()[..2] {
        trigger.write(1).unwrap();
    }
    assert_eq!(read(&msi, 20, 4), [0b0001, 0, 0, 0], "only the masked one waits");
    msi.write(20, &[0xff; 4]);
    assert_eq!(read(&msi, 20, 4), [0b0001, 0, 0, 0], "pending is read-only");
    assert_eq!(msi.write(2, &(1u16 | 1 << 4).to_le_bytes()), Transition::Enabled(2), "fewer messages");
    assert_eq!(data(&router), [0x43]);
    assert_eq!(msi.write(2, &(1u16 | 7 << 4).to_le_bytes()), Transition::Enabled(8), "clamped to the shape");
}
