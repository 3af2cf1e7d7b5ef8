// SPDX-License-Identifier: Apache-2.0

//! PCI addresses of simulated functions, which appear beside real ones in lists.

use sriov::Bdf;

/// Domains that no host has: ACPI segments have 16 bits, and Intel's VMD takes domains from 0x10000 on.
const FIRST_DOMAIN: u32 = 0xf51a_0000;

/// The most simulated PFs of one host.
pub const MAX_PFS: u16 = 256;
/// The most VFs of one simulated PF. An 82576 has 8, of which igb leaves one to the PF.
pub const MAX_VFS: u16 = 64;

/// The address of simulated PF `pf`; None from [`MAX_PFS`] on.
pub fn pf_bdf(pf: u16) -> Option<Bdf> {
    (pf < MAX_PFS).then_some(())?;
    Bdf::new(FIRST_DOMAIN + u32::from(pf), 1, 0, 0)
}

/// The address of a VF of simulated PF `pf`, at the 82576's offset (128) and stride (2); None beyond [`MAX_VFS`].
pub fn vf_bdf(pf: u16, vf: u16) -> Option<Bdf> {
    (pf < MAX_PFS && vf < MAX_VFS).then_some(())?;
    let routing = u8::try_from(0x80 + 2 * vf).ok()?;
    Bdf::new(FIRST_DOMAIN + u32::from(pf), 1, routing >> 3, routing & 7)
}

/// Whether the address is one of a simulated function.
pub fn is_simulated(bdf: Bdf) -> bool {
    (FIRST_DOMAIN..FIRST_DOMAIN + u32::from(MAX_PFS)).contains(&bdf.domain())
}

/// The number of a simulated PF, and that of its VF if the address is a VF's; None for every other address.
pub fn numbers(bdf: Bdf) -> Option<(u16, Option<u16>)> {
    let pf = u16::try_from(bdf.domain().checked_sub(FIRST_DOMAIN)?).ok()?;
    if pf_bdf(pf)? == bdf {
        return Some((pf, None));
    }
    let vf = (u16::from(bdf.device() << 3 | bdf.function()).checked_sub(0x80)?) / 2;
    (vf_bdf(pf, vf)? == bdf).then_some((pf, Some(vf)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_those_of_an_82576_in_a_domain_of_its_own() {
        let check = |bdf: Option<Bdf>, expect: Option<&str>| {
            assert_eq!(bdf.map(|bdf| bdf.to_string()).as_deref(), expect);
            assert!(bdf.is_none_or(|bdf| is_simulated(bdf) && bdf.to_string().parse() == Ok(bdf)));
        };
        check(pf_bdf(0), Some("f51a0000:01:00.0"));
        check(vf_bdf(0, 0), Some("f51a0000:01:10.0"));
        check(vf_bdf(0, 1), Some("f51a0000:01:10.2"));
        check(vf_bdf(3, 63), Some("f51a0003:01:1f.6"));
        assert_eq!(numbers(pf_bdf(3).unwrap()), Some((3, None)));
        for vf in 0..MAX_VFS {
            assert_eq!(numbers(vf_bdf(255, vf).unwrap()), Some((255, Some(vf))));
        }
        for other in
            ["f51a0000:01:00.1", "f51a0000:01:10.1", "f51a0000:02:10.0", "f51a0100:01:10.0", "0000:01:10.0"]
        {
            assert_eq!(numbers(other.parse().unwrap()), None, "{other}");
        }
        check(vf_bdf(0, 64), None);
        check(pf_bdf(256), None);
        assert!(!is_simulated("0000:01:10.0".parse().unwrap()));
        assert!(!is_simulated("10000:01:10.0".parse().unwrap()));
    }
}
