// SPDX-License-Identifier: Apache-2.0

use std::fs;

use serde_json::{Value, json};

use super::*;

/// A made-up host with CPUs 0-7 and two nodes, of which each can give 8 GiB and has 4 free huge pages of 1 GiB. Node 2 has no memory.
struct Made {
    directory: tempfile::TempDir,
}

const POOL: &str = "hugepages/hugepages-1048576kB";

impl Made {
    fn new() -> Self {
        let made = Self { directory: tempfile::tempdir().unwrap() };
        for (path, text) in [
            ("devices/system/cpu/online", "0-7\n"),
            ("devices/system/node/has_memory", "0-1\n"),
            (
                "devices/system/node/node0/meminfo",
                "Node 0 MemTotal:        8388608 kB\nNode 0 MemFree:         8388608 kB\n",
            ),
            (
                "devices/system/node/node1/meminfo",
                "Node 1 MemTotal:       16777216 kB\nNode 1 MemFree:         5242880 kB\n\
                 Node 1 Active:          9437184 kB\nNode 1 Inactive:        9437184 kB\n\
                 Node 1 Active(anon):    7340032 kB\nNode 1 Inactive(anon):  7340032 kB\n\
                 Node 1 Active(file):    1048576 kB\nNode 1 Inactive(file):  2097152 kB\n",
            ),
        ] {
            made.write(path, text);
        }
        for (pool, free) in
            [("kernel/mm", "8\n"), ("devices/system/node/node0", "4\n"), ("devices/system/node/node1", "4\n")]
        {
            made.write(&format!("{pool}/{POOL}/free_hugepages"), free);
        }
        made
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.directory.path().join("sys").join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn topology(&self) -> Topology {
        Topology::new(self.directory.path().join("sys"))
    }

    /// A group that does not exist yet, below one that does.
    fn parent(&self) -> PathBuf {
        self.directory.path().join("sys/fs/cgroup/portcullis")
    }

    fn check(&self, members: &Value) -> Result<(), Problem> {
        self.topology().check(&self.parent(), &spec(members))
    }

    /// The code and the field of the refusal, and its text.
    fn refusal(&self, members: &Value) -> (ProblemCode, String, String) {
        let Problem { code, field, detail, .. } = self.check(members).unwrap_err();
        (code, field.unwrap_or_default().into(), detail)
    }
}

fn spec(members: &Value) -> VmSpec {
    let mut spec = json!({ "name": "web1", "memory": "4GiB", "cpus": 2, "boot": { "kernel": "k" } });
    spec.as_object_mut().unwrap().extend(members.as_object().unwrap().clone());
    serde_json::from_value(spec).unwrap()
}

#[test]
fn a_placement_that_the_host_can_have_passes() {
    let host = Made::new();
    for members in [
        json!({}),
        json!({ "placement": { "cpus": { "0": "4", "1": "5-7" }, "io_cpus": "0-3", "numa": 1 } }),
        json!({ "placement": { "numa": "of_adapters" } }),
        json!({ "hugepages": "1GiB", "placement": { "numa": 0 } }),
        json!({ "hugepages": "1GiB", "memory": "8GiB" }),
    ] {
        host.check(&members).unwrap();
    }
}

#[test]
fn cpus_must_be_online_and_in_the_cpuset_of_vms() {
    use ProblemCode::PlacementUnavailable as Unavailable;
    let host = Made::new();
    let placed = json!({ "placement": { "cpus": { "1": "6-9" } } });
    let (code, field, detail) = host.refusal(&placed);
    assert_eq!((code, field.as_str()), (Unavailable, "placement.cpus.1"));
    assert!(detail.contains("CPUs 8-9 are not online: name some of 0-7"), "{detail}");
    let (code, field, _) = host.refusal(&json!({ "placement": { "io_cpus": "8" } }));
    assert_eq!((code, field.as_str()), (Unavailable, "placement.io_cpus"));

    host.write("fs/cgroup/cpuset.cpus.effective", "0-5\n");
    let (code, _, detail) = host.refusal(&json!({ "placement": { "io_cpus": "4-7" } }));
    assert_eq!(code, Unavailable);
    assert!(detail.contains("lacks the CPUs 6-7: name some of 0-5"), "{detail}");
    // The nearest group counts.
    host.write("fs/cgroup/portcullis/cpuset.cpus.effective", "4-7\n");
    host.check(&json!({ "placement": { "io_cpus": "4-7" } })).unwrap();
}

#[test]
fn a_node_must_have_memory_and_be_in_the_cpuset_of_vms() {
    let host = Made::new();
    for (node, cause) in [(2, "no NUMA node 2 with memory: name one of 0-1"), (7, "no NUMA node 7")] {
        let (code, field, detail) = host.refusal(&json!({ "placement": { "numa": node } }));
        assert_eq!((code, field.as_str()), (ProblemCode::PlacementUnavailable, "placement.numa"));
        assert!(detail.contains(cause), "{detail}");
    }
    let (code, field, detail) = host.refusal(&json!({ "memory": "9GiB", "placement": { "numa": 1 } }));
    assert_eq!((code, field.as_str()), (ProblemCode::MemoryUnavailable, "memory"));
    assert!(detail.contains("9216 MiB") && detail.contains("only 8192 MiB"), "{detail}");
    host.check(&json!({ "memory": "8GiB", "placement": { "numa": 1 } })).unwrap();
    host.write("fs/cgroup/cpuset.mems.effective", "0\n");
    let (code, _, detail) = host.refusal(&json!({ "placement": { "numa": 1 } }));
    assert_eq!(code, ProblemCode::PlacementUnavailable);
    assert!(detail.contains("lacks the NUMA node 1"), "{detail}");
}

#[test]
fn huge_pages_must_be_free_on_the_node() {
    let host = Made::new();
    let giant = |memory: &str, numa: Value| {
        let placement = json!({ "numa": numa });
        json!({ "memory": memory, "hugepages": "1GiB", "placement": placement })
    };
    let (code, field, detail) = host.refusal(&giant("5GiB", json!(0)));
    assert_eq!((code, field.as_str()), (ProblemCode::MemoryUnavailable, "hugepages"));
    assert!(
        detail.contains("needs 5 huge pages of 1GiB, and its host has 4 free on the NUMA node 0"),
        "{detail}"
    );
    assert!(detail.contains(&format!("node0/{POOL}/nr_hugepages by 1")), "{detail}");
    host.check(&giant("5GiB", json!("of_adapters"))).unwrap();

    let pool = format!("kernel/mm/{POOL}");
    host.write(&format!("{pool}/resv_hugepages"), "4\n");
    assert!(host.refusal(&giant("5GiB", Value::Null)).2.contains("has 4 free:"));
    // Pages that the kernel may still add.
    host.write(&format!("{pool}/nr_overcommit_hugepages"), "3\n");
    host.write(&format!("{pool}/surplus_hugepages"), "2\n");
    host.check(&giant("5GiB", Value::Null)).unwrap();
    assert!(host.check(&giant("6GiB", Value::Null)).is_err());
    assert!(host.check(&giant("5GiB", json!(0))).is_err(), "the kernel may add them on another node");
    host.check(&giant("4GiB", json!(0))).unwrap();
    let (_, _, detail) = host.refusal(&json!({ "hugepages": true }));
    assert!(detail.contains("no huge pages of 2MiB"), "{detail}");
}

#[test]
fn memory_goes_to_the_node_of_the_functions_or_says_why_not() {
    let host = Made::new();
    let [one, two] = ["0000:01:10.0", "0000:81:10.0"].map(|bdf| bdf.parse::<Bdf>().unwrap());
    let place = |members: Value, functions: &[(Bdf, Option<u16>)]| {
        host.topology().place_memory(&host.parent(), &spec(&members), functions)
    };
    let of_adapters = || json!({ "placement": { "numa": "of_adapters" } });
    let node = |node| MemoryPlace { node, not_placed: None };
    assert_eq!(place(json!({}), &[(one, Some(1))]).unwrap(), node(None));
    assert_eq!(place(json!({ "placement": { "numa": 0 } }), &[(one, Some(1))]).unwrap(), node(Some(0)));
    assert_eq!(place(of_adapters(), &[(one, Some(1)), (two, Some(1))]).unwrap(), node(Some(1)));
    assert_eq!(place(of_adapters(), &[(one, None), (two, Some(0))]).unwrap(), node(Some(0)));
    for (functions, why) in [(vec![], "no adapters"), (vec![(one, None)], "knows no NUMA node")] {
        let MemoryPlace { node, not_placed } = place(of_adapters(), &functions).unwrap();
        assert!(node.is_none() && not_placed.unwrap().contains(why), "{why}");
    }
    let several = place(of_adapters(), &[(one, Some(0)), (two, Some(1))]).unwrap_err();
    assert_eq!(several.code, ProblemCode::PlacementUnavailable);
    let both = "0000:01:10.0 on node 0, 0000:81:10.0 on node 1";
    assert!(several.detail.contains(both), "{}", several.detail);
    // The node of the functions is checked as one of the specification.
    assert!(place(of_adapters(), &[(one, Some(2))]).is_err());
}

#[test]
fn the_status_is_that_of_the_kernel() {
    let host = Made::new();
    let proc = host.directory.path().join("proc");
    let thread = |id: u32, name: &str, cpus: &str| {
        let path = proc.join(format!("7/task/{id}"));
        fs::create_dir_all(&path).unwrap();
        let text = format!("Name:\t{name}\nUmask:\t0022\nCpus_allowed:\tff\nCpus_allowed_list:\t{cpus}\n");
        fs::write(path.join("status"), text).unwrap();
    };
    thread(7, "portcullis", "2");
    thread(8, "vcpu0", "4-5");
    thread(9, "vcpu13", "0-7");
    thread(10, "relay eth0", "3");
    thread(11, "kvm-nx-lpage-re", "4-5");
    let huge = |kib: u64| fs::write(proc.join("7/status"), format!("HugetlbPages:\t {kib} kB\n")).unwrap();
    huge(4 << 20);
    let memory = MemoryPlace { node: Some(1), not_placed: None };
    let of = |members: Value| status(&proc, 7, &spec(&members), Some(&memory));
    assert_eq!(of(json!({})), None);
    let found = of(json!({ "hugepages": "1GiB" })).unwrap();
    let expect = json!({
        "cpus": { "0": "4-5", "13": "0-7" }, "io_cpus": "2-3", "numa": 1, "page_size": "1GiB",
    });
    assert_eq!(serde_json::to_value(found).unwrap(), expect);
    huge(2 << 20);
    let found = of(json!({ "hugepages": true })).unwrap();
    assert_eq!(found.page_size, ORDINARY, "not all memory is in huge pages");
}
