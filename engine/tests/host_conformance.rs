//! What of Docker there is: every API endpoint and every command of the CLI is tried, and the list that comes of it must be the one in
//! `tests/conformance.md`. `CORACLE_BLESS=1` writes it anew. Needs root.

mod support;

use std::{fmt::Write, path::Path};

use support::{Daemon, text, with_busybox};

/// Method and path of an endpoint, as Docker's reference has it, and with what it is tried.
const ENDPOINTS: &[(&str, &str, &str, &str)] = &[
    ("HEAD", "/_ping", "/_ping", ""),
    ("GET", "/_ping", "/_ping", ""),
    ("GET", "/version", "/version", ""),
    ("GET", "/info", "/info", ""),
    ("GET", "/events", "/events?since=0&until=1", ""),
    ("GET", "/system/df", "/system/df", ""),
    ("POST", "/auth", "/auth", "{}"),
    ("GET", "/containers/json", "/containers/json?all=1&size=1", ""),
    ("POST", "/containers/create", "/containers/create?name=made", r#"{"Image":"busybox"}"#),
    ("GET", "/containers/{id}/json", "/containers/up/json?size=1", ""),
    ("GET", "/containers/{id}/top", "/containers/up/top", ""),
    ("GET", "/containers/{id}/logs", "/containers/up/logs?stdout=1", ""),
    ("GET", "/containers/{id}/changes", "/containers/up/changes", ""),
    ("GET", "/containers/{id}/export", "/containers/up/export", ""),
    ("GET", "/containers/{id}/stats", "/containers/up/stats?stream=0&one-shot=1", ""),
    ("POST", "/containers/{id}/resize", "/containers/up/resize?h=1&w=1", ""),
    ("POST", "/containers/{id}/start", "/containers/down/start", ""),
    ("POST", "/containers/{id}/stop", "/containers/down/stop?t=0", ""),
    ("POST", "/containers/{id}/restart", "/containers/down/restart?t=0", ""),
    ("POST", "/containers/{id}/kill", "/containers/down/kill", ""),
    ("POST", "/containers/{id}/update", "/containers/down/update", r#"{"RestartPolicy":{"Name":"no"}}"#),
    ("POST", "/containers/{id}/rename", "/containers/made/rename?name=renamed", ""),
    ("POST", "/containers/{id}/pause", "/containers/up/pause", ""),
    ("POST", "/containers/{id}/unpause", "/containers/up/unpause", ""),
    ("POST", "/containers/{id}/attach", "/containers/down/attach?stdout=1", ""),
    ("GET", "/containers/{id}/attach/ws", "/containers/up/attach/ws", ""),
    ("POST", "/containers/{id}/wait", "/containers/down/wait", ""),
    ("HEAD", "/containers/{id}/archive", "/containers/up/archive?path=/etc", ""),
    ("GET", "/containers/{id}/archive", "/containers/up/archive?path=/etc", ""),
    ("PUT", "/containers/{id}/archive", "/containers/up/archive?path=/etc", ""),
    ("DELETE", "/containers/{id}", "/containers/renamed", ""),
    ("POST", "/containers/prune", "/containers/prune", ""),
    ("POST", "/containers/{id}/exec", "/containers/up/exec", r#"{"Cmd":["true"]}"#),
    ("POST", "/exec/{id}/start", "/exec/none/start", "{}"),
    ("POST", "/exec/{id}/resize", "/exec/none/resize?h=1&w=1", ""),
    ("GET", "/exec/{id}/json", "/exec/none/json", ""),
    ("GET", "/images/json", "/images/json", ""),
    ("POST", "/images/create", "/images/create?fromImage=127.0.0.1:1/none&tag=x", ""),
    ("GET", "/images/{name}/json", "/images/busybox/json", ""),
    ("GET", "/images/{name}/history", "/images/busybox/history", ""),
    ("POST", "/images/{name}/push", "/images/busybox/push", ""),
    ("POST", "/images/{name}/tag", "/images/busybox/tag?repo=other&tag=x", ""),
    ("DELETE", "/images/{name}", "/images/other:x", ""),
    ("GET", "/images/search", "/images/search?term=busybox", ""),
    ("POST", "/images/prune", "/images/prune", ""),
    ("GET", "/images/{name}/get", "/images/busybox/get", ""),
    ("GET", "/images/get", "/images/get?names=busybox", ""),
    ("POST", "/images/load", "/images/load", "nonsense"),
    ("GET", "/distribution/{name}/json", "/distribution/127.0.0.1:1/none/json", ""),
    ("POST", "/commit", "/commit?container=none", "{}"),
    ("POST", "/build", "/build", ""),
    ("POST", "/build/prune", "/build/prune", ""),
    ("POST", "/session", "/session", ""),
    ("GET", "/networks", "/networks", ""),
    ("GET", "/networks/{id}", "/networks/bridge", ""),
    ("POST", "/networks/create", "/networks/create", r#"{"Name":"mine"}"#),
    ("POST", "/networks/{id}/connect", "/networks/mine/connect", r#"{"Container":"none"}"#),
    ("POST", "/networks/{id}/disconnect", "/networks/mine/disconnect", r#"{"Container":"none"}"#),
    ("DELETE", "/networks/{id}", "/networks/mine", ""),
    ("POST", "/networks/prune", "/networks/prune", ""),
    ("GET", "/volumes", "/volumes", ""),
    ("POST", "/volumes/create", "/volumes/create", r#"{"Name":"mine"}"#),
    ("GET", "/volumes/{name}", "/volumes/mine", ""),
    ("DELETE", "/volumes/{name}", "/volumes/mine", ""),
    ("POST", "/volumes/prune", "/volumes/prune", ""),
    ("GET", "/plugins", "/plugins", ""),
    ("GET", "/swarm", "/swarm", ""),
    ("POST", "/swarm/init", "/swarm/init", "{}"),
    ("GET", "/nodes", "/nodes", ""),
    ("GET", "/services", "/services", ""),
    ("GET", "/tasks", "/tasks", ""),
    ("GET", "/secrets", "/secrets", ""),
    ("GET", "/configs", "/configs", ""),
];

/// Commands of the CLI that need no network, and that are done when they are done.
const COMMANDS: &[&[&str]] = &[
    &["version"],
    &["info"],
    &["run", "--rm", "--network", "none", "busybox", "true"],
    &["create", "--name", "one", "--network", "none", "busybox", "sleep", "1000"],
    &["start", "one"],
    &["exec", "one", "true"],
    &["ps", "--all"],
    &["inspect", "one"],
    &["logs", "--tail", "1", "one"],
    &["attach", "--no-stdin", "gone"],
    &["cp", "one:/etc/passwd", "-"],
    &["diff", "one"],
    &["export", "one"],
    &["port", "one"],
    &["top", "one"],
    &["stats", "--no-stream", "one"],
    &["pause", "one"],
    &["unpause", "one"],
    &["update", "--restart", "no", "one"],
    &["rename", "one", "two"],
    &["restart", "-t", "0", "two"],
    &["stop", "-t", "0", "two"],
    &["wait", "two"],
    &["commit", "two", "snapshot"],
    &["kill", "up"],
    &["rm", "two"],
    &["images"],
    &["history", "busybox"],
    &["tag", "busybox", "alias"],
    &["save", "busybox"],
    &["rmi", "alias"],
    &["container", "prune", "--force"],
    &["image", "prune", "--force"],
    &["system", "df"],
    &["events", "--since", "0", "--until", "1"],
    &["network", "ls"],
    &["network", "create", "net"],
    &["volume", "ls"],
    &["volume", "create", "vol"],
    &["plugin", "ls"],
    &["swarm", "init"],
];

/// An answer as one cell: the reason of a refusal is the daemon's own sentence.
fn judge_endpoint(daemon: &Daemon, method: &str, path: &str, body: &str) -> String {
    let method_flag: Vec<&str> = if method == "HEAD" { vec!["--head"] } else { vec!["--request", method] };
    let mut curl = std::process::Command::new("curl");
    curl.args(["--silent", "--max-time", "10", "--unix-socket"]).arg(daemon.socket()).args(method_flag);
    if method != "HEAD" && method != "GET" {
        curl.args(["--header", "Content-Type: application/json", "--data-binary", body]);
    }
    let output =
        curl.args(["--write-out", "\n%{http_code}"]).arg(format!("http://docker{path}")).output().unwrap();
    let answer = text(&output.stdout);
    let (body, status) = answer.rsplit_once('\n').unwrap_or(("", "000"));
    match status {
        "501" => format!("refused: {}", sentence(body)),
        "404" if body.contains("page not found") => "missing".to_owned(),
        "000" => "no answer".to_owned(),
        "500" | "503" if !body.contains("registry") => format!("fails: {}", sentence(body)),
        _ => "works".to_owned(),
    }
}

fn sentence(body: &str) -> String {
    let value = body.split("\"message\":\"").nth(1).unwrap_or(body);
    value.trim_end().trim_end_matches("\"}").replace("\\\"", "\"").replace('|', "\\|")
}

fn judge_command(daemon: &Daemon, command: &[&str]) -> String {
    let output = daemon.docker(command);
    if output.status.success() {
        return "works".to_owned();
    }
    let error = text(&output.stderr);
    let line =
        error.lines().find(|line| line.contains("Error response from daemon: ")).unwrap_or(&error).trim();
    let line = line.rsplit("Error response from daemon: ").next().unwrap_or(line);
    if line.contains("not supported by Coracle") {
        format!("refused: {}", line.replace('|', "\\|"))
    } else {
        format!("fails: {}", line.replace('|', "\\|"))
    }
}

#[test]
fn the_list_of_what_there_is_says_what_there_is() {
    let (_machine, daemon) = with_busybox();
    daemon.ok(&["run", "-d", "-t", "--name", "up", "--network", "none", "busybox", "sleep", "1000"]);
    daemon.ok(&["create", "--name", "down", "--network", "none", "busybox", "sleep", "1000"]);
    let mut list = String::from(
        "# What of Docker there is\n\nGenerated by `engine/tests/host_conformance.rs`, which tries each and fails when this file says something else;\n`CORACLE_BLESS=1 cargo test -p coracle-engine --test host_conformance` writes it anew.\n\n## Endpoints of the API\n\n| endpoint | |\n|---|---|\n",
    );
    for (method, name, path, body) in ENDPOINTS {
        let verdict = judge_endpoint(&daemon, method, path, body);
        writeln!(list, "| `{method} {name}` | {verdict} |").unwrap();
    }
    list.push_str("\n## Commands of the CLI\n\n| command | |\n|---|---|\n");
    for command in COMMANDS {
        if command[0] == "attach" {
            daemon.ok(&["run", "-d", "--name", "gone", "--network", "none", "busybox", "sleep", "1"]);
        }
        let verdict = judge_command(&daemon, command);
        writeln!(list, "| `docker {}` | {verdict} |", command.join(" ")).unwrap();
    }
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/conformance.md");
    if std::env::var_os("CORACLE_BLESS").is_some() {
        std::fs::write(&file, &list).unwrap();
    }
    let known = std::fs::read_to_string(&file).unwrap_or_default();
    let differs: Vec<_> = list.lines().filter(|line| !known.lines().any(|old| old == *line)).collect();
    assert!(
        known == list,
        "tests/conformance.md says something else; if that is meant, write it anew with CORACLE_BLESS=1: {differs:#?}"
    );
    assert!(!list.contains("| fails"), "{list}");
}
