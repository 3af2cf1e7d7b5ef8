// SPDX-License-Identifier: Apache-2.0

use super::{MOST_DEPTH, MOST_ITEMS, parse};
use crate::testing::{booted, ext4, refusal};

/// As Debian's `update-grub` writes it, shortened.
const DEBIAN: &str = r#"
if [ -s $prefix/grubenv ]; then
  set have_grubenv=true
  load_env
fi
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
   set next_entry=
   save_env next_entry
   set boot_once=true
else
   set default="DEFAULT"
fi
function load_video {
  if [ x$feature_all_video_module = xy ]; then
    insmod all_video
  fi
}
menuentry 'Debian GNU/Linux' --class debian --class os $menuentry_id_option 'gnulinux-simple-1' {
	load_video
	insmod gzio
	if [ x$grub_platform = xxen ]; then insmod xzio; insmod lzopio; fi
	set root='hd0,gpt1'
	if [ x$feature_platform_search_hint = xy ]; then
	  search --no-floppy --fs-uuid --set=root --hint-bios=hd0,gpt1  1-2-3
	else
	  search --no-floppy --fs-uuid --set=root 1-2-3
	fi
	echo	'Loading Linux 6.1 ...'
	linux	/boot/vmlinuz-6.1 root=UUID=1-2-3 ro  console=tty0 "name=a b"
	echo	'Loading initial ramdisk ...'
	initrd	/boot/initrd.img-6.1
}
submenu 'Advanced options' $menuentry_id_option 'gnulinux-advanced-1' {
	menuentry 'Debian, with Linux 6.1' $menuentry_id_option 'gnulinux-6.1-advanced-1' {
		linux	/boot/vmlinuz-6.1 root=UUID=1-2-3 ro
		initrd	/boot/initrd.img-6.1 /boot/second
	}
	menuentry 'Debian, with Linux 5.10' $menuentry_id_option 'gnulinux-5.10-advanced-1' {
		linux	/boot/vmlinuz-5.10 root=UUID=1-2-3 ro
	}
}
submenu 'Other systems' {
	menuentry 'Other' {
		linux	/boot/vmlinuz-5.10
	}
}
menuentry 'Memory test' { linux16 /boot/memtest }
menuentry 'Variable' --id variable {
	linux /boot/vmlinuz-6.1 root=$root
}
"#;

fn image(menu: &str, environment: &str) -> Vec<u8> {
    ext4(&[
        ("boot/grub/grub.cfg", menu),
        ("boot/grub/grubenv", environment),
        ("boot/vmlinuz-6.1", "new"),
        ("boot/vmlinuz-5.10", "old"),
        ("boot/initrd.img-6.1", "initramfs"),
        ("boot/second", "second"),
        ("boot/memtest", "memory"),
    ])
}

#[test]
fn the_default_entry_is_booted() {
    for (default, environment, kernel, parts, cmdline) in [
        ("0", "", "new", 1, "root=UUID=1-2-3 ro console=tty0 \"name=a b\""),
        ("", "", "new", 1, "root=UUID=1-2-3 ro console=tty0 \"name=a b\""),
        // As GRUB: the first entry for one that is not there.
        ("9", "", "new", 1, "root=UUID=1-2-3 ro console=tty0 \"name=a b\""),
        ("absent", "", "new", 1, "root=UUID=1-2-3 ro console=tty0 \"name=a b\""),
        ("1>9", "", "new", 2, "root=UUID=1-2-3 ro"),
        ("3", "", "memory", 0, ""),
        ("1", "", "new", 2, "root=UUID=1-2-3 ro"),
        ("1>1", "", "old", 0, "root=UUID=1-2-3 ro"),
        ("Advanced options>Debian, with Linux 5.10", "", "old", 0, "root=UUID=1-2-3 ro"),
        ("gnulinux-advanced-1>gnulinux-5.10-advanced-1", "", "old", 0, "root=UUID=1-2-3 ro"),
        (
            "${saved_entry}",
            "# GRUB Environment Block\nsaved_entry=1>gnulinux-5.10-advanced-1\n####",
            "old",
            0,
            "root=UUID=1-2-3 ro",
        ),
        ("${saved_entry}", "", "new", 1, "root=UUID=1-2-3 ro console=tty0 \"name=a b\""),
    ] {
        let (found, initramfs, words) = booted(&image(&DEBIAN.replace("DEFAULT", default), environment));
        assert_eq!((found.as_str(), initramfs.len(), words.as_str()), (kernel, parts, cmdline), "{default}");
    }
}

#[test]
fn an_entry_that_is_not_literal_is_refused_with_its_line() {
    let entry = |line: &str| format!("menuentry 'x' {{\n{line}\n}}\n");
    for (menu, expect) in [
        (
            DEBIAN.replace("DEFAULT", "variable"),
            "its line \"linux /boot/vmlinuz-6.1 root=$root\" has a variable",
        ),
        (entry("if [ a ]; then\n linux /boot/vmlinuz-6.1\nfi"), "depends on a condition"),
        (entry("linux /boot/vmlinuz-6.1\nlinux /boot/vmlinuz-5.10"), "is the second one"),
        (entry("chainloader +1"), "has a command that is not known here"),
        (entry("linux /boot/vmlinuz-6.1\nsource /boot/other"), "has a command that is not known here"),
        (entry("linux ${p}/vmlinuz"), "has a variable"),
        (entry("linux (hd0,gpt1)/boot/vmlinuz-6.1"), "there is no (hd0,gpt1)/boot/vmlinuz-6.1"),
        (entry("echo nothing"), "has no line with linux"),
        (String::new(), "has no entry for its default"),
    ] {
        let error = refusal(&image(&menu, ""));
        assert!(error.contains(expect), "{expect}: {error}");
    }
}

/// As Ubuntu's minimal images have it.
#[test]
fn an_entry_without_an_initramfs_is_tried_until_it_has_failed() {
    let menu = r#"
menuentry 'Ubuntu' {
	recordfail
	if [ "${initrdfail}" = 1 ]; then
	  echo 'GRUB_FORCE_PARTUUID set, initrdless boot failed. Attempting with initrd.'
	  linux	/boot/vmlinuz-5.10 root=PARTUUID=1 ro
	  initrd	/boot/initrd.img-6.1
	else
	  echo 'GRUB_FORCE_PARTUUID set, attempting initrdless boot.'
	  linux	/boot/vmlinuz-6.1 root=PARTUUID=1 ro panic=-1
	fi
	initrdfail
}"#;
    for (environment, kernel, count, cmdline) in [
        ("", "new", 0, "root=PARTUUID=1 ro panic=-1"),
        ("initrdfail=0\n", "new", 0, "root=PARTUUID=1 ro panic=-1"),
        ("initrdfail=1\n", "old", 1, "root=PARTUUID=1 ro"),
    ] {
        let (found, parts, words) = booted(&image(menu, environment));
        assert_eq!((found.as_str(), parts.len(), words.as_str()), (kernel, count, cmdline), "{environment}");
    }
    let error = refusal(&image(&menu.replace("else", "elif [ a ]; then"), ""));
    assert!(error.contains("depends on a condition"), "{error}");
}

#[test]
fn words_are_quoted_as_grub_does() {
    for (word, expect) in [("a=b", "a=b"), ("a=b c", "\"a=b c\""), (r#"a"b\'"#, r#"a\"b\\\'"#)] {
        assert_eq!(super::quoted(word), expect);
    }
}

#[test]
fn menus_of_any_text_end() {
    for (text, count, depth) in [
        ("submenu a {\n", MOST_DEPTH, MOST_DEPTH - 1),
        ("function a {\n", 0, 0),
        ("menuentry a {\n}\n", MOST_ITEMS, 0),
        ("menuentry a { linux /k }\n", MOST_ITEMS, 0),
        ("submenu a {\n}\n", MOST_ITEMS, 0),
    ] {
        let (items, _) = parse(&text.repeat(20_000));
        let deepest = items.iter().map(|item| item.depth).max().unwrap_or_default();
        assert_eq!((items.len(), deepest), (count, depth), "{text}");
    }
    for text in
        ["{".repeat(100_000), "submenu a {\n".repeat(20_000), "}\n".repeat(20_000), "menuentry '".to_owned()]
    {
        refusal(&image(&text, ""));
    }
}
