//! From a request to a job: the prompt becomes tokens, the configuration's values fill what the request left open, and
//! what the context cannot hold is refused. Next on the data's way: `engine::queue`.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::memory::max_text_bytes;
use super::text::TextModel;
use crate::engine::queue::{Job, RequestId};
use crate::engine::sampler::SamplingParams;
use crate::engine::scheduler::Peer;
use crate::text::TokenId;
use crate::wire::{GenerateRequest, Prompt, Reject, SamplingFields};

/// What requests that say nothing get.
#[derive(Clone, Debug, Default)]
pub struct Defaults {
    /// How tokens are chosen; greedy by default.
    pub sampling: SamplingParams,
    /// Length of an answer in tokens; `None`: up to the context's end.
    pub max_tokens: Option<usize>,
    /// The date for chat templates that print one, `2026-11-23`, maybe with a time.
    pub date: Option<String>,
}

/// Makes the job numbered `id`.
///
/// # Errors
/// The chat template refuses the conversation, a token id is not in the vocabulary, or the prompt does not fit.
pub(super) fn admit(
    id: RequestId,
    request: &GenerateRequest,
    text: &dyn TextModel,
    defaults: &Defaults,
    context_tokens: usize,
) -> Result<Box<Job>, Reject> {
    let refused = |field: &'static str| move |why: String| Reject::field(field, why);
    let most = max_text_bytes(context_tokens);
    let (bytes, field) = match &request.prompt {
        Prompt::Chat(messages) => (messages.iter().map(|message| message.content.len()).sum(), "messages"),
        Prompt::Text(prompt) => (prompt.len(), "prompt"),
        Prompt::Tokens(_) => (0, "prompt"),
    };
    if bytes > most {
        let long =
            format!("the text has {bytes} bytes: at most {most} are taken for a context of {context_tokens} tokens");
        return Err(Reject::field(field, long).with_code("context_length_exceeded"));
    }
    let mut prompt = match &request.prompt {
        Prompt::Chat(messages) => {
            let date = request.date.as_deref().or(defaults.date.as_deref());
            text.encode_chat(messages, date).map_err(refused(field))?
        }
        Prompt::Text(prompt) => text.encode(prompt).map_err(refused(field))?,
        Prompt::Tokens(ids) => known_ids(ids, text.vocabulary_len(), field)?,
    };
    if prompt.is_empty() {
        return Err(Reject::field(field, "the prompt has no tokens"));
    }
    if prompt.len() >= context_tokens {
        return Err(Reject::context_exceeded(prompt.len(), context_tokens, field));
    }
    prompt.shrink_to_fit();
    let room = context_tokens - prompt.len();
    let vocabulary = text.vocabulary_len();
    if let Some((id, _)) = request.sampling.logit_bias.iter().find(|(id, _)| TokenId(*id).index() >= vocabulary) {
        let unknown = format!("token id {id} is not in the vocabulary of {vocabulary}");
        return Err(Reject::field("logit_bias", unknown));
    }
    Ok(Box::new(Job {
        id,
        sampling: sampling(&request.sampling, &defaults.sampling),
        max_tokens: request.max_tokens.or(defaults.max_tokens).unwrap_or(room).clamp(1, room),
        ignore_eos: request.ignore_eos,
        logits_hash: request.logits_hash,
        logprobs: request.logprobs,
        cancel: Arc::new(AtomicBool::new(false)),
        embed: None,
        mask: None,
        peer: Peer::default(),
        prompt,
    }))
}

/// The same job for another of a request's answers: its number and seed are so many further.
pub(super) fn another(job: &Job, further: u64) -> Box<Job> {
    let mut sampling = job.sampling.clone();
    sampling.seed = sampling.seed.wrapping_add(further);
    Box::new(Job {
        id: job.id + further,
        prompt: job.prompt.clone(),
        sampling,
        max_tokens: job.max_tokens,
        ignore_eos: job.ignore_eos,
        logits_hash: job.logits_hash,
        logprobs: job.logprobs,
        cancel: Arc::new(AtomicBool::new(false)),
        embed: None,
        mask: None,
        peer: job.peer,
    })
}

/// Token ids of a request, if all are in the vocabulary; `field` names them.
pub(super) fn known_ids(ids: &[u32], vocabulary_len: usize, field: &str) -> Result<Vec<TokenId>, Reject> {
    ids.iter()
        .map(|&id| {
            let token = TokenId(id);
            if token.index() < vocabulary_len {
                Ok(token)
            } else {
                Err(Reject::field(field, format!("token id {id} is not in the vocabulary of {vocabulary_len}")))
            }
        })
        .collect()
}

fn sampling(asked: &SamplingFields, defaults: &SamplingParams) -> SamplingParams {
    SamplingParams {
        temperature: asked.temperature.unwrap_or(defaults.temperature),
        top_k: asked.top_k.unwrap_or(defaults.top_k),
        top_p: asked.top_p.unwrap_or(defaults.top_p),
        min_p: asked.min_p.unwrap_or(defaults.min_p),
        repetition_penalty: asked.repetition_penalty.unwrap_or(defaults.repetition_penalty),
        frequency_penalty: asked.frequency_penalty.unwrap_or(defaults.frequency_penalty),
        presence_penalty: asked.presence_penalty.unwrap_or(defaults.presence_penalty),
        repeat_last_n: asked.repeat_last_n.unwrap_or(defaults.repeat_last_n),
        typical_p: asked.typical_p.unwrap_or(defaults.typical_p),
        xtc_probability: asked.xtc_probability.unwrap_or(defaults.xtc_probability),
        xtc_threshold: asked.xtc_threshold.unwrap_or(defaults.xtc_threshold),
        dry_multiplier: asked.dry_multiplier.unwrap_or(defaults.dry_multiplier),
        dry_base: asked.dry_base.unwrap_or(defaults.dry_base),
        dry_allowed_length: asked.dry_allowed_length.unwrap_or(defaults.dry_allowed_length),
        dry_penalty_last_n: asked.dry_penalty_last_n.unwrap_or(defaults.dry_penalty_last_n),
        mirostat: asked.mirostat.unwrap_or(defaults.mirostat),
        mirostat_tau: asked.mirostat_tau.unwrap_or(defaults.mirostat_tau),
        mirostat_eta: asked.mirostat_eta.unwrap_or(defaults.mirostat_eta),
        dynatemp_range: asked.dynatemp_range.unwrap_or(defaults.dynatemp_range),
        dynatemp_exponent: asked.dynatemp_exponent.unwrap_or(defaults.dynatemp_exponent),
        logit_bias: asked.logit_bias.iter().map(|&(id, bias)| (TokenId(id), bias)).collect(),
        seed: asked.seed.unwrap_or(defaults.seed),
    }
}
