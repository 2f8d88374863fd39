//! Who may ask, and how much: the rules of a socket against what the kernel says of the peer (SO_PEERCRED), and the tokens that each
//! user has left. Pure: no descriptor, no clock. Read from `hearth.toml` by `config`; next on the data's way: `serve::server`, which
//! asks here once a connection and once a request.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::listener::SOCKET_MODE;
use crate::engine::scheduler::Class;
use crate::wire::Reject;

#[cfg(test)]
mod tests;

/// Sockets that one daemon listens on.
pub const MAX_SOCKETS: usize = 8;
/// Rules that a socket may have.
pub const MAX_RULES: usize = 32;
/// Most tokens a minute that a rule may name: more than any machine gives.
pub const MAX_TOKENS_PER_MINUTE: u32 = 100_000_000;
/// Users whose tokens are counted at once; those who have all of theirs are forgotten first.
pub const MAX_METERED_USERS: usize = 256;
/// Bytes that counting takes, with what a table keeps free for itself.
pub const METERS_BYTES: usize = 4 * MAX_METERED_USERS * (size_of::<u32>() + size_of::<Meter>());
/// Bytes that the rules of all sockets take.
pub const RULES_BYTES: usize = MAX_SOCKETS * (MAX_RULES * size_of::<Rule>() + size_of::<SocketSetup>() + 4096);

/// The user that the kernel names for a peer whose own has no number here: one of another user namespace.
const OVERFLOW_ID: u32 = 65534;
const MINUTE_S: f64 = 60.0;

/// A socket, and who may ask on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketSetup {
    /// Where it lies.
    pub path: PathBuf,
    /// The file's permissions: whom the kernel lets connect at all.
    pub mode: u32,
    /// Looked through in this order; `None`: whoever may connect may ask.
    pub allow: Option<Vec<Rule>>,
}

/// Whom a rule is for, and what they get.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// This user; `None`: any.
    pub uid: Option<u32>,
    /// This primary group; `None`: any.
    pub gid: Option<u32>,
    /// Whose turn comes first.
    pub class: Class,
    /// Requests that each user may have under way at once; `None`: as many as fit.
    pub max_sequences: Option<usize>,
    /// Tokens, prompts' and answers', that each user may have in a minute; `None`: no limit.
    pub tokens_per_minute: Option<u32>,
    /// Tokens that a request may have, prompt and answer together; `None`: the daemon's context.
    pub ctx: Option<usize>,
    /// May switch the machine off and start it again.
    pub power: bool,
}

/// Who connected, as the kernel tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerIds {
    /// The user.
    pub uid: u32,
    /// The primary group.
    pub gid: u32,
}

/// Why somebody may not ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denied {
    /// The kernel does not say who it is.
    Unknown,
    /// No rule of this socket names them.
    NoRule(PeerIds),
}

impl SocketSetup {
    /// A socket that its owner and group may use.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), mode: SOCKET_MODE, allow: None }
    }

    /// What a peer gets on this socket, where this process runs as user `own`.
    ///
    /// # Errors
    /// They may not ask.
    pub fn access(&self, peer: Option<PeerIds>, own: u32) -> Result<Rule, Denied> {
        let rules = self.allow.as_deref();
        let Some(peer) = peer else {
            return if rules.is_none() { Ok(Rule::default()) } else { Err(Denied::Unknown) };
        };
        // Root and the daemon's own user could do to it what they like anyway.
        let is_master = peer.uid == 0 || peer.uid == own;
        if let Some(rule) = rules.unwrap_or_default().iter().find(|rule| rule.is_for(peer)) {
            return Ok(Rule { power: rule.power || is_master, ..*rule });
        }
        match rules {
            None => Ok(Rule { power: is_master, ..Rule::default() }),
            Some(_) if is_master => Ok(Rule { power: true, ..Rule::default() }),
            Some(_) if peer.uid == OVERFLOW_ID => Err(Denied::Unknown),
            Some(_) => Err(Denied::NoRule(peer)),
        }
    }
}

impl Rule {
    fn is_for(&self, peer: PeerIds) -> bool {
        self.uid.is_none_or(|uid| uid == peer.uid) && self.gid.is_none_or(|gid| gid == peer.gid)
    }
}

impl Denied {
    /// What they hear.
    pub fn to_reject(self) -> Reject {
        match self {
            Self::Unknown => Reject::unknown_peer("the kernel does not say which user asks, and this socket has rules"),
            Self::NoRule(PeerIds { uid, gid }) => {
                Reject::not_allowed(format!("no rule of this socket allows user {uid} or group {gid}"))
            }
        }
    }
}

/// One user's tokens. They come back evenly, up to a minute's worth; an answer that has begun is never cut, so there may be fewer than none.
#[derive(Clone, Copy, Debug)]
struct Meter {
    limit: u32,
    left: f64,
    at: Instant,
}

impl Meter {
    fn left_at(&self, now: Instant) -> f64 {
        let back = now.saturating_duration_since(self.at).as_secs_f64() * f64::from(self.limit) / MINUTE_S;
        (self.left + back).min(f64::from(self.limit))
    }
}

/// The tokens of every user who has a limit.
#[derive(Debug, Default)]
pub struct Meters {
    users: HashMap<u32, Meter>,
}

impl Meters {
    /// Whether `uid`, who may have `limit` tokens a minute, may have a prompt of so many now. One that is longer than a minute's worth
    /// needs a full minute's.
    ///
    /// # Errors
    /// Not yet: the time to wait.
    pub fn ask(&mut self, uid: u32, limit: u32, tokens: usize, now: Instant) -> Result<(), Duration> {
        if !self.users.contains_key(&uid) && self.users.len() >= MAX_METERED_USERS {
            self.users.retain(|_, meter| meter.left_at(now) < f64::from(meter.limit));
            if self.users.len() >= MAX_METERED_USERS {
                return Err(Duration::from_secs_f64(MINUTE_S));
            }
        }
        let full = f64::from(limit);
        let meter = self.users.entry(uid).or_insert(Meter { limit, left: full, at: now });
        // Another socket may give the same user another limit.
        *meter = Meter { limit, left: meter.left_at(now).min(full), at: now };
        let wanted = (tokens as f64).min(full);
        if meter.left >= wanted {
            return Ok(());
        }
        Err(Duration::from_secs_f64((wanted - meter.left) * MINUTE_S / full.max(1.0)))
    }

    /// Counts tokens that `uid` got.
    pub fn charge(&mut self, uid: u32, tokens: usize) {
        if let Some(meter) = self.users.get_mut(&uid) {
            meter.left -= tokens as f64;
        }
    }
}
