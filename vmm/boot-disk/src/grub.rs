// SPDX-License-Identifier: Apache-2.0

//! The default entry of GRUB's menu, as `grub-mkconfig` writes it.
//!
//! `grub.cfg` is a program. Nothing here runs it: an entry is taken only if its lines `linux` and `initrd` stand in it
//! literally, beside commands that do not change them. Another entry is an error that names the line.

use crate::{
    bls::in_entry,
    entry::Draft,
    error::{Fault, printable},
    filesystem::{FileSystem, MOST_TEXT, Part, text},
};

/// Menus of a root directory, and of a separate `/boot`.
const MENUS: [&str; 4] = ["/boot/grub/grub.cfg", "/boot/grub2/grub.cfg", "/grub/grub.cfg", "/grub2/grub.cfg"];
/// The most entries and submenus.
const MOST_ITEMS: usize = 512;
/// The deepest submenu.
const MOST_DEPTH: usize = 8;
/// Commands in an entry that change neither its kernel nor its command line.
const HARMLESS: [&str; 18] = [
    "load_video",
    "insmod",
    "echo",
    "search",
    "recordfail",
    "savedefault",
    "gfxmode",
    "set",
    "terminal_output",
    "terminal_input",
    "clear",
    "true",
    "false",
    "[",
    "test",
    "export",
    "fwsetup",
    "initrdfail",
];

/// An entry or a submenu. Items are in the order of the file, each submenu before its own.
#[derive(Debug, Default)]
struct Item {
    depth: usize,
    is_submenu: bool,
    title: String,
    id: Option<String>,
    lines: Vec<Vec<String>>,
}

/// The entry that GRUB would boot.
pub(crate) fn find(files: &dyn FileSystem, _notes: &mut Vec<String>) -> Result<Draft, Fault> {
    for menu in MENUS {
        let text = match text(files, menu, MOST_TEXT) {
            Err(fault) if fault.is_absence() => continue,
            text => text?,
        };
        let saved = match self::text(files, &menu.replace("grub.cfg", "grubenv"), MOST_TEXT) {
            Ok(environment) => saved(&environment),
            Err(fault) if fault.is_absence() => None,
            Err(fault) => return Err(fault),
        };
        let (items, default) = parse(&text);
        let default = match default.as_deref() {
            Some("${saved_entry}" | "$saved_entry") => saved.unwrap_or_default(),
            other => other.unwrap_or_default().to_owned(),
        };
        let item = choose(&items, &default).ok_or_else(|| {
            let text = format!("{menu} has no entry for its default \"{}\"", printable(&default));
            Fault::Entry(text)
        })?;
        return draft(files, menu, item);
    }
    Err(Fault::Absent(MENUS.join(", ")))
}

/// `saved_entry` in GRUB's environment block.
fn saved(environment: &str) -> Option<String> {
    let value = environment.lines().find_map(|line| line.strip_prefix("saved_entry="))?;
    Some(value.trim_end().to_owned())
}

/// Splits a line into words. Quotes are removed; a variable in one leaves its `$` behind, but in single quotes it is text,
/// which `draft` refuses all the same.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    let mut letters = line.chars();
    while let Some(c) = letters.next() {
        match (c, quote) {
            ('\\', None | Some('"')) => word.get_or_insert_default().extend(letters.next()),
            (c, Some(open)) if c == open => quote = None,
            (c, Some(_)) => word.get_or_insert_default().push(c),
            ('\'' | '"', None) => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            ('#', None) if word.is_none() => break,
            (c, None) if c.is_whitespace() => words.extend(word.take()),
            (';' | '{' | '}', None) => {
                // `${name}` is one word.
                if c != ';' && word.as_ref().is_some_and(|word| word.contains('$')) {
                    word.get_or_insert_default().push(c);
                } else {
                    words.extend(word.take());
                    words.push(c.to_string());
                }
            }
            (c, None) => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// The items of a menu, and the last literal default, or that of the saved entry.
fn parse(text: &str) -> (Vec<Item>, Option<String>) {
    let (mut items, mut default) = (Vec::<Item>::new(), None);
    // The open blocks: the numbers of items, and None for functions.
    let mut open: Vec<Option<usize>> = Vec::new();
    for line in text.lines() {
        let mut words = words(line);
        let first = words.first().map(String::as_str).unwrap_or_default();
        let opens = words.last().is_some_and(|word| word == "{");
        match first {
            "menuentry" | "submenu" if opens && items.len() < MOST_ITEMS && open.len() < MOST_DEPTH => {
                let option = words.iter().position(|word| word == "--id" || word == "$menuentry_id_option");
                let item = Item {
                    depth: open.iter().flatten().count(),
                    is_submenu: first == "submenu",
                    title: words.get(1).cloned().unwrap_or_default(),
                    id: option.and_then(|at| words.get(at + 1)).cloned(),
                    lines: Vec::new(),
                };
                open.push(Some(items.len()));
                items.push(item);
            }
            "}" => drop(open.pop()),
            _ if opens && open.len() < MOST_DEPTH => open.push(None),
            _ => match open.last() {
                Some(Some(number)) => {
                    if let Some(item) = items.get_mut(*number).filter(|_| !words.is_empty()) {
                        item.lines.push(std::mem::take(&mut words));
                    }
                }
                Some(None) => {}
                None => {
                    let value = words.get(1).and_then(|word| word.strip_prefix("default="));
                    if let ("set", Some(value)) = (first, value) {
                        // An entry for one boot only would have to be removed, and the disk is only read.
                        let is_known = !value.contains('$') || value.contains("saved_entry");
                        default = is_known.then(|| value.to_owned()).or(default);
                    }
                }
            },
        }
    }
    (items, default)
}

/// The entry of a default: a number, a title or an id, or several of them with `>` for submenus.
fn choose<'a>(items: &'a [Item], default: &str) -> Option<&'a Item> {
    let mut level = items;
    let mut depth = 0;
    let mut way = default.split('>').map(str::trim);
    // At most one turn for each submenu on the way.
    for _ in 0..MOST_DEPTH {
        let wanted = way.next().unwrap_or_default();
        let wanted = if wanted.is_empty() { "0" } else { wanted };
        let of_level = || level.iter().enumerate().filter(|(_, item)| item.depth == depth);
        let number = wanted.parse::<usize>().ok().and_then(|number| of_level().nth(number));
        let named =
            || of_level().find(|(_, item)| item.id.as_deref() == Some(wanted) || item.title == wanted);
        let (at, item) = number.or_else(named)?;
        if !item.is_submenu {
            return Some(item);
        }
        let below = level.get(at + 1..)?;
        let end = below.iter().position(|other| other.depth <= depth).unwrap_or(below.len());
        (level, depth) = (below.get(..end)?, depth + 1);
    }
    None
}

fn draft(files: &dyn FileSystem, menu: &str, item: &Item) -> Result<Draft, Fault> {
    let entry = format!("\"{}\" of {menu}", item.title);
    let refuse = |line: &[String], why: &str| {
        in_entry(&entry, Fault::Entry(format!("its line \"{}\" {why}", line.join(" "))))
    };
    let (mut linux, mut initrd) = (None::<&[String]>, Vec::new());
    let mut conditions = 0_usize;
    for line in &item.lines {
        // `if [ … ]; then COMMAND; fi` on one line has several commands.
        for command in line.split(|word| word == ";") {
            let mut command = command;
            while let Some((first, rest)) = command.split_first() {
                match first.as_str() {
                    "if" => conditions += 1,
                    "fi" => conditions = conditions.saturating_sub(1),
                    "then" | "else" | "elif" => {}
                    _ => break,
                }
                command = rest;
            }
            let Some((name, arguments)) = command.split_first() else { continue };
            let is_kernel = matches!(name.as_str(), "linux" | "linuxefi" | "linux16");
            let is_initrd = matches!(name.as_str(), "initrd" | "initrdefi" | "initrd16");
            if !is_kernel && !is_initrd {
                if !HARMLESS.contains(&name.as_str()) {
                    return Err(refuse(command, "has a command that is not known here"));
                }
                continue;
            }
            if conditions > 0 {
                return Err(refuse(command, "depends on a condition"));
            }
            if arguments.iter().any(|word| word.contains('$')) {
                return Err(refuse(command, "has a variable"));
            }
            match is_kernel {
                true if linux.is_some() => return Err(refuse(command, "is the second one with a kernel")),
                true => linux = Some(arguments),
                false => initrd.extend(arguments),
            }
        }
    }
    let none = || in_entry(&entry, Fault::Entry("it has no line with linux and a kernel".to_owned()));
    let (path, options) = linux.and_then(<[String]>::split_first).ok_or_else(none)?;
    let in_item = |fault: Fault| in_entry(&entry, fault);
    let kernel = files.open(path).map_err(in_item)?;
    let parts = initrd.iter().map(|path| files.open(path).map(Part::whole)).collect::<Result<Vec<_>, _>>();
    Ok(Draft {
        title: printable(&item.title),
        path: printable(path),
        kernel: Part::whole(kernel),
        initramfs: parts.map_err(in_item)?,
        cmdline: options.join(" "),
    })
}

#[cfg(test)]
mod tests;
