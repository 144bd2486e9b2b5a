"""What people do with docker-py; any exception fails the test."""

import io
import tarfile
import threading

import docker

client = docker.from_env(timeout=300)
assert client.ping()
assert client.version()["ApiVersion"] >= "1.44"

# A container to its end, its output, and how errors come.
assert client.containers.run("busybox", "echo hello", remove=True) == b"hello\n"
try:
    client.containers.run("busybox", "sh -c 'echo bad >&2; exit 3'", remove=True)
    raise AssertionError("no error")
except docker.errors.ContainerError as error:
    assert error.exit_status == 3 and b"bad" in error.stderr, error
try:
    client.containers.get("nothing")
    raise AssertionError("no error")
except docker.errors.NotFound as error:
    assert "No such container: nothing" in error.explanation, error.explanation

# A service: exec, its files, its log, its statistics.
events = client.events(decode=True, filters={"container": "service", "type": "container"})
seen = []


def watch():
    for event in events:
        seen.append(event["Action"].split(":")[0])
        if event["Action"] == "destroy":
            return


watcher = threading.Thread(target=watch)
watcher.start()
volume = client.volumes.create("things", labels={"made": "by a test"})
network = client.networks.create("between")
service = client.containers.run(
    "busybox",
    ["sh", "-c", "echo started; exec sleep 1000"],
    name="service",
    detach=True,
    environment={"COLOUR": "red"},
    labels={"kind": "test"},
    network="between",
    volumes={"things": {"bind": "/things", "mode": "rw"}},
    mem_limit="64m",
)
code, output = service.exec_run(["sh", "-c", "echo $COLOUR; echo oops >&2; exit 5"], demux=True)
assert (code, output) == (5, (b"red\n", b"oops\n")), (code, output)

archive = io.BytesIO()
with tarfile.open(fileobj=archive, mode="w") as tar:
    member = tarfile.TarInfo("inside/file")
    member.size = 5
    tar.addfile(member, io.BytesIO(b"bytes"))
assert service.put_archive("/things", archive.getvalue())
assert service.exec_run("cat /things/inside/file").output == b"bytes"
stream, stat = service.get_archive("/things/inside/file")
assert stat["name"] == "file" and stat["size"] == 5, stat
with tarfile.open(fileobj=io.BytesIO(b"".join(stream))) as tar:
    assert tar.extractfile("file").read() == b"bytes"

line = next(iter(service.logs(stream=True, follow=True)))
assert line.startswith(b"started"), line
usage = service.stats(stream=False)
assert usage["memory_stats"]["limit"] == 64 << 20, usage["memory_stats"]
service.reload()
assert service.status == "running" and service.labels == {"kind": "test"}
assert service.attrs["NetworkSettings"]["Networks"]["between"]["IPAddress"]
assert [found.name for found in client.containers.list(filters={"label": "kind=test"})] == ["service"]

# An image of it.
image = service.commit("kept", "one")
assert "kept:one" in image.tags
assert client.containers.run("kept:one", "cat /etc/passwd", remove=True)
client.images.remove("kept:one")

service.stop(timeout=1)
assert service.wait()["StatusCode"] == 137
service.remove()
watcher.join()
for action in ["create", "start", "exec_create", "exec_start", "kill", "die", "stop", "destroy"]:
    assert action in seen, (action, seen)
volume.remove()
network.remove()
assert client.containers.list(all=True) == []
print("done")
