//! Changes to a config in the words of Dockerfiles, as `docker commit` and `docker import` take them with `--change`:
//! CMD, ENTRYPOINT, ENV, EXPOSE, HEALTHCHECK, LABEL, ONBUILD, STOPSIGNAL, USER, VOLUME and WORKDIR, in shell and in
//! JSON form, with variables of the config's environment. The text comes from a client: what is malformed or not
//! among these is an error that names it.

use serde_json::{Value, json};

use super::ContainerConfig;
use super::syntax::{self, expand};

/// Why changes are refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// An instruction that changes no config.
    #[error("{0} is not a valid change command")]
    NotAChange(String),
    /// No instruction at all.
    #[error("unknown instruction: {0}")]
    Unknown(String),
    /// An instruction whose arguments are no good.
    #[error("{instruction}: {reason}")]
    Malformed {
        /// Which one.
        instruction: String,
        /// What is wrong.
        reason: String,
    },
}

/// Instructions of Dockerfiles that are no changes.
const OTHERS: [&str; 9] = ["ADD", "ARG", "COPY", "FROM", "MAINTAINER", "RUN", "SHELL", "INCLUDE", "IMPORT"];
const SIGNALS: &[&str] = &[
    "ABRT", "ALRM", "BUS", "CHLD", "CLD", "CONT", "FPE", "HUP", "ILL", "INT", "IO", "IOT", "KILL", "PIPE",
    "POLL", "PROF", "PWR", "QUIT", "SEGV", "STKFLT", "STOP", "SYS", "TERM", "TRAP", "TSTP", "TTIN", "TTOU",
    "URG", "USR1", "USR2", "VTALRM", "WINCH", "XCPU", "XFSZ", "RTMIN", "RTMAX",
];

/// Applies changes in their order; nothing of a config with a bad change is to be used.
pub fn apply(config: &mut ContainerConfig, changes: &[String]) -> Result<(), ChangeError> {
    let mut changer = Changer { config, cmd_is_set: false };
    for line in changes.iter().flat_map(|change| syntax::logical_lines(change)) {
        changer.apply(&line)?;
    }
    Ok(())
}

struct Changer<'a> {
    config: &'a mut ContainerConfig,
    /// Among these changes; otherwise a new entrypoint takes the old command away.
    cmd_is_set: bool,
}

impl Changer<'_> {
    fn apply(&mut self, line: &str) -> Result<(), ChangeError> {
        let (word, rest) = line.split_once(|c: char| c.is_ascii_whitespace()).unwrap_or((line, ""));
        let (instruction, rest) = (word.to_ascii_uppercase(), rest.trim());
        let malformed = |reason: String| ChangeError::Malformed { instruction: instruction.clone(), reason };
        let done = match instruction.as_str() {
            "CMD" => self.cmd(rest),
            "ENTRYPOINT" => self.entrypoint(rest),
            "ENV" => self.env(rest),
            "EXPOSE" => self.expose(rest),
            "HEALTHCHECK" => self.healthcheck(rest),
            "LABEL" => self.label(rest),
            "ONBUILD" => self.on_build(rest),
            "STOPSIGNAL" => self.stop_signal(rest),
            "USER" => self.one(rest).map(|user| self.config.user = user),
            "VOLUME" => self.volume(rest),
            "WORKDIR" => self.work_dir(rest),
            other if OTHERS.contains(&other) => return Err(ChangeError::NotAChange(other.to_lowercase())),
            _ => return Err(ChangeError::Unknown(word.chars().take(60).collect())),
        };
        done.map_err(malformed)
    }

    /// JSON form as it is, shell form as arguments of the config's shell.
    fn command(&self, rest: &str) -> Vec<String> {
        if let Some(list) = syntax::json_list(rest) {
            return list;
        }
        let mut command = match &self.config.shell {
            Some(shell) if !shell.is_empty() => shell.clone(),
            _ => vec!["/bin/sh".to_owned(), "-c".to_owned()],
        };
        command.push(rest.to_owned());
        command
    }

    fn cmd(&mut self, rest: &str) -> Result<(), String> {
        self.config.cmd = if rest.is_empty() { None } else { Some(self.command(rest)) };
        self.config.args_escaped = false;
        self.cmd_is_set = true;
        Ok(())
    }

    fn entrypoint(&mut self, rest: &str) -> Result<(), String> {
        let command = if rest.is_empty() { Vec::new() } else { self.command(rest) };
        self.config.entrypoint = (!command.is_empty()).then_some(command);
        if !self.cmd_is_set {
            self.config.cmd = None;
        }
        Ok(())
    }

    /// One argument with variables.
    fn one(&self, rest: &str) -> Result<String, String> {
        let expanded = expand(rest, &self.config.env)?;
        if expanded.is_empty() { Err("it requires exactly one argument".to_owned()) } else { Ok(expanded) }
    }

    fn pairs(&self, rest: &str) -> Result<Vec<(String, String)>, String> {
        let pairs = syntax::pairs(rest)?;
        let expand = |text: &str| expand(text, &self.config.env);
        pairs.iter().map(|(name, value)| Ok((expand(name)?, expand(value)?))).collect()
    }

    fn env(&mut self, rest: &str) -> Result<(), String> {
        // All of one line see the environment as it was before.
        for (name, value) in self.pairs(rest)? {
            let is_same =
                |known: &&mut String| known.split_once('=').map_or(known.as_str(), |(name, _)| name) == name;
            let setting = format!("{name}={value}");
            match self.config.env.iter_mut().find(is_same) {
                Some(known) => *known = setting,
                None => self.config.env.push(setting),
            }
        }
        Ok(())
    }

    fn label(&mut self, rest: &str) -> Result<(), String> {
        let pairs = self.pairs(rest)?;
        self.config.labels.extend(pairs);
        Ok(())
    }

    fn expose(&mut self, rest: &str) -> Result<(), String> {
        let words = syntax::split(rest)?;
        if words.is_empty() {
            return Err("it requires at least one argument".to_owned());
        }
        for word in words {
            for port in ports(&expand(&word, &self.config.env)?)? {
                self.config.exposed_ports.insert(port);
            }
        }
        Ok(())
    }

    fn volume(&mut self, rest: &str) -> Result<(), String> {
        let words = match syntax::json_list(rest) {
            Some(list) => list,
            None => syntax::split(rest)?,
        };
        if words.is_empty() {
            return Err("it requires at least one argument".to_owned());
        }
        for word in words {
            let path = expand(&word, &self.config.env)?.trim().to_owned();
            if path.is_empty() {
                return Err("a volume's path is empty".to_owned());
            }
            self.config.volumes.insert(path);
        }
        Ok(())
    }

    fn work_dir(&mut self, rest: &str) -> Result<(), String> {
        let path = self.one(rest)?;
        let base = if path.starts_with('/') { "" } else { self.config.working_dir.as_str() };
        let mut parts: Vec<&str> = Vec::new();
        for part in base.split('/').chain(path.split('/')) {
            match part {
                "" | "." => {}
                ".." => drop(parts.pop()),
                part => parts.push(part),
            }
        }
        self.config.working_dir = format!("/{}", parts.join("/"));
        Ok(())
    }

    fn stop_signal(&mut self, rest: &str) -> Result<(), String> {
        let signal = self.one(rest)?;
        let upper = signal.to_ascii_uppercase();
        let name = upper.strip_prefix("SIG").unwrap_or(&upper);
        let (base, offset) = name.split_once(['+', '-']).unwrap_or((name, "0"));
        let is_real_time = base.starts_with("RT");
        let is_name =
            SIGNALS.contains(&base) && (offset == "0" || is_real_time && offset.parse::<u8>().is_ok());
        let is_number = signal.parse::<u8>().is_ok_and(|number| (1..=64).contains(&number));
        if !is_name && !is_number {
            return Err(format!("invalid signal: {}", signal.chars().take(40).collect::<String>()));
        }
        self.config.stop_signal = Some(signal);
        Ok(())
    }

    fn on_build(&mut self, rest: &str) -> Result<(), String> {
        let trigger = rest.split_ascii_whitespace().next().unwrap_or_default().to_ascii_uppercase();
        match trigger.as_str() {
            "" => Err("it requires at least one argument".to_owned()),
            "ONBUILD" => Err("chaining ONBUILD via `ONBUILD ONBUILD` isn't allowed".to_owned()),
            "MAINTAINER" | "FROM" => Err(format!("{trigger} isn't allowed as an ONBUILD trigger")),
            _ => {
                self.config.on_build.push(rest.to_owned());
                Ok(())
            }
        }
    }

    fn healthcheck(&mut self, rest: &str) -> Result<(), String> {
        let mut check = serde_json::Map::new();
        let mut rest = rest;
        while let Some(option) = rest.strip_prefix("--") {
            let (option, after) =
                option.split_once(|c: char| c.is_ascii_whitespace()).unwrap_or((option, ""));
            let (name, value) = option.split_once('=').ok_or_else(|| format!("--{option} has no value"))?;
            let (key, value) = match name {
                "interval" => ("Interval", json!(syntax::duration(value)?)),
                "timeout" => ("Timeout", json!(syntax::duration(value)?)),
                "start-period" => ("StartPeriod", json!(syntax::duration(value)?)),
                "start-interval" => ("StartInterval", json!(syntax::duration(value)?)),
                "retries" => {
                    let retries =
                        value.parse::<u32>().map_err(|_| format!("--retries={value} is not a number"))?;
                    ("Retries", json!(retries))
                }
                other => return Err(format!("unknown flag: --{other}")),
            };
            check.insert(key.to_owned(), value);
            rest = after.trim_start();
        }
        let (kind, command) = rest.split_once(|c: char| c.is_ascii_whitespace()).unwrap_or((rest, ""));
        let command = command.trim();
        let test = match (kind.to_ascii_uppercase().as_str(), command) {
            ("NONE", "") if check.is_empty() => vec!["NONE".to_owned()],
            ("NONE", _) => return Err("NONE takes no arguments".to_owned()),
            ("CMD", "") => return Err("missing command after CMD".to_owned()),
            ("CMD", _) => match syntax::json_list(command) {
                Some(list) => [vec!["CMD".to_owned()], list].concat(),
                None => vec!["CMD-SHELL".to_owned(), command.to_owned()],
            },
            (other, _) => return Err(format!("unknown type {other:?} (try CMD)")),
        };
        check.insert("Test".to_owned(), json!(test));
        self.config.healthcheck = Some(Value::Object(check));
        Ok(())
    }
}

/// `80`, `80/udp`, `8000-8010/tcp`.
fn ports(text: &str) -> Result<Vec<String>, String> {
    let bad = || format!("invalid containerPort: {}", text.chars().take(60).collect::<String>());
    let (range, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = protocol.to_ascii_lowercase();
    if !["tcp", "udp", "sctp"].contains(&protocol.as_str()) {
        return Err(format!("invalid proto: {protocol}"));
    }
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    let number = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0).ok_or_else(bad);
    let (first, last) = (number(first)?, number(last)?);
    if first > last {
        return Err(bad());
    }
    Ok((first..=last).map(|port| format!("{port}/{protocol}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(changes: &[&str]) -> Result<ContainerConfig, ChangeError> {
        let mut config = ContainerConfig {
            env: vec!["PATH=/bin".to_owned(), "HOME=/root".to_owned()],
            cmd: Some(vec!["old".to_owned()]),
            ..ContainerConfig::default()
        };
        apply(&mut config, &changes.iter().map(|&change| change.to_owned()).collect::<Vec<_>>())?;
        Ok(config)
    }

    fn list(words: &[&str]) -> Option<Vec<String>> {
        Some(words.iter().map(|&word| word.to_owned()).collect())
    }

    #[test]
    fn commands_have_a_shell_form_and_a_json_form() {
        assert_eq!(changed(&["CMD echo  $HOME"]).unwrap().cmd, list(&["/bin/sh", "-c", "echo  $HOME"]));
        assert_eq!(changed(&[r#"cmd ["a", "b c"]"#]).unwrap().cmd, list(&["a", "b c"]));
        assert_eq!(changed(&[r#"CMD ["a", 1]"#]).unwrap().cmd, list(&["/bin/sh", "-c", r#"["a", 1]"#]));
        let config = changed(&[r#"ENTRYPOINT ["/x"]"#]).unwrap();
        assert_eq!((config.entrypoint, config.cmd), (list(&["/x"]), None));
        let config = changed(&["CMD a", r#"ENTRYPOINT ["/x"]"#]).unwrap();
        assert_eq!((config.entrypoint, config.cmd), (list(&["/x"]), list(&["/bin/sh", "-c", "a"])));
        assert_eq!(changed(&["ENTRYPOINT []"]).unwrap().entrypoint, None);
    }

    #[test]
    fn environment_and_labels_are_pairs_with_quotes_and_variables() {
        let config =
            changed(&[r#"ENV A=1 B="two words" C=$HOME/x D=\$HOME E='$HOME'"#, "ENV HOME /new home"]);
        let config = config.unwrap();
        let expected =
            ["PATH=/bin", "HOME=/new home", "A=1", "B=two words", "C=/root/x", "D=$HOME", "E=$HOME"];
        assert_eq!(config.env, expected);
        let config = changed(&["LABEL a=1 \"b c\"='d e'", "LABEL x y z"]).unwrap();
        let labels: Vec<_> =
            config.labels.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        assert_eq!(labels, [("a", "1"), ("b c", "d e"), ("x", "y z")]);
        assert_eq!(changed(&["ENV Z=${NONE:-none} Y=${HOME:+some}"]).unwrap().env[2..], ["Z=none", "Y=some"]);
    }

    #[test]
    fn the_other_instructions_set_their_fields() {
        let config = changed(&[
            "EXPOSE 80 53/udp 8000-8002",
            "VOLUME /a /b\nVOLUME [\"/c d\"]",
            "WORKDIR /srv",
            "WORKDIR ../var/./lib",
            "USER 1000:1000",
            "STOPSIGNAL SIGRTMIN+3",
            "ONBUILD RUN make",
            "HEALTHCHECK --interval=5s --retries=3 CMD curl -f \\\n  localhost",
        ]);
        let config = config.unwrap();
        let ports: Vec<_> = config.exposed_ports.iter().map(String::as_str).collect();
        assert_eq!(ports, ["53/udp", "80/tcp", "8000/tcp", "8001/tcp", "8002/tcp"]);
        assert_eq!(config.volumes.iter().map(String::as_str).collect::<Vec<_>>(), ["/a", "/b", "/c d"]);
        assert_eq!((config.working_dir.as_str(), config.user.as_str()), ("/var/lib", "1000:1000"));
        assert_eq!(config.stop_signal.as_deref(), Some("SIGRTMIN+3"));
        assert_eq!(config.on_build, ["RUN make"]);
        let check = config.healthcheck.unwrap();
        let expected =
            json!({"Test": ["CMD-SHELL", "curl -f   localhost"], "Interval": 5_000_000_000u64, "Retries": 3});
        assert_eq!(check, expected);
    }

    #[test]
    fn what_is_malformed_or_no_change_is_refused_by_name() {
        for (change, expected) in [
            ("RUN make", "run is not a valid change command"),
            ("COPY a b", "copy is not a valid change command"),
            ("FROBNICATE", "unknown instruction: FROBNICATE"),
            ("ENV", "ENV: "),
            ("ENV A", "ENV: "),
            ("ENV A=1 B", "ENV: "),
            ("ENV A=\"open", "ENV: "),
            ("ENV A=${B", "ENV: "),
            ("EXPOSE 0", "EXPOSE: invalid containerPort: 0"),
            ("EXPOSE 80/http", "EXPOSE: invalid proto: http"),
            ("EXPOSE 70000", "EXPOSE: invalid containerPort"),
            ("EXPOSE 9-8", "EXPOSE: invalid containerPort"),
            ("STOPSIGNAL SIGWHAT", "STOPSIGNAL: invalid signal: SIGWHAT"),
            ("WORKDIR", "WORKDIR: it requires"),
            ("USER", "USER: it requires"),
            ("VOLUME", "VOLUME: it requires"),
            ("ONBUILD ONBUILD RUN x", "ONBUILD: chaining"),
            ("ONBUILD FROM x", "ONBUILD: FROM isn't allowed"),
            ("HEALTHCHECK", "HEALTHCHECK: unknown type"),
            ("HEALTHCHECK CMD", "HEALTHCHECK: missing command"),
            ("HEALTHCHECK --interval=x CMD a", "HEALTHCHECK: "),
            ("HEALTHCHECK --what=1 CMD a", "HEALTHCHECK: unknown flag: --what"),
        ] {
            let error = changed(&[change]).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{change}: {error}");
        }
        assert_eq!(changed(&["", "# a comment", "  "]).unwrap().env.len(), 2);
    }
}
