//! `coracle logs`: a container's output from its beginning, or the log of the guest's kernel.

use anyhow::Context;
use http::Method;

use crate::{
    args::LogsArgs,
    client::{
        self, empty, escape, is_multiplexed,
        stream::{FirstByte, body_reader, copy_output},
    },
    failure::{Failure, Outcome},
    paths::Home,
};

/// Prints a log.
pub(super) async fn run(home: &Home, args: &LogsArgs) -> Outcome {
    match &args.container {
        Some(container) => of_container(home, container, args).await,
        None => of_guest(home, args.follow).await,
    }
}

async fn of_container(home: &Home, container: &str, args: &LogsArgs) -> Outcome {
    let docker = client::connect(home).await?;
    let mut path = format!(
        "/containers/{}/logs?stdout=1&stderr=1&follow={}&timestamps={}&tail={}",
        escape(container),
        u8::from(args.follow),
        u8::from(args.timestamps),
        escape(&args.tail),
    );
    for (name, time) in [("since", &args.since), ("until", &args.until)] {
        if let Some(time) = time {
            path += &format!("&{name}={}", escape(&unix_time(time)?));
        }
    }
    let response = docker
        .call(Method::GET, &path, empty())
        .await
        .with_context(|| format!("cannot show the logs of {container}"))?;
    let multiplexed = is_multiplexed(&response);
    copy_output(body_reader(response.into_body()), multiplexed, &FirstByte::default()).await?;
    Ok(0)
}

/// Unix seconds; an RFC 3339 time is converted.
fn unix_time(text: &str) -> Result<String, Failure> {
    if text.parse::<f64>().is_ok() {
        return Ok(text.to_owned());
    }
    let time: jiff::Timestamp =
        text.parse().with_context(|| format!("`{text}` is no time: expected Unix seconds or RFC 3339"))?;
    Ok(format!("{}.{:09}", time.as_second(), time.subsec_nanosecond()))
}

async fn of_guest(home: &Home, follow: bool) -> Outcome {
    let Some(docker) = client::connect_running(home)? else {
        return Err(Failure::new(
            "cannot show the guest's log: the daemon does not run, so there is no virtual machine",
        ));
    };
    let path = format!("/coracle/vm/kmsg?follow={}", u8::from(follow));
    let response = docker
        .call(Method::GET, &path, empty())
        .await
        .context("cannot show the log of the guest's kernel")?;
    copy_output(body_reader(response.into_body()), false, &FirstByte::default()).await?;
    Ok(0)
}
