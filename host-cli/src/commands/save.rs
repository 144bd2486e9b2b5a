//! `coracle save`: receives an image archive from the daemon while it is written, with a bar on a terminal.

use std::io::{IsTerminal, Write};

use anyhow::Context;
use http::Method;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use indicatif::ProgressBar;

use crate::{
    args::SaveArgs,
    client::{self, empty, escape},
    failure::{Failure, Outcome},
    files,
    paths::Home,
    progress,
};

/// Saves images.
pub(super) async fn run(home: &Home, args: &SaveArgs) -> Outcome {
    if args.output.is_none() && std::io::stdout().is_terminal() {
        return Err(Failure::new("cowardly refusing to save to a terminal")
            .hint("name a file with -o, or redirect standard output"));
    }
    let docker = client::connect(home).await?;
    let names: Vec<_> = args.images.iter().map(|name| format!("names={}", escape(name))).collect();
    let path = format!("/images/get?{}", names.join("&"));
    let answer = docker.call(Method::GET, &path, empty()).await.context("cannot save the images")?;
    let body = answer.into_body();
    let bar = progress::bytes_bar(None, "saving");
    match &args.output {
        None => receive(body, &mut std::io::stdout().lock(), &bar).await?,
        Some(path) => {
            // Under its name there is a whole archive or what was there before.
            let temporary = files::temporary(path);
            let cannot = || format!("cannot write {}", path.display());
            let mut file = files::create(&temporary).with_context(cannot)?;
            let written = match receive(body, &mut file, &bar).await {
                Ok(()) => files::commit(&temporary, path).with_context(cannot),
                Err(error) => Err(error),
            };
            if let Err(error) = written {
                let _ = std::fs::remove_file(&temporary);
                return Err(error.into());
            }
        }
    }
    bar.finish_and_clear();
    Ok(0)
}

async fn receive(mut body: Incoming, out: &mut impl Write, bar: &ProgressBar) -> anyhow::Result<()> {
    while let Some(frame) = body.frame().await {
        let frame = frame.context("lost the connection to the daemon while it saved")?;
        if let Ok(bytes) = frame.into_data() {
            out.write_all(&bytes).context("cannot write the archive")?;
            bar.inc(bytes.len() as u64);
        }
    }
    out.flush().context("cannot write the archive")
}
