//! What loads of a model's matrices alone reach on this machine: the most that decode could. `hearth bench` sets its speed beside it,
//! `hearth selftest` prints it. Next on the data's way: `hearth_kernels`, which has the ways of reading.

use std::time::{Duration, Instant};

use hearth_kernels::{Kernels, ReadPlan};

use crate::model::Model;
use crate::sys::workers::Workers;

/// Bytes that one thread reads at a time when the roofline is measured: long enough for several streams.
const READ_PIECE_BYTES: usize = 512 * 1024;

/// How fast the threads that decode read the model's matrices, where they lie, when they do nothing else.
pub(super) struct Roofline<'m> {
    pieces: Vec<&'m [u8]>,
    bytes: usize,
    /// The fastest pass over all of them.
    best: Option<(Duration, ReadPlan)>,
}

impl<'m> Roofline<'m> {
    /// For `model`, or as many of its matrices as come to `most_bytes`.
    pub(super) fn new(model: &'m Model<'m>, most_bytes: usize) -> Self {
        let weights = &model.weights;
        let layers = weights.layers.iter().flat_map(|layer| {
            let [q, k, v] = &layer.qkv;
            [q, k, v, &layer.attn_output, &layer.gate, &layer.up, &layer.down]
        });
        let matrices = layers.chain([&weights.output]);
        let mut bytes = 0;
        let pieces = matrices.flat_map(|matrix| matrix.tiles().chunks(READ_PIECE_BYTES)).take_while(|piece| {
            let has_room = bytes < most_bytes;
            bytes += if has_room { piece.len() } else { 0 };
            has_room
        });
        let pieces: Vec<&[u8]> = pieces.collect();
        Self { pieces, bytes, best: None }
    }

    /// So many passes with every plan.
    pub(super) fn measure(&mut self, passes: usize, kernels: Kernels, workers: &mut Workers) {
        let (mut sums, mut scratch) = (vec![0u32; self.pieces.len()], vec![(); workers.threads()]);
        workers.begin_step(true);
        for plan in (0..passes).flat_map(|_| ReadPlan::all()) {
            let begun = Instant::now();
            let read = |(): &mut (), piece: usize, sum: &mut [u32]| sum[0] = kernels.read(plan, self.pieces[piece]);
            workers.chunks(&mut scratch, &mut sums, 1, |_, _| (), |()| (), read);
            let took = begun.elapsed();
            // The sums are needed, or the reads would not be.
            std::hint::black_box(&sums);
            if self.best.is_none_or(|(best, _)| took < best) {
                self.best = Some((took, plan));
            }
        }
    }

    /// 10^9 bytes a second, where anything was measured.
    pub(super) fn gb_s(&self) -> Option<f64> {
        self.best.map(|(time, _)| self.bytes as f64 / time.as_secs_f64() / 1e9)
    }

    /// The way of reading that reached it.
    pub(super) fn plan(&self) -> Option<ReadPlan> {
        self.best.map(|(_, plan)| plan)
    }
}
