// SPDX-License-Identifier: Apache-2.0

//! The default entry of GRUB's menu, as `grub-mkconfig` writes it.
//!
//! `grub.cfg` is a program. Nothing here runs it: an entry is taken only if its lines `linux` and `initrd` stand in it
//! literally, beside commands that do not change them. Another entry is an error that names the line.

use std::collections::BTreeMap;

use crate::{
    bls::in_entry,
    entry::Draft,
    error::{Fault, printable},
    filesystem::{FileSystem, MOST_TEXT, Part, text},
};

/// Menus of a root directory, and of a separate `/boot`.
const MENUS: [&str; 4] = ["/boot/grub/grub.cfg", "/boot/grub2/grub.cfg", "/grub/grub.cfg", "/grub2/grub.cfg"];
/// The most entries and submenus, and the most variables of one file.
const MOST_ITEMS: usize = 512;
/// The longest text in bytes that grows by the values of variables.
const MOST_EXPANDED: usize = 64 << 10;
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
pub(crate) fn find(files: &dyn FileSystem) -> Result<Draft, Fault> {
    for menu in MENUS {
        let text = match text(files, menu, MOST_TEXT) {
            Err(fault) if fault.is_absence() => continue,
            text => text?,
        };
        let variables = Variables::environment(files, &menu.replace("grub.cfg", "grubenv"))?;
        let (items, default) = parse(&text);
        let default = match default.as_deref() {
            Some("${saved_entry}" | "$saved_entry") => variables.get("saved_entry").unwrap_or_default(),
            other => other.unwrap_or_default(),
        };
        let item = choose(&items, default).ok_or_else(|| {
            let text = format!("{menu} has no entry for its default \"{}\"", printable(default));
            Fault::Entry(text)
        })?;
        return draft(files, menu, item, &variables);
    }
    Err(Fault::Absent(MENUS.join(", ")))
}

/// Variables with their literal values.
#[derive(Default)]
pub(crate) struct Variables(BTreeMap<String, String>);

impl Variables {
    /// Those of the environment block beside a menu, and of the menu's `set` commands outside of entries. A variable of the
    /// environment keeps its value: menus set it only if it is not there. `root` is the directory with GRUB's.
    pub(crate) fn read(files: &dyn FileSystem, root: &str) -> Result<Self, Fault> {
        let mut all = Self::default();
        for directory in ["grub2", "grub"] {
            let path = format!("{root}/{directory}/grubenv");
            for (name, value) in Self::environment(files, &path)?.0 {
                all.0.entry(name).or_insert(value);
            }
            let menu = match text(files, &format!("{root}/{directory}/grub.cfg"), MOST_TEXT) {
                Ok(menu) => menu,
                Err(ending) if ending.is_end() => return Err(ending),
                Err(_) => continue,
            };
            let mut open = 0_usize;
            for line in menu.lines() {
                let words = words(line);
                let mut words = words.iter().map(String::as_str);
                match (words.next(), words.next(), words.next_back()) {
                    (Some("}"), ..) => open = open.saturating_sub(1),
                    (.., Some("{")) => open = open.saturating_add(1),
                    (Some("set"), Some(word), _) if open == 0 && all.0.len() < MOST_ITEMS => {
                        if let Some((name, value)) = word.split_once('=').filter(|_| !word.contains('$')) {
                            all.0.entry(name.to_owned()).or_insert_with(|| value.to_owned());
                        }
                    }
                    _ => {}
                }
            }
        }
        Ok(all)
    }

    /// Those of an environment block. None without one.
    fn environment(files: &dyn FileSystem, path: &str) -> Result<Self, Fault> {
        let block = match text(files, path, MOST_TEXT) {
            Ok(block) => block,
            Err(fault) if fault.is_absence() => return Ok(Self::default()),
            Err(fault) => return Err(fault),
        };
        let lines = block.lines().filter(|line| !line.starts_with('#'));
        let values = lines.take(MOST_ITEMS).filter_map(|line| line.split_once('='));
        Ok(Self(values.map(|(name, value)| (name.to_owned(), value.trim_end().to_owned())).collect()))
    }

    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// A text with the values of `$name` and `${name}`, once. Other variables are empty, as in GRUB. The result has at most
    /// [`MOST_EXPANDED`] bytes.
    pub(crate) fn expand(&self, text: &str) -> String {
        let mut expanded = String::new();
        let mut parts = text.split('$');
        expanded.push_str(parts.next().unwrap_or_default());
        for part in parts {
            let braced = part.strip_prefix('{').and_then(|part| part.split_once('}'));
            let (name, rest) = braced.unwrap_or_else(|| {
                let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
                part.split_at(part.find(|c| !is_name(c)).unwrap_or(part.len()))
            });
            let value = self.get(name).unwrap_or_default();
            if expanded.len().saturating_add(value.len()) <= MOST_EXPANDED {
                expanded.push_str(value);
            }
            expanded.push_str(rest);
        }
        expanded
    }
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

/// An item without its lines, from the words of its first one.
fn item(words: &[String], open: &[Option<usize>]) -> Item {
    let option = words.iter().position(|word| word == "--id" || word == "$menuentry_id_option");
    Item {
        depth: open.iter().flatten().count(),
        is_submenu: words.first().is_some_and(|word| word == "submenu"),
        title: words.get(1).cloned().unwrap_or_default(),
        id: option.and_then(|at| words.get(at + 1)).cloned(),
        lines: Vec::new(),
    }
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
        let closes = words.last().is_some_and(|word| word == "}");
        let brace = words.iter().position(|word| word == "{");
        match first {
            "menuentry" if closes && brace.is_some() && items.len() < MOST_ITEMS => {
                let inner = brace.and_then(|at| words.get(at + 1..words.len() - 1)).unwrap_or_default();
                let lines = vec![inner.to_vec()];
                items.push(Item { lines, ..item(&words, &open) });
            }
            "menuentry" | "submenu" if opens && items.len() < MOST_ITEMS && open.len() < MOST_DEPTH => {
                let item = item(&words, &open);
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
        // GRUB takes the first entry for a default that is not there.
        let (at, item) = number.or_else(named).or_else(|| of_level().next())?;
        if !item.is_submenu {
            return Some(item);
        }
        let below = level.get(at + 1..)?;
        let end = below.iter().position(|other| other.depth <= depth).unwrap_or(below.len());
        (level, depth) = (below.get(..end)?, depth + 1);
    }
    None
}

/// The condition of Ubuntu's images that boot without an initramfs first (`GRUB_FORCE_PARTUUID`). The environment says whether
/// that has failed.
const INITRD_FAIL: [&str; 5] = ["[", "${initrdfail}", "=", "1", "]"];

fn draft(files: &dyn FileSystem, menu: &str, item: &Item, variables: &Variables) -> Result<Draft, Fault> {
    let entry = format!("\"{}\" of {menu}", item.title);
    let refuse = |line: &[String], why: &str| {
        in_entry(&entry, Fault::Entry(format!("its line \"{}\" {why}", line.join(" "))))
    };
    let (mut linux, mut initrd) = (None::<&[String]>, Vec::new());
    // Whether each open condition holds. None for one that is not known here.
    let mut conditions: Vec<Option<bool>> = Vec::new();
    for line in &item.lines {
        // `if [ … ]; then COMMAND; fi` on one line has several commands.
        for command in line.split(|word| word == ";") {
            let mut command = command;
            while let Some((first, rest)) = command.split_first() {
                match first.as_str() {
                    "if" => {
                        let holds = variables.get("initrdfail") == Some("1");
                        conditions.push((rest == INITRD_FAIL).then_some(holds));
                    }
                    "fi" => drop(conditions.pop()),
                    "else" => {
                        if let Some(Some(holds)) = conditions.last_mut() {
                            *holds = !*holds;
                        }
                    }
                    "elif" => {
                        if let Some(last) = conditions.last_mut() {
                            *last = None;
                        }
                    }
                    "then" => {}
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
            if conditions.contains(&Some(false)) {
                continue;
            }
            if conditions.contains(&None) {
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
        cmdline: options.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" "),
    })
}

/// A word of the kernel's command line, as GRUB writes it (`grub_create_loader_cmdline`).
fn quoted(word: &str) -> String {
    let mut escaped = String::new();
    for c in word.chars() {
        if matches!(c, '\\' | '\'' | '"') {
            escaped.push('\\');
        }
        escaped.push(c);
    }
    if word.contains(' ') { format!("\"{escaped}\"") } else { escaped }
}

#[cfg(test)]
mod tests;
