//! A request's way through the engine, as the loop sees it: submitted, its tokens made text and handed to whoever asked,
//! ended. Next on the data's way: `engine::queue` for jobs, `serve::conn` and `serve::tty` for text.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::{Owner, Running, Server};
use crate::engine::queue::{Event, FinishReason, RequestId};
use crate::serve::admit::admit;
use crate::text::TokenId;
use crate::wire::{Finish, GenerateRequest, Outcome, Reject, Usage};

impl Server<'_, '_, '_> {
    pub(super) fn submit(&mut self, owner: Owner, request: &GenerateRequest) -> Result<RequestId, Reject> {
        if self.is_stopping() {
            return Err(Reject::unavailable("the daemon is stopping"));
        }
        let id = self.next_request;
        let job = admit(id, request, self.setup.text, &self.setup.defaults, self.setup.context_tokens)?;
        let running = Running {
            owner,
            text: self.setup.text.answer(&request.stop).map_err(|why| Reject::field("stop", why))?,
            cancel: Arc::clone(&job.cancel),
            usage: Usage { prompt_tokens: job.prompt.len(), completion_tokens: 0 },
        };
        self.link.submit(job).map_err(|_| Reject::busy())?;
        log::debug!("request {id}: {} prompt tokens", running.usage.prompt_tokens);
        self.next_request += 1;
        self.running.insert(id, running);
        Ok(id)
    }

    pub(super) fn drain_engine(&mut self, now: Instant) {
        self.link.clear();
        while let Some(event) = self.link.next_event() {
            match event {
                Event::Token { id, token, logits_hash } => self.token(id, token, logits_hash, now),
                Event::Finished { job, reason, completion_tokens, logits_hash } => {
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
        running.usage.completion_tokens += 1;
        let mut piece = String::new();
        let stopped = running.text.push(token, &mut piece);
        let usage = running.usage;
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
