//! census: who lives on a running board. Started as PID 1 by the kernel (`rdinit=/census`), it leaves a copy of itself behind and becomes
//! `/init`; the copy waits until `hearth: ready` can have been said, then prints what /proc knows of processes and sockets and which
//! families of sockets the kernel makes at all. Built and read by `tests/census`.

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

/// Names and numbers of the families that are asked for.
const FAMILIES: [(&str, i32); 8] = [
    ("unix", 1),
    ("inet", 2),
    ("inet6", 10),
    ("netlink", 16),
    ("packet", 17),
    ("can", 29),
    ("bluetooth", 31),
    ("vsock", 40),
];
/// SOCK_DGRAM and SOCK_RAW: one of them exists in each family.
const KINDS: [i32; 2] = [2, 3];
/// How long a board may take until both processes are there.
const PATIENCE_S: u64 = 60;
/// How long they are then left to do what they do after "ready".
const REST: Duration = Duration::from_secs(2);

unsafe extern "C" {
    fn socket(family: i32, kind: i32, protocol: i32) -> i32;
}

fn main() {
    if std::process::id() != 1 {
        count();
        return;
    }
    let copy = Command::new("/census").arg("copy").spawn();
    let error = Command::new("/init").arg0("init").exec();
    println!("census: {copy:?}, {error}");
}

/// Process ids and command lines of everything but the kernel's own threads and this process.
fn processes() -> Vec<(u32, String)> {
    let ids = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let with_command = |id: u32| {
        let command = fs::read_to_string(format!("/proc/{id}/cmdline")).ok()?.replace('\0', " ");
        (id != std::process::id() && !command.is_empty()).then_some((id, command))
    };
    let mut found: Vec<_> = ids.filter_map(with_command).collect();
    found.sort();
    found
}

fn count() {
    for _ in 0..PATIENCE_S {
        std::thread::sleep(Duration::from_secs(1));
        if fs::read_to_string("/proc/net/unix").is_ok_and(|sockets| sockets.contains("hearth.sock")) {
            break;
        }
    }
    std::thread::sleep(REST);
    for (id, command) in processes() {
        println!("census: process {id} {command}");
    }
    for name in ["tcp", "tcp6", "udp", "udp6", "raw", "raw6", "icmp", "packet", "netlink", "unix"] {
        // Without a head line; a file that is not there is of a family that is not there.
        for line in fs::read_to_string(format!("/proc/net/{name}")).unwrap_or_default().lines().skip(1) {
            println!("census: socket {name} {line}");
        }
    }
    for (name, family) in FAMILIES {
        // SAFETY: three numbers go in and a number comes out; the descriptor ends with this process.
        let made = KINDS.iter().any(|kind| unsafe { socket(family, *kind, 0) } >= 0);
        println!("census: family {name} {}", if made { "yes" } else { "no" });
    }
    println!("census: end");
}
