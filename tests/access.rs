//! Who may ask, over real sockets: limits and their refusals against a scripted engine, then the real binary with `hearth.toml`, several
//! sockets, and clients that run as other users.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/models.rs"]
mod models;

use std::fs::Permissions;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;

use common::{Script, post, read_response, with_daemon_on};
use hearth::serve::access::{Rule, SocketSetup};
use nix::unistd::geteuid;

const HEARTH: &str = env!("CARGO_BIN_EXE_hearth");
const CHAT: &str = "/v1/chat/completions";
const BODY: &str = r#"{"messages":[{"role":"user","content":"hello"}]}"#;

/// The code of a refusal, and after how many seconds to come again.
fn refusal(response: &common::Response) -> (u16, String, Option<u32>) {
    let after = response.head.lines().find_map(|line| line.strip_prefix("Retry-After: "));
    let code = response.json()["error"]["code"].as_str().unwrap_or_default().to_owned();
    (response.status, code, after.map(|seconds| seconds.parse().unwrap()))
}

/// A daemon with two sockets: one with this rule for the user of the test, one without rules.
fn with_rule(rule: Rule, script: &Script, test: impl FnOnce(&mut common::Daemon<'_>, &Path)) {
    let folder = tempfile::tempdir().unwrap();
    let rule = Rule { uid: Some(geteuid().as_raw()), ..rule };
    let ruled = SocketSetup { allow: Some(vec![rule]), ..SocketSetup::at(folder.path().join("ruled")) };
    let open = SocketSetup::at(folder.path().join("open"));
    let other = open.path.clone();
    with_daemon_on(vec![ruled, open], script, None, false, |daemon| test(daemon, &other)).unwrap();
}

fn post_at(socket: &Path, body: &str) -> common::Response {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(common::PATIENCE)).unwrap();
    stream.write_all(post(CHAT, body).as_bytes()).unwrap();
    read_response(&mut stream)
}

#[test]
fn a_user_has_as_many_requests_at_once_as_the_rule_says() {
    // Slow enough that nobody's output overflows.
    let pace = std::time::Duration::from_millis(20);
    let script = Script { endless: true, answer: "x".into(), pace, ..Script::default() };
    with_rule(Rule { max_sequences: Some(2), ..Rule::default() }, &script, |daemon, other| {
        let streamed = BODY.replace("}]}", r#"}],"stream":true}"#);
        let mut running: Vec<UnixStream> = Vec::new();
        // Several answers to one request are as many.
        let several = daemon.post(CHAT, &BODY.replace("}]}", r#"}],"n":3}"#));
        assert_eq!(refusal(&several), (429, "too_many_sequences".into(), Some(1)));
        assert!(
            several.json()["error"]["message"].as_str().unwrap().starts_with("0 answers are under way and 3 asked")
        );
        for i in 0..2 {
            let mut stream = daemon.connect();
            stream.write_all(post(CHAT, &streamed).as_bytes()).unwrap();
            // The first streams; the second waits behind it, and counts as well.
            if i == 0 {
                stream.read_exact(&mut [0; 64]).unwrap();
            }
            running.push(stream);
        }
        while daemon.health("active") != 2 {
            std::thread::yield_now();
        }
        let refused = daemon.post(CHAT, BODY);
        assert_eq!(refusal(&refused), (429, "too_many_sequences".into(), Some(1)));
        assert!(
            refused.json()["error"]["message"].as_str().unwrap().starts_with("2 answers are under way and 1 asked for")
        );
        assert_eq!(refused.json()["error"]["type"], "rate_limit_error");
        // The same user on a socket without the rule.
        let mut free = UnixStream::connect(other).unwrap();
        free.write_all(post(CHAT, BODY).as_bytes()).unwrap();
        while daemon.health("active") != 3 {
            std::thread::yield_now();
        }
        drop((running, free));
    });
    assert!(script.cancelled.load(Ordering::SeqCst) > 0);
}

#[test]
fn tokens_a_minute_are_counted_over_prompts_and_answers() {
    // A token a byte: "<user>hello<assistant>" has 22, and the answer is the same in capitals.
    let script = Script::default();
    with_rule(Rule { tokens_per_minute: Some(60), ..Rule::default() }, &script, |daemon, other| {
        assert_eq!(daemon.post(CHAT, BODY).status, 200);
        let (status, code, after) = refusal(&daemon.post(CHAT, BODY));
        assert_eq!((status, code.as_str()), (429, "rate_limit_exceeded"));
        // 60 - 44 are left, 22 are asked for, one comes back in a second.
        assert!((1..=6).contains(&after.unwrap()), "{after:?}");
        // A prompt that fits what is left is answered, and its answer goes on to its end.
        let completion = daemon.post("/v1/completions", r#"{"prompt":"0123456789"}"#);
        assert_eq!((completion.status, completion.json()["usage"]["completion_tokens"].clone()), (200, 10.into()));
        let (status, _, after) = refusal(&daemon.post("/v1/completions", r#"{"prompt":"0123456789"}"#));
        assert!(status == 429 && (1..=5).contains(&after.unwrap()), "until one token is back: {status}, {after:?}");
        assert_eq!(post_at(other, BODY).status, 200);
        assert_eq!(daemon.health("status"), "ok", "asking how it does costs nothing");
    });
}

#[test]
fn a_rules_context_is_the_prompts_and_the_answers() {
    let script = Script { endless: true, answer: "x".into(), ..Script::default() };
    with_rule(Rule { ctx: Some(64), ..Rule::default() }, &script, |daemon, _| {
        let long = daemon.post(CHAT, &BODY.replace("hello", &"h".repeat(60)));
        assert_eq!(refusal(&long), (400, "context_length_exceeded".into(), None));
        let usage = daemon.post(CHAT, BODY).json()["usage"].clone();
        assert_eq!((usage["prompt_tokens"].clone(), usage["total_tokens"].clone()), (22.into(), 64.into()));
    });
}

/// `hearth serve` that is killed with the test.
struct Daemon(std::process::Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn call(socket: &Path, method: &str, path: &str) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    write!(stream, "{method} {path} HTTP/1.1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n").unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    reply
}

#[test]
fn a_daemon_takes_sockets_and_settings_from_a_file_and_knows_its_peers() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    let at = |name: &str| folder.path().join(name);
    // Where another user can run it.
    let program = at("hearth");
    std::fs::copy(HEARTH, &program).unwrap();
    let config = at("hearth.toml");
    let text = format!(
        "ctx = 256\nsequences = 2\n[[socket]]\npath = \"{0}/ruled\"\nmode = \"0666\"\n\
         allow = [{{ uid = 12345, max_sequences = 1 }}, {{ gid = 12346, ctx = 64 }}]\n\
         [[socket]]\npath = \"{0}/public\"\nmode = \"0666\"\n[[socket]]\npath = \"{0}/own\"\n",
        folder.path().display()
    );
    let model = models::path("HEARTH_MODEL", "SmolLM2-135M-Instruct-Q4_1.gguf");
    let serve = |text: &str| {
        std::fs::write(&config, text).unwrap();
        let mut command = Command::new(HEARTH);
        command.args(["serve", "--sequences", "1", "--model"]).arg(&model).arg("--config").arg(&config);
        command.stderr(Stdio::piped()).stdin(Stdio::null());
        command
    };
    let refused = serve("sequence = 1\n").output().unwrap();
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(2), "{why}");
    assert!(why.contains("line 1: `sequence` is no setting; is `sequences` meant?"), "{why}");

    let mut daemon = Daemon(serve(&text).spawn().unwrap());
    let mut log = BufReader::new(daemon.0.stderr.take().unwrap()).lines();
    assert!(log.any(|line| line.unwrap().contains("ready: ")), "the daemon stopped before it was ready");
    std::thread::spawn(move || log.for_each(drop));
    for (name, mode) in [("ruled", 0o666), ("public", 0o666), ("own", 0o660)] {
        assert_eq!(std::fs::metadata(at(name)).unwrap().permissions().mode() & 0o7777, mode, "{name}");
        let health = call(&at(name), "GET", "/health");
        assert!(health.contains(r#""context_tokens":256"#), "{name}: {health}");
    }
    assert!(
        call(&at("ruled"), "POST", "/poweroff").starts_with("HTTP/1.1 409 "),
        "the owner may, but this is no board"
    );

    if !geteuid().is_root() {
        // Nobody else can be had; what they would hear is tested where the kernel's word can be made up.
        return;
    }
    let ask = |name: &str, uid: u32, gid: u32| {
        let mut command = Command::new(&program);
        command.args(["ask", "--max-tokens", "2", "Hi", "--socket"]).arg(at(name)).uid(uid).gid(gid);
        let output = command.stdin(Stdio::null()).env_clear().output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    for (name, uid, gid, wanted) in [
        ("ruled", 12345, 1, None),
        ("ruled", 1, 12346, None),
        ("ruled", 12346, 12345, Some("no rule of this socket allows user 12346 or group 12345")),
        ("public", 12346, 12345, None),
        ("own", 12345, 12346, Some("may be used by its owner and group")),
        ("own", 12345, 0, None),
    ] {
        let (done, stderr) = ask(name, uid, gid);
        assert_eq!(done, wanted.is_none(), "{name} {uid} {gid}: {stderr}");
        assert!(stderr.contains(wanted.unwrap_or_default()), "{name} {uid} {gid}: {stderr}");
    }
}
