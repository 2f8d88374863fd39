//! The hardware watchdog: once armed it restarts the board unless it is fed. Its time-out is the module's parameter or the kernel's
//! command line, so that nothing here needs an ioctl. Fed by `init::supervise`, and only while that has reason to.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

/// The device.
pub const DEVICE: &str = "/dev/watchdog";
/// How often it is fed.
pub const FEED_EVERY: Duration = Duration::from_secs(1);

/// An armed watchdog.
#[derive(Debug)]
pub struct Watchdog {
    device: File,
    fed: Instant,
}

impl Watchdog {
    /// Opening it arms it; from then on there is no way back, by design. `None`: there is none.
    ///
    /// # Errors
    /// The device is there and cannot be opened.
    pub fn arm(path: &Path) -> io::Result<Option<Self>> {
        match OpenOptions::new().write(true).open(path) {
            Ok(device) => Ok(Some(Self { device, fed: Instant::now() })),
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Feeds it where that is due.
    pub fn feed(&mut self, now: Instant) {
        if now.duration_since(self.fed) >= FEED_EVERY {
            self.fed = now;
            // A watchdog that takes no food bites; there is nobody to tell.
            let _ = self.device.write_all(b"\0");
        }
    }
}

/// Time-out of the machine's first watchdog in seconds, as the kernel shows it.
pub fn timeout_s() -> Option<u64> {
    std::fs::read_to_string("/sys/class/watchdog/watchdog0/timeout").ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn it_is_fed_once_a_second_and_never_told_to_stop() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("watchdog");
        assert!(Watchdog::arm(&path).unwrap().is_none());
        assert!(Watchdog::arm(folder.path()).is_err());
        std::fs::write(&path, "").unwrap();
        let mut watchdog = Watchdog::arm(&path).unwrap().unwrap();
        let armed = watchdog.fed;
        for tenth in 0..=35 {
            watchdog.feed(armed + Duration::from_millis(100 * tenth));
        }
        drop(watchdog);
        // A 'V' would disarm it.
        assert_eq!(std::fs::read(&path).unwrap(), [0, 0, 0]);
    }
}
