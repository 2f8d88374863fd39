//! The real binary under load, over its socket: the same question has the same bits alone, in any batch, after any prefix, while
//! other clients come, go and are killed; and nothing is left behind.
#![allow(clippy::unwrap_used)]

#[path = "common/daemon.rs"]
mod daemon;
#[path = "common/models.rs"]
mod models;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use daemon::{Daemon, call, send, serve};
use serde_json::{Value, json};

fn chat(system: &str, question: &str, tokens: usize, seed: u64) -> String {
    let messages = json!([{"role": "system", "content": system}, {"role": "user", "content": question}]);
    let how = json!({"messages": messages, "max_tokens": tokens, "logits_hash": true, "ignore_eos": true});
    let mut body = how.as_object().unwrap().clone();
    body.extend([("temperature".into(), json!(0.8)), ("seed".into(), json!(seed))]);
    Value::Object(body).to_string()
}

/// Text and hash of a whole answer, and how much of its prompt was there already.
fn ask(daemon: &Daemon, body: &str) -> ((String, String), u64) {
    let answer = call(&daemon.socket, "POST", "/v1/chat/completions", body);
    let text = answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    let hash = answer["hearth"]["logits_hash"].as_str().unwrap().to_owned();
    ((text, hash), answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap())
}

/// Waits for the end of everything and gives the blocks.
fn at_rest(daemon: &Daemon) -> (u64, u64, u64) {
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        let health = call(&daemon.socket, "GET", "/health", "");
        let blocks = |name: &str| health["kv_blocks"][name].as_u64().unwrap();
        if health["active"] == 0 && blocks("used") == 0 {
            return (blocks("free"), blocks("used"), blocks("cached"));
        }
        assert!(Instant::now() < until, "not at rest: {health}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn anonymous_kib(daemon: &Daemon) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.child.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn the_same_bits_alone_in_a_crowd_and_from_the_prefix_cache() {
    let system = "You answer in one short line. ".repeat(20);
    let questions: Vec<String> = (0..8)
        .map(|i| chat(&system[..30 + 80 * i], &format!("{i}: name {} colours.", i + 2), 10 + i, i as u64))
        .collect();
    let daemon = serve(&["--ctx", "512", "--sequences", "6", "--step-ms", "20"]);
    let alone: Vec<_> = questions.iter().map(|question| ask(&daemon, question)).collect();
    assert_eq!(alone[0].1, 0, "nothing is there at first");
    let again: Vec<_> = questions.iter().map(|question| ask(&daemon, question)).collect();
    assert!(
        again.iter().skip(2).all(|(_, cached)| *cached >= 64),
        "{:?}",
        again.iter().map(|a| a.1).collect::<Vec<_>>()
    );
    for (first, second) in alone.iter().zip(&again) {
        assert_eq!(first.0, second.0, "from the cache");
    }
    for round in 0..3 {
        std::thread::scope(|scope| {
            for (question, (wanted, _)) in questions.iter().zip(&alone) {
                let daemon = &daemon;
                scope.spawn(move || assert_eq!(ask(daemon, question).0, *wanted, "in a crowd"));
            }
            // Clients that leave: before their prompt is read, in the middle of it, in their answer.
            for i in 0..6u64 {
                let daemon = &daemon;
                scope.spawn(move || {
                    let body = chat(&"other words entirely. ".repeat(70), "why?", 100, i + round);
                    let gone = send(&daemon.socket, "POST", "/v1/chat/completions", &body);
                    std::thread::sleep(Duration::from_millis(i * 25));
                    drop(gone);
                });
            }
        });
    }
    at_rest(&daemon);
}

#[test]
fn a_pinned_system_prompt_is_there_before_the_first_question() {
    let folder = tempfile::tempdir().unwrap();
    let (file, system) = (folder.path().join("system.txt"), "You are a lighthouse keeper. ".repeat(20));
    std::fs::write(&file, format!("{system}\n")).unwrap();
    let pinned = serve(&["--ctx", "512", "--sequences", "1", "--pin", file.to_str().unwrap()]);
    let plain = serve(&["--ctx", "512", "--sequences", "1"]);
    let question = chat(&system, "Who are you?", 8, 1);
    let ((with, cached), (without, none)) = (ask(&pinned, &question), ask(&plain, &question));
    assert_eq!(with, without);
    assert!(cached >= 64 && none == 0, "{cached}, {none}");
}

#[test]
fn clients_killed_at_any_point_leave_nothing_behind() {
    let daemon = serve(&["--ctx", "512", "--sequences", "4", "--step-ms", "20"]);
    let total = |(free, used, cached)| free + used + cached;
    // Every block is used once, so that all of the memory is there.
    std::thread::scope(|scope| {
        for i in 0..4 {
            let daemon = &daemon;
            scope.spawn(move || {
                let body = json!({"prompt": format!("{i} upon a time"), "max_tokens": 490, "ignore_eos": true});
                call(&daemon.socket, "POST", "/v1/completions", &body.to_string());
            });
        }
    });
    let blocks = total(at_rest(&daemon));
    let before = anonymous_kib(&daemon);
    let body = chat(&"A long story, told in many words. ".repeat(40), "Go on.", 60, 7);
    let mut state = 1u64;
    for _ in 0..KILLED {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        // A process of its own, so that the kernel closes its socket as it does when somebody is killed.
        let mut client = Command::new("curl")
            .args(["--silent", "--no-buffer", "--output", "/dev/null", "--unix-socket"])
            .arg(&daemon.socket)
            .args(["--json", &body, "http://h/v1/chat/completions"])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_micros((state >> 33) % 120_000));
        client.kill().unwrap();
        client.wait().unwrap();
    }
    assert_eq!(total(at_rest(&daemon)), blocks, "KV blocks");
    let after = anonymous_kib(&daemon);
    assert!(after <= before + GROWTH_KIB, "{before} KiB before, {after} KiB after");
}

/// Clients killed here; tests/serving kills a thousand.
const KILLED: usize = 60;
/// The allocator's unevenness.
const GROWTH_KIB: u64 = 4096;
