// SPDX-License-Identifier: Apache-2.0

use super::*;
use crate::testing::{ESP, LINUX, boot, booted, ext4, fat, gpt, refusal};

#[test]
fn an_entry_has_several_parts_and_options() {
    let entry = "# comment\ntitle  Debian GNU/Linux\nversion 6.1\nlinux /k\ninitrd /a\ninitrd /b\noptions root=LABEL=root\t ro\noptions quiet\n";
    let image = ext4(&[("boot/loader/entries/a.conf", entry), ("k", "kernel"), ("a", "one"), ("b", "two")]);
    let expect = (
        "kernel".to_owned(),
        vec!["one".to_owned(), "two".to_owned()],
        "root=LABEL=root ro quiet".to_owned(),
    );
    assert_eq!(booted(&image), expect);
}

/// The kernel's path is the name of the entry, so that the test sees the entry that was chosen.
fn chosen(entries: &[(&str, &str)], configuration: &str) -> String {
    let mut files = vec![("loader/loader.conf".to_owned(), configuration.to_owned())];
    for (number, (name, text)) in entries.iter().enumerate() {
        files.push((format!("loader/entries/{name}.conf"), format!("linux /k{number}\n{text}")));
        files.push((format!("k{number}"), (*name).to_owned()));
    }
    let files: Vec<(&str, &str)> = files.iter().map(|(path, text)| (path.as_str(), text.as_str())).collect();
    booted(&fat(1 << 20, &files)).0
}

#[test]
fn the_newest_entry_comes_first_unless_another_one_is_the_default() {
    let entries = [("os-6.1.0-9", ""), ("os-6.1.0-13", ""), ("os-6.1.0-10", "")];
    for (configuration, expect) in [
        ("", "os-6.1.0-13"),
        ("timeout 3\ndefault os-6.1.0-9.conf\n", "os-6.1.0-9"),
        ("default os-*-10", "os-6.1.0-10"),
        ("default OS-6.1.0-?", "os-6.1.0-9"),
        ("default *", "os-6.1.0-13"),
        ("default other-*", "os-6.1.0-13"),
        ("default os-6.1.0-9\ndefault @saved", "os-6.1.0-13"),
    ] {
        assert_eq!(chosen(&entries, configuration), expect, "{configuration}");
    }
}

#[test]
fn keys_and_counters_sort_entries() {
    // With a key before without one, keys in their order, then versions.
    let keys = [
        ("z", ""),
        ("a", "sort-key debian\nversion 9"),
        ("b", "sort-key debian\nversion 10"),
        ("c", "sort-key fedora\nversion 99"),
    ];
    assert_eq!(chosen(&keys, ""), "b");
    // No attempts left: behind all others.
    assert_eq!(chosen(&[("os-2+0-3", ""), ("os-1+2-1", "")], ""), "os-1+2-1");
    assert_eq!(chosen(&[("os-2+1", ""), ("os-1", "")], ""), "os-2+1");
    assert_eq!(chosen(&[("os-2", "architecture aa64"), ("os-1", "architecture X64")], ""), "os-1");
    assert_eq!(id("os+3-x.conf", ".conf"), Some(("os+3-x".to_owned(), false)));
    assert_eq!(id(".conf", ".conf"), None);
    assert_eq!(id("ö", ".conf"), None);
}

#[test]
fn an_entry_that_cannot_be_booted_is_named() {
    for (text, expect) in [
        ("linux /absent", "the entry /loader/entries/a.conf cannot be booted: there is no /absent"),
        ("linux $absent/other", "the entry /loader/entries/a.conf cannot be booted: there is no /other"),
        ("linux /k\ninitrd /k $tuned_initrd /initrd", "there is no /initrd"),
        ("linux /loader", "there is no /loader"),
        ("title only", "there is no /loader/entries, /EFI/Linux"),
    ] {
        let error = refusal(&fat(1 << 20, &[("loader/entries/a.conf", text), ("k", "k")]));
        assert!(error.contains(expect), "{text}: {error}");
    }
}

/// As Fedora has them: variables of GRUB in entries, and the default in GRUB's environment.
#[test]
fn variables_of_grub_are_expanded() {
    let entry =
        |kernel: &str| format!("linux /{kernel}\ninitrd /a $tuned_initrd /b\noptions $kernelopts ${{more}}x");
    let (old, new) = (entry("old"), entry("new"));
    let image = |environment: &str, menu: &str| {
        ext4(&[
            ("loader/entries/os-1.conf", &old),
            ("loader/entries/os-2.conf", &new),
            ("grub2/grubenv", environment),
            ("grub2/grub.cfg", menu),
            ("old", "old"),
            ("new", "new"),
            ("a", "a"),
            ("b", "b"),
        ])
    };
    let menu =
        "if [ -z \"${kernelopts}\" ]; then\n  set kernelopts=\"root=/dev/vda1 ro \"\nfi\nset more=$other\n";
    for (environment, menu, kernel, cmdline) in [
        ("", "", "new", "x"),
        ("", menu, "new", "root=/dev/vda1 ro x"),
        ("kernelopts=root=/dev/vda3 quiet\nmore=1\n####", menu, "new", "root=/dev/vda3 quiet 1x"),
        ("saved_entry=os-1\n", "", "old", "x"),
        ("saved_entry=1\n", "", "old", "x"),
        ("saved_entry=absent\n", "", "new", "x"),
    ] {
        let (found, parts, words) = booted(&image(environment, menu));
        assert_eq!((found.as_str(), parts.len(), words.as_str()), (kernel, 2, cmdline), "{environment}");
    }
}

/// As systemd-boot has it: the configuration is on the ESP, and entries are on both partitions.
#[test]
fn partitions_for_boot_loaders_have_one_menu() {
    let extended = u128::from_le_bytes(*b"\xff\xc2\x13\xbc\xe6\x59\x62\x42\xa3\x52\xb2\x75\xfd\x6f\x71\x72");
    let larger = ext4(&[
        ("loader/loader.conf", "default os-1"),
        ("loader/entries/os-2.conf", "linux /two"),
        ("loader/entries/os-3.conf", "linux /three"),
        ("two", "two"),
        ("three", "three"),
    ]);
    let root = ext4(&[("loader/entries/os-9.conf", "linux /nine"), ("nine", "nine")]);
    for (configuration, expect, volume) in [
        (None, "one", "partition 3 (for boot loaders), FAT"),
        (Some("timeout 3"), "three", "partition 1 (for boot loaders), ext4"),
        (Some("default os-2"), "two", "partition 1 (for boot loaders), ext4"),
        (Some("default os-9"), "three", "partition 1 (for boot loaders), ext4"),
    ] {
        let mut files = vec![("loader/entries/os-1.conf", "linux /one"), ("one", "one")];
        files.extend(configuration.map(|text| ("loader/loader.conf", text)));
        let esp = fat(1 << 20, &files);
        let image = gpt(&[(extended, &larger), (LINUX, &root), (ESP, &esp)]);
        let entry = boot(&image).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(entry.kernel, expect.as_bytes(), "{configuration:?}");
        assert_eq!(entry.found.volume, volume);
    }
}

#[test]
fn a_long_pattern_is_none() {
    assert_eq!(default(&format!("default {}", "A".repeat(255))), Some("a".repeat(255)));
    assert_eq!(default(&format!("default {}", "a".repeat(256))), None);
}

#[test]
fn a_pattern_ends_soon() {
    let begun = std::time::Instant::now();
    assert!(!matches(&format!("{}b", "*a".repeat(100)), &"a".repeat(10_000)));
    assert!(begun.elapsed() < std::time::Duration::from_secs(2));
    assert!(matches("a*", "ab") && matches("*b", "ab"));
    assert!(matches("a*b?", "axxbc") && !matches("a*b?", "axxb") && matches("*", "") && !matches("", "a"));
}
