#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;
use crate::wire::Usage;

/// A line with somebody who answers every question with its own text in capitals.
struct Session {
    line: LineProtocol,
    out: Vec<u8>,
    asked: Vec<GenerateRequest>,
}

impl Session {
    fn new() -> Self {
        Self { line: LineProtocol::new("m"), out: Vec::new(), asked: Vec::new() }
    }

    /// Types `bytes`; what came back.
    fn say(&mut self, bytes: impl AsRef<[u8]>) -> String {
        self.push(bytes.as_ref());
        while let Some(event) = self.line.next_event(&mut self.out) {
            self.handle(event);
        }
        self.take()
    }

    fn push(&mut self, bytes: &[u8]) {
        self.line.push(bytes);
    }

    fn handle(&mut self, event: LineEvent) {
        match event {
            LineEvent::Ask(request) => {
                let text = last_text(&request).to_uppercase();
                self.asked.push(*request);
                self.line.delta(&text, &mut self.out);
                self.line.finish(&outcome(Finish::Stop), &mut self.out);
            }
            LineEvent::Cancel => panic!("nothing runs"),
            LineEvent::Settings => self.line.say("temperature 0", &mut self.out),
            LineEvent::Set(text) => self.line.say(&format!("kept: {text}"), &mut self.out),
            LineEvent::PowerOff => self.line.say("off", &mut self.out),
            LineEvent::Reboot => self.line.say("again", &mut self.out),
            LineEvent::BootReport => self.line.say("+0.4 PID 1\n+0.9 ready", &mut self.out),
            // Its report comes from elsewhere.
            LineEvent::Selftest => {}
            LineEvent::Log => self.line.say("app: one\napp: two", &mut self.out),
            LineEvent::Status => self.line.status(
                &Status {
                    model: "m".to_owned(),
                    context_tokens: 9,
                    active: 1,
                    waiting: 0,
                    uptime_s: 2,
                    draining: false,
                    check: Some(crate::wire::ModelCheck { damaged: vec!["tensor t".into()], ..Default::default() }),
                    failures: vec!["3 +1.500s serve ended: SIGKILL".into()],
                    apps: vec!["clock: running; user 1000, started 1 time".into()],
                    kv_free: 0,
                    kv_used: 0,
                    kv_cached: 0,
                },
                &mut self.out,
            ),
        }
    }

    fn take(&mut self) -> String {
        String::from_utf8(std::mem::take(&mut self.out)).unwrap()
    }

    /// The last question as the model would see it.
    fn last(&self) -> &[Message] {
        match &self.asked.last().unwrap().prompt {
            Prompt::Chat(messages) => messages,
            other => panic!("{other:?}"),
        }
    }
}

fn last_text(request: &GenerateRequest) -> &str {
    match &request.prompt {
        Prompt::Chat(messages) => &messages.last().unwrap().content,
        Prompt::Text(text) => text,
        Prompt::Tokens(_) => "tokens",
    }
}

fn outcome(finish: Finish) -> Outcome {
    Outcome { finish, usage: Usage { prompt_tokens: 1, completion_tokens: 2, cached_tokens: 0 }, logits_hash: None }
}

#[test]
fn a_person_types_and_reads() {
    let mut s = Session::new();
    s.line.greet(&mut s.out);
    assert_eq!(s.take(), "hearth: m. /help lists the commands.\r\n> ");
    assert_eq!(s.say("hi\r"), "hi\r\nHI\r\n> ");
    assert_eq!(s.say("you?\r\n"), "you?\r\nYOU?\r\n> ");
    assert_eq!(s.say("\n"), "\r\n> ");
    let talk = [Message::user("hi"), Message::assistant("HI"), Message::user("you?")];
    assert_eq!(s.last(), talk);
    assert!(s.say("/reset\r").contains("forgotten"));
    s.say("ok\r");
    assert_eq!(s.last(), [Message::user("ok")]);
}

#[test]
fn editing_keys() {
    for (typed, meant) in [
        ("ab\x7fc", "ac"),
        ("ab\x08\x08\x08c", "c"),
        ("é\x7fü", "ü"),
        ("日本\x7f語", "日語"),
        ("abc\x15d", "d"),
        ("one two  \x17x", "one x"),
        ("one  two\x17x", "one  x"),
        ("bc\x1b[Da\x1b[Cd", "bacd"),
        ("bc\x01a\x05d", "abcd"),
        ("bc\x1b[Ha\x1b[Fd", "abcd"),
        ("abc\x1b[D\x1b[D\x1b[3~x", "axc"),
        ("abc\x02\x02\x0bx", "ax"),
        ("a\x04\x1b[15~\x1bOPb", "ab"),
        ("a\tb", "a b"),
        ("ab\x1b[1;5Dx", "axb"),
    ] {
        let mut s = Session::new();
        s.say(typed);
        s.say("\r");
        assert_eq!(s.last().last().unwrap().content, meant, "{typed:?}");
    }
}

#[test]
fn the_echo_redraws_what_changed() {
    let mut s = Session::new();
    assert_eq!(s.say("ac"), "ac");
    assert_eq!(s.say("\x1b[D"), "\x08");
    assert_eq!(s.say("b"), "bc\x08");
    assert_eq!(s.say("\x7f"), "\x08c\x1b[K\x08");
    assert_eq!(s.say("\x05日\x7f"), "c日\x08\x08\x1b[K");
    assert_eq!(s.say("\x15"), "\x08\x08\x1b[K");
}

#[test]
fn history() {
    let mut s = Session::new();
    for line in ["one\r", "two\r", "two\r", "\r"] {
        s.say(line);
    }
    let recalled = |s: &mut Session, keys: &str| {
        s.say(keys);
        s.say("\r");
        s.last().last().unwrap().content.clone()
    };
    assert_eq!(recalled(&mut s, "\x1b[A\x1b[A\x1b[A"), "one");
    assert_eq!(recalled(&mut s, "\x1b[A!"), "one!");
    assert_eq!(recalled(&mut s, "draft\x1b[A\x1b[A\x1b[B\x1b[B\x1b[B"), "draft");
    for i in 0..100 {
        s.say(format!("line {i}\r"));
    }
    assert_eq!(recalled(&mut s, &"\x1b[A".repeat(200)), format!("line {}", 100 - edit::MAX_HISTORY_LINES));
}

#[test]
fn commands_set_what_requests_carry() {
    let mut s = Session::new();
    assert!(s.say("/help\r").contains("/status"));
    let status = s.say("/status\r");
    assert!(
        status.contains("1 active") && status.contains("check     damaged") && status.contains("damaged   tensor t")
    );
    assert!(s.say("/log\r").ends_with("\r\napp: one\r\napp: two\r\n> "));
    assert!(status.contains("\r\napp       clock: running; user 1000, started 1 time\r\n"));
    assert!(s.say("/poweroff\r").ends_with("\r\noff\r\n> "));
    assert!(s.say("/reboot\r").ends_with("\r\nagain\r\n> "));
    assert!(s.say("/temp 0.7\r").contains("temperature: 0.7\r\n> "));
    assert!(s.say("/settings\r").ends_with("temperature 0\r\n> "));
    assert!(s.say("/set  max_tokens 200 \r").ends_with("kept: max_tokens 200\r\n> "));
    assert!(s.say("/seed 5\r").contains("seed: 5"));
    assert!(s.say("/max 9\r").contains(": 9"));
    s.say("/system be brief\r");
    s.say("hi\r");
    let asked = s.asked.last().unwrap();
    assert_eq!((asked.sampling.temperature, asked.sampling.seed, asked.max_tokens), (Some(0.7), Some(5), Some(9)));
    assert_eq!(s.last(), [Message::system("be brief"), Message::user("hi")]);
    for (wrong, right) in [
        ("/temp 3\r", "from 0 to 2"),
        ("/temp NaN\r", "from 0 to 2"),
        ("/seed x\r", "an integer from 0"),
        ("/max 0\r", "at least 1"),
        ("/nothing\r", "no such command; /help lists them"),
        ("/\r", "no such command"),
    ] {
        let said = s.say(wrong);
        assert!(said.contains(right), "{said}");
        assert!(said.ends_with("\r\n> "), "{said:?}");
    }
    assert_eq!(s.asked.len(), 1);
}

#[test]
fn a_notice_waits_for_the_line_to_rest_and_for_a_person() {
    let mut s = Session::new();
    s.say("half a li");
    s.line.notice("the model is damaged".into());
    assert!(!s.say("ne").contains("damaged"), "not into what is typed");
    assert!(s.say("\r").ends_with("HALF A LINE\r\n> \r\nthe model is damaged\r\n> "));
    assert_eq!(s.say(""), "", "once");
    s.say("{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}]}\n");
    for _ in 0..2 * MAX_NOTICES {
        s.line.notice("again".into());
    }
    assert_eq!(s.say(""), "", "a program does not read it");
    assert_eq!(s.say("\r").matches("again").count(), MAX_NOTICES);
}

#[test]
fn a_program_sends_and_reads_json_lines() {
    let mut s = Session::new();
    let said = s.say("{\"prompt\":\"hi\"}\n");
    assert_eq!(
        said,
        "\r\n{\"delta\":\"HI\"}\n{\"done\":true,\"finish_reason\":\"stop\",\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":2,\"total_tokens\":3,\"prompt_tokens_details\":{\"cached_tokens\":0}}}\n"
    );
    let said = s.say("{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}],\"stream\":false}\r\n{\"prompt\":[7]}\n");
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines.len(), 3);
    assert!(lines[0].starts_with("{\"done\":true,\"text\":\"HI\","), "{said}");
    assert_eq!(lines[1], "{\"delta\":\"TOKENS\"}");
    let said = s.say("{\"prompt\":}\n");
    assert!(said.starts_with("{\"error\":{\"message\":\"the request is not JSON: line 1, column 11\""), "{said}");
    assert!(s.say("{}\n").contains("`messages` or `prompt` is required"));
    // Somebody sits down: a prompt again, and what programs said is not part of the talk.
    assert_eq!(s.say("\r"), "\r\n> ");
    s.say("me\r");
    assert_eq!(s.last(), [Message::user("me")]);
}

#[test]
fn the_hash_and_the_reason_are_reported() {
    let mut s = Session::new();
    s.push(b"{\"prompt\":\"x\",\"logits_hash\":true}\n");
    assert!(matches!(s.line.next_event(&mut s.out), Some(LineEvent::Ask(r)) if r.logits_hash));
    s.take();
    let end = Outcome { logits_hash: Some(0xABCD), ..outcome(Finish::Length) };
    s.line.finish(&end, &mut s.out);
    let last: serde_json::Value = serde_json::from_str(&s.take()).unwrap();
    assert_eq!(last["logits_hash"], "000000000000abcd");
    assert_eq!(last["finish_reason"], "length");
}

#[test]
fn interrupting_an_answer() {
    let mut s = Session::new();
    s.push(b"hi\rnext\r");
    assert!(matches!(s.line.next_event(&mut s.out), Some(LineEvent::Ask(_))));
    assert_eq!(s.line.next_event(&mut s.out), None, "the next line waits");
    s.line.delta("par", &mut s.out);
    s.push(b"\x03");
    assert_eq!(s.line.next_event(&mut s.out), Some(LineEvent::Cancel));
    assert_eq!(s.line.next_event(&mut s.out), None);
    s.line.finish(&outcome(Finish::Cancelled), &mut s.out);
    assert_eq!(s.take(), "hi\r\npar\r\n^C\r\n> ");
    assert_eq!(s.line.next_event(&mut s.out), None, "^C drops what waited");
    assert_eq!(s.say("half a line\x03"), "half a line^C\r\n> ");
    s.say("ok\r");
    let talk = [Message::user("hi"), Message::assistant("par"), Message::user("ok")];
    assert_eq!(s.last(), talk);
}

#[test]
fn an_interrupt_in_the_same_read_as_the_question_cancels_at_once() {
    for question in ["hi\r", "hi\r\n", "{\"prompt\":\"hi\"}\n"] {
        let mut s = Session::new();
        s.push(format!("{question}dropped\r\x03\x03kept\rand this\r").as_bytes());
        assert!(matches!(s.line.next_event(&mut s.out), Some(LineEvent::Ask(_))), "{question:?}");
        assert_eq!(s.line.next_event(&mut s.out), Some(LineEvent::Cancel), "{question:?}");
        assert_eq!(s.line.next_event(&mut s.out), None, "what stands behind waits for the answer's end");
        s.line.finish(&outcome(Finish::Cancelled), &mut s.out);
        s.say("");
        let asked: Vec<&str> = s.asked.iter().map(last_text).collect();
        assert_eq!(asked, ["kept", "and this"], "{question:?}");
    }
    // An interrupt in front of a question has nothing to do with its answer.
    let mut s = Session::new();
    assert_eq!(s.say("half\x03hi\r"), "half^C\r\n> hi\r\nHI\r\n> ");
    // The line's end behind an interrupt is an empty line of its own.
    assert_eq!(s.say("hi\r\x03\n"), "hi\r\nHI\r\n> \r\n> ");
}

#[test]
fn a_refusal_takes_the_question_back() {
    let mut s = Session::new();
    s.push(b"long\r");
    s.line.next_event(&mut s.out);
    s.line.reject(&Reject::context_exceeded(10, 5, "messages"), &mut s.out);
    let said = s.take();
    assert!(said.contains("error: the prompt has 10 tokens") && said.contains("/reset"), "{said}");
    s.push(b"again\r");
    s.line.next_event(&mut s.out);
    s.line.reject(&Reject::busy(), &mut s.out);
    assert!(s.take().contains("\r\nbusy: "));
    s.say("short\r");
    assert_eq!(s.last(), [Message::user("short")]);
}

#[test]
fn no_answer_sends_a_terminal_control_characters() {
    let mut s = Session::new();
    s.push(b"x\r");
    s.line.next_event(&mut s.out);
    s.take();
    s.line.delta("a\x1b[2J\x07\u{9b}b\nc\td\r\u{7f}", &mut s.out);
    assert_eq!(s.take(), "a[2Jb\r\nc\td");
}

/// What one bad line gets, and that the next one is served.
#[test]
fn noise_gets_one_error_line_and_the_next_line_is_served() {
    let escapes = "\x1b[99~".repeat(500);
    let lone = "\x1b".repeat(3000);
    let long_escape = format!("\x1b[{}", "1".repeat(5000));
    let long_text = "é".repeat(MAX_TYPED_BYTES);
    let noise: [&[u8]; 12] = [
        b"ab\xff\xfe\x80cd",
        b"\x00\x00\x00\x00",
        b"\xc3",
        b"\xe2\x82",
        b"\xc0\xaf",
        b"\xed\xa0\x80",
        b"\xf5aaaa",
        b"a\x1a\x1cb",
        escapes.as_bytes(),
        lone.as_bytes(),
        long_escape.as_bytes(),
        long_text.as_bytes(),
    ];
    for bytes in noise {
        let mut s = Session::new();
        let said = s.say([bytes, b"\r"].concat());
        assert_eq!(said.matches("error: ").count(), 1, "{bytes:?} {said:?}");
        assert!(said.ends_with("\r\n> "), "{said:?}");
        assert!(s.asked.is_empty());
        assert_eq!(s.say("ok\r"), "ok\r\nOK\r\n> ");

        // The same for a program: one JSON error, then its next request.
        s.say("{\"prompt\":\"a\"}\n");
        let said = s.say([bytes, b"\n"].concat());
        let errors = said.matches("\"error\"").count() + said.matches("error: ").count();
        assert_eq!(errors, 1, "{bytes:?} {said:?}");
        assert!(s.say("{\"prompt\":\"b\"}\n").contains("{\"delta\":\"B\"}\n{\"done\":true"));
    }
    let mut s = Session::new();
    let said = s.say(format!("{{\"prompt\":\"{}\"}}\n", "x".repeat(MAX_JSON_LINE_BYTES)));
    assert_eq!(said.matches("\"line_too_long\"").count(), 1);
    let said = s.say(b"{\"prompt\":\"\xff\"}\n{\"prompt\":\"b\"}\n");
    assert_eq!(said.matches("\"error\"").count(), 1, "{said}");
    assert!(said.contains("{\"delta\":\"B\"}"));
}

#[test]
fn a_burst_during_an_answer_is_bounded() {
    let mut s = Session::new();
    s.push(b"{\"prompt\":\"a\"}\n");
    assert!(matches!(s.line.next_event(&mut s.out), Some(LineEvent::Ask(_))));
    let line = b"{\"prompt\":\"b\"}\n";
    for _ in 0..100_000 {
        s.push(line);
    }
    assert!(s.line.pending.len() <= MAX_PENDING_BYTES);
    let kept = s.line.pending.len() / line.len();
    s.line.finish(&outcome(Finish::Stop), &mut s.out);
    let said = s.say("");
    assert_eq!(said.matches("{\"delta\":\"B\"}").count(), kept);
    assert_eq!(said.matches("input_overrun").count(), 1);
    assert!(s.say("{\"prompt\":\"c\"}\n").contains("{\"delta\":\"C\"}"));
}

/// xorshift64*: the same 10,000 mutations on every run.
struct Seeded(u64);

impl Seeded {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % n
    }
}

#[test]
fn ten_thousand_mutations_leave_the_line_usable() {
    let seeds: [&[u8]; 8] = [
        b"what is it?\r",
        b"/temp 0.7\r/help\r/status\r",
        b"{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}],\"max_tokens\":5}\n",
        b"{\"prompt\":[1,2,3],\"stream\":false}\r\n",
        "grüße \x1b[A\x1b[D日本\x7f\x17\r".as_bytes(),
        b"\x03\x03abc\x15\x01\x05\x0b\r\n",
        b"\x1b[1;5C\x1bOA\x1b[200~paste\x1b[201~\r",
        b"\xff\x00{\x00}\n{\n}\n",
    ];
    let mut random = Seeded(0x9E37_79B9_7F4A_7C15);
    let mut s = Session::new();
    for round in 0..10_000 {
        let mut bytes = seeds[random.below(seeds.len())].to_vec();
        for _ in 0..=random.below(6) {
            let at = random.below(bytes.len().max(1)).min(bytes.len());
            match random.below(5) {
                0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
                1 if at < bytes.len() => bytes[at] = random.below(256) as u8,
                2 if at < bytes.len() => drop(bytes.remove(at)),
                3 => bytes.insert(at, random.below(256) as u8),
                _ => {
                    let other = seeds[random.below(seeds.len())];
                    bytes.splice(at..at, other[..random.below(other.len())].iter().copied());
                }
            }
        }
        let said = s.say(&bytes);
        let lines = bytes.iter().filter(|b| matches!(b, b'\r' | b'\n' | 3)).count();
        let errors = said.matches("error: ").count() + said.matches("{\"error\"").count();
        assert!(errors <= lines, "round {round}: {errors} errors for {lines} lines: {bytes:?}");
        // A line's end, and whatever came before, the line is served again.
        s.say("\r");
        let alive = s.say("{\"prompt\":\"alive\"}\n");
        assert!(alive.contains("{\"delta\":\"ALIVE\"}\n{\"done\":true"), "round {round}: {bytes:?}: {alive:?}");
    }
}

proptest! {
    /// Splitting the input differently changes nothing. (But where an interrupt comes before the answer's end or after it: these
    /// answers end at once.)
    #[test]
    fn any_split_gives_the_same_output(
        bytes in prop::collection::vec(prop_oneof![any::<u8>().prop_filter("no interrupt", |&byte| byte != INTERRUPT), Just(b'\r'), Just(b'\n'), Just(0x1B), Just(b'{'), Just(b'}')], 0..200),
        cut in any::<prop::sample::Index>(),
    ) {
        let (mut whole, mut split) = (Session::new(), Session::new());
        let at = cut.index(bytes.len() + 1);
        let in_one = whole.say(&bytes);
        let mut in_two = split.say(&bytes[..at]);
        in_two.push_str(&split.say(&bytes[at..]));
        // A complaint begins with a line's end unless the output before it had one: that is the one thing a split may add.
        prop_assert_eq!(in_one.replace("\r\n", ""), in_two.replace("\r\n", ""));
        prop_assert_eq!(whole.asked, split.asked);
    }
}

#[test]
fn while_somebody_else_speaks_what_is_typed_waits() {
    let mut s = Session::new();
    assert!(s.say("/boot-report\r").ends_with("\r\n+0.4 PID 1\r\n+0.9 ready\r\n> "));
    assert!(s.say("/selftest\r").ends_with("\r\n"), "no prompt");
    assert_eq!(s.say("/status\rHi\r"), "");
    s.line.resume(&mut s.out);
    let said = s.say("");
    assert!(said.starts_with("> /status\r\nmodel     m") && said.contains("HI"), "{said}");
    s.say("/selftest\r");
    s.line.say("no appliance", &mut s.out);
    assert!(s.say("").ends_with("no appliance\r\n> "));
}
