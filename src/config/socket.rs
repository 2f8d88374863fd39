//! `[[socket]]`: where the daemon listens and who may ask there, as it is written in `hearth.toml`. Unlike elsewhere in the file a key
//! that is no setting is an error even on the appliance: a rule without its condition would let in whom it was to keep out.
//! Next: `serve::access`, which decides by these rules.

use std::path::PathBuf;

use serde::Deserialize;

use super::{ConfigError, MIN_CONTEXT};
use crate::engine::scheduler::Class;
use crate::model::hyper::MAX_CONTEXT;
use crate::serve::access::{MAX_RULES, MAX_SOCKETS, MAX_TOKENS_PER_MINUTE, Rule, SocketSetup};
use crate::serve::listener::{MAX_PATH_BYTES, SOCKET_MODE};
use crate::tools::session::MAX_SEQUENCES;

/// The owner may always connect.
const OWNER_MODE: u32 = 0o600;

/// One table, value by value.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawSocket {
    path: String,
    mode: Option<String>,
    allow: Option<Vec<RawRule>>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRule {
    uid: Option<u32>,
    gid: Option<u32>,
    #[serde(default)]
    class: RawClass,
    max_sequences: Option<usize>,
    tokens_per_minute: Option<u32>,
    ctx: Option<usize>,
    #[serde(default)]
    power: bool,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawClass {
    High,
    #[default]
    Normal,
    Low,
}

/// Checks all tables.
pub(super) fn sockets(raw: Vec<RawSocket>) -> Result<Vec<SocketSetup>, ConfigError> {
    let value = |key, found: String, wanted: String| ConfigError::Value { key, found, wanted };
    if raw.len() > MAX_SOCKETS {
        return Err(value("socket", format!("{} tables", raw.len()), format!("at most {MAX_SOCKETS}")));
    }
    let mut sockets: Vec<SocketSetup> = Vec::new();
    for RawSocket { path, mode, allow } in raw {
        let is_path = path.starts_with('/') && !path.ends_with('/') && !path.contains('\0');
        if !is_path || path.len() > MAX_PATH_BYTES {
            let wanted =
                format!("a file's whole path of at most {MAX_PATH_BYTES} bytes, such as \"/run/hearth/apps.sock\"");
            return Err(value("socket.path", format!("{path:?}"), wanted));
        }
        let path = PathBuf::from(path);
        if sockets.iter().any(|other| other.path == path) {
            return Err(value("socket.path", format!("{} twice", path.display()), "another for each socket".into()));
        }
        let mode = mode.map_or(Ok(SOCKET_MODE), file_mode)?;
        let count = allow.as_ref().map_or(0, Vec::len);
        if count > MAX_RULES {
            return Err(value("socket.allow", format!("a list of {count}"), format!("at most {MAX_RULES} rules")));
        }
        let allow = allow.map(|rules| rules.into_iter().map(rule).collect()).transpose()?;
        sockets.push(SocketSetup { path, mode, allow });
    }
    Ok(sockets)
}

/// Octal digits, as chmod takes them.
fn file_mode(text: String) -> Result<u32, ConfigError> {
    let octal = (3..=4).contains(&text.len()) && text.bytes().all(|byte| matches!(byte, b'0'..=b'7'));
    let mode = octal.then(|| u32::from_str_radix(&text, 8).ok()).flatten();
    mode.filter(|mode| *mode <= 0o777 && mode & OWNER_MODE == OWNER_MODE).ok_or_else(|| ConfigError::Value {
        key: "socket.mode",
        found: format!("{text:?}"),
        wanted: "octal digits from \"0600\" to \"0777\", such as \"0660\" for owner and group".into(),
    })
}

fn rule(raw: RawRule) -> Result<Rule, ConfigError> {
    let number = |key, found: Option<usize>, least: usize, most: usize| match found {
        Some(n) if n < least || n > most => {
            Err(ConfigError::Value { key, found: n.to_string(), wanted: format!("from {least} to {most}") })
        }
        found => Ok(found),
    };
    let tokens = raw.tokens_per_minute.map(|n| n as usize);
    number("socket.allow.tokens_per_minute", tokens, 1, MAX_TOKENS_PER_MINUTE as usize)?;
    Ok(Rule {
        uid: raw.uid,
        gid: raw.gid,
        class: match raw.class {
            RawClass::High => Class::Interactive,
            RawClass::Normal => Class::Normal,
            RawClass::Low => Class::Background,
        },
        max_sequences: number("socket.allow.max_sequences", raw.max_sequences, 1, MAX_SEQUENCES)?,
        tokens_per_minute: raw.tokens_per_minute,
        ctx: number("socket.allow.ctx", raw.ctx, MIN_CONTEXT, MAX_CONTEXT)?,
        power: raw.power,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use crate::config::Config;
    use crate::engine::scheduler::Class;
    use crate::serve::access::{Rule, SocketSetup};

    #[test]
    fn tables_become_rules_in_their_order() {
        let text = r#"
            [[socket]]
            path = "/run/hearth/apps.sock"
            mode = "0666"
            allow = [
                { uid = 1000, class = "high", power = true },
                { gid = 101, class = "low", max_sequences = 2, tokens_per_minute = 6000, ctx = 512 },
            ]
            [[socket]]
            path = "/run/hearth/own.sock"
        "#;
        let (config, unknown) = Config::parse(text).unwrap();
        assert_eq!(unknown, []);
        let one = Rule { uid: Some(1000), class: Class::Interactive, power: true, ..Rule::default() };
        let two = Rule {
            gid: Some(101),
            class: Class::Background,
            max_sequences: Some(2),
            tokens_per_minute: Some(6000),
            ctx: Some(512),
            ..Rule::default()
        };
        let apps = SocketSetup { path: "/run/hearth/apps.sock".into(), mode: 0o666, allow: Some(vec![one, two]) };
        assert_eq!(config.sockets, [apps, SocketSetup::at("/run/hearth/own.sock")]);
    }

    #[test]
    fn what_is_wrong_with_a_rule_costs_the_file_and_is_named() {
        let socket = |rest: &str| format!("[[socket]]\npath = \"/run/s\"\n{rest}");
        for (text, wanted) in [
            (socket("allow = [{ uidd = 5 }]"), "line 3: unknown field `uidd`, expected"),
            (socket("allowed = []"), "line 3: unknown field `allowed`, expected"),
            (socket("allow = [{ class = \"root\" }]"), "line 3: unknown variant `root`, expected one of `high`"),
            (socket("allow = [{ uid = -1 }]"), "line 3: "),
            (socket("allow = [{ max_sequences = 0 }]"), "socket.allow.max_sequences is 0, must be from 1 to 256"),
            (socket("allow = [{ tokens_per_minute = 0 }]"), "socket.allow.tokens_per_minute is 0, must be from 1 to"),
            (socket("allow = [{ ctx = 63 }]"), "socket.allow.ctx is 63, must be from 64 to"),
            (socket("mode = \"660\"\nallow = 3"), "line 4: "),
            (socket("mode = \"0060\""), "socket.mode is \"0060\", must be octal"),
            (socket("mode = \"1777\""), "socket.mode is \"1777\", must be octal"),
            (socket("mode = \"0o660\""), "socket.mode is \"0o660\", must be octal"),
            (socket("[[socket]]\npath = \"/run/s\""), "socket.path is /run/s twice"),
            (
                "[[socket]]\npath = \"hearth.sock\"".into(),
                "socket.path is \"hearth.sock\", must be a file's whole path",
            ),
            (format!("[[socket]]\npath = \"/{}\"", "x".repeat(200)), "of at most 107 bytes"),
            ("[[socket]]\nmode = \"0600\"".into(), "line 1: missing field `path`"),
            (socket(&format!("allow = [{}]", "{},".repeat(33))), "socket.allow is a list of 33, must be at most 32"),
            ("[[socket]]\npath = \"/s\"\n".repeat(9), "socket is 9 tables, must be at most 8"),
        ] {
            let found = Config::parse(&text).unwrap_err().to_string();
            assert!(found.contains(wanted), "{text:?}: {found}");
        }
    }
}
