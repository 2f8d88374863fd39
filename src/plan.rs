//! The memory plan: every buffer's size from the model and the configuration, before anything is allocated.
//!
//! `hearth plan` prints it, `serve` takes exactly that and refuses what does not fit, saying what would.
//! Next on the data's way: `engine`, which takes the buffers.

use serde::Serialize;

use crate::engine::EngineBuffers;
use crate::engine::capacity::Capacity;
use crate::model::hyper::Hyper;
use crate::model::kv::{KvCache, blocks_for};
use crate::model::scratch::Scratch;
use crate::model::weights::WeightLayout;
use crate::serve::grammar::grammar_bytes;
use crate::serve::memory::{embed_bytes, io_bytes};
use crate::sys::workers::WORKER_STACK_BYTES;

/// One line of the plan.
#[derive(Clone, Debug, Serialize)]
pub struct Item {
    /// What it is for.
    pub name: &'static str,
    /// Its size.
    pub bytes: u64,
}

/// Every buffer that a process takes.
#[derive(Clone, Debug, Serialize)]
pub struct MemoryPlan {
    /// Anonymous memory, taken at boot.
    pub items: Vec<Item>,
    /// Sum of `items`.
    pub total_bytes: u64,
    /// The model file, mapped: page cache, given back under pressure. A packed one stays mapped, a plain one while it loads.
    pub mapped_bytes: u64,
    /// The file stays mapped: its tiles are used where they are.
    pub packed: bool,
    /// Positions a sequence.
    pub ctx: usize,
    /// Sequences at once.
    pub sequences: usize,
    /// Threads that compute.
    pub threads: usize,
    /// Positions of the prefix cache beside those of the sequences.
    pub prefix: usize,
}

/// A plan that the machine cannot hold.
#[derive(Debug, thiserror::Error)]
#[error("the plan takes {} MiB, this machine has {} MiB: {advice}", mib_up(*.planned_bytes), mib(*.available_bytes))]
pub struct DoesNotFit {
    /// Bytes of the plan.
    pub planned_bytes: u64,
    /// Bytes that may be taken.
    pub available_bytes: u64,
    /// What would fit.
    pub advice: String,
}

/// Program data, allocator, main thread's stack, buffers of the tools, in bytes: measured 1.6 MiB, rounded up.
const PROCESS_BYTES: usize = 4 << 20;
/// Names of the items that depend on the context most.
const KV_ITEM: &str = "kv cache (f16)";
const IO_ITEM: &str = "connections and serial line";
const GRAMMAR_ITEM: &str = "grammars";
/// Stacks of the I/O and engine threads, in bytes.
const THREAD_STACK_BYTES: usize = 3 << 20;
/// Shortest context worth offering, in positions.
const LEAST_CONTEXT: usize = 64;

impl MemoryPlan {
    /// Adds up a model and a capacity. `vocab_bytes`: tables of the tokenizer; `file_bytes`: the mapped model file.
    pub fn new(
        hyper: &Hyper,
        layout: &WeightLayout,
        vocab_bytes: usize,
        file_bytes: usize,
        capacity: Capacity,
    ) -> Self {
        let kv = KvCache::bytes(hyper, capacity.kv_blocks()).unwrap_or(usize::MAX);
        let norms = (2 * hyper.n_layer + 1) * hyper.n_embd * size_of::<f32>();
        let items = [
            ("weights (tiles)", layout.region_bytes()),
            ("weights (norms)", norms),
            (KV_ITEM, kv),
            (
                "activations",
                Scratch::bytes(hyper, capacity.ctx, capacity.max_rows, capacity.max_outputs, capacity.threads),
            ),
            ("sequences and sampling", EngineBuffers::bytes(hyper, capacity) + embed_bytes(hyper.n_embd)),
            ("vocabulary", vocab_bytes),
            (IO_ITEM, io_bytes(capacity.ctx, capacity.sequences)),
            (GRAMMAR_ITEM, grammar_bytes(hyper.n_vocab, capacity.grammars)),
            ("thread stacks", THREAD_STACK_BYTES + capacity.threads * WORKER_STACK_BYTES),
            ("process", PROCESS_BYTES),
        ];
        // A packed file's tiles stay where they are.
        let is_taken = |item: &(&str, usize)| {
            !(layout.is_packed() && item.0.ends_with("(tiles)") || item.0 == GRAMMAR_ITEM && item.1 == 0)
        };
        let taken = items.into_iter().filter(is_taken);
        let items: Vec<Item> = taken.map(|(name, bytes)| Item { name, bytes: bytes as u64 }).collect();
        let total_bytes = items.iter().fold(0u64, |sum, item| sum.saturating_add(item.bytes));
        let Capacity { ctx, sequences, threads, prefix, .. } = capacity;
        let packed = layout.is_packed();
        Self { items, total_bytes, mapped_bytes: file_bytes as u64, packed, ctx, sequences, threads, prefix }
    }

    /// Compares with what the machine can give.
    ///
    /// # Errors
    /// The plan is larger; says which context or how many sequences would fit.
    pub fn check(&self, hyper: &Hyper, available_bytes: u64) -> Result<(), DoesNotFit> {
        if self.total_bytes <= available_bytes {
            return Ok(());
        }
        let named = |name: &str| self.items.iter().find(|item| item.name == name).map_or(0, |item| item.bytes);
        // The items that are worth a smaller context or fewer sequences; the others shrink a little, too: the advice is safe.
        let fixed = self.total_bytes.saturating_sub(named(KV_ITEM)).saturating_sub(named(IO_ITEM));
        let with = |ctx: usize, sequences: usize| {
            let blocks = blocks_for(ctx).saturating_mul(sequences).saturating_add(blocks_for(self.prefix));
            let kv = KvCache::bytes(hyper, blocks).unwrap_or(usize::MAX);
            fixed.saturating_add(kv as u64).saturating_add(io_bytes(ctx, sequences) as u64)
        };
        let block = hearth_kernels::KV_BLOCK;
        let blocks = most(blocks_for(self.ctx), |blocks| with(blocks * block, self.sequences) <= available_bytes);
        let ctx = (blocks * block).min(self.ctx);
        let sequences = most(self.sequences, |sequences| with(self.ctx, sequences) <= available_bytes);
        let advice = match (ctx >= LEAST_CONTEXT, sequences >= 1 && sequences < self.sequences) {
            (true, true) => format!("--ctx {ctx} would fit, or --sequences {sequences}"),
            (true, false) => format!("--ctx {ctx} would fit"),
            (false, true) => format!("--sequences {sequences} would fit"),
            (false, false) => {
                let least = with(LEAST_CONTEXT, 1);
                format!(
                    "even --ctx {LEAST_CONTEXT} --sequences 1 takes about {} MiB; use a smaller model",
                    mib_up(least)
                )
            }
        };
        Err(DoesNotFit { planned_bytes: self.total_bytes, available_bytes, advice })
    }

    /// The plan as one line, for the log.
    pub fn line(&self) -> String {
        let parts: Vec<String> =
            self.items.iter().map(|item| format!("{} {:.1}", item.name, item.bytes as f64 / MIB)).collect();
        let total = self.total_bytes as f64 / MIB;
        format!("memory plan {total:.1} MiB (ctx {}, sequences {}): {}", self.ctx, self.sequences, parts.join(", "))
    }
}

/// The greatest number up to `limit` that fits, where every smaller one does too; 0 if none does.
fn most(limit: usize, fits: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (0, limit);
    while low < high {
        let middle = high - (high - low) / 2;
        if fits(middle) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    low
}

const MIB: f64 = 1_048_576.0;

fn mib(bytes: u64) -> u64 {
    bytes >> 20
}

fn mib_up(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::model::arch::tests::tiny_hyper;

    fn plan(ctx: usize, sequences: usize) -> MemoryPlan {
        let capacity =
            Capacity { ctx, sequences, max_rows: 8, max_outputs: sequences, threads: 1, ..Capacity::default() };
        MemoryPlan::new(&tiny_hyper(), &WeightLayout::default(), 1000, 2000, capacity)
    }

    #[test]
    fn what_the_advice_names_does_fit() {
        let hyper = tiny_hyper();
        let wanted = plan(4096, 4);
        let available = plan(2048, 4).total_bytes;
        assert!(wanted.check(&hyper, wanted.total_bytes).is_ok());
        let refused = wanted.check(&hyper, available).unwrap_err();
        let ctx: usize = refused.advice.split_whitespace().nth(1).unwrap().parse().unwrap();
        assert!((1900..=2048).contains(&ctx), "{refused}");
        // Tables shrink a little with the context, so the advice is on the safe side.
        assert!(plan(ctx, 4).check(&hyper, available).is_ok(), "{refused}");
        let available = plan(4096, 2).total_bytes;
        let refused = wanted.check(&hyper, available).unwrap_err();
        let sequences: usize = refused.advice.rsplit(' ').next().unwrap().parse().unwrap();
        assert!(plan(4096, sequences).check(&hyper, available).is_ok(), "{refused}");
    }

    #[test]
    fn a_machine_too_small_for_anything_is_told_so() {
        let refused = plan(4096, 1).check(&tiny_hyper(), 1 << 20).unwrap_err();
        assert!(refused.advice.contains("use a smaller model"), "{refused}");
        assert!(refused.to_string().contains("this machine has 1 MiB"), "{refused}");
    }
}
