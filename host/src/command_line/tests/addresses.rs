// SPDX-License-Identifier: Apache-2.0

//! Addresses that `apply` cannot give to an adapter.

use super::*;

fn vm(name: &str, mac: &str) -> String {
    let mac = if mac.is_empty() { String::new() } else { format!(r#", "mac": "{mac}""#) };
    format!(
        r#"{{ "name": "{name}", "memory": "2MiB", "boot": {{ "kernel": "kernel" }},
            "adapters": [{{ "id": "eth0"{mac} }}] }}"#
    )
}

const A: &str = "02:00:00:00:44:0a";
const B: &str = "02:00:00:00:44:0b";

/// An address in use is found before anything is made, and a dry run reports it.
#[tokio::test]
async fn apply_foresees_addresses_that_are_in_use() {
    let desk = Desk::new().await;
    desk.run(&format!("vm create {}", desk.file("there.json", &vm("there", A)))).await.unwrap();
    desk.run(&format!("vm create {}", desk.file("made.json", &vm("made", "")))).await.unwrap();
    let made = desk.json("vm show made").await["status"]["adapters"][0]["mac"].as_str().unwrap().to_owned();
    // A guest that has taken another address than its adapter's.
    desk.run("port-group patch default --mac-changes accept").await.unwrap();
    desk.boot("moved", "default").await;
    desk.asks("moved", r#"{"set_mac": "02:00:00:00:44:0c"}"#, 1).await;

    let directory = tempfile::tempdir().unwrap();
    let apply = format!("apply -f {}", directory.path().display());
    for (files, refused) in [
        // Two files; an existing VM with an address of its file or of the agent, and one with a guest that has
        // taken the address.
        (vec![("x", B), ("y", B)], Some(("y", "x"))),
        (vec![("x", A)], Some(("x", "there"))),
        (vec![("x", &*made)], Some(("x", "made"))),
        (vec![("x", "02:00:00:00:44:0c")], Some(("x", "moved"))),
        // One after the other: the address is free only after its VM has changed.
        (vec![("a", A), ("there", B)], Some(("a", "there"))),
        (vec![("there", A), ("x", B)], None),
        (vec![("there", B), ("x", "")], None),
        (vec![("made", B), ("there", A), ("z", &*made)], None),
    ] {
        for (name, mac) in &files {
            std::fs::write(directory.path().join(format!("{name}.json")), vm(name, mac)).unwrap();
        }
        let before = desk.json("vm list").await;
        let dry = desk.run_into(&format!("{apply} --dry-run"), &mut Vec::new()).await;
        assert_eq!(desk.json("vm list").await, before, "{files:?}: a dry run changes nothing");
        let done = desk.run_into(&apply, &mut Vec::new()).await;
        match refused {
            None => assert!(dry.is_ok() && done.is_ok(), "{files:?}: {dry:?} {done:?}"),
            Some((file, owner)) => {
                for error in [dry.unwrap_err(), done.unwrap_err()] {
                    let told: serde_json::Value = serde_json::from_str(&error.text(Format::Json)).unwrap();
                    let problem = (&told["code"], &told["field"], error.code());
                    assert_eq!(problem, (&"mac_in_use".into(), &"adapters[0].mac".into(), 5), "{told}");
                    let (path, detail) = (told["file"].as_str().unwrap(), told["detail"].as_str().unwrap());
                    assert!(path.ends_with(&format!("/{file}.json")), "{files:?}: {told}");
                    assert!(detail.contains(&format!("of the VM {owner}: choose another")), "{told}");
                }
                assert_eq!(desk.json("vm list").await, before, "{files:?}: nothing of it was made");
            }
        }
        // Restores the VMs for the next case.
        for (name, _) in &files {
            std::fs::remove_file(directory.path().join(format!("{name}.json"))).unwrap();
            if !["there", "made"].contains(name) && refused.is_none() {
                desk.run(&format!("vm delete {name}")).await.unwrap();
            }
        }
        desk.run(&format!("vm set made --file {}", desk.file("made.json", &vm("made", "")))).await.unwrap();
        desk.run(&format!("vm set there --file {}", desk.file("there.json", &vm("there", A)))).await.unwrap();
    }
    desk.agent.stop_all(PATIENCE).await;
}
