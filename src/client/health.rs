//! `hearth health`: whether a daemon answers on a socket, as an exit code. What containers and service managers run every few seconds, so
//! it takes one round trip and no model. Next on the data's way: `client::http`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::http::get_json;
use super::{ClientError, socket_of};

/// How long the daemon may take for its answer.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// Say whether the daemon takes requests: exit code 0 (ok), 1 (none answers, or it still loads), 3 (draining)
#[derive(Clone, Debug, Default, clap::Args)]
pub struct HealthArgs {
    /// The daemon's socket [default: $HEARTH_SOCKET, $XDG_RUNTIME_DIR/hearth.sock, /run/hearth/hearth.sock]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
}

/// What a daemon is about, as `/health` tells it. One that loads its model has no socket yet, and one that drains takes no new
/// connection: who asks then finds nobody, but for those who connected just before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// Requests are taken.
    Ok,
    /// Running answers end, new requests are refused.
    Draining,
}

impl Health {
    /// The word in `/health`'s `status`.
    pub fn named(word: &str) -> Option<Self> {
        match word {
            "ok" => Some(Self::Ok),
            "draining" => Some(Self::Draining),
            _ => None,
        }
    }

    /// 0 where requests are taken. 2 stays the command line's own.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Draining => 3,
        }
    }
}

/// `hearth health`: prints a line and gives the exit code.
///
/// # Errors
/// Nobody answers, within [`PATIENCE`], as hearth would.
pub fn run(args: &HealthArgs) -> Result<u8, ClientError> {
    let (health, line) = health_at(&socket_of(args.socket.as_deref()))?;
    println!("{line}");
    Ok(health.exit_code())
}

fn health_at(socket: &Path) -> Result<(Health, String), ClientError> {
    let body = get_json(socket, "/health", PATIENCE)?;
    let text =
        |key: &str| body[key].as_str().unwrap_or("unknown").chars().filter(|c| !c.is_control()).collect::<String>();
    let word = text("status");
    let health = Health::named(&word)
        .ok_or_else(|| ClientError::Protocol { what: format!("/health has no status that is known: {word:?}") })?;
    Ok((health, format!("{word}: {} on {}", text("model"), socket.display())))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    use super::*;

    /// What the client makes of `reply`.
    fn health_where_the_daemon_says(reply: &[u8]) -> Result<(Health, String), ClientError> {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("s");
        let listener = UnixListener::bind(&socket).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    let mut byte = [0];
                    stream.read_exact(&mut byte).unwrap();
                    request.push(byte[0]);
                }
                assert!(request.starts_with(b"GET /health HTTP/1.1\r\n"));
                stream.write_all(reply).unwrap();
            });
            health_at(&socket)
        })
    }

    #[test]
    fn each_state_has_its_code_whatever_the_http_status() {
        for (status, word, code) in [(200, "ok", 0), (503, "draining", 3)] {
            let body = format!("{{\"status\":\"{word}\",\"model\":\"a\\u001b[2J\"}}");
            let reply = format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\n\r\n{body}", body.len());
            let (health, line) = health_where_the_daemon_says(reply.as_bytes()).unwrap();
            assert_eq!(health.exit_code(), code);
            assert!(line.starts_with(&format!("{word}: a[2J on ")), "{line}");
        }
    }

    #[test]
    fn what_is_no_daemon_is_an_error() {
        for reply in [&b""[..], b"HTTP/1.1 200 X\r\nContent-Length: 2\r\n\r\n{}", b"HTTP/1.1 200 X\r\n\r\nnoise"] {
            assert!(matches!(health_where_the_daemon_says(reply), Err(ClientError::Protocol { .. })));
        }
        assert!(matches!(health_at(Path::new("/nowhere/s")), Err(ClientError::NoDaemon { .. })));
    }
}
