//! A person's keys at a serial line: bytes to [`Key`]s, keys to an edited line and its echo. Next on the data's way:
//! `wire::line`, which says what a finished line means.

use std::collections::VecDeque;

use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

/// Lines that arrow up reaches.
pub const MAX_HISTORY_LINES: usize = 32;
/// An escape sequence, in bytes; a longer one is noise.
const MAX_ESCAPE_BYTES: usize = 16;
/// Escape sequences without a meaning that one line may have; more are noise.
const MAX_UNKNOWN_ESCAPES: usize = 16;

/// What one or more bytes of input mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Key {
    Char(char),
    Enter,
    Interrupt,
    Backspace,
    Delete,
    KillLine,
    KillWord,
    KillEnd,
    Left,
    Right,
    Home,
    End,
    Up,
    Down,
    /// No meaning, no harm.
    Nothing,
    /// Not something a terminal sends: the rest of the line is dropped.
    Noise(u8),
}

/// Assembles UTF-8 characters and escape sequences.
#[derive(Debug, Default)]
pub(super) struct KeyDecoder {
    state: Decode,
    unknown_escapes: usize,
}

#[derive(Debug, Default)]
enum Decode {
    #[default]
    Ground,
    Utf8 {
        bytes: [u8; 4],
        have: usize,
        need: usize,
    },
    Escape,
    /// ESC [ or ESC O, the parameter so far, and the bytes seen.
    Sequence {
        parameter: u16,
        seen: usize,
    },
}

impl KeyDecoder {
    /// The key that `byte` completes, if it completes one.
    pub(super) fn push(&mut self, byte: u8) -> Option<Key> {
        match std::mem::take(&mut self.state) {
            Decode::Ground => self.ground(byte),
            Decode::Utf8 { mut bytes, have, need } => {
                if byte & 0xC0 != 0x80 {
                    return Some(Key::Noise(byte));
                }
                if let Some(slot) = bytes.get_mut(have) {
                    *slot = byte;
                }
                let have = have + 1;
                if have < need {
                    self.state = Decode::Utf8 { bytes, have, need };
                    return None;
                }
                let text = bytes.get(..need).and_then(|b| std::str::from_utf8(b).ok());
                match text.and_then(|t| t.chars().next()) {
                    Some(c) if !c.is_control() => Some(Key::Char(c)),
                    _ => Some(Key::Noise(byte)),
                }
            }
            Decode::Escape => match byte {
                b'[' | b'O' => {
                    self.state = Decode::Sequence { parameter: 0, seen: 0 };
                    None
                }
                0x20..=0x7E => Some(self.unknown(byte)),
                // A lone ESC key: the byte after it keeps its meaning.
                _ => match self.unknown(0x1B) {
                    Key::Nothing => self.ground(byte),
                    noise => Some(noise),
                },
            },
            Decode::Sequence { parameter, seen } => match byte {
                b'0'..=b'9' | b';' if seen < MAX_ESCAPE_BYTES => {
                    let parameter = match byte {
                        b';' => parameter,
                        digit => parameter.saturating_mul(10).saturating_add(u16::from(digit - b'0')),
                    };
                    self.state = Decode::Sequence { parameter, seen: seen + 1 };
                    None
                }
                b'A' => Some(Key::Up),
                b'B' => Some(Key::Down),
                b'C' => Some(Key::Right),
                b'D' => Some(Key::Left),
                b'H' => Some(Key::Home),
                b'F' => Some(Key::End),
                b'~' => Some(match parameter {
                    1 | 7 => Key::Home,
                    4 | 8 => Key::End,
                    3 => Key::Delete,
                    _ => self.unknown(byte),
                }),
                0x40..=0x7D => Some(self.unknown(byte)),
                _ => Some(Key::Noise(byte)),
            },
        }
    }

    /// Forgets a half-read key; call at a line's end.
    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }

    fn ground(&mut self, byte: u8) -> Option<Key> {
        Some(match byte {
            b'\r' | b'\n' => Key::Enter,
            0x01 => Key::Home,
            0x02 => Key::Left,
            0x03 => Key::Interrupt,
            0x05 => Key::End,
            0x06 => Key::Right,
            0x08 | 0x7F => Key::Backspace,
            b'\t' => Key::Char(' '),
            0x0B => Key::KillEnd,
            0x0E => Key::Down,
            0x10 => Key::Up,
            0x15 => Key::KillLine,
            0x17 => Key::KillWord,
            // ^D must not end a console that nobody can restart; ^L has no screen; ^Q and ^S are flow control.
            0x04 | 0x0C | 0x11 | 0x13 => Key::Nothing,
            0x1B => {
                self.state = Decode::Escape;
                return None;
            }
            0x20..=0x7E => Key::Char(char::from(byte)),
            0xC2..=0xF4 => {
                let need = match byte {
                    0xC2..=0xDF => 2,
                    0xE0..=0xEF => 3,
                    _ => 4,
                };
                self.state = Decode::Utf8 { bytes: [byte, 0, 0, 0], have: 1, need };
                return None;
            }
            _ => Key::Noise(byte),
        })
    }

    fn unknown(&mut self, byte: u8) -> Key {
        self.unknown_escapes += 1;
        if self.unknown_escapes > MAX_UNKNOWN_ESCAPES { Key::Noise(byte) } else { Key::Nothing }
    }
}

/// One line being edited, and the lines before it. Echo assumes that the line fits the terminal's width.
/// Invariant: `cursor` is a character boundary of `text`.
#[derive(Debug, Default)]
pub(super) struct Editor {
    text: String,
    cursor: usize,
    history: VecDeque<String>,
    /// Steps back in history, and the line that was begun before them.
    back: usize,
    draft: String,
}

impl Editor {
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// Ends the line and keeps it in the history.
    pub(super) fn take(&mut self) -> String {
        let line = std::mem::take(&mut self.text);
        self.clear();
        if !line.trim().is_empty() && self.history.back() != Some(&line) {
            if self.history.len() == MAX_HISTORY_LINES {
                self.history.pop_front();
            }
            self.history.push_back(line.clone());
        }
        line
    }

    /// Forgets the line.
    pub(super) fn clear(&mut self) {
        self.text.clear();
        self.cursor = 0;
        self.back = 0;
        self.draft.clear();
    }

    /// Applies an editing key and echoes what changed.
    pub(super) fn key(&mut self, key: Key, out: &mut Vec<u8>) {
        match key {
            Key::Char(c) => {
                self.text.insert(self.cursor, c);
                self.cursor += c.len_utf8();
                let mut utf8 = [0; 4];
                out.extend_from_slice(c.encode_utf8(&mut utf8).as_bytes());
                self.redraw_tail(out);
            }
            Key::Backspace => self.erase_from(self.previous(), out),
            Key::Delete => {
                let next = self.next();
                if next > self.cursor {
                    self.text.replace_range(self.cursor..next, "");
                    self.redraw_tail_cleared(out);
                }
            }
            Key::KillLine => self.erase_from(0, out),
            Key::KillWord => {
                let head = self.text[..self.cursor].trim_end();
                let start = head.rfind(char::is_whitespace).map_or(0, |at| at + first_len(&head[at..]));
                self.erase_from(start, out);
            }
            Key::KillEnd => {
                self.text.truncate(self.cursor);
                out.extend_from_slice(b"\x1b[K");
            }
            Key::Left => self.move_to(self.previous(), out),
            Key::Right => self.move_to(self.next(), out),
            Key::Home => self.move_to(0, out),
            Key::End => self.move_to(self.text.len(), out),
            Key::Up if self.back < self.history.len() => self.recall(self.back + 1, out),
            Key::Down if self.back > 0 => self.recall(self.back - 1, out),
            Key::Up | Key::Down | Key::Enter | Key::Interrupt | Key::Nothing | Key::Noise(_) => {}
        }
    }

    fn recall(&mut self, back: usize, out: &mut Vec<u8>) {
        if self.back == 0 {
            self.draft.clone_from(&self.text);
        }
        self.back = back;
        let line = match self.history.len().checked_sub(back).and_then(|at| self.history.get(at)) {
            Some(line) if back > 0 => line.clone(),
            _ => std::mem::take(&mut self.draft),
        };
        self.move_to(0, out);
        out.extend_from_slice(line.as_bytes());
        out.extend_from_slice(b"\x1b[K");
        self.cursor = line.len();
        self.text = line;
    }

    fn previous(&self) -> usize {
        self.text[..self.cursor].char_indices().next_back().map_or(0, |(at, _)| at)
    }

    fn next(&self) -> usize {
        self.cursor + first_len(&self.text[self.cursor..])
    }

    fn move_to(&mut self, to: usize, out: &mut Vec<u8>) {
        if to < self.cursor {
            step_back(self.text[to..self.cursor].width(), out);
        } else {
            out.extend_from_slice(&self.text.as_bytes()[self.cursor..to]);
        }
        self.cursor = to;
    }

    fn erase_from(&mut self, start: usize, out: &mut Vec<u8>) {
        if start == self.cursor {
            return;
        }
        let end = self.cursor;
        self.move_to(start, out);
        self.text.replace_range(start..end, "");
        self.redraw_tail_cleared(out);
    }

    /// Prints what stands behind the cursor and steps back to it.
    fn redraw_tail(&self, out: &mut Vec<u8>) {
        let tail = &self.text[self.cursor..];
        out.extend_from_slice(tail.as_bytes());
        step_back(tail.width(), out);
    }

    fn redraw_tail_cleared(&self, out: &mut Vec<u8>) {
        let tail = &self.text[self.cursor..];
        out.extend_from_slice(tail.as_bytes());
        out.extend_from_slice(b"\x1b[K");
        step_back(tail.width(), out);
    }
}

fn first_len(text: &str) -> usize {
    text.chars().next().map_or(0, char::len_utf8)
}

fn step_back(columns: usize, out: &mut Vec<u8>) {
    out.resize(out.len().saturating_add(columns), 0x08);
}

/// Appends the model's text for a terminal: line feeds become CR LF, other control characters go, so that no answer can
/// send a terminal an escape sequence.
pub(super) fn write_for_terminal(text: &str, out: &mut Vec<u8>) {
    let mut utf8 = [0; 4];
    for c in text.chars() {
        match c {
            '\n' => out.extend_from_slice(b"\r\n"),
            '\t' => out.push(b'\t'),
            c if c.width().is_none() => {}
            c => out.extend_from_slice(c.encode_utf8(&mut utf8).as_bytes()),
        }
    }
}
