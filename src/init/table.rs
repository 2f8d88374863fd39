//! What PID 1 mounts and sets, a line each with its reason. Tables alone; `init` applies them in order.

use nix::mount::MsFlags;

/// One mount.
#[derive(Clone, Copy, Debug)]
pub struct Mount {
    /// What is mounted; for a file system without a device, its name.
    pub source: &'static str,
    /// Where; the folder is made.
    pub target: &'static str,
    /// The file system's name.
    pub kind: &'static str,
    /// Flags.
    pub flags: MsFlags,
    /// Options of the file system.
    pub options: &'static str,
    /// Why it is there.
    pub reason: &'static str,
}

const QUIET: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);

/// Kernel file systems, mounted before anything else.
pub const MOUNTS: [Mount; 4] = [
    Mount {
        source: "devtmpfs",
        target: "/dev",
        kind: "devtmpfs",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        options: "mode=0755",
        reason: "the watchdog, the console, the card",
    },
    Mount {
        source: "proc",
        target: "/proc",
        kind: "proc",
        flags: QUIET,
        options: "",
        reason: "memory figures for the plan, the kernel's settings, this program's own path",
    },
    Mount {
        source: "sysfs",
        target: "/sys",
        kind: "sysfs",
        flags: QUIET,
        options: "",
        reason: "which console the kernel uses, which disks and partitions there are",
    },
    Mount {
        source: "tmpfs",
        target: "/run",
        kind: "tmpfs",
        flags: QUIET,
        options: "mode=0755,size=4m",
        reason: "the UNIX socket; nothing else is written here",
    },
];

/// A partition of the card.
#[derive(Clone, Copy, Debug)]
pub struct Partition {
    /// Its number in the partition table.
    pub number: u32,
    /// Where it is mounted.
    pub target: &'static str,
    /// The file system's name.
    pub kind: &'static str,
    /// Flags.
    pub flags: MsFlags,
    /// Options of the file system.
    pub options: &'static str,
    /// Nobody but hearth writes there: a file system that cannot be read any more is made anew.
    pub is_ours: bool,
    /// Why it is there.
    pub reason: &'static str,
}

const READ_ONLY: MsFlags = QUIET.union(MsFlags::MS_RDONLY);

/// Where the FAT partition is mounted.
pub const BOOT: &str = "/boot";
/// Where the packed model is mounted.
pub const MODEL: &str = "/model";

/// The card's partitions. One that is absent or damaged costs what is on it, nothing else.
pub const PARTITIONS: [Partition; 3] = [
    Partition {
        number: 1,
        target: BOOT,
        kind: "vfat",
        flags: READ_ONLY,
        options: "iocharset=ascii,utf8,shortname=mixed",
        is_ours: false,
        reason: "hearth.toml and models that somebody dropped on the card from a PC",
    },
    Partition {
        number: 2,
        target: MODEL,
        kind: "erofs",
        flags: READ_ONLY,
        options: "",
        is_ours: false,
        reason: "the packed model that the image was made with",
    },
    Partition {
        number: 3,
        target: "/state",
        kind: "ext4",
        flags: QUIET.union(MsFlags::MS_NOATIME),
        options: "errors=remount-ro",
        is_ours: true,
        reason: "settings changed on the console, crash records",
    },
];

/// A value written to a file of /proc/sys or /sys.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// The file.
    pub path: &'static str,
    /// What is written.
    pub value: &'static str,
    /// Why.
    pub reason: &'static str,
}

/// Settings made before modules are loaded. A kernel without one of these files goes without.
pub const SETTINGS: [Setting; 8] = [
    Setting {
        path: "/proc/sys/kernel/printk",
        value: "1 4 1 4",
        reason: "the console is for answers: of the kernel only a panic is printed there; the rest stays in its log",
    },
    Setting {
        path: "/proc/sys/kernel/sysrq",
        value: "0",
        reason: "a break and a letter are noise on a serial line, no command to the kernel",
    },
    Setting { path: "/proc/sys/kernel/panic", value: "5", reason: "a panic ends in a restart after 5 s" },
    Setting {
        path: "/proc/sys/kernel/panic_on_oops",
        value: "1",
        reason: "a kernel that failed once is not trusted with the next answer",
    },
    Setting {
        path: "/proc/sys/kernel/kptr_restrict",
        value: "2",
        reason: "no program on the board learns where the kernel is",
    },
    Setting { path: "/proc/sys/kernel/dmesg_restrict", value: "1", reason: "nor reads its log" },
    Setting { path: "/proc/sys/fs/suid_dumpable", value: "0", reason: "no memory of a prompt in a file" },
    Setting {
        path: "/sys/kernel/mm/transparent_hugepage/enabled",
        value: "madvise",
        reason: "weights ask for 2 MiB pages; below 512 MB the kernel would turn them off",
    },
];

/// Settings made once all modules are loaded.
pub const SEAL: [Setting; 1] = [Setting {
    path: "/proc/sys/kernel/modules_disabled",
    value: "1",
    reason: "no code gets into the kernel from here on, whoever asks",
}];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_has_its_reason_and_no_place_is_taken_twice() {
        let mut targets: Vec<_> = MOUNTS.iter().map(|m| (m.target, m.reason)).collect();
        targets.extend(PARTITIONS.iter().map(|p| (p.target, p.reason)));
        targets.extend(SETTINGS.iter().chain(&SEAL).map(|s| (s.path, s.reason)));
        let lines = targets.len();
        assert!(targets.iter().all(|(target, reason)| target.starts_with('/') && reason.len() > 10));
        targets.sort_unstable();
        targets.dedup_by_key(|(target, _)| *target);
        assert_eq!(targets.len(), lines);
    }

    #[test]
    fn nothing_on_a_card_can_be_a_program_or_a_device() {
        for partition in PARTITIONS {
            assert!(partition.flags.contains(QUIET), "{}", partition.target);
            assert_ne!(partition.flags.contains(MsFlags::MS_RDONLY), partition.is_ours, "{}", partition.target);
        }
    }
}
