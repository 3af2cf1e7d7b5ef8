// SPDX-License-Identifier: Apache-2.0

//! The functions of the host that VMs may have, as the host's operator allows (`serve --assignable`).
//!
//! A guest with a function of the host has the hardware behind it. With a disk's controller a user of the API reads and
//! writes that disk, so `devices` gets no function that the operator has not named.

use std::{fmt, str::FromStr};

use sriov::{Bdf, InventoryError, PciDevice, Pf, Sysfs};

/// The suffix for functions without a reset.
const NO_RESET: &str = ",no-reset";

/// A value of `serve --assignable`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assignable {
    what: What,
    /// Whether a function without a reset may change its tenant.
    no_reset: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum What {
    /// A function under `devices`.
    Function(Bdf),
    /// All functions of a vendor's device, under `devices`.
    Model { vendor: u16, device: u16 },
    /// The VFs of a PF, for adapters.
    Pf(String),
}

impl FromStr for Assignable {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        let (what, no_reset) = match word.strip_suffix(NO_RESET) {
            Some(what) => (what, true),
            None => (word, false),
        };
        let model = || {
            let hexadecimal =
                |text: &str| text.len() == 4 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
            let (vendor, device) = what.split_once(':').filter(|(a, b)| hexadecimal(a) && hexadecimal(b))?;
            Some((u16::from_str_radix(vendor, 16).ok()?, u16::from_str_radix(device, 16).ok()?))
        };
        let what = match (what.parse(), model()) {
            (Ok(bdf), _) => What::Function(bdf),
            (Err(_), Some((vendor, device))) => What::Model { vendor, device },
            // IFNAMSIZ of linux/if.h. A VF has a reset: the specification of SR-IOV demands it.
            (Err(_), None)
                if !no_reset && (1..16).contains(&what.len()) && !what.contains([':', ',', '/', ' ']) =>
            {
                What::Pf(what.to_owned())
            }
            _ => {
                return Err("write a function (0000:03:00.0) or a vendor and device (8086:1521), each with \
                            ,no-reset if it may lack a reset, or the interface of a PF"
                    .to_owned());
            }
        };
        Ok(Assignable { what, no_reset })
    }
}

impl fmt::Display for Assignable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.what {
            What::Function(bdf) => bdf.fmt(f)?,
            What::Model { vendor, device } => write!(f, "{vendor:04x}:{device:04x}")?,
            What::Pf(name) => f.write_str(name)?,
        }
        f.write_str(if self.no_reset { NO_RESET } else { "" })
    }
}

/// All values of `serve --assignable`.
#[derive(Clone, Debug, Default)]
pub struct AssignableList(Vec<Assignable>);

impl From<Vec<Assignable>> for AssignableList {
    fn from(list: Vec<Assignable>) -> Self {
        Self(list)
    }
}

impl AssignableList {
    /// Whether `devices` may have a function: None if not, else whether it may lack a reset.
    #[must_use]
    pub fn device(&self, device: &PciDevice) -> Option<bool> {
        let named = |word: &&Assignable| match &word.what {
            What::Function(bdf) => *bdf == device.bdf,
            What::Model { vendor, device: model } => (*vendor, *model) == (device.vendor, device.device),
            What::Pf(_) => false,
        };
        self.0.iter().filter(named).map(|word| word.no_reset).reduce(|a, b| a || b)
    }

    /// The functions of the host that `devices` may have, each with whether it may lack a reset.
    ///
    /// # Errors
    /// sysfs is unreadable.
    pub fn devices(&self, sysfs: &Sysfs) -> Result<Vec<(PciDevice, bool)>, InventoryError> {
        if self.0.is_empty() {
            return Ok(Vec::new());
        }
        let with_word = |device: PciDevice| self.device(&device).map(|no_reset| (device, no_reset));
        Ok(sysfs.devices()?.into_iter().filter_map(with_word).collect())
    }

    /// Logs a warning for each of these functions that has no reset.
    pub fn warn(&self, sysfs: &Sysfs) {
        let found = self.devices(sysfs).unwrap_or_default();
        for (device, no_reset) in found.iter().filter(|(device, _)| !sysfs.can_reset(device.bdf)) {
            let function = device.bdf;
            match no_reset {
                true => tracing::warn!(
                    %function,
                    "an assignable function has no reset: each VM that gets it finds the state and data of \
                     the last one"
                ),
                false => tracing::warn!(
                    %function,
                    "an assignable function has no reset, and no VM gets it: allow it with --assignable {function},no-reset"
                ),
            }
        }
    }

    /// Whether adapters may have VFs of a PF that ports know by `name`. If none names a PF, all PFs are allowed.
    #[must_use]
    pub fn pf(&self, pf: &Pf, name: &str) -> bool {
        let mut named = self.0.iter().filter_map(|word| match &word.what {
            What::Pf(named) => Some(named.as_str()),
            _ => None,
        });
        let Some(first) = named.next() else { return true };
        std::iter::once(first).chain(named).any(|named| named == name || named == pf.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(words: &[&str]) -> AssignableList {
        words.iter().map(|word| word.parse().unwrap()).collect::<Vec<Assignable>>().into()
    }

    #[test]
    fn words_are_functions_models_and_interfaces() {
        for word in
            ["0000:03:00.0", "0000:03:00.0,no-reset", "8086:1521", "8086:10ca,no-reset", "enp1s0", "eth0.5"]
        {
            assert_eq!(word.parse::<Assignable>().unwrap().to_string(), word);
        }
        for wrong in
            ["", ",no-reset", "eth0,no-reset", "8086:", "8086:15211", "+086:1521", "a b", "sixteen-letters-"]
        {
            assert!(wrong.parse::<Assignable>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn devices_need_a_word_and_vfs_only_where_pfs_are_named() {
        let fake = tempfile::tempdir().unwrap();
        let sysfs = sriov::fake::FakeSysfs::new(fake.path());
        let [pf, nvme] = [Bdf::new(0, 1, 0, 0).unwrap(), Bdf::new(0, 3, 0, 0).unwrap()];
        sysfs.add_igb(pf, "eth0");
        sysfs.add_device(nvme, (0x1b36, 0x0010), 0x01_0802, Some(7), Some("nvme"));
        let (pf, nvme) = (sysfs.sysfs().pf(pf).unwrap(), sysfs.sysfs().device(nvme).unwrap());
        for (words, device, vfs) in [
            (&[][..], None, true),
            (&["0000:03:00.0"], Some(false), true),
            (&["1b36:0010", "0000:03:00.0,no-reset"], Some(true), true),
            (&["0000:03:00.1", "1b36:0011", "eth1"], None, false),
            (&["eth1", "eth0"], None, true),
            (&["kept"], None, true),
        ] {
            let list = list(words);
            assert_eq!((list.device(&nvme), list.pf(&pf, "kept")), (device, vfs), "{words:?}");
        }
    }
}
