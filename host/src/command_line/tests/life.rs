// SPDX-License-Identifier: Apache-2.0

//! VMs that are changed, awaited, run, and made from directories.

use api::types::VmState;

use super::*;

const WEB1: &str =
    r#"{ "name": "web1", "memory": "2MiB", "boot": { "kernel": "kernel" }, "adapters": [{ "id": "eth0" }] }"#;

#[tokio::test]
async fn vms_are_changed_renamed_and_copied() {
    let desk = Desk::new().await;
    let file = desk.file("web1.json", WEB1);
    desk.run(&format!("vm create {file}")).await.unwrap();
    let shown = desk.run("vm patch web1 --memory 4MiB --restart on-failure --autostart true").await.unwrap();
    assert!(shown.contains("web1"), "{shown}");
    let vm = desk.json("vm show web1").await;
    let spec = &vm["spec"];
    assert_eq!(
        (&spec["memory"], &spec["restart"], &spec["autostart"]),
        (&"4MiB".into(), &"on_failure".into(), &true.into())
    );
    let shown = desk.run("vm show web1").await.unwrap();
    let restart = shown.lines().find(|line| line.starts_with("restart:")).unwrap();
    assert!(restart.ends_with("on_failure") && shown.contains("autostart:"), "{shown}");
    let patch = desk.file("patch.yaml", "autostart: null");
    let line = format!("vm patch web1 -f {patch} --cmdline quiet --if-match {}", vm["revision"]);
    desk.run(&line).await.unwrap();
    assert_eq!(desk.run(&line).await.unwrap_err().0, 5, "somebody was faster");
    let spec = &desk.json("vm show web1").await["spec"];
    assert_eq!((&spec["autostart"], &spec["boot"]["cmdline"]), (&serde_json::Value::Null, &"quiet".into()));
    assert_eq!(desk.run("vm patch web1").await.unwrap_err().0, 2);

    // The same from options.
    desk.run("vm create opt1 --memory 2MiB --kernel kernel --adapter eth0,group=default").await.unwrap();
    let spec = &desk.json("vm show opt1").await["spec"];
    assert_eq!((&spec["memory"], &spec["adapters"][0]["port_group"]), (&"2MiB".into(), &"default".into()));
    let (code, error) = desk.run("vm create opt2 --memory 2MiB --kernel k --disk root").await.unwrap_err();
    assert!(code == 2 && error.contains("path"), "{error}");
    desk.run("vm delete opt1").await.unwrap();

    desk.run(&format!("vm set web1 --file {file}")).await.unwrap();
    desk.run("vm clone web1 web2").await.unwrap();
    desk.run("vm rename web1 db1").await.unwrap();
    assert_eq!(desk.run("vm rename db1 web2").await.unwrap_err().0, 5);
    let listed = desk.run("vm list").await.unwrap();
    let rows: Vec<_> = listed.lines().map(words).collect();
    assert_eq!((rows[1][0], rows[2][0], rows.len()), ("db1", "web2", 3));
    assert_ne!(rows[1][5], rows[2][5], "addresses of their own");

    desk.run("vm boot db1").await.unwrap();
    let (code, error) = desk.run("vm patch db1 --cpus 2").await.unwrap_err();
    assert!(code == 5 && error.contains("stop it first"), "{error}");
    desk.run("vm wait db1 --for running --timeout 5").await.unwrap();
    let (code, error) = desk.run("vm wait db1 --for rest --timeout 0").await.unwrap_err();
    assert!(code == 6 && error.contains("db1 is running after 0 s"), "{error}");
    desk.run("vm stop db1").await.unwrap();
    desk.run("vm wait db1 --for rest").await.unwrap();
    let yaml = desk.run("vm show db1 --output yaml").await.unwrap();
    assert!(yaml.contains("\nspec:\n  name: db1\n"), "{yaml}");
    assert_eq!(desk.run("health").await.unwrap(), "agent:  ok\n");
}

#[tokio::test]
async fn an_action_that_takes_longer_than_it_was_given_has_its_own_code() {
    let desk = Desk::new().await;
    desk.boot("web1", "default").await;
    desk.run("vm pause web1").await.unwrap();
    desk.run("vm resume web1").await.unwrap();
    // The fake guest powers off at once, unless it is deaf.
    desk.client.write_console("web1", "deaf").await.unwrap();
    let (code, error) = desk.run("vm shutdown web1 --timeout 1").await.unwrap_err();
    assert!(code == 6 && error.contains("web1 is running after 1 s"), "{error}");
    desk.run("vm shutdown web1 --wait 0").await.unwrap();
    desk.host.gates().close("set");
    let (code, error) = desk.run("vm delete web1 --timeout 1").await.unwrap_err();
    assert!(code == 6 && error.contains("after 1 s"), "{error}");
    desk.host.gates().open("set");
    let gone = async {
        while desk.client.get_vm("web1").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.expect("the deletion goes on");
}

#[tokio::test]
async fn run_boots_shows_and_deletes_only_if_it_is_told_to() {
    let desk = Desk::new().await;
    let file = desk.file("web1.json", WEB1);
    for (line, stays) in [
        (format!("run {file}"), true),
        // An earlier command's VM, which this one may not delete.
        (format!("run {file}"), true),
        (format!("run --rm {file}"), true),
        (format!("run --rm {file}"), false),
    ] {
        if !stays {
            desk.run("vm delete web1").await.unwrap();
        }
        let scene = async {
            while desk.client.write_console("web1", "print hello").await.is_err() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            desk.client.write_console("web1", "poweroff").await.unwrap();
        };
        let (shown, ()) = tokio::join!(desk.run(&line), scene);
        assert_eq!(shown.unwrap(), "hello", "{line}");
        assert_eq!(desk.client.get_vm("web1").await.is_ok(), stays, "{line}");
    }
    let wrong = desk.file("wrong.json", &WEB1.replace("\"kernel\" }", "\"absent\" }"));
    assert_eq!(desk.run(&format!("run {wrong}")).await.unwrap_err().0, 1);
    assert!(desk.client.get_vm("web1").await.is_ok(), "it can be looked at and mended");
    assert_eq!(desk.run(&format!("run {file}")).await.unwrap_err().0, 5, "another VM has the name");
    assert_eq!(desk.run(&format!("run --rm {wrong}")).await.unwrap_err().0, 1);
    assert!(desk.client.get_vm("web1").await.is_ok(), "it was there before");
    desk.run("vm delete web1").await.unwrap();
    assert_eq!(desk.run(&format!("run --rm {wrong}")).await.unwrap_err().0, 1);
    assert_eq!(desk.run("vm show web1").await.unwrap_err().0, 4);
}

/// A command was killed before it held the lease of its VM, and the agent has not deleted the VM
/// yet.
#[tokio::test]
async fn run_takes_over_a_vm_that_waits_for_its_client() {
    let desk = Desk::new().await;
    let file = desk.file("web1.json", WEB1);
    let spec = serde_json::from_str(WEB1).unwrap();
    for (line, stays) in [(format!("run --rm {file}"), false), (format!("run {file}"), true)] {
        desk.client.create_leased_vm(&spec, None).await.unwrap();
        let scene = async {
            while desk.client.write_console("web1", "poweroff").await.is_err() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let (shown, ()) = tokio::join!(desk.run(&line), scene);
        shown.unwrap();
        let left = desk.client.get_vm("web1").await;
        assert_eq!(left.is_ok(), stays, "{line}");
        assert!(left.is_err() || left.unwrap().status.lease.is_none(), "{line}: it is not deleted later");
    }
    desk.run("vm delete web1").await.unwrap();
    // While a client holds the lease, the VM is that client's.
    desk.client.create_leased_vm(&spec, None).await.unwrap();
    let lease = desk.client.lease_vm("web1", None).await.unwrap();
    let (code, error) = desk.run(&format!("run --rm {file}")).await.unwrap_err();
    assert!(code == 5 && error.contains("choose another name"), "{error}");
    assert!(desk.client.get_vm("web1").await.is_ok());
    desk.run("vm delete web1").await.unwrap();
    drop(lease);
    // A command that has created its VM, and does not hold the lease yet.
    let holder = Some(uuid::Uuid::new_v4());
    desk.client.create_leased_vm(&spec, holder).await.unwrap();
    for line in ["run --rm", "run"] {
        let (code, error) = desk.run(&format!("{line} {file}")).await.unwrap_err();
        assert!(code == 5 && error.contains("lives by the lease of another client"), "{line}: {error}");
        let vm = desk.client.get_vm("web1").await.unwrap();
        assert!(vm.status.state == VmState::Defined && vm.status.lease.is_some(), "{line}: {:?}", vm.status);
    }
    let _lease = desk.client.lease_vm("web1", holder).await.unwrap();
}

#[tokio::test]
async fn run_leaves_a_vm_alone_that_is_not_at_rest() {
    let desk = Desk::new().await;
    let file = desk.file("web1.json", WEB1);
    desk.run(&format!("vm create {file}")).await.unwrap();
    desk.run("vm boot web1").await.unwrap();
    for (before, state) in [("vm show web1", "running"), ("vm pause web1", "paused")] {
        desk.run(before).await.unwrap();
        for line in ["run --rm", "run"] {
            let (code, error) = desk.run(&format!("{line} {file}")).await.unwrap_err();
            assert!(
                code == 5 && error.contains(&format!("is already {state}")) && error.contains("console web1"),
                "{line}: {error}"
            );
            assert_eq!(desk.client.get_vm("web1").await.unwrap().status.state.as_str(), state, "{line}");
        }
    }
    desk.run("vm stop web1").await.unwrap();
}

#[tokio::test]
async fn what_deleting_says_does_not_hide_why_run_failed() {
    let desk = Desk::new().await;
    desk.deletes_nothing.store(true, Ordering::SeqCst);
    let wrong = desk.file("wrong.json", &WEB1.replace("\"kernel\" }", "\"absent\" }"));
    let (code, error) = desk.run(&format!("run --rm {wrong}")).await.unwrap_err();
    assert!(code == 1 && error.contains("absent"), "{error}");
    assert!(desk.client.get_vm("web1").await.is_ok(), "it could not be deleted");
}

#[tokio::test]
async fn apply_makes_what_files_say_and_nothing_the_second_time() {
    let desk = Desk::new().await;
    let directory = desk.host.env.run_dir.join("site");
    std::fs::create_dir(&directory).unwrap();
    let write = |name: &str, text: &str| std::fs::write(directory.join(name), text).unwrap();
    write("lan.toml", "object = \"switch\"\nname = \"lan\"\nuplinks = [\"eth0\"]");
    write("web.yaml", "{object: port_group, name: web, switch: lan, settings: {mtu: 1400}}");
    write("vm.json", &WEB1.replace("\"eth0\" }", "\"eth0\", \"port_group\": \"web\" }"));
    let apply = format!("apply -f {}", directory.display());
    let actions = async |line: String| -> Vec<(String, String)> {
        let steps = desk.json(&line).await;
        let word = |step: &serde_json::Value, name: &str| step[name].as_str().unwrap().to_owned();
        steps.as_array().unwrap().iter().map(|step| (word(step, "name"), word(step, "action"))).collect()
    };
    let all = |action: &str| ["lan", "web", "web1"].map(|name| (name.to_owned(), action.to_owned()));
    assert_eq!(actions(format!("{apply} --dry-run")).await, all("create"));
    assert_eq!(desk.run("vm list").await.unwrap().lines().count(), 1, "nothing was made");
    assert_eq!(actions(apply.clone()).await, all("create"));
    assert_eq!(desk.json("port show web1/eth0").await["status"]["policy"]["mtu"]["value"], 1400);
    assert_eq!(actions(apply.clone()).await, all("unchanged"));

    write(
        "web.yaml",
        "{object: port_group, name: web, switch: lan, settings: {mtu: 9000}, port_overrides: [mtu]}",
    );
    let shown = desk.run(&format!("{apply} --dry-run")).await.unwrap();
    let row = words(shown.lines().nth(2).unwrap());
    assert_eq!(row[..3], ["change", "port group", "web"]);
    assert!(row[3].ends_with("/web.yaml"), "{shown}");
    assert_eq!(row[4], "port_overrides: [] -> [\"mtu\"], settings.mtu: 1400 -> 9000");
    assert_eq!(
        desk.json("port-group show web").await["spec"]["settings"]["mtu"],
        1400,
        "nothing was changed"
    );
    desk.run(&apply).await.unwrap();
    assert_eq!(actions(apply.clone()).await, all("unchanged"));

    // An unknown name in a file is found before anything is made, too.
    for (file, text, code) in [
        ("a.yaml", "{object: port_group, name: aaa, switch: nowhere}", "switch_not_found"),
        (
            "a.json",
            &WEB1.replace("web1", "web2").replace("\"eth0\" }", "\"eth0\", \"port_group\": \"no\" }"),
            "port_group_not_found",
        ),
    ] {
        write(file, text);
        for line in [format!("{apply} --dry-run"), apply.clone()] {
            let error = desk.run_into(&line, &mut Vec::new()).await.unwrap_err();
            let told: serde_json::Value = serde_json::from_str(&error.text(Format::Json)).unwrap();
            assert_eq!((error.code(), &told["code"]), (1, &code.into()), "{told}");
            assert!(told["file"].as_str().unwrap().ends_with(file), "{told}");
        }
        std::fs::remove_file(directory.join(file)).unwrap();
    }
    assert_eq!(actions(apply.clone()).await, all("unchanged"));

    // A running VM cannot take over its file's specification; the command finds this before
    // anything is made.
    desk.run("vm boot web1").await.unwrap();
    let of_web = WEB1.replace("\"eth0\" }", "\"eth0\", \"port_group\": \"web\" }");
    write("vm.json", &of_web.replace("2MiB", "4MiB"));
    write("web.yaml", "{object: port_group, name: web, switch: lan}");
    for (line, shown) in [(format!("{apply} --dry-run --output json"), true), (apply.clone(), false)] {
        let mut output = Vec::new();
        let error = desk.run_into(&line, &mut output).await.unwrap_err();
        let told: serde_json::Value = serde_json::from_str(&error.text(Format::Json)).unwrap();
        assert_eq!((error.code(), &told["code"]), (5, &"wrong_state".into()), "{told}");
        assert!(told["file"].as_str().unwrap().ends_with("/vm.json"), "{told}");
        let detail = told["detail"].as_str().unwrap();
        assert!(detail.contains("web1 is running") && detail.contains("stop it first"), "{detail}");
        let output = String::from_utf8(output).unwrap();
        if shown {
            let steps: serde_json::Value = serde_json::from_str(&output).unwrap();
            let actions: Vec<_> = (0..3).map(|n| steps[n]["action"].as_str().unwrap()).collect();
            assert_eq!(actions, ["unchanged", "change", "blocked"]);
            assert_eq!(steps[2]["changes"][0]["path"], "memory");
        } else {
            assert!(!output.contains("web"), "{output}");
        }
        assert_ne!(
            desk.json("port-group show web").await["spec"]["settings"],
            serde_json::json!({}),
            "{line}"
        );
    }
    // Members that may change while the VM runs.
    write("vm.json", &of_web.replacen('{', "{ \"restart\": \"always\", \"autostart\": true,", 1));
    let changed = actions(apply.clone()).await;
    assert_eq!(
        changed.iter().map(|(_, action)| action.as_str()).collect::<Vec<_>>(),
        ["unchanged", "change", "change"]
    );
    assert_eq!(desk.json("port-group show web").await["spec"]["settings"], serde_json::json!({}));
    write("vm.json", &of_web.replace("2MiB", "4MiB"));
    desk.run("vm stop web1").await.unwrap();
    desk.run(&apply).await.unwrap();
    assert_eq!(actions(apply.clone()).await, all("unchanged"));

    // The agent's refusal is shown in full; the objects before it are made.
    for name in ["s1", "s2"] {
        write(&format!("{name}.yaml"), &format!("{{object: switch, name: {name}, uplinks: [eth7]}}"));
    }
    let mut output = Vec::new();
    let error = desk.run_into(&apply, &mut output).await.unwrap_err();
    let made = String::from_utf8(output).unwrap();
    assert!(made.contains("/s1.yaml") && !made.contains("/s2.yaml"), "{made}");
    assert_eq!(desk.json("switch show s1").await["spec"]["uplinks"], serde_json::json!(["eth7"]));
    let told: serde_json::Value = serde_json::from_str(&error.text(Format::Json)).unwrap();
    assert_eq!(told["code"], "switch_in_use");
    assert!(told["file"].as_str().unwrap().ends_with("/s2.yaml") && told["request_id"].is_string(), "{told}");
    let text = error.text(Format::Table);
    for part in ["s2.yaml", "(switch_in_use)", told["request_id"].as_str().unwrap()] {
        assert!(text.contains(part), "{part}: {text}");
    }
    for name in ["s1", "s2"] {
        std::fs::remove_file(directory.join(format!("{name}.yaml"))).unwrap();
    }
    desk.run("switch delete s1").await.unwrap();

    write("typo.toml", "name = \"web2\"\nmemroy = \"2MiB\"");
    let (code, error) = desk.run(&apply).await.unwrap_err();
    assert!(code == 2 && error.contains("typo.toml"), "{error}");
    assert_eq!(desk.run("apply -f /nonexistent").await.unwrap_err().0, 2);
}
