//! `hearth plan`: every buffer that `hearth serve` would take for a model, before anything is taken.
//! Next on the data's way: `plan`.

use super::ToolError;
use super::session::{self, DEFAULT_MAX_ROWS, SessionError, Wanted};
use crate::serve::grammar::DEFAULT_GRAMMARS;
use crate::sys::cpu;
use crate::sys::map::Mapping;

/// Print the memory plan.
#[derive(Debug, clap::Args)]
pub struct PlanArgs {
    /// The model file (GGUF or packed)
    #[arg(long, value_name = "FILE")]
    model: std::path::PathBuf,
    /// Positions a sequence [default: 2048, or what the model was trained for]
    #[arg(long, value_name = "N")]
    ctx: Option<usize>,
    /// Sequences at once
    #[arg(long, value_name = "N", default_value_t = session::DEFAULT_SEQUENCES)]
    sequences: usize,
    /// Answers that may follow a JSON schema or a grammar at once
    #[arg(long, value_name = "N", default_value_t = DEFAULT_GRAMMARS)]
    grammars: usize,
    /// Threads that compute [default: the cores this process may use]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the tool.
///
/// # Errors
/// The file is not a supported model, a flag is out of range, or the plan does not fit this machine (after printing it).
pub fn run(args: &PlanArgs) -> Result<(), ToolError> {
    let mapping = Mapping::open(&args.model).map_err(SessionError::from)?;
    let wanted = Wanted { grammars: args.grammars, ..Wanted::to_serve(args.ctx, args.sequences, DEFAULT_MAX_ROWS) };
    let planned = session::plan(&args.model, mapping.bytes(), args.threads, wanted)?;
    let plan = &planned.plan;
    if args.json {
        super::print_json(plan)?;
    } else {
        for item in &plan.items {
            super::print_line(&format!(
                "{:<28} {:>14}  {:>9.2} MiB",
                item.name,
                item.bytes,
                item.bytes as f64 / 1_048_576.0
            ))?;
        }
        let total = plan.total_bytes as f64 / 1_048_576.0;
        super::print_line(&format!("{:<28} {:>14}  {total:>9.2} MiB", "total, anonymous", plan.total_bytes))?;
        let file = plan.mapped_bytes as f64 / 1_048_576.0;
        super::print_line(&format!("{:<28} {:>14}  {file:>9.2} MiB", "model file, mapped", plan.mapped_bytes))?;
        let (ctx, sequences, threads) = (plan.ctx, plan.sequences, plan.threads);
        super::print_line(&format!("for --ctx {ctx} --sequences {sequences} --threads {threads}"))?;
    }
    let available = cpu::available_memory_bytes().map_err(SessionError::from)?;
    Ok(plan.check(&planned.hyper, available).map_err(SessionError::from)?)
}
