//! What happens to containers and images, told to whoever listens.
//!
//! The newest events are kept in memory, so that a client can ask for what happened a moment ago. A listener that does not
//! keep up misses events; it never holds anyone up.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex},
};

use serde::Serialize;
use tokio::sync::broadcast;

use crate::{container::record::ContainerId, http::filters::Filters, networks::Network, time::UnixNanos};

/// How many past events can be asked for.
const KEPT: usize = 256;
/// How many events a listener may lag behind.
const LAG: usize = 4096;

/// Filters by the name of something that is neither a container nor an image.
const OTHERS: [&str; 8] = ["config", "daemon", "network", "node", "plugin", "secret", "service", "volume"];

/// Who or what an event is about.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Actor {
    #[serde(rename = "ID")]
    pub(crate) id: String,
    #[serde(rename = "Attributes")]
    pub(crate) attributes: BTreeMap<String, String>,
}

/// An event in Docker's form, with the fields that old clients read doubled.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Event {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) status: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) from: Option<String>,
    #[serde(rename = "Type")]
    pub(crate) kind: &'static str,
    #[serde(rename = "Action")]
    pub(crate) action: String,
    #[serde(rename = "Actor")]
    pub(crate) actor: Actor,
    pub(crate) scope: &'static str,
    pub(crate) time: i64,
    #[serde(rename = "timeNano")]
    pub(crate) time_nano: i64,
}

impl Event {
    /// The moment it happened.
    pub(crate) fn at(&self) -> UnixNanos {
        UnixNanos(self.time_nano)
    }

    /// Whether a client that asked with these filters wants it.
    pub(crate) fn matches(&self, filters: &Filters) -> bool {
        let attribute = |name: &str| self.actor.attributes.get(name).map(String::as_str);
        let action = self.action.split(':').next().unwrap_or_default();
        filters.any("type", |wanted| wanted == self.kind)
            && filters.any("event", |wanted| wanted == action || wanted == self.action)
            && filters.any("scope", |wanted| wanted == self.scope)
            && filters.any("container", |wanted| {
                self.kind == "container"
                    && (self.actor.id.starts_with(wanted) || attribute("name") == Some(wanted))
            })
            && filters.any("image", |wanted| {
                let name = if self.kind == "image" { attribute("name") } else { attribute("image") };
                let untagged = |name: &str| name.split(':').next() == Some(wanted);
                (self.kind == "image" && self.actor.id == wanted)
                    || name.is_some_and(|name| name == wanted || untagged(name))
            })
            && OTHERS.iter().all(|kind| {
                filters.any(kind, |wanted| {
                    self.kind == *kind
                        && (self.actor.id.starts_with(wanted) || attribute("name") == Some(wanted))
                })
            })
            && filters.labels("label", |name| attribute(name))
    }
}

struct Inner {
    kept: VecDeque<Arc<Event>>,
    sender: broadcast::Sender<Arc<Event>>,
}

/// The place where events are told.
pub(crate) struct Events {
    inner: Mutex<Inner>,
}

impl Events {
    pub(crate) fn new() -> Self {
        let (sender, _) = broadcast::channel(LAG);
        Self { inner: Mutex::new(Inner { kept: VecDeque::with_capacity(KEPT), sender }) }
    }

    /// Tells a container's event.
    pub(crate) fn container(
        &self,
        action: &str,
        id: &str,
        image: &str,
        attributes: BTreeMap<String, String>,
    ) {
        let event = self.event("container", action, id, attributes);
        self.tell(Event {
            status: Some(action.to_owned()),
            id: Some(id.to_owned()),
            from: Some(image.to_owned()),
            ..event
        });
    }

    /// Tells an image's event.
    pub(crate) fn image(&self, action: &str, id: &str, name: &str) {
        let attributes = BTreeMap::from([("name".to_owned(), name.to_owned())]);
        let event = self.event("image", action, id, attributes);
        self.tell(Event { status: Some(action.to_owned()), id: Some(id.to_owned()), ..event });
    }

    /// Tells a volume's event.
    pub(crate) fn volume(&self, action: &str, name: &str, further: &[(&str, &str)]) {
        let attributes = [("driver", "local")].iter().chain(further);
        let attributes = attributes.map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let event = self.event("volume", action, name, attributes);
        self.tell(event);
    }

    /// Tells a network's event; `container` is the one that it is about.
    pub(crate) fn network(&self, action: &str, network: &Network, container: Option<&ContainerId>) {
        let mut attributes = BTreeMap::from([
            ("name".to_owned(), network.name.clone()),
            ("type".to_owned(), network.driver.name().to_owned()),
        ]);
        if let Some(container) = container {
            attributes.insert("container".to_owned(), container.to_string());
        }
        let event = self.event("network", action, network.id.as_str(), attributes);
        self.tell(event);
    }

    /// Past events, oldest first, and a receiver for all that come after them.
    pub(crate) fn subscribe(&self) -> (Vec<Arc<Event>>, broadcast::Receiver<Arc<Event>>) {
        let inner = self.inner.lock().expect("no holder panics");
        (inner.kept.iter().cloned().collect(), inner.sender.subscribe())
    }

    /// How many clients listen.
    pub(crate) fn listeners(&self) -> usize {
        self.inner.lock().expect("no holder panics").sender.receiver_count()
    }

    fn event(
        &self,
        kind: &'static str,
        action: &str,
        id: &str,
        attributes: BTreeMap<String, String>,
    ) -> Event {
        let now = UnixNanos::now();
        Event {
            status: None,
            id: None,
            from: None,
            kind,
            action: action.to_owned(),
            actor: Actor { id: id.to_owned(), attributes },
            scope: "local",
            time: now.seconds(),
            time_nano: now.0,
        }
    }

    fn tell(&self, event: Event) {
        let event = Arc::new(event);
        let mut inner = self.inner.lock().expect("no holder panics");
        if inner.kept.len() == KEPT {
            inner.kept.pop_front();
        }
        inner.kept.push_back(Arc::clone(&event));
        // No listener is no error.
        let _ = inner.sender.send(event);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filters(json: &str) -> Filters {
        Filters::parse(json).unwrap()
    }

    #[test]
    fn filters_pick_events_by_kind_action_name_and_label() {
        let events = Events::new();
        let attributes = [("name", "web"), ("image", "busybox:latest"), ("tier", "front")];
        let attributes = attributes.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
        events.container("start", "abcdef", "busybox:latest", attributes);
        let (kept, _) = events.subscribe();
        let event = &kept[0];
        for yes in [
            r#"{}"#,
            r#"{"type":["container"]}"#,
            r#"{"event":["die","start"]}"#,
            r#"{"container":["web"],"label":["tier"]}"#,
            r#"{"container":["abc"]}"#,
            r#"{"image":["busybox"]}"#,
            r#"{"label":["tier=front"]}"#,
        ] {
            assert!(event.matches(&filters(yes)), "{yes}");
        }
        for no in [
            r#"{"type":["image"]}"#,
            r#"{"event":["die"]}"#,
            r#"{"label":["tier=back"]}"#,
            r#"{"network":["web"]}"#,
            r#"{"container":["we"]}"#,
        ] {
            assert!(!event.matches(&filters(no)), "{no}");
        }
    }

    #[test]
    fn only_the_newest_events_are_kept() {
        let events = Events::new();
        for _ in 0..KEPT + 10 {
            events.image("tag", "sha256:0", "busybox:latest");
        }
        assert_eq!(events.subscribe().0.len(), KEPT);
    }
}
