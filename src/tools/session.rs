//! What every tool that computes does first: map the file, read the header, plan the memory, repack the weights.
//!
//! [`with_model`] owns the mapping and the region in its own frame and lends the loaded model to a closure.
//! Next on the data's way: `engine`, or `model::forward` directly.

use std::path::{Path, PathBuf};

use hearth_kernels::{KernelError, Kernels};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::model::gguf::Gguf;
use crate::model::hyper::{Hyper, MAX_CONTEXT};
use crate::model::plan::{Capacity, DoesNotFit, MemoryPlan};
use crate::model::weights::WeightLayout;
use crate::model::{Model, ModelError, arch, vocab};
use crate::sys::cpu;
use crate::sys::map::{MapError, Mapping, Region};
use crate::sys::workers::{MAX_THREADS, Workers};
use crate::text::{Vocab, VocabError};

/// Positions a sequence where nobody says otherwise, or fewer where the model was trained for fewer.
pub const DEFAULT_CONTEXT: usize = 2048;
/// Rows a step may have where nobody says otherwise: enough for the kernels' widest tiles, few enough that decode rows of other
/// sequences do not wait long.
pub const DEFAULT_MAX_ROWS: usize = 128;
/// Sequences at once where nobody says otherwise.
pub const DEFAULT_SEQUENCES: usize = 4;
/// Sequences at once at most.
pub const MAX_SEQUENCES: usize = 256;

/// The flags that every tool with a model has.
#[derive(Clone, Debug, clap::Args)]
pub struct ModelArgs {
    /// The model file (GGUF)
    #[arg(long, value_name = "FILE")]
    pub model: PathBuf,
    /// Threads that compute [default: the cores this process may use]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Kernel set to use instead of the fastest: scalar, avx2, neon
    #[arg(long, value_name = "NAME")]
    pub kernels: Option<String>,
}

/// How large a session is to be.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// Positions a sequence; `None` is [`DEFAULT_CONTEXT`], or what the model was trained for if that is less.
    pub ctx: Option<usize>,
    /// Sequences at once.
    pub sequences: usize,
    /// Rows a step.
    pub max_rows: usize,
    /// Rows of logits a step.
    pub max_outputs: usize,
}

impl Wanted {
    /// The size of a daemon: each sequence gives at most one row of logits a step.
    pub fn to_serve(ctx: Option<usize>, sequences: usize, max_rows: usize) -> Self {
        Self { ctx, sequences, max_rows, max_outputs: sequences }
    }
}

/// A loaded model and what is needed to run it.
pub struct Session<'m> {
    /// The model.
    pub model: &'m Model<'m>,
    /// Its vocabulary.
    pub vocab: &'m Vocab,
    /// The file's header, for the chat template and names.
    pub gguf: &'m Gguf<'m>,
    /// The kernel set.
    pub kernels: Kernels,
    /// Worker threads, this thread pinned as the first.
    pub workers: Workers,
    /// The sizes that the plan was made for.
    pub capacity: Capacity,
    /// The plan.
    pub plan: MemoryPlan,
    /// Bytes of weights read for each generated token.
    pub bytes_per_token: usize,
}

/// Why no session came about.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The file cannot be mapped.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The file is not a model that hearth runs.
    #[error("{path}: {source}")]
    Model {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: ModelError,
    },
    /// Its vocabulary is not supported.
    #[error("{path}: {source}")]
    Vocab {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: VocabError,
    },
    /// A flag is out of range.
    #[error("--{flag} is {found}, must be {wanted}")]
    Flag {
        /// The flag's name.
        flag: &'static str,
        /// Its value.
        found: usize,
        /// What would be right.
        wanted: String,
    },
    /// The kernel set does not exist or not on this CPU.
    #[error(transparent)]
    Kernels(#[from] KernelError),
    /// The memory plan is larger than the machine.
    #[error(transparent)]
    DoesNotFit(#[from] DoesNotFit),
    /// The kernel refused memory or threads.
    #[error("the operating system refused {what}: {source}")]
    Os {
        /// What was asked for.
        what: &'static str,
        /// What it said.
        source: std::io::Error,
    },
}

/// A file's plan without loading its weights.
pub struct Planned<'m> {
    /// The file's header.
    pub gguf: Gguf<'m>,
    /// Hyperparameters.
    pub hyper: Hyper,
    /// Tensors and where they go.
    pub layout: WeightLayout,
    /// The vocabulary.
    pub vocab: Vocab,
    /// The sizes.
    pub capacity: Capacity,
    /// The plan.
    pub plan: MemoryPlan,
}

/// Reads a header and plans, allocating nothing large.
///
/// # Errors
/// The file is not a supported model, or a size is out of range.
pub fn plan<'m>(
    path: &Path,
    bytes: &'m [u8],
    threads: Option<usize>,
    wanted: Wanted,
) -> Result<Planned<'m>, SessionError> {
    let model_error = |source| SessionError::Model { path: path.into(), source };
    let gguf = Gguf::parse(bytes).map_err(|source| model_error(source.into()))?;
    let hyper = arch::hyper(&gguf).map_err(model_error)?;
    let layout = WeightLayout::new(&gguf, &hyper).map_err(model_error)?;
    let raw_vocab = vocab::raw_vocab(&gguf).map_err(|source| model_error(source.into()))?;
    let vocab = Vocab::new(&raw_vocab).map_err(|source| SessionError::Vocab { path: path.into(), source })?;
    if vocab.len() > hyper.n_vocab {
        return Err(model_error(ModelError::VocabSize { tokens: vocab.len(), rows: hyper.n_vocab }));
    }
    let threads = threads.unwrap_or_else(|| cpu::allowed_cpus().len().min(MAX_THREADS));
    let ctx = wanted.ctx.unwrap_or(DEFAULT_CONTEXT.min(hyper.n_ctx_train));
    in_range("threads", threads, 1, MAX_THREADS)?;
    in_range("ctx", ctx, 1, hyper.n_ctx_train.min(MAX_CONTEXT))?;
    in_range("sequences", wanted.sequences, 1, MAX_SEQUENCES)?;
    let max_rows = wanted.max_rows.max(wanted.sequences);
    let capacity = Capacity { ctx, sequences: wanted.sequences, max_rows, max_outputs: wanted.max_outputs, threads };
    let plan = MemoryPlan::new(&hyper, &layout, vocab.memory_bytes(), bytes.len(), capacity);
    Ok(Planned { gguf, hyper, layout, vocab, capacity, plan })
}

/// Loads a model and runs `use_model` with it on this thread.
///
/// # Errors
/// The file is not a supported model, a flag is out of range, or the plan does not fit the machine; else what `use_model` says.
pub fn with_model<R, E: From<SessionError>>(
    args: &ModelArgs,
    wanted: Wanted,
    use_model: impl FnOnce(Session<'_>) -> Result<R, E>,
) -> Result<R, E> {
    let os = |what| move |source| SessionError::Os { what, source };
    let kernels = match &args.kernels {
        Some(name) => Kernels::by_name(name).map_err(SessionError::from)?,
        None => Kernels::detect(),
    };
    let mapping = Mapping::open(&args.model).map_err(SessionError::from)?;
    let Planned { gguf, hyper, layout, vocab, capacity, plan } =
        plan(&args.model, mapping.bytes(), args.threads, wanted)?;
    if let Some(available) = cpu::available_memory_bytes() {
        plan.check(&hyper, available).map_err(SessionError::from)?;
    }
    mapping.will_read_sequentially();
    let mut workers = Workers::new(capacity.threads).map_err(os("worker threads"))?;
    let mut region = Region::new(layout.region_bytes()).map_err(os("memory for the weights"))?;
    let bar = progress_bar(layout.region_bytes());
    let model = if layout.is_packed() {
        Model::map(&gguf, hyper, &layout)
    } else {
        Model::load(&gguf, hyper, &layout, &mut region, &mut workers, |bytes| bar.set_position(bytes as u64))
    };
    let model = model.map_err(|source| SessionError::Model { path: args.model.clone(), source })?;
    bar.finish_and_clear();
    let bytes_per_token = layout.bytes_per_token();
    use_model(Session { model: &model, vocab: &vocab, gguf: &gguf, kernels, workers, capacity, plan, bytes_per_token })
}

fn in_range(flag: &'static str, found: usize, least: usize, most: usize) -> Result<(), SessionError> {
    if (least..=most).contains(&found) {
        return Ok(());
    }
    Err(SessionError::Flag { flag, found, wanted: format!("from {least} to {most}") })
}

/// A bar on a terminal's stderr; nothing where stderr is not a terminal.
fn progress_bar(bytes: usize) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(bytes as u64), ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template("loading {bar:40} {bytes}/{total_bytes} {eta}") {
        bar.set_style(style);
    }
    bar
}
