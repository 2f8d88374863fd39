//! `hearth chat`: a conversation in the terminal, or line by line from a pipe.
//! Next on the data's way: `client::http`.

use std::io::{self, BufRead, IsTerminal, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustyline::error::ReadlineError;
use rustyline::history::MemHistory;
use rustyline::{Config, Editor};
use signal_hook::consts::SIGINT;

use super::http::{Ended, ask_streaming};
use super::{ClientError, TalkArgs, terminal_safe};
use crate::wire::Message;

/// Talks with the model: the conversation is kept until /reset.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct ChatArgs {
    /// Whom to talk with, and how.
    #[command(flatten)]
    pub talk: TalkArgs,
}

/// `hearth chat` with the daemon at `socket`.
///
/// # Errors
/// See [`ClientError`]. A refused question is printed and the conversation goes on.
pub fn chat_over(socket: &Path, args: &ChatArgs) -> Result<(), ClientError> {
    let mut out = io::stdout();
    if !io::stdin().is_terminal() {
        return chat_lines(socket, args, io::stdin().lock(), &mut out);
    }
    in_terminal(socket, args, &mut out)
}

/// The same for lines from a pipe or a file.
///
/// # Errors
/// See [`ClientError`].
pub fn chat_lines(socket: &Path, args: &ChatArgs, input: impl BufRead, out: &mut dyn Write) -> Result<(), ClientError> {
    let never = AtomicBool::new(false);
    let mut talk = Talk::new(socket, args, &never);
    for line in input.lines() {
        if talk.line(&line.map_err(ClientError::Input)?, out)? == Next::Quit {
            break;
        }
    }
    Ok(())
}

fn in_terminal(socket: &Path, args: &ChatArgs, out: &mut dyn Write) -> Result<(), ClientError> {
    let config = Config::builder().auto_add_history(true).build();
    let mut editor = Editor::<(), MemHistory>::with_history(config, MemHistory::new())?;
    // After the editor, which takes SIGINT for itself when it is made: the later handler hears it first and passes it on.
    let cancel = Arc::new(AtomicBool::new(false));
    let handler = signal_hook::flag::register(SIGINT, Arc::clone(&cancel)).map_err(ClientError::Input)?;
    let result = talk_in_terminal(&mut editor, &mut Talk::new(socket, args, &cancel), out);
    signal_hook::low_level::unregister(handler);
    result
}

fn talk_in_terminal(
    editor: &mut Editor<(), MemHistory>,
    talk: &mut Talk<'_>,
    out: &mut dyn Write,
) -> Result<(), ClientError> {
    say(out, "^C cancels an answer, /reset forgets the conversation, /quit or ^D ends.\n")?;
    loop {
        match editor.readline("> ") {
            Ok(line) => {
                if talk.line(&line, out)? == Next::Quit {
                    return Ok(());
                }
            }
            Err(ReadlineError::Interrupted) => {}
            Err(ReadlineError::Eof) => return Ok(()),
            Err(e) => return Err(e.into()),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    GoOn,
    Quit,
}

/// The conversation.
struct Talk<'a> {
    socket: &'a Path,
    args: &'a ChatArgs,
    cancel: &'a AtomicBool,
    messages: Vec<Message>,
}

impl<'a> Talk<'a> {
    fn new(socket: &'a Path, args: &'a ChatArgs, cancel: &'a AtomicBool) -> Self {
        Self { socket, args, cancel, messages: args.talk.system.iter().map(Message::system).collect() }
    }

    /// What one typed line does.
    fn line(&mut self, line: &str, out: &mut dyn Write) -> Result<Next, ClientError> {
        match line.trim() {
            "" => {}
            "/quit" | "/exit" => return Ok(Next::Quit),
            "/reset" => {
                self.messages.retain(|m| m.role == "system");
                say(out, "the conversation is forgotten\n")?;
            }
            command if command.starts_with('/') => say(out, "there are /reset and /quit\n")?,
            question => self.question(question, out)?,
        }
        Ok(Next::GoOn)
    }

    fn question(&mut self, text: &str, out: &mut dyn Write) -> Result<(), ClientError> {
        self.messages.push(Message::user(text));
        let question = self.args.talk.question(self.messages.clone());
        self.cancel.store(false, Ordering::Relaxed);
        let mut answer = String::new();
        let ended = ask_streaming(self.socket, &question, self.cancel, |text| {
            answer.push_str(text);
            say(out, &terminal_safe(text))
        });
        let ended = match ended {
            Err(ClientError::Refused { status, message }) => {
                self.messages.pop();
                return say(out, &format!("error ({status}): {message}\n"));
            }
            // ^C before the answer began.
            Err(ClientError::Connection(_)) if self.cancel.load(Ordering::Relaxed) => Ended::Cancelled,
            other => other?,
        };
        if answer.is_empty() {
            self.messages.pop();
        } else {
            self.messages.push(Message::assistant(answer));
        }
        say(out, if ended == Ended::Cancelled { "\n[cancelled]\n" } else { "\n" })?;
        if ended == Ended::Length {
            eprintln!("hearth: {}", self.args.talk.cut());
        }
        Ok(())
    }
}

fn say(out: &mut dyn Write, text: &str) -> Result<(), ClientError> {
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(ClientError::Output)
}
