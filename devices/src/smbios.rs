// SPDX-License-Identifier: Apache-2.0

//! SMBIOS tables, which tell the guest its identity, and texts for its programs (DMTF DSP0134 3.7).
//!
//! A 64-bit entry point (5.2.2) and four structures: BIOS (type 0, 7.1), system (type 1, 7.2), OEM strings (type 11,
//! 7.12) and the end (type 127, 7.45). Without firmware the guest finds the entry point at a 16-byte boundary between
//! 0xf0000 and 0xfffff.

/// The length of the entry point with its padding: the structures follow at a 16-byte boundary.
const ENTRY: usize = 32;
/// The length of the entry point itself.
const ENTRY_LENGTH: u8 = 0x18;
/// The place of its checksum.
const CHECKSUM: usize = 5;
/// The version of the specification.
const VERSION: [u8; 3] = [3, 7, 0];
/// BIOS characteristics bit 3: none are given (7.1.1).
const NO_CHARACTERISTICS: u64 = 1 << 3;
/// BIOS characteristics extension byte 2, bit 4: this is a virtual machine (7.1.2.2).
const VIRTUAL_MACHINE: u8 = 1 << 4;
/// Wake-up type: power switch (7.2.2).
const POWER_SWITCH: u8 = 6;
/// A version that is not given (7.1).
const UNKNOWN: u8 = 0xff;
/// The most OEM strings: their count has one byte (7.12).
pub const MAX_OEM_STRINGS: usize = 255;

/// The properties of a machine that the tables describe.
#[derive(Clone, Debug, Default)]
pub struct Identity {
    /// The manufacturer.
    pub manufacturer: String,
    /// The product.
    pub product: String,
    /// The serial number.
    pub serial: String,
    /// The UUID, its bytes in the order of RFC 9562.
    pub uuid: [u8; 16],
}

/// Errors of building the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SmbiosError {
    /// A string that is empty or has a NUL, which ends strings (6.1.3).
    #[error("A string of the SMBIOS tables is empty or has a NUL")]
    String,
    /// More OEM strings than their count can say.
    #[error("The SMBIOS tables have {0} OEM strings, at most {MAX_OEM_STRINGS} are possible")]
    TooMany(usize),
    /// The tables do not fit a length of 32 bits, or their area.
    #[error("The SMBIOS tables are longer than their area")]
    TooLong,
}

/// Builds the tables for the guest-physical address `at`, a multiple of 16. The entry point comes first. Without OEM
/// strings there is no structure for them.
///
/// # Errors
/// [`SmbiosError`].
pub fn tables(at: u64, machine: &Identity, oem_strings: &[&[u8]]) -> Result<Vec<u8>, SmbiosError> {
    let mut table = Table::default();
    let maker = machine.manufacturer.as_bytes();
    let mut bios = vec![1, 0, 0, 0, 0, 0];
    bios.extend(NO_CHARACTERISTICS.to_le_bytes());
    bios.extend([0, VIRTUAL_MACHINE, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN]);
    table.add(0, &bios, &[maker])?;
    let mut system = vec![1, 2, 0, 3];
    system.extend(guid(machine.uuid));
    system.extend([POWER_SWITCH, 0, 0]);
    table.add(1, &system, &[maker, machine.product.as_bytes(), machine.serial.as_bytes()])?;
    if !oem_strings.is_empty() {
        let count = u8::try_from(oem_strings.len()).map_err(|_| SmbiosError::TooMany(oem_strings.len()))?;
        table.add(11, &[count], oem_strings)?;
    }
    table.add(127, &[], &[])?;
    let length = u32::try_from(table.bytes.len()).map_err(|_| SmbiosError::TooLong)?;
    let mut entry = b"_SM3_\0".to_vec();
    entry.push(ENTRY_LENGTH);
    entry.extend(VERSION);
    // The revision of the entry point, and a reserved byte.
    entry.extend([1, 0]);
    entry.extend(length.to_le_bytes());
    entry.extend(at.saturating_add(ENTRY as u64).to_le_bytes());
    let sum = entry.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(checksum) = entry.get_mut(CHECKSUM) {
        *checksum = sum.wrapping_neg();
    }
    entry.resize(ENTRY, 0);
    entry.extend(table.bytes);
    Ok(entry)
}

/// The bytes of a UUID as the system structure has them: the first three fields are little-endian (7.2.1).
fn guid(uuid: [u8; 16]) -> [u8; 16] {
    let [a, b, c, d, e, f, g, h, rest @ ..] = uuid;
    let [i, j, k, l, m, n, o, p] = rest;
    [d, c, b, a, f, e, h, g, i, j, k, l, m, n, o, p]
}

#[derive(Default)]
struct Table {
    bytes: Vec<u8>,
    handle: u16,
}

impl Table {
    /// Adds a structure: the header (6.1.2), its own fields, and its strings (6.1.3).
    fn add(&mut self, kind: u8, fields: &[u8], strings: &[&[u8]]) -> Result<(), SmbiosError> {
        const HEADER: usize = 4;
        let length = u8::try_from(HEADER + fields.len()).map_err(|_| SmbiosError::TooLong)?;
        self.bytes.extend([kind, length]);
        self.bytes.extend(self.handle.to_le_bytes());
        self.handle = self.handle.wrapping_add(1);
        self.bytes.extend(fields);
        for string in strings {
            if string.is_empty() || string.contains(&0) {
                return Err(SmbiosError::String);
            }
            self.bytes.extend(*string);
            self.bytes.push(0);
        }
        // An empty string ends the strings. Two are needed if there is no string.
        let ends: &[u8] = if strings.is_empty() { &[0, 0] } else { &[0] };
        self.bytes.extend(ends);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const AT: u64 = 0xf_0000;

    fn machine() -> Identity {
        Identity {
            manufacturer: "Portcullis".into(),
            product: "Virtual Machine".into(),
            serial: "6b1e3f9e".into(),
            uuid: *b"\x00\x11\x22\x33\x44\x55\x66\x77\x88\x99\xaa\xbb\xcc\xdd\xee\xff",
        }
    }

    /// A structure as a guest reads it: its type, its formatted bytes and its strings.
    type Structure = (u8, Vec<u8>, Vec<Vec<u8>>);

    /// Reads the tables as dmidecode does.
    fn read(tables: &[u8]) -> Vec<Structure> {
        assert_eq!(&tables[..5], b"_SM3_");
        let entry = &tables[..usize::from(tables[6])];
        assert_eq!(entry.len(), 24);
        assert_eq!(entry.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        let length = u32::from_le_bytes(entry[12..16].try_into().unwrap());
        let address = u64::from_le_bytes(entry[16..24].try_into().unwrap());
        assert_eq!(address % 16, 0);
        let mut rest = &tables[usize::try_from(address - AT).unwrap()..];
        assert_eq!(rest.len(), usize::try_from(length).unwrap());
        let mut structures = Vec::new();
        while !rest.is_empty() {
            let (formatted, mut after) = rest.split_at(usize::from(rest[1]));
            let handle = u16::from_le_bytes(formatted[2..4].try_into().unwrap());
            assert_eq!(usize::from(handle), structures.len());
            let mut strings = Vec::new();
            while after[0] != 0 {
                let end = after.iter().position(|byte| *byte == 0).unwrap();
                strings.push(after[..end].to_vec());
                after = &after[end + 1..];
            }
            rest = &after[if strings.is_empty() { 2 } else { 1 }..];
            structures.push((formatted[0], formatted.to_vec(), strings));
        }
        structures
    }

    #[test]
    fn a_guest_reads_its_identity_and_its_strings() {
        let structures = read(&tables(AT, &machine(), &[b"one", b"two"]).unwrap());
        let kinds: Vec<(u8, usize)> =
            structures.iter().map(|(kind, bytes, _)| (*kind, bytes.len())).collect();
        assert_eq!(kinds, [(0, 0x18), (1, 0x1b), (11, 5), (127, 4)]);
        let (_, bios, strings) = &structures[0];
        assert_eq!((bios[4], strings.as_slice()), (1, [b"Portcullis".to_vec()].as_slice()));
        assert_eq!((bios[10], bios[0x13]), (8, 0x10));
        let (_, system, strings) = &structures[1];
        assert_eq!(system[4..8], [1, 2, 0, 3]);
        assert_eq!(
            strings.as_slice(),
            ["Portcullis", "Virtual Machine", "6b1e3f9e"].map(|s| s.as_bytes().to_vec())
        );
        // The example of 7.2.1: 00112233-4455-6677-8899-AABBCCDDEEFF.
        assert_eq!(system[8..24], *b"\x33\x22\x11\x00\x55\x44\x77\x66\x88\x99\xaa\xbb\xcc\xdd\xee\xff");
        let (_, oem, strings) = &structures[2];
        assert_eq!((oem[4], strings.as_slice()), (2, [b"one".to_vec(), b"two".to_vec()].as_slice()));
        assert_eq!(read(&tables(AT, &machine(), &[]).unwrap()).len(), 3);
    }

    #[test]
    fn strings_that_the_tables_cannot_hold_are_refused() {
        for strings in [[&b""[..], b"x"], [b"x", b"a\0b"]] {
            assert_eq!(tables(AT, &machine(), &strings), Err(SmbiosError::String));
        }
        assert!(tables(AT, &machine(), &[&b"x"[..]; 255]).is_ok());
        assert_eq!(tables(AT, &machine(), &[&b"x"[..]; 256]), Err(SmbiosError::TooMany(256)));
    }

    proptest! {
        #[test]
        fn any_strings_are_read_back(
            uuid in any::<[u8; 16]>(),
            serial in "[^\0]{1,40}",
            strings in prop::collection::vec(prop::collection::vec(1_u8.., 1..300), 0..40),
        ) {
            let machine = Identity { uuid, serial: serial.clone(), ..machine() };
            let borrowed: Vec<&[u8]> = strings.iter().map(Vec::as_slice).collect();
            let structures = read(&tables(AT, &machine, &borrowed).unwrap());
            prop_assert_eq!(&structures[1].2[2], serial.as_bytes());
            prop_assert_eq!(guid(structures[1].1[8..24].try_into().unwrap()), uuid);
            let found = structures.iter().find(|(kind, _, _)| *kind == 11);
            prop_assert_eq!(found.map(|(_, _, strings)| strings.clone()).unwrap_or_default(), strings);
        }
    }
}
