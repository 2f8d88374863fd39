//! The plan's properties, and a simulated day at the queue: seeded arrivals and cancels, a clock that steps advance, and what each
//! peer gets of it, compared with tests/data/fairness.txt.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use super::*;
use crate::engine::pace::Pace;
use proptest::prelude::*;

fn peer(id: u64, class: Class) -> Peer {
    Peer { id, class }
}

fn planned(pending: &[Option<Pending>], limits: StepLimits) -> Vec<Share> {
    let mut shares = Vec::new();
    plan(pending, limits, &mut shares);
    shares
}

fn state(tokens: usize, age: u64, id: u64, spent: u64) -> Option<Pending> {
    Some(Pending { tokens, age, peer: peer(id, Class::Normal), spent })
}

#[test]
fn decode_rows_come_first_then_the_peer_with_least_and_of_one_peer_the_oldest() {
    let limits = StepLimits { max_rows: 64, prefill_chunk: 48, beside_decode: 20 };
    let share = |sequence, rows, last| Share { sequence, rows, last };
    let one_peer = [state(100, 5, 1, 0), None, state(1, 9, 1, 0), state(40, 2, 1, 0)];
    assert_eq!(planned(&one_peer, limits), [share(2, 1, true), share(3, 20, false)]);
    let without_streams = [state(100, 5, 1, 0), state(40, 2, 1, 0)];
    assert_eq!(planned(&without_streams, limits), [share(1, 40, true), share(0, 24, false)]);
    // The older one's peer has had more: the other catches up to it, then they take turns.
    let two_peers = [state(100, 1, 1, 64), state(100, 2, 2, 0)];
    assert_eq!(planned(&two_peers, limits), [share(1, 48, false), share(0, 16, false)]);
}

proptest! {
    #[test]
    fn no_step_is_over_its_limits_and_none_is_empty_while_work_waits(
        states in prop::collection::vec(prop::option::of((1usize..300, 0u64..6, 0u64..4, 0u64..200)), 0..12),
        max_rows in 1usize..80,
        prefill_chunk in 1usize..80,
        beside_decode in 1usize..80,
    ) {
        let pending: Vec<_> =
            states.iter().map(|s| s.and_then(|(tokens, age, id, spent)| state(tokens, age, id, spent))).collect();
        let shares = planned(&pending, StepLimits { max_rows, prefill_chunk, beside_decode });
        prop_assert!(shares.iter().map(|share| share.rows).sum::<usize>() <= max_rows);
        prop_assert_eq!(shares.is_empty(), pending.iter().all(Option::is_none));
        let mut seen = vec![false; pending.len()];
        let (mut decodes, mut prefills) = (0, 0);
        for share in &shares {
            let tokens = pending[share.sequence].map_or(0, |state| state.tokens);
            prop_assert!(!std::mem::replace(&mut seen[share.sequence], true), "one share a sequence");
            prop_assert!(share.rows >= 1 && share.rows <= tokens && (tokens == 1 || share.rows <= prefill_chunk));
            prop_assert_eq!(share.last, share.rows == tokens);
            if tokens == 1 { decodes += 1 } else { prefills += share.rows }
        }
        prop_assert_eq!(decodes, pending.iter().flatten().filter(|state| state.tokens == 1).count().min(max_rows));
        prop_assert!(decodes == 0 || prefills <= beside_decode);
    }
}

/// Peers that always have a long prompt waiting: what each is given of so many rows, in percent.
fn saturated(peers: &[Peer]) -> Vec<u64> {
    let limits = StepLimits { max_rows: 64, prefill_chunk: 64, beside_decode: 64 };
    let mut ledger = Ledger::with_capacity(peers.len());
    peers.iter().for_each(|&peer| ledger.enter(peer));
    let mut given = vec![0; peers.len()];
    for _ in 0..1000 {
        let pending: Vec<_> = (0u64..)
            .zip(peers)
            .map(|(age, &peer)| Some(Pending { tokens: 5000, age, peer, spent: ledger.spent(peer) }))
            .collect();
        for share in planned(&pending, limits) {
            ledger.charge(peers[share.sequence], share.rows);
            given[share.sequence] += share.rows as u64;
        }
    }
    let all: u64 = given.iter().sum();
    given.iter().map(|rows| (rows * 100 + all / 2) / all).collect()
}

#[test]
fn peers_get_the_same_however_many_prompts_they_have_and_classes_twice_the_one_below() {
    use Class::{Background, Interactive, Normal};
    assert_eq!(saturated(&[peer(1, Normal), peer(2, Normal)]), [50, 50]);
    // The first three are one peer's.
    let crowd = saturated(&[peer(1, Normal), peer(1, Normal), peer(1, Normal), peer(2, Normal)]);
    assert_eq!((crowd[..3].iter().sum::<u64>(), crowd[3]), (50, 50));
    assert_eq!(saturated(&[peer(1, Interactive), peer(2, Normal), peer(3, Background)]), [57, 29, 14]);
}

#[test]
fn who_has_been_away_neither_owes_nor_is_owed() {
    let (a, b) = (peer(1, Class::Normal), peer(2, Class::Normal));
    let mut ledger = Ledger::with_capacity(2);
    ledger.enter(a);
    ledger.charge(a, 1000);
    ledger.enter(b);
    assert_eq!((ledger.spent(a), ledger.spent(b)), (2000, 2000));
    ledger.leave(a);
    ledger.charge(b, 10);
    ledger.enter(a);
    assert_eq!((ledger.spent(a), ledger.spent(b)), (2020, 2020));
}

/// What steps cost in the simulation, in microseconds: a board that decodes 25 tokens a second alone.
const STEP_US: u64 = 36_000;
const DECODE_ROW_US: u64 = 4_000;
const PREFILL_ROW_US: u64 = 3_000;
const BUDGET_US: u64 = 100_000;
const SLOTS: usize = 6;

/// A job of the simulation.
#[derive(Clone, Copy)]
struct Ask {
    peer: Peer,
    arrived: u64,
    prompt: usize,
    answer: usize,
    cancelled_at: u64,
    age: u64,
    done: usize,
    tokens: usize,
    last_token: u64,
}

/// What one peer got.
#[derive(Default)]
struct Figures {
    asked: u64,
    turned_away: u64,
    answered: u64,
    cancelled: u64,
    prompt_rows: u64,
    first_token_us: Vec<u64>,
    worst_gap_us: u64,
}

struct Dice(u64);

impl Dice {
    /// A number below `end` (an LCG with Knuth's constants, its upper bits).
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

/// Who asks: name, peer, mean pause between two requests in ms, prompt tokens from and to, answer tokens, cancels in percent.
type Manner = (&'static str, Peer, u64, (u64, u64), u64, u64);

fn simulate(manners: &[Manner], seed: u64, minutes: u64) -> BTreeMap<&'static str, Figures> {
    let mut dice = Dice(seed);
    let mut arrivals = Vec::new();
    let end = minutes * 60_000_000;
    for &(_, peer, pause_ms, (shortest, longest), answer, cancels) in manners {
        let mut at = 0;
        loop {
            at += dice.below(2 * pause_ms * 1000) + 1;
            if at >= end {
                break;
            }
            let prompt = (shortest + dice.below(longest - shortest + 1)) as usize;
            let cancelled_at = if dice.below(100) < cancels { at + dice.below(8_000_000) } else { u64::MAX };
            let (answer, age) = (1 + dice.below(2 * answer) as usize, 0);
            arrivals.push(Ask {
                peer,
                arrived: at,
                prompt,
                answer,
                cancelled_at,
                age,
                done: 0,
                tokens: 0,
                last_token: 0,
            });
        }
    }
    arrivals.sort_by_key(|ask| (ask.arrived, ask.peer.id));
    let name = |peer: Peer| manners.iter().find(|manner| manner.1.id == peer.id).unwrap().0;
    let mut figures: BTreeMap<&'static str, Figures> = BTreeMap::new();
    let mut arrivals = arrivals.into_iter().peekable();
    let (mut now, mut admitted) = (0, 0);
    let (mut waiting, mut running): (Vec<Ask>, Vec<Option<Ask>>) = (vec![], vec![None; SLOTS]);
    let (mut ledger, mut pace) = (Ledger::with_capacity(SLOTS), Pace::new(Some(Duration::from_micros(BUDGET_US))));
    loop {
        while let Some(ask) = arrivals.next_if(|ask| ask.arrived <= now) {
            let figures = figures.entry(name(ask.peer)).or_default();
            figures.asked += 1;
            let own = waiting.iter().filter(|other| other.peer.id == ask.peer.id).count() + ledger.running(ask.peer.id);
            if may_wait(own, waiting.len()) { waiting.push(ask) } else { figures.turned_away += 1 }
        }
        waiting.retain(|ask| {
            let wanted = ask.cancelled_at > now;
            figures.get_mut(name(ask.peer)).unwrap().cancelled += u64::from(!wanted);
            wanted
        });
        for slot in &mut running {
            if let Some(ask) = slot
                && ask.cancelled_at <= now
            {
                figures.get_mut(name(ask.peer)).unwrap().cancelled += 1;
                ledger.leave(ask.peer);
                *slot = None;
            }
            if slot.is_none()
                && let Some(next) = next_to_begin(waiting.iter().map(|ask| ask.peer), |peer| ledger.running(peer))
            {
                let ask = waiting.remove(next);
                ledger.enter(ask.peer);
                admitted += 1;
                *slot = Some(Ask { age: admitted, ..ask });
            }
        }
        let pending: Vec<_> = running
            .iter()
            .map(|slot| {
                let ask = slot.as_ref()?;
                let tokens = (ask.prompt - ask.done).max(1);
                Some(Pending { tokens, age: ask.age, peer: ask.peer, spent: ledger.spent(ask.peer) })
            })
            .collect();
        let limits = StepLimits { max_rows: 128, prefill_chunk: 128, beside_decode: pace.prefill_rows(128) };
        let shares = planned(&pending, limits);
        if shares.is_empty() {
            let Some(next) = arrivals.peek() else { return figures };
            now = next.arrived;
            continue;
        }
        let decodes = shares
            .iter()
            .filter(|share| running[share.sequence].unwrap().done >= running[share.sequence].unwrap().prompt)
            .count();
        let rows: usize = shares.iter().map(|share| share.rows).sum();
        let took = STEP_US + DECODE_ROW_US * decodes as u64 + PREFILL_ROW_US * (rows - decodes) as u64;
        pace.record(decodes, rows - decodes, Duration::from_micros(took));
        now += took;
        for share in shares {
            let slot = &mut running[share.sequence];
            let ask = slot.as_mut().unwrap();
            let figures = figures.get_mut(name(ask.peer)).unwrap();
            if ask.done < ask.prompt {
                ask.done += share.rows;
                figures.prompt_rows += share.rows as u64;
                ledger.charge(ask.peer, share.rows);
            }
            if !share.last {
                continue;
            }
            match ask.tokens {
                0 => figures.first_token_us.push(now - ask.arrived),
                _ => figures.worst_gap_us = figures.worst_gap_us.max(now - ask.last_token),
            }
            (ask.tokens, ask.last_token) = (ask.tokens + 1, now);
            if ask.tokens == ask.answer {
                figures.answered += 1;
                ledger.leave(ask.peer);
                *slot = None;
            }
        }
    }
}

#[test]
fn a_simulated_hour_gives_each_peer_its_share() {
    let manners: &[Manner] = &[
        ("console", peer(u64::MAX, Class::Interactive), 30_000, (30, 120), 60, 5),
        ("chat app", peer(1000, Class::Normal), 12_000, (40, 400), 40, 20),
        ("summaries", peer(1001, Class::Normal), 20_000, (1000, 2000), 30, 10),
        ("flood", peer(1002, Class::Normal), 2_000, (200, 1500), 20, 10),
        ("indexer", peer(1003, Class::Background), 15_000, (500, 1500), 5, 0),
    ];
    let figures = simulate(manners, 7, 60);
    let mut table = format!(
        "{:<10} {:>6} {:>8} {:>8} {:>9} {:>11} {:>14} {:>11} {:>12}\n",
        "peer", "asked", "answered", "gave up", "refused", "prompt rows", "first token ms", "worst ms", "worst gap ms"
    );
    for &(name, ..) in manners {
        let f = &figures[name];
        let mut first = f.first_token_us.clone();
        first.sort_unstable();
        let (median, worst) = (first[first.len() / 2] / 1000, first[first.len() - 1] / 1000);
        let Figures { asked, answered, cancelled, turned_away, prompt_rows, worst_gap_us, .. } = f;
        assert_eq!(*asked, answered + cancelled + turned_away, "{name}: every request comes to an end");
        assert!(*worst_gap_us <= 2 * BUDGET_US, "{name}: {worst_gap_us} us between two tokens");
        writeln!(
            table,
            "{name:<10} {asked:>6} {answered:>8} {cancelled:>8} {turned_away:>9} {prompt_rows:>11} {median:>14} {worst:>11} {:>12}",
            worst_gap_us / 1000
        )
        .unwrap();
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/fairness.txt");
    assert_eq!(table, std::fs::read_to_string(path).unwrap_or_default(), "the table has changed; it is now:\n{table}");
}
