//! What the engine is given room for: decided at boot, never exceeded.
//!
//! Chosen by `tools::session`; next on the data's way: `plan` counts what it takes, `engine` takes it.

use crate::model::kv::blocks_for;

/// What decides the sizes, beside the model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capacity {
    /// Positions a sequence may have.
    pub ctx: usize,
    /// Sequences at once.
    pub sequences: usize,
    /// Rows a step may have: decode rows and prefill chunks together.
    pub max_rows: usize,
    /// Rows of logits a step may give.
    pub max_outputs: usize,
    /// Threads that compute.
    pub threads: usize,
    /// Positions of keys and values beside those of the sequences, for the prefix cache; pinned prompts fit in there.
    pub prefix: usize,
    /// Answers that may follow a grammar at once; the I/O thread keeps what they need.
    pub grammars: usize,
}

impl Capacity {
    /// KV blocks: those of every sequence at its longest, and the prefix cache's own.
    pub const fn kv_blocks(&self) -> usize {
        blocks_for(self.ctx).saturating_mul(self.sequences).saturating_add(blocks_for(self.prefix))
    }
}
