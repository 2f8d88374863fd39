//! The pure plan of a step: which sequences put which rows into it. Decode rows first, so that no stream stalls behind a long
//! prompt; then prefill chunks, oldest sequence first, while rows are left.
//! Called by `engine` with every sequence's state; next on the data's way: `model::forward`.

/// What the scheduler knows of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pending {
    /// Tokens known but not yet in the cache: the rest of the prompt, or the one token just sampled.
    pub tokens: usize,
    /// Order of admission; lower is older.
    pub age: u64,
}

/// Rows for one sequence in the next step. The last of them gives logits when `last` is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Index of the sequence.
    pub sequence: usize,
    /// Its next rows, at least one.
    pub rows: usize,
    /// These are all of its pending tokens: sample after this step.
    pub last: bool,
}

/// Limits of a step.
#[derive(Clone, Copy, Debug)]
pub struct StepLimits {
    /// Rows in all.
    pub max_rows: usize,
    /// Rows of one sequence's prompt.
    pub prefill_chunk: usize,
}

/// Prefill rows in a step that also decodes: bounds the gap between two tokens of a running stream.
pub const PREFILL_ROWS_BESIDE_DECODE: usize = 16;

/// Fills `plan` (cleared first) for sequences in `pending`; `None` marks a free slot. A step's rows never exceed
/// `limits.max_rows`; every sequence with one pending token gets its row as long as rows are left.
pub fn plan(pending: &[Option<Pending>], limits: StepLimits, plan: &mut Vec<Share>) {
    plan.clear();
    let mut room = limits.max_rows;
    for (sequence, state) in pending.iter().enumerate() {
        if state.is_some_and(|state| state.tokens == 1) && room > 0 {
            plan.push(Share { sequence, rows: 1, last: true });
            room -= 1;
        }
    }
    if !plan.is_empty() {
        room = room.min(PREFILL_ROWS_BESIDE_DECODE);
    }
    let mut after = None;
    while room > 0 {
        // The oldest prompt not planned yet. Selection by rising age: no sort, no allocation.
        let next = pending
            .iter()
            .enumerate()
            .filter_map(|(sequence, state)| {
                state.filter(|state| state.tokens > 1).map(|state| (state.age, sequence, state.tokens))
            })
            .filter(|&(age, sequence, _)| after.is_none_or(|after| (age, sequence) > after))
            .min();
        let Some((age, sequence, tokens)) = next else { return };
        let rows = tokens.min(limits.prefill_chunk.max(1)).min(room);
        plan.push(Share { sequence, rows, last: rows == tokens });
        room -= rows;
        after = Some((age, sequence));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn planned(pending: &[Option<Pending>], max_rows: usize, prefill_chunk: usize) -> Vec<Share> {
        let mut shares = Vec::new();
        plan(pending, StepLimits { max_rows, prefill_chunk }, &mut shares);
        shares
    }

    #[test]
    fn decode_rows_come_before_the_oldest_prompt() {
        let state = |tokens, age| Some(Pending { tokens, age });
        let shares = planned(&[state(100, 5), None, state(1, 9), state(40, 2)], 64, 32);
        let share = |sequence, rows, last| Share { sequence, rows, last };
        assert_eq!(planned(&[state(100, 5), state(40, 2)], 64, 32), [share(1, 32, false), share(0, 32, false)]);
        assert_eq!(shares, [share(2, 1, true), share(3, 16, false)]);
    }

    proptest! {
        #[test]
        fn no_step_is_over_its_limits_and_none_is_empty_while_work_waits(
            states in prop::collection::vec(prop::option::of((1usize..300, 0u64..6)), 0..12),
            max_rows in 1usize..80,
            prefill_chunk in 1usize..80,
        ) {
            let pending: Vec<_> = states.iter().map(|state| state.map(|(tokens, age)| Pending { tokens, age })).collect();
            let shares = planned(&pending, max_rows, prefill_chunk);
            prop_assert!(shares.iter().map(|share| share.rows).sum::<usize>() <= max_rows);
            prop_assert_eq!(shares.is_empty(), pending.iter().all(Option::is_none));
            let mut seen = vec![false; pending.len()];
            for share in &shares {
                let tokens = pending[share.sequence].map_or(0, |state| state.tokens);
                prop_assert!(!std::mem::replace(&mut seen[share.sequence], true), "one share a sequence");
                prop_assert!(share.rows >= 1 && share.rows <= tokens);
                prop_assert_eq!(share.last, share.rows == tokens);
            }
            let decoding = pending.iter().flatten().filter(|state| state.tokens == 1).count();
            let served = shares.iter().filter(|share| pending[share.sequence].is_some_and(|state| state.tokens == 1)).count();
            prop_assert_eq!(served, decoding.min(max_rows));
        }
    }
}
