// SPDX-License-Identifier: Apache-2.0

//! Boot loader entries (the UAPI group's "Boot Loader Specification"): text files (type 1) and, below them in the menu,
//! unified kernel images (type 2). Boot counting is respected and not changed: the disk is only read.

use std::{
    cmp::{Ordering, Reverse},
    rc::Rc,
};

use crate::{
    entry::Draft,
    error::{Fault, printable},
    filesystem::{FileSystem, MOST_TEXT, Part, text},
    grub::Variables,
    uki, version,
};

/// The directories of a partition for boot loaders, or of a separate `/boot`; and those below `/boot`.
const ROOTS: [&str; 2] = ["", "/boot"];
/// The most text files that are read.
const MOST_ENTRIES: usize = 256;
/// The longest of them in bytes.
const MOST_ENTRY: u64 = 64 << 10;
/// The longest pattern in bytes: the longest name of a file in Linux.
const MOST_PATTERN: usize = 255;
/// The most bytes of a key of the order.
const MOST_KEY: usize = 255;
/// The most lines of a file with the same key.
const MOST_LINES: usize = 64;

/// An entry of the menu.
#[derive(Debug, Default, PartialEq)]
struct Item {
    /// The file's name without its counter and suffix, which is the entry's id for `default`.
    id: String,
    path: String,
    /// All attempts to boot it have failed.
    is_bad: bool,
    sort_key: Option<String>,
    machine: String,
    version: String,
    title: String,
    linux: Option<String>,
    initrd: Vec<String>,
    options: Vec<String>,
    is_unified: bool,
}

/// The entry that a boot loader would boot, and the number of its volume. The entries of all volumes are one menu, whose
/// configuration is that of the first volume with one.
pub(crate) fn find(volumes: &[&dyn FileSystem], notes: &mut Vec<String>) -> crate::Numbered {
    for root in ROOTS {
        let (mut all, mut pattern, mut saved) = (Vec::new(), None, None);
        for (number, files) in volumes.iter().enumerate() {
            match menu(*files, root, notes) {
                Ok(menu) => {
                    pattern = pattern.or(menu.pattern);
                    saved = saved.or_else(|| menu.variables.get("saved_entry").map(str::to_owned));
                    let variables = Rc::new(menu.variables);
                    all.extend(menu.items.into_iter().map(|item| (item, number, Rc::clone(&variables))));
                }
                // The only volume has no other entries.
                Err(fault) if fault.is_end() || volumes.len() == 1 => return Err(fault),
                Err(fault) => {
                    notes.push(printable(&format!("the menu of one partition is skipped: {fault}")))
                }
            }
        }
        if all.is_empty() {
            continue;
        }
        all.sort_by(|(one, ..), (other, ..)| order(one, other));
        let ids = || all.iter().map(|(item, ..)| item.id.as_str());
        let chosen = match (pattern, saved) {
            (Some(Some(pattern)), _) => {
                let cost = ids().fold(0, |all: usize, id| all.saturating_add(id.len()));
                if let Some(files) = volumes.first() {
                    files.charge(cost.saturating_mul(pattern.len()) as u64)?;
                }
                ids().position(|id| matches(&pattern, id))
            }
            (Some(None), _) | (None, None) => None,
            // Without a configuration of its own, the menu is one of GRUB.
            (None, Some(saved)) => {
                let saved = saved.strip_suffix(".conf").unwrap_or(&saved);
                let number = || saved.parse().ok().filter(|number| *number < all.len());
                ids().position(|id| id == saved).or_else(number)
            }
        };
        let chosen = all.into_iter().nth(chosen.unwrap_or(0));
        if let Some((item, number, variables)) = chosen
            && let Some(files) = volumes.get(number)
        {
            return Ok((number, draft(*files, item, &variables)?));
        }
    }
    Err(Fault::Absent("/loader/entries, /EFI/Linux or /boot/loader/entries with an entry".to_owned()))
}

/// The menu of one volume.
struct Menu {
    items: Vec<Item>,
    /// The pattern of `default`, if there is a configuration and in it a pattern.
    pattern: Option<Option<String>>,
    variables: Variables,
}

/// Reads the menu of a volume, or that of its directory `/boot`.
fn menu(files: &dyn FileSystem, root: &str, notes: &mut Vec<String>) -> Result<Menu, Fault> {
    let items = items(files, root, notes)?;
    let pattern = match text(files, &format!("{root}/loader/loader.conf"), MOST_TEXT) {
        Ok(text) => Some(default(&text)),
        Err(fault) if fault.is_absence() => None,
        Err(fault) => return Err(fault),
    };
    let variables = if items.is_empty() { Variables::default() } else { Variables::read(files, root)? };
    Ok(Menu { items, pattern, variables })
}

/// The entries of a partition, or of its directory `/boot`.
fn items(files: &dyn FileSystem, root: &str, notes: &mut Vec<String>) -> Result<Vec<Item>, Fault> {
    let list = |path: &str| match files.list(path) {
        Err(fault) if fault.is_absence() => Ok(Vec::new()),
        listed => listed,
    };
    let mut items = Vec::new();
    let directory = format!("{root}/loader/entries");
    let names = list(&directory)?.into_iter().filter_map(|name| Some((id(&name, ".conf")?, name)));
    let mut names: Vec<_> = names.collect();
    // The newest ones, if there are too many.
    names.sort_by(|((one, _), _), ((other, _), _)| version::compare(other, one));
    for ((id, is_bad), name) in names.into_iter().take(MOST_ENTRIES) {
        let path = format!("{directory}/{name}");
        let item = Item { id, path, is_bad, ..Item::default() };
        match text(files, &item.path, MOST_ENTRY) {
            Ok(text) => items.extend(parse(&text, item).filter(|item| item.linux.is_some())),
            Err(ending) if ending.is_end() => return Err(ending),
            Err(fault) => notes.push(printable(&format!("the entry {} is skipped: {fault}", item.path))),
        }
    }
    let directory = format!("{root}/EFI/Linux");
    for name in list(&directory)? {
        if let Some((id, is_bad)) = id(&name, ".efi") {
            let (path, version) = (format!("{directory}/{name}"), id.clone());
            items.push(Item {
                title: id.clone(),
                id,
                path,
                is_bad,
                version,
                is_unified: true,
                ..Item::default()
            });
        }
    }
    Ok(items)
}

/// The id in the name of a file, and whether its counter of attempts is at its end: `ID+LEFT-DONE.conf`.
fn id(name: &str, suffix: &str) -> Option<(String, bool)> {
    let at = name.len().checked_sub(suffix.len())?;
    let (stem, end) = name.split_at_checked(at)?;
    if !end.eq_ignore_ascii_case(suffix) || stem.is_empty() {
        return None;
    }
    if let Some((id, counter)) = stem.rsplit_once('+') {
        let mut numbers = counter.splitn(2, '-').map(str::parse::<u32>);
        if let (Some(Ok(left)), None | Some(Ok(_))) = (numbers.next(), numbers.next()) {
            return Some((id.to_owned(), left == 0));
        }
    }
    Some((stem.to_owned(), false))
}

/// The first bytes of a text that entries are sorted by: to compare long ones takes as long as they are.
fn cut(text: String) -> String {
    match text.char_indices().find(|(at, letter)| at + letter.len_utf8() > MOST_KEY) {
        Some((end, _)) => text.get(..end).unwrap_or_default().to_owned(),
        None => text,
    }
}

/// Reads the lines of an entry. None for another processor's.
fn parse(text: &str, mut item: Item) -> Option<Item> {
    for line in text.lines() {
        let line = line.trim();
        let Some((key, value)) = line.split_once(char::is_whitespace) else { continue };
        let value = value.trim().to_owned();
        match key {
            "title" => item.title = value,
            "version" => item.version = cut(value),
            "machine-id" => item.machine = cut(value),
            "sort-key" => item.sort_key = Some(cut(value)),
            "linux" => item.linux = Some(value),
            "initrd" if item.initrd.len() < MOST_LINES => item.initrd.push(value),
            "options" if item.options.len() < MOST_LINES => item.options.push(value),
            "architecture" if !value.eq_ignore_ascii_case("x64") => return None,
            _ => {}
        }
    }
    Some(item)
}

/// The order of the menu, the first entry first.
fn order(one: &Item, other: &Item) -> Ordering {
    let newer = |a: &str, b: &str| version::compare(b, a);
    let group = |item: &Item| (item.is_bad, item.is_unified, item.sort_key.is_none());
    group(one).cmp(&group(other)).then_with(|| {
        let keys = match (&one.sort_key, &other.sort_key) {
            (Some(a), Some(b)) => a
                .cmp(b)
                .then_with(|| one.machine.cmp(&other.machine))
                .then_with(|| newer(&one.version, &other.version)),
            _ => Ordering::Equal,
        };
        keys.then_with(|| newer(&one.id, &other.id))
            .then_with(|| Reverse(&one.path).cmp(&Reverse(&other.path)))
    })
}

/// The pattern of `default` in small letters, in the loader's configuration. `@saved` and its like are in EFI variables, which are not here.
fn default(text: &str) -> Option<String> {
    let mut found = None;
    for line in text.lines() {
        if let Some(("default", pattern)) = line.trim().split_once(char::is_whitespace) {
            found = Some(pattern.trim()).filter(|pattern| !pattern.starts_with('@'));
        }
    }
    let found = found?;
    let suffixes = [".conf", ".efi"];
    let pattern = suffixes.iter().find_map(|suffix| found.strip_suffix(suffix)).unwrap_or(found);
    (pattern.len() <= MOST_PATTERN).then(|| pattern.to_lowercase())
}

/// Whether a pattern with `*` and `?`, in small letters, is that of an id. Each `*` takes as little as it can, so that the time is the product of
/// both lengths at most.
fn matches(pattern: &str, id: &str) -> bool {
    let (pattern, id) = (pattern.as_bytes(), id.to_lowercase().into_bytes());
    let (mut p, mut i, mut back) = (0, 0, None);
    loop {
        match (pattern.get(p), id.get(i)) {
            (None, None) => return true,
            (Some(b'*'), _) => {
                back = Some((p, i));
                p += 1;
            }
            (Some(a), Some(b)) if a == b || *a == b'?' => (p, i) = (p + 1, i + 1),
            _ => {
                let Some((star, from)) = back.filter(|(_, from)| *from < id.len()) else { return false };
                back = Some((star, from + 1));
                (p, i) = (star + 1, from + 1);
            }
        }
    }
}

fn draft(files: &dyn FileSystem, item: Item, variables: &Variables) -> Result<Draft, Fault> {
    if item.is_unified {
        return uki::draft(files, &item.path);
    }
    let at = |fault: Fault| in_entry(&item.path, fault);
    let linux = variables.expand(item.linux.as_deref().unwrap_or_default());
    let kernel = files.open(&linux).map_err(at)?;
    // GRUB's users name several files on one line.
    let initrd = variables.expand(&item.initrd.join(" "));
    let parts = initrd.split_whitespace().map(|path| files.open(path).map(Part::whole));
    let parts = parts.collect::<Result<Vec<_>, _>>();
    let title = if item.title.is_empty() { &item.id } else { &item.title };
    Ok(Draft {
        title: printable(title),
        path: printable(&linux),
        kernel: Part::whole(kernel),
        initramfs: parts.map_err(at)?,
        cmdline: variables.expand(&item.options.join(" ")),
    })
}

/// A fault with the entry that leads to it.
pub(crate) fn in_entry(entry: &str, fault: Fault) -> Fault {
    match fault {
        ending if ending.is_end() => ending,
        // The host's error is one of the whole disk.
        read @ Fault::Read(_) => read,
        local => Fault::Entry(printable(&format!("the entry {entry} cannot be booted: {local}"))),
    }
}

#[cfg(test)]
mod tests;
