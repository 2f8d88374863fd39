//! `hearth score`: how likely the model finds a text, and what it would say next, one JSON object a line.
//! Next on the data's way: `tools::scorer`.

use serde::{Deserialize, Serialize};

use super::scorer::{Scorer, log_sum_exp};
use super::session::{DEFAULT_MAX_ROWS, ModelArgs, Wanted, with_model};
use super::{LineError, ToolError, answer_lines};

/// Score texts; JSON lines in and out.
///
/// stdin:  {"text": "..."} or {"ids": [1, 2]}, one object a line
/// stdout: {"nll": [...], "top": [[id, logit], ...], "logsumexp": x} or {"error": {"line", "message"}}
///         nll: nats, one value for each token after the first; top and logsumexp: of the last position
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub struct ScoreArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Likeliest tokens of the last position to list
    #[arg(long, value_name = "N", default_value_t = 50)]
    top: usize,
    /// Positions at most
    #[arg(long, value_name = "N")]
    ctx: Option<usize>,
    /// Compute in plain F32 instead of hearth's numeric model (slow)
    #[arg(long)]
    reference: bool,
}

#[derive(Deserialize)]
struct Request {
    text: Option<String>,
    ids: Option<Vec<u32>>,
}

#[derive(Serialize)]
struct Answer {
    nll: Vec<f64>,
    top: Vec<(u32, f32)>,
    logsumexp: f64,
}

/// Runs the tool on stdin and stdout.
///
/// # Errors
/// The model does not load, a flag is out of range, or a line could not be answered.
pub fn run(args: &ScoreArgs) -> Result<(), ToolError> {
    let wanted = Wanted {
        ctx: args.ctx,
        sequences: 1,
        max_rows: DEFAULT_MAX_ROWS,
        max_outputs: DEFAULT_MAX_ROWS,
        prefix: 0,
        grammars: 0,
    };
    with_model(&args.model, wanted, |session| {
        let vocab = session.vocab;
        let mut scorer = Scorer::new(session, args.reference);
        answer_lines(|request: Request| {
            let tokens = super::prompt_ids(vocab, request.text, request.ids)?;
            if tokens.is_empty() {
                return Err(LineError("no tokens to score".into()));
            }
            let mut answer = Answer { nll: Vec::new(), top: Vec::new(), logsumexp: 0.0 };
            scorer.run(&tokens, 0, |position, logits| {
                let logsumexp = log_sum_exp(logits);
                match tokens.get(position + 1) {
                    Some(next) => answer.nll.push(logsumexp - f64::from(logits[next.index()])),
                    None => {
                        answer.logsumexp = logsumexp;
                        answer.top = top(logits, args.top);
                    }
                }
            })?;
            Ok(answer)
        })
    })
}

/// The `count` largest logits with their ids, largest first, of equals the lower id first.
fn top(logits: &[f32], count: usize) -> Vec<(u32, f32)> {
    let mut ranked: Vec<(u32, f32)> = (0u32..).zip(logits.iter().copied()).collect();
    ranked.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    ranked.truncate(count);
    ranked
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn top_ranks_by_logit_then_id() {
        assert_eq!(top(&[1.0, 3.0, 3.0, -1.0], 3), [(1, 3.0), (2, 3.0), (0, 1.0)]);
    }
}
