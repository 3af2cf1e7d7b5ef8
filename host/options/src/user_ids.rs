// SPDX-License-Identifier: Apache-2.0

//! The user ids of processes without privileges, and their other owners on this host.
//!
//! Each such process has a user and a group of its own, with the same number. Processes of one user may signal each other, so
//! these numbers must have no other owner: neither an account, nor a user namespace by its subordinate ids.

use std::{
    fmt,
    fs::File,
    io::{self, Read},
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

use text::printable;

/// The first id, unless an option sets another. It is beyond the default ranges of subordinate ids (to 600 100 000 on Debian),
/// of systemd's containers (to 1 879 048 191) and of directory services (SSSD: to 2 000 200 000), and below 2^31, because some
/// programs read higher ids as negative numbers.
pub const DEFAULT_BASE: u32 = 2_100_000_000;

/// The last id that [`free_from`] proposes.
const LAST: u32 = i32::MAX.cast_unsigned();

/// The most bytes to read of a file.
const MAX: u64 = 4 << 20;

/// The owner and the ids in a line of a file; None for another line.
type ReadLine = fn(&str) -> Option<(&str, RangeInclusive<u32>)>;

/// The files below the root, the reading of their lines, and their ids in words.
const FILES: [(&str, ReadLine, &str); 4] = [
    ("etc/subuid", subordinate, "the subordinate user ids"),
    ("etc/subgid", subordinate, "the subordinate group ids"),
    ("etc/passwd", account, "the user id"),
    ("etc/group", account, "the group id"),
];

/// The options with the user ids of processes without privileges.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct UserArgs {
    /// The first user id of VMs' processes; with an agent that is root, each has its own. The ids
    /// must have no other owner: neither accounts nor subordinate ids (/etc/subuid).
    #[arg(long, value_name = "UID", default_value_t = DEFAULT_BASE, value_parser = clap::value_parser!(u32).range(1000..4_000_000_000))]
    pub vmm_uid_base: u32,
    /// The number of user ids for VMs' processes: the most VMs that can run at once.
    #[arg(long, value_name = "COUNT", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..1_000_000))]
    pub vmm_uid_count: u32,
}

impl UserArgs {
    /// The ids of VMs, and of as many simulated adapters behind them.
    #[must_use]
    pub fn range(&self, adapters: usize) -> RangeInclusive<u32> {
        let adapters = u32::try_from(adapters).unwrap_or(u32::MAX);
        let last =
            self.vmm_uid_base.saturating_add(self.vmm_uid_count).saturating_add(adapters).saturating_sub(1);
        self.vmm_uid_base..=last
    }
}

/// The ids have another owner, at least one of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlap {
    wanted: RangeInclusive<u32>,
    kind: &'static str,
    owner: String,
    owned: RangeInclusive<u32>,
    file: PathBuf,
    proposed: Option<u32>,
}

impl Overlap {
    /// A first id from which on as many ids have no owner, if there is one.
    #[must_use]
    pub fn proposed(&self) -> Option<u32> {
        self.proposed
    }
}

impl std::error::Error for Overlap {}

impl fmt::Display for Overlap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Overlap { wanted, kind, owner, owned, file, .. } = self;
        let span = |range: &RangeInclusive<u32>| match range.start() == range.end() {
            true => range.start().to_string(),
            false => format!("{} to {}", range.start(), range.end()),
        };
        write!(
            f,
            "The user ids {} of VMs' processes overlap {kind} {} of {owner} ({}), and processes of that \
             owner could end VMs",
            span(wanted),
            span(owned),
            file.display()
        )
    }
}

/// Requires that the ids have no other owner; the error has the cause and the cure.
///
/// # Errors
/// As [`check`], with the option that sets the ids.
pub fn require(root: &Path, wanted: &RangeInclusive<u32>) -> anyhow::Result<()> {
    check(root, wanted).map_err(|overlap| {
        let cure = match overlap.proposed() {
            Some(base) => format!("choose others, --vmm-uid-base {base} for example"),
            None => "choose others with --vmm-uid-base, or fewer with --vmm-uid-count".to_owned(),
        };
        anyhow::anyhow!("{overlap}: {cure}")
    })
}

/// Looks for other owners of these ids in the files below `root`.
///
/// # Errors
/// The first owner. A file that cannot be read, or has more than 4 MiB, only causes a line in the log.
pub fn check(root: &Path, wanted: &RangeInclusive<u32>) -> Result<(), Overlap> {
    let overlap =
        |other: &RangeInclusive<u32>| other.start() <= wanted.end() && wanted.start() <= other.end();
    let texts = FILES.map(|(file, read, kind)| (root.join(file), text(&root.join(file)), read, kind));
    let all = || {
        texts.iter().flat_map(|(file, text, read, kind)| {
            text.lines().filter_map(read).map(move |(owner, owned)| (file, *kind, owner, owned))
        })
    };
    let Some((file, kind, owner, owned)) = all().find(|(.., owned)| overlap(owned)) else { return Ok(()) };
    let count = wanted.end() - wanted.start();
    let proposed = free_from(DEFAULT_BASE, count, all().map(|(.., owned)| owned).collect());
    let owner = printable(&owner.chars().take(64).collect::<String>());
    Err(Overlap { wanted: wanted.clone(), kind, owner, owned, file: file.clone(), proposed })
}

/// The first id from `base` on that begins `count` + 1 ids without an owner.
fn free_from(mut base: u32, count: u32, mut owned: Vec<RangeInclusive<u32>>) -> Option<u32> {
    owned.sort_unstable_by_key(|range| *range.start());
    for range in owned {
        if *range.start() <= base.saturating_add(count) && base <= *range.end() {
            base = range.end().checked_add(1)?;
        }
    }
    (base.saturating_add(count) <= LAST).then_some(base)
}

fn text(path: &Path) -> String {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MAX + 1).read_to_end(&mut bytes));
    match read {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => tracing::warn!(
            "{} cannot be read ({error}): the user ids of VMs' processes may have another owner in it",
            path.display()
        ),
        Ok(_) if bytes.len() as u64 > MAX => tracing::warn!(
            "{} has more than {MAX} bytes: the user ids of VMs' processes may have another owner in the rest",
            path.display()
        ),
        Ok(_) => {}
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// `NAME:FIRST:COUNT`
fn subordinate(line: &str) -> Option<(&str, RangeInclusive<u32>)> {
    let mut fields = line.trim().split(':');
    let (owner, first, count) = (fields.next()?, fields.next()?.parse::<u32>().ok()?, fields.next()?);
    // A range beyond the last id ends with the last id.
    let count = u32::try_from(count.parse::<u64>().ok()?).unwrap_or(u32::MAX);
    Some((owner, first..=first.saturating_add(count.checked_sub(1)?)))
}

/// `NAME:PASSWORD:ID:…`
fn account(line: &str) -> Option<(&str, RangeInclusive<u32>)> {
    let mut fields = line.trim().split(':');
    let (owner, id) = (fields.next()?, fields.nth(1)?.parse().ok()?);
    Some((owner, id..=id))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn host(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        for (file, text) in files {
            fs::write(root.path().join(file), text).unwrap();
        }
        root
    }

    const IDS: RangeInclusive<u32> = 900_000..=904_095;

    #[test]
    fn an_id_has_one_owner() {
        for (file, line, is_other) in [
            ("etc/subuid", "user13:886432:65536", true),
            ("etc/subgid", "# ids\n\nuser13:886432:65536\n", true),
            ("etc/subuid", "a:1:900000\nb:904096:65536\n", true),
            ("etc/subuid", "a:1:899999\nb:904096:65536\n", false),
            ("etc/subuid", "a:900000:0", false),
            ("etc/subuid", "a:899999:99999999999", true),
            ("etc/subuid", "a:4294967295:4294967295\nb\n:\nc:x:1\nd:1\n", false),
            ("etc/passwd", "vm:x:904095:904095::/:/bin/sh", true),
            ("etc/passwd", "root:x:0:0:root:/root:/bin/bash\n+\n", false),
            ("etc/group", "vm:x:900000:", true),
        ] {
            let root = host(&[(file, line)]);
            let checked = check(root.path(), &IDS);
            assert_eq!(checked.is_err(), is_other, "{line:?}: {checked:?}");
        }
        check(Path::new("/nowhere"), &IDS).unwrap();
    }

    #[test]
    fn an_overlap_names_its_owner_and_ids_of_nobody() {
        let root = host(&[
            ("etc/subuid", "u\x1b[1m:886432:65536\nlarge:2100000000:65536\n"),
            ("etc/passwd", "next:x:2100065536:0::/:\n"),
        ]);
        let error = check(root.path(), &IDS).unwrap_err();
        let text = error.to_string();
        for part in ["900000 to 904095", "886432 to 951967", "etc/subuid", "u\\u{1b}[1m"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert_eq!(error.proposed(), Some(2_100_065_537));
        let all = host(&[("etc/subuid", "all:0:4294967295")]);
        assert_eq!(check(all.path(), &IDS).unwrap_err().proposed(), None);
    }
}
