//! Bind mounts through the stock docker CLI: what is mounted, how, and for how long. Needs root.

mod support;

use std::{
    fs,
    os::unix::{
        fs::{MetadataExt, symlink},
        net::UnixListener,
    },
    path::PathBuf,
};

use support::{Daemon, Machine, with_busybox};

/// A folder of the host with a file in it.
fn folder() -> (tempfile::TempDir, String) {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "from the host\n").unwrap();
    let path = dir.path().to_str().unwrap().to_owned();
    (dir, path)
}

fn sh(daemon: &Daemon, options: &[&str], script: &str) -> String {
    let mut args = vec!["run", "--rm", "--network", "none"];
    args.extend(options);
    args.extend(["busybox", "sh", "-c", script]);
    daemon.ok(&args)
}

/// What the sandbox has been granted now.
fn grants(machine: &Machine) -> Vec<PathBuf> {
    let folder = machine.home.path().join("vms/default/trees");
    match fs::read_dir(folder) {
        Ok(entries) => entries.map(|entry| entry.unwrap().path()).collect(),
        Err(_) => Vec::new(),
    }
}

fn start(daemon: &Daemon, name: &str, options: &[&str]) {
    let mut args = vec!["run", "-d", "--name", name, "--network", "none"];
    args.extend(options);
    args.extend(["busybox", "sleep", "1000"]);
    daemon.ok(&args);
}

#[test]
fn a_directory_of_the_host_is_read_and_written() {
    let (machine, daemon) = with_busybox();
    let (dir, path) = folder();
    let script = "cat /d/file; echo from the container > /d/new; mkdir /d/sub; busybox rm /d/file";
    assert_eq!(sh(&daemon, &["-v", &format!("{path}:/d")], script), "from the host\n");
    assert_eq!(fs::read_to_string(dir.path().join("new")).unwrap(), "from the container\n");
    assert!(dir.path().join("sub").is_dir() && !dir.path().join("file").exists());

    let refused = "cat /d/new; touch /d/x || echo refused; echo >> /d/new || echo refused";
    let words = "from the container\nrefused\nrefused\n";
    assert_eq!(sh(&daemon, &["-v", &format!("{path}:/d:ro,z")], refused), words);
    let mount = format!("type=bind,src={path},dst=/d,readonly,bind-propagation=rprivate,consistency=cached");
    assert_eq!(sh(&daemon, &["--mount", &mount], refused), words);
    let recursive =
        format!("type=bind,src={path},dst=/d,readonly,bind-recursive=readonly,bind-propagation=rprivate");
    assert_eq!(sh(&daemon, &["--mount", &recursive], refused), words);
    assert!(grants(&machine).is_empty(), "what was granted has been taken back");
}

#[test]
fn a_single_file_is_mounted_and_a_link_is_followed_once() {
    let (_machine, daemon) = with_busybox();
    let (dir, path) = folder();
    symlink("file", dir.path().join("link")).unwrap();
    let options = ["-v", &format!("{path}/link:/etc/deep/below/config")];
    let script = "cat /etc/deep/below/config; echo changed > /etc/deep/below/config";
    assert_eq!(sh(&daemon, &options, script), "from the host\n");
    assert_eq!(fs::read_to_string(dir.path().join("file")).unwrap(), "changed\n");

    // What the engine would mount itself gives way.
    fs::write(dir.path().join("hosts"), "10.1.2.3 mine\n").unwrap();
    assert_eq!(
        sh(&daemon, &["-v", &format!("{path}/hosts:/etc/hosts:ro")], "cat /etc/hosts"),
        "10.1.2.3 mine\n"
    );

    for (source, target) in [(format!("{path}/file"), "/tmp"), (path.clone(), "/etc/passwd")] {
        let options =
            ["run", "--rm", "--network", "none", "-v", &format!("{source}:{target}"), "busybox", "true"];
        let refusal = daemon.fails(125, &options);
        assert!(
            refusal.contains("Are you trying to mount a directory onto a file (or vice-versa)?"),
            "{refusal}"
        );
    }
}

#[test]
fn what_is_missing_is_made_for_volume_and_missed_for_mount() {
    let (machine, daemon) = with_busybox();
    let (dir, path) = folder();
    let (missing, made) = (format!("{path}/a/b"), dir.path().join("a/b"));
    let mount = format!("type=bind,src={missing},dst=/d");
    let words = format!("invalid mount config for type \"bind\": bind source path does not exist: {missing}");
    let refusal =
        daemon.fails(125, &["run", "--rm", "--network", "none", "--mount", &mount, "busybox", "true"]);
    assert!(refusal.contains(&words), "{refusal}");
    let body = format!(
        r#"{{"Image":"busybox","HostConfig":{{"Mounts":[{{"Type":"bind","Source":"{missing}","Target":"/d"}}]}}}}"#
    );
    let (status, answer) = daemon.api("POST", "/containers/create", &body);
    assert_eq!(status, 400, "{answer}");

    daemon.ok(&["create", "--name", "later", "-v", &format!("{missing}:/d"), "busybox", "touch", "/d/x"]);
    assert!(!made.exists(), "it is made by the start");
    daemon.ok(&["start", "-a", "later"]);
    assert!(made.join("x").exists());
    assert_eq!(fs::metadata(&made).unwrap().mode() & 0o7777, 0o755);

    fs::remove_dir_all(dir.path().join("a")).unwrap();
    let created = format!(
        r#"{{"Image":"busybox","Cmd":["true"],"HostConfig":{{"Mounts":[{{"Type":"bind","Source":"{missing}","Target":"/d","BindOptions":{{"CreateMountpoint":true}}}}]}}}}"#
    );
    let (status, answer) = daemon.api("POST", "/containers/create?name=mountpoint", &created);
    assert_eq!(status, 201, "{answer}");
    daemon.ok(&["start", "-a", "mountpoint"]);
    assert!(made.is_dir());

    // It was there when the container was made, and is gone when it starts.
    daemon.ok(&["create", "--name", "gone", "--mount", &mount, "busybox", "true"]);
    fs::remove_dir_all(dir.path().join("a")).unwrap();
    let refusal = daemon.fails(1, &["start", "gone"]);
    assert!(refusal.contains(&words), "{refusal}");
    assert!(grants(&machine).is_empty());
    fs::create_dir_all(&made).unwrap();
    daemon.ok(&["start", "gone"]);
}

#[test]
fn inspect_and_filters_tell_of_it_as_docker_does() {
    let (_machine, daemon) = with_busybox();
    let (_dir, path) = folder();
    start(&daemon, "one", &["-v", &format!("{path}/./x/..:/d/:ro")]);
    start(&daemon, "two", &["--mount", &format!("type=bind,src={path},dst=/e")]);
    let mounts =
        "{{range .Mounts}}{{.Type}} {{.Source}} {{.Destination}} {{.Mode}} {{.RW}} {{.Propagation}}{{end}}";
    assert_eq!(daemon.ok(&["inspect", "-f", mounts, "one"]), format!("bind {path} /d ro false rprivate\n"));
    assert_eq!(daemon.ok(&["inspect", "-f", mounts, "two"]), format!("bind {path} /e  true rprivate\n"));
    assert_eq!(
        daemon.ok(&["inspect", "-f", "{{json .HostConfig.Binds}}", "one"]),
        format!("[\"{path}/./x/..:/d/:ro\"]\n")
    );
    assert_eq!(
        daemon.ok(&["inspect", "-f", "{{json .HostConfig.Mounts}}", "two"]),
        format!("[{{\"Type\":\"bind\",\"Source\":\"{path}\",\"Target\":\"/e\"}}]\n")
    );
    for (filter, names) in [
        (format!("volume={path}"), "two\none\n"),
        ("volume=/d".to_owned(), "one\n"),
        ("volume=/nowhere".to_owned(), ""),
    ] {
        assert_eq!(daemon.ok(&["ps", "--format", "{{.Names}}", "--filter", &filter]), names, "{filter}");
    }
    assert_eq!(
        daemon.ok(&["ps", "--no-trunc", "--filter", "name=two", "--format", "{{.Mounts}}"]),
        format!("{path}\n")
    );

    let others = ["run", "--rm", "--network", "none", "--volumes-from", "two:ro", "busybox", "sh", "-c"];
    let script = "cat /e/file; touch /e/x || echo refused";
    assert_eq!(daemon.ok(&[&others[..], &[script]].concat()), "from the host\nrefused\n");
}

#[test]
fn mounts_of_every_kind_lie_in_each_other_in_any_order() {
    let (_machine, daemon) = with_busybox();
    let (outer, outer_path) = folder();
    let (inner, inner_path) = folder();
    let options = [
        "-v",
        &format!("{inner_path}:/a/b/c"),
        "--tmpfs",
        "/a/b",
        "-v",
        &format!("{outer_path}:/a"),
        "-v",
        "vol:/a/b/c/d",
        "-v",
        &format!("{outer_path}/file:/a/b/c/d/file"),
    ];
    let script = "for d in /a /a/b /a/b/c /a/b/c/d; do grep -c \" $d \" /proc/mounts; done; cat /a/b/c/d/file; echo 1 > /a/b/c/own";
    assert_eq!(sh(&daemon, &options, script), "1\n1\n1\n1\nfrom the host\n");
    assert!(inner.path().join("own").exists() && inner.path().join("d").is_dir());
    assert!(outer.path().join("b").is_dir() && !outer.path().join("b/c").exists());
}

#[test]
fn a_link_in_an_image_or_a_mount_does_not_lead_out_of_the_container() {
    let (_machine, daemon) = with_busybox();
    let (dir, path) = folder();
    let outside = tempfile::tempdir().unwrap();
    symlink(outside.path(), dir.path().join("out")).unwrap();
    // The link is followed within the container's root, where its target is made.
    let options = ["-v", &format!("{path}:/d"), "--tmpfs", "/d/out/made"];
    let script = format!("grep -c ' {}/made ' /proc/mounts; ls /d/out", outside.path().display());
    assert_eq!(sh(&daemon, &options, &script), "1\nmade\n");
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0, "nothing was made on the host");
}

#[test]
fn what_cannot_be_given_is_refused_by_name() {
    let (_machine, daemon) = with_busybox();
    let (dir, path) = folder();
    let socket = dir.path().join("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    let mount = |more: &str| format!("type=bind,src={path},dst=/x{more}");
    for (options, words) in [
        (["-v", &format!("{path}:/x:shared")], "bind-propagation=shared is not supported by Coracle"),
        (["-v", &format!("{path}:/x:fly")], "invalid mode: fly"),
        (["-v", &format!("{path}:/x:nocopy")], "field VolumeOptions must not be specified"),
        (["-v", &format!("{path}:/")], "destination can't be '/'"),
        (["-v", &format!("{path}:x")], "mount path must be absolute"),
        (["-v", &format!("{}:/x", socket.display())], "it is a socket of the host"),
        (["-v", "/dev/null:/x"], "it is a device of the host"),
        (["--mount", &mount(",bind-propagation=rslave")], "bind-propagation=rslave is not supported"),
        (["--mount", &mount(",bind-recursive=disabled")], "BindOptions.NonRecursive"),
        (["--mount", &mount(",readonly,bind-recursive=writable")], "BindOptions.ReadOnlyNonRecursive"),
    ] {
        let mut args = vec!["create", "--network", "none"];
        args.extend(options);
        args.extend(["busybox", "true"]);
        let refusal = daemon.fails(1, &args);
        assert!(refusal.contains(words), "{options:?}: {refusal}");
    }
    let twice = ["create", "-v", &format!("{path}:/x"), "--mount", &mount(""), "busybox"];
    let refusal = daemon.fails(1, &twice);
    assert!(refusal.contains("Duplicate mount point: /x"), "{refusal}");
    assert_eq!(daemon.ok(&["ps", "-aq"]), "");
}

#[test]
fn a_grant_lasts_as_long_as_the_run() {
    let (machine, daemon) = with_busybox();
    let (_dir, path) = folder();
    let granted = || grants(&machine).len();
    start(&daemon, "one", &["-v", &format!("{path}:/d"), "-v", &format!("{path}/file:/f")]);
    let first = grants(&machine);
    assert_eq!(first.len(), 2);
    daemon.ok(&["rename", "one", "other"]);
    daemon.ok(&["update", "--restart", "no", "other"]);
    daemon.ok(&["restart", "-t", "0", "other"]);
    assert_eq!(daemon.ok(&["exec", "other", "cat", "/d/file", "/f"]), "from the host\nfrom the host\n");
    assert!(granted() == 2 && grants(&machine).iter().all(|grant| !first.contains(grant)));
    daemon.ok(&["kill", "other"]);
    daemon.ok(&["wait", "other"]);
    assert_eq!(granted(), 0);
    daemon.ok(&["start", "other"]);
    assert_eq!(granted(), 2);
    daemon.ok(&["rm", "-f", "other"]);
    assert_eq!(granted(), 0);

    let failing = ["run", "--rm", "--network", "none", "-v", &format!("{path}:/d"), "busybox", "/no/such"];
    daemon.fails(127, &failing);
    assert_eq!(granted(), 0, "a start that fails gives back what it was granted");

    let script = "cat /d/file; false";
    let options = ["--restart", "on-failure:2", "-v", &format!("{path}:/d")];
    let mut args = vec!["run", "-d", "--name", "again", "--network", "none"];
    args.extend(options);
    args.extend(["busybox", "sh", "-c", script]);
    daemon.ok(&args);
    daemon.until("again", "{{.State.Status}} {{.RestartCount}}", "exited 2");
    assert_eq!(daemon.ok(&["logs", "again"]), "from the host\n".repeat(3));
    assert_eq!(granted(), 0);
}

#[test]
fn grants_survive_the_daemon_and_what_no_one_needs_is_taken_back() {
    let (machine, daemon) = with_busybox();
    let (dir, path) = folder();
    for name in ["stays", "ends"] {
        start(&daemon, name, &["-v", &format!("{path}:/d")]);
    }
    let pid = daemon.ok(&["inspect", "-f", "{{.State.Pid}}", "ends"]);
    daemon.end();
    assert_eq!(grants(&machine).len(), 2);
    // From a start that a daemon did not live to go through with, and of a container that nobody knows.
    let known = grants(&machine)[0].file_name().unwrap().to_str().unwrap()[..64].to_owned();
    for name in [format!("{}-0-0", "0".repeat(64)), format!("{known}-0-0"), "else".to_owned()] {
        symlink(dir.path(), machine.home.path().join("vms/default/trees").join(name)).unwrap();
    }
    assert!(std::process::Command::new("kill").args(["-9", pid.trim()]).status().unwrap().success());
    let daemon = Daemon::start(&machine);
    assert_eq!(daemon.ok(&["wait", "ends"]), "137\n");
    daemon.ok(&["exec", "stays", "touch", "/d/still"]);
    assert!(dir.path().join("still").exists());
    daemon.ok(&["rm", "-f", "stays", "ends"]);
    assert!(grants(&machine).is_empty(), "{:?}", grants(&machine));
}

#[test]
fn a_sandbox_that_died_is_granted_everything_anew() {
    let (machine, daemon) = with_busybox();
    let (_dir, path) = folder();
    start(&daemon, "one", &["-v", &format!("{path}:/d")]);
    machine.kill_sandbox();
    daemon.ok(&["wait", "one"]);
    daemon.ok(&["start", "one"]);
    assert_eq!(grants(&machine).len(), 1);
    assert_eq!(daemon.ok(&["exec", "one", "cat", "/d/file"]), "from the host\n");
}

#[test]
fn files_are_copied_into_and_out_of_a_mount_while_the_container_runs() {
    let (_machine, daemon) = with_busybox();
    let (dir, path) = folder();
    let local = tempfile::tempdir().unwrap();
    fs::write(local.path().join("in"), "copied in\n").unwrap();
    let inside = local.path().join("in").to_str().unwrap().to_owned();
    let outside = |name: &str| local.path().join(name).to_str().unwrap().to_owned();
    start(&daemon, "one", &["-v", &format!("{path}:/d")]);
    daemon.ok(&["cp", &inside, "one:/d/in"]);
    assert_eq!(fs::read_to_string(dir.path().join("in")).unwrap(), "copied in\n");
    daemon.ok(&["cp", "one:/d/file", &outside("out")]);
    assert_eq!(fs::read_to_string(local.path().join("out")).unwrap(), "from the host\n");
    daemon.ok(&["kill", "one"]);
    daemon.ok(&["wait", "one"]);
    for args in [["cp", "one:/d/file", &outside("stopped")], ["cp", &inside, "one:/d/again"]] {
        let refusal = daemon.fails(1, &args);
        assert!(refusal.contains(&format!(" is {path}")) && refusal.contains("start it first"), "{refusal}");
    }
    daemon.ok(&["cp", "one:/etc/passwd", &outside("passwd")]);
}

#[test]
fn programs_in_a_mount_keep_their_owners_rights() {
    let (_machine, daemon) = with_busybox();
    let (_dir, path) = folder();
    let script = "grep -c -E ' /[dv] .*(nosuid|nodev)' /proc/mounts";
    let options = ["-v", &format!("{path}:/d"), "-v", "vol:/v"];
    assert_eq!(sh(&daemon, &options, &format!("{script} || true")), "0\n");
}
