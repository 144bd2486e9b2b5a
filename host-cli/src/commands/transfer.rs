//! `coracle pull` and `push`: what the daemon tells, as bars on a terminal and as Docker's lines in a pipe.

use std::collections::HashMap;

use anyhow::Context;
use coracle_image_store::Reference;
use http::Method;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::{
    args::{PullArgs, PushArgs},
    client::{self, Docker, escape, stream::body_reader},
    docker_config::DockerConfig,
    failure::{Failure, Outcome},
    paths::Home,
    table::printable,
    terminal,
};

/// A line of the daemon's answer.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    id: Option<String>,
    status: Option<String>,
    progress_detail: Option<Amount>,
    error: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
struct Amount {
    #[serde(default)]
    current: u64,
    #[serde(default)]
    total: u64,
}

/// Where the daemon's words go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Talk {
    /// To standard output, with bars if it is for a person.
    Full,
    /// To standard error, as for a pull that comes before something else.
    Aside,
    /// Nowhere.
    Quiet,
}

/// `coracle pull`.
pub(super) async fn pull(home: &Home, args: &PullArgs) -> Outcome {
    let reference = parse(&args.image)?;
    let has_tag = args.image.rsplit('/').next().is_some_and(|last| last.contains([':', '@']));
    if args.all_tags && has_tag {
        return Err(Failure::new("a tag cannot be used with --all-tags"));
    }
    let docker = client::connect(home).await?;
    let talk = if args.quiet { Talk::Quiet } else { Talk::Full };
    if !args.all_tags && !has_tag && !args.quiet {
        terminal::print("Using default tag: latest\n")?;
    }
    pull_image(&docker, &reference, args.all_tags, args.platform.as_deref(), talk).await?;
    let shown = if args.all_tags { reference.canonical_name() } else { reference.canonical() };
    terminal::print(&format!("{shown}\n"))?;
    Ok(0)
}

/// Has the daemon pull.
pub(super) async fn pull_image(
    docker: &Docker,
    reference: &Reference,
    all_tags: bool,
    platform: Option<&str>,
    talk: Talk,
) -> Result<(), Failure> {
    let mut path = format!("/images/create?fromImage={}", escape(&reference.canonical_name()));
    if !all_tags {
        let digest = reference.digest().map(ToString::to_string);
        let tag = digest.as_deref().or(reference.tag()).unwrap_or("latest");
        path += &format!("&tag={}", escape(tag));
    }
    if let Some(platform) = platform {
        path += &format!("&platform={}", escape(platform));
    }
    follow(docker, &path, reference.domain(), talk).await
}

/// `coracle push`.
pub(super) async fn push(home: &Home, args: &PushArgs) -> Outcome {
    let reference = parse(&args.image)?;
    let docker = client::connect(home).await?;
    let mut path = format!("/images/{}/push", reference.canonical_name());
    if !args.all_tags {
        path += &format!("?tag={}", escape(reference.tag().unwrap_or("latest")));
    }
    let talk = if args.quiet { Talk::Quiet } else { Talk::Full };
    follow(&docker, &path, reference.domain(), talk).await?;
    if args.quiet {
        terminal::print(&format!("{}\n", reference.canonical()))?;
    }
    Ok(0)
}

fn parse(image: &str) -> Result<Reference, Failure> {
    Reference::parse(image).map_err(|error| Failure::new(error.to_string()))
}

/// Makes the call and tells what comes.
async fn follow(docker: &Docker, path: &str, domain: &str, talk: Talk) -> Result<(), Failure> {
    let login = DockerConfig::load()?.login(domain)?;
    let response = docker.call_as(Method::POST, path, login.as_ref(), client::empty()).await?;
    let mut lines = BufReader::new(body_reader(response.into_body())).lines();
    let mut board = Board::new(talk);
    while let Some(line) = lines.next_line().await.context("lost the connection to the daemon")? {
        let line: Line = serde_json::from_str(&line).context("cannot understand the daemon's answer")?;
        if let Some(error) = line.error {
            return Err(Failure::new(error));
        }
        board.show(&line)?;
    }
    Ok(())
}

/// What is shown.
struct Board {
    talk: Talk,
    bars: Option<MultiProgress>,
    by_id: HashMap<String, ProgressBar>,
}

impl Board {
    fn new(talk: Talk) -> Self {
        let bars = (talk != Talk::Quiet && terminal::shows_progress()).then(MultiProgress::new);
        Self { talk, bars, by_id: HashMap::new() }
    }

    fn show(&mut self, line: &Line) -> Result<(), Failure> {
        let status = printable(line.status.as_deref().unwrap_or_default());
        if status.is_empty() || self.talk == Talk::Quiet {
            return Ok(());
        }
        let amount = line.progress_detail.as_ref().filter(|amount| amount.total > 0);
        match (&line.id, &self.bars) {
            // A tag is told once; a layer has a line of its own that changes.
            (Some(id), Some(bars)) if line.progress_detail.is_some() => {
                let bar = self.by_id.entry(id.clone()).or_insert_with(|| new_bar(bars, id));
                if let Some(amount) = amount {
                    bar.set_length(amount.total);
                    bar.set_position(amount.current);
                }
                bar.set_style(style(amount.is_some()));
                bar.set_message(status);
                Ok(())
            }
            // In a pipe, progress is no news.
            _ if amount.is_some() => Ok(()),
            (Some(id), _) => self.say(&format!("{}: {status}\n", printable(id))),
            (None, _) => self.say(&format!("{status}\n")),
        }
    }

    fn say(&self, text: &str) -> Result<(), Failure> {
        let print = || match self.talk {
            Talk::Aside => {
                terminal::complain(text);
                Ok(())
            }
            _ => terminal::print(text),
        };
        match &self.bars {
            Some(bars) => bars.suspend(print)?,
            None => print()?,
        }
        Ok(())
    }
}

impl Drop for Board {
    fn drop(&mut self) {
        self.by_id.values().for_each(ProgressBar::abandon);
        if !self.by_id.is_empty() {
            // What comes next begins a line of its own.
            terminal::complain("\n");
        }
    }
}

fn new_bar(bars: &MultiProgress, id: &str) -> ProgressBar {
    bars.add(ProgressBar::new(0).with_prefix(printable(id)))
}

fn style(has_amount: bool) -> ProgressStyle {
    let template = match has_amount {
        true => "{prefix}: {msg} [{bar:50.=> }] {decimal_bytes}/{decimal_total_bytes}",
        false => "{prefix}: {msg}",
    };
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    style.progress_chars("=> ")
}
