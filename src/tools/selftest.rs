//! `hearth selftest`: what this machine is, whether it is as it should be, and whether it computes what every other one does. A report to
//! paste: the same lines in the same order everywhere, PASS, FAIL or "not here" each. On the appliance's console it is `/selftest`, which
//! PID 1 runs as a process of its own. Next: [`machine`] for what the kernel tells, [`card`], [`mod@answer`], [`report`].

pub mod answer;
pub mod card;
pub mod machine;
pub mod report;

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nix::sys::termios::{ControlFlags, LocalFlags, cfgetospeed, tcgetattr};

use self::answer::{ANSWER_TOKENS, Answer, POSITIONS, answer};
use self::machine::Machine;
use self::report::{Check, Report};
use super::ToolError;
use super::session::{self, DEFAULT_MAX_ROWS, DEFAULT_SEQUENCES, SessionError, Wanted};
use crate::model::packed;
use crate::serve::grammar::DEFAULT_GRAMMARS;
use crate::sys::map::Mapping;
use crate::sys::tty::BAUD;

/// The kernel on an appliance's card: `image/build` puts it there.
const KERNEL: &str = "/boot/vmlinuz";

/// Check this machine, and that the model answers here as everywhere
#[derive(Clone, Debug, clap::Args)]
pub struct SelftestArgs {
    /// The model whose answer is computed (GGUF or packed) [default: none, and its lines are "not here"]
    #[arg(long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// Positions a sequence, for the memory plan [default: as serve]
    #[arg(long, value_name = "N")]
    ctx: Option<usize>,
    /// Sequences at once, for the memory plan
    #[arg(long, value_name = "N", default_value_t = DEFAULT_SEQUENCES)]
    sequences: usize,
    /// The serial line to look at [default: the kernel's console]
    #[arg(long, value_name = "DEV")]
    tty: Option<PathBuf>,
    /// PID 1 asks: what it should have set up is a fault where it is not
    #[arg(long, hide = true)]
    appliance: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the tool.
///
/// # Errors
/// Something is not as it should be, or standard output does not take the report.
pub fn run(args: &SelftestArgs) -> Result<(), ToolError> {
    if args.appliance {
        // As serve: whatever happens to this process, nothing that it executes has more rights than it has itself.
        nix::sys::prctl::set_no_new_privs().map_err(std::io::Error::from)?;
    }
    let machine = Machine::at(Path::new("/"));
    let report = test(args, &machine, &mut std::io::stdout().lock())?;
    match report.failed() {
        0 => Ok(()),
        failed => Err(ToolError::Selftest { failed, checks: report.checks().len() }),
    }
}

fn test(args: &SelftestArgs, machine: &Machine, out: &mut impl Write) -> std::io::Result<Report> {
    let mut report = Report::new(args.json);
    let mut add = |check| report.add(check, out);
    add(machine.board())?;
    add(machine.kernel())?;
    add(machine.cpu())?;
    add(machine.kernels())?;
    add(machine.cores())?;
    add(machine.clock())?;
    add(machine.memory())?;
    add(machine.pages())?;
    add(machine.pressure())?;
    // A console that nobody said is hearth's is set as its user likes.
    let must_be_right = args.appliance || args.tty.is_some();
    add(uart(args.tty.clone().or_else(|| machine.console()).as_deref(), must_be_right, machine))?;
    add(machine.watchdog(args.appliance))?;
    add(machine.thermal())?;
    let answered = match &args.model {
        Some(model) => {
            add(what_it_is(model))?;
            add(plan(model, args, machine))?;
            // A model in the initramfs says nothing of the card; the kernel lies on every one.
            let kernel: &[&Path] = if args.appliance { &[Path::new(KERNEL)] } else { &[] };
            add(card::speed(&[&[model.as_path()], kernel].concat()))?;
            // The scalar set is slow: the other one's lines are out by then.
            let own = answer(model, None, positions(model), true);
            add(bandwidth(&own))?;
            add(speed(&own))?;
            let (check, hash) = golden(model, own);
            add(check)?;
            hash
        }
        None => {
            for name in ["model", "plan", "card", "bandwidth", "speed", "answer"] {
                add(Check::not_here(name, "no model is named"))?;
            }
            None
        }
    };
    // Last: after the work.
    add(machine.throttling())?;
    if let Some(hash) = answered {
        report.set_logits_hash(hash);
    }
    report.end(out)?;
    Ok(report)
}

/// The serial line's settings: 115200 8N1, raw, as serve leaves it.
fn uart(tty: Option<&Path>, must_be_right: bool, machine: &Machine) -> Check {
    let Some(tty) = tty else { return Check::not_here("uart", "the kernel uses no console") };
    let flags = OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
    let opened = std::fs::OpenOptions::new().read(true).custom_flags(flags.bits()).open(tty);
    let line = match opened.map_err(|e| e.to_string()).and_then(|file| tcgetattr(file).map_err(|e| e.to_string())) {
        Ok(line) => line,
        Err(why) => return Check::not_here("uart", format!("{}: {why}", tty.display())),
    };
    let driver = machine.tty_driver(tty).unwrap_or_else(|| "an unnamed driver".into());
    let is_8n1 = line.control_flags & ControlFlags::CSIZE == ControlFlags::CS8
        && !line.control_flags.intersects(ControlFlags::PARENB | ControlFlags::CSTOPB | ControlFlags::CRTSCTS);
    let is_raw = !line.local_flags.intersects(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG);
    let is_fast = cfgetospeed(&line) == nix::sys::termios::BaudRate::B115200;
    let word = |is: bool, yes: &'static str, no: &'static str| if is { yes } else { no };
    let found = format!(
        "{} ({driver}): {}, {}, {}",
        tty.display(),
        if is_fast { format!("{BAUD} baud") } else { format!("not {BAUD} baud ({:?})", cfgetospeed(&line)) },
        word(is_8n1, "8N1", "not 8N1"),
        word(is_raw, "raw", "not raw")
    );
    Check::that("uart", !must_be_right || (is_fast && is_8n1 && is_raw), found)
}

/// What the file says that it is.
fn what_it_is(model: &Path) -> Check {
    let described = || -> Result<String, SessionError> {
        let mapping = Mapping::open(model)?;
        let gguf = crate::model::gguf::Gguf::parse(mapping.bytes())
            .map_err(|source| SessionError::model(model, source.into()))?;
        let name = gguf.str("general.name").ok().flatten().unwrap_or("without a name");
        let packed = packed::read(&gguf).map_err(|source| SessionError::model(model, source))?;
        let how = match packed {
            // A few digits tell two files apart; the manifest has all of them.
            Some(packed) => format!("packed from {} {:.16}…", packed.source_name, packed.source_hash),
            None => "not packed".to_owned(),
        };
        Ok(format!("{name}, {} bytes, {how}", mapping.bytes().len()))
    };
    match described() {
        Ok(found) => Check::pass("model", found),
        Err(error) => Check::that("model", false, error.to_string()),
    }
}

/// What serve takes for it, beside all the memory that there is: some of what is free is taken by the serve that runs.
fn plan(model: &Path, args: &SelftestArgs, machine: &Machine) -> Check {
    let planned = || -> Result<String, SessionError> {
        let mapping = Mapping::open(model)?;
        let wanted =
            Wanted { grammars: DEFAULT_GRAMMARS, ..Wanted::to_serve(args.ctx, args.sequences, DEFAULT_MAX_ROWS) };
        let planned = session::plan(model, mapping.bytes(), None, wanted)?;
        let total = machine.memory_bytes().unwrap_or(u64::MAX);
        planned.plan.check(&planned.hyper, total)?;
        let plan = &planned.plan;
        Ok(format!("{} MiB for --ctx {} --sequences {}", plan.total_bytes >> 20, plan.ctx, plan.sequences))
    };
    match planned() {
        Ok(found) => Check::pass("plan", found),
        Err(error) => Check::that("plan", false, error.to_string()),
    }
}

/// Positions for the answer: a model may have been trained for fewer than are wanted.
fn positions(model: &Path) -> usize {
    let trained = || -> Option<usize> {
        let mapping = Mapping::open(model).ok()?;
        let planned = session::plan(model, mapping.bytes(), None, Wanted::to_serve(None, 1, 1)).ok()?;
        Some(planned.hyper.n_ctx_train)
    };
    trained().map_or(POSITIONS, |trained| trained.min(POSITIONS))
}

fn bandwidth(own: &Result<Answer, ToolError>) -> Check {
    match own.as_ref().ok().and_then(|own| Some((own.read.as_ref()?, own.threads))) {
        Some(((gb_s, plan), threads)) => {
            Check::pass("bandwidth", format!("{gb_s:.1} GB/s read by {threads} threads ({plan})"))
        }
        None => Check::not_here("bandwidth", "the model gave no answer"),
    }
}

fn speed(own: &Result<Answer, ToolError>) -> Check {
    match own {
        Ok(own) => Check::pass("speed", format!("{:.1} tokens a second, {} tokens", own.tok_s, ANSWER_TOKENS)),
        Err(_) => Check::not_here("speed", "the model gave no answer"),
    }
}

/// The answer with this machine's kernels, computed again by the scalar set; its hash if it is right.
fn golden(model: &Path, own: Result<Answer, ToolError>) -> (Check, Option<String>) {
    let own = match own {
        Ok(own) => own,
        // Too little memory is left beside the serve that runs; alone, the same model may do.
        Err(ToolError::Session(error @ SessionError::DoesNotFit(_))) => {
            return (Check::not_here("answer", error.to_string()), None);
        }
        Err(error) => return (Check::that("answer", false, error.to_string()), None),
    };
    let Answer { logits_hash: hash, kernels, text, .. } = own;
    match answer(model, Some("scalar"), positions(model), false) {
        Ok(scalar) if scalar.logits_hash == hash => {
            (Check::pass("answer", format!("{hash}, by {kernels} and by scalar: {text:?}")), Some(hash))
        }
        Ok(scalar) => {
            let found = format!("{hash} by {kernels}, {} by scalar: this must never happen", scalar.logits_hash);
            (Check::that("answer", false, found), None)
        }
        Err(error) => (Check::that("answer", false, format!("by scalar: {error}")), None),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::report::Verdict;
    use super::*;

    fn args(model: Option<PathBuf>) -> SelftestArgs {
        SelftestArgs { model, ctx: None, sequences: 1, tty: None, appliance: false, json: false }
    }

    /// The lines of a report, in their order.
    const LINES: [&str; 19] = [
        "board",
        "kernel",
        "cpu",
        "kernels",
        "cores",
        "clock",
        "memory",
        "pages",
        "pressure",
        "uart",
        "watchdog",
        "thermal",
        "model",
        "plan",
        "card",
        "bandwidth",
        "speed",
        "answer",
        "throttling",
    ];

    #[test]
    fn lines_come_in_the_same_order_with_a_model_and_without_one() {
        let folder = tempfile::tempdir().unwrap();
        let no_model = folder.path().join("model.gguf");
        std::fs::write(&no_model, b"GGUF and nothing behind it").unwrap();
        for (model, answer) in [(None, Verdict::NotHere), (Some(no_model), Verdict::Fail)] {
            let report = test(&args(model), &Machine::at(folder.path()), &mut Vec::new()).unwrap();
            let names: Vec<&str> = report.checks().iter().map(|check| check.name).collect();
            assert_eq!(names, LINES);
            let found = report.checks().iter().find(|check| check.name == "answer").unwrap();
            assert_eq!(found.verdict, answer);
        }
    }

    #[test]
    fn a_serial_line_is_judged_by_its_settings() {
        let machine = Machine::at(Path::new("/nowhere"));
        assert_eq!(uart(None, true, &machine).verdict, Verdict::NotHere);
        assert_eq!(uart(Some(Path::new("/dev/null")), true, &machine).verdict, Verdict::NotHere);
        let pty = nix::pty::openpty(None, None).unwrap();
        let path = nix::unistd::ttyname(&pty.slave).unwrap();
        let cooked = uart(Some(&path), true, &machine);
        assert!(cooked.verdict == Verdict::Fail && cooked.found.ends_with("not raw"), "{cooked:?}");
        assert_eq!(uart(Some(&path), false, &machine).verdict, Verdict::Pass);
        let _raw = crate::sys::tty::open_raw(&path).unwrap();
        let raw = uart(Some(&path), true, &machine);
        assert!(raw.verdict == Verdict::Pass && raw.found.ends_with("115200 baud, 8N1, raw"), "{raw:?}");
    }
}
