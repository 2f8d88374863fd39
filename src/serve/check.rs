//! The packed model is compared with its hashes while the daemon has nothing else to do: on a thread of its own, at idle priority, at a
//! bounded rate, and not while an answer runs. It reads the file and not its mapping, so that a place that cannot be read is told
//! and costs no process. Next on the data's way: `serve::server` tells what is damaged.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::model::packed::Part;
use crate::wire::ModelCheck;

/// Fastest reading, in bytes a second.
pub const BYTES_PER_S: u64 = 32 << 20;
/// Bytes read at once: so much may still be read after a request has come.
pub const PIECE_BYTES: usize = 128 << 10;
/// Stack of the thread, in bytes.
pub const STACK_BYTES: usize = 128 << 10;
/// How often it looks whether the answer has ended.
pub const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Most damaged parts that are told by name.
pub const MAX_DAMAGED: usize = 16;

/// How far the comparison is; the I/O thread and the one that compares share it.
#[derive(Debug)]
pub struct Check {
    bytes: u64,
    done: AtomicU64,
    /// Answers run: nothing is read.
    paused: AtomicBool,
    stop: AtomicBool,
    over: AtomicBool,
    damaged: Mutex<Vec<String>>,
}

impl Check {
    /// One of `parts` that has not begun; it waits until [`Check::pause`] lets it go on.
    pub fn new(parts: &[Part]) -> Self {
        Self {
            bytes: parts.iter().map(|part| part.bytes).sum(),
            done: AtomicU64::new(0),
            paused: AtomicBool::new(true),
            stop: AtomicBool::new(false),
            over: AtomicBool::new(false),
            damaged: Mutex::new(Vec::new()),
        }
    }

    /// Answers run, or do not any longer.
    pub fn pause(&self, paused: bool) {
        self.paused.store(paused, Ordering::Relaxed);
    }

    /// Ends it before its end; whoever calls this unparks the thread as well.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Whether there is nothing more to come.
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// What was found so far.
    pub fn state(&self) -> ModelCheck {
        let damaged = self.damaged.lock().map(|damaged| damaged.clone()).unwrap_or_default();
        let done = self.done.load(Ordering::Relaxed);
        ModelCheck { done_bytes: done, bytes: self.bytes, is_over: self.is_over(), damaged }
    }

    /// Compares all of `file`; the body of the thread, which is at idle priority.
    pub fn run(&self, file: &File, parts: &[Part]) {
        let mut buffer = vec![0; PIECE_BYTES];
        for part in parts {
            let what = match part.is_whole(&mut buffer, |at, piece| self.read(file, at, piece)) {
                Ok(true) => continue,
                Ok(false) => part.name().into_owned(),
                Err(_) if self.stop.load(Ordering::Relaxed) => return,
                Err(error) => {
                    // The rest of it is not read, and counts as done.
                    format!("{} ({error})", part.name())
                }
            };
            if let Ok(mut damaged) = self.damaged.lock()
                && damaged.len() < MAX_DAMAGED
            {
                damaged.push(what);
            }
        }
        self.over.store(true, Ordering::Release);
    }

    /// Reads one piece when nobody waits for an answer, and rests as long as the rate says.
    fn read(&self, file: &File, at: u64, piece: &mut [u8]) -> io::Result<()> {
        while self.paused.load(Ordering::Relaxed) && !self.stop.load(Ordering::Relaxed) {
            std::thread::park_timeout(LOOK_EVERY);
        }
        if self.stop.load(Ordering::Relaxed) {
            return Err(ErrorKind::Interrupted.into());
        }
        let begun = Instant::now();
        file.read_exact_at(piece, at)?;
        self.done.fetch_add(piece.len() as u64, Ordering::Relaxed);
        let least = Duration::from_micros(piece.len() as u64 * 1_000_000 / BYTES_PER_S);
        // One that is woken early is asked to stop, and looks at once.
        std::thread::park_timeout(least.saturating_sub(begun.elapsed()));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const BYTES: usize = 3 * PIECE_BYTES + 5;

    fn parts(bytes: &[u8]) -> Vec<Part> {
        let half = bytes.len() / 2;
        [("a", 0, half), ("b", half, bytes.len() - half)]
            .map(|(name, at, len)| Part::of(name, at as u64, &bytes[at..at + len]))
            .into()
    }

    fn file(bytes: &[u8]) -> (tempfile::TempDir, File) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        std::fs::write(&path, bytes).unwrap();
        (folder, File::open(path).unwrap())
    }

    #[test]
    fn damage_is_named_and_a_file_that_is_cut_short_is_damage_and_no_end() {
        let mut bytes: Vec<u8> = (0..BYTES).map(|n| (n % 251) as u8).collect();
        let parts = parts(&bytes);
        let (_folder, whole) = file(&bytes);
        let check = Check::new(&parts);
        check.pause(false);
        check.run(&whole, &parts);
        let state = check.state();
        assert_eq!((state.done_bytes, state.bytes, state.is_over), (BYTES as u64, BYTES as u64, true));
        assert!(state.damaged.is_empty());

        bytes[7] ^= 1;
        bytes.truncate(BYTES - 1);
        let (_folder, damaged) = file(&bytes);
        let check = Check::new(&parts);
        check.pause(false);
        check.run(&damaged, &parts);
        let state = check.state();
        assert_eq!(state.damaged.len(), 2);
        assert_eq!(state.damaged[0], "tensor a");
        assert!(state.damaged[1].starts_with("tensor b ("), "{:?}", state.damaged);
    }

    #[test]
    fn it_stands_still_while_an_answer_runs_and_keeps_to_its_rate() {
        let bytes = vec![7; 64 * PIECE_BYTES];
        let parts = parts(&bytes);
        let (_folder, whole) = file(&bytes);
        let check = Check::new(&parts);
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| check.run(&whole, &parts));
            std::thread::sleep(2 * LOOK_EVERY);
            assert_eq!(check.state().done_bytes, 0, "it begins once it may");
            let begun = Instant::now();
            check.pause(false);
            while check.state().done_bytes == 0 {
                assert!(begun.elapsed() < Duration::from_secs(60));
                std::thread::sleep(LOOK_EVERY / 10);
            }
            check.pause(true);
            std::thread::sleep(LOOK_EVERY);
            let stood = check.state().done_bytes;
            std::thread::sleep(3 * LOOK_EVERY);
            assert_eq!(check.state().done_bytes, stood, "a request runs");
            check.pause(false);
            while !check.is_over() {
                assert!(begun.elapsed() < Duration::from_secs(60));
                std::thread::sleep(LOOK_EVERY / 10);
            }
            let least = Duration::from_micros(bytes.len() as u64 * 1_000_000 / BYTES_PER_S);
            assert!(begun.elapsed() >= least * 9 / 10, "{:?}", begun.elapsed());
            thread.join().unwrap();
        });
    }

    #[test]
    fn it_ends_when_the_daemon_does() {
        let bytes = vec![7; BYTES];
        let parts = parts(&bytes);
        let (_folder, whole) = file(&bytes);
        let check = Check::new(&parts);
        check.stop();
        check.run(&whole, &parts);
        assert!(!check.is_over() && check.state().damaged.is_empty());
    }
}
