//! What the I/O thread may hold, added up from the limits that keep it there: the memory plan takes this sum.
//! Every limit named here is checked where the bytes come in. Next on the data's way: `plan`.

use super::access::{METERS_BYTES, RULES_BYTES};
use super::tty;
use super::{MAX_CONNECTIONS, MAX_INPUT_BYTES, conn};
use crate::engine::queue::Rings;
use crate::engine::scheduler::WAITING_JOBS;
use crate::text::TokenId;
use crate::text::stop::{MAX_STOP_BYTES, MAX_STOP_STRINGS};
use crate::wire::http::{MAX_BODY_BYTES, MAX_BUFFERED_BYTES};
use crate::wire::line::MAX_HELD_BYTES;
use crate::wire::request::MAX_JSON_VALUES;

/// Bytes of text that a position of the context may stand for, on average over a prompt or an answer that is kept whole. English has
/// 4, code up to 8; only endless runs of blanks have more.
pub const TEXT_BYTES_PER_TOKEN: usize = 16;
/// Bytes of text that any context may hold.
pub const LEAST_TEXT_BYTES: usize = 4 * 1024;

/// Bytes that one value of a request takes while its JSON is read: the value, its key, and room for arrays to grow.
const JSON_VALUE_BYTES: usize = 112;
/// Copies of a request's body: as it came, its strings, for the template, inside the template.
const BODY_COPIES: usize = 6;
/// Bytes that a byte of text takes while it becomes tokens: its symbol, its merges and its id, each in a list that grows.
const ENCODE_BYTES: usize = 96;
/// A connection's own bytes: its states, method and path of a request, and what a name or an error adds to an answer.
const CONNECTION_BYTES: usize = 4 * 1024;
/// A job's own bytes beside its prompt, and those of the detokenizer.
const JOB_BYTES: usize = 2 * 1024;

/// Bytes that a prompt's text, or an answer that is kept whole, may have.
pub const fn max_text_bytes(context_tokens: usize) -> usize {
    let bytes = context_tokens.saturating_mul(TEXT_BYTES_PER_TOKEN);
    if bytes > LEAST_TEXT_BYTES { bytes } else { LEAST_TEXT_BYTES }
}

/// Contexts that the texts of one request for embeddings may fill, together.
pub const EMBED_CONTEXTS: usize = 4;

/// Tokens that the texts of one request for embeddings may have.
pub const fn max_embed_tokens(context_tokens: usize) -> usize {
    context_tokens.saturating_mul(EMBED_CONTEXTS)
}

/// Bytes that the answer to one request for embeddings may have.
pub const MAX_EMBED_ANSWER_BYTES: usize = 256 * 1024;
/// Bytes that all such answers may have that are in the making or wait for their reader.
pub const MAX_EMBED_BYTES: usize = 1024 * 1024;
/// The vectors, the answer that is made of them, and its copy on the way out.
const EMBED_COPIES: usize = 3;

/// Bytes of the sums of all embeddings under way: each connection has one at most.
pub const fn embed_bytes(n_embd: usize) -> usize {
    MAX_CONNECTIONS.saturating_mul(n_embd).saturating_mul(size_of::<f64>())
}

/// Jobs that the engine may have at once, running or waiting; one more is refused as busy.
pub const fn max_jobs(sequences: usize) -> usize {
    WAITING_JOBS.saturating_add(sequences)
}

/// Bytes that the request in hand takes on its way from a body to a job; there is one at a time.
pub const fn request_bytes(context_tokens: usize) -> usize {
    let json = MAX_JSON_VALUES * JSON_VALUE_BYTES + BODY_COPIES * MAX_BODY_BYTES;
    json.saturating_add(max_text_bytes(context_tokens).saturating_mul(ENCODE_BYTES))
}

/// Bytes of everything that clients can make the I/O thread hold at once.
pub const fn io_bytes(context_tokens: usize, sequences: usize) -> usize {
    let text = max_text_bytes(context_tokens);
    // A read may go over the limit before it is noticed.
    let input = MAX_INPUT_BYTES + MAX_BUFFERED_BYTES;
    // Lists that grow take up to twice what is in them.
    let output = 2 * if text > conn::MAX_OUTPUT_BYTES { text } else { conn::MAX_OUTPUT_BYTES };
    let embedded = max_embed_tokens(context_tokens).saturating_mul(size_of::<TokenId>());
    let connections = MAX_CONNECTIONS * output.saturating_add(embedded).saturating_add(CONNECTION_BYTES);
    let job = JOB_BYTES + 3 * MAX_STOP_STRINGS * MAX_STOP_BYTES + context_tokens.saturating_mul(size_of::<TokenId>());
    let jobs = max_jobs(sequences).saturating_mul(job);
    // The conversation is a prompt and an answer, and once more as the request that is made of it.
    let serial = MAX_HELD_BYTES + 2 * tty::MAX_OUTPUT_BYTES + 4 * text;
    request_bytes(context_tokens)
        .saturating_add(input + size_of::<Rings>() + METERS_BYTES + RULES_BYTES + EMBED_COPIES * MAX_EMBED_BYTES)
        .saturating_add(connections)
        .saturating_add(jobs)
        .saturating_add(serial)
}
