//! The real binary as a process: its memory against the plan it printed, its exit codes, its perplexity against plain F32.
#![allow(clippy::unwrap_used)]

#[path = "common/models.rs"]
mod models;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

const HEARTH: &str = env!("CARGO_BIN_EXE_hearth");
/// How far our numeric model's perplexity may be from plain F32's.
const MAX_PERPLEXITY_EXCESS: f64 = 0.005;

fn model() -> String {
    models::path("HEARTH_MODEL", "SmolLM2-135M-Instruct-Q4_1.gguf").to_str().unwrap().to_owned()
}

fn hearth(arguments: &[&str]) -> Output {
    Command::new(HEARTH).args(arguments).stdin(Stdio::null()).output().unwrap()
}

fn json(arguments: &[&str]) -> Value {
    let output = hearth(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Exit code and the one line on stderr.
fn refusal(arguments: &[&str]) -> (i32, String) {
    let output = hearth(arguments);
    let stderr = String::from_utf8(output.stderr).unwrap();
    (output.status.code().unwrap(), stderr)
}

/// A daemon that is killed with the test.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn serve(arguments: &[&str]) -> Daemon {
    let mut child = Command::new(HEARTH).arg("serve").args(arguments).stderr(Stdio::piped()).spawn().unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(log.any(|line| line.unwrap().contains("ready: ")), "the daemon stopped before it was ready");
    // The pipe stays open and is read, so that the daemon can go on logging.
    std::thread::spawn(move || log.for_each(drop));
    Daemon(child)
}

fn ask(socket: &Path, body: &str) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    let length = body.len();
    write!(stream, "POST /v1/completions HTTP/1.1\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}")
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn planned_memory_covers_the_anonymous_memory_of_a_loaded_daemon() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("hearth.sock");
    let model = model();
    let sizes = ["--model", &model, "--ctx", "256", "--sequences", "3", "--threads", "2"];
    let plan = json(&[&["plan", "--json"], &sizes[..]].concat());
    let planned = plan["total_bytes"].as_u64().unwrap();
    let items: u64 = plan["items"].as_array().unwrap().iter().map(|item| item["bytes"].as_u64().unwrap()).sum();
    assert_eq!(planned, items);

    let daemon = serve(&[&sizes[..], &["--socket", socket.to_str().unwrap()]].concat());
    // Three sequences to the end of their context fill every KV block; six at once fill the queue, too.
    std::thread::scope(|scope| {
        for i in 0..6 {
            let socket = &socket;
            scope.spawn(move || {
                let prompt = format!("{i} {}", "once upon a time ".repeat(30));
                let body = serde_json::json!({"prompt": prompt, "ignore_eos": true}).to_string();
                let answer = ask(socket, &body);
                assert!(answer.contains(r#""finish_reason":"length""#), "{answer}");
            });
        }
    });
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.0.id())).unwrap();
    let anon = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    let anon: u64 = anon.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024;
    println!("planned {planned}, anonymous after load {anon}: {:.2}", anon as f64 / planned as f64);
    assert!(anon <= planned, "{anon} bytes anonymous, {planned} planned");
    assert!(anon * 2 > planned, "a plan of twice what is used refuses models that fit");
}

#[test]
fn planned_memory_covers_the_bench_and_its_figures_are_there() {
    let model = model();
    let bench = json(&[
        "bench",
        "--model",
        &model,
        "--prompt",
        "200",
        "--gen",
        "8",
        "--batch",
        "2",
        "--threads",
        "2",
        "--reads",
        "1",
        "--json",
    ]);
    assert!(bench["anon_bytes"].as_u64().unwrap() <= bench["planned_bytes"].as_u64().unwrap(), "{bench}");
    for key in [
        "prefill_tok_s",
        "decode_tok_s",
        "decode_gb_s",
        "read_gb_s",
        "decode_share",
        "first_token_ms",
        "peak_rss_bytes",
    ] {
        assert!(bench[key].as_f64().unwrap() > 0.0, "{key}: {bench}");
    }
    assert_eq!(bench["logits_hash"].as_str().unwrap().len(), 16);
    assert!(bench["depth_decode_tok_s"].is_null(), "{bench}");
}

#[test]
fn decode_at_a_depth_reads_its_keys_and_values_too() {
    let model = model();
    let common = ["bench", "--model", &model, "--prompt", "1", "--gen", "4", "--depth", "300", "--json"];
    let bench = json(&[&common[..], &["--reads", "0"]].concat());
    let figure = |key: &str| bench[key].as_f64().unwrap();
    let bytes_a_token = |gb_s: &str, tok_s: &str| figure(gb_s) * 1e9 / figure(tok_s);
    let empty = bytes_a_token("decode_gb_s", "decode_tok_s");
    let deep = bytes_a_token("depth_decode_gb_s", "depth_decode_tok_s");
    // 30 layers, keys and values of 3 heads of 64, two bytes each.
    let wanted = 300.0 * 30.0 * 2.0 * 3.0 * 64.0 * 2.0;
    assert!((deep - empty - wanted).abs() < 0.001 * wanted, "{bench}");
    assert!(bench["read_gb_s"].is_null(), "{bench}");
    let (code, said) = refusal(&[&common[..], &["--batch", "2"]].concat());
    assert!(code == 2 && said.contains("--batch is 2, must be from 1 to 1"), "{code}: {said}");
}

#[test]
fn perplexity_is_within_half_a_percent_of_plain_f32() {
    let (model, text) = (model(), concat!(env!("CARGO_MANIFEST_DIR"), "/LICENSE-APACHE"));
    let arguments = ["perplexity", "--model", &model, "--ctx", "512", text, "--json"];
    let ours = json(&arguments);
    let exact = json(&[&arguments[..], &["--reference"]].concat());
    assert_eq!(ours["tokens"], exact["tokens"]);
    let value = |answer: &Value| answer["perplexity"].as_f64().unwrap();
    let excess = value(&ours) / value(&exact) - 1.0;
    println!("perplexity {} against {} in F32: {:+.3} %", value(&ours), value(&exact), excess * 100.0);
    assert!(excess.abs() < MAX_PERPLEXITY_EXCESS, "{excess}");
}

#[test]
fn a_client_with_a_model_of_its_own_leaves_nothing_behind_when_interrupted() {
    let folder = tempfile::tempdir().unwrap();
    let mut ask = Command::new(HEARTH)
        .args(["ask", "--model", &model(), "--max-tokens", "2000", "Tell a long story."])
        .env("TMPDIR", folder.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // The answer has begun.
    ask.stdout.as_mut().unwrap().read_exact(&mut [0; 8]).unwrap();
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    kill(Pid::from_raw(ask.id().try_into().unwrap()), Signal::SIGINT).unwrap();
    assert!(!ask.wait().unwrap().success());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn what_cannot_run_is_refused_with_a_reason_and_a_code() {
    let model = model();
    let gemma = models::path("HEARTH_GEMMA_MODEL", "gemma-3-270m-Q4_K_M.gguf");
    let refused = |arguments: &[&str], code: i32, words: &[&str]| {
        let (found, stderr) = refusal(arguments);
        assert_eq!(found, code, "{arguments:?}: {stderr}");
        assert_eq!(stderr.trim_end().lines().count(), 1, "one line: {stderr}");
        for word in words {
            assert!(stderr.contains(word), "{arguments:?}: {word:?} is not in {stderr:?}");
        }
    };
    refused(&["plan", "--model", "/no/such.gguf"], 1, &["/no/such.gguf", "No such file"]);
    refused(&["plan", "--model", HEARTH], 1, &[HEARTH, "GGUF"]);
    refused(&["plan", "--model", gemma.to_str().unwrap()], 1, &["gemma3", "not supported", "llama"]);
    refused(&["plan", "--model", &model, "--ctx", "100000000"], 2, &["--ctx", "100000000", "8192"]);
    refused(&["plan", "--model", &model, "--sequences", "0"], 2, &["--sequences", "1"]);
    refused(&["bench", "--model", &model, "--kernels", "mmx"], 2, &["mmx", "scalar"]);
    let other = if cfg!(target_arch = "aarch64") { "avx2" } else { "neon" };
    refused(&["bench", "--model", &model, "--kernels", other], 2, &[other]);
    refused(&["ask", "--socket", "/no/such.sock", "hello"], 1, &["/no/such.sock", "hearth serve"]);
}

#[test]
fn a_configuration_that_the_appliance_would_leave_out_is_refused_with_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hearth.toml");
    let check = ["config", "--check", path.to_str().unwrap()];
    assert!(refusal(&check).1.contains("there is no such file"));
    std::fs::write(&path, "ctx = 512\nspeed = 11\n").unwrap();
    let (code, why) = refusal(&check);
    assert_eq!(code, 1);
    assert!(why.contains("hearth.toml: line 2: `speed` is no setting"), "{why}");
    std::fs::write(&path, "ctx = 512\n").unwrap();
    assert_eq!(refusal(&check), (0, String::new()));
}
