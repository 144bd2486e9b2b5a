//! A person at a container's streams: raw terminal, its size, signals, detach keys, and the exit code at the end.

use anyhow::{Context, Result};
use http::{Method, Response};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde::Deserialize;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    task::JoinHandle,
};

use crate::{
    client::{
        Docker, empty, escape,
        stream::{End, FirstByte, Hijacked, pump},
    },
    failure::{Failure, Outcome},
    terminal::{self, DetachKeys, RawMode},
};

/// Signals that are passed on to a container, as Docker's CLI does, with the names that the API wants.
fn proxied() -> [(SignalKind, &'static str); 6] {
    [
        (SignalKind::hangup(), "HUP"),
        (SignalKind::interrupt(), "INT"),
        (SignalKind::quit(), "QUIT"),
        (SignalKind::terminate(), "TERM"),
        (SignalKind::user_defined1(), "USR1"),
        (SignalKind::user_defined2(), "USR2"),
    ]
}

/// What a session is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    /// A container's first process.
    Container,
    /// An exec.
    Exec,
}

/// How a session behaves.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) docker: Docker,
    pub(super) target: Target,
    pub(super) id: String,
    /// The process has a terminal.
    pub(super) tty: bool,
    /// Standard input is passed on.
    pub(super) input: bool,
    /// Signals are passed on (not where there is a terminal: there they are keys).
    pub(super) signals: bool,
    pub(super) detach_keys: DetachKeys,
}

/// How a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// The process's output ended.
    Output,
    /// The person left; the process goes on.
    Detached,
    /// A signal told coracle itself to end.
    Signal(u8),
}

impl Session {
    /// Refuses to give a terminal to something whose input is none.
    pub(super) fn check_terminal(tty: bool, input: bool) -> Result<(), Failure> {
        if tty && input && !terminal::stdin_is_terminal() {
            return Err(Failure::new("cannot use -t: standard input is not a terminal").hint("leave out -t"));
        }
        Ok(())
    }

    /// Connects to a container's streams.
    pub(super) async fn attach(&self) -> Result<Hijacked, crate::client::ClientError> {
        let path = format!(
            "/containers/{}/attach?stream=1&stdin={}&stdout=1&stderr=1",
            escape(&self.id),
            u8::from(self.input)
        );
        self.docker.hijack(&path, empty()).await
    }

    /// Passes everything on until the process's output ends, the person detaches, or a signal comes.
    pub(super) async fn follow(&self, streams: Hijacked, first_byte: &FirstByte) -> Result<Ended> {
        let raw = (self.tty && self.input && terminal::stdin_is_terminal()).then(RawMode::enable).transpose();
        let raw = raw.context("cannot put the terminal into raw mode")?;
        let _watching = self.watch_size().await?;
        let keys = raw.is_some().then(|| self.detach_keys.clone());
        let ended = tokio::select! {
            end = pump(streams, self.input, keys, first_byte) => match end? {
                End::Output => Ended::Output,
                End::Detached => Ended::Detached,
            },
            signal = self.own_end()? => Ended::Signal(signal),
        };
        Ok(ended)
    }

    /// Gives the process's terminal our size, now and whenever it changes.
    async fn watch_size(&self) -> Result<Option<Background>> {
        if !self.tty {
            return Ok(None);
        }
        let mut changes = signal(SignalKind::window_change()).context("cannot listen for signals")?;
        self.resize().await;
        let (docker, target, id) = (self.docker.clone(), self.target, self.id.clone());
        Ok(Some(Background::spawn(async move {
            while changes.recv().await.is_some() {
                resize(&docker, target, &id).await;
            }
        })))
    }

    /// Gives the process's terminal our size.
    pub(super) async fn resize(&self) {
        resize(&self.docker, self.target, &self.id).await;
    }

    /// Passes signals on to the process, until what is returned is dropped.
    pub(super) fn forward_signals(&self) -> Result<Option<Background>> {
        if self.tty || !self.signals || self.target == Target::Exec {
            return Ok(None);
        }
        let mut sources: Vec<(Signal, &'static str)> = Vec::new();
        for (kind, name) in proxied() {
            sources.push((signal(kind).context("cannot listen for signals")?, name));
        }
        let (docker, id) = (self.docker.clone(), self.id.clone());
        Ok(Some(Background::spawn(async move {
            loop {
                let arrivals = sources.iter_mut().map(|(source, name)| {
                    Box::pin(async move {
                        source.recv().await;
                        *name
                    })
                });
                let (name, ..) = futures_util::future::select_all(arrivals).await;
                // A process that has ended meanwhile needs no signal.
                let _ = docker.post(&format!("/containers/{}/kill?signal={name}", escape(&id))).await;
            }
        })))
    }

    /// Where signals are not passed on, they end coracle itself, but not before the terminal is as it was.
    fn own_end(&self) -> Result<impl Future<Output = u8>> {
        let forwarded = !self.tty && self.signals && self.target == Target::Container;
        let mut sources = Vec::new();
        if !forwarded {
            for (kind, number) in
                [(SignalKind::hangup(), 1), (SignalKind::interrupt(), 2), (SignalKind::terminate(), 15)]
            {
                sources.push((signal(kind).context("cannot listen for signals")?, number));
            }
        }
        Ok(async move {
            if sources.is_empty() {
                return std::future::pending().await;
            }
            let arrivals = sources.iter_mut().map(|(source, number)| {
                Box::pin(async move {
                    source.recv().await;
                    *number
                })
            });
            futures_util::future::select_all(arrivals).await.0
        })
    }
}

async fn resize(docker: &Docker, target: Target, id: &str) {
    let Some(size) = terminal::size() else { return };
    let kind = match target {
        Target::Container => "containers",
        Target::Exec => "exec",
    };
    // A process that has ended meanwhile has no size.
    let _ = docker.post(&format!("/{kind}/{}/resize?h={}&w={}", escape(id), size.rows, size.columns)).await;
}

/// Work that ends when this is dropped.
#[derive(Debug)]
pub(super) struct Background(JoinHandle<()>);

impl Background {
    fn spawn(work: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(tokio::spawn(work))
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A container's end that is being waited for.
#[derive(Debug)]
pub(super) struct Exit(Response<Incoming>);

impl Exit {
    /// Begins to wait; returns when the daemon has taken note, so that no end is missed.
    pub(super) async fn wait_for(
        docker: &Docker,
        id: &str,
        condition: &str,
    ) -> Result<Self, crate::client::ClientError> {
        let path = format!("/containers/{}/wait?condition={condition}", escape(id));
        docker.call(Method::POST, &path, empty()).await.map(Self)
    }

    /// The container's exit code, once it has ended.
    pub(super) async fn code(self) -> Outcome {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Ended {
            status_code: i64,
            error: Option<Problem>,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Problem {
            message: String,
        }
        let body =
            self.0.into_body().collect().await.context("lost the connection to the daemon")?.to_bytes();
        let ended: Ended =
            serde_json::from_slice(&body).context("cannot understand how the container ended")?;
        if let Some(problem) = ended.error.filter(|problem| !problem.message.is_empty()) {
            return Err(Failure::new(problem.message).code(125));
        }
        Ok(u8::try_from(ended.status_code).unwrap_or(125))
    }
}

/// Docker's exit code for a process that could not be started, by the words that Docker's own CLI goes by.
pub(super) fn start_failure_code(message: &str) -> u8 {
    let says = |words: &[&str]| words.iter().any(|word| message.contains(word));
    if says(&[
        "executable file not found",
        "no such file or directory",
        "system cannot find the file specified",
    ]) {
        127
    } else if says(&["permission denied", "is a directory", "not a directory"]) {
        126
    } else {
        125
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("exec: \"x\": executable file not found in $PATH", 127)]
    #[case("exec: \"/x\": stat /x: no such file or directory", 127)]
    #[case("exec: \"/etc\": permission denied", 126)]
    #[case("exec: \"/etc\": is a directory", 126)]
    #[case("No such image: x", 125)]
    fn failures_have_dockers_codes(#[case] message: &str, #[case] code: u8) {
        assert_eq!(start_failure_code(message), code);
    }
}
