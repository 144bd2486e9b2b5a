//! Standard streams: byte for byte, with back-pressure, across connections that break.

mod support;

use std::time::Duration;

use coracle_agent_api::frame::Ack;
use coracle_agent_api::{ErrorKind, ProcessId, ProcessSpec, TerminalSize};
use support::{Image, Output, TestAgent, container, new_id, next_frame, process, read_until, shell};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

async fn start(agent: &TestAgent, process: ProcessSpec) -> ProcessId {
    let id = new_id();
    agent.start_container(&id, &container(&[Image::busybox()], process)).await.unwrap();
    id
}

fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    })
    .take(len)
    .collect()
}

#[tokio::test]
async fn a_large_input_comes_back_byte_for_byte() {
    let agent = TestAgent::start().await;
    let mut cat = process(&["cat"]);
    cat.stdin = true;
    let id = start(&agent, cat).await;
    let input = noise(16 << 20);
    let mut stdin = agent.open_stdin(&id).await;
    let write = async {
        stdin.write_all(&input).await.unwrap();
        stdin.shutdown().await.unwrap();
        // The agent closes its side when it has taken everything; the input is ended by a call of its own.
        assert_eq!(stdin.read(&mut [0]).await.unwrap(), 0);
        agent.delete(&format!("/v1/processes/{id}/stdin")).await.unwrap();
    };
    let (output, ()) = tokio::join!(agent.output(&id), write);
    assert_eq!(output.code(), 0);
    assert!(output.stdout == input);
}

#[tokio::test]
async fn the_end_of_a_connection_is_not_the_end_of_the_input() {
    let agent = TestAgent::start().await;
    let mut process = shell("while read line; do echo got $line; done; exit 3");
    process.stdin = true;
    let id = start(&agent, process).await;
    for line in ["one\n", "two\n"] {
        let mut stdin = agent.open_stdin(&id).await;
        stdin.write_all(line.as_bytes()).await.unwrap();
        stdin.shutdown().await.unwrap();
        assert_eq!(stdin.read(&mut [0]).await.unwrap(), 0);
    }
    agent.delete(&format!("/v1/processes/{id}/stdin")).await.unwrap();
    let output = agent.output(&id).await;
    assert_eq!((output.text().as_str(), output.code()), ("got one\ngot two\n", 3));
}

#[tokio::test]
async fn input_that_no_one_reads_ends_the_connection() {
    let agent = TestAgent::start().await;
    let mut process = shell("exec < /dev/null; echo closed; sleep 1000");
    process.stdin = true;
    let id = start(&agent, process).await;
    let mut output = agent.open_output(&id, 0).await;
    read_until(&mut output, &mut Output::default(), "closed").await;
    let mut stdin = agent.open_stdin(&id).await;
    stdin.write_all(b"to no one").await.unwrap();
    assert_eq!(stdin.read(&mut [0]).await.unwrap(), 0);
}

#[tokio::test]
async fn a_process_without_input_reads_nothing() {
    let agent = TestAgent::start().await;
    let id = start(&agent, shell("cat; echo done")).await;
    assert_eq!(agent.output(&id).await.text(), "done\n");
}

#[tokio::test]
async fn output_that_no_one_acknowledges_stops_the_writer_and_loses_nothing() {
    let agent = TestAgent::start().await;
    let len = 8 << 20;
    let id = start(&agent, shell("head -c 8388608 /dev/zero | tr '\\0' y; echo end >&2")).await;
    let mut stream = agent.open_output(&id, 0).await;
    let mut output = Output::default();
    // Without an acknowledgement the stream stands still before everything has come.
    while let Ok(frame) = tokio::time::timeout(Duration::from_millis(500), next_frame(&mut stream)).await {
        let (header, payload) = frame.unwrap();
        output.add(header, &payload);
    }
    assert!((1 << 20..len).contains(&output.stdout.len()), "{}", output.stdout.len());
    let last = output.frames.last().unwrap().sequence;
    stream.write_all(&Ack(last).encode()).await.unwrap();
    while let Some((header, payload)) = next_frame(&mut stream).await {
        output.add(header, &payload);
        stream.write_all(&Ack(header.sequence).encode()).await.unwrap();
    }
    assert_eq!((output.stdout.len(), output.stderr.as_slice(), output.code()), (len, &b"end\n"[..], 0));
}

#[tokio::test]
async fn a_reader_that_comes_back_goes_on_where_it_was() {
    let agent = TestAgent::start().await;
    let mut process = shell("while read line; do echo got $line; done");
    process.stdin = true;
    let id = start(&agent, process).await;
    let mut stdin = agent.open_stdin(&id).await;
    let mut output = Output::default();
    for number in 0..20 {
        stdin.write_all(format!("{number}\n").as_bytes()).await.unwrap();
        let after = output.frames.last().map_or(0, |frame| frame.sequence);
        // A new connection each time, without ever acknowledging.
        let mut stream = agent.open_output(&id, after).await;
        let (header, payload) = next_frame(&mut stream).await.unwrap();
        output.add(header, &payload);
    }
    let expected: String = (0..20).map(|number| format!("got {number}\n")).collect();
    assert_eq!(output.text(), expected);
    assert_eq!(
        agent.post(&format!("/v1/processes/{id}/output?after=999"), &()).await.unwrap_err().kind,
        ErrorKind::NotFound
    );
    let state: coracle_agent_api::AgentState = agent.get("/v1/state").await.unwrap();
    assert_eq!(state.processes[0].acknowledged, 0);
    stdin.shutdown().await.unwrap();
    agent.delete(&format!("/v1/processes/{id}/stdin")).await.unwrap();
    assert_eq!(agent.output(&id).await.text(), expected);
}

#[tokio::test]
async fn a_second_reader_replaces_the_first() {
    let agent = TestAgent::start().await;
    let id = start(&agent, process(&["sleep", "1000"])).await;
    let mut first = agent.open_output(&id, 0).await;
    let _second = agent.open_output(&id, 0).await;
    assert!(next_frame(&mut first).await.is_none());
}

#[tokio::test]
async fn a_terminal_echoes_resizes_and_ends() {
    let agent = TestAgent::start().await;
    let mut process = shell(
        "trap 'stty size; echo resized' WINCH; tty; stty size; test -c /dev/console && echo console; until read x; do :; done; echo got $x; echo to-stderr >&2; exit 4",
    );
    process.tty = true;
    process.stdin = true;
    process.terminal_size = Some(TerminalSize { rows: 11, cols: 22 });
    let id = start(&agent, process).await;
    let mut stream = agent.open_output(&id, 0).await;
    let mut output = Output::default();
    read_until(&mut stream, &mut output, "console\r\n").await;
    assert_eq!(output.text(), "/dev/pts/0\r\n11 22\r\nconsole\r\n");
    let size = TerminalSize { rows: 33, cols: 44 };
    agent.post(&format!("/v1/processes/{id}/resize"), &size).await.unwrap();
    let mut stdin = agent.open_stdin(&id).await;
    stdin.write_all(b"hello\n").await.unwrap();
    // The end of the input only detaches.
    stdin.shutdown().await.unwrap();
    drop(stream);
    let output = agent.output(&id).await;
    assert!(output.text().contains("got hello\r\n"), "{}", output.text());
    assert!(output.text().contains("to-stderr\r\n") && output.stderr.is_empty());
    // The echo of the input may come in between.
    assert!(
        output.text().contains("33 44\r\n") && output.text().contains("resized\r\n"),
        "{}",
        output.text()
    );
    assert_eq!(output.code(), 4);
}

#[tokio::test]
async fn an_exec_can_have_a_terminal_of_its_own() {
    let agent = TestAgent::start().await;
    let id = start(&agent, process(&["sleep", "1000"])).await;
    let mut exec = shell("tty; echo $$ > /dev/null; ps | head -2; head -c 1048576 /dev/zero | tr '\\0' z");
    exec.tty = true;
    exec.user = "web".to_owned();
    let exec = agent.exec(&id, exec).await.unwrap();
    let output = agent.output(&exec).await;
    assert!(output.text().starts_with("/dev/pts/0\r\n"), "{}", &output.text()[..100]);
    assert_eq!(output.stdout.iter().filter(|byte| **byte == b'z').count(), 1 << 20);
    let error = agent.post(&format!("/v1/processes/{id}/resize"), &TerminalSize { rows: 1, cols: 1 }).await;
    assert_eq!(error.unwrap_err().kind, ErrorKind::Conflict);
}
