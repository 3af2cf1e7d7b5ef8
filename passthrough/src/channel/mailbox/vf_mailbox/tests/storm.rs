// SPDX-License-Identifier: Apache-2.0

//! A PF that writes a word of a script whenever the VF gives the buffer back. ixgbe does so with each acknowledgement
//! while "clear to send" is lost.

use std::{collections::VecDeque, io, sync::Mutex};

use devices::memory::HostMemory;
use proptest::prelude::*;
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::{
    channel::mailbox::layout::Register,
    family::FAMILIES,
    hardware::{BarInfo, IrqKind},
};

#[derive(Debug, Default)]
struct Pf {
    script: VecDeque<u32>,
    word: u32,
    bits: u32,
    vfu: bool,
    /// Messages of the VF.
    requests: u32,
    acknowledgements: u32,
    /// Acknowledgements of words without "clear to send" or an acceptance.
    unwelcome: u32,
    /// Messages that the VF has read.
    fetched: u32,
}

struct Scripted {
    family: &'static Family,
    pf: Mutex<Pf>,
}

impl Scripted {
    /// The counters since the last call: messages, acknowledgements, messages read.
    fn counts(&self) -> [u32; 3] {
        let mut pf = self.pf.lock().unwrap();
        let counts = [pf.requests, pf.acknowledgements, pf.fetched];
        (pf.requests, pf.acknowledgements, pf.fetched) = (0, 0, 0);
        counts
    }
}

impl VfHardware for Scripted {
    fn config_read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(0);
    }

    fn config_write(&self, _offset: u16, _data: &[u8]) {}

    fn bar(&self, _index: usize) -> BarInfo {
        BarInfo::default()
    }

    fn bar_read(&self, _index: usize, offset: u64, data: &mut [u8]) {
        let mut pf = self.pf.lock().unwrap();
        let value = match self.family.layout.register(offset) {
            Register::Mailbox => {
                let bits = pf.bits;
                pf.bits = 0;
                bits | if pf.vfu { VFU } else { 0 }
            }
            Register::Buffer(0) => {
                pf.fetched += 1;
                pf.word
            }
            _ => 0,
        };
        data.copy_from_slice(&value.to_le_bytes());
    }

    fn bar_write(&self, _index: usize, offset: u64, data: &[u8]) {
        let mut pf = self.pf.lock().unwrap();
        let value = u32::from_le_bytes(data.try_into().unwrap());
        match self.family.layout.register(offset) {
            Register::Mailbox => {
                pf.vfu = value & VFU != 0;
                if value & ACK != 0 {
                    pf.acknowledgements += 1;
                    pf.unwelcome += u32::from(pf.word & (CTS | ACK_MESSAGE) == 0);
                }
                if value & REQ != 0 {
                    pf.requests += 1;
                    pf.bits |= PFACK;
                }
                if !pf.vfu
                    && let Some(word) = pf.script.pop_front()
                {
                    pf.word = word;
                    pf.bits |= PFSTS;
                }
            }
            Register::Buffer(0) => pf.word = value,
            _ => {}
        }
    }

    fn map_bar(&self, _index: usize, _offset: u64, _len: u64) -> io::Result<Arc<dyn HostMemory>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn irq_count(&self, _kind: IrqKind) -> u32 {
        0
    }

    fn enable_irqs(&self, _kind: IrqKind, _triggers: &[EventFd]) -> io::Result<()> {
        Ok(())
    }

    fn disable_irqs(&self, _kind: IrqKind) -> io::Result<()> {
        Ok(())
    }

    fn reset(&self) -> io::Result<()> {
        Ok(())
    }
}

fn word() -> impl Strategy<Value = u32> {
    prop_oneof![
        3 => Just(0x4000_0000u32),
        3 => Just(0x100u32),
        2 => Just(0x2000_0100u32),
        1 => Just(0x8000_0001u32),
        1 => any::<u32>(),
    ]
}

proptest! {
    #[test]
    fn no_words_of_a_pf_cause_a_storm(
        family in 0..FAMILIES.len(),
        script in proptest::collection::vec(word(), 0..200),
        steps in proptest::collection::vec(any::<bool>(), 1..20),
    ) {
        let clock = Arc::new(FakeClock::default());
        let mut pf = Pf { script: script.into(), ..Pf::default() };
        pf.word = pf.script.pop_front().unwrap_or(0);
        pf.bits = PFSTS;
        let vf = Arc::new(Scripted { family: FAMILIES[family], pf: Mutex::new(pf) });
        let mut mailbox = VfMailbox::new(vf.clone(), FAMILIES[family], clock);
        for poll in steps {
            if poll {
                mailbox.poll();
                let [requests, acknowledgements, fetched] = vf.counts();
                prop_assert_eq!(requests, 0);
                prop_assert!(acknowledgements <= fetched && fetched <= 1, "{} read at one look", fetched);
            } else {
                let _ = mailbox.exchange(&message(&[5, 1518], 1), 100 * MS);
                let [requests, acknowledgements, _] = vf.counts();
                prop_assert_eq!(requests, 1);
                prop_assert!(acknowledgements <= MAX_UNSOLICITED + 1, "{} acknowledgements", acknowledgements);
            }
            let unwelcome = vf.pf.lock().unwrap().unwelcome;
            prop_assert_eq!(unwelcome, 0, "an acknowledgement to a PF that does not listen");
        }
    }
}
