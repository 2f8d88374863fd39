//! How far a start of `hearth serve` has come, and when: a fixed record that whoever reaches a stage writes to and the I/O thread
//! passes on to PID 1. Two clocks: time since the kernel started, and processor time of this process, which tells work from waiting for
//! the card. Next on the data's way: `sys::heartbeat`, then `init::timeline`.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// Something that a start comes by, in the order in which it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The process runs.
    Started,
    /// The model file's header is read, its vocabulary there, its memory planned.
    Planned,
    /// The model is in memory: read ahead where it is packed, repacked where it is not.
    ModelRead,
    /// Every buffer is taken and resident.
    Resident,
    /// The socket takes connections.
    Listening,
    /// A first answer has its first token.
    FirstToken,
    /// A first answer is whole.
    FirstAnswer,
}

impl Stage {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Started,
        Self::Planned,
        Self::ModelRead,
        Self::Resident,
        Self::Listening,
        Self::FirstToken,
        Self::FirstAnswer,
    ];

    /// What a report calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Started => "serve runs",
            Self::Planned => "model planned",
            Self::ModelRead => "model read",
            Self::Resident => "buffers resident",
            Self::Listening => "socket open",
            Self::FirstToken => "first token",
            Self::FirstAnswer => "first answer",
        }
    }
}

/// When a stage was reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    /// Since the kernel started.
    pub at: Duration,
    /// Processor time of the process so far, all threads together.
    pub work: Duration,
}

/// Bits of [`Mark::work`] in microseconds: 16 s; what is longer counts as that.
const WORK_BITS: u32 = 24;
/// Bits of [`Mark::at`] in microseconds: 19 h.
const AT_BITS: u32 = 36;

impl Mark {
    /// Both clocks, now.
    pub fn now() -> Self {
        let read = |clock| clock_gettime(clock).map_or(Duration::ZERO, Duration::from);
        Self { at: read(ClockId::CLOCK_BOOTTIME), work: read(ClockId::CLOCK_PROCESS_CPUTIME_ID) }
    }

    /// In 60 bits, to the microsecond; what is too long counts as the longest.
    pub fn to_bits(self) -> u64 {
        let microseconds = |time: Duration, bits: u32| {
            let most = (1u64 << bits) - 1;
            u64::try_from(time.as_micros()).unwrap_or(most).min(most)
        };
        microseconds(self.at, AT_BITS) << WORK_BITS | microseconds(self.work, WORK_BITS)
    }

    /// Back from [`Mark::to_bits`].
    pub fn from_bits(bits: u64) -> Self {
        let at = bits >> WORK_BITS & ((1 << AT_BITS) - 1);
        Self { at: Duration::from_micros(at), work: Duration::from_micros(bits & ((1 << WORK_BITS) - 1)) }
    }
}

/// The record. 0: not reached.
static MARKS: [AtomicU64; Stage::ALL.len()] = [const { AtomicU64::new(0) }; Stage::ALL.len()];

/// A stage is reached, if it was not before.
pub fn reach(stage: Stage) {
    let record = &MARKS[stage as usize];
    if record.load(Ordering::Relaxed) == 0 {
        // Two threads at once are both right.
        record.store(Mark::now().to_bits(), Ordering::Relaxed);
    }
}

/// When a stage was reached.
pub fn of(stage: Stage) -> Option<Mark> {
    let bits = MARKS[stage as usize].load(Ordering::Relaxed);
    (bits != 0).then(|| Mark::from_bits(bits))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_keeps_its_microseconds_and_what_is_too_long_is_the_longest() {
        let mark = Mark { at: Duration::from_micros(68_719_476_735), work: Duration::from_micros(16_777_215) };
        assert_eq!(Mark::from_bits(mark.to_bits()), mark);
        let long = Mark { at: Duration::from_secs(1 << 40), work: Duration::MAX };
        assert_eq!(Mark::from_bits(long.to_bits()), mark);
        assert_eq!(Mark::from_bits(Mark::default().to_bits()), Mark::default());
        assert!(mark.to_bits() < 1 << 60, "a stage fits in front of it");
    }

    #[test]
    fn a_stage_is_reached_once() {
        reach(Stage::FirstAnswer);
        let first = of(Stage::FirstAnswer);
        assert!(first.is_some_and(|mark| mark.at > Duration::ZERO && mark.work > Duration::ZERO));
        std::thread::sleep(Duration::from_millis(2));
        reach(Stage::FirstAnswer);
        assert_eq!(of(Stage::FirstAnswer), first);
    }
}
