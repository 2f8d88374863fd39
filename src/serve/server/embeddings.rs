//! Requests for embeddings: their texts become jobs one after the other, their vectors one answer. One at a time, since a prompt fills the
//! engine by itself, and the turn of others comes in between. Next on the data's way: `engine::embed`, then `wire::openai`.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use super::answers::unanswered;
use super::{Owner, Running, Server};
use crate::engine::embed::{Embed, Pooling};
use crate::engine::queue::{FinishReason, Job, RequestId};
use crate::engine::scheduler::may_wait;
use crate::serve::admit::known_ids;
use crate::serve::conn::Conn;
use crate::serve::memory::{MAX_EMBED_ANSWER_BYTES, MAX_EMBED_BYTES, max_embed_tokens, max_jobs, max_text_bytes};
use crate::text::TokenId;
use crate::wire::http::Reply;
use crate::wire::openai::{embedding_bytes, embeddings_text};
use crate::wire::{EmbedInput, EmbedPooling, EmbedRequest, RETRY_AFTER_S, Reject, Usage};

/// One request under way.
pub(super) struct Embeddings {
    reply: Reply,
    base64: bool,
    pooling: Pooling,
    dimensions: usize,
    /// Prompts that are not with the engine yet.
    left: VecDeque<Vec<TokenId>>,
    done: Vec<Vec<f32>>,
    prompt_tokens: usize,
    /// What the answer may take.
    answer_bytes: usize,
}

/// Bytes of an answer's vector beside its numbers.
const ENTRY_BYTES: usize = 64;

impl Server<'_, '_, '_> {
    /// Checks all of a request and begins with its first text.
    pub(super) fn begin_embeddings(
        &mut self,
        key: u64,
        request: &EmbedRequest,
        reply: Reply,
        now: Instant,
    ) -> Result<(), Reject> {
        if self.is_stopping() {
            return Err(Reject::unavailable("the daemon is stopping"));
        }
        let n_embd = self.setup.n_embd;
        let dimensions = request.dimensions.unwrap_or(n_embd);
        if dimensions > n_embd {
            let wide = format!("`dimensions` is {dimensions}: the model has {n_embd}");
            return Err(Reject::field("dimensions", wide));
        }
        let each = dimensions.saturating_mul(embedding_bytes(request.base64)).saturating_add(ENTRY_BYTES);
        let most = (MAX_EMBED_ANSWER_BYTES / each).max(1);
        if request.inputs.len() > most {
            let many = format!(
                "`input` has {} entries: at most {most} vectors of {dimensions} dimensions are given at once as {}",
                request.inputs.len(),
                if request.base64 { "base64" } else { "numbers; base64 takes less" },
            );
            return Err(Reject::field("input", many).with_code("too_many_inputs"));
        }
        let answer_bytes = request.inputs.len().saturating_mul(each);
        let under_way: usize = self.embeddings.values().map(|other| other.answer_bytes).sum();
        let unread: usize = self.conns.values().map(Conn::excess).sum();
        if under_way + unread > 0 && under_way + unread + answer_bytes > MAX_EMBED_BYTES {
            return Err(Reject::busy());
        }
        let (peer, rule) = self.peer(Owner::Conn(key));
        let context_tokens = rule.ctx.unwrap_or(usize::MAX).min(self.setup.context_tokens);
        let prompts = request.inputs.iter().map(|input| self.embed_prompt(input, context_tokens));
        let left: VecDeque<_> = prompts.collect::<Result<_, _>>()?;
        let prompt_tokens = left.iter().map(Vec::len).sum();
        let most = max_embed_tokens(self.setup.context_tokens);
        if prompt_tokens > most {
            let many = format!("the texts have {prompt_tokens} tokens: at most {most} are taken at once");
            return Err(Reject::field("input", many).with_code("too_many_inputs"));
        }
        let metered = rule.tokens_per_minute.zip(u32::try_from(peer.id).ok());
        self.may_have(metered, prompt_tokens, now)?;
        let pooling = match request.pooling {
            EmbedPooling::Mean => Pooling::Mean,
            EmbedPooling::Last => Pooling::Last,
            EmbedPooling::Cls => Pooling::Cls,
        };
        let done = Vec::with_capacity(left.len());
        let base64 = request.base64;
        let request = Embeddings { reply, base64, pooling, dimensions, left, done, prompt_tokens, answer_bytes };
        self.embeddings.insert(key, request);
        if let Err(reject) = self.next_embedding(key) {
            self.embeddings.remove(&key);
            return Err(reject);
        }
        if let Some((_, uid)) = metered {
            self.meters.charge(uid, prompt_tokens);
        }
        self.counters.submitted(prompt_tokens);
        if let Some(conn) = self.conns.get_mut(&key) {
            conn.waits();
        }
        Ok(())
    }

    fn embed_prompt(&self, input: &EmbedInput, context_tokens: usize) -> Result<Vec<TokenId>, Reject> {
        let text = self.setup.text;
        let prompt = match input {
            EmbedInput::Tokens(ids) => known_ids(ids, text.vocabulary_len(), "input")?,
            EmbedInput::Text(words) => {
                let most = max_text_bytes(context_tokens);
                if words.len() > most {
                    let long = format!("a text has {} bytes: at most {most} are taken", words.len());
                    return Err(Reject::field("input", long).with_code("context_length_exceeded"));
                }
                text.tokenize(words, true, false).map_err(|why| Reject::field("input", why))?
            }
        };
        if prompt.is_empty() {
            return Err(Reject::field("input", "a text has no tokens"));
        }
        if prompt.len() > context_tokens {
            let long = format!("a text has {} tokens, the context {context_tokens}", prompt.len());
            return Err(Reject::field("input", long).with_code("context_length_exceeded"));
        }
        Ok(prompt)
    }

    /// Hands the next text to the engine.
    fn next_embedding(&mut self, key: u64) -> Result<(), Reject> {
        let owner = Owner::Conn(key);
        let (peer, rule) = self.peer(owner);
        let own = self.running.values().filter(|running| running.peer == peer.id).count();
        if self.running.len() >= max_jobs(self.setup.sequences) || !may_wait(own, self.link.waiting()) {
            return Err(Reject::busy());
        }
        if rule.max_sequences.is_some_and(|most| own >= most) {
            let why = format!("{own} requests are under way, a user may have no more at once on this socket");
            return Err(Reject::over_limit("too_many_sequences", why, RETRY_AFTER_S));
        }
        let Some(request) = self.embeddings.get_mut(&key) else { return Ok(()) };
        let Some(prompt) = request.left.pop_front() else { return Ok(()) };
        let embed = Some(Box::new(Embed::new(request.pooling, self.setup.n_embd)));
        let id = self.next_request;
        let cancel = Arc::new(AtomicBool::new(false));
        let usage = Usage { prompt_tokens: prompt.len(), ..Usage::default() };
        let job = Job { id, prompt, embed, cancel: Arc::clone(&cancel), peer, ..Job::default() };
        let text = self.setup.text.answer(&[]).map_err(Reject::internal)?;
        self.link.submit(Box::new(job)).map_err(|_| Reject::busy())?;
        self.next_request += 1;
        let running =
            Running { owner, peer: peer.id, metered: None, choice: 0, text, grammar: None, cancel, usage, room: None };
        self.running.insert(id, running);
        Ok(())
    }

    /// A text came back from the engine.
    pub(super) fn embedded(&mut self, id: RequestId, embed: &Embed, reason: FinishReason, now: Instant) {
        let Some(running) = self.running.remove(&id) else { return };
        log::debug!("request {id}: an embedding, {reason:?}");
        let Owner::Conn(key) = running.owner else { return };
        let Some(request) = self.embeddings.get_mut(&key) else { return };
        let vector = if reason == FinishReason::Stop { embed.normalized(request.dimensions) } else { None };
        let next = match vector {
            Some(vector) => {
                request.done.push(vector);
                if request.left.is_empty() { Ok(true) } else { self.next_embedding(key).map(|()| false) }
            }
            None => Err(unanswered(reason)),
        };
        match next {
            Ok(false) => {}
            Ok(true) => {
                let Some(request) = self.embeddings.remove(&key) else { return };
                let (model, tokens) = (self.setup.model_id, request.prompt_tokens);
                let body = embeddings_text(model, &request.done, request.base64, tokens);
                if let Some(conn) = self.conns.get_mut(&key) {
                    conn.answer(request.reply, 200, &body, now);
                }
            }
            Err(reject) => self.end_embeddings(key, &reject, now),
        }
    }

    /// The request on this connection, if it is one for embeddings, has no answer.
    pub(super) fn end_embeddings(&mut self, key: u64, reject: &Reject, now: Instant) {
        if let Some(request) = self.embeddings.remove(&key)
            && let Some(conn) = self.conns.get_mut(&key)
        {
            conn.reject(request.reply, reject, now);
        }
    }
}
