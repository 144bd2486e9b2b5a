//! From a method and a path to the code that answers; and for what Docker has and Coracle has not yet, a sentence.

use super::{Request, Response};
use crate::{
    api::{
        archive, attach, containers, create, events, exec, images, load, logs, networks, private, prune,
        pull, push, registry, stats, system, top, update, volumes, wait,
    },
    error::{Error, Kind, Result},
};

/// Answers a request.
pub(super) async fn route(request: Request) -> Result<Response> {
    let method = request.method.as_str().to_owned();
    let segments: Vec<String> = request.segments.clone();
    let path: Vec<&str> = segments.iter().map(String::as_str).collect();
    match (method.as_str(), path.as_slice()) {
        (_, ["coracle", ..]) if request.asker.is_some() => {
            Err(Error::new(Kind::Denied, "the engine itself is ruled from the host only"))
        }
        ("GET" | "HEAD", ["_ping"]) => Ok(system::ping()),
        ("GET", ["version"]) => Ok(system::version(&request)),
        ("GET", ["info"]) => system::info(&request).await,
        ("GET", ["events"]) => events::events(&request),
        ("GET", ["system", "df"]) => system::disk_usage(&request).await,

        ("GET", ["images", "json"]) => images::list::list(&request).await,
        ("GET", ["images", "get"]) => {
            let names = request.query.all("names").flat_map(|names| names.split(','));
            let names = names.filter(|name| !name.is_empty()).map(str::to_owned).collect();
            images::save::save(&request, names).await
        }
        ("GET", ["images", name @ .., "get"]) if !name.is_empty() => {
            images::save::save(&request, vec![name.join("/")]).await
        }
        ("POST", ["commit"]) => images::commit::commit(request).await,
        ("POST", ["images", "prune"]) => images::prune::prune(&request).await,
        ("POST", ["images", "load"]) => load::load(request).await,
        ("POST", ["images", "create"]) if request.query.get("fromSrc").is_some() => {
            images::import::import(request).await
        }
        ("POST", ["images", "create"]) => pull::create(request).await,
        ("GET", ["images", "search"]) => registry::search(&request).await,
        ("POST", ["auth"]) => registry::log_in(request).await,
        ("GET", ["distribution", name @ .., "json"]) if !name.is_empty() => {
            registry::distribution(&request, &name.join("/")).await
        }
        ("GET", ["images", name @ .., "json"]) if !name.is_empty() => {
            images::inspect(&request, &name.join("/")).await
        }
        ("GET", ["images", name @ .., "history"]) if !name.is_empty() => {
            images::history(&request, &name.join("/")).await
        }
        ("POST", ["images", name @ .., "push"]) if !name.is_empty() => {
            let name = name.join("/");
            push::push(request, &name).await
        }
        ("POST", ["images", name @ .., "tag"]) if !name.is_empty() => {
            images::tag(&request, &name.join("/")).await
        }
        ("DELETE", ["images", name @ ..]) if !name.is_empty() => {
            images::remove(&request, &name.join("/")).await
        }

        ("GET", ["containers", "json"]) => containers::list(&request).await,
        ("POST", ["containers", "create"]) => create::create(request).await,
        ("POST", ["containers", "prune"]) => prune::containers(&request).await,
        ("GET", ["containers", id, "json"]) => containers::inspect(&request, id).await,
        ("POST", ["containers", id, "start"]) => containers::start(&request, id).await,
        ("POST", ["containers", id, "stop"]) => containers::stop(&request, id).await,
        ("POST", ["containers", id, "restart"]) => containers::restart(&request, id).await,
        ("POST", ["containers", id, "kill"]) => containers::kill(&request, id).await,
        ("POST", ["containers", id, "wait"]) => wait::wait(&request, id),
        ("POST", ["containers", id, "pause"]) => containers::pause(&request, id).await,
        ("POST", ["containers", id, "unpause"]) => containers::unpause(&request, id).await,
        ("GET", ["containers", id, "top"]) => top::top(&request, id).await,
        ("GET", ["containers", id, "stats"]) => stats::stats(&request, id).await,
        ("POST", ["containers", id, "update"]) => update::update(request, id).await,
        ("POST", ["containers", id, "rename"]) => containers::rename(&request, id).await,
        ("POST", ["containers", id, "resize"]) => containers::resize(&request, id).await,
        ("GET", ["containers", id, "logs"]) => logs::logs(&request, id),
        ("POST", ["containers", id, "attach"]) => attach::attach(request, id),
        ("HEAD", ["containers", id, "archive"]) => archive::stat(&request, id).await,
        ("GET", ["containers", id, "archive"]) => archive::get(&request, id).await,
        ("PUT", ["containers", id, "archive"]) => archive::put(request, id).await,
        ("GET", ["containers", id, "export"]) => archive::export(&request, id).await,
        ("GET", ["containers", id, "changes"]) => archive::changes(&request, id).await,
        ("DELETE", ["containers", id]) => containers::remove(&request, id).await,

        ("POST", ["containers", id, "exec"]) => exec::create(request, id).await,
        ("POST", ["exec", id, "start"]) => exec::start(request, id).await,
        ("GET", ["exec", id, "json"]) => exec::inspect(&request, id),
        ("POST", ["exec", id, "resize"]) => exec::resize(&request, id).await,

        ("POST", ["build", "prune"]) => Ok(system::prune_build_cache()),
        ("GET", ["volumes"]) => volumes::list(&request),
        ("POST", ["volumes", "create"]) => volumes::create(request).await,
        ("POST", ["volumes", "prune"]) => volumes::prune(&request).await,
        ("GET", ["volumes", name]) => volumes::inspect(&request, name),
        ("DELETE", ["volumes", name]) => volumes::remove(&request, name).await,

        ("GET", ["networks"]) => networks::list(&request),
        ("POST", ["networks", "create"]) => networks::create(request).await,
        ("POST", ["networks", "prune"]) => networks::prune(&request).await,
        ("GET", ["networks", id]) => networks::inspect(&request, id),
        ("DELETE", ["networks", id]) => networks::remove(&request, id).await,
        ("POST", ["networks", id, "connect"]) => networks::connect(request, id).await,
        ("POST", ["networks", id, "disconnect"]) => networks::disconnect(request, id).await,

        ("GET", ["coracle", "status"]) => private::status(&request).await,
        ("GET", ["coracle", "timings", container]) => private::timings(&request, container),
        ("GET", ["coracle", "egress"]) => private::egress(&request),
        ("GET", ["coracle", "containers", id, "layer"]) => archive::layer(&request, id).await,
        ("GET", ["coracle", "vm", "kmsg"]) => private::kmsg(&request).await,
        ("POST", ["coracle", "down"]) => private::down(&request).await,

        (method, path) => Err(missing(method, path)),
    }
}

/// The error for a route that is Docker's but not here yet, or no one's.
fn missing(method: &str, path: &[&str]) -> Error {
    let sentence = match (method, path) {
        ("POST", ["build"]) | ("POST", ["session"] | ["grpc"]) => {
            "building images is not supported by Coracle yet: build elsewhere and use `docker load`"
        }
        ("PUT", ["volumes", _]) => "cluster volumes are not supported by Coracle: use local ones",
        // Also for those who leave by force, whatever there is.
        ("POST", ["swarm", "leave"]) => {
            return Error::new(Kind::Unavailable, "This node is not part of a swarm");
        }
        (_, ["swarm" | "services" | "tasks" | "nodes" | "secrets" | "configs", ..]) => {
            "swarm mode is not supported by Coracle: run containers one by one or with Compose"
        }
        (_, ["plugins", ..]) => "plugins are not supported by Coracle",
        ("DELETE", ["containers", _, _, ..]) => {
            "removing a link is not supported by Coracle: links go with their containers"
        }
        ("GET", ["containers", _, "attach", "ws"]) => {
            "attaching by WebSocket is not supported by Coracle: use a hijacked connection"
        }
        _ => return Error::not_found("page not found"),
    };
    Error::unsupported(sentence)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dockers_own_routes_are_refused_with_a_sentence_and_others_not_found() {
        for (method, path) in [("POST", "build"), ("PUT", "volumes/x"), ("POST", "swarm/init")] {
            let path: Vec<&str> = path.split('/').collect();
            assert_eq!(missing(method, &path).status(), 501, "{method} {path:?}");
        }
        assert_eq!(missing("GET", &["frobnicate"]).status(), 404);
        assert_eq!(missing("GET", &[""]).to_string(), "page not found");
    }
}
