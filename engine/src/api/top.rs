//! `/containers/{id}/top`: a container's processes in the columns of `ps`.
//!
//! Docker runs the host's `ps` and shows what it prints. Here there is no such program: the columns that people ask for are made
//! of what the agent reads from /proc, and options that ask for others are refused by name.

use coracle_agent_api::{ProcessInfo, Processes};
use serde_json::json;

use crate::{
    error::{Error, Result},
    exec::not_running,
    http::{Request, Response, body},
    time::UnixNanos,
};

const DAY: u64 = 86_400;

/// What is asked for most, by its letters.
const FULL: &[Column] = &[
    Column::User("UID"),
    Column::Pid,
    Column::Parent,
    Column::Share("C"),
    Column::Start("STIME"),
    Column::Terminal("TTY"),
    Column::Time,
    Column::Command("CMD"),
];
const BSD_USER: &[Column] = &[
    Column::User("USER"),
    Column::Pid,
    Column::Percent,
    Column::MemoryPercent,
    Column::Virtual,
    Column::Resident,
    Column::Terminal("TTY"),
    Column::State("STAT"),
    Column::Start("START"),
    Column::ShortTime,
    Column::Command("COMMAND"),
];
const BSD: &[Column] = &[
    Column::Pid,
    Column::Terminal("TTY"),
    Column::State("STAT"),
    Column::ShortTime,
    Column::Command("COMMAND"),
];
const LONG: &[Column] = &[
    Column::Fixed("F", "4"),
    Column::Letter("S"),
    Column::User("UID"),
    Column::Pid,
    Column::Parent,
    Column::Share("C"),
    Column::Priority("PRI"),
    Column::Nice("NI"),
    Column::Fixed("ADDR", "-"),
    Column::Pages("SZ"),
    Column::Fixed("WCHAN", "-"),
    Column::Start("STIME"),
    Column::Terminal("TTY"),
    Column::Time,
    Column::Command("CMD"),
];
const PLAIN: &[Column] = &[Column::Pid, Column::Terminal("TTY"), Column::Time, Column::Name("CMD")];

/// A column with its title, where that differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Column {
    User(&'static str),
    Group(&'static str),
    /// A number of the process: real and effective user and group.
    Id(&'static str, usize),
    Pid,
    Parent,
    ProcessGroup,
    Session(&'static str),
    Share(&'static str),
    Percent,
    MemoryPercent,
    Virtual,
    Resident,
    Pages(&'static str),
    Terminal(&'static str),
    State(&'static str),
    Letter(&'static str),
    Start(&'static str),
    StartLong,
    Time,
    ShortTime,
    Elapsed,
    ElapsedSeconds,
    Priority(&'static str),
    Nice(&'static str),
    Threads(&'static str),
    Processor,
    Name(&'static str),
    Command(&'static str),
    Fixed(&'static str, &'static str),
}

pub(crate) async fn top(request: &Request, id: &str) -> Result<Response> {
    let container = request.core.containers.find(id)?;
    let columns = columns(request.query.get("ps_args").unwrap_or("-ef"))?;
    let record = container.record();
    if !record.state.status.is_running() {
        return Err(not_running(&record));
    }
    let host = request.core.sandboxes.get(&record.sandbox);
    let processes = host.agent().processes(&record.id).await?;
    request.core.events.container("top", record.id.as_str(), &record.config.image, record.event_attributes());
    let titles: Vec<&str> = columns.iter().map(|(_, title)| title.as_str()).collect();
    let rows: Vec<Vec<String>> =
        processes.processes.iter().map(|process| row(process, &columns, &processes)).collect();
    Ok(body::ok(&json!({ "Titles": titles, "Processes": rows })))
}

/// The columns that arguments of `ps` ask for, with their titles.
fn columns(arguments: &str) -> Result<Vec<(Column, String)>> {
    let refuse = |word: &str| {
        let shown: String = word.chars().take(60).collect();
        Err(Error::invalid(format!(
            "ps: `{shown}` is not supported by Coracle: it knows -e, -A, -f, -F, -l, aux, x and -o with a list of columns"
        )))
    };
    let titled = |all: &[Column]| all.iter().map(|column| (*column, column.title().to_owned())).collect();
    let mut chosen = Vec::new();
    let mut style = PLAIN;
    let mut words = arguments.split_whitespace().peekable();
    while let Some(word) = words.next() {
        if let Some(list) = word.strip_prefix("--format").map(|rest| rest.trim_start_matches('=')) {
            let list = if list.is_empty() { words.next().unwrap_or_default() } else { list };
            add(list, &mut chosen)?;
            continue;
        }
        let letters = word.trim_start_matches('-');
        let bsd = !word.starts_with('-');
        // A list of columns may stand in the same word as the `o`, or in the next.
        if let Some((before, list)) = letters.split_once('o') {
            if !before.chars().all(|letter| "eAaxwww".contains(letter)) {
                return refuse(word);
            }
            let list = if list.is_empty() { words.next().unwrap_or_default() } else { list };
            add(list, &mut chosen)?;
            continue;
        }
        for letter in letters.chars() {
            style = match (letter, bsd) {
                ('e' | 'A' | 'a' | 'd' | 'w' | 'H' | 'y' | 'g' | 'x' | 'r', false) => style,
                ('f' | 'F', false) => FULL,
                ('l', false) => LONG,
                ('u', true) => BSD_USER,
                ('a' | 'x', true) if style == PLAIN => BSD,
                ('a' | 'x' | 'w' | 'g' | 'e' | 'f' | 'r', true) => style,
                _ => return refuse(word),
            };
        }
        if letters.is_empty() {
            return refuse(word);
        }
    }
    let columns: Vec<(Column, String)> = if chosen.is_empty() { titled(style) } else { chosen };
    if columns.iter().any(|(column, title)| *column == Column::Pid && title == "PID") {
        Ok(columns)
    } else {
        Err(Error::internal("Couldn't find PID field in ps output"))
    }
}

/// `pid,user=WHO,args`.
fn add(list: &str, chosen: &mut Vec<(Column, String)>) -> Result<()> {
    for part in list.split(',').filter(|part| !part.is_empty()) {
        let (name, title) = part.split_once('=').map_or((part, None), |(name, title)| (name, Some(title)));
        let Some(column) = Column::of(name) else {
            let shown: String = name.chars().take(40).collect();
            return Err(Error::invalid(format!(
                "ps: unknown column `{shown}` in -o: Coracle does not have it"
            )));
        };
        chosen.push((column, title.unwrap_or(column.title()).to_owned()));
    }
    Ok(())
}

impl Column {
    fn of(name: &str) -> Option<Self> {
        Some(match name {
            "pid" | "tgid" => Self::Pid,
            "ppid" => Self::Parent,
            "pgid" | "pgrp" => Self::ProcessGroup,
            "sid" | "sess" | "session" => Self::Session("SID"),
            "user" | "euser" | "uname" => Self::User("USER"),
            "ruser" => Self::User("RUSER"),
            "group" | "egroup" => Self::Group("GROUP"),
            "uid" | "euid" => Self::Id("UID", 2),
            "ruid" => Self::Id("RUID", 0),
            "gid" | "egid" => Self::Id("GID", 3),
            "rgid" => Self::Id("RGID", 1),
            "c" => Self::Share("C"),
            "%cpu" | "pcpu" => Self::Percent,
            "%mem" | "pmem" => Self::MemoryPercent,
            "vsz" | "vsize" => Self::Virtual,
            "rss" | "rssize" | "rsz" => Self::Resident,
            "sz" => Self::Pages("SZ"),
            "tty" | "tt" | "tname" => Self::Terminal("TT"),
            "stat" => Self::State("STAT"),
            "s" | "state" => Self::Letter("S"),
            "stime" => Self::Start("STIME"),
            "start" | "start_time" | "bsdstart" => Self::Start("START"),
            "lstart" => Self::StartLong,
            "time" | "cputime" => Self::Time,
            "bsdtime" => Self::ShortTime,
            "etime" => Self::Elapsed,
            "etimes" => Self::ElapsedSeconds,
            "pri" => Self::Priority("PRI"),
            "ni" | "nice" => Self::Nice("NI"),
            "nlwp" | "thcount" => Self::Threads("NLWP"),
            "psr" => Self::Processor,
            "comm" | "ucmd" | "ucomm" => Self::Name("COMMAND"),
            "args" | "cmd" | "command" => Self::Command(if name == "cmd" { "CMD" } else { "COMMAND" }),
            _ => return None,
        })
    }

    fn title(self) -> &'static str {
        match self {
            Self::User(title)
            | Self::Group(title)
            | Self::Id(title, _)
            | Self::Session(title)
            | Self::Share(title)
            | Self::Pages(title)
            | Self::Terminal(title)
            | Self::State(title)
            | Self::Letter(title)
            | Self::Start(title)
            | Self::Priority(title)
            | Self::Nice(title)
            | Self::Threads(title)
            | Self::Name(title)
            | Self::Command(title)
            | Self::Fixed(title, _) => title,
            Self::Pid => "PID",
            Self::Parent => "PPID",
            Self::ProcessGroup => "PGID",
            Self::Percent => "%CPU",
            Self::MemoryPercent => "%MEM",
            Self::Virtual => "VSZ",
            Self::Resident => "RSS",
            Self::StartLong => "STARTED",
            Self::Time | Self::ShortTime => "TIME",
            Self::Elapsed | Self::ElapsedSeconds => "ELAPSED",
            Self::Processor => "PSR",
        }
    }

    fn value(self, process: &ProcessInfo, all: &Processes, now: UnixNanos) -> String {
        let started = UnixNanos::from_u64(process.started_unix_nanos);
        let elapsed = u64::try_from(now.0.saturating_sub(started.0)).unwrap_or(0) / 1_000_000_000;
        let seconds = process.cpu_micros / 1_000_000;
        let share = process.cpu_micros as f64 / 10_000.0 / elapsed.max(1) as f64;
        match self {
            Self::User("RUSER") => name(process.ids[0]),
            Self::User(_) => name(process.ids[2]),
            Self::Group(_) => name(process.ids[3]),
            Self::Id(_, which) => process.ids[which].to_string(),
            Self::Pid => process.pid.to_string(),
            Self::Parent => process.parent.to_string(),
            Self::ProcessGroup => process.group.to_string(),
            Self::Session(_) => process.session.to_string(),
            Self::Share(_) => format!("{}", (share as u64).min(99)),
            Self::Percent => format!("{share:.1}"),
            Self::MemoryPercent => {
                format!("{:.1}", process.resident_bytes as f64 * 100.0 / all.memory_bytes.max(1) as f64)
            }
            Self::Virtual => (process.virtual_bytes / 1024).to_string(),
            Self::Resident => (process.resident_bytes / 1024).to_string(),
            Self::Pages(_) => (process.virtual_bytes / 4096).to_string(),
            Self::Terminal(_) => terminal(process.terminal),
            Self::State(_) => state(process),
            Self::Letter(_) => process.state.chars().take(1).collect(),
            Self::Start(_) => start(started, elapsed),
            Self::StartLong => local(started).strftime("%a %b %e %H:%M:%S %Y").to_string(),
            Self::Time => {
                let days = seconds / DAY;
                let prefix = if days > 0 { format!("{days}-") } else { String::new() };
                format!("{prefix}{:02}:{:02}:{:02}", seconds % DAY / 3600, seconds / 60 % 60, seconds % 60)
            }
            Self::ShortTime => format!("{}:{:02}", seconds / 60, seconds % 60),
            Self::Elapsed => {
                let (days, hours) = (elapsed / DAY, elapsed % DAY / 3600);
                let rest = format!("{:02}:{:02}", elapsed / 60 % 60, elapsed % 60);
                match (days, hours) {
                    (0, 0) => rest,
                    (0, hours) => format!("{hours:02}:{rest}"),
                    (days, hours) => format!("{days}-{hours:02}:{rest}"),
                }
            }
            Self::ElapsedSeconds => elapsed.to_string(),
            // As `ps` turns the kernel's number round.
            Self::Priority(_) => {
                (39_i64.saturating_sub(process.priority.saturating_add(20)).saturating_add(20)).to_string()
            }
            Self::Nice(_) => process.nice.to_string(),
            Self::Threads(_) => process.threads.to_string(),
            Self::Processor => process.processor.to_string(),
            Self::Name(_) => process.name.clone(),
            Self::Command(_) => command(process),
            Self::Fixed(_, value) => value.to_owned(),
        }
    }
}

fn row(process: &ProcessInfo, columns: &[(Column, String)], all: &Processes) -> Vec<String> {
    let now = UnixNanos::now();
    columns.iter().map(|(column, _)| column.value(process, all, now)).collect()
}

/// The guest has no users but root; those of images are the images' own.
fn name(id: u32) -> String {
    if id == 0 { "root".to_owned() } else { id.to_string() }
}

fn terminal(number: u32) -> String {
    let (major, minor) = (number >> 8 & 0xfff, number & 0xff | number >> 12 & 0xf_ff00);
    match major {
        136..=143 => format!("pts/{}", u64::from(major - 136) * 256 + u64::from(minor)),
        4 => format!("tty{minor}"),
        5 if minor == 1 => "console".to_owned(),
        _ => "?".to_owned(),
    }
}

fn state(process: &ProcessInfo) -> String {
    let mut text: String = process.state.chars().take(1).collect();
    let marks = [
        (process.nice < 0, '<'),
        (process.nice > 0, 'N'),
        (process.locked_bytes > 0, 'L'),
        (process.session == process.pid, 's'),
        (process.threads > 1, 'l'),
        (i64::from(process.terminal_group) == i64::from(process.group), '+'),
    ];
    text.extend(marks.iter().filter(|(is_so, _)| *is_so).map(|(_, mark)| mark));
    text
}

fn command(process: &ProcessInfo) -> String {
    // One with nothing but empty arguments is a zombie or a thread of the kernel.
    if process.arguments.iter().all(String::is_empty) {
        let mark = if process.state == "Z" { " <defunct>" } else { "" };
        return format!("[{}]{mark}", process.name);
    }
    process.arguments.join(" ").chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

fn local(time: UnixNanos) -> jiff::Zoned {
    time.timestamp().to_zoned(jiff::tz::TimeZone::system())
}

/// As `ps` writes when something began: the time of today, else the day.
fn start(started: UnixNanos, elapsed: u64) -> String {
    let form = if elapsed < DAY { "%H:%M" } else { "%b%d" };
    local(started).strftime(form).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn titles(arguments: &str) -> Vec<String> {
        columns(arguments).unwrap().into_iter().map(|(_, title)| title).collect()
    }

    #[test]
    fn arguments_of_ps_choose_the_columns() {
        assert_eq!(titles("-ef"), ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"]);
        assert_eq!(titles("-e -f"), titles("-ef"));
        assert_eq!(titles("aux")[..4], ["USER", "PID", "%CPU", "%MEM"]);
        assert_eq!(titles("-eo pid,comm"), ["PID", "COMMAND"]);
        assert_eq!(titles("-o pid,user=WHO,args"), ["PID", "WHO", "COMMAND"]);
        assert_eq!(titles("ax"), ["PID", "TTY", "STAT", "TIME", "COMMAND"]);
        for (bad, words) in [
            ("-o user", "Couldn't find PID field in ps output"),
            ("-o pid=x", "Couldn't find PID field"),
            ("-o pid,bogus", "unknown column `bogus`"),
            ("-q 1", "`-q` is not supported"),
            ("--sort=pid", "not supported"),
            ("-", "not supported"),
        ] {
            let error = columns(bad).unwrap_err().to_string();
            assert!(error.contains(words), "{bad}: {error}");
        }
    }

    #[test]
    fn values_are_written_as_ps_writes_them() {
        let now = UnixNanos::now();
        let process = ProcessInfo {
            pid: 7,
            session: 7,
            group: 7,
            terminal: 136 << 8 | 3,
            terminal_group: 7,
            ids: [1000, 1000, 0, 0],
            state: "S".to_owned(),
            name: "sleep".to_owned(),
            arguments: vec!["sleep".to_owned(), "10\n".to_owned()],
            cpu_micros: 3_723_000_000,
            started_unix_nanos: (now.0 - 90_061_000_000_000).unsigned_abs(),
            priority: 20,
            resident_bytes: 1 << 20,
            ..ProcessInfo::default()
        };
        let all = Processes { memory_bytes: 8 << 20, processes: Vec::new() };
        for (column, expected) in [
            ("user", "root"),
            ("ruser", "1000"),
            ("tty", "pts/3"),
            ("stat", "Ss+"),
            ("time", "01:02:03"),
            ("etime", "1-01:01:01"),
            ("pmem", "12.5"),
            ("pri", "19"),
            ("args", "sleep 10?"),
        ] {
            assert_eq!(Column::of(column).unwrap().value(&process, &all, now), expected, "{column}");
        }
        let zombie = ProcessInfo { state: "Z".to_owned(), arguments: Vec::new(), ..process };
        assert_eq!(command(&zombie), "[sleep] <defunct>");
    }
}
