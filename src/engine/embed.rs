//! Embeddings: a prompt whose hidden states are wanted and no token. The rows that leave the last norm are pooled as they come, in the order
//! of their positions, in f64: so chunks, batches and threads change no bit. Next on the data's way: `serve`, which normalizes the sum.

/// Which rows count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pooling {
    /// All of them, their mean.
    #[default]
    Mean,
    /// The last token's, which has seen all others.
    Last,
    /// The first token's.
    Cls,
}

/// What an embedding job asks for and gets. Taken and given back by the I/O thread, with the job.
#[derive(Debug)]
pub struct Embed {
    pooling: Pooling,
    /// One a dimension (`n_embd`).
    sum: Vec<f64>,
}

impl Embed {
    /// Room for a vector of the model's width.
    pub fn new(pooling: Pooling, n_embd: usize) -> Self {
        Self { pooling, sum: vec![0.0; n_embd] }
    }

    /// Whether the row at a position counts, in a prompt of `tokens`.
    pub fn wants(&self, position: usize, tokens: usize) -> bool {
        match self.pooling {
            Pooling::Mean => true,
            Pooling::Last => position + 1 == tokens,
            Pooling::Cls => position == 0,
        }
    }

    /// Adds a row, `[n_embd]`.
    pub fn add(&mut self, row: &[f32]) {
        for (sum, value) in self.sum.iter_mut().zip(row) {
            *sum += f64::from(*value);
        }
    }

    /// The first `dimensions` of the pooled vector, of length 1. A mean and a sum point the same way. `None`: it has no direction, or is
    /// not finite.
    pub fn normalized(&self, dimensions: usize) -> Option<Vec<f32>> {
        let values = self.sum.get(..dimensions)?;
        // In order, so that it is the same everywhere; the root is exact by IEEE 754.
        let length = values.iter().fold(0.0, |sum, value| sum + value * value).sqrt();
        (length.is_finite() && length > 0.0).then(|| values.iter().map(|value| (value / length) as f32).collect())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn pooling_chooses_rows_and_the_vector_has_length_one() {
        let pooled = |pooling| {
            let mut embed = Embed::new(pooling, 2);
            for (position, row) in [[3.0, 0.0], [0.0, 9.0], [0.0, -1.0]].iter().enumerate() {
                if embed.wants(position, 3) {
                    embed.add(row);
                }
            }
            embed.normalized(2).unwrap()
        };
        assert_eq!(pooled(Pooling::Cls), [1.0, 0.0]);
        assert_eq!(pooled(Pooling::Last), [0.0, -1.0]);
        let mean = pooled(Pooling::Mean);
        assert!((mean[0] - 3.0 / 73f32.sqrt()).abs() < 1e-6 && (mean[1] - 8.0 / 73f32.sqrt()).abs() < 1e-6, "{mean:?}");
        let mut embed = Embed::new(Pooling::Mean, 2);
        assert_eq!(embed.normalized(2), None);
        embed.add(&[4.0, 3.0]);
        assert_eq!((embed.normalized(1), embed.normalized(3)), (Some(vec![1.0]), None));
    }
}
