//! Which cores this process may use, pinning a thread to one, and how much memory the machine can still give.
//! Next on the data's way: `sys::workers` pins by it, `model::plan` refuses by it.

use std::path::Path;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// The cores that the scheduler may put this process on, ascending.
pub fn allowed_cpus() -> Vec<usize> {
    let Ok(set) = sched_getaffinity(Pid::from_raw(0)) else {
        return vec![0];
    };
    let cpus: Vec<usize> = (0..CpuSet::count()).filter(|&cpu| set.is_set(cpu).unwrap_or(false)).collect();
    if cpus.is_empty() { vec![0] } else { cpus }
}

/// Pins the calling thread to one core. Failure costs speed, not correctness, so it is only logged.
pub fn pin_current_thread(cpu: usize) {
    let mut set = CpuSet::new();
    let pinned = set.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set));
    if let Err(errno) = pinned {
        log::warn!("thread not pinned to cpu {cpu}: {errno}");
    }
}

/// Lets the calling thread run on any of `cpus` again, whatever its parent was pinned to.
pub fn allow(cpus: &[usize]) {
    let mut set = CpuSet::new();
    for &cpu in cpus {
        // A core beyond the set's size is one that the scheduler cannot be told about.
        let _ = set.set(cpu);
    }
    if let Err(errno) = sched_setaffinity(Pid::from_raw(0), &set) {
        log::warn!("thread not allowed on {} cpus: {errno}", cpus.len());
    }
}

/// Bytes that may still be allocated without swapping: `MemAvailable`, or less where a cgroup says so.
/// `None` where neither can be read (no /proc yet).
pub fn available_memory_bytes() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let available = field_kib(&meminfo, "MemAvailable:")?.checked_mul(1024)?;
    Some(cgroup_room().map_or(available, |room| room.min(available)))
}

/// What the process holds now, from `/proc/self/status`.
#[derive(Clone, Copy, Debug, Default)]
pub struct ResidentMemory {
    /// Largest resident set so far, file pages included, in bytes.
    pub peak_rss_bytes: u64,
    /// Anonymous pages resident now, in bytes.
    pub anon_bytes: u64,
}

/// Reads [`ResidentMemory`]; zeros where /proc is not mounted.
pub fn resident_memory() -> ResidentMemory {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let bytes = |key| field_kib(&status, key).unwrap_or(0).saturating_mul(1024);
    ResidentMemory { peak_rss_bytes: bytes("VmHWM:"), anon_bytes: bytes("RssAnon:") }
}

/// The CPU's name as /proc/cpuinfo has it, for records.
pub fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = info.lines().find(|line| line.starts_with("model name") || line.starts_with("CPU part"));
    line.and_then(|line| line.split_once(':')).map_or_else(|| "unknown".into(), |(_, name)| name.trim().into())
}

fn field_kib(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.starts_with(key))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// Room below the cgroup v2 limit, if there is one. Page cache is given back under pressure and counts as room.
fn cgroup_room() -> Option<u64> {
    let own = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = own.lines().find_map(|line| line.strip_prefix("0::"))?;
    let base = Path::new("/sys/fs/cgroup").join(path.trim_start_matches('/'));
    let read = |name: &str| std::fs::read_to_string(base.join(name)).ok();
    let limit: u64 = read("memory.max")?.trim().parse().ok()?;
    let stat = read("memory.stat")?;
    let anon: u64 = stat.lines().find_map(|line| line.strip_prefix("anon "))?.trim().parse().ok()?;
    Some(limit.saturating_sub(anon))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_field_is_found_and_others_are_not() {
        let text = "MemTotal:       24000 kB\nMemAvailable:   1234 kB\n";
        assert_eq!(field_kib(text, "MemAvailable:"), Some(1234));
        assert_eq!(field_kib(text, "SwapFree:"), None);
    }

    #[test]
    fn this_process_has_a_core_and_memory() {
        assert!(!allowed_cpus().is_empty());
        assert!(resident_memory().anon_bytes > 0);
        assert!(available_memory_bytes().is_some_and(|bytes| bytes > 0));
    }
}
