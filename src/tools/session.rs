//! What every tool that computes does first: map the file, read the header, plan the memory, and read a packed model ahead or repack a
//! plain one.
//!
//! [`with_model`] owns the mapping, or the region that a plain file is repacked into, and lends the loaded model to a closure.
//! Next on the data's way: `engine`, or `model::forward` directly.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hearth_kernels::{KernelError, Kernels};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::engine::capacity::Capacity;
use crate::model::gguf::Gguf;
use crate::model::hyper::{Hyper, MAX_CONTEXT};
use crate::model::packed::{LAYOUT, LAYOUT_VERSION};
use crate::model::vocab::LoadError;
use crate::model::weights::WeightLayout;
use crate::model::{Model, ModelError, arch, vocab};
use crate::plan::{DoesNotFit, MemoryPlan};
use crate::sys::cpu::{self, NoMemoryFigures};
use crate::sys::map::{MapError, Mapping, Region};
use crate::sys::marks::{self, Stage};
use crate::sys::sandbox::Sandbox;
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
/// Positions of the prefix cache at most, beside those of the sequences.
pub const MAX_PREFIX_POSITIONS: usize = 1 << 24;

/// The flags that every tool with a model has.
#[derive(Clone, Debug, clap::Args)]
pub struct ModelArgs {
    /// The model file (GGUF or packed)
    #[arg(long, value_name = "FILE")]
    pub model: PathBuf,
    /// Threads that compute [default: the cores this process may use]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Threads that compute steps of more than a few rows (prompts, many sequences) [default: as --threads]
    #[arg(long, value_name = "N")]
    pub threads_batch: Option<usize>,
    /// Kernel set to use instead of the fastest: scalar, neon, dotprod, avx2, avx512vnni
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
    /// Positions of the prefix cache beside those of the sequences.
    pub prefix: usize,
    /// Answers that may follow a grammar at once.
    pub grammars: usize,
}

impl Wanted {
    /// The size of a daemon: each sequence gives at most one row of logits a step.
    pub fn to_serve(ctx: Option<usize>, sequences: usize, max_rows: usize) -> Self {
        Self { ctx, sequences, max_rows, max_outputs: sequences, prefix: 0, grammars: 0 }
    }
}

/// A loaded model and what is needed to run it.
pub struct Session<'m> {
    /// The model.
    pub model: &'m Model<'m>,
    /// Its vocabulary.
    pub vocab: &'m Vocab<'m>,
    /// The file's header where the file is run as it is; a plain one was repacked, and is not needed any more.
    pub mapped: Option<&'m Gguf<'m>>,
    /// What the file calls itself (`general.name`).
    pub name: Option<String>,
    /// The file's chat template.
    pub chat_template: Option<String>,
    /// The kernel set.
    pub kernels: Kernels,
    /// Worker threads; whoever starts operations pins itself with `pin_caller`.
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
    /// Packed in a layout that the kernels do not read.
    #[error(
        "{path}: its tiles are {found:?} version {version}, this program reads {:?} version {}; pack it again: \
         hearth pack --force {source_name} {path}",
        LAYOUT,
        LAYOUT_VERSION
    )]
    Layout {
        /// The file.
        path: PathBuf,
        /// The layout's name in the file.
        found: String,
        /// Its version.
        version: u32,
        /// The name of the file that was packed.
        source_name: String,
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
    /// Nobody says how much memory there is.
    #[error(transparent)]
    NoMemoryFigures(#[from] NoMemoryFigures),
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

impl SessionError {
    /// What is wrong with the model in `path`.
    pub fn model(path: &Path, source: ModelError) -> Self {
        match source {
            ModelError::Layout { found, version, source_name } => {
                Self::Layout { path: path.into(), found, version, source_name }
            }
            source => Self::Model { path: path.into(), source },
        }
    }

    /// What is wrong with the vocabulary in `path`.
    pub fn vocab(path: &Path, source: LoadError) -> Self {
        match source {
            LoadError::Gguf(source) => Self::model(path, source.into()),
            LoadError::Vocab(source) => Self::Vocab { path: path.into(), source },
        }
    }
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
    pub vocab: Vocab<'m>,
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
    let model_error = |source| SessionError::model(path, source);
    let gguf = Gguf::parse(bytes).map_err(|source| model_error(source.into()))?;
    let hyper = arch::hyper(&gguf).map_err(model_error)?;
    let layout = WeightLayout::new(&gguf, &hyper).map_err(model_error)?;
    let vocab = vocab::load(&gguf).map_err(|source| SessionError::vocab(path, source))?;
    if vocab.len() > hyper.n_vocab {
        return Err(model_error(ModelError::VocabSize { tokens: vocab.len(), rows: hyper.n_vocab }));
    }
    let threads = threads.unwrap_or_else(|| cpu::allowed_cpus().len().min(MAX_THREADS));
    let ctx = wanted.ctx.unwrap_or(DEFAULT_CONTEXT.min(hyper.n_ctx_train));
    in_range("threads", threads, 1, MAX_THREADS)?;
    in_range("ctx", ctx, 1, hyper.n_ctx_train.min(MAX_CONTEXT))?;
    in_range("sequences", wanted.sequences, 1, MAX_SEQUENCES)?;
    in_range("prefix-positions", wanted.prefix, 0, MAX_PREFIX_POSITIONS)?;
    let max_rows = wanted.max_rows.max(wanted.sequences);
    let Wanted { sequences, max_outputs, prefix, grammars, .. } = wanted;
    let capacity = Capacity { ctx, sequences, max_rows, max_outputs, threads, prefix, grammars };
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
    with_confined_model(args, wanted, None, use_model)
}

/// [`with_model`], whose worker threads give up what `sandbox` says before they compute.
///
/// # Errors
/// As [`with_model`]; the sandbox.
pub fn with_confined_model<R, E: From<SessionError>>(
    args: &ModelArgs,
    wanted: Wanted,
    sandbox: Option<&Sandbox>,
    use_model: impl FnOnce(Session<'_>) -> Result<R, E>,
) -> Result<R, E> {
    let os = |what| move |source| SessionError::Os { what, source };
    let kernels = match &args.kernels {
        Some(name) => Kernels::by_name(name).map_err(SessionError::from)?,
        None => Kernels::detect(),
    };
    let mapping = Mapping::open(&args.model).map_err(SessionError::from)?;
    let default_threads = cpu::allowed_cpus().len().min(MAX_THREADS);
    let decode_threads = args.threads.unwrap_or(default_threads);
    let prefill_threads = args.threads_batch.unwrap_or(decode_threads);
    in_range("threads", decode_threads, 1, MAX_THREADS)?;
    in_range("threads-batch", prefill_threads, 1, MAX_THREADS)?;
    let threads = decode_threads.max(prefill_threads);
    let Planned { gguf, hyper, layout, vocab, capacity, plan } =
        plan(&args.model, mapping.bytes(), Some(threads), wanted)?;
    let available = cpu::available_memory_bytes().map_err(SessionError::from)?;
    plan.check(&hyper, available).map_err(SessionError::from)?;
    marks::reach(Stage::Planned);
    let text = |key: &str| gguf.str(key).ok().flatten().map(str::to_owned);
    let (name, chat_template) = (text("general.name"), text("tokenizer.chat_template"));
    let bytes_per_token = layout.bytes_per_token();
    let workers = Workers::confined(capacity.threads, sandbox).map_err(os("worker threads"))?;
    let mut workers = workers.split(decode_threads, prefill_threads);
    let model_error = |source| SessionError::model(&args.model, source);
    if layout.is_packed() {
        read_ahead(&mapping, available.saturating_sub(plan.total_bytes));
        marks::reach(Stage::ModelRead);
        let model = &Model::map(&gguf, hyper, &layout).map_err(model_error)?;
        let vocab = &vocab;
        return use_model(Session {
            model,
            vocab,
            mapped: Some(&gguf),
            name,
            chat_template,
            kernels,
            workers,
            capacity,
            plan,
            bytes_per_token,
        });
    }
    mapping.will_read_sequentially();
    let mut region = Region::new(layout.region_bytes()).map_err(os("memory for the weights"))?;
    let bar = progress_bar(layout.region_bytes());
    let done = |bytes| bar.set_position(bytes as u64);
    let model = &Model::load(&gguf, hyper, &layout, &mut region, &mut workers, done).map_err(model_error)?;
    bar.finish_and_clear();
    marks::reach(Stage::ModelRead);
    // The file is not needed any longer: it may be replaced, and its card pulled.
    let vocab = &vocab.into_owned();
    drop(gguf);
    drop(mapping);
    use_model(Session {
        model,
        vocab,
        mapped: None,
        name,
        chat_template,
        kernels,
        workers,
        capacity,
        plan,
        bytes_per_token,
    })
}

/// Reads a packed file into the page cache, unless it does not fit there beside the plan.
fn read_ahead(mapping: &Mapping, room: u64) {
    let bytes = mapping.bytes().len();
    if bytes as u64 > room {
        log::warn!(
            "the model file has {bytes} bytes, {room} are free beside the plan: weights will be read again and again"
        );
        return;
    }
    let bar = progress_bar(bytes);
    let mut said = Instant::now();
    mapping.read_ahead(|done| {
        bar.set_position(done as u64);
        if said.elapsed() >= PROGRESS_INTERVAL {
            said = Instant::now();
            log::info!("reading the model: {done} of {bytes} bytes");
        }
    });
    bar.finish_and_clear();
}

/// Between two lines about a slow card.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

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
