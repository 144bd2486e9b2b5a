//! `docker cp`, `export` and `diff`: files of containers that run and of such that do not, hostile ones too. Needs root.

mod support;

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::Path,
    process::{Command, Stdio},
};

use support::{Daemon, Machine, text, with_busybox};

fn run(daemon: &Daemon, name: &str, script: &str) {
    daemon.ok(&["run", "-d", "--name", name, "--network", "none", "busybox", "sh", "-c", script]);
}

fn create(daemon: &Daemon, name: &str) {
    daemon.ok(&["create", "--name", name, "--network", "none", "busybox", "sleep", "1000"]);
}

fn sh(daemon: &Daemon, name: &str, script: &str) -> String {
    daemon.ok(&["exec", name, "sh", "-c", script])
}

/// A PUT of bytes; status and answer.
fn put(daemon: &Daemon, path: &str, archive: &Path) -> (u16, String) {
    let output = Command::new("curl")
        .args(["--silent", "--show-error", "--max-time", "60", "--unix-socket"])
        .arg(daemon.socket())
        .args(["--request", "PUT", "--header", "Expect:", "--upload-file"])
        .arg(archive)
        .args(["--write-out", "\n%{http_code}", &format!("http://docker{path}")])
        .output()
        .unwrap();
    let answer = text(&output.stdout);
    let (body, status) = answer.rsplit_once('\n').unwrap_or_else(|| panic!("{}", text(&output.stderr)));
    (status.parse().unwrap(), body.to_owned())
}

/// The names in a tar stream that docker or curl writes.
fn listed(mut command: Command) -> Vec<String> {
    let mut source = command.stdout(Stdio::piped()).spawn().unwrap();
    let tar = Command::new("tar").arg("-tPf").arg("-").stdin(source.stdout.take().unwrap()).output().unwrap();
    assert!(source.wait().unwrap().success() && tar.status.success(), "{}", text(&tar.stderr));
    text(&tar.stdout).lines().map(str::to_owned).collect()
}

#[test]
fn files_go_in_and_out_of_containers_that_run_and_of_such_that_do_not() {
    let (machine, daemon) = with_busybox();
    let here = machine.home.path().join("here");
    fs::create_dir_all(here.join("tree/sub")).unwrap();
    fs::write(here.join("tree/a"), "a file").unwrap();
    fs::write(here.join("tree/sub/b"), "another").unwrap();
    symlink("a", here.join("tree/link")).unwrap();
    fs::set_permissions(here.join("tree/a"), fs::Permissions::from_mode(0o4751)).unwrap();
    let tree = here.join("tree");
    let tree = tree.to_str().unwrap();

    run(&daemon, "up", "sleep 1000");
    create(&daemon, "down");
    for name in ["up", "down"] {
        daemon.ok(&["cp", tree, &format!("{name}:/tmp")]);
        daemon.ok(&["cp", &format!("{tree}/a"), &format!("{name}:/renamed")]);
        // Into what is not there yet, under a new name.
        daemon.ok(&["cp", tree, &format!("{name}:/fresh")]);
        let out = here.join(format!("out-{name}"));
        daemon.ok(&["cp", &format!("{name}:/tmp/tree"), out.to_str().unwrap()]);
        assert_eq!(fs::read_to_string(out.join("sub/b")).unwrap(), "another");
        assert_eq!(fs::read_link(out.join("link")).unwrap(), Path::new("a"));
        assert_eq!(fs::metadata(out.join("a")).unwrap().mode() & 0o7777, 0o4751);
        let one = here.join("one");
        daemon.ok(&["cp", "-L", &format!("{name}:/tmp/tree/link"), one.to_str().unwrap()]);
        assert_eq!(fs::read_to_string(&one).unwrap(), "a file");
    }
    assert_eq!(sh(&daemon, "up", "cat /renamed /fresh/sub/b"), "a fileanother");
    daemon.ok(&["start", "down"]);
    assert_eq!(sh(&daemon, "down", "cat /renamed /tmp/tree/link"), "a filea file");

    let error = daemon.fails(1, &["cp", "up:/no/such", "-"]);
    assert!(error.contains("Could not find the file /no/such in container up"), "{error}");
    let error = daemon.fails(1, &["cp", tree, "up:/renamed"]);
    assert!(error.contains("cannot copy directory"), "{error}");
    let error = daemon.fails(1, &["cp", tree, "up:/no/such/place/"]);
    assert!(error.contains("Could not find the file /no/such"), "{error}");
}

#[test]
fn a_stream_goes_in_and_out_by_dash() {
    let (machine, daemon) = with_busybox();
    create(&daemon, "box");
    daemon.ok(&["cp", "box:/etc", &machine.home.path().join("etc").display().to_string()]);
    assert_eq!(listed(daemon.command(&["cp", "box:/etc", "-"])), ["etc/", "etc/group", "etc/passwd"]);
    assert_eq!(listed(daemon.command(&["cp", "box:/etc/.", "-"])), ["./", "./group", "./passwd"]);
    assert!(listed(daemon.command(&["cp", "box:/", "-"])).contains(&"/bin/busybox".to_owned()));
    let tar = daemon.docker(&["cp", "box:/etc/passwd", "-"]).stdout;
    let output = daemon.with_input(&["cp", "-", "box:/tmp"], tar);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(listed(daemon.command(&["cp", "box:/tmp/passwd", "-"])), ["passwd"]);
}

#[test]
fn links_never_lead_out_of_the_container() {
    let (machine, daemon) = with_busybox();
    let secret = machine.home.path().join("secret");
    fs::write(&secret, "the host's").unwrap();
    let up = "../".repeat(20);
    let script = format!(
        "ln -s {up}{} /climb; ln -s {} /absolute; ln -s / /top; ln -s {up} /folder; ln -s /proc/1/root /magic; sleep 1000",
        secret.display(),
        secret.display()
    );
    run(&daemon, "evil", &script);
    sh(&daemon, "evil", "while [ ! -L /magic ]; do sleep 0.01; done");
    for stopped in [false, true] {
        if stopped {
            daemon.ok(&["kill", "evil"]);
        }
        for path in ["/climb", "/absolute"] {
            let out = daemon.docker(&["cp", "-L", &format!("evil:{path}"), "-"]);
            assert!(!out.status.success() && !text(&out.stdout).contains("the host's"), "{path}");
        }
        let archive = machine.home.path().join("file.tar");
        let payload = machine.home.path().join("payload");
        fs::write(&payload, "payload").unwrap();
        let made = Command::new("tar").arg("-cPf").arg(&archive).arg(&payload).status().unwrap();
        assert!(made.success());
        for target in ["/folder", "/top"] {
            let (status, answer) = put(&daemon, &format!("/containers/evil/archive?path={target}"), &archive);
            assert_eq!(status, 200, "{answer}");
        }
        let made = daemon.docker(&["cp", &format!("evil:{}", payload.display()), "-"]);
        assert!(text(&made.stdout).contains("payload"), "it is in the container, at the same path");
        // What a link of /proc means depends on who looks: it is not followed at all.
        let (status, _) = put(&daemon, "/containers/evil/archive?path=/magic/tmp", &archive);
        assert_ne!(status, 200);
    }
    assert_eq!(fs::read_to_string(&secret).unwrap(), "the host's");
}

#[test]
fn volumes_of_a_container_that_does_not_run_are_where_they_are_when_it_does() {
    let (machine, daemon) = with_busybox();
    let here = machine.home.path().join("here");
    fs::create_dir(&here).unwrap();
    fs::write(here.join("late"), "put in").unwrap();
    let out = |name: &str| here.join(name).to_str().unwrap().to_owned();
    let script = "echo kept > /vol/file; mkdir /vol/deep; echo deeper > /deeper/file; ln -s /vol/file /link";
    let volumes = ["-v", "one:/vol", "-v", "two:/deeper", "-v", "three:/vol/deep"];
    daemon.ok(&[&["run", "--name", "done"], &volumes[..], &["busybox", "sh", "-c", script]].concat());

    daemon.ok(&["cp", "done:/vol/file", &out("file")]);
    assert_eq!(fs::read_to_string(here.join("file")).unwrap(), "kept\n");
    daemon.ok(&["cp", "-L", "done:/link", &out("followed")]);
    assert_eq!(fs::read_to_string(here.join("followed")).unwrap(), "kept\n");
    daemon.ok(&["cp", "done:/deeper", &out("tree")]);
    assert_eq!(fs::read_to_string(here.join("tree/file")).unwrap(), "deeper\n");
    daemon.ok(&["cp", &out("late"), "done:/vol/deep/late"]);
    // What is mounted is no part of the container's own files.
    assert!(!daemon.ok(&["diff", "done"]).contains("file"));
    let export = daemon.command(&["export", "done"]);
    assert!(!listed(export).iter().any(|name| name.starts_with("vol/f")));
    let read = ["run", "--rm", "-v", "three:/x", "busybox", "cat", "/x/late"];
    assert_eq!(daemon.ok(&read), "put in");

    // Not yet started: what the image has there is in the volume, and read-only is read-only.
    daemon.ok(&["create", "--name", "new", "-v", "/bin", "-v", "one:/vol:ro", "busybox", "true"]);
    daemon.ok(&["cp", "new:/bin/busybox", &out("busybox")]);
    assert!(here.join("busybox").is_file());
    let refused = daemon.docker(&["cp", &out("late"), "new:/vol/late"]);
    assert_eq!(refused.status.code(), Some(1), "{}", text(&refused.stderr));
    assert!(text(&refused.stderr).contains("ead-only"), "{}", text(&refused.stderr));
    daemon.ok(&["start", "-a", "new"]);
    daemon.ok(&["rm", "-v", "done", "new"]);
}

#[test]
fn owners_and_kinds_are_kept_or_changed_as_the_client_says() {
    let (machine, daemon) = with_busybox();
    let here = machine.home.path().join("here");
    fs::create_dir_all(here.join("thing")).unwrap();
    fs::write(here.join("owned"), "x").unwrap();
    std::os::unix::fs::chown(here.join("owned"), Some(4242), Some(4343)).unwrap();
    daemon.ok(&[
        "run",
        "-d",
        "--name",
        "box",
        "--network",
        "none",
        "--user",
        "sailor",
        "busybox",
        "sleep",
        "1000",
    ]);
    let archive = machine.home.path().join("a.tar");
    let tar = |names: &[&str]| {
        let made = Command::new("tar").arg("-C").arg(&here).arg("-cf").arg(&archive).args(names).status();
        assert!(made.unwrap().success());
    };
    tar(&["owned"]);
    let owner = || daemon.ok(&["exec", "--user", "0", "box", "busybox", "stat", "-c", "%u:%g", "/tmp/owned"]);
    assert_eq!(put(&daemon, "/containers/box/archive?path=/tmp", &archive).0, 200);
    assert_eq!(owner(), "4242:4343\n");
    assert_eq!(put(&daemon, "/containers/box/archive?path=/tmp&copyUIDGID=true", &archive).0, 200);
    assert_eq!(owner(), "1000:1000\n");

    // /etc/passwd is a file, and so is not replaced by a directory, if that is wished.
    fs::create_dir_all(here.join("passwd")).unwrap();
    tar(&["passwd"]);
    let (status, answer) = put(&daemon, "/containers/box/archive?path=/etc&noOverwriteDirNonDir=1", &archive);
    assert!(status == 400 && answer.contains("cannot overwrite non-directory"), "{answer}");
    let (status, answer) = put(&daemon, "/containers/box/archive?path=/etc/passwd", &archive);
    assert!(status == 400 && answer.contains("extraction point is not a directory"), "{answer}");
    let (status, answer) = put(&daemon, "/containers/box/archive?path=/none", &archive);
    assert!(status == 404 && answer.contains("Could not find the file /none"), "{answer}");
    daemon.ok(&["create", "--name", "fixed", "--read-only", "--network", "none", "busybox", "true"]);
    let (status, answer) = put(&daemon, "/containers/fixed/archive?path=/tmp", &archive);
    assert!(status == 400 && answer.contains("container rootfs is marked read-only"), "{answer}");
}

#[test]
fn an_archive_may_be_compressed_and_must_be_one() {
    let (machine, daemon) = with_busybox();
    create(&daemon, "box");
    let folder = machine.home.path();
    fs::write(folder.join("plain"), "compressed once").unwrap();
    for (flag, status) in [("-z", 200), ("--zstd", 200), ("-j", 501), ("-J", 501)] {
        let archive = folder.join("c.tar");
        let made = Command::new("tar")
            .arg("-C")
            .arg(folder)
            .arg(flag)
            .arg("-cf")
            .arg(&archive)
            .arg("plain")
            .status();
        if !made.unwrap().success() {
            continue;
        }
        let (got, answer) = put(&daemon, "/containers/box/archive?path=/tmp", &archive);
        assert_eq!(got, status, "{flag} {answer}");
    }
    assert!(text(&daemon.docker(&["cp", "box:/tmp/plain", "-"]).stdout).contains("compressed once"));
    let bad = folder.join("bad");
    for bytes in [vec![7; 4096], b"short".to_vec(), [&[0x1f, 0x8b, 8][..], &[9; 3000]].concat()] {
        fs::write(&bad, bytes).unwrap();
        let (status, answer) = put(&daemon, "/containers/box/archive?path=/tmp", &bad);
        assert!(status == 400 && answer.contains("archive"), "{status} {answer}");
    }
    // An entry that climbs out of where it is unpacked.
    let climbing = folder.join("climbing.tar");
    let made = Command::new("tar")
        .arg("-C")
        .arg(folder)
        .arg("-cPf")
        .arg(&climbing)
        .args(["--transform", "s,plain,../../plain,", "plain"])
        .status();
    assert!(made.unwrap().success());
    let (status, answer) = put(&daemon, "/containers/box/archive?path=/tmp", &climbing);
    assert!(status == 400 && answer.contains("is outside of"), "{answer}");
    for (method, path) in [("GET", "/containers/box/archive"), ("HEAD", "/containers/none/archive?path=/")] {
        let status = Command::new("curl")
            .args(["-s", "-o", "/dev/null", "-w", "%{http_code}", "--unix-socket"])
            .arg(daemon.socket())
            .args(if method == "HEAD" { vec!["-I"] } else { vec![] })
            .arg(format!("http://docker{path}"))
            .output()
            .unwrap();
        assert_eq!(text(&status.stdout), if method == "HEAD" { "404" } else { "400" });
    }
}

#[test]
fn an_archive_that_does_not_fit_on_the_disk_is_refused_and_leaves_room() {
    let machine = Machine::with_disk(48);
    let daemon = Daemon::start(&machine);
    daemon.load_busybox();
    create(&daemon, "box");
    // 200 MiB of zeros in a few KiB.
    let bomb = tempfile::NamedTempFile::new().unwrap();
    let script = format!(
        "truncate -s 200M {0}.raw && tar -czf {0} -C / {1}.raw && rm {0}.raw",
        bomb.path().display(),
        &bomb.path().display().to_string()[1..]
    );
    assert!(Command::new("sh").args(["-c", &script]).status().unwrap().success());
    let (status, answer) = put(&daemon, "/containers/box/archive?path=/tmp", bomb.path());
    assert!(status == 500 && answer.contains("no space left on device"), "{status} {answer}");
    // What did not fit was taken away again.
    let small = machine.home.path().join("small");
    fs::write(&small, vec![1; 4 << 20]).unwrap();
    daemon.ok(&["cp", small.to_str().unwrap(), "box:/tmp/small"]);
    daemon.ok(&["start", "box"]);
}

#[test]
fn an_export_is_the_root_file_system_and_nothing_that_is_mounted_in_it() {
    let (_machine, daemon) = with_busybox();
    run(&daemon, "box", "echo new > /new; echo hidden > /run-me; sleep 1000");
    sh(&daemon, "box", "while [ ! -s /run-me ]; do sleep 0.01; done");
    let running = listed(daemon.command(&["export", "box"]));
    daemon.ok(&["kill", "box"]);
    let stopped = listed(daemon.command(&["export", "box"]));
    assert_eq!(running, stopped);
    for name in ["bin/busybox", "bin/sh", "new", "etc/passwd", "proc/", "dev/"] {
        assert!(running.contains(&name.to_owned()), "{name} {running:?}");
    }
    assert!(!running.iter().any(|name| name.starts_with("proc/") && name != "proc/"), "{running:?}");
    assert!(!running.iter().any(|name| name.starts_with("dev/n")), "{running:?}");
}

#[test]
fn a_diff_lists_what_was_added_changed_and_deleted() {
    let (_machine, daemon) = with_busybox();
    create(&daemon, "fresh");
    assert_eq!(daemon.ok(&["diff", "fresh"]), "");
    daemon.ok(&["run", "--name", "idle", "--network", "none", "busybox", "true"]);
    assert_eq!(daemon.ok(&["diff", "idle"]), "", "what the start makes is no change");
    let script = "mkdir -p /new/deep; echo x > /new/deep/file; echo y >> /etc/group; busybox rm /etc/passwd; \
                  busybox rm -r /root; mkdir /root; echo z > /root/own; busybox touch -r /bin/busybox /tmp/old";
    daemon.ok(&["run", "--name", "busy", "--network", "none", "busybox", "sh", "-c", script]);
    let diff = daemon.ok(&["diff", "busy"]);
    let lines: Vec<&str> = diff.lines().collect();
    assert_eq!(
        lines,
        [
            "C /etc",
            "C /etc/group",
            "D /etc/passwd",
            "A /new",
            "A /new/deep",
            "A /new/deep/file",
            "C /root",
            "A /root/own",
            "C /tmp",
            "A /tmp/old"
        ]
    );
    let mut layer = Command::new("curl");
    layer
        .args(["-s", "--unix-socket"])
        .arg(daemon.socket())
        .arg("http://docker/coracle/containers/busy/layer");
    let names = listed(layer);
    assert_eq!(
        names,
        [
            "etc/",
            "etc/group",
            "etc/.wh.passwd",
            "new/",
            "new/deep/",
            "new/deep/file",
            "root/",
            "root/own",
            "tmp/",
            "tmp/old"
        ]
    );
    let sizes = daemon.ok(&["inspect", "--size", "-f", "{{.SizeRw}} {{.SizeRootFs}}", "busy"]);
    let mut sizes = sizes.split_whitespace().map(|size| size.parse::<u64>().unwrap());
    let (written, all) = (sizes.next().unwrap(), sizes.next().unwrap());
    assert!(written > 0 && written < 4096 && all > 500_000, "{written} {all}");
    assert!(daemon.ok(&["ps", "-a", "--size", "--format", "{{.Names}} {{.Size}}"]).contains("busy "));
    assert!(daemon.ok(&["system", "df"]).contains("Containers"));
}

#[test]
fn whoever_copies_does_not_hold_a_container_up_for_ever() {
    let (_machine, daemon) = with_busybox();
    run(&daemon, "box", "busybox dd if=/dev/zero of=/big bs=1M count=64 2>/dev/null; : > /done; sleep 1000");
    sh(&daemon, "box", "while [ ! -e /done ]; do sleep 0.01; done");
    daemon.ok(&["kill", "box"]);
    // A client that reads a little and then stands still.
    let mut slow = daemon.command(&["export", "box"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut out = slow.stdout.take().unwrap();
    std::io::Read::read_exact(&mut out, &mut [0; 1000]).unwrap();
    daemon.ok(&["start", "box"]);
    assert_eq!(sh(&daemon, "box", "echo still here"), "still here\n");
    let mut more = daemon.command(&["export", "box"]).stdout(Stdio::piped()).spawn().unwrap();
    std::io::Read::read_exact(&mut more.stdout.as_mut().unwrap(), &mut [0; 1000]).unwrap();
    daemon.ok(&["rm", "-f", "box"]);
    drop(out);
    let _ = slow.wait();
    more.kill().unwrap();
    more.wait().unwrap();
    assert_eq!(daemon.ok(&["ps", "-aq"]), "");
}
