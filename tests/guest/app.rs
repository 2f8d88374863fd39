//! app: what somebody may drop into `apps/` on the card. It says who it is and what it sees, asks the model over the socket that it was told
//! of, and prints the answer's logits hash and what `/metrics` then counts. Built and put onto the card by `tests/appliance`.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// The same as tests/appliance asks this host.
const REQUEST: &str =
    r#"{"messages":[{"role":"user","content":"Name three colours."}],"max_tokens":8,"logits_hash":true}"#;
/// Seconds until the board is given up.
const PATIENCE_S: u64 = 120;
const PR_GET_NO_NEW_PRIVS: i32 = 39;
const PR_CAPBSET_READ: i32 = 23;
const CAP_SYS_ADMIN: u64 = 21;

unsafe extern "C" {
    fn getuid() -> u32;
    fn getgid() -> u32;
    fn prctl(option: i32, a: u64, b: u64, c: u64, d: u64) -> i32;
    fn socket(family: i32, kind: i32, protocol: i32) -> i32;
    fn setuid(uid: u32) -> i32;
}

fn call(socket: &str, method: &str, path: &str, body: &str) -> std::io::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(PATIENCE_S)))?;
    let length = body.len();
    write!(stream, "{method} {path} HTTP/1.1\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}")?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply)?;
    Ok(reply)
}

/// What stands behind `key` in JSON, up to the next quotation mark that is not escaped.
fn text<'a>(json: &'a str, key: &str) -> &'a str {
    let rest = json.split_once(&format!("\"{key}\":\"")).map_or("", |(_, rest)| rest);
    let mut escaped = false;
    let end = rest.find(|c| {
        let is_end = c == '"' && !escaped;
        escaped = c == '\\' && !escaped;
        is_end
    });
    rest.get(..end.unwrap_or(0)).unwrap_or_default()
}

fn main() {
    // SAFETY: numbers go in and a number comes out.
    let (uid, gid) = unsafe { (getuid(), getgid()) };
    // SAFETY: as above.
    let (stuck, root) = unsafe { (prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0), setuid(0)) };
    // SAFETY: as above.
    let bound = unsafe { prctl(PR_CAPBSET_READ, CAP_SYS_ADMIN, 0, 0, 0) };
    println!("user {uid} group {gid} no_new_privs {stuck} setuid(0) {root} bounding {bound}");
    let mut seen: Vec<_> =
        std::fs::read_dir("/").into_iter().flatten().flatten().map(|e| e.file_name().into_string()).collect();
    seen.sort();
    println!("sees {}", seen.into_iter().flatten().collect::<Vec<_>>().join(" "));
    println!("writes / {}", std::fs::write("/x", "x").is_ok());
    println!("writes /tmp {}", std::fs::write("/tmp/x", "x").is_ok());
    println!("writes /run/hearth {}", std::fs::write("/run/hearth/x", "x").is_ok());
    println!("fills /tmp {}", std::fs::write("/tmp/x", vec![1; 2 << 20]).is_ok());
    // SAFETY: as above; nobody is at the other end of any network here.
    println!("internet socket {}", unsafe { socket(2, 1, 0) } >= 0 && std::net::TcpStream::connect("127.0.0.1:9").is_ok());
    let path = std::env::var("HEARTH_SOCKET").unwrap_or_default();
    println!("environment {}", std::env::vars().map(|(key, _)| key).collect::<Vec<_>>().join(" "));
    let answer = call(&path, "POST", "/v1/chat/completions", REQUEST).unwrap_or_else(|error| error.to_string());
    println!("hash {}", text(&answer, "logits_hash"));
    println!("answer {}", text(&answer, "content"));
    let refused = call(&path, "POST", "/poweroff", "").unwrap_or_else(|error| error.to_string());
    println!("poweroff {}", refused.lines().next().unwrap_or_default());
    let metrics = call(&path, "GET", "/metrics", "").unwrap_or_else(|error| error.to_string());
    for line in metrics.lines().filter(|line| !line.starts_with('#') && line.starts_with("hearth_")) {
        let wanted = ["requests_total{reason=\"length", "completion_tokens", "steps", "operations", "planned", "resident"];
        if wanted.iter().any(|name| line.contains(name)) {
            println!("metric {line}");
        }
    }
    println!("end");
}
