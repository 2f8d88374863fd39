//! A packed model that is damaged, and the daemon that runs it: told in the background by the log, /health and the serial line, refused at once
//! with --verify.
#![allow(clippy::unwrap_used)]

#[path = "common/models.rs"]
mod models;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use hearth::model::gguf::Gguf;
use nix::pty::openpty;
use nix::unistd::ttyname;
use serde_json::Value;

const HEARTH: &str = env!("CARGO_BIN_EXE_hearth");
const PATIENCE: Duration = Duration::from_secs(120);
const TENSOR: &str = "blk.3.ffn_up.weight";

/// Killed with the test.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn source() -> PathBuf {
    models::path("HEARTH_MODEL", "SmolLM2-135M-Instruct-Q4_1.gguf")
}

fn hearth(arguments: &[&str]) -> Output {
    Command::new(HEARTH).args(arguments).stdin(Stdio::null()).output().unwrap()
}

fn pack(folder: &Path) -> PathBuf {
    let packed = folder.join("model.hearth");
    let output = hearth(&["pack", source().to_str().unwrap(), packed.to_str().unwrap()]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    packed
}

/// Turns one bit in the middle of the tensor.
fn damage(model: &Path) {
    let bytes = std::fs::read(model).unwrap();
    let gguf = Gguf::parse(&bytes).unwrap();
    let tensor = gguf.tensor(TENSOR).unwrap();
    let at = tensor.offset + tensor.bytes / 2;
    let byte = [bytes[usize::try_from(at).unwrap()] ^ 0x10];
    File::options().write(true).open(model).unwrap().write_all_at(&byte, at).unwrap();
}

/// A daemon with its log up to "ready", and the rest of the log.
fn serve(model: &Path, socket: &Path, more: &[&str]) -> (Daemon, Box<dyn Iterator<Item = String>>) {
    let mut child = Command::new(HEARTH)
        .args(["serve", "--ctx", "256", "--sequences", "1", "--threads", "1", "--model"])
        .arg(model)
        .arg("--socket")
        .arg(socket)
        .args(more)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
    assert!(log.any(|line| line.contains("ready: ")), "the daemon stopped before it was ready");
    (Daemon(child), Box::new(log))
}

fn health(socket: &Path) -> Value {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.write_all(b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap()
}

/// The check's state once it is not `checking` any more.
fn checked(socket: &Path) -> Value {
    let until = Instant::now() + PATIENCE;
    loop {
        let check = health(socket)["model_check"].take();
        if check["state"] != "checking" {
            return check;
        }
        assert!(Instant::now() < until, "{check}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_turned_bit_is_named_on_the_line_in_the_log_and_by_health_and_verify_refuses() {
    let folder = tempfile::tempdir().unwrap();
    let (model, socket) = (pack(folder.path()), folder.path().join("socket"));
    let (file, at) = (model.to_str().unwrap(), socket.to_str().unwrap());

    let (daemon, log) = serve(&model, &socket, &[]);
    let whole = checked(&socket);
    assert_eq!((&whole["state"], &whole["done_bytes"]), (&"whole".into(), &whole["bytes"]), "{whole}");
    assert!(whole["bytes"].as_u64().unwrap() > 90_000_000, "{whole}");
    drop(daemon);
    assert!(log.into_iter().any(|line| line.contains("the model is as it was packed")));

    damage(&model);
    let pty = openpty(None, None).unwrap();
    let line = ttyname(&pty.slave).unwrap();
    let (daemon, log) = serve(&model, &socket, &["--tty", line.to_str().unwrap()]);
    let mut terminal = File::from(pty.master);
    let (mut seen, until) = (String::new(), Instant::now() + PATIENCE);
    while !seen.contains(&format!("the model is damaged: tensor {TENSOR}; answers may be wrong")) {
        assert!(Instant::now() < until, "{seen}");
        let mut bytes = [0; 4096];
        let count = terminal.read(&mut bytes).unwrap();
        seen.push_str(&String::from_utf8_lossy(&bytes[..count]));
    }
    let check = checked(&socket);
    assert_eq!((&check["state"], &check["damaged"][0]), (&"damaged".into(), &format!("tensor {TENSOR}").into()));
    drop(daemon);
    let told: Vec<_> = log.into_iter().filter(|line| line.contains("damaged")).collect();
    assert_eq!(told, [format!("[ERROR] the model is damaged: tensor {TENSOR}")]);

    let refused = hearth(&["serve", "--verify", "--model", file, "--socket", at, "--ctx", "256"]);
    let why = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(1), "{why}");
    assert!(why.contains(&format!("parts 1: tensor {TENSOR}")), "{why}");
}

#[test]
fn verify_takes_a_model_that_is_whole_and_wants_hashes() {
    let folder = tempfile::tempdir().unwrap();
    let (model, socket) = (pack(folder.path()), folder.path().join("socket"));
    let (daemon, _) = serve(&model, &socket, &["--verify"]);
    assert_eq!(health(&socket)["model_check"], Value::Null, "there is nothing left to check");
    drop(daemon);
    let (_plain, _) = serve(&source(), &socket, &[]);
    assert_eq!(health(&socket)["model_check"], Value::Null, "a plain file has no hashes");
    let refused = hearth(&["serve", "--verify", "--model", source().to_str().unwrap(), "--socket", "/nowhere"]);
    let why = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(1), "{why}");
    assert!(why.contains("no hashes to verify"), "{why}");
}
