//! The maintenance menu: what `hearth.rescue` on the kernel's command line gives instead of a model. For a card whose model or state
//! keeps the board from answering. It ends by starting serve, or the machine's end. Next: `init::supervise`, or nothing.

use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Instant;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{MntFlags, umount2};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use signal_hook::consts::{SIGINT, SIGTERM};

use super::button::{self, Buttons};
use super::card::Card;
use super::child::how_it_ended;
use super::console::{Command, Console};
use super::job::{Job, Selftest};
use super::supervise::{Ending, TICK, show_boot_report, show_records};
use super::table::PARTITIONS;
use super::watchdog::Watchdog;
use crate::sys::poll::{Interest, Poller};
use crate::sys::record::{RECORDS, Records};
use crate::sys::signals::SignalLine;

/// Most records of the kernel's log that are shown: the newest.
pub const MAX_LOG_RECORDS: usize = 200;
/// Largest record of the kernel's log, in bytes; the kernel's own limit.
const MAX_KMSG_BYTES: usize = 8192;

const MENU: [&str; 8] = [
    "/status       card, partitions, failures on record",
    "/log          the kernel's log and hearth's own",
    "/selftest     check the board, without a model",
    "/boot-report  when what happened at the start",
    "/reset-state  make the state partition anew, empty",
    "/start        leave this menu and start the model",
    "/reboot       start the board again",
    "/poweroff     switch it off",
];

/// What the person at the console wants next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Serve, as without the menu.
    Start,
    /// The machine's end.
    End(Ending),
}

/// Runs the menu until somebody leaves it.
pub fn run(card: Option<&Card>, test: &Selftest, console: &mut Console, mut watchdog: Option<&mut Watchdog>) -> Asked {
    console.say("rescue: no model is started");
    show_menu(console);
    let waits = Poller::new().and_then(|poller| {
        if let Some(input) = console.input() {
            poller.add(input, 0, Interest::READ)?;
        }
        Ok(poller)
    });
    let signals = SignalLine::install(SIGTERM).and_then(|off| Ok((off, SignalLine::install(SIGINT)?)));
    let (Ok(mut poller), Ok((mut off, mut again))) = (waits, signals) else {
        console.say("the menu cannot listen: the model is started");
        return Asked::Start;
    };
    // Looked at in every round, a quarter of a second apart.
    let mut buttons = Buttons::find(Path::new(button::DEVICES), Path::new(button::CLASS));
    let (mut ready, mut job): (_, Option<Job>) = (Vec::new(), None);
    loop {
        // A wait that fails is a wait that is over; the clock goes on.
        if poller.wait(Some(TICK), &mut ready).is_err() {
            std::thread::sleep(TICK);
        }
        if let Some(watchdog) = &mut watchdog {
            watchdog.feed(Instant::now());
        }
        if off.take() || buttons.pressed() {
            return Asked::End(Ending::PowerOff);
        }
        if again.take() {
            return Asked::End(Ending::Reboot);
        }
        if ready.iter().any(|event| event.hung_up) {
            console.hang_up();
        }
        if let Some(running) = &mut job {
            let now = Instant::now();
            running.round(console, now);
            match waitpid(running.pid(), Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) | Err(Errno::EINTR) => {}
                status => {
                    let how = status.map_or_else(|error| error.to_string(), how_it_ended);
                    if let Some(over) = job.take() {
                        over.ended(&how, &test.reports, console, now);
                    }
                }
            }
        }
        match console.command() {
            None => {}
            Some(Command::Selftest) if job.is_some() => console.show("it runs already"),
            Some(Command::Selftest) => match Job::start(test, None, true, Instant::now()) {
                Ok(started) => job = Some(started),
                Err(error) => console.show(&format!("the self-test is not started: {error}")),
            },
            Some(Command::BootReport) => show_boot_report(console),
            Some(Command::PowerOff) => return Asked::End(Ending::PowerOff),
            Some(Command::Reboot) => return Asked::End(Ending::Reboot),
            Some(Command::Start) => return Asked::Start,
            Some(Command::Status) => show_status(card, console),
            Some(Command::Log) => {
                for line in newest_log() {
                    console.show(&line);
                    // A slow terminal takes longer than the watchdog waits.
                    if let Some(watchdog) = &mut watchdog {
                        watchdog.feed(Instant::now());
                    }
                }
            }
            Some(Command::ResetState) => reset_state(card, console, watchdog.as_deref_mut()),
            Some(Command::Unknown) => show_menu(console),
        }
    }
}

fn show_menu(console: &mut Console) {
    MENU.iter().for_each(|line| console.show(line));
}

fn show_status(card: Option<&Card>, console: &mut Console) {
    console.show(&card.map_or("no card".to_owned(), |card| format!("card {}", card.name())));
    let mounted = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    for partition in &PARTITIONS {
        let is_there = mounted.lines().any(|line| line.split(' ').nth(1) == Some(partition.target));
        let state = if is_there { "mounted" } else { "missing" };
        console.show(&format!("{} {state} ({})", partition.target, partition.reason));
    }
    show_records(console, &Records::at(RECORDS));
}

/// The newest records of the kernel's log, each without its header.
fn newest_log() -> VecDeque<String> {
    let log = OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open("/dev/kmsg");
    let mut log = match log {
        Ok(log) => log,
        Err(error) => return VecDeque::from([format!("/dev/kmsg: {error}")]),
    };
    let mut newest = VecDeque::with_capacity(MAX_LOG_RECORDS);
    let mut bytes = vec![0; MAX_KMSG_BYTES];
    loop {
        match log.read(&mut bytes) {
            Ok(0) => break,
            Ok(count) => {
                if newest.len() == MAX_LOG_RECORDS {
                    newest.pop_front();
                }
                newest.extend(record_text(bytes.get(..count).unwrap_or_default()));
            }
            // The oldest were written over meanwhile: the next read goes on behind them.
            Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::Interrupted) => {}
            Err(_) => break,
        }
    }
    newest
}

/// `PRIORITY,NUMBER,MICROSECONDS,FLAGS;TEXT\n KEY=VALUE…` as `+SECONDS TEXT`.
fn record_text(record: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(record);
    let (header, text) = text.split_once(';')?;
    let microseconds: u64 = header.split(',').nth(2)?.parse().ok()?;
    let seconds = std::time::Duration::from_micros(microseconds).as_secs_f64();
    Some(format!("+{seconds:.3}s {}", text.lines().next().unwrap_or_default()))
}

fn reset_state(card: Option<&Card>, console: &mut Console, watchdog: Option<&mut Watchdog>) {
    let (Some(card), Some(partition)) = (card, PARTITIONS.iter().find(|partition| partition.is_ours)) else {
        return console.show("there is no card");
    };
    // One that was never mounted cannot be unmounted; one that is in use is not written to.
    if let Err(error @ nix::Error::EBUSY) = umount2(partition.target, MntFlags::empty()) {
        return console.show(&format!("{}: {error}", partition.target));
    }
    super::make_anew(card, partition, console, watchdog);
    console.show("done");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_the_kernels_log_lose_their_header_and_keep_their_time() {
        let record = b"6,339,5140900,-;NET: Registered protocol family 10\n SUBSYSTEM=net\n";
        assert_eq!(record_text(record), Some("+5.141s NET: Registered protocol family 10".into()));
        for noise in [&b""[..], b"6,339", b"6,339;text", b"6,339,x,-;text"] {
            assert_eq!(record_text(noise), None);
        }
    }

    #[test]
    fn the_menu_fits_a_terminal() {
        assert!(MENU.iter().all(|line| line.len() < 80 && line.starts_with('/')));
    }
}
