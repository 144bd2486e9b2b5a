//! The README keeps its word: each command of its first session runs, and prints what it says.

use std::process::Command;

use coracle_tests::{Installation, coracle_binary, run, workspace};

/// A command and the lines that the README shows under it.
struct Step<'a> {
    command: &'a str,
    shown: Vec<&'a str>,
}

fn steps(readme: &str) -> Vec<Step<'_>> {
    let mut steps: Vec<Step<'_>> = Vec::new();
    let mut inside = false;
    for line in readme.lines() {
        match (line, line.strip_prefix("$ ")) {
            ("```console", _) => inside = true,
            ("```", _) => inside = false,
            (_, Some(command)) if inside => steps.push(Step { command, shown: Vec::new() }),
            (shown, None) if inside => steps.last_mut().expect("a command comes first").shown.push(shown),
            _ => (),
        }
    }
    steps
}

/// Whether a printed text has what the README shows; `…` stands for anything.
fn has(printed: &str, shown: &str) -> bool {
    let mut rest = printed;
    shown.split('…').all(|part| match rest.find(part) {
        Some(at) => {
            rest = &rest[at + part.len()..];
            true
        }
        None => false,
    })
}

#[test]
fn the_first_session_prints_what_the_readme_says() {
    let readme = std::fs::read_to_string(workspace().join("README.md")).unwrap();
    let steps = steps(&readme);
    assert!(steps.len() > 10, "the README has a first session");
    let coracle = Installation::new();
    let path = format!("{}:{}", coracle_binary().parent().unwrap().display(), std::env::var("PATH").unwrap());
    for step in steps {
        let mut shell: Command = coracle.command("sh");
        let finished = run(shell.args(["-c", step.command]).env("PATH", &path).current_dir(workspace())).ok();
        for shown in step.shown {
            assert!(
                has(&finished.out(), shown),
                "`{}` printed {:?}, not {shown:?}",
                step.command,
                finished.out()
            );
        }
    }
}
