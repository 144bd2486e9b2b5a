//! Images and clients that mean harm.

mod support;

use std::os::unix::fs::symlink;
use std::path::Path;

use coracle_agent_api::{ErrorKind, InjectedFile, TmpfsMount};
use http::{Method, StatusCode};
use rustix::fs::FileType;
use support::{Image, TestAgent, container, image, new_id, process, shell};

/// Busybox with one directory replaced by a link.
fn with_link(path: &str, target: &str) -> Image {
    Image::new(|root| {
        image::fill_busybox(root);
        let path = root.join(path);
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(target, path).unwrap();
    })
}

#[tokio::test]
async fn mount_points_that_are_links_are_refused() {
    let agent = TestAgent::start().await;
    for (path, target) in [("proc", "/etc"), ("proc", "../../../../etc"), ("sys", "/root"), ("dev", "/bin")] {
        let image = with_link(path, target);
        let error = agent.run(&container(&[&image], process(&["true"]))).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::StartFailed);
        assert!(error.message.contains("symbolic link"), "{}", error.message);
    }
    let file = Image::new(|root| {
        image::fill_busybox(root);
        std::fs::remove_dir(root.join("proc")).unwrap();
        std::fs::write(root.join("proc"), "").unwrap();
    });
    let error = agent.run(&container(&[&file], process(&["true"]))).await.unwrap_err();
    assert!(error.message.contains("not a directory"), "{}", error.message);
}

#[tokio::test]
async fn links_never_lead_out_of_the_image() {
    let agent = TestAgent::start().await;
    let outside = tempfile::tempdir().unwrap();
    let secret = outside.path().join("secret");
    std::fs::write(&secret, "secret").unwrap();
    let outside_path = outside.path().to_str().unwrap();
    let image = Image::new(|root| {
        image::fill_busybox(root);
        symlink(&secret, root.join("etc/hosts")).unwrap();
        symlink(outside_path, root.join("scratch")).unwrap();
        symlink(format!("../../../..{outside_path}"), root.join("workdir")).unwrap();
        symlink(outside_path, root.join("hidden")).unwrap();
    });
    let mut spec = container(&[&image], shell("pwd -P; cat /etc/hosts; ls -d /scratch/; cat /hidden/secret"));
    spec.files = vec![InjectedFile { path: "/etc/hosts".to_owned(), contents: "injected\n".to_owned() }];
    spec.tmpfs = vec![TmpfsMount { path: "/scratch/deep".to_owned(), options: String::new() }];
    spec.process.cwd = "/workdir/made".to_owned();
    spec.masked_paths = vec!["/hidden/masked".to_owned()];
    let output = agent.run(&spec).await.unwrap();
    assert_eq!(output.text(), format!("{outside_path}/made\ninjected\n/scratch/\ninjected\n"));
    assert_eq!(std::fs::read_to_string(&secret).unwrap(), "secret");
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 1);
}

#[tokio::test]
async fn user_files_that_lead_elsewhere_are_not_followed_out() {
    let agent = TestAgent::start().await;
    for target in ["/proc/self/fd/3", "/proc/self/root/etc/passwd", "/dev/zero"] {
        let image = Image::new(|root| {
            image::fill_busybox(root);
            std::fs::remove_file(root.join("etc/passwd")).unwrap();
            symlink(target, root.join("etc/passwd")).unwrap();
        });
        let mut spec = container(&[&image], process(&["true"]));
        spec.process.user = "daemon".to_owned();
        let error = agent.run(&spec).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::StartFailed, "{target}");
    }
}

#[tokio::test]
async fn the_working_directory_is_no_way_out() {
    let agent = TestAgent::start().await;
    for cwd in ["/proc/self/fd/3", "/proc/self/fd/7", "/proc/1/root", "/proc/self/cwd"] {
        let mut spec = container(&[Image::busybox()], process(&["pwd"]));
        spec.process.cwd = cwd.to_owned();
        assert_eq!(agent.run(&spec).await.unwrap_err().kind, ErrorKind::StartFailed, "{cwd}");
    }
}

#[tokio::test]
async fn a_container_inherits_no_descriptor() {
    let agent = TestAgent::start().await;
    let list =
        shell("for fd in /proc/self/fd/*; do [ -e $fd ] && echo ${fd##*/} $(readlink $fd); done; exit 0");
    let output = agent.run(&container(&[Image::busybox()], list)).await.unwrap();
    let fds: Vec<_> = output.text().lines().map(|line| line.split(' ').next().unwrap().to_owned()).collect();
    assert!(fds.iter().all(|fd| ["0", "1", "2"].contains(&fd.as_str())), "{}", output.text());
}

#[tokio::test]
async fn device_nodes_that_the_image_or_the_container_makes_open_no_device_of_the_machine() {
    let agent = TestAgent::start().await;
    let image = Image::new(|root| {
        image::fill_busybox(root);
        image::device(&root.join("loop-of-the-image"), FileType::CharacterDevice, 10, 237);
    });
    let script = "mknod /tmp/n c 10 237; mknod /dev/n c 10 237; mknod /dev/shm/n c 10 237; mknod /tmp/d b 7 0
        for n in /loop-of-the-image /tmp/n /dev/n /dev/shm/n /tmp/d; do (: < $n) 2>/dev/null && echo opened $n; done; echo done";
    let output = agent.run(&container(&[&image], shell(script))).await.unwrap();
    assert_eq!(output.text(), "done\n");
}

#[tokio::test]
async fn a_container_sees_nothing_of_the_agents_mounts() {
    let agent = TestAgent::start().await;
    let script = "awk '{print $2}' /proc/mounts | sort | uniq -d; awk '{print $2}' /proc/mounts | grep -v -E '^(/|/proc|/dev|/sys)($|/)'; ls /proc/1/root/";
    let output = agent.run(&container(&[Image::busybox()], shell(script))).await.unwrap();
    assert_eq!(output.text(), "bin\ndev\netc\nproc\nroot\nsys\ntmp\n");
}

#[tokio::test]
async fn malformed_requests_are_refused() {
    let agent = TestAgent::start().await;
    let id = new_id();
    let start = format!("/v1/containers/{id}/start");
    let valid = serde_json::to_value(container(&[Image::busybox()], process(&["true"]))).unwrap();
    let mut bodies: Vec<Vec<u8>> =
        vec![b"".to_vec(), b"{".to_vec(), b"null".to_vec(), vec![b' '; (1 << 20) + 1], b"\xff\xfe".to_vec()];
    let replacements = [
        ("/unknown", serde_json::json!(1)),
        ("/layers", serde_json::json!([])),
        ("/layers", serde_json::json!([{"diff_id": "../../etc", "source": {"file": {"path": "/x"}}}])),
        ("/hostname", serde_json::json!("x".repeat(65))),
        ("/process/args", serde_json::json!([])),
        ("/process/args", serde_json::json!(["a\u{0}b"])),
        ("/process/capabilities", serde_json::json!(["CAP_EVERYTHING"])),
        ("/process/cwd", serde_json::json!("..")),
        ("/process/rlimits", serde_json::json!([{"name": "nothing", "soft": 1, "hard": 1}])),
        ("/process/oom_score_adj", serde_json::json!(2000)),
        ("/tmpfs", serde_json::json!([{"path": "/", "options": ""}])),
        ("/tmpfs", serde_json::json!([{"path": "/x", "options": "upperdir=/etc"}])),
        ("/files", serde_json::json!([{"path": "relative", "contents": ""}])),
        ("/resources", serde_json::json!({"cpu_period": 1})),
        ("/shm_size", serde_json::json!(-1)),
    ];
    for (pointer, value) in replacements {
        let mut body = valid.clone();
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        let parent = body.pointer_mut(parent).unwrap();
        parent.as_object_mut().unwrap().insert(name.to_owned(), value);
        bodies.push(serde_json::to_vec(&body).unwrap());
    }
    for body in bodies {
        let shown = String::from_utf8_lossy(&body[..body.len().min(500)]).into_owned();
        let (status, answer) = agent.raw(Method::POST, &start, body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{shown}");
        let error: coracle_agent_api::ApiError = serde_json::from_slice(&answer).unwrap();
        assert_eq!(error.kind, ErrorKind::Invalid, "{error}: {shown}");
    }
    for (method, path, status) in [
        (Method::GET, "/".to_owned(), StatusCode::NOT_FOUND),
        (Method::GET, "/v1/nothing".to_owned(), StatusCode::NOT_FOUND),
        (Method::PUT, "/v1/state".to_owned(), StatusCode::NOT_FOUND),
        (Method::POST, "/v1/containers/../start".to_owned(), StatusCode::BAD_REQUEST),
        (Method::GET, format!("/v1/processes/{id}/output"), StatusCode::NOT_FOUND),
        (Method::DELETE, format!("/v1/layers/{id}"), StatusCode::NOT_FOUND),
        (Method::DELETE, format!("/v1/processes/{id}"), StatusCode::NOT_FOUND),
    ] {
        let (answered, _) = agent.raw(method, &path, b"{}".to_vec()).await;
        assert_eq!(answered, status, "{path}");
    }
    assert!(agent.run(&serde_json::from_value(valid).unwrap()).await.is_ok());
}

#[tokio::test]
async fn a_file_that_is_no_image_is_an_error() {
    let agent = TestAgent::start().await;
    let mut spec = container(&[Image::busybox()], process(&["true"]));
    for path in ["/etc/passwd", "/no/such/file", "/"] {
        let layer = coracle_agent_api::LayerSource::File { path: path.to_owned() };
        spec.layers[0].diff_id = "f".repeat(64).parse().unwrap();
        spec.layers[0].source = layer;
        let error = agent.run(&spec).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::StartFailed, "{error}");
    }
    assert!(!Path::new("/no/such/file").exists());
}
