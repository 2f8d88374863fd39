//! What `hearth serve` and the process that supervises it say to each other: messages of a fixed size over a socket that keeps their
//! boundaries, which the child finds as its standard input. Next on the data's way: `init::supervise`, which judges by them.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use std::os::fd::AsRawFd;
use std::time::Duration;

use crate::sys::marks::{Mark, Stage};
use crate::sys::settings::Change;

/// Size of every message, in bytes.
pub const MESSAGE_BYTES: usize = 16;
/// How often the child says how far it is.
pub const BEAT_EVERY: Duration = Duration::from_millis(500);
/// How long the child waits at most until its being ready was taken notice of.
pub const READY_SEEN_TIMEOUT: Duration = Duration::from_secs(1);

/// The first byte of a message: this protocol, this version.
const MAGIC: u8 = 0xA1;

/// One message.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Message {
    /// The child takes requests from now on.
    Ready,
    /// The supervisor has read [`Message::Ready`].
    ReadySeen,
    /// How far the child is.
    Beat {
        /// Operations of the engine since its start: one that computes counts up several hundred times a step.
        operations: u64,
        /// Requests are waiting or under way.
        busy: bool,
    },
    /// The console asks to switch the machine off.
    PowerOff,
    /// The console asks to start the machine again.
    Reboot,
    /// Run a self-test: on the console, or for the socket alone.
    Selftest {
        /// Somebody at the console reads along.
        shown: bool,
    },
    /// The self-test that the console asked for is over.
    SelftestOver,
    /// The child came by a stage of its start.
    Reached(Stage, Mark),
    /// Keep this over a restart; the answer is [`Message::Kept`].
    Keep(Change),
    /// The change is on the card, or is not.
    Kept {
        /// What the kernel said; 0: it is.
        errno: u32,
    },
}

/// Where the stage stands in a message's number, in front of its mark.
const STAGE_SHIFT: u32 = 60;

impl Message {
    /// The message's bytes.
    pub fn encode(self) -> [u8; MESSAGE_BYTES] {
        let (kind, busy, operations) = match self {
            Self::Ready => (1, false, 0),
            Self::ReadySeen => (2, false, 0),
            Self::Beat { operations, busy } => (3, busy, operations),
            Self::PowerOff => (4, false, 0),
            Self::Reboot => (5, false, 0),
            Self::Selftest { shown } => (16, shown, 0),
            Self::SelftestOver => (17, false, 0),
            Self::Reached(stage, mark) => (18, false, (stage as u64) << STAGE_SHIFT | mark.to_bits()),
            Self::Keep(change) => (32, false, change.to_bits()),
            Self::Kept { errno } => (33, false, u64::from(errno)),
        };
        let mut bytes = [0; MESSAGE_BYTES];
        bytes[..3].copy_from_slice(&[MAGIC, kind, u8::from(busy)]);
        bytes[8..].copy_from_slice(&operations.to_le_bytes());
        bytes
    }

    /// The message that `bytes` are; `None` where they are none.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let [MAGIC, kind, busy @ (0 | 1), 0, 0, 0, 0, 0, operations @ ..] = bytes else { return None };
        let operations = u64::from_le_bytes(operations.try_into().ok()?);
        match (kind, busy, operations) {
            (1, 0, 0) => Some(Self::Ready),
            (2, 0, 0) => Some(Self::ReadySeen),
            (3, busy, operations) => Some(Self::Beat { operations, busy: *busy == 1 }),
            (4, 0, 0) => Some(Self::PowerOff),
            (5, 0, 0) => Some(Self::Reboot),
            (16, shown, 0) => Some(Self::Selftest { shown: *shown == 1 }),
            (17, 0, 0) => Some(Self::SelftestOver),
            (18, 0, bits) => {
                let stage = Stage::ALL.get(usize::try_from(bits >> STAGE_SHIFT).ok()?)?;
                Some(Self::Reached(*stage, Mark::from_bits(bits & ((1 << STAGE_SHIFT) - 1))))
            }
            (32, 0, bits) => Change::from_bits(bits).map(Self::Keep),
            (33, 0, errno) => u32::try_from(errno).ok().map(|errno| Self::Kept { errno }),
            _ => None,
        }
    }
}

/// One end of the line between the two. Neither end ever waits for the other.
#[derive(Debug)]
pub struct Line(OwnedFd);

impl Line {
    /// The supervisor's end, and the descriptor that becomes the child's standard input.
    ///
    /// # Errors
    /// No descriptors left.
    pub fn pair() -> Result<(Self, OwnedFd), Errno> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (ours, childs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        Ok((Self(ours), childs))
    }

    /// The child's end: its standard input.
    ///
    /// # Errors
    /// Standard input is no socket that speaks this: nobody supervises this process.
    pub fn from_stdin() -> io::Result<Self> {
        let line = Self(io::stdin().as_fd().try_clone_to_owned()?);
        line.send(Message::Beat { operations: 0, busy: false })?;
        Ok(line)
    }

    /// Sends a message. A line that is full or closed loses it: who supervises will notice by itself.
    ///
    /// # Errors
    /// The descriptor is no socket.
    pub fn send(&self, message: Message) -> Result<(), Errno> {
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        match send(self.0.as_raw_fd(), &message.encode(), flags) {
            Err(e @ (Errno::ENOTSOCK | Errno::EBADF)) => Err(e),
            _ => Ok(()),
        }
    }

    /// The next message, if there is one; bytes that are none are skipped.
    pub fn receive(&self) -> Option<Message> {
        loop {
            let mut bytes = [0; MESSAGE_BYTES + 1];
            match recv(self.0.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT) {
                Ok(0) => return None,
                Ok(n) => match Message::decode(bytes.get(..n).unwrap_or_default()) {
                    Some(message) => return Some(message),
                    None => continue,
                },
                Err(Errno::EINTR) => continue,
                Err(_) => return None,
            }
        }
    }

    /// Says that requests are taken, and waits until that was read, at most [`READY_SEEN_TIMEOUT`]: what the supervisor then says on
    /// the console stands before what the child says there.
    pub fn announce_ready(&self) {
        // The descriptor was a socket when the line was made.
        let _ = self.send(Message::Ready);
        let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut fds, PollTimeout::try_from(READY_SEEN_TIMEOUT).unwrap_or(PollTimeout::ZERO));
        let _ = self.receive();
    }
}

impl AsFd for Line {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const ALL: [Message; 13] = [
        Message::Ready,
        Message::ReadySeen,
        Message::Beat { operations: u64::MAX - 1, busy: true },
        Message::Beat { operations: 0, busy: false },
        Message::PowerOff,
        Message::Reboot,
        Message::Selftest { shown: true },
        Message::Selftest { shown: false },
        Message::SelftestOver,
        Message::Reached(
            Stage::FirstAnswer,
            Mark { at: Duration::from_micros(68_719_476_735), work: Duration::from_micros(1) },
        ),
        Message::Keep(Change::Temperature(Some(0.7))),
        Message::Keep(Change::MaxTokens(None)),
        Message::Kept { errno: 28 },
    ];

    #[test]
    fn messages_come_back_as_they_were_and_nothing_else_is_one() {
        for message in ALL {
            let bytes = message.encode();
            assert_eq!(Message::decode(&bytes), Some(message));
            assert_eq!(Message::decode(&bytes[..15]), None);
            assert_eq!(Message::decode(&[&bytes[..], &[0]].concat()), None);
            for at in 0..8 {
                let mut damaged = bytes;
                damaged[at] ^= 0x40;
                assert_eq!(Message::decode(&damaged), None, "byte {at} of {message:?}");
            }
        }
    }

    #[test]
    fn a_line_carries_messages_in_order_and_never_waits() {
        let (ours, childs) = Line::pair().unwrap();
        let childs = Line(childs);
        for message in ALL {
            childs.send(message).unwrap();
        }
        nix::unistd::write(&childs.0, b"noise").unwrap();
        childs.send(Message::Ready).unwrap();
        let received: Vec<_> = std::iter::from_fn(|| ours.receive()).collect();
        assert_eq!(received, [&ALL[..], &[Message::Ready]].concat());
        // Far more than the kernel keeps: the rest is lost, nobody waits.
        for _ in 0..100_000 {
            ours.send(Message::Ready).unwrap();
        }
        drop(ours);
        childs.send(Message::Ready).unwrap();
    }
}
