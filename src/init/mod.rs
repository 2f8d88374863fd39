//! PID 1: what the kernel starts when hearth is the whole userspace. It mounts ([`table`]), loads [`modules`], arms the
//! [`watchdog`] first, finds the [`card`], and re-executes itself as `hearth serve` under [`supervise`]. It ends by switching the
//! machine off or starting it again, and in no other way. No shell, no configuration beyond the card. Next: `serve`.
//!
//! | phase | what | where it fails |
//! |---|---|---|
//! | `mount_kernel_file_systems` | /dev, /proc, /sys, /run | said on the console, and on |
//! | `load_modules` | drivers that the kernel has as files; the watchdog's first, armed at once | the same |
//! | `open_card` | FAT, model, state | what is on it is missing |
//! | `collect_crashes` | what the kernel kept of its own crash ([`pstore`]) goes to the failures on record | the same |
//! | [`rescue::run`] | where the kernel's command line says `hearth.rescue`: a menu and no model | |
//! | [`supervise::run`] | serve, and [`apps`] once it answers, until somebody switches off | restart of serve, then of the machine |
//! | `end` | unmount, power off or restart | the watchdog bites |

pub mod apps;
pub mod button;
pub mod card;
mod child;
pub mod console;
pub mod fault;
pub mod job;
pub mod judge;
pub mod launch;
pub mod modules;
pub mod pstore;
pub mod rescue;
pub mod state;
pub mod supervise;
pub mod table;
pub mod timeline;
pub mod watchdog;

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::reboot::{RebootMode, reboot, set_cad_enabled};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, sync};

use self::apps::{ASK_ID, AppSetup};
use self::card::{CARD_TIMEOUT, Card, PartitionError};
use self::console::Console;
use self::fault::Plan;
use self::job::Selftest;
use self::modules::{LIST, listed};

use self::supervise::{Ending, Serve};
use self::table::{BOOT, MODEL, MOUNTS, Mount, PARTITIONS, Partition, SEAL, SETTINGS, Setting};
use self::watchdog::Watchdog;
use crate::config::{Config, Serial};
use crate::sys::marks::Mark;
use crate::sys::record::{RECORDS, Records};
use crate::sys::report::{self, Reports};

/// The socket that apps on the board talk to.
pub const SOCKET: &str = "/run/hearth/hearth.sock";
/// Settings, on the FAT partition.
pub const CONFIG: &str = "hearth.toml";
/// Models inside the initramfs, for boards whose card the kernel cannot read.
pub const OWN_MODELS: &str = "/lib/hearth/models";
/// Where PID 1 writes down what apps do, for serve to tell.
pub const REPORT: &str = "/run/apps";
/// The empty folder over which every app's own view of the files is made.
pub const VIEW: &str = "/run/view";
/// User and group of `hearth serve`: nobody else's.
pub const SERVE_ID: u32 = 100;
/// Where PID 1 itself fails, the machine starts again after this time; somebody may read why until then.
pub const FAILURE_REST: Duration = Duration::from_secs(5);

/// Whether the kernel started this process as the machine's init: PID 1, under a name that only the image gives it. A container's
/// first process is PID 1 as well, but called `hearth`.
pub fn is_wanted() -> bool {
    let name = std::env::args_os().next().unwrap_or_default();
    std::process::id() == 1 && Path::new(&name).file_name().is_some_and(|name| name == "init")
}

/// PID 1's life.
pub fn run() -> ! {
    let started = Mark::now();
    let problems = mount_kernel_file_systems();
    let mut console = Console::open();
    problems.iter().for_each(|problem| console.say(problem));
    console.stamp_at(started, "PID 1");
    console.note("the kernel's file systems are mounted");
    let options = Options::parse(&fs::read_to_string("/proc/cmdline").unwrap_or_default());
    // Ctrl-Alt-Del comes as SIGINT, and ends in order.
    let _ = set_cad_enabled(false);
    set(&SETTINGS, &mut console);
    let mut watchdog = load_modules(&options, &mut console);
    set(&SEAL, &mut console);
    let card = open_card(&mut console, watchdog.as_mut());
    record_panics();
    collect_crashes(&mut console);
    let asked = match options.rescue {
        true => rescue::run(card.as_ref(), &selftest(&Config::default(), &console), &mut console, watchdog.as_mut()),
        false => rescue::Asked::Start,
    };
    let ending = match asked {
        rescue::Asked::End(ending) => ending,
        rescue::Asked::Start => serve(&options, &mut console, watchdog.as_mut()),
    };
    end(ending, &mut console)
}

/// Words of the kernel's command line that are meant for hearth.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Options {
    /// `hearth.watchdog=off`: leave the hardware watchdog alone (QEMU's Raspberry Pi machines restart when it is opened).
    watchdog: bool,
    /// `hearth.rescue`: no model is started; the maintenance menu is on the console.
    rescue: bool,
    /// `hearth.fault=…`: failures on purpose.
    fault: Option<Plan>,
}

impl Options {
    fn parse(cmdline: &str) -> Self {
        let has = |wanted| cmdline.split_whitespace().any(|word| word == wanted);
        let fault = cmdline.split_whitespace().find_map(|word| word.strip_prefix("hearth.fault="));
        Self { watchdog: !has("hearth.watchdog=off"), rescue: has("hearth.rescue"), fault: fault.and_then(Plan::parse) }
    }
}

/// Mounts [`MOUNTS`]; what went wrong, since there is no console yet.
fn mount_kernel_file_systems() -> Vec<String> {
    let mounted = |entry: &Mount| {
        let Mount { source, target, kind, flags, options, reason } = *entry;
        let failed = |why: String| format!("{target} is not mounted: {why} ({reason})");
        fs::create_dir_all(target).map_err(|e| failed(e.to_string()))?;
        mount(Some(source), target, Some(kind), flags, Some(options)).map_err(|e| failed(e.to_string()))
    };
    MOUNTS.iter().filter_map(|entry| mounted(entry).err()).collect()
}

fn set(settings: &[Setting], console: &mut Console) {
    for Setting { path, value, reason } in settings {
        if let Err(e) = fs::write(path, value) {
            console.log(&format!("{path} is not {value}: {e} ({reason})"));
        }
    }
}

/// Loads what the image lists. The watchdog stands first in the list and is armed as soon as there is one.
fn load_modules(options: &Options, console: &mut Console) -> Option<Watchdog> {
    let mut armed = if options.watchdog { arm(console) } else { None };
    let modules = listed(Path::new(LIST));
    for module in &modules {
        if let Err(error) = module.load() {
            console.say(&error.to_string());
        }
        if armed.is_none() && options.watchdog {
            armed = arm(console);
        }
    }
    match (&armed, options.watchdog) {
        (Some(_), _) => {}
        (None, true) => console.say("there is no hardware watchdog: a hung kernel stays hung"),
        (None, false) => console.say("the hardware watchdog is switched off on the kernel's command line"),
    }
    console.stamp(&format!("{} modules", modules.len()));
    armed
}

fn arm(console: &mut Console) -> Option<Watchdog> {
    match Watchdog::arm(Path::new(watchdog::DEVICE)) {
        Ok(None) => None,
        Ok(Some(armed)) => {
            let timeout = watchdog::timeout_s().map_or("an unknown time".to_owned(), |s| format!("{s} s"));
            console.stamp(&format!("watchdog armed, it bites after {timeout}"));
            Some(armed)
        }
        Err(error) => {
            console.say(&format!("{}: {error}", watchdog::DEVICE));
            None
        }
    }
}

fn open_card(console: &mut Console, mut watchdog: Option<&mut Watchdog>) -> Option<Card> {
    let card = Card::wait(CARD_TIMEOUT, || {
        if let Some(watchdog) = &mut watchdog {
            watchdog.feed(Instant::now());
        }
    });
    match &card {
        None => console.say(&format!("no card showed itself within {} s", CARD_TIMEOUT.as_secs())),
        Some(card) => {
            if let Err(error) = card.read_ahead() {
                console.log(&format!("reading ahead on {}: {error}", card.name()));
            }
            for partition in &PARTITIONS {
                match card.mount(partition) {
                    Ok(()) if partition.is_ours && state::is_full(Path::new(partition.target)) => console.say(&format!(
                        "partition {} is full, nothing more is kept: {}; /reset-state in the maintenance menu empties it",
                        partition.number, partition.reason
                    )),
                    Ok(()) => {}
                    Err(PartitionError::Mount { source, .. })
                        if partition.is_ours
                            && card
                                .partition(partition.number)
                                .is_some_and(|device| state::is_beyond_repair(source, &device)) =>
                    {
                        console.say(&format!("partition {} is beyond repair", partition.number));
                        make_anew(card, partition, console, watchdog.as_deref_mut());
                    }
                    Err(error) => console.say(&error.to_string()),
                }
            }
            console.stamp(&format!("card {}", card.name()));
        }
    }
    // Nothing is written to the file system in memory from here on; where the kernel does not do it, nothing depends on it.
    let _ = mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, None::<&str>);
    card
}

/// Replaces a file system that cannot be read by an empty one, and mounts that.
fn make_anew(card: &Card, partition: &Partition, console: &mut Console, mut watchdog: Option<&mut Watchdog>) {
    let Partition { number, target, reason, .. } = partition;
    console.say(&format!("partition {number} is made anew, empty ({reason})"));
    let Some(device) = card.partition(*number) else { return };
    let made = state::recreate(&device, Path::new(state::BLUEPRINT), || {
        if let Some(watchdog) = &mut watchdog {
            watchdog.feed(Instant::now());
        }
    });
    match made {
        Err(error) => console.say(&format!("partition {number} cannot be made anew: {error}; {target} is missing")),
        Ok(()) => {
            if let Err(error) = card.mount(partition) {
                console.say(&error.to_string());
            }
        }
    }
}

/// Moves what the kernel kept of its own crash onto the card. A kernel or a board without pstore keeps nothing.
fn collect_crashes(console: &mut Console) {
    let folder = Path::new(pstore::FOLDER);
    if !folder.exists() {
        return;
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let mounted = mount(Some("pstore"), folder, Some("pstore"), flags, None::<&str>).map_err(std::io::Error::from);
    match mounted.and_then(|()| pstore::collect(folder, &Records::at(RECORDS), console::since_boot())) {
        Ok(0) => {}
        Ok(crashes) => console.say(&format!("the kernel crashed before this start: {crashes} records in /status")),
        Err(error) => console.log(&format!("{}: {error}", folder.display())),
    }
}

/// Starts serve and looks after it.
fn serve(options: &Options, console: &mut Console, watchdog: Option<&mut Watchdog>) -> Ending {
    let (config, unknown) = Config::read(&Path::new(BOOT).join(CONFIG)).unwrap_or_else(|error| {
        console.say(&format!("{CONFIG} is left out: {error}"));
        Default::default()
    });
    unknown.iter().for_each(|key| console.say(&format!("{CONFIG}: {key}")));
    for folder in [Path::new(SOCKET).parent().unwrap_or(Path::new("/run")), Path::new(REPORT), Path::new(VIEW)] {
        if let Err(error) = fs::create_dir_all(folder) {
            console.say(&format!("{}: {error}", folder.display()));
        }
    }
    let program = std::env::current_exe().unwrap_or_else(|_| "/init".into());
    let serve = Serve {
        program,
        models: models(&config, console),
        arguments: arguments(&config, console.path()).into_iter().chain(own_sockets(&config)).collect(),
        // The line stays the one that was chosen.
        defaults: arguments(&Config { serial: config.serial.clone(), ..Config::default() }, console.path()),
        records: Records::at(RECORDS),
        user: let_serve_be_nobody(&config, console),
        fault: options.fault.clone(),
        selftest: selftest(&config, console),
        apps: config.apps.enabled.then(|| AppSetup {
            hearth: std::env::current_exe().unwrap_or_else(|_| "/init".into()),
            folder: Path::new(BOOT).join("apps"),
            socket: SOCKET.into(),
            view: Some(VIEW.into()),
            restart: config.apps.restart,
            report: REPORT.into(),
        }),
    };
    if let Some(model) = serve.models.first() {
        console.stamp(&format!("starting with {}", model.display()));
    }
    supervise::run(&serve, console, watchdog).unwrap_or_else(|error| {
        console.say(&format!("PID 1 cannot go on: {error}"));
        std::thread::sleep(FAILURE_REST);
        Ending::Reboot
    })
}

/// The self-test of this board as it is set.
fn selftest(config: &Config, console: &Console) -> Selftest {
    let values = [
        ("--tty", console.path().map(OsString::from)),
        ("--ctx", config.ctx.map(|n| n.to_string().into())),
        ("--sequences", config.sequences.map(|n| n.to_string().into())),
    ];
    Selftest {
        program: std::env::current_exe().unwrap_or_else(|_| "/init".into()),
        arguments: values.into_iter().flat_map(|(flag, value)| Some([flag.into(), value?])).flatten().collect(),
        user: Some(SERVE_ID),
        reports: Reports::at(report::FOLDER),
    }
}

/// Gives the user that serve runs as what it needs to have of its own: the socket's folder and its line. `None`: it stays root.
fn let_serve_be_nobody(config: &Config, console: &mut Console) -> Option<u32> {
    let tty = match &config.serial {
        Serial::Console => console.path().map(Path::to_owned),
        Serial::Device(path) => Some(path.clone()),
        Serial::Off => None,
    };
    // What serve makes in its folder belongs to the group that may ask; what PID 1 reports, apps do not read.
    let sockets = Path::new(SOCKET).parent().map(|folder| (folder.to_owned(), SERVE_ID, ASK_ID, Some(0o2750)));
    let report = (PathBuf::from(REPORT), 0, SERVE_ID, Some(0o750));
    let tty = tty.map(|tty| (tty, SERVE_ID, SERVE_ID, None));
    for (path, user, group, mode) in sockets.into_iter().chain([report]).chain(tty) {
        let owned = std::os::unix::fs::chown(&path, Some(user), Some(group));
        let set = owned
            .and_then(|()| mode.map_or(Ok(()), |mode| fs::set_permissions(&path, fs::Permissions::from_mode(mode))));
        // A line that is absent may come later; then it is not serve's, and the log says so.
        if let Err(error) = set {
            console.log(&format!("{} does not become user {user}'s and group {group}'s: {error}", path.display()));
        }
    }
    Some(SERVE_ID)
}

/// From now on a panic of this process leaves a record. The kernel starts the machine again after it.
fn record_panics() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        // The place alone: what a panic says may hold a value.
        let place = info.location().map_or("an unknown place".to_owned(), ToString::to_string);
        // There is nothing left to tell where the card does not take it.
        let _ = Records::at(RECORDS).add(console::since_boot(), &format!("PID 1 panicked at {place}"));
        usual(info);
    }));
}

/// The models to try: the one that is configured, then those on the card, then those of the image.
fn models(config: &Config, console: &mut Console) -> Vec<PathBuf> {
    let folders = [Path::new(BOOT).join("models"), PathBuf::from(MODEL), PathBuf::from(OWN_MODELS)];
    let mut models = card::models(&folders);
    if let Some(configured) = config.model.as_ref().map(|path| Path::new(BOOT).join(path)) {
        if configured.is_file() {
            models.retain(|path| *path != configured);
            models.insert(0, configured);
        } else {
            console.say(&format!("{CONFIG} names {}, which is not there", configured.display()));
        }
    }
    models
}

/// What serve is told beside its model.
fn arguments(config: &Config, console: Option<&Path>) -> Vec<OsString> {
    let mut arguments: Vec<OsString> =
        ["--socket", SOCKET, "--records", RECORDS, "--reports", report::FOLDER, "--apps", REPORT]
            .map(OsString::from)
            .to_vec();
    let tty = match &config.serial {
        Serial::Console => console,
        Serial::Device(path) => Some(path.as_path()),
        Serial::Off => None,
    };
    if let Some(path) = tty {
        arguments.extend(["--tty".into(), path.into()]);
    }
    let values = [
        ("--ctx", config.ctx.map(|n| n.to_string())),
        ("--sequences", config.sequences.map(|n| n.to_string())),
        ("--step-ms", config.step_ms.map(|n| n.to_string())),
        ("--prefix-positions", config.prefix_positions.map(|n| n.to_string())),
        ("--grammars", config.grammars.map(|n| n.to_string())),
        ("--max-tokens", config.max_tokens.map(|n| n.to_string())),
        ("--temperature", config.temperature.map(|t| t.to_string())),
    ];
    for (flag, value) in values {
        arguments.extend(value.into_iter().flat_map(|value| [flag.into(), value.into()]));
    }
    arguments
}

/// Where the file sets sockets, serve reads them from there itself.
fn own_sockets(config: &Config) -> Vec<OsString> {
    match config.sockets.is_empty() {
        true => Vec::new(),
        false => vec!["--config".into(), Path::new(BOOT).join(CONFIG).into()],
    }
}

/// Ends everything, writes out what is not written, and leaves.
fn end(ending: Ending, console: &mut Console) -> ! {
    // Everything but this process; nothing may hold a file on the card.
    let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
    sync();
    for partition in PARTITIONS.iter().rev() {
        // One that was never mounted cannot be unmounted.
        let _ = umount2(partition.target, MntFlags::MNT_DETACH);
    }
    sync();
    let (mode, what) = match ending {
        Ending::PowerOff => (RebootMode::RB_POWER_OFF, "off"),
        Ending::Reboot => (RebootMode::RB_AUTOBOOT, "restart"),
    };
    console.stamp(what);
    console.drain();
    match reboot(mode) {
        Ok(never) => match never {},
        Err(error) => {
            console.say(&format!("the kernel refuses: {error}; the power can be cut now"));
            // The watchdog, no longer fed, restarts the board; without one a person does.
            loop {
                std::thread::sleep(FAILURE_REST);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_become_arguments_of_serve() {
        let words = |config: &Config| {
            let words = arguments(config, Some(Path::new("/dev/ttyAMA0")));
            words.into_iter().map(|word| word.into_string().unwrap_or_default()).collect::<Vec<_>>().join(" ")
        };
        let place =
            "--socket /run/hearth/hearth.sock --records /state/failures --reports /run/reports --apps /run/apps";
        assert_eq!(words(&Config::default()), format!("{place} --tty /dev/ttyAMA0"));
        let config = Config {
            ctx: Some(64),
            sequences: Some(2),
            step_ms: Some(50),
            prefix_positions: Some(640),
            grammars: Some(1),
            max_tokens: Some(3),
            temperature: Some(0.5),
            serial: Serial::Off,
            ..Config::default()
        };
        let wanted =
            "--ctx 64 --sequences 2 --step-ms 50 --prefix-positions 640 --grammars 1 --max-tokens 3 --temperature 0.5";
        assert_eq!(words(&config), format!("{place} {wanted}"));
        assert!(own_sockets(&config).is_empty());
        let sockets = vec![crate::serve::access::SocketSetup::at("/run/hearth/apps.sock")];
        assert_eq!(own_sockets(&Config { sockets, ..Config::default() }), ["--config", "/boot/hearth.toml"]);
        let config = Config { serial: Serial::Device("/dev/ttyS1".into()), ..Config::default() };
        assert!(words(&config).ends_with("--tty /dev/ttyS1"));
    }

    #[test]
    fn this_test_is_not_the_machines_init() {
        assert!(!is_wanted());
    }

    #[test]
    fn the_watchdog_is_on_unless_the_kernels_command_line_says_off() {
        assert!(Options::parse("quiet panic=5\n").watchdog);
        assert!(!Options::parse("quiet hearth.watchdog=off panic=5\n").watchdog);
        assert!(Options::parse("xhearth.watchdog=off").watchdog);
        assert_eq!(Options::parse("a hearth.fault=stop b").fault, Plan::parse("stop"));
        assert_eq!(Options::parse("hearth.fault=").fault, None);
        assert!(Options::parse("a hearth.rescue b").rescue && !Options::parse("hearth.rescued").rescue);
    }
}
