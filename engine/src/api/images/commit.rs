//! `/commit`: an image of a container's image and what the container changed in it, which comes from the guest as a layer's
//! tar stream and goes straight into the image store.

use std::{io, sync::Arc};

use bytes::Bytes;
use coracle_image_store::{Commit, Created, Reference, config::ContainerConfig};
use http::StatusCode;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::super::{
    load::{BodyReader, QUEUE},
    to_its_end,
};
use super::import;
use crate::{
    agent::FilesFrame,
    container::{Container, config::Config, files, state::Status},
    core::Core,
    error::{Error, Kind, Result, chain},
    http::{Request, Response, body},
};

pub(crate) async fn commit(mut request: Request) -> Result<Response> {
    let posted = request.read_body().await?;
    let posted: Option<Value> = if posted.trim_ascii().is_empty() {
        None
    } else {
        serde_json::from_slice(&posted)
            .map_err(|error| Error::invalid(format!("cannot read the config: {error}")))?
    };
    let query = &request.query;
    let name = query.get("container").ok_or_else(|| Error::invalid("no container is named"))?;
    let container = request.core.containers.find(name)?;
    let record = container.record();
    if matches!(record.state.status, Status::Removing | Status::Dead) {
        let (name, status) = (&record.name, record.state.status.name());
        return Err(Error::conflict(format!("You cannot commit container {name} which is {status}")));
    }
    let commit = Commit {
        parent: record.image(),
        config: image_config(&record.config, posted)?,
        changes: query.all("changes").map(str::to_owned).collect(),
        tag: import::name(query.get("repo"), query.get("tag"))?,
        author: query.get("author").unwrap_or_default().to_owned(),
        comment: query.get("comment").unwrap_or_default().to_owned(),
        created_by: record.config.cmd.clone().unwrap_or_default().join(" "),
    };
    let tag = commit.tag.clone();
    let pause = query.flag_or("pause", true) && record.state.status == Status::Running;
    let core = Arc::clone(&request.core);
    // A container that was paused for it must not stay so.
    let created = to_its_end(&request.core, async move {
        let paused = match if pause { container.pause().await.map(|()| true) } else { Ok(false) } {
            // It has ended since, or someone else paused it: it stands still by itself.
            Err(error) if error.kind() == Kind::Conflict => false,
            paused => paused?,
        };
        let created = differences_to_image(&core, &container, commit).await;
        if paused && let Err(error) = container.unpause().await {
            tracing::warn!(%error, container = container.id().short(), "cannot unpause a container after a commit");
        }
        let created = created?;
        tell(&core, &container, &created, tag.as_ref());
        Ok(created)
    })
    .await?;
    Ok(body::json(StatusCode::CREATED, &json!({ "Id": created.id.to_string() })))
}

/// The guest's stream to the image store's thread.
async fn differences_to_image(core: &Arc<Core>, container: &Container, commit: Commit) -> Result<Created> {
    let mut work = files::open(core, container, files::diff(&container.record())).await?;
    let (pieces, reader) = mpsc::channel::<io::Result<Bytes>>(QUEUE);
    let images = Arc::clone(&core.images);
    let making = tokio::task::spawn_blocking(move || images.commit(BodyReader::new(reader), commit));
    let mut broken = None;
    loop {
        let piece = match work.answer.next().await {
            Ok(FilesFrame::Data(bytes)) => Ok(bytes),
            Ok(FilesFrame::Done) => break,
            Ok(_) => Err(files::unexpected()),
            Err(error) => Err(error.into()),
        };
        let failed = piece.is_err();
        let piece = piece.map_err(|error: Error| {
            let message = io::Error::other(chain(&error));
            broken = Some(error);
            message
        });
        // A store that wants no more says why.
        if pieces.send(piece).await.is_err() || failed {
            break;
        }
    }
    drop(pieces);
    let made = making.await?;
    match broken {
        Some(error) => Err(error),
        None => Ok(made?),
    }
}

fn tell(core: &Core, container: &Container, created: &Created, tag: Option<&Reference>) {
    let record = container.record();
    let id = created.id.to_string();
    let mut attributes = record.event_attributes();
    attributes.insert("imageID".to_owned(), id.clone());
    if let Some(tag) = tag {
        attributes.insert("imageRef".to_owned(), tag.to_string());
        core.events.image("tag", &id, &tag.to_string());
    }
    core.events.container("commit", record.id.as_str(), &record.config.image, attributes);
}

/// How to run the new image: as the container is, and as the client wants it besides.
fn image_config(container: &Config, posted: Option<Value>) -> Result<ContainerConfig> {
    let malformed = |error| Error::invalid(format!("cannot read the config: {error}"));
    let mut config = serde_json::to_value(container).map_err(malformed)?;
    if let (Value::Object(config), Some(Value::Object(posted))) = (&mut config, posted) {
        for (key, wanted) in posted {
            match (config.get_mut(&key), wanted) {
                (_, Value::Null) => {}
                (Some(Value::Object(known)), Value::Object(wanted)) => known.extend(wanted),
                (_, Value::Array(wanted)) if wanted.is_empty() => {}
                (_, Value::String(wanted)) if wanted.is_empty() => {}
                (_, wanted) => drop(config.insert(key, wanted)),
            }
        }
    }
    serde_json::from_value(config).map_err(malformed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_client_wants_comes_before_what_the_container_is() {
        let container = Config {
            user: "sailor".to_owned(),
            env: vec!["A=1".to_owned()],
            cmd: Some(vec!["sh".to_owned()]),
            labels: [("a".to_owned(), "1".to_owned())].into(),
            ..Config::default()
        };
        let config = image_config(&container, None).unwrap();
        assert_eq!((config.user.as_str(), config.env.len()), ("sailor", 1));
        let posted = json!({ "User": "", "Cmd": ["top"], "Env": null, "Labels": { "b": "2" }, "Image": "x" });
        let config = image_config(&container, Some(posted)).unwrap();
        assert_eq!((config.user.as_str(), config.env.len(), config.labels.len()), ("sailor", 1, 2));
        assert_eq!(config.cmd, Some(vec!["top".to_owned()]));
        assert!(image_config(&container, Some(json!({ "Cmd": 1 }))).is_err());
    }
}
