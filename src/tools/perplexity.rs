//! `hearth perplexity`: how well the model predicts a text, counted as llama-perplexity counts it: windows of `ctx` tokens
//! that do not overlap, the second half of each scored, the window's first token replaced by BOS where the model wants one.
//! Next on the data's way: `tools::scorer`.

use std::path::PathBuf;

use serde::Serialize;

use super::scorer::{Scorer, log_sum_exp};
use super::session::{DEFAULT_MAX_ROWS, ModelArgs, Wanted, with_model};
use super::{LineError, ToolError};

/// Perplexity over a text file.
#[derive(Debug, clap::Args)]
pub struct PerplexityArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Tokens a window
    #[arg(long, value_name = "N", default_value_t = 512)]
    ctx: usize,
    /// The text (UTF-8)
    file: PathBuf,
    /// Print one JSON object: {"perplexity", "tokens", "stderr"}
    #[arg(long)]
    json: bool,
    /// Compute in plain F32 instead of hearth's numeric model (slow)
    #[arg(long)]
    reference: bool,
}

#[derive(Debug, Serialize, PartialEq)]
struct Perplexity {
    perplexity: f64,
    /// Tokens scored.
    tokens: usize,
    /// Standard error of the perplexity.
    stderr: f64,
}

/// Runs the tool.
///
/// # Errors
/// The model or the text does not load, or the text has fewer than two windows.
pub fn run(args: &PerplexityArgs) -> Result<(), ToolError> {
    super::check_flag("ctx", args.ctx, 4, crate::model::hyper::MAX_CONTEXT)?;
    let text =
        std::fs::read_to_string(&args.file).map_err(|source| ToolError::Io { path: args.file.clone(), source })?;
    let wanted = Wanted {
        ctx: Some(args.ctx),
        sequences: 1,
        max_rows: DEFAULT_MAX_ROWS,
        max_outputs: DEFAULT_MAX_ROWS,
        prefix: 0,
        grammars: 0,
    };
    let result = with_model(&args.model, wanted, |session| {
        let vocab = session.vocab;
        let tokens = super::prompt_ids(vocab, Some(text), None)?;
        if tokens.len() < 2 * args.ctx {
            let message =
                format!("{} tokens, at least {} are needed: two windows of --ctx", tokens.len(), 2 * args.ctx);
            return Err(ToolError::Line(LineError(message)));
        }
        let bos = vocab.bos().filter(|_| vocab.add_bos());
        let mut scorer = Scorer::new(session, args.reference);
        let mut losses = Vec::new();
        for window in tokens.chunks_exact(args.ctx) {
            let mut input = window.to_vec();
            if let Some(bos) = bos {
                input[0] = bos;
            }
            scorer.run(&input, args.ctx / 2, |position, logits| {
                if let Some(next) = window.get(position + 1) {
                    losses.push(log_sum_exp(logits) - f64::from(logits[next.index()]));
                }
            })?;
        }
        Ok(summarize(&losses))
    })?;
    if args.json {
        super::print_json(&result)
    } else {
        super::print_line(&format!(
            "perplexity {:.4} +- {:.4} over {} tokens",
            result.perplexity, result.stderr, result.tokens
        ))
    }
}

fn summarize(losses: &[f64]) -> Perplexity {
    let n = losses.len() as f64;
    let mean = losses.iter().sum::<f64>() / n;
    let variance = losses.iter().map(|loss| (loss - mean) * (loss - mean)).sum::<f64>() / n;
    let perplexity = libm::exp(mean);
    Perplexity { perplexity, tokens: losses.len(), stderr: perplexity * (variance / (n - 1.0)).sqrt() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_constant_loss_is_its_exponential_with_no_error() {
        let result = summarize(&[2.0; 10]);
        assert!((result.perplexity - 2f64.exp()).abs() < 1e-12);
        assert_eq!((result.tokens, result.stderr), (10, 0.0));
    }

    #[test]
    fn the_error_is_that_of_the_mean_scaled_to_perplexity() {
        let result = summarize(&[1.0, 3.0]);
        assert!((result.stderr - 2f64.exp()).abs() < 1e-12);
    }
}
