//! The pure plan of a step: which sequences put which rows into it. Decode rows first, so that no stream stalls behind a long
//! prompt; then rows of prompts while the step's budget lasts, shared out fairly among those who ask.
//!
//! Fair means: whoever was given the fewest rows so far is next, a row counting more for a lower [`Class`]; of one peer's
//! prompts the oldest. Nothing here reads a clock or keeps anything: the same state gives the same plan.
//! Called by `engine` with every sequence's state; next on the data's way: `model::forward`.

#[cfg(test)]
mod tests;

/// Who asks, as far as fairness is concerned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// Requests with the same number share one turn.
    pub id: u64,
    /// How urgent they are.
    pub class: Class,
}

/// A request's weight: with all classes waiting, each is given twice what the one below it gets. None ever starves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Class {
    /// Work that nobody waits for.
    Background,
    /// What an app asks for.
    #[default]
    Normal,
    /// A person at the serial console.
    Interactive,
}

/// What the scheduler knows of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pending {
    /// Tokens known but not yet in the cache: the rest of the prompt, or the one token just sampled.
    pub tokens: usize,
    /// Order of admission; lower is older.
    pub age: u64,
    /// Who asked.
    pub peer: Peer,
    /// What its peer has been given so far; see [`Ledger`].
    pub spent: u64,
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
    /// Rows of all prompts in a step that also decodes: bounds the gap between two tokens of a running stream.
    pub beside_decode: usize,
}

/// Rows that a peer is given at a time: what the kernels' widest tiles take.
pub const QUANTUM_ROWS: usize = 16;

/// Jobs that may wait for a sequence, on their way to the engine or with it.
pub const WAITING_JOBS: usize = 32;
/// Places in the line that are kept for peers with fewer jobs than [`FEW_JOBS`].
pub const RESERVED_PLACES: usize = 8;
/// See [`RESERVED_PLACES`].
pub const FEW_JOBS: usize = 2;

impl Class {
    /// What a row costs.
    const fn price(self) -> u64 {
        match self {
            Self::Background => 4,
            Self::Normal => 2,
            Self::Interactive => 1,
        }
    }
}

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
    let decodes = plan.len();
    if decodes > 0 {
        room = room.min(limits.beside_decode);
    }
    let chunk = limits.prefill_chunk.max(1);
    while room > 0 {
        // By selection: no sort, no allocation.
        let given = |sequence| plan[decodes..].iter().find(|share| share.sequence == sequence).map_or(0, |s| s.rows);
        let waiting = pending.iter().enumerate().filter_map(|(sequence, state)| {
            let state = state.filter(|state| state.tokens > 1)?;
            let left = state.tokens.min(chunk) - given(sequence);
            (left > 0).then_some((sequence, state, left))
        });
        let next = waiting.min_by_key(|&(sequence, state, _)| {
            let same_peer =
                |share: &&Share| pending[share.sequence].is_some_and(|other| other.peer.id == state.peer.id);
            let now: u64 = plan[decodes..].iter().filter(same_peer).map(|share| share.rows as u64).sum();
            (state.spent.saturating_add(now * state.peer.class.price()), state.age, sequence)
        });
        let Some((sequence, state, left)) = next else { return };
        let rows = QUANTUM_ROWS.min(left).min(room);
        room -= rows;
        match plan[decodes..].iter_mut().find(|share| share.sequence == sequence) {
            Some(share) => {
                share.rows += rows;
                share.last = share.rows == state.tokens;
            }
            None => plan.push(Share { sequence, rows, last: rows == state.tokens }),
        }
    }
}

/// Which of the waiting jobs begins when a sequence is free: that of the peer with the fewest running ones, a running one
/// counting more for a lower class; of equals the one that has waited longest, which comes first in `waiting`.
pub fn next_to_begin(waiting: impl Iterator<Item = Peer>, running: impl Fn(u64) -> usize) -> Option<usize> {
    let cost = |peer: Peer| (running(peer.id) as u64 + 1) * peer.class.price();
    waiting.enumerate().min_by_key(|&(place, peer)| (cost(peer), place)).map(|(place, _)| place)
}

/// Whether a peer that has so many jobs, running or waiting, may have one more wait beside so many of all peers: the last places
/// are for those who have few, so that nobody fills the line alone.
pub const fn may_wait(own: usize, waiting: usize) -> bool {
    waiting < WAITING_JOBS && (own < FEW_JOBS || waiting < WAITING_JOBS - RESERVED_PLACES)
}

/// What each peer with a sequence has been given, in rows times their price. Who comes begins with what the others have least:
/// having been away earns nothing and costs nothing.
#[derive(Debug, Default)]
pub struct Ledger {
    accounts: Vec<Account>,
}

#[derive(Clone, Copy, Debug)]
struct Account {
    peer: u64,
    sequences: usize,
    spent: u64,
}

impl Ledger {
    /// For so many sequences.
    pub fn with_capacity(sequences: usize) -> Self {
        Self { accounts: Vec::with_capacity(sequences) }
    }

    /// Bytes that [`Ledger::with_capacity`] takes.
    pub const fn bytes(sequences: usize) -> usize {
        sequences * size_of::<Account>()
    }

    /// A sequence of this peer begins.
    pub fn enter(&mut self, peer: Peer) {
        let least = self.accounts.iter().map(|account| account.spent).min().unwrap_or(0);
        match self.accounts.iter_mut().find(|account| account.peer == peer.id) {
            Some(account) => account.sequences += 1,
            None => self.accounts.push(Account { peer: peer.id, sequences: 1, spent: least }),
        }
    }

    /// A sequence of this peer has ended.
    pub fn leave(&mut self, peer: Peer) {
        let Some(at) = self.accounts.iter().position(|account| account.peer == peer.id) else { return };
        self.accounts[at].sequences -= 1;
        if self.accounts[at].sequences == 0 {
            self.accounts.swap_remove(at);
        }
    }

    /// This peer's prompts were given so many rows.
    pub fn charge(&mut self, peer: Peer, rows: usize) {
        if let Some(account) = self.accounts.iter_mut().find(|account| account.peer == peer.id) {
            account.spent = account.spent.saturating_add(rows as u64 * peer.class.price());
        }
    }

    /// What this peer has been given.
    pub fn spent(&self, peer: Peer) -> u64 {
        self.accounts.iter().find(|account| account.peer == peer.id).map_or(0, |account| account.spent)
    }

    /// Sequences of a peer.
    pub fn running(&self, peer: u64) -> usize {
        self.accounts.iter().find(|account| account.peer == peer).map_or(0, |account| account.sequences)
    }
}
