//! Debian's docker-registry on loopback, with or without a password and TLS.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
};

/// `sailor` with the password `ahoy`.
const HTPASSWD: &str = "sailor:$2y$05$gvCDZk4pIyiqkyy0PvHcNuTwguKQifW25J8wv3mzAoB.Ia9zr/hWu\n";

/// What a registry is started with.
#[derive(Default)]
pub(crate) struct Options {
    pub(crate) password: bool,
    pub(crate) tls: bool,
}

/// A running registry.
pub(crate) struct Registry {
    child: Child,
    /// `127.0.0.1:port`.
    pub(crate) domain: String,
    folder: tempfile::TempDir,
}

impl Registry {
    pub(crate) fn start(options: &Options) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        let mut config = format!(
            "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {}\n  delete:\n    enabled: true\nhttp:\n  addr: 127.0.0.1:0\n",
            at("data")
        );
        if options.tls {
            make_certificates(folder.path());
            config +=
                &format!("  tls:\n    certificate: {}\n    key: {}\n", at("server.crt"), at("server.key"));
        }
        if options.password {
            std::fs::write(at("htpasswd"), HTPASSWD).unwrap();
            config += &format!("auth:\n  htpasswd:\n    realm: harbour\n    path: {}\n", at("htpasswd"));
        }
        std::fs::write(at("config.yml"), config).unwrap();
        let mut child = Command::new("docker-registry")
            .args(["serve", &at("config.yml")])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("Debian's docker-registry is installed");
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let domain = loop {
            let line = lines.next().expect("the registry listens before it ends").unwrap();
            if let Some((_, rest)) = line.split_once("listening on ") {
                break rest.split([',', '"']).next().unwrap().to_owned();
            }
        };
        // What it says further must not fill the pipe.
        thread::spawn(move || lines.for_each(drop));
        Self { child, domain, folder }
    }

    /// The CA that its certificate is from.
    pub(crate) fn ca(&self) -> PathBuf {
        self.folder.path().join("ca.crt")
    }

    /// A name in it.
    pub(crate) fn name(&self, rest: &str) -> String {
        format!("{}/{rest}", self.domain)
    }

    /// Copies an image into it with skopeo.
    pub(crate) fn fill(&self, source: &str, name: &str, more: &[&str]) {
        let target = format!("docker://{}", self.name(name));
        run(Command::new("skopeo")
            .args(["copy", "--quiet", "--dest-tls-verify=false"])
            .args(more)
            .args([source, &target]));
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn make_certificates(folder: &Path) {
    std::fs::write(folder.join("extensions"), "subjectAltName=IP:127.0.0.1,DNS:localhost\n").unwrap();
    let openssl = |args: &[&str]| run(Command::new("openssl").current_dir(folder).args(args));
    let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
    let ca = ["req", "-x509", "-days", "2", "-subj", "/CN=Test CA", "-keyout", "ca.key", "-out", "ca.crt"];
    openssl(&[&ca[..], &key].concat());
    let server = ["req", "-subj", "/CN=registry", "-keyout", "server.key", "-out", "server.csr"];
    openssl(&[&server[..], &key].concat());
    openssl(&[
        "x509",
        "-req",
        "-in",
        "server.csr",
        "-CA",
        "ca.crt",
        "-CAkey",
        "ca.key",
        "-CAcreateserial",
        "-days",
        "2",
        "-extfile",
        "extensions",
        "-out",
        "server.crt",
    ]);
}

pub(crate) fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
