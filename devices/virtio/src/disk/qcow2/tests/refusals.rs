// SPDX-License-Identifier: Apache-2.0

//! Each image that is refused, and the words of the refusal.

use super::*;

fn refusal(result: Result<Qcow2Disk, OpenError>) -> String {
    result.expect_err("the image is refused").to_string()
}

/// An image of 1 MiB with some bytes changed.
#[test]
fn headers_that_are_not_supported_are_refused() {
    let cases: &[(&str, u64, &[u8], &str)] = &[
        ("magic", 0, b"KDMV", "is not in the format qcow2"),
        ("version", 7, &[4], "has version 4 of qcow2"),
        ("version 1", 7, &[1], "has version 1 of qcow2"),
        ("cluster of 256 bytes", 23, &[8], "cluster_bits is 0x8"),
        ("cluster of 4 MiB", 23, &[22], "cluster_bits is 0x16"),
        ("cluster bits that overflow", 20, &[0xff; 4], "cluster_bits is 0xffffffff"),
        ("AES", 35, &[1], "is encrypted (method 1)"),
        ("LUKS", 35, &[2], "is encrypted (method 2)"),
        ("dirty", 79, &[1], "is marked as dirty: run `qemu-img check -r all`"),
        ("corrupt", 79, &[2], "is marked as corrupt"),
        ("data file", 79, &[4], "has its data in another file"),
        ("compression bit", 79, &[8], "has compression method 0"),
        ("zstd without its bit", 104, &[1], "has compression method 1"),
        ("extended L2", 79, &[16], "has extended L2 entries"),
        ("a later feature", 79, &[32], "unknown incompatible features 0x20"),
        ("the last feature", 72, &[0x80], "unknown incompatible features 0x8000000000000000"),
        ("refcount order", 99, &[7], "refcount_order is 0x7"),
        ("short header", 103, &[96], "header_length is 0x60"),
        ("odd header", 103, &[107], "header_length is 0x6b"),
        ("long header", 100, &[0, 2, 0, 0], "header_length is 0x20000"),
        ("size", 24, &[0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfe, 0], "and 2251799813685248 are supported"),
        ("L1 too small", 24, &[0, 0, 1, 0, 0, 0, 0, 0], "l1_size is 0x1"),
        ("L1 of 32 GiB", 36, &[0xff; 4], "l1_size is 0xffffffff"),
        ("L1 longer than the file", 36, &[0, 0x10, 0, 0], "l1_table_offset is"),
        ("L1 outside", 40, &[0, 0, 1], "l1_table_offset is"),
        ("L1 at an odd place", 47, &[8], "l1_table_offset is"),
        ("L1 over the header", 40, &[0; 8], "l1_table_offset is 0x0"),
        ("L1 over the refcounts", 40, &[0, 0, 0, 0, 0, 1, 0, 0], "l1_table_offset is 0x10000"),
        ("L1 that overflows", 40, &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0], "l1_table_offset is"),
        ("refcounts outside", 48, &[0x7f], "refcount_table_offset is"),
        ("no refcounts", 56, &[0; 4], "refcount_table_clusters is 0x0"),
        ("refcounts of 256 TiB", 56, &[0xff; 4], "refcount_table_clusters is 0xffffffff"),
        ("refcounts over the header", 48, &[0; 8], "refcount_table_offset is 0x0"),
        ("backing name outside", 8, &[0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 9], "backing_file_offset is 0x10000"),
        (
            "backing name in the header",
            8,
            &[0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 9],
            "backing_file_offset is 0x8",
        ),
        (
            "backing name of 1024 bytes",
            8,
            &[0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 4, 0],
            "backing_file_size is 0x400",
        ),
    ];
    let lab = Lab::new();
    lab.create("good.qcow2", "", "1M");
    for writable in [false, true] {
        for (name, at, bytes, expected) in cases {
            std::fs::copy(lab.path("good.qcow2"), lab.path("a.qcow2")).unwrap();
            patch(&lab, "a.qcow2", *at, bytes);
            let text = refusal(lab.try_open("a.qcow2", &[], writable));
            assert!(text.starts_with("The image ") && text.contains(expected), "{name}: {text}");
            assert!(text.contains("qemu-img") || text.contains("restore"), "{name} has a cure: {text}");
        }
        lab.try_open("good.qcow2", &[], writable).unwrap();
    }
}

#[test]
fn images_of_other_kinds_are_refused() {
    let lab = Lab::new();
    for (options, expected) in [
        ("-o data_file=data.raw", "has its data in another file"),
        ("-o extended_l2=on", "has extended L2 entries"),
        ("-o compression_type=zstd", "has compression method 1"),
    ] {
        lab.create("a.qcow2", options, "1M");
        let text = refusal(lab.try_open("a.qcow2", &[], false));
        assert!(text.contains(expected), "{text}");
    }
    lab.create("old.qcow2", "-o compat=0.10", "1M");
    lab.try_open("old.qcow2", &[], false).unwrap();
    let text = refusal(lab.try_open("old.qcow2", &[], true));
    assert!(text.contains("run `qemu-img amend -o compat=1.1`"), "{text}");
    lab.run("qemu-img amend -f qcow2 -o compat=1.1 old.qcow2");
    lab.try_open("old.qcow2", &[], true).unwrap();
    lab.create("snapshot.qcow2", "", "1M");
    lab.run("qemu-io -f qcow2 -c write~-P~7~0~64k snapshot.qcow2");
    lab.run("qemu-img snapshot -c one snapshot.qcow2");
    lab.run("qemu-io -f qcow2 -c write~-P~8~0~512 snapshot.qcow2");
    let mut disk = lab.try_open("snapshot.qcow2", &[], false).unwrap();
    assert_eq!(read(&mut disk, 0, 1024), [[8; 512], [7; 512]].concat());
    let text = refusal(lab.try_open("snapshot.qcow2", &[], true));
    assert!(text.contains("has internal snapshots"), "{text}");
    lab.run("qemu-img snapshot -d one snapshot.qcow2");
    write(&mut lab.try_open("snapshot.qcow2", &[], true).unwrap(), 0, &[9; 512]).unwrap();
    lab.check("snapshot.qcow2", false);
}

#[test]
fn files_that_are_cut_are_refused() {
    let lab = Lab::new();
    std::fs::write(lab.path("source.raw"), Random(1).bytes(1 << 20)).unwrap();
    for (options, tail) in
        [("", 0), ("-o compat=0.10", 0), ("-c", 0), ("-o cluster_size=2M", 0), ("-o cluster_size=512", 511)]
    {
        lab.run(&format!("qemu-img convert -f raw -O qcow2 {options} source.raw a.qcow2").replace("  ", " "));
        let whole = std::fs::read(lab.path("a.qcow2")).unwrap();
        for lost in [1 + tail, 4096, 70 << 10, 600 << 10] {
            let len = whole.len() - lost;
            std::fs::write(lab.path("a.qcow2"), &whole[..len]).unwrap();
            let result = lab.try_open("a.qcow2", &[], false);
            // The last sector of a compressed cluster has room behind the data.
            if options == "-c" && lost < 4096 || options.ends_with("2M") && lost <= 600 << 10 {
                continue;
            }
            let text = refusal(result);
            assert!(text.contains("is cut: data at 0x"), "{options} without {lost} bytes: {text}");
        }
        for len in [0, 3, 4, 71, 103] {
            std::fs::write(lab.path("a.qcow2"), &whole[..len]).unwrap();
            let text = refusal(lab.try_open("a.qcow2", &[], true));
            let expected = if len < 4 { "not in the format" } else { "ends within its header" };
            // The header of version 2 ends before; its tables are missing.
            if options.contains("0.10") && len == 103 {
                continue;
            }
            assert!(text.contains(expected), "{len} bytes: {text}");
        }
    }
}

/// Refcounts behind the end are leaks of a power cut. The image is good.
#[test]
fn refcounts_alone_may_be_behind_the_end() {
    let lab = Lab::new();
    lab.create("a.qcow2", "", "1M");
    patch(&lab, "a.qcow2", 2 * (64 << 10) + 2 * 20, &[0, 1, 0, 1]);
    lab.check("a.qcow2", true);
    let mut disk = lab.open("a.qcow2", &[]);
    write(&mut disk, 0, &Random(2).bytes(1 << 20)).unwrap();
    drop(disk);
    lab.check("a.qcow2", true);
    lab.compare("a.qcow2", &Random(2).bytes(1 << 20));
}

#[test]
fn chains_that_are_not_as_the_headers_have_them_are_refused() {
    let lab = Lab::new();
    std::fs::write(lab.path("base.raw"), vec![1; 1 << 20]).unwrap();
    lab.create("middle.qcow2", "-b base.raw -F raw", "1M");
    lab.create("top.qcow2", "-b middle.qcow2 -F qcow2", "1M");
    lab.create("alone.qcow2", "", "1M");
    let open = |name, backing: &[&str]| lab.try_open(name, backing, true);
    open("top.qcow2", &["middle.qcow2", "base.raw"]).unwrap();
    for (name, backing, expected) in [
        (
            "top.qcow2",
            &[][..],
            "The image has the backing file \"middle.qcow2\", and the disk's chain ends here",
        ),
        ("top.qcow2", &["middle.qcow2"], "Backing file 1 has the backing file \"base.raw\""),
        ("alone.qcow2", &["base.raw"], "The image has no backing file, and the disk's chain goes on"),
        ("top.qcow2", &["alone.qcow2", "base.raw"], "Backing file 1 has no backing file"),
        ("top.qcow2", &["middle.qcow2", "base.raw", "base.raw"], "Backing file 2 has no backing file"),
    ] {
        let text = refusal(open(name, backing));
        assert!(text.starts_with(expected) && text.contains("qemu-img rebase"), "{text}");
    }
    let long = vec!["middle.qcow2"; 17];
    assert!(refusal(open("top.qcow2", &long)).contains("more than 17 files"));
    // A raw file in the place of a qcow2 image: its bytes are not probed.
    std::fs::copy(lab.path("alone.qcow2"), lab.path("trap.raw")).unwrap();
    let mut disk = open("middle.qcow2", &["trap.raw"]).unwrap();
    assert_eq!(read(&mut disk, 0, 512)[..4], *b"QFI\xfb");
}
