//! A request's way through the engine, as the loop sees it: submitted, its tokens made text and handed to whoever asked,
//! ended. Next on the data's way: `engine::queue` for jobs, `serve::conn` and `serve::tty` for text.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::{Owner, Running, Server};
use crate::engine::queue::{Event, FinishReason, RequestId};
use crate::engine::sampler::TokenLogprobs;
use crate::engine::scheduler::{Class, Peer, may_wait};
use crate::serve::access::Rule;
use crate::serve::admit::{admit, another};
use crate::serve::conn::{Conn, MAX_OUTPUT_BYTES};
use crate::serve::grammar::AnswerGrammar;
use crate::serve::memory::{max_jobs, max_text_bytes};
use crate::serve::tty::TtyPort;
use crate::sys::marks::{self, Stage};
use crate::text::TokenId;
use crate::text::constrain::{Course, GrammarError};
use crate::wire::{Finish, GenerateRequest, Logprob, Outcome, RETRY_AFTER_S, Reject, Usage};

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
        let answers = request.n.max(1);
        if self.running.len() + answers > max_jobs(self.setup.sequences) {
            return Err(Reject::busy());
        }
        let (peer, rule) = self.peer(owner);
        let own = self.running.values().filter(|running| running.peer == peer.id).count();
        // Each of the answers takes a place.
        if !(0..answers).all(|more| may_wait(own + more, self.link.waiting() + more)) {
            return Err(Reject::busy());
        }
        if let Some(most) = rule.max_sequences.filter(|most| own + answers > *most) {
            let why = format!(
                "{own} answers are under way and {answers} asked for, a user may have {most} at once on this socket"
            );
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
        let room = self.room(request) / answers;
        let id = self.next_request;
        let mut job = admit(id, request, self.setup.text, &self.setup.defaults, context_tokens)?;
        self.may_have(metered, job.prompt.len(), now)?;
        job.peer = peer;
        let course = self.course(request, answers)?;
        let usage = Usage { prompt_tokens: job.prompt.len(), completion_tokens: 0, cached_tokens: 0 };
        let mut others: Vec<_> = (1..answers).map(|further| another(&job, further as u64)).collect();
        others.insert(0, job);
        for (choice, mut job) in others.into_iter().enumerate() {
            let vocabulary = self.setup.text.vocabulary_len();
            let begun = course.as_ref().map(|course| AnswerGrammar::new(course.copy(), vocabulary)).transpose();
            let grammar = begun.map_err(|why| grammar_ends(&why))?;
            job.mask = grammar.as_ref().map(AnswerGrammar::mask);
            let running = Running {
                owner,
                peer: peer.id,
                metered: metered.map(|(_, uid)| uid),
                choice,
                text: self.setup.text.answer(&request.stop).map_err(|why| Reject::field("stop", why))?,
                grammar,
                cancel: Arc::clone(&job.cancel),
                usage,
                room: keeps.then_some(room),
            };
            let number = job.id;
            if self.link.submit(job).is_err() {
                self.abandon_all(owner);
                return Err(Reject::busy());
            }
            self.counters.submitted(if choice == 0 { usage.prompt_tokens } else { 0 });
            self.next_request += 1;
            self.running.insert(number, running);
        }
        if let Some((_, uid)) = metered {
            self.meters.charge(uid, usage.prompt_tokens);
        }
        log::debug!("request {id}: {} prompt tokens, {answers} answers", usage.prompt_tokens);
        Ok(id)
    }

    /// The way through the grammar that a request names.
    fn course(&mut self, request: &GenerateRequest, answers: usize) -> Result<Option<Course>, Reject> {
        let Some(constraint) = &request.constraint else { return Ok(None) };
        let under_way = self.running.values().filter(|running| running.grammar.is_some()).count();
        let (text, most) = (self.setup.text, self.setup.grammars);
        self.shelf.begin(constraint, text, answers, under_way, most).map(Some)
    }

    /// Bytes that the answers of a request may take where they are kept whole: what a connection's output may hold in any case.
    fn room(&self, request: &GenerateRequest) -> usize {
        let text = max_text_bytes(self.setup.context_tokens);
        if request.logprobs.is_some() { text.max(MAX_OUTPUT_BYTES) } else { text }
    }

    /// Whose turn a request takes, and what they may have: each user of the sockets has one, and so has the serial line, where a
    /// person waits.
    pub(super) fn peer(&self, owner: Owner) -> (Peer, Rule) {
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
    pub(super) fn may_have(&mut self, metered: Option<(u32, u32)>, tokens: usize, now: Instant) -> Result<(), Reject> {
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
                Event::Token { id, token, logits_hash, logprobs } => {
                    let logprob = logprobs.map(|told| self.logprob(token, &told));
                    self.token(id, token, logprob, logits_hash, now);
                }
                Event::Finished { mut job, reason, completion_tokens, logits_hash } => {
                    self.counters.ended(reason, completion_tokens);
                    match job.embed.take() {
                        Some(embed) => self.embedded(job.id, &embed, reason, now),
                        None => self.finished(job.id, reason, completion_tokens, logits_hash, now),
                    }
                }
            }
        }
    }

    fn logprob(&self, token: TokenId, told: &TokenLogprobs) -> Logprob {
        let bytes = |token: TokenId| self.setup.text.token_bytes(token).to_vec();
        Logprob {
            bytes: bytes(token),
            logprob: told.logprob,
            top: told.top().iter().map(|&(token, logprob)| (bytes(token), logprob)).collect(),
        }
    }

    fn token(&mut self, id: RequestId, token: TokenId, logprob: Option<Logprob>, hash: Option<u64>, now: Instant) {
        let Some(running) = self.running.get_mut(&id) else {
            return;
        };
        let (owner, choice) = (running.owner, running.choice);
        if owner == Owner::Nobody {
            return;
        }
        marks::reach(Stage::FirstToken);
        running.usage.completion_tokens += 1;
        if let Some(uid) = running.metered {
            self.meters.charge(uid, 1);
        }
        let mut piece = String::new();
        let mut stopped = running.text.push(token, &mut piece);
        if !stopped && let Some(grammar) = &mut running.grammar {
            match grammar.push(token) {
                Ok(false) => self.link.nudge(),
                Ok(true) => {
                    // Nothing can follow: what was held back is text.
                    running.text.finish(&mut piece);
                    stopped = true;
                }
                Err(why) => return self.end_early(id, Err(&grammar_ends(&why)), now),
            }
        }
        let usage = running.usage;
        if let Some(room) = &mut running.room {
            match room.checked_sub(json_bytes(&piece) + logprob.as_ref().map_or(0, Logprob::cost)) {
                Some(left) => *room = left,
                None => {
                    let outcome = Outcome { finish: Finish::Length, usage, logits_hash: hash };
                    self.conclude(owner, choice, Ok(&outcome), now);
                    return self.abandon(id);
                }
            }
        }
        if !self.deliver(owner, choice, &piece, logprob, now) {
            self.abandon(id);
        } else if stopped {
            // The engine may be some steps ahead by now; how many depends on the clock, and the hash must not.
            let outcome = Outcome { finish: Finish::Stop, usage, logits_hash: hash };
            self.conclude(owner, choice, Ok(&outcome), now);
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
        if !self.deliver(running.owner, running.choice, &piece, None, now) {
            return;
        }
        let usage = Usage { completion_tokens: tokens, ..running.usage };
        let outcome = match reason {
            FinishReason::Stop => Ok(Outcome { finish: Finish::Stop, usage, logits_hash: hash }),
            FinishReason::Length => Ok(Outcome { finish: Finish::Length, usage, logits_hash: hash }),
            FinishReason::Cancelled | FinishReason::NonFinite | FinishReason::Refused => Err(unanswered(reason)),
        };
        self.conclude(running.owner, running.choice, outcome.as_ref(), now);
    }

    /// The answer ends here and now, whatever step the engine is in.
    pub(super) fn end_early(&mut self, id: RequestId, why: Result<Finish, &Reject>, now: Instant) {
        let Some(running) = self.running.get_mut(&id) else {
            return;
        };
        let (owner, choice, usage) = (running.owner, running.choice, running.usage);
        if owner != Owner::Nobody {
            let mut piece = String::new();
            running.text.finish(&mut piece);
            if self.deliver(owner, choice, &piece, None, now) {
                let outcome = why.map(|finish| Outcome { finish, usage, logits_hash: None });
                self.conclude(owner, choice, outcome.as_ref().map_err(|reject| *reject), now);
            }
        }
        self.abandon(id);
    }

    /// False: the owner is lost.
    fn deliver(&mut self, owner: Owner, choice: usize, piece: &str, logprob: Option<Logprob>, now: Instant) -> bool {
        match owner {
            Owner::Conn(key) => self.conns.get_mut(&key).is_some_and(|conn| conn.delta(choice, piece, logprob, now)),
            Owner::Tty => self.tty.as_mut().is_some_and(|tty| tty.delta(piece)),
            Owner::Nobody => true,
        }
    }

    fn conclude(&mut self, owner: Owner, choice: usize, outcome: Result<&Outcome, &Reject>, now: Instant) {
        if outcome.is_ok() {
            marks::reach(Stage::FirstAnswer);
        }
        match owner {
            Owner::Conn(key) => {
                if let Err(reject) = outcome {
                    self.end_embeddings(key, reject, now);
                }
                if let Some(conn) = self.conns.get_mut(&key) {
                    conn.finish(choice, outcome, now);
                }
                if outcome.is_err() {
                    // The connection is free for its next request: nothing of this one may reach it.
                    self.abandon_all(owner);
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

    /// Nobody waits for any of this owner's jobs any more.
    pub(super) fn abandon_all(&mut self, owner: Owner) {
        let ids: Vec<RequestId> =
            self.running.iter().filter(|(_, running)| running.owner == owner).map(|(&id, _)| id).collect();
        for id in ids {
            log::debug!("request {id}: its client went away, or is answered");
            self.abandon(id);
        }
    }

    /// Nobody waits for this job any more: the engine drops it at its next step.
    pub(super) fn abandon(&mut self, id: RequestId) {
        if let Some(running) = self.running.get_mut(&id) {
            running.owner = Owner::Nobody;
            running.grammar = None;
            running.cancel.store(true, Ordering::Release);
            self.link.nudge();
        }
    }
}

/// The serial line's turn, and that of peers whom the kernel does not name; users' numbers have 32 bits.
const SERIAL_PEER: u64 = u64::MAX;
const UNKNOWN_PEER: u64 = u64::MAX - 1;

/// Why the engine gave a job back without its end.
pub(super) fn unanswered(reason: FinishReason) -> Reject {
    match reason {
        FinishReason::Cancelled => Reject::unavailable("the daemon stopped before the answer's end"),
        FinishReason::Refused => Reject::internal("the engine refused the request; the log says why"),
        FinishReason::NonFinite | FinishReason::Stop | FinishReason::Length => {
            Reject::internal("the model computed values that are not finite; its file is damaged")
        }
    }
}

/// The grammar took more than it may, in the middle of an answer.
fn grammar_ends(why: &GrammarError) -> Reject {
    Reject::request(422, format!("the grammar cannot be followed any further: {why}")).with_code("grammar_too_large")
}

/// Bytes of a text inside a JSON string.
fn json_bytes(text: &str) -> usize {
    let byte = |byte: u8| match byte {
        b'"' | b'\\' | b'\n' | b'\r' | b'\t' | 0x08 | 0x0C => 2,
        0..=0x1F => 6,
        _ => 1,
    };
    text.bytes().map(byte).sum()
}
