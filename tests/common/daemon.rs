//! The real binary as a daemon with the real model, and requests to it.
#![allow(clippy::unwrap_used, dead_code)]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use serde_json::Value;

use crate::models;

/// A daemon that is killed with the test.
pub struct Daemon {
    pub child: Child,
    pub socket: PathBuf,
    /// All that it wrote to its log so far.
    pub log: Arc<Mutex<String>>,
    _folder: tempfile::TempDir,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn serve(arguments: &[&str]) -> Daemon {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let model = models::path("HEARTH_MODEL", "SmolLM2-135M-Instruct-Q4_1.gguf");
    let mut child = Command::new(env!("CARGO_BIN_EXE_hearth"))
        .args(["serve", "--threads", "2", "--model"])
        .arg(model)
        .arg("--socket")
        .arg(&socket)
        .args(arguments)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    let log = Arc::new(Mutex::new(String::new()));
    let note = |log: &Mutex<String>, line: &str| log.lock().unwrap().push_str(&format!("{line}\n"));
    let is_ready = lines.any(|line| {
        note(&log, &line);
        line.contains("ready: ")
    });
    assert!(is_ready, "the daemon stopped before it was ready: {}", log.lock().unwrap());
    let kept = Arc::clone(&log);
    std::thread::spawn(move || lines.for_each(|line| note(&kept, &line)));
    Daemon { child, socket, log, _folder: folder }
}

pub fn send(socket: &Path, method: &str, path: &str, body: &str) -> UnixStream {
    let mut stream = UnixStream::connect(socket).unwrap();
    let length = body.len();
    write!(stream, "{method} {path} HTTP/1.1\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}").unwrap();
    stream
}

pub fn call(socket: &Path, method: &str, path: &str, body: &str) -> Value {
    let mut answer = String::new();
    send(socket, method, path, body).read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 "), "{answer}");
    serde_json::from_str(body).unwrap()
}
