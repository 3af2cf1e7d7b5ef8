// SPDX-License-Identifier: Apache-2.0

//! Names of objects that do not exist.

use super::*;

/// The message about any missing object has its name, near names that the user may have meant, and the command that lists
/// the others.
#[tokio::test]
async fn a_name_of_nothing_is_answered_with_near_names_and_the_command_that_lists_them() {
    let desk = Desk::new().await;
    desk.run("switch set backbone").await.unwrap();
    desk.run("port-group set storage --switch backbone").await.unwrap();
    for name in ["web1", "web2", "database"] {
        let text = format!(
            r#"{{ "name": "{name}", "memory": "2MiB", "boot": {{ "kernel": "kernel" }}, "adapters": [{{ "id": "eth0" }}] }}"#
        );
        desk.run(&format!("vm create {}", desk.file("vm.json", &text))).await.unwrap();
    }
    let vm = |group: &str, kernel: &str| {
        let text = format!(
            r#"{{ "name": "new", "memory": "2MiB", "boot": {{ "kernel": "{kernel}" }},
                "adapters": [{{ "id": "eth0", "port_group": "{group}" }}] }}"#
        );
        desk.file(&format!("{group}-{kernel}.json"), &text)
    };
    let (group, apply) = (vm("storag", "kernel"), vm("sotrage", "kernel"));
    for (line, expect) in [
        ("vm show web3", "There is no VM web3: did you mean web1 or web2? `portcullis vm list` shows all."),
        ("vm delete Database", "did you mean database? `portcullis vm list`"),
        ("vm boot nothing-like-it", "no VM nothing-like-it: `portcullis vm list` shows those that exist."),
        (
            "port show web1",
            "There is no port web1: did you mean web1/eth0? `portcullis port list` shows all.",
        ),
        ("port block web1/eth1", "did you mean web1/eth0"),
        (
            "switch show backbon",
            "There is no switch backbon: did you mean backbone? `portcullis switch list`",
        ),
        ("switch delete bakcbone", "did you mean backbone?"),
        (
            "port-group show storge",
            "no port group storge: did you mean storage? `portcullis port-group list`",
        ),
        ("port-group delete storge", "did you mean storage?"),
        ("port-group set x --switch backbones", "no switch backbones: did you mean backbone?"),
        ("pf show nothing", "There is no PF nothing: `portcullis pf list` shows those that exist."),
        (&format!("vm create {group}"), "no port group storag: did you mean storage?"),
    ] {
        let (_, error) = desk.run(line).await.unwrap_err();
        assert!(error.contains(expect), "{line}: {error}");
    }
    let error = desk.run_into(&format!("apply -f {apply}"), &mut Vec::new()).await.unwrap_err();
    let error = error.text(Format::Table);
    assert!(error.contains("no port group sotrage: did you mean storage?"), "{error}");
    let pf = desk.json("pf list").await[0]["name"].as_str().unwrap().to_owned();
    let (_, error) = desk.run(&format!("pf show {pf}x")).await.unwrap_err();
    assert!(error.contains(&format!("did you mean {pf}? `portcullis pf list` shows all.")), "{error}");

    // An image of an image directory is proposed, and no other file.
    let images = desk.host.env.image_dirs[0].clone();
    std::fs::create_dir_all(&images).unwrap();
    std::fs::write(images.join("vmlinuz-6.1"), "").unwrap();
    std::fs::write(images.join(".vmlinuz-6.2"), "").unwrap();
    desk.run(&format!("vm create {}", vm("storage", "vmlinuz-6.2"))).await.unwrap();
    let (_, error) = desk.run("vm boot new").await.unwrap_err();
    assert!(error.contains("did you mean vmlinuz-6.1? Otherwise check the path"), "{error}");
}
