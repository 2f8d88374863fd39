//! The power button, where the board has one: an input device of the kernel's that can send KEY_POWER, as the Pi 5's button and
//! QEMU's virt have. Other keys of such a device, and other devices, are not listened to. Asked by `init::supervise` and
//! `init::rescue`, which then switch the machine off in order.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::fcntl::OFlag;

/// Where the kernel shows input devices as files, and what each can send.
pub const DEVICES: &str = "/dev/input";
/// See [`DEVICES`].
pub const CLASS: &str = "/sys/class/input";
/// Most devices that are opened.
pub const MAX_DEVICES: usize = 16;

/// `struct input_event` of linux/input.h on a 64-bit kernel: two words of time, then type and code (u16), value (i32).
const EVENT_BYTES: usize = 24;
/// `EV_KEY` and `KEY_POWER` of linux/input-event-codes.h.
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;
/// The value of a key that went down; 0 is up, 2 a repetition.
const DOWN: i32 = 1;
/// Events taken at once.
const BATCH: usize = 16;

/// The board's power buttons.
#[derive(Debug, Default)]
pub struct Buttons {
    devices: Vec<File>,
}

impl Buttons {
    /// Those that the board has now; what cannot be opened is none.
    pub fn find(devices: &Path, class: &Path) -> Self {
        let mut names: Vec<_> = fs::read_dir(devices).into_iter().flatten().flatten().map(|e| e.file_name()).collect();
        names.sort_unstable();
        let has_power_key = |name: &&std::ffi::OsString| {
            let keys = fs::read_to_string(class.join(name).join("device/capabilities/key"));
            name.as_encoded_bytes().starts_with(b"event") && has_key(&keys.unwrap_or_default(), KEY_POWER)
        };
        let open = |name: &std::ffi::OsString| {
            OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(devices.join(name)).ok()
        };
        Self { devices: names.iter().filter(has_power_key).filter_map(open).take(MAX_DEVICES).collect() }
    }

    /// What to wait for.
    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.devices.iter().map(AsFd::as_fd)
    }

    /// Whether one was pressed since the last look; takes all that waits. A device that is gone is let go.
    pub fn pressed(&mut self) -> bool {
        let mut pressed = false;
        self.devices.retain_mut(|device| {
            let mut bytes = [0; EVENT_BYTES * BATCH];
            loop {
                match device.read(&mut bytes) {
                    Ok(0) => return false,
                    // The kernel gives whole events alone.
                    Ok(count) => pressed |= bytes[..count].as_chunks::<EVENT_BYTES>().0.iter().any(is_power_down),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
                }
            }
        });
        pressed
    }
}

fn is_power_down(event: &[u8; EVENT_BYTES]) -> bool {
    let [.., k0, k1, c0, c1, v0, v1, v2, v3] = *event;
    u16::from_ne_bytes([k0, k1]) == EV_KEY
        && u16::from_ne_bytes([c0, c1]) == KEY_POWER
        && i32::from_ne_bytes([v0, v1, v2, v3]) == DOWN
}

/// Whether the kernel's bit mask, words of 64 bits in hexadecimal with the highest first, has a key.
fn has_key(mask: &str, key: u16) -> bool {
    let word = mask.split_whitespace().rev().nth(usize::from(key / 64));
    word.and_then(|word| u64::from_str_radix(word, 16).ok()).is_some_and(|word| word >> (key % 64) & 1 == 1)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn event(kind: u16, code: u16, value: i32) -> Vec<u8> {
        [&[7; 16][..], &kind.to_ne_bytes(), &code.to_ne_bytes(), &value.to_ne_bytes()].concat()
    }

    #[test]
    fn only_devices_with_a_power_key_are_opened() {
        let folder = tempfile::tempdir().unwrap();
        let (devices, class) = (folder.path().join("input"), folder.path().join("class"));
        assert!(Buttons::find(&devices, &class).devices.is_empty());
        fs::create_dir(&devices).unwrap();
        // A power button as QEMU's virt shows it, a mouse, a keyboard without that key, something without a word.
        let masks = [("event0", "10000000000000 0\n"), ("event1", "70000 0 0 0 0\n"), ("event2", "fffffffffffffffe\n")];
        for (name, mask) in masks {
            fs::create_dir_all(class.join(name).join("device/capabilities")).unwrap();
            fs::write(class.join(name).join("device/capabilities/key"), mask).unwrap();
        }
        for name in ["event0", "event1", "event2", "event3", "mice"] {
            fs::write(devices.join(name), "").unwrap();
        }
        assert_eq!(Buttons::find(&devices, &class).devices.len(), 1);
    }

    #[test]
    fn a_press_is_told_once_and_a_release_or_another_key_is_none() {
        let (reader, writer) = nix::unistd::pipe2(OFlag::O_NONBLOCK).unwrap();
        let mut buttons = Buttons { devices: vec![File::from(reader)] };
        assert!(!buttons.pressed());
        let others = [event(EV_KEY, KEY_POWER, 0), event(EV_KEY, 30, DOWN), event(4, KEY_POWER, DOWN), event(0, 0, 0)];
        nix::unistd::write(&writer, &others.concat()).unwrap();
        assert!(!buttons.pressed());
        let press = [event(EV_KEY, KEY_POWER, DOWN), event(0, 0, 0), event(EV_KEY, KEY_POWER, 0)];
        nix::unistd::write(&writer, &press.concat()).unwrap();
        assert!(buttons.pressed() && !buttons.pressed());
        assert_eq!(buttons.fds().count(), 1);
        drop(writer);
        assert!(!buttons.pressed() && buttons.devices.is_empty());
    }
}
