//! `/containers/{id}/stats`: what a container uses, once or each second for as long as the client listens.
//!
//! A sample is one question to the agent, asked when a client wants it and never else. Clients work percentages out of two samples
//! that follow each other, so each has the one before with it.

use std::{sync::Arc, time::Duration};

use coracle_agent_api::{IoStats, Stats};
use serde_json::{Map, Value, json};
use tokio::time::{Instant, interval_at};

use crate::{
    container::{Container, record::Record},
    core::Core,
    error::Result,
    http::{Request, Response, body},
    time::UnixNanos,
};

/// Between samples, as in Docker.
const PERIOD: Duration = Duration::from_secs(1);

pub(crate) async fn stats(request: &Request, id: &str) -> Result<Response> {
    let container = request.core.containers.find(id)?;
    let core = Arc::clone(&request.core);
    if !request.query.flag_or("stream", true) {
        let before = match request.query.flag("one-shot") {
            true => None,
            false => {
                let first = sample(&core, &container).await?;
                if first.is_some() {
                    tokio::time::sleep(PERIOD).await;
                }
                first
            }
        };
        let now = sample(&core, &container).await?;
        return Ok(body::ok(&describe(&container.record(), now.as_ref(), before.as_ref())));
    }
    let (feed, response) = body::stream("application/json");
    let watch = async move {
        let mut lifecycle = container.lifecycle();
        let mut before = None;
        let mut tick = interval_at(Instant::now(), PERIOD);
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                // A removed container has no more to tell.
                _ = lifecycle.wait_for(|now| now.removed) => return,
            }
            let now = match sample(&core, &container).await {
                Ok(now) => now,
                Err(error) => {
                    tracing::debug!(%error, container = container.id().short(), "no statistics");
                    return;
                }
            };
            let line = body::json_line(&describe(&container.record(), now.as_ref(), before.as_ref()));
            if feed.send(line).await.is_err() {
                return;
            }
            before = now;
        }
    };
    let until_closed = request.core.closing.clone();
    request.core.tasks.spawn(until_closed.run_until_cancelled_owned(watch));
    Ok(response)
}

/// What a container has used; nothing if it does not run.
async fn sample(core: &Core, container: &Container) -> Result<Option<Stats>> {
    if !container.is_running() {
        return Ok(None);
    }
    let host = core.sandboxes.get(&container.record().sandbox);
    match host.agent().stats(container.id()).await {
        Ok(stats) => Ok(Some(stats)),
        // It has ended meanwhile.
        Err(_) if !container.is_running() => Ok(None),
        Err(error) if error.refusal().is_some() => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn describe(record: &Record, now: Option<&Stats>, before: Option<&Stats>) -> Value {
    let mut value = json!({
        "id": record.id.as_str(),
        "name": format!("/{}", record.name),
        "read": moment(now),
        "preread": moment(before),
        "num_procs": 0,
        "storage_stats": {},
        "pids_stats": now.map_or_else(|| json!({}), pids),
        "blkio_stats": blkio(now),
        "cpu_stats": cpu(now),
        "precpu_stats": cpu(before),
        "memory_stats": now.map_or_else(|| json!({}), memory),
    });
    if now.is_some() && record.host_config.network_mode != "none" {
        value["networks"] = json!({});
    }
    value
}

fn moment(stats: Option<&Stats>) -> String {
    match stats {
        Some(stats) => UnixNanos::from_u64(stats.unix_nanos).rfc3339(),
        None => "0001-01-01T00:00:00Z".to_owned(),
    }
}

fn pids(stats: &Stats) -> Value {
    // Docker's number for no limit.
    json!({ "current": stats.pids, "limit": stats.pids_limit.unwrap_or(u64::MAX) })
}

fn cpu(stats: Option<&Stats>) -> Value {
    let get = |name: &str| stats.and_then(|stats| stats.cpu.get(name)).copied().unwrap_or(0);
    let nanos = |name: &str| get(name).saturating_mul(1000);
    let mut value = json!({
        "cpu_usage": {
            "total_usage": nanos("usage_usec"),
            "usage_in_kernelmode": nanos("system_usec"),
            "usage_in_usermode": nanos("user_usec"),
        },
        "throttling_data": {
            "periods": get("nr_periods"),
            "throttled_periods": get("nr_throttled"),
            "throttled_time": nanos("throttled_usec"),
        },
    });
    if let Some(stats) = stats {
        value["system_cpu_usage"] = json!(stats.system_cpu_nanos);
        value["online_cpus"] = json!(stats.online_cpus);
    }
    value
}

fn memory(stats: &Stats) -> Value {
    let Some(memory) = &stats.memory else { return json!({}) };
    let values: Map<String, Value> =
        memory.stat.iter().map(|(name, value)| (name.clone(), json!(value))).collect();
    json!({ "usage": memory.usage, "limit": memory.limit, "stats": values })
}

fn blkio(stats: Option<&Stats>) -> Value {
    let entry = |io: &IoStats, op: &str, value: u64| json!({ "major": io.major, "minor": io.minor, "op": op, "value": value });
    let entries = |read: fn(&IoStats) -> u64, write: fn(&IoStats) -> u64| -> Value {
        let Some(stats) = stats else { return Value::Null };
        let of = |io: &IoStats| [entry(io, "read", read(io)), entry(io, "write", write(io))];
        Value::Array(stats.io.iter().flat_map(of).collect())
    };
    json!({
        "io_service_bytes_recursive": entries(|io| io.read_bytes, |io| io.write_bytes),
        "io_serviced_recursive": entries(|io| io.reads, |io| io.writes),
        "io_queue_recursive": null,
        "io_service_time_recursive": null,
        "io_wait_time_recursive": null,
        "io_merged_recursive": null,
        "io_time_recursive": null,
        "sectors_recursive": null,
    })
}
