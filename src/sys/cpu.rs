//! Which cores this process may use, pinning a thread to one, and how much memory the machine can still give.
//! Next on the data's way: `sys::workers` pins by it, `plan` refuses by it.

use std::path::Path;

use nix::libc;
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

/// From now on the calling thread runs where no other wants the core. Failure costs others some time, so it is only logged.
pub fn become_idle() {
    // The kernel's `struct sched_param`; the C library's has more.
    let priority: libc::c_int = 0;
    // SAFETY: the kernel reads one int, which lives here; the number 0 is the calling thread. musl's own function does nothing.
    let result = unsafe { libc::syscall(libc::SYS_sched_setscheduler, 0, libc::SCHED_IDLE, &raw const priority) };
    if result != 0 {
        log::warn!("a thread does not get idle priority: {}", std::io::Error::last_os_error());
    }
}

/// Nobody says how much memory is left.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {source}; /proc must be mounted: the memory plan is checked against it")]
pub struct NoMemoryFigures {
    /// The file that was to say it.
    pub path: &'static str,
    /// What is wrong with it.
    pub source: std::io::Error,
}

/// Bytes that may still be allocated without swapping: `MemAvailable`, or less where a cgroup, or one that it is in, says so.
///
/// # Errors
/// /proc is not mounted, or says nothing of `MemAvailable`.
pub fn available_memory_bytes() -> Result<u64, NoMemoryFigures> {
    const PATH: &str = "/proc/meminfo";
    let failed = |source| NoMemoryFigures { path: PATH, source };
    let meminfo = std::fs::read_to_string(PATH).map_err(failed)?;
    let available = field_kib(&meminfo, "MemAvailable:").and_then(|kib| kib.checked_mul(1024));
    let missing = || failed(std::io::Error::other("no MemAvailable (Linux 3.14 has it)"));
    let available = available.ok_or_else(missing)?;
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    Ok(cgroup_room(Path::new("/sys/fs/cgroup"), &own).map_or(available, |room| room.min(available)))
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

/// What a version of cgroups calls things.
struct Cgroups {
    /// File of the limit in bytes. Without one v2 says "max", v1 a number near 2^63.
    limit: &'static str,
    /// The line of `memory.stat` with the anonymous bytes, groups inside included.
    anonymous: &'static str,
}

const CGROUPS_V2: Cgroups = Cgroups { limit: "memory.max", anonymous: "anon" };
const CGROUPS_V1: Cgroups = Cgroups { limit: "memory.limit_in_bytes", anonymous: "total_rss" };
/// Where the controller of v1 is mounted, below the root of cgroups.
const MEMORY_V1: &str = "memory";

/// Least room below a cgroup's limit, the process's own or one of those around it, v2 or v1 (both may be there at once); `None` where
/// none has a limit. Page cache is given back under pressure and counts as room. `own`: /proc/self/cgroup.
fn cgroup_room(root: &Path, own: &str) -> Option<u64> {
    let groups = own.lines().filter_map(|line| {
        // Hierarchy, controllers, path; the hierarchy of v2 is 0 and names none.
        let (hierarchy, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        match controllers {
            "" if hierarchy == "0" => Some((root.to_path_buf(), path, CGROUPS_V2)),
            _ => controllers.split(',').any(|name| name == MEMORY_V1).then(|| (root.join(MEMORY_V1), path, CGROUPS_V1)),
        }
    });
    let rooms = groups.flat_map(|(root, path, names)| {
        // A container may see its own group as the root, yet read its path from outside: then the root alone is there.
        let innermost = root.join(path.trim_start_matches('/'));
        let around = innermost.ancestors().take_while(|group| group.starts_with(&root));
        around.filter_map(|group| room(group, &names)).collect::<Vec<u64>>()
    });
    rooms.min()
}

/// Bytes below one group's limit.
fn room(group: &Path, names: &Cgroups) -> Option<u64> {
    let read = |name: &str| std::fs::read_to_string(group.join(name)).ok();
    let limit: u64 = read(names.limit)?.trim().parse().ok()?;
    let stat = read("memory.stat")?;
    let mut fields = stat.lines().filter_map(|line| line.split_once(' '));
    let anonymous: u64 = fields.find(|(name, _)| *name == names.anonymous)?.1.trim().parse().ok()?;
    Some(limit.saturating_sub(anonymous))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_tightest_cgroup_around_the_process_counts() {
        let root = tempfile::tempdir().unwrap();
        let inner = root.path().join("slice/service");
        std::fs::create_dir_all(&inner).unwrap();
        let write = |folder: &str, max: &str, anon: u64| {
            let folder = root.path().join(folder);
            std::fs::write(folder.join("memory.max"), max).unwrap();
            std::fs::write(folder.join("memory.stat"), format!("anon {anon}\nfile 77\n")).unwrap();
        };
        let own = "1:name=systemd:/old\n0::/slice/service\n";
        assert_eq!(cgroup_room(root.path(), own), None);
        write("slice/service", "max\n", 5);
        assert_eq!(cgroup_room(root.path(), own), None);
        write("slice", "1000\n", 300);
        assert_eq!(cgroup_room(root.path(), own), Some(700));
        write("slice/service", "900\n", 5);
        assert_eq!(cgroup_room(root.path(), own), Some(700));
        write("", "400\n", 350);
        assert_eq!(cgroup_room(root.path(), own), Some(50));
        assert_eq!(cgroup_room(root.path(), "0::/\n"), Some(50));
    }

    #[test]
    fn limits_of_the_first_version_count_too() {
        let root = tempfile::tempdir().unwrap();
        let inner = root.path().join("memory/docker/abc");
        std::fs::create_dir_all(&inner).unwrap();
        let write = |folder: &str, limit: &str, rss: u64| {
            let folder = root.path().join("memory").join(folder);
            std::fs::write(folder.join("memory.limit_in_bytes"), limit).unwrap();
            // Its own pages, then those of the groups inside as well.
            std::fs::write(folder.join("memory.stat"), format!("cache 9\nrss 1\ntotal_cache 99\ntotal_rss {rss}\n"))
                .unwrap();
        };
        let own = "12:cpu,cpuacct:/docker/abc\n7:memory:/docker/abc\n1:name=systemd:/docker/abc\n";
        assert_eq!(cgroup_room(root.path(), own), None);
        // No limit, as the kernel writes it.
        write("", "9223372036854771712\n", 5000);
        assert!(cgroup_room(root.path(), own).unwrap() > 1 << 62);
        write("docker/abc", "1000\n", 300);
        assert_eq!(cgroup_room(root.path(), own), Some(700));
        write("docker", "400\n", 350);
        assert_eq!(cgroup_room(root.path(), own), Some(50));
        // Mounted with another controller; and a controller with a longer name is another one.
        assert_eq!(cgroup_room(root.path(), "3:hugetlb,memory:/docker/abc\n"), Some(50));
        assert_eq!(cgroup_room(root.path(), "3:memory_x:/docker/abc\n"), None);
        // In a container the path is often one of the host, which is not there: the root is the container's own.
        write("", "600\n", 100);
        assert_eq!(cgroup_room(root.path(), "7:memory:/not/here\n"), Some(500));
    }

    #[test]
    fn with_both_versions_the_tighter_limit_counts() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("memory/a")).unwrap();
        std::fs::create_dir_all(root.path().join("b")).unwrap();
        let write = |path: &str, text: &str| std::fs::write(root.path().join(path), text).unwrap();
        write("memory/a/memory.limit_in_bytes", "800\n");
        write("memory/a/memory.stat", "total_rss 100\n");
        write("b/memory.max", "900\n");
        write("b/memory.stat", "anon 500\n");
        assert_eq!(cgroup_room(root.path(), "4:memory:/a\n0::/b\n"), Some(400));
        assert_eq!(cgroup_room(root.path(), "4:memory:/a\n0::/\n"), Some(700));
    }

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
        assert!(available_memory_bytes().unwrap() > 0);
    }
}
