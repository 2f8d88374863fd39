//! `hearth serve`: plan, load, then the engine on this thread and the I/O loop on its own, until a signal.
//!
//! Also the daemon inside `hearth ask --model` and `hearth chat --model`: [`with_daemon`] runs it on a private socket for the
//! length of one client. Next on the data's way: [`super::run`], the I/O loop, and `engine::Engine::run`.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use simplelog::{ConfigBuilder, LevelFilter, WriteLogger};

use super::model_text::ModelText;
use super::pins;
use super::private::PrivateSocket;
use super::{Defaults, ServeError, ServeSetup, Supervisor};
use crate::engine::Engine;
use crate::engine::pace::DEFAULT_STEP_MS;
use crate::engine::queue::Rings;
use crate::engine::sampler::SamplingParams;
use crate::sys::map::{LockError, lock_all};
use crate::sys::{cpu, heartbeat};
use crate::text::chat::{ChatError, ChatTemplate, MAX_TEMPLATE_BYTES};
use crate::text::{TokenId, Vocab};
use crate::tools::session::{
    DEFAULT_MAX_ROWS, DEFAULT_SEQUENCES, ModelArgs, Session, SessionError, Wanted, with_model,
};

/// Stack of the I/O thread, in bytes: JSON of bounded depth and templates with bounded recursion run there.
pub const IO_STACK_BYTES: usize = 1 << 20;

/// Longest model name in answers, in characters; the rest of a longer `general.name` is left out.
pub const MAX_MODEL_ID_CHARS: usize = 128;

/// Shortest time that a step may be given, in milliseconds, and longest.
pub const MIN_STEP_MS: u64 = 1;
/// See [`MIN_STEP_MS`]: one minute.
pub const MAX_STEP_MS: u64 = 60_000;

/// Run the daemon: HTTP on a UNIX socket, and a serial line where --tty names one.
#[derive(Clone, Debug, clap::Args)]
pub struct ServeArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The UNIX socket [default: $HEARTH_SOCKET, $XDG_RUNTIME_DIR/hearth.sock or /run/hearth/hearth.sock]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// A serial line to answer on as well, 115200 8N1
    #[arg(long, value_name = "DEV")]
    tty: Option<PathBuf>,
    #[command(flatten)]
    capacity: CapacityArgs,
    /// Temperature of requests that name none
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f32,
    /// Tokens an answer may have where the request names no number [default: up to the end of the context]
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,
    /// Standard input is the line to `hearth` as PID 1, which looks after this process
    #[arg(long, hide = true)]
    supervised: bool,
    /// Where PID 1 records failures
    #[arg(long, hide = true, value_name = "FILE", requires = "supervised")]
    records: Option<PathBuf>,
}

/// How much at once, and what the chat looks like.
#[derive(Clone, Debug, clap::Args)]
pub struct CapacityArgs {
    /// Positions a sequence [default: 2048, or what the model was trained for]
    #[arg(long, value_name = "N")]
    ctx: Option<usize>,
    /// Sequences at once
    #[arg(long, value_name = "N", default_value_t = DEFAULT_SEQUENCES)]
    sequences: usize,
    /// How long a step may take while answers stream, in milliseconds: prompts are cut to fit
    #[arg(long, value_name = "MS", default_value_t = DEFAULT_STEP_MS)]
    step_ms: u64,
    /// Positions of keys and values kept for what prompts begin with, beside those of the sequences, which keep it while no
    /// conversation needs them [default: enough for every --pin]
    #[arg(long, value_name = "N")]
    prefix_positions: Option<usize>,
    /// A file with a system prompt whose keys and values are computed at start and kept; may be given several times
    #[arg(long, value_name = "FILE")]
    pin: Vec<PathBuf>,
    /// A chat template (Jinja) to use instead of the model's own
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// The date that chat templates print where a request names none; the clock is never read
    #[arg(long, value_name = "YYYY-MM-DD")]
    date: Option<String>,
    /// Keep the model and every buffer in memory (mlock); what does not fit RLIMIT_MEMLOCK is refused
    #[arg(long)]
    lock: bool,
    /// Make all of the plan resident before the daemon is ready. Not for a client's own daemon, which lives for one question.
    #[arg(skip = true)]
    touch: bool,
}

impl Default for CapacityArgs {
    /// What a command line without any of the flags gives.
    fn default() -> Self {
        Self {
            ctx: None,
            sequences: DEFAULT_SEQUENCES,
            step_ms: DEFAULT_STEP_MS,
            prefix_positions: None,
            pin: Vec::new(),
            chat_template: None,
            date: None,
            lock: false,
            touch: true,
        }
    }
}

/// Why the daemon did not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The model, its plan, or a flag.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The socket, the serial line or the I/O loop.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The chat template does not compile.
    #[error("chat template of {path}: {source}")]
    Template {
        /// The model file, or the template's own.
        path: PathBuf,
        /// Line and reason.
        source: ChatError,
    },
    /// A file cannot be read, or the kernel refused something.
    #[error("{what}: {source}")]
    Io {
        /// A path, or what was asked for.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// `--lock`.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A flag's value.
    #[error("{0}")]
    Usage(String),
}

impl DaemonError {
    /// 2 for what another command line would mend, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) | Self::Session(SessionError::Flag { .. } | SessionError::Kernels(_)) => 2,
            _ => 1,
        }
    }
}

/// Runs the daemon until SIGTERM or SIGINT.
///
/// # Errors
/// It cannot start, or its I/O loop failed.
pub fn run(args: &ServeArgs) -> Result<(), DaemonError> {
    log_to_stderr(LevelFilter::Info);
    if args.supervised {
        // Whatever happens to this process, nothing that it executes has more rights than it has itself.
        let what = "giving up new privileges".to_owned();
        nix::sys::prctl::set_no_new_privs().map_err(|e| DaemonError::Io { what, source: e.into() })?;
    }
    if !args.temperature.is_finite() || args.temperature < 0.0 {
        return Err(DaemonError::Usage(format!(
            "--temperature is {}, must be finite and at least 0",
            args.temperature
        )));
    }
    let socket = args.socket.clone().unwrap_or_else(crate::client::default_socket);
    let defaults = Defaults {
        sampling: SamplingParams { temperature: args.temperature, ..SamplingParams::default() },
        max_tokens: args.max_tokens,
        date: args.capacity.date.clone(),
    };
    let supervisor = args.supervised.then(heartbeat::Line::from_stdin).transpose();
    let what = "--supervised wants the supervisor's socket as standard input";
    let supervisor = supervisor.map_err(|source| DaemonError::Io { what: what.into(), source })?;
    let ready = Box::new(|socket: &Path| log::info!("ready: {}", socket.display()));
    let (tty, records) = (args.tty.as_deref(), args.records.as_deref());
    let outside = Outside { socket: Some(&socket), tty, stop: None, supervisor, records, ready };
    serve(&args.model, &args.capacity, defaults, outside)
}

/// Runs a daemon of its own for `model`, with one sequence, on a private socket, while `client` runs; then stops it.
///
/// # Errors
/// The daemon cannot start, or its I/O loop failed.
pub fn with_daemon<R: Send>(model: &Path, client: impl FnOnce(&Path) -> R + Send) -> Result<R, DaemonError> {
    let model = &ModelArgs { model: model.into(), threads: None, threads_batch: None, kernels: None };
    let capacity = &CapacityArgs { sequences: 1, touch: false, ..CapacityArgs::default() };
    log_to_stderr(LevelFilter::Warn);
    let io = |what: &str| {
        let what = what.to_owned();
        move |source| DaemonError::Io { what, source }
    };
    let (stop, stopped) = UnixStream::pair().map_err(io("a pair of sockets"))?;
    let (tell_ready, is_ready) = mpsc::channel::<PathBuf>();
    let result = std::thread::scope(|scope| {
        let client = scope.spawn(move || {
            // Gone without a word: the daemon did not start, and its error is the answer.
            let answer = is_ready.recv().ok().map(|socket| client(&socket));
            drop(stop);
            answer
        });
        let ready = Box::new(move |socket: &Path| {
            // The client may have gone already; then nobody waits for this.
            let _ = tell_ready.send(socket.to_owned());
        });
        let outside = Outside { socket: None, tty: None, stop: Some(stopped), supervisor: None, records: None, ready };
        let served = serve(model, capacity, Defaults::default(), outside);
        let answer = client.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        served.map(|()| answer)
    });
    result?.ok_or_else(|| DaemonError::Usage("the daemon stopped before it was ready".into()))
}

/// Where a daemon meets the rest of the world.
struct Outside<'a> {
    /// Where to listen; `None` is a place that nobody else sees.
    socket: Option<&'a Path>,
    tty: Option<&'a Path>,
    /// Ends the daemon as a signal would.
    stop: Option<UnixStream>,
    supervisor: Option<heartbeat::Line>,
    records: Option<&'a Path>,
    /// Told where the daemon listens, once it does.
    ready: Box<dyn FnOnce(&Path) + Send + 'a>,
}

fn serve(
    model: &ModelArgs,
    capacity: &CapacityArgs,
    defaults: Defaults,
    outside: Outside<'_>,
) -> Result<(), DaemonError> {
    let Outside { socket, tty, stop, supervisor, records, ready } = outside;
    if !(MIN_STEP_MS..=MAX_STEP_MS).contains(&capacity.step_ms) {
        let found = capacity.step_ms;
        return Err(DaemonError::Usage(format!("--step-ms is {found}, must be from {MIN_STEP_MS} to {MAX_STEP_MS}")));
    }
    let pins = pins::read(&capacity.pin)?;
    let prefix = capacity.prefix_positions.unwrap_or_else(|| pins::most_positions(&pins));
    let wanted = Wanted { prefix, ..Wanted::to_serve(capacity.ctx, capacity.sequences, DEFAULT_MAX_ROWS) };
    let cpus = cpu::allowed_cpus();
    with_model(model, wanted, |session| {
        let Session { model: loaded, vocab, name, chat_template, kernels, workers, capacity: sizes, plan, .. } =
            session;
        log::info!("{}", plan.line());
        log::info!("kernels {}, {} threads", kernels.name(), workers.threads());
        let template = template(&model.model, capacity, chat_template, vocab)?;
        let text = &ModelText { vocab, template: template.as_ref(), context_tokens: sizes.ctx };
        // Bounded: it goes into every answer.
        let name = name.as_deref().unwrap_or("model");
        let model_id = &name.chars().filter(|c| !c.is_control()).take(MAX_MODEL_ID_CHARS).collect::<String>();
        let plan_json = serde_json::to_value(&plan).unwrap_or_default();
        let breakers = dry_breakers(vocab);
        let mut rings = Box::new(Rings::new());
        let eventfd = |source: nix::Error| DaemonError::Io { what: "an eventfd".into(), source: source.into() };
        let (end, unbound) = rings.split().map_err(eventfd)?;
        let link = unbound.bind(std::thread::current());
        if capacity.lock && plan.packed {
            // What is locked is not given back under pressure, so the file counts as the plan does.
            let available = cpu::available_memory_bytes().map_err(SessionError::from)?;
            let room = available.saturating_sub(plan.mapped_bytes);
            plan.check(&loaded.hyper, room).map_err(SessionError::from)?;
        }
        let operations = workers.operations();
        let supervisor = supervisor.map(|line| Supervisor { line, operations });
        let engine = Engine::new(loaded, kernels, workers, sizes, sizes.max_rows, vocab.eog_ids().to_vec());
        let engine = engine.with_dry_breakers(&breakers);
        let mut engine = engine.sharing_prefixes().with_step_budget(Duration::from_millis(capacity.step_ms));
        if capacity.touch {
            engine.touch();
        }
        if capacity.lock {
            lock_all()?;
        }
        pins::compute(&pins, &mut engine, text, defaults.date.as_deref())?;
        std::thread::scope(|scope| {
            let io = std::thread::Builder::new().name("io".into()).stack_size(IO_STACK_BYTES);
            let io = io.spawn_scoped(scope, move || {
                // The engine's thread is pinned; what it spawns would be, too.
                cpu::allow(&cpus);
                let private = match socket {
                    Some(_) => None,
                    None => Some(PrivateSocket::create().map_err(|source| {
                        let what = format!("a folder in {}", std::env::temp_dir().display());
                        DaemonError::Io { what, source }
                    })?),
                };
                let socket =
                    socket.map_or_else(|| private.as_ref().map(PrivateSocket::path), |path| Some(path.to_owned()));
                let socket = &socket.unwrap_or_default();
                let ready = Box::new(|| match &private {
                    Some(private) => ready(&private.hide()),
                    None => ready(socket),
                });
                let setup = ServeSetup {
                    socket,
                    tty,
                    text,
                    model_id,
                    context_tokens: sizes.ctx,
                    sequences: sizes.sequences,
                    defaults,
                    signals: stop.is_none(),
                    stop,
                    supervisor,
                    records,
                    plan: plan_json,
                    ready,
                };
                Ok(super::run(setup, link)?)
            });
            let io = io.map_err(|source| DaemonError::Io { what: "the I/O thread".into(), source })?;
            engine.run(end);
            io.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })
}

/// Tokens over which no repetition reaches: those with one of llama.cpp's default breakers in them.
fn dry_breakers(vocab: &Vocab<'_>) -> Vec<TokenId> {
    let breaks = |token: &TokenId| vocab.token_bytes(*token, false).iter().any(|byte| b"\n:\"*".contains(byte));
    (0u32..).take(vocab.len()).map(TokenId).filter(breaks).collect()
}

/// The template named on the command line, else the model's own, compiled.
fn template(
    model: &Path,
    capacity: &CapacityArgs,
    own: Option<String>,
    vocab: &Vocab<'_>,
) -> Result<Option<ChatTemplate>, DaemonError> {
    let (path, source) = match &capacity.chat_template {
        Some(path) => {
            let io = |source| DaemonError::Io { what: path.display().to_string(), source };
            let bytes = std::fs::metadata(path).map_err(io)?.len();
            if bytes > MAX_TEMPLATE_BYTES as u64 {
                let path = path.display();
                return Err(DaemonError::Usage(format!(
                    "{path}: {bytes} bytes, a template may have {MAX_TEMPLATE_BYTES}"
                )));
            }
            (path.as_path(), Some(std::fs::read_to_string(path).map_err(io)?))
        }
        None => (model, own),
    };
    let Some(source) = source else {
        log::warn!(
            "{} has no chat template: only completions are served; --chat-template FILE gives one",
            model.display()
        );
        return Ok(None);
    };
    let text = |token: Option<TokenId>| {
        token.map(|token| String::from_utf8_lossy(vocab.text_of(token)).into_owned()).unwrap_or_default()
    };
    let compiled = ChatTemplate::compile(&source, &text(vocab.bos()), &text(vocab.eos()));
    compiled.map(Some).map_err(|source| DaemonError::Template { path: path.into(), source })
}

/// Sends the log to stderr, without times: an appliance has no clock to trust. A second call changes nothing.
fn log_to_stderr(level: LevelFilter) {
    let config = ConfigBuilder::new()
        .set_time_level(LevelFilter::Off)
        .set_thread_level(LevelFilter::Off)
        .set_target_level(LevelFilter::Off)
        .set_location_level(LevelFilter::Off)
        .build();
    // Already set where a test starts two daemons in one process.
    let _ = WriteLogger::init(level, config, io::stderr());
}
