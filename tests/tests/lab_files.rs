//! Directories and files of the host in containers of the virtual machine: both sides see what the other does, nothing else can be reached, and
//! it lasts exactly as long as it should, whoever dies.

use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::fs::{MetadataExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::LazyLock,
    time::{Duration, Instant},
};

use coracle_tests::{Finished, Installation};

static CORACLE: LazyLock<Installation> = LazyLock::new(|| Installation::new().with_busybox());

/// What the guest may remember of names and attributes of the host's files is at most this old.
const VALID: Duration = Duration::from_secs(1);

/// The statics of a test program are never dropped, so the last part takes the VM down.
#[test]
fn the_hosts_files_in_containers() {
    CORACLE.run_parts(&[
        ("both_sides_see_what_the_other_does", both_sides_see_what_the_other_does),
        ("a_read_only_mount_cannot_be_changed", a_read_only_mount_cannot_be_changed),
        ("a_single_file_is_that_file", a_single_file_is_that_file),
        ("a_running_container_sees_changes_of_the_host", a_running_container_sees_changes_of_the_host),
        ("shared_mappings_and_locks_hold_among_containers", shared_mappings_and_locks_hold_among_containers),
        ("nothing_beside_the_tree_can_be_reached", nothing_beside_the_tree_can_be_reached),
        ("a_grant_ends_with_its_container", a_grant_ends_with_its_container),
        ("a_killed_daemon_comes_back_to_its_grants", a_killed_daemon_comes_back_to_its_grants),
        ("a_killed_file_server_takes_only_the_files_along", a_killed_file_server_takes_only_the_files_along),
        ("a_container_has_its_files_again_after_a_restart", a_container_has_its_files_again_after_a_restart),
        ("a_killed_machine_leaves_nothing_behind", a_killed_machine_leaves_nothing_behind),
    ]);
}

fn docker(args: &[&str]) -> Finished {
    CORACLE.docker(args)
}

/// A folder of the host for one part, and `-v` options for it.
fn folder(name: &str) -> (PathBuf, String) {
    let path = CORACLE.scratch().join(name);
    fs::create_dir(&path).unwrap();
    let volume = format!("{}:/d", path.display());
    (path, volume)
}

/// Runs a script in a container with the folder at `/d`.
fn sh(volume: &str, script: &str) -> Finished {
    docker(&["run", "--rm", "--network", "none", "-v", volume, "busybox", "sh", "-c", script])
}

/// Starts a container that obeys [`exec`].
fn start(name: &str, volume: &str) {
    docker(&["run", "-d", "--network", "none", "--name", name, "-v", volume, "busybox", "sleep", "1000"])
        .ok();
}

fn exec(name: &str, script: &str) -> Finished {
    docker(&["exec", name, "sh", "-c", script])
}

fn both_sides_see_what_the_other_does() {
    let (path, volume) = folder("both");
    fs::write(path.join("from-host"), "hello\n").unwrap();
    fs::write(path.join("to-remove"), "x").unwrap();
    let big: Vec<u8> =
        (0..3_000_000u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    fs::write(path.join("big"), &big).unwrap();
    let script = "set -e; cat /d/from-host; echo inside > /d/new; mkdir /d/sub; mv /d/new /d/sub/renamed
        rm /d/to-remove; cp /d/big /d/copy; ln -s renamed /d/sub/link; cat /d/sub/link; chmod 640 /d/sub/renamed
        printf more >> /d/from-host; ls /d | tr '\\n' ' '";
    assert_eq!(sh(&volume, script).text(), "hello\ninside\nbig copy from-host sub");
    assert!(fs::read(path.join("copy")).unwrap() == big, "the copy is another");
    assert_eq!(fs::read_to_string(path.join("sub/link")).unwrap(), "inside\n");
    assert_eq!(fs::read_to_string(path.join("from-host")).unwrap(), "hello\nmore");
    assert!(!path.join("to-remove").exists());
    assert_eq!(fs::metadata(path.join("copy")).unwrap().uid(), rustix::process::geteuid().as_raw());
}

fn a_read_only_mount_cannot_be_changed() {
    let (path, volume) = folder("read-only");
    fs::write(path.join("file"), "content").unwrap();
    let script = "cat /d/file; for try in 'echo x > /d/file' 'touch /d/new' 'rm /d/file' 'mkdir /d/sub' 'chmod 0 /d/file'
        do sh -c \"$try\" 2>/dev/null && echo \"$try worked\"; done; true";
    assert_eq!(sh(&format!("{volume}:ro"), script).text(), "content");
    assert_eq!(fs::read_dir(&path).unwrap().count(), 1);
}

fn a_single_file_is_that_file() {
    let (path, _) = folder("single");
    let file = path.join("file");
    fs::write(&file, "first\n").unwrap();
    fs::write(path.join("beside"), "secret").unwrap();
    let volume = format!("{}:/etc/the-file", file.display());
    assert_eq!(sh(&volume, "cat /etc/the-file; echo second >> /etc/the-file").text(), "first");
    assert_eq!(fs::read_to_string(&file).unwrap(), "first\nsecond\n");
}

fn a_running_container_sees_changes_of_the_host() {
    let (path, volume) = folder("changes");
    fs::write(path.join("file"), "old").unwrap();
    start("watcher", &volume);
    assert_eq!(exec("watcher", "cat /d/file; ls /d").text(), "oldfile");
    fs::write(path.join("file"), "newer").unwrap();
    fs::write(path.join("other"), "").unwrap();
    let written = Instant::now();
    while exec("watcher", "cat /d/file; ls /d | tr '\\n' ' '").text() != "newerfile other" {
        // Ten times as long: the emulated processors are slow.
        assert!(written.elapsed() < 10 * VALID, "the container does not see it");
    }
    docker(&["rm", "-f", "watcher"]).ok();
}

fn shared_mappings_and_locks_hold_among_containers() {
    let (path, volume) = folder("shared");
    fs::write(path.join("file"), vec![b'.'; 4096]).unwrap();
    start("one", &volume);
    start("two", &volume);
    program(&path, "mapper", MAPPER);
    program(&path, "locker", LOCKER);
    assert_eq!(exec("one", "/d/mapper /d/file written").text(), "was ........");
    assert_eq!(exec("two", "/d/mapper /d/file again...").text(), "was written.");
    assert_eq!(&fs::read(path.join("file")).unwrap()[..10], b"again.....");
    let mut holder = CORACLE.command("docker");
    let mut holder = holder
        .args(["exec", "-i", "one", "/d/locker", "/d/file"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(holder.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "held");
    assert_eq!(exec("two", "/d/locker /d/file </dev/null").text(), "taken");
    drop(holder.stdin.take());
    holder.wait().unwrap();
    assert_eq!(exec("two", "/d/locker /d/file </dev/null").text(), "held");
    docker(&["rm", "-f", "one", "two"]).ok();
}

/// Tells what a file begins with, by a shared mapping, and writes there.
const MAPPER: &str = r#"
    #include <fcntl.h>
    #include <stdio.h>
    #include <string.h>
    #include <sys/mman.h>
    int main(int count, char **words) {
        int file = open(words[1], O_RDWR);
        char *map = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (map == MAP_FAILED) { perror("mmap"); return 1; }
        printf("was %.8s\n", map);
        memcpy(map, words[2], strlen(words[2]));
        return msync(map, 4096, MS_SYNC);
    }"#;

/// Holds a lock on a file until its input ends.
const LOCKER: &str = r#"
    #include <fcntl.h>
    #include <stdio.h>
    #include <sys/file.h>
    int main(int count, char **words) {
        puts(flock(open(words[1], O_RDWR), LOCK_EX | LOCK_NB) ? "taken" : "held");
        fflush(stdout);
        while (getchar() != EOF);
        return 0;
    }"#;

/// Leaves a program in a folder that needs no libraries.
fn program(folder: &Path, name: &str, source: &str) {
    let program = folder.join(name);
    let arguments = ["-static", "-x", "c", "-o", program.to_str().unwrap(), "-"];
    coracle_tests::run_with_input(Command::new("cc").args(arguments), source.as_bytes()).ok();
}

fn nothing_beside_the_tree_can_be_reached() {
    let (path, volume) = folder("inside");
    let (secret, _) = folder("secret");
    fs::write(secret.join("file"), "secret").unwrap();
    symlink(&secret, path.join("absolute")).unwrap();
    symlink("../secret", path.join("relative")).unwrap();
    symlink("/proc/self/root", path.join("magic")).unwrap();
    let script = "for name in absolute/file relative/file ../secret/file magic/d/../secret/file
        do cat /d/$name 2>/dev/null && echo \"$name is there\"; done; true";
    assert_eq!(sh(&volume, script).text(), "");
}

/// The trees that the file server has, as its log and state do not say: those that the process has descriptors of.
fn granted() -> Vec<PathBuf> {
    let pid = CORACLE.status()["vms"][0]["file_server_pid"].as_i64().expect("a file server's pid");
    let links = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let scratch = CORACLE.scratch().canonicalize().unwrap();
    links
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .filter(|path| path.starts_with(&scratch) && !path.starts_with(CORACLE.home()))
        .collect()
}

fn a_grant_ends_with_its_container() {
    let (path, volume) = folder("granted");
    let path = path.canonicalize().unwrap();
    start("holder", &volume);
    assert!(granted().contains(&path), "{:?}", granted());
    docker(&["rm", "-f", "holder"]).ok();
    assert!(granted().is_empty(), "{:?}", granted());
}

fn a_killed_daemon_comes_back_to_its_grants() {
    let (path, volume) = folder("daemon");
    fs::write(path.join("file"), "content").unwrap();
    start("survivor", &volume);
    let server = CORACLE.status()["vms"][0]["file_server_pid"].clone();
    CORACLE.kill(CORACLE.daemon_pid());
    CORACLE.coracle(&["up"]).ok();
    assert_eq!(CORACLE.status()["vms"][0]["file_server_pid"], server);
    assert_eq!(exec("survivor", "cat /d/file; echo more > /d/more").text(), "content");
    assert_eq!(fs::read_to_string(path.join("more")).unwrap(), "more\n");
    docker(&["restart", "-t", "0", "survivor"]).ok();
    assert_eq!(exec("survivor", "cat /d/file").text(), "content");
    docker(&["rm", "-f", "survivor"]).ok();
    assert!(granted().is_empty(), "{:?}", granted());
}

fn a_killed_file_server_takes_only_the_files_along() {
    let (path, volume) = folder("lost");
    fs::write(path.join("file"), "content").unwrap();
    start("loser", &volume);
    docker(&["run", "-d", "--network", "none", "--name", "beside", "busybox", "sleep", "1000"]).ok();
    let server = CORACLE.status()["vms"][0]["file_server_pid"].as_i64().unwrap() as i32;
    CORACLE.kill(server);
    let killed = Instant::now();
    while CORACLE.status()["vms"][0]["lost"].is_null() {
        assert!(killed.elapsed() < Duration::from_secs(20), "nobody says that it is lost");
    }
    // Whoever wants a file is told that there is none, and does not wait.
    assert_ne!(exec("loser", "cat /d/file").code, 0);
    assert_eq!(exec("beside", "echo here").text(), "here");
    assert!(sh(&volume, "true").err().contains("coracle down"));
    docker(&["rm", "-f", "beside"]).ok();
}

fn a_container_has_its_files_again_after_a_restart() {
    CORACLE.coracle(&["down"]).ok();
    assert!(processes().is_empty(), "{:?}", processes());
    CORACLE.coracle(&["up"]).ok();
    docker(&["start", "loser"]).ok();
    assert_eq!(exec("loser", "cat /d/file").text(), "content");
    assert!(CORACLE.status()["vms"][0]["lost"].is_null());
    docker(&["rm", "-f", "loser"]).ok();
}

fn a_killed_machine_leaves_nothing_behind() {
    let (path, volume) = folder("killed");
    fs::write(path.join("file"), "content").unwrap();
    start("victim", &volume);
    CORACLE.kill(CORACLE.vmm_pid());
    assert_eq!(docker(&["wait", "victim"]).text(), "255");
    docker(&["start", "victim"]).ok();
    assert_eq!(exec("victim", "cat /d/file").text(), "content");
    assert_eq!(processes().len(), 2, "{:?}", processes());
    docker(&["rm", "-f", "victim"]).ok();
}

/// The processes of this installation's machines: their logs are in its folder.
fn processes() -> Vec<String> {
    let home = CORACLE.home();
    let logs = |pid: &str| {
        let stderr = fs::read_link(format!("/proc/{pid}/fd/2")).ok()?;
        (stderr.starts_with(home.join("vms"))).then(|| format!("{pid} {}", stderr.display()))
    };
    fs::read_dir("/proc").unwrap().filter_map(|entry| logs(entry.ok()?.file_name().to_str()?)).collect()
}
