// SPDX-License-Identifier: Apache-2.0

use std::collections::BTreeMap;

use netpolicy::{MacAddress, PfCapabilities};
use proptest::prelude::*;

use super::*;

const A: MacAddress = MacAddress::new([2, 0, 0, 0, 0, 0x0a]);
const B: MacAddress = MacAddress::new([2, 0, 0, 0, 0, 0x0b]);

fn vlan(id: u16) -> VfChange {
    VfChange::Vlan(PortVlan { id, ..PortVlan::default() })
}

#[test]
fn all_changes_are_made() {
    let mut pf = FakePf::new("eth0", 2);
    let changes =
        [VfChange::Mac(Some(A)), VfChange::SpoofCheck(false), VfChange::Trust(true), vlan(5), vlan(6)];
    pf.apply(1, &changes).unwrap();
    let settings = pf.read(1).unwrap();
    assert_eq!((settings.mac, settings.vlan.id), (Some(A), 6));
    assert_eq!((settings.spoof_check, settings.trust), (Some(false), Some(true)));
    assert_eq!(pf.read(0).unwrap(), FakePf::new("", 1).read(0).unwrap(), "the other VF is as it was");
    // Equal settings too: an address may be the VF's own choice until it is set.
    pf.made.clear();
    pf.apply(1, &changes).unwrap();
    assert_eq!(pf.made.len(), changes.len());
}

#[test]
fn what_was_made_is_undone_in_reverse() {
    let mut pf = FakePf::new("eth0", 1);
    pf.apply(0, &[VfChange::Mac(Some(A))]).unwrap();
    let before = pf.read(0).unwrap();
    pf.made.clear();
    let error = pf
        .apply(0, &[VfChange::Mac(Some(B)), VfChange::Trust(true), VfChange::Link(VfLink::Disable), vlan(5)])
        .unwrap_err();
    assert_eq!(error.change, VfChange::Link(VfLink::Disable));
    assert!(matches!(*error.source, PfError::Unsupported { .. }));
    assert!(error.not_undone.is_empty());
    assert_eq!(pf.read(0).unwrap(), before);
    let made: Vec<_> = pf.made.iter().map(|(_, change)| *change).collect();
    assert_eq!(
        made,
        [VfChange::Mac(Some(B)), VfChange::Trust(true), VfChange::Trust(false), VfChange::Mac(Some(A))]
    );
    assert!(error.to_string().contains("settings are as before"), "{error}");
}

#[test]
fn both_errors_are_told_when_undoing_fails() {
    let mut pf = FakePf::new("eth0", 1);
    pf.answers = vec![None, Some(libc::EINVAL), Some(libc::EIO)];
    let error = pf.apply(0, &[VfChange::Trust(true), vlan(5)]).unwrap_err();
    let PfError::Refused { source, .. } = &*error.source else { panic!("{error:?}") };
    assert_eq!(source.raw_os_error(), Some(libc::EINVAL));
    assert_eq!(error.not_undone.len(), 1);
    assert_eq!(error.not_undone[0].0, VfChange::Trust(false));
    assert!(error.to_string().contains("could not switch trust off"), "{error}");
}

#[test]
fn a_change_that_does_not_show_is_a_failure() {
    let mut pf = FakePf::new("eth0", 1);
    pf.deaf = true;
    let error = pf.apply(0, &[VfChange::Trust(false), VfChange::Mac(Some(A))]).unwrap_err();
    assert!(matches!(*error.source, PfError::NotTaken { change: VfChange::Mac(_), .. }), "{error:?}");
}

/// A PF whose VFs are taken away while it is configured.
struct Vanishing {
    pf: FakePf,
    reads: u32,
}

impl PfControl for Vanishing {
    fn name(&self) -> &str {
        self.pf.name()
    }

    fn capabilities(&mut self) -> Result<PfCapabilities, PfError> {
        self.pf.capabilities()
    }

    fn read_all(&mut self) -> Result<BTreeMap<u16, VfSettings>, PfError> {
        self.reads += 1;
        if self.reads > 1 { Ok(BTreeMap::new()) } else { self.pf.read_all() }
    }

    fn set(&mut self, vf: u16, change: VfChange) -> Result<(), PfError> {
        self.pf.set(vf, change)
    }
}

#[test]
fn what_keeps_a_vf_from_being_read_back_is_told() {
    let mut pf = Vanishing { pf: FakePf::new("pf0", 2), reads: 0 };
    let error = pf.apply(1, &[VfChange::Trust(true)]).unwrap_err();
    assert!(matches!(*error.source, PfError::NoVf { vf: 1, .. }), "{error:?}");
    assert_eq!(pf.pf.made, [(1, VfChange::Trust(true)), (1, VfChange::Trust(false))], "undone");
}

#[test]
fn there_is_no_such_vf() {
    let mut pf = FakePf::new("eth0", 2);
    assert!(matches!(pf.read(2), Err(PfError::NoVf { vf: 2, .. })));
    let error = pf.apply(2, &[VfChange::Trust(true)]).unwrap_err();
    assert!(matches!(*error.source, PfError::NoVf { .. }));
    assert!(pf.made.is_empty());
    pf.silent = true;
    assert!(matches!(pf.apply(0, &[vlan(1)]).unwrap_err().source.as_ref(), PfError::Timeout { .. }));
    pf.apply(0, &[]).unwrap();
}

#[test]
fn a_vf_is_restored() {
    let mut pf = FakePf::new("eth0", 1);
    let remembered = pf.read(0).unwrap();
    let tenant = [
        VfChange::Mac(Some(A)),
        VfChange::SpoofCheck(false),
        VfChange::Trust(true),
        vlan(7),
        VfChange::TxRate { min: 0, max: 100 },
    ];
    pf.apply(0, &tenant).unwrap();
    restore(&mut pf, 0, &remembered).unwrap();
    assert_eq!(pf.read(0).unwrap(), remembered);
    pf.made.clear();
    restore(&mut pf, 0, &remembered).unwrap();
    assert_eq!(pf.made, [], "repeated, it has nothing to do");
}

#[test]
fn what_cannot_be_restored_does_not_keep_the_rest() {
    let mut pf = FakePf::new("eth0", 1);
    let remembered = pf.read(0).unwrap();
    pf.apply(0, &[VfChange::Mac(Some(A)), VfChange::Trust(true), vlan(7)]).unwrap();
    pf.answers = vec![Some(libc::EIO), Some(libc::EIO)];
    let error = restore(&mut pf, 0, &remembered).unwrap_err();
    assert_eq!(error.change, VfChange::Trust(false));
    assert_eq!(error.not_undone.len(), 1);
    assert_eq!(pf.read(0).unwrap().mac, None);
    restore(&mut pf, 0, &remembered).unwrap();
    assert_eq!(pf.read(0).unwrap(), remembered);
}

#[test]
fn an_address_of_the_vfs_own_choice_is_not_remembered() {
    let own = VfSettings { mac: Some(A), ..VfSettings::default() };
    assert_eq!(own.clone().without_own_mac(&VfSettings::default()).mac, None);
    assert_eq!(own.clone().without_own_mac(&own).mac, Some(A));
}

fn any_change() -> impl Strategy<Value = VfChange> {
    prop_oneof![
        proptest::option::of(any::<[u8; 6]>())
            .prop_map(|bytes| VfChange::Mac(bytes.map(MacAddress::new).filter(|mac| !mac.is_zero()))),
        (0..5000u16, 0..9u8).prop_map(|(id, qos)| VfChange::Vlan(PortVlan {
            id,
            qos,
            protocol: TagProtocol::Dot1Q
        })),
        any::<bool>().prop_map(VfChange::SpoofCheck),
        any::<bool>().prop_map(VfChange::Trust),
        (0..2u32, 0..1000u32).prop_map(|(min, max)| VfChange::TxRate { min, max }),
        Just(VfChange::Link(VfLink::Disable)),
    ]
}

proptest! {
    /// All or nothing, for any changes and any refusal of the driver.
    #[test]
    fn all_or_nothing(
        first in proptest::collection::vec(any_change(), 0..4),
        second in proptest::collection::vec(any_change(), 1..6),
    ) {
        let mut pf = FakePf::new("eth0", 1);
        let _ = pf.apply(0, &first);
        let before = pf.read(0).unwrap();
        match pf.apply(0, &second) {
            Ok(()) => {
                let after = pf.read(0).unwrap();
                for (i, change) in second.iter().enumerate() {
                    let later = |c: &VfChange| std::mem::discriminant(c) == std::mem::discriminant(change);
                    prop_assert!(change.holds(&after) || second[i + 1..].iter().any(later));
                }
            }
            Err(error) => {
                prop_assert!(error.not_undone.is_empty());
                prop_assert_eq!(pf.read(0).unwrap(), before);
            }
        }
    }
}
