//! A request's way through the engine, as the loop sees it: submitted, its tokens made text and handed to whoever asked,
//! ended. Next on the data's way: `engine::queue` for jobs, `serve::conn` and `serve::tty` for text.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::{Owner, Running, Server};
use crate::engine::queue::{Event, FinishReason, RequestId};
use crate::engine::scheduler::{Class, Peer, may_wait};
use crate::serve::access::Rule;
use crate::serve::admit::admit;
use crate::serve::conn::Conn;
use crate::serve::memory::{max_jobs, max_text_bytes};
use crate::serve::tty::TtyPort;
use crate::sys::marks::{self, Stage};
use crate::text::TokenId;
use crate::wire::{Finish, GenerateRequest, Outcome, RETRY_AFTER_S, Reject, Usage};

impl Server<'_, '_, '_> {
    pub(super) fn submit(
        &mut self,
        owner: Owner,
        request: &GenerateRequest,
        now: Instant,
    ) -> Result<RequestId, Reject> {
        if self.is_stopping() {
            return Err(Reject::unavailable("the daemon is stopping"));
        }
        if self.running.len() >= max_jobs(self.setup.sequences) {
            return Err(Reject::busy());
        }
        let (peer, rule) = self.peer(owner);
        let own = self.running.values().filter(|running| running.peer == peer.id).count();
        if !may_wait(own, self.link.waiting()) {
            return Err(Reject::busy());
        }
        if let Some(most) = rule.max_sequences.filter(|most| own >= *most) {
            let why = format!("{own} requests are under way, a user may have {most} at once on this socket");
            return Err(Reject::over_limit("too_many_sequences", why, RETRY_AFTER_S));
        }
        let metered = rule.tokens_per_minute.zip(u32::try_from(peer.id).ok());
        // Before the prompt's tokens are counted, which takes time.
        self.may_have(metered, 1, now)?;
        let context_tokens = rule.ctx.unwrap_or(usize::MAX).min(self.setup.context_tokens);
        let keeps = match owner {
            Owner::Tty => self.tty.as_ref().is_some_and(TtyPort::keeps_answer),
            Owner::Conn(_) | Owner::Nobody => !request.stream,
        };
        let id = self.next_request;
        let mut job = admit(id, request, self.setup.text, &self.setup.defaults, context_tokens)?;
        self.may_have(metered, job.prompt.len(), now)?;
        job.peer = peer;
        let running = Running {
            owner,
            peer: peer.id,
            metered: metered.map(|(_, uid)| uid),
            text: self.setup.text.answer(&request.stop).map_err(|why| Reject::field("stop", why))?,
            cancel: Arc::clone(&job.cancel),
            usage: Usage { prompt_tokens: job.prompt.len(), completion_tokens: 0, cached_tokens: 0 },
            room: keeps.then(|| max_text_bytes(self.setup.context_tokens)),
        };
        self.link.submit(job).map_err(|_| Reject::busy())?;
        if let Some(uid) = running.metered {
            self.meters.charge(uid, running.usage.prompt_tokens);
        }
        self.counters.submitted(running.usage.prompt_tokens);
        log::debug!("request {id}: {} prompt tokens", running.usage.prompt_tokens);
        self.next_request += 1;
        self.running.insert(id, running);
        Ok(id)
    }

    /// Whose turn a request takes, and what they may have: each user of the sockets has one, and so has the serial line, where a
    /// person waits.
    fn peer(&self, owner: Owner) -> (Peer, Rule) {
        match owner {
            Owner::Tty => (Peer { id: SERIAL_PEER, class: Class::Interactive }, Rule::default()),
            Owner::Conn(key) => {
                let conn = self.conns.get(&key);
                let id = conn.and_then(Conn::peer_uid).map_or(UNKNOWN_PEER, u64::from);
                let rule = conn.and_then(|conn| conn.access().ok()).unwrap_or_default();
                (Peer { id, class: rule.class }, rule)
            }
            Owner::Nobody => Default::default(),
        }
    }

    /// Whether a user with so many tokens a minute may have so many now.
    fn may_have(&mut self, metered: Option<(u32, u32)>, tokens: usize, now: Instant) -> Result<(), Reject> {
        let Some((limit, uid)) = metered else { return Ok(()) };
        self.meters.ask(uid, limit, tokens, now).map_err(|wait| {
            let seconds = u32::try_from(wait.as_millis().div_ceil(1000)).unwrap_or(u32::MAX).max(RETRY_AFTER_S);
            let why = format!("a user may have {limit} tokens a minute on this socket; try again in {seconds} s");
            Reject::over_limit("rate_limit_exceeded", why, seconds)
        })
    }

    pub(super) fn drain_engine(&mut self, now: Instant) {
        self.link.clear();
        while let Some(event) = self.link.next_event() {
            match event {
                Event::Begun { id, cached_tokens } => {
                    self.counters.begun(cached_tokens);
                    if let Some(running) = self.running.get_mut(&id) {
                        running.usage.cached_tokens = cached_tokens;
                    }
                }
                Event::Token { id, token, logits_hash } => self.token(id, token, logits_hash, now),
                Event::Finished { job, reason, completion_tokens, logits_hash } => {
                    self.counters.ended(reason, completion_tokens);
                    self.finished(job.id, reason, completion_tokens, logits_hash, now);
                }
            }
        }
    }

    pub(super) fn token(&mut self, id: RequestId, token: TokenId, hash: Option<u64>, now: Instant) {
        let Some(running) = self.running.get_mut(&id) else {
            return;
        };
        let owner = running.owner;
        if owner == Owner::Nobody {
            return;
        }
        marks::reach(Stage::FirstToken);
        running.usage.completion_tokens += 1;
        if let Some(uid) = running.metered {
            self.meters.charge(uid, 1);
        }
        let mut piece = String::new();
        let stopped = running.text.push(token, &mut piece);
        let usage = running.usage;
        if let Some(room) = &mut running.room {
            match room.checked_sub(json_bytes(&piece)) {
                Some(left) => *room = left,
                None => {
                    let outcome = Outcome { finish: Finish::Length, usage, logits_hash: hash };
                    self.conclude(owner, Ok(&outcome), now);
                    return self.abandon(id);
                }
            }
        }
        if !self.deliver(owner, &piece, now) {
            self.abandon(id);
        } else if stopped {
            // The engine may be some steps ahead by now; how many depends on the clock, and the hash must not.
            let outcome = Outcome { finish: Finish::Stop, usage, logits_hash: hash };
            self.conclude(owner, Ok(&outcome), now);
            self.abandon(id);
        }
    }

    pub(super) fn finished(
        &mut self,
        id: RequestId,
        reason: FinishReason,
        tokens: usize,
        hash: Option<u64>,
        now: Instant,
    ) {
        let Some(mut running) = self.running.remove(&id) else {
            return;
        };
        log::debug!("request {id}: {tokens} tokens, {reason:?}");
        if running.owner == Owner::Nobody {
            return;
        }
        let mut piece = String::new();
        running.text.finish(&mut piece);
        if !self.deliver(running.owner, &piece, now) {
            return;
        }
        let usage = Usage { completion_tokens: tokens, ..running.usage };
        let outcome = match reason {
            FinishReason::Stop => Ok(Outcome { finish: Finish::Stop, usage, logits_hash: hash }),
            FinishReason::Length => Ok(Outcome { finish: Finish::Length, usage, logits_hash: hash }),
            FinishReason::Cancelled => Err(Reject::unavailable("the daemon stopped before the answer's end")),
            FinishReason::NonFinite => {
                Err(Reject::internal("the model computed values that are not finite; its file is damaged"))
            }
            FinishReason::Refused => Err(Reject::internal("the engine refused the request; the log says why")),
        };
        self.conclude(running.owner, outcome.as_ref(), now);
    }

    /// The answer ends here and now, whatever step the engine is in.
    pub(super) fn end_early(&mut self, id: RequestId, why: Result<Finish, &Reject>, now: Instant) {
        let Some(running) = self.running.get_mut(&id) else {
            return;
        };
        let (owner, usage) = (running.owner, running.usage);
        if owner != Owner::Nobody {
            let mut piece = String::new();
            running.text.finish(&mut piece);
            if self.deliver(owner, &piece, now) {
                let outcome = why.map(|finish| Outcome { finish, usage, logits_hash: None });
                self.conclude(owner, outcome.as_ref().map_err(|reject| *reject), now);
            }
        }
        self.abandon(id);
    }

    /// False: the owner is lost.
    pub(super) fn deliver(&mut self, owner: Owner, piece: &str, now: Instant) -> bool {
        match owner {
            Owner::Conn(key) => self.conns.get_mut(&key).is_some_and(|conn| conn.delta(piece, now)),
            Owner::Tty => self.tty.as_mut().is_some_and(|tty| tty.delta(piece)),
            Owner::Nobody => true,
        }
    }

    pub(super) fn conclude(&mut self, owner: Owner, outcome: Result<&Outcome, &Reject>, now: Instant) {
        if outcome.is_ok() {
            marks::reach(Stage::FirstAnswer);
        }
        match owner {
            Owner::Conn(key) => {
                if let Some(conn) = self.conns.get_mut(&key) {
                    conn.finish(outcome, now);
                }
            }
            Owner::Tty => {
                if let Some(tty) = &mut self.tty {
                    tty.finish(outcome);
                }
            }
            Owner::Nobody => {}
        }
    }

    /// Nobody waits for this job any more: the engine drops it at its next step.
    pub(super) fn abandon(&mut self, id: RequestId) {
        if let Some(running) = self.running.get_mut(&id) {
            running.owner = Owner::Nobody;
            running.cancel.store(true, Ordering::Release);
            self.link.nudge();
        }
    }
}

/// The serial line's turn, and that of peers whom the kernel does not name; users' numbers have 32 bits.
const SERIAL_PEER: u64 = u64::MAX;
const UNKNOWN_PEER: u64 = u64::MAX - 1;

/// Bytes of a text inside a JSON string.
fn json_bytes(text: &str) -> usize {
    let byte = |byte: u8| match byte {
        b'"' | b'\\' | b'\n' | b'\r' | b'\t' | 0x08 | 0x0C => 2,
        0..=0x1F => 6,
        _ => 1,
    };
    text.bytes().map(byte).sum()
}
