//! What the kernel tells of the machine in /proc and /sys: processor, clock, memory, serial line, watchdog, temperature. Files that a
//! kernel or a board does not have are "not here". The root is a value, so that tests can be a board. Next: `selftest::report`.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use hearth_kernels::Kernels;

use super::report::Check;

/// Most that is read of one file, in bytes.
pub const MAX_FILE_BYTES: u64 = 64 * 1024;
/// A Raspberry Pi begins to slow down at this temperature, in thousandths of a degree Celsius.
pub const HOT_MILLIDEGREES: i64 = 80_000;
/// All tasks waiting for memory for more than this share of the last 10 s, in percent: the machine does nothing but read pages again.
pub const MOST_MEMORY_PRESSURE_PERCENT: f64 = 10.0;

/// Features of a processor that say something about speed or kernel sets, as /proc/cpuinfo calls them.
const FEATURES: [&str; 22] = [
    "fp",
    "asimd",
    "asimdhp",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
    "atomics",
    "crc32",
    "aes",
    "sha2",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx_vnni",
    "amx_int8",
];
/// Arm's own cores by the number in MIDR_EL1.
const ARM_PARTS: [(&str, &str); 12] = [
    ("0xd03", "Cortex-A53"),
    ("0xd04", "Cortex-A35"),
    ("0xd05", "Cortex-A55"),
    ("0xd07", "Cortex-A57"),
    ("0xd08", "Cortex-A72"),
    ("0xd0a", "Cortex-A75"),
    ("0xd0b", "Cortex-A76"),
    ("0xd0c", "Neoverse-N1"),
    ("0xd40", "Neoverse-V1"),
    ("0xd41", "Cortex-A78"),
    ("0xd49", "Neoverse-N2"),
    ("0xd4f", "Neoverse-V2"),
];

/// A machine whose /proc and /sys lie below a folder.
#[derive(Debug)]
pub struct Machine {
    root: PathBuf,
}

impl Machine {
    /// The machine below `root`; this one below `/`.
    pub fn at(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// The text of a file, without white space around it; `None` where it cannot be read or has none.
    fn read(&self, path: &str) -> Option<String> {
        let mut bytes = Vec::new();
        fs::File::open(self.root.join(path)).ok()?.take(MAX_FILE_BYTES).read_to_end(&mut bytes).ok()?;
        let text = String::from_utf8_lossy(&bytes).trim_matches(['\0', '\n', ' ', '\t']).to_owned();
        (!text.is_empty()).then_some(text)
    }

    fn number<T: std::str::FromStr>(&self, path: &str) -> Option<T> {
        self.read(path)?.parse().ok()
    }

    /// Names in a folder that begin with `prefix`, sorted.
    fn names(&self, folder: &str, prefix: &str) -> Vec<String> {
        let entries = fs::read_dir(self.root.join(folder)).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let mut names: Vec<String> = names.filter(|name| name.starts_with(prefix)).collect();
        names.sort_by_key(|name| (name.len(), name.clone()));
        names
    }

    /// What the board calls itself.
    pub fn board(&self) -> Check {
        let paths = ["proc/device-tree/model", "sys/class/dmi/id/product_name"];
        match paths.iter().find_map(|path| self.read(path)) {
            Some(model) => Check::pass("board", model),
            None => Check::not_here("board", "no device tree and no DMI name"),
        }
    }

    /// The kernel's version.
    pub fn kernel(&self) -> Check {
        match self.read("proc/sys/kernel/osrelease") {
            Some(release) => Check::pass("kernel", format!("Linux {release}, {}", std::env::consts::ARCH)),
            None => Check::not_here("kernel", "/proc is not mounted"),
        }
    }

    /// Model and features of the processor.
    pub fn cpu(&self) -> Check {
        let Some(info) = self.read("proc/cpuinfo") else { return Check::not_here("cpu", "no /proc/cpuinfo") };
        let field = |key: &str| {
            let line = info.lines().find(|line| line.starts_with(key))?;
            line.split_once(':').map(|(_, value)| value.trim())
        };
        let part = field("CPU part");
        let known = part.and_then(|part| ARM_PARTS.iter().find(|(number, _)| *number == part)).map(|(_, name)| *name);
        let name = known.or(field("model name")).or(part).unwrap_or("unknown");
        let words: Vec<&str> = field("Features").or(field("flags")).unwrap_or_default().split(' ').collect();
        let features: Vec<&str> = FEATURES.into_iter().filter(|feature| words.contains(feature)).collect();
        Check::pass("cpu", format!("{name}: {}", features.join(" ")))
    }

    /// The kernel set that is used, and those that could be: on Arm one with SIMD, since every such processor has it.
    pub fn kernels(&self) -> Check {
        let names: Vec<&str> = Kernels::supported().map(Kernels::name).collect();
        let best = Kernels::detect().name();
        let is_right = !cfg!(target_arch = "aarch64") || best != "scalar";
        Check::that("kernels", is_right, format!("{best}, of {}", names.join(" ")))
    }

    /// Cores that compute, of those that there are.
    pub fn cores(&self) -> Check {
        let count = |path: &str| self.read(path).and_then(|list| cores_in(&list));
        match (count("sys/devices/system/cpu/online"), count("sys/devices/system/cpu/present")) {
            (Some(online), Some(present)) => {
                let allowed = crate::sys::cpu::allowed_cpus().len();
                Check::that("cores", online == present, format!("{online} of {present} on, {allowed} for this process"))
            }
            _ => Check::not_here("cores", "no list of cores in /sys"),
        }
    }

    /// The clock of the slowest core: with the governor that always asks for the full clock, less of it is a fault.
    pub fn clock(&self) -> Check {
        let folder = "sys/devices/system/cpu/cpufreq";
        let policies = self.names(folder, "policy");
        let policy = |name: &String| {
            let khz = |file: &str| self.number::<u64>(&format!("{folder}/{name}/{file}"));
            let governor = self.read(&format!("{folder}/{name}/scaling_governor"))?;
            Some((khz("scaling_cur_freq")?, khz("cpuinfo_min_freq")?, khz("cpuinfo_max_freq")?, governor))
        };
        let slowest = policies.iter().filter_map(policy).min_by_key(|(now, ..)| *now);
        let Some((now, least, most, governor)) = slowest else {
            return Check::not_here("clock", "no cpufreq: the kernel does not set the clock");
        };
        let is_right = governor != "performance" || now.saturating_mul(10) >= most.saturating_mul(9);
        let mhz = |khz: u64| khz / 1000;
        let found = format!("{} MHz of {} to {}, governor {governor}", mhz(now), mhz(least), mhz(most));
        Check::that("clock", is_right, found)
    }

    /// Memory, all of it and what is free; the sum is what the kernel and the firmware leave.
    pub fn memory(&self) -> Check {
        match (self.meminfo_kib("MemTotal:"), self.meminfo_kib("MemAvailable:")) {
            (Some(total), Some(available)) => {
                Check::pass("memory", format!("{} MiB available of {}", available >> 10, total >> 10))
            }
            _ => Check::not_here("memory", "no figures in /proc/meminfo"),
        }
    }

    /// All of the machine's memory in bytes.
    pub fn memory_bytes(&self) -> Option<u64> {
        self.meminfo_kib("MemTotal:")?.checked_mul(1024)
    }

    fn meminfo_kib(&self, key: &str) -> Option<u64> {
        let info = self.read("proc/meminfo")?;
        info.lines().find_map(|line| line.strip_prefix(key)?.split_whitespace().next()?.parse().ok())
    }

    /// The size of a page, and whether weights can have large ones.
    pub fn pages(&self) -> Check {
        let kib = crate::sys::map::page_bytes() >> 10;
        match self.read("sys/kernel/mm/transparent_hugepage/enabled") {
            Some(modes) => {
                let mode = modes.split(' ').find_map(|mode| mode.strip_prefix('[')?.strip_suffix(']'));
                let mode = mode.unwrap_or("unknown");
                Check::that("pages", mode != "never", format!("{kib} KiB, large pages {mode}"))
            }
            None => Check::pass("pages", format!("{kib} KiB, large pages not in this kernel")),
        }
    }

    /// How much work has waited lately (PSI).
    pub fn pressure(&self) -> Check {
        let share = |file: &str, kind: &str| {
            let text = self.read(&format!("proc/pressure/{file}"))?;
            let line = text.lines().find_map(|line| line.strip_prefix(kind))?;
            line.split(' ').find_map(|word| word.strip_prefix("avg10=")?.parse::<f64>().ok())
        };
        match (share("cpu", "some"), share("memory", "full"), share("io", "some")) {
            (Some(cpu), Some(memory), Some(io)) => {
                let found = format!("cpu {cpu} %, memory {memory} %, io {io} % of the last 10 s waited");
                Check::that("pressure", memory <= MOST_MEMORY_PRESSURE_PERCENT, found)
            }
            _ => Check::not_here("pressure", "the kernel does not count it (PSI)"),
        }
    }

    /// The console that the kernel uses, as a device below /dev.
    pub fn console(&self) -> Option<PathBuf> {
        let active = self.read("sys/class/tty/console/active")?;
        active.split_whitespace().next_back().map(|name| Path::new("/dev").join(name))
    }

    /// The driver of a tty. Newer kernels have a port and its controller between the two.
    pub fn tty_driver(&self, tty: &Path) -> Option<String> {
        let device = self.root.join("sys/class/tty").join(tty.file_name()?).join("device");
        let links = ["driver", "../../driver"].map(|link| fs::read_link(device.join(link)).ok());
        let names = links.iter().flatten().filter_map(|link| link.file_name()?.to_str());
        names.filter(|name| *name != "port").map(str::to_owned).next()
    }

    /// The hardware watchdog. An appliance arms it; another machine may leave it alone.
    pub fn watchdog(&self, is_appliance: bool) -> Check {
        let folder = "sys/class/watchdog/watchdog0";
        if !self.root.join(folder).exists() {
            return Check::not_here("watchdog", "there is none: a hung kernel stays hung");
        }
        let text = |file: &str| self.read(&format!("{folder}/{file}"));
        let (name, state) = (text("identity").unwrap_or("unknown".into()), text("state").unwrap_or("unknown".into()));
        let timeout = text("timeout").map_or("an unknown time".to_owned(), |s| format!("{s} s"));
        let last = text("bootstatus").filter(|status| status != "0");
        let last = last.map_or(String::new(), |status| format!("; the last start was its work (status {status})"));
        let switched_off =
            self.read("proc/cmdline").is_some_and(|words| words.split(' ').any(|word| word == "hearth.watchdog=off"));
        let is_right = state == "active" || !is_appliance || switched_off;
        let how = match (state.as_str(), switched_off) {
            ("active", _) => format!("armed, it bites after {timeout}"),
            (_, true) => "not armed, as the kernel's command line says".to_owned(),
            (state, false) => format!("not armed ({state})"),
        };
        Check::that("watchdog", is_right, format!("{name}, {how}{last}"))
    }

    /// The hottest part.
    pub fn thermal(&self) -> Check {
        let folder = "sys/class/thermal";
        let zone = |name: &String| {
            let degrees: i64 = self.number(&format!("{folder}/{name}/temp"))?;
            Some((degrees, self.read(&format!("{folder}/{name}/type")).unwrap_or_else(|| name.clone())))
        };
        match self.names(folder, "thermal_zone").iter().filter_map(zone).max() {
            Some((degrees, kind)) => {
                let found = format!("{kind} {}.{} degrees", degrees / 1000, degrees.rem_euclid(1000) / 100);
                Check::that("thermal", degrees < HOT_MILLIDEGREES, found)
            }
            None => Check::not_here("thermal", "no thermal zones"),
        }
    }

    /// Whether something holds the clock down now: too hot, or on a Raspberry Pi too little voltage.
    pub fn throttling(&self) -> Check {
        let devices = self.names("sys/class/thermal", "cooling_device");
        let cooling = devices.iter().filter_map(|name| {
            let folder = format!("sys/class/thermal/{name}");
            let kind = self.read(&format!("{folder}/type"))?;
            let state: u64 = self.number(&format!("{folder}/cur_state"))?;
            // A fan at work is no fault.
            (kind.starts_with("cpufreq") || kind == "Processor").then_some((kind, state))
        });
        let cooling: Vec<(String, u64)> = cooling.collect();
        let voltage = self.names("sys/class/hwmon", "hwmon").into_iter().find_map(|name| {
            let folder = format!("sys/class/hwmon/{name}");
            (self.read(&format!("{folder}/name"))? == "rpi_volt")
                .then(|| self.read(&format!("{folder}/in0_lcrit_alarm")))?
        });
        let too_low = voltage.as_deref() == Some("1");
        if cooling.is_empty() && voltage.is_none() {
            return Check::not_here("throttling", "nothing tells");
        }
        let slowed: Vec<&str> = cooling.iter().filter(|(_, state)| *state > 0).map(|(kind, _)| kind.as_str()).collect();
        let found = match (slowed.is_empty(), too_low) {
            (true, false) => "none".to_owned(),
            (true, true) => "the supply's voltage was too low since the start".to_owned(),
            (false, _) => format!(
                "{} slowed down by heat{}",
                slowed.join(", "),
                if too_low { ", and the voltage was too low" } else { "" }
            ),
        };
        Check::that("throttling", slowed.is_empty() && !too_low, found)
    }
}

/// Cores in a list such as `0-3,5`.
fn cores_in(list: &str) -> Option<usize> {
    list.split(',').try_fold(0usize, |sum, range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        sum.checked_add(last.checked_sub(first)?.checked_add(1)?)
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::report::Verdict::{self, Fail, NotHere, Pass};
    use super::*;

    /// A board whose files are `files`.
    fn board(files: &[(&str, &str)]) -> (tempfile::TempDir, Machine) {
        let folder = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let machine = Machine::at(folder.path());
        (folder, machine)
    }

    fn seen(check: &Check) -> (Verdict, &str) {
        (check.verdict, &check.found)
    }

    const PI4: [(&str, &str); 20] = [
        ("proc/device-tree/model", "Raspberry Pi 4 Model B Rev 1.4\0"),
        ("proc/sys/kernel/osrelease", "6.12.57\n"),
        ("proc/cpuinfo", "processor\t: 0\nFeatures\t: fp asimd evtstrm crc32 cpuid\nCPU part\t: 0xd08\n"),
        ("proc/meminfo", "MemTotal:  1000000 kB\nMemAvailable:  900000 kB\n"),
        (
            "proc/pressure/cpu",
            "some avg10=1.50 avg60=0.00 avg300=0.00 total=1\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
        ),
        (
            "proc/pressure/memory",
            "some avg10=0.00 avg60=0.00 avg300=0.00 total=1\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
        ),
        (
            "proc/pressure/io",
            "some avg10=2.00 avg60=0.00 avg300=0.00 total=1\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
        ),
        ("sys/devices/system/cpu/online", "0-3\n"),
        ("sys/devices/system/cpu/present", "0-3\n"),
        ("sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq", "1800000\n"),
        ("sys/devices/system/cpu/cpufreq/policy0/cpuinfo_min_freq", "600000\n"),
        ("sys/devices/system/cpu/cpufreq/policy0/cpuinfo_max_freq", "1800000\n"),
        ("sys/devices/system/cpu/cpufreq/policy0/scaling_governor", "performance\n"),
        ("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n"),
        ("sys/class/watchdog/watchdog0/identity", "Broadcom BCM2835 Watchdog timer\n"),
        ("sys/class/watchdog/watchdog0/state", "active\n"),
        ("sys/class/watchdog/watchdog0/timeout", "15\n"),
        ("sys/class/thermal/thermal_zone0/temp", "48312\n"),
        ("sys/class/thermal/thermal_zone0/type", "cpu-thermal\n"),
        ("sys/class/tty/console/active", "tty0 ttyAMA0\n"),
    ];

    #[test]
    fn a_board_as_it_should_be() {
        let (_folder, machine) = board(&PI4);
        assert_eq!(seen(&machine.board()), (Pass, "Raspberry Pi 4 Model B Rev 1.4"));
        assert_eq!(seen(&machine.cpu()), (Pass, "Cortex-A72: fp asimd crc32"));
        assert!(machine.cores().found.starts_with("4 of 4 on, "));
        assert_eq!(seen(&machine.clock()), (Pass, "1800 MHz of 600 to 1800, governor performance"));
        assert_eq!(seen(&machine.memory()), (Pass, "878 MiB available of 976"));
        assert_eq!(machine.memory_bytes(), Some(1_024_000_000));
        assert!(machine.pages().found.ends_with("KiB, large pages madvise"));
        assert_eq!(seen(&machine.pressure()), (Pass, "cpu 1.5 %, memory 0 %, io 2 % of the last 10 s waited"));
        assert_eq!(machine.console(), Some("/dev/ttyAMA0".into()));
        assert_eq!(
            seen(&machine.watchdog(true)),
            (Pass, "Broadcom BCM2835 Watchdog timer, armed, it bites after 15 s")
        );
        assert_eq!(seen(&machine.thermal()), (Pass, "cpu-thermal 48.3 degrees"));
        assert_eq!(machine.throttling().verdict, NotHere);
        assert!(machine.kernel().found.starts_with("Linux 6.12.57, "));
        assert_eq!(machine.kernels().verdict, Pass);
    }

    #[test]
    fn what_is_wrong_with_a_board_is_seen() {
        let wrong = [
            ("sys/devices/system/cpu/online", "0,2-3\n"),
            ("sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq", "600000\n"),
            ("sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]\n"),
            ("sys/class/watchdog/watchdog0/state", "inactive\n"),
            ("sys/class/thermal/thermal_zone1/temp", "85000\n"),
            ("sys/class/thermal/cooling_device0/type", "cpufreq-cpu0\n"),
            ("sys/class/thermal/cooling_device0/cur_state", "2\n"),
            ("sys/class/hwmon/hwmon1/name", "rpi_volt\n"),
            ("sys/class/hwmon/hwmon1/in0_lcrit_alarm", "1\n"),
            ("proc/pressure/memory", "some avg10=60.00 total=1\nfull avg10=55.00 total=0\n"),
        ];
        let (_folder, machine) = board(&[&PI4[..], &wrong].concat());
        assert_eq!(machine.cores().verdict, Fail);
        assert_eq!(machine.clock().verdict, Fail);
        assert_eq!(machine.pages().verdict, Fail);
        assert_eq!(machine.watchdog(true).verdict, Fail);
        assert_eq!(seen(&machine.watchdog(false)), (Pass, "Broadcom BCM2835 Watchdog timer, not armed (inactive)"));
        assert_eq!(seen(&machine.thermal()), (Fail, "thermal_zone1 85.0 degrees"));
        assert_eq!(
            seen(&machine.throttling()),
            (Fail, "cpufreq-cpu0 slowed down by heat, and the voltage was too low")
        );
        assert_eq!(machine.pressure().verdict, Fail);
    }

    #[test]
    fn a_machine_that_tells_nothing_has_nothing_wrong_with_it() {
        let (_folder, machine) = board(&[]);
        let all = [
            machine.board(),
            machine.kernel(),
            machine.cpu(),
            machine.cores(),
            machine.clock(),
            machine.memory(),
            machine.pressure(),
            machine.watchdog(true),
            machine.thermal(),
            machine.throttling(),
        ];
        assert!(all.iter().all(|check| check.verdict == NotHere), "{all:?}");
        assert_eq!((machine.console(), machine.memory_bytes()), (None, None));
        assert_eq!(machine.pages().verdict, Pass);
    }

    #[test]
    fn a_watchdog_that_somebody_switched_off_is_no_fault() {
        let off =
            [("sys/class/watchdog/watchdog0/state", "inactive\n"), ("proc/cmdline", "quiet hearth.watchdog=off\n")];
        let (_folder, machine) = board(&off);
        assert_eq!(seen(&machine.watchdog(true)), (Pass, "unknown, not armed, as the kernel's command line says"));
    }

    #[test]
    fn a_ttys_driver_is_found_behind_its_port() {
        let (folder, machine) = board(&[("sys/devices/uart/uart:0/uart:0.0/type", "pl011\n")]);
        let sys = folder.path().join("sys");
        let link = |to: &str, at: &str| {
            let at = sys.join(at);
            fs::create_dir_all(at.parent().unwrap()).unwrap();
            std::os::unix::fs::symlink(to, at).unwrap();
        };
        link("../../../devices/uart/uart:0/uart:0.0", "class/tty/ttyAMA0/device");
        assert_eq!(machine.tty_driver(Path::new("/dev/ttyAMA0")), None);
        link("../../../../bus/serial-base/drivers/port", "devices/uart/uart:0/uart:0.0/driver");
        link("../../bus/amba/drivers/uart-pl011", "devices/uart/driver");
        assert_eq!(machine.tty_driver(Path::new("/dev/ttyAMA0")).as_deref(), Some("uart-pl011"));
        // Older kernels have no port.
        fs::remove_file(sys.join("devices/uart/uart:0/uart:0.0/driver")).unwrap();
        link("../../../../bus/amba/drivers/other", "devices/uart/uart:0/uart:0.0/driver");
        assert_eq!(machine.tty_driver(Path::new("/dev/ttyAMA0")).as_deref(), Some("other"));
        assert_eq!(machine.tty_driver(Path::new("/dev/ttyS9")), None);
    }

    #[test]
    fn lists_of_cores_are_counted_and_noise_is_not() {
        assert_eq!((cores_in("0"), cores_in("0-3"), cores_in("0-1,4,6-7")), (Some(1), Some(4), Some(5)));
        for noise in ["", "x", "3-1", "0-18446744073709551615,0"] {
            assert_eq!(cores_in(noise), None, "{noise}");
        }
    }
}
