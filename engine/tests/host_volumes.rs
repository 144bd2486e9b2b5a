//! Volumes through the stock docker CLI: names, contents, lives. Needs root.

mod support;

use std::{
    fs,
    os::unix::fs::{PermissionsExt, chown, symlink},
    sync::Arc,
};

use support::{Daemon, Machine, with_busybox};

/// An engine with an image that has files in a volume of its own, which belongs to someone else than root.
fn with_volume_image() -> (Arc<Machine>, Daemon) {
    let (machine, daemon) = with_busybox();
    daemon.load_image("store", r#"{"Volumes":{"/data":{}}}"#, |root| {
        let data = root.join("data");
        fs::create_dir_all(data.join("sub")).unwrap();
        fs::write(data.join("seed"), "seed\n").unwrap();
        fs::write(data.join("sub/deep"), "deep\n").unwrap();
        symlink("seed", data.join("link")).unwrap();
        chown(&data, Some(70), Some(70)).unwrap();
        fs::set_permissions(&data, fs::Permissions::from_mode(0o700)).unwrap();
    });
    (machine, daemon)
}

fn sh(daemon: &Daemon, options: &[&str], image: &str, script: &str) -> String {
    let mut args = vec!["run", "--rm", "--network", "none"];
    args.extend(options);
    args.extend([image, "sh", "-c", script]);
    daemon.ok(&args)
}

#[test]
fn a_named_volume_outlives_its_containers_and_is_shared() {
    let (_machine, daemon) = with_busybox();
    assert_eq!(daemon.ok(&["volume", "create", "--label", "tier=db", "store"]), "store\n");
    assert_eq!(daemon.ok(&["volume", "create", "store"]), "store\n");
    sh(&daemon, &["-v", "store:/a"], "busybox", "echo kept > /a/file");
    assert_eq!(
        sh(&daemon, &["-v", "store:/b:ro"], "busybox", "cat /b/file; touch /b/x || echo refused"),
        "kept\nrefused\n"
    );
    let mount = "type=volume,src=store,dst=/c,readonly";
    assert_eq!(sh(&daemon, &["--mount", mount], "busybox", "cat /c/file"), "kept\n");

    daemon.ok(&[
        "run",
        "-d",
        "--name",
        "one",
        "--network",
        "none",
        "-v",
        "store:/x",
        "busybox",
        "sleep",
        "1000",
    ]);
    let other = ["run", "--rm", "--network", "none", "--volumes-from", "one:ro", "busybox", "sh", "-c"];
    let script = "cat /x/file; touch /x/y || echo refused";
    assert_eq!(daemon.ok(&[&other[..], &[script]].concat()), "kept\nrefused\n");
    let format = "{{range .Mounts}}{{.Type}} {{.Name}} {{.Destination}} {{.RW}}{{end}}";
    assert_eq!(daemon.ok(&["inspect", "-f", format, "one"]), "volume store /x true\n");
    for filter in ["volume=store", "volume=/x"] {
        assert_eq!(daemon.ok(&["ps", "--format", "{{.Names}}", "--filter", filter]), "one\n");
    }
    let refusal = daemon.fails(1, &["volume", "rm", "store"]);
    assert!(refusal.contains("volume is in use - ["), "{refusal}");
    daemon.ok(&["rm", "-f", "-v", "one"]);

    assert_eq!(daemon.ok(&["volume", "ls", "-q", "--filter", "label=tier=db"]), "store\n");
    assert_eq!(
        daemon.ok(&["volume", "inspect", "-f", "{{.Driver}} {{.Labels.tier}}", "store"]),
        "local db\n"
    );
    assert_eq!(daemon.ok(&["volume", "rm", "store"]), "store\n");
    assert!(daemon.fails(1, &["volume", "inspect", "store"]).contains("no such volume"));
    // A new one of the old name begins empty.
    assert_eq!(sh(&daemon, &["-v", "store:/a"], "busybox", "ls /a"), "");
}

#[test]
fn an_images_volume_is_filled_from_the_image_and_goes_with_rm() {
    let (_machine, daemon) = with_volume_image();
    let script = "stat -c '%u %a' /data; cat /data/link /data/sub/deep; echo new > /data/new; ls /data";
    assert_eq!(sh(&daemon, &[], "store", script), "70 700\nseed\ndeep\nlink\nnew\nseed\nsub\n");
    assert_eq!(daemon.ok(&["volume", "ls", "-q"]), "", "--rm takes a volume without a name along");

    let ls = |options: &[&str]| sh(&daemon, options, "store", "ls /data");
    assert_eq!(ls(&["-v", "mine:/data"]), "link\nseed\nsub\n");
    sh(&daemon, &["-v", "mine:/data"], "store", "busybox rm /data/seed /data/link; echo more > /data/more");
    assert_eq!(ls(&["-v", "mine:/data"]), "more\nsub\n", "what holds something is not filled again");
    assert_eq!(ls(&["-v", "bare:/data:nocopy"]), "");
    assert_eq!(ls(&["--mount", "type=volume,src=mine,dst=/data,volume-subpath=sub"]), "deep\n");
    let missing = daemon.fails(
        127,
        &[
            "run",
            "--rm",
            "--network",
            "none",
            "--mount",
            "type=volume,src=mine,dst=/data,volume-subpath=none",
            "store",
            "true",
        ],
    );
    assert!(missing.contains("no such file or directory"), "{missing}");

    daemon.ok(&["run", "-d", "--name", "kept", "--network", "none", "store", "true"]);
    let anonymous = daemon.ok(&["volume", "ls", "-q", "--filter", "dangling=false"]);
    assert_eq!(anonymous.trim().len(), 64);
    daemon.ok(&["wait", "kept"]);
    daemon.ok(&["rm", "kept"]);
    assert!(daemon.ok(&["volume", "ls", "-q", "--filter", "dangling=true"]).contains(anonymous.trim()));
    assert!(daemon.ok(&["volume", "prune", "-f"]).contains(anonymous.trim()));
    assert_eq!(daemon.ok(&["volume", "ls", "-q"]), "bare\nmine\n");
    assert!(daemon.ok(&["volume", "prune", "-a", "-f"]).contains("mine"));
}

#[test]
fn volumes_and_tmpfs_lie_in_each_other_in_any_order() {
    let (_machine, daemon) = with_busybox();
    let options = [
        "-v",
        "inner:/a/b/c",
        "--tmpfs",
        "/a/b",
        "-v",
        "outer:/a",
        "--mount",
        "type=tmpfs,dst=/a/b/c/d,tmpfs-size=1m,tmpfs-mode=1700",
    ];
    let script = "for d in /a /a/b /a/b/c /a/b/c/d; do grep -c \" $d \" /proc/mounts; done; stat -c %a /a/b/c/d; echo 1 > /a/b/c/file";
    assert_eq!(sh(&daemon, &options, "busybox", script), "1\n1\n1\n1\n1700\n");
    assert_eq!(sh(&daemon, &["-v", "inner:/x"], "busybox", "cat /x/file"), "1\n");
    let refusal = daemon
        .fails(125, &["run", "--network", "none", "-v", "inner:/x", "-v", "outer:/x/", "busybox", "true"]);
    assert!(refusal.contains("Duplicate mount point: /x"), "{refusal}");
}

#[test]
fn volumes_are_there_after_the_end_of_daemon_and_sandbox() {
    let (machine, daemon) = with_busybox();
    sh(&daemon, &["-v", "store:/a"], "busybox", "echo kept > /a/file");
    sh(&daemon, &["-v", "gone:/a"], "busybox", "echo gone > /a/file");
    daemon.end();
    machine.kill_sandbox();
    let daemon = Daemon::start(&machine);
    // The sandbox does not run: its files go when it starts.
    daemon.ok(&["volume", "rm", "gone"]);
    daemon.ok(&["volume", "create", "gone"]);
    let script = "cat /a/file; ls /b";
    assert_eq!(sh(&daemon, &["-v", "store:/a", "-v", "gone:/b"], "busybox", script), "kept\n");
    let usage = daemon.ok(&[
        "system",
        "df",
        "-v",
        "--format",
        "{{range .Volumes}}{{.Name}} {{.Links}} {{.Size}};{{end}}",
    ]);
    assert!(usage.contains("store 0 ") && usage.contains("gone 0 "), "{usage}");
}

#[test]
fn what_cannot_be_given_is_refused_by_name() {
    let (_machine, daemon) = with_busybox();
    for (options, words) in [
        (&["-v", "a/b:/x"][..], "includes invalid characters for a local volume name"),
        (&["-v", "ab:/x:fly"], "invalid mode: fly"),
        (&["--volume-driver", "nfs", "-v", "ab:/x"], "plugin \"nfs\" not found"),
        (&["--volumes-from", "nobody"], "No such container: nobody"),
    ] {
        let mut args = vec!["create", "--network", "none"];
        args.extend(options);
        args.extend(["busybox", "true"]);
        let refusal = daemon.fails(1, &args);
        assert!(refusal.contains(words), "{options:?}: {refusal}");
    }
    let refusal = daemon.fails(1, &["volume", "create", "--opt", "type=tmpfs", "ab"]);
    assert!(refusal.contains("the volume option `type` is not supported"), "{refusal}");
    assert_eq!(daemon.ok(&["volume", "ls", "-q"]), "", "nothing is left of what was refused");
    assert_eq!(daemon.ok(&["ps", "-aq"]), "");
}
