#![allow(clippy::unwrap_used)]
use super::*;
use crate::text::vocab::{RawVocab, SpecialIds};

/// `<unk>`, `<s>`, `</s>`, every byte, then some words.
fn vocab() -> Vocab<'static> {
    let words = ["{\"", "\": ", "a", "\"}", "null", "</s>x", "  "];
    let bytes = (0..=255).map(|byte: u8| format!("<0x{byte:02X}>"));
    let tokens: Vec<String> =
        ["<unk>", "<s>", "</s>"].map(String::from).into_iter().chain(bytes).chain(words.map(String::from)).collect();
    let kinds = [2, 3, 3].into_iter().chain([6; 256]).chain([1; 7]);
    Vocab::new(&RawVocab {
        model: "llama",
        pre: None,
        name: None,
        tokens: tokens.iter().map(|token| token.as_bytes()),
        scores: vec![0.0; tokens.len()],
        token_types: kinds.collect(),
        merges: None,
        special: SpecialIds { bos: Some(TokenId(1)), eos: Some(TokenId(2)), ..SpecialIds::default() },
        add_bos: Some(true),
        add_eos: None,
        add_space_prefix: Some(false),
    })
    .unwrap()
}

const FIRST_WORD: u32 = 3 + 256;

fn byte(byte: u8) -> u32 {
    3 + u32::from(byte)
}

fn allows(course: &mut Course, token: u32) -> bool {
    course.allowed().unwrap().unwrap().words()[token as usize / 32] >> (token % 32) & 1 == 1
}

#[test]
fn an_answer_may_end_exactly_where_the_schema_does() {
    let grammars = Grammars::new(&vocab()).unwrap();
    let schema = json!({"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"], "additionalProperties": false});
    let mut course = grammars.begin(&Grammar::JsonSchema(schema)).unwrap();
    assert!(allows(&mut course, FIRST_WORD) && allows(&mut course, byte(b'{')));
    assert!(!allows(&mut course, byte(b' ')) && !allows(&mut course, 2) && !allows(&mut course, 1));
    for token in [FIRST_WORD, FIRST_WORD + 2, FIRST_WORD + 1] {
        assert!(!course.push(TokenId(token)).unwrap());
        assert!(!allows(&mut course, 2));
    }
    let mut other = course.copy();
    assert!(!course.push(TokenId(FIRST_WORD + 4)).unwrap());
    assert!(course.push(TokenId(byte(b'}'))).unwrap(), "nothing can follow");
    assert!(other.push(TokenId(byte(b'7'))).is_err(), "not null");
}

#[test]
fn a_control_token_is_not_the_text_that_it_is_called() {
    let grammars = Grammars::new(&vocab()).unwrap();
    let mut course = grammars.begin(&Grammar::Lark("start: \"</s>\" /x*/".into())).unwrap();
    assert!(!allows(&mut course, 2) && allows(&mut course, byte(b'<')) && allows(&mut course, FIRST_WORD + 5));
    assert!(!course.push(TokenId(FIRST_WORD + 5)).unwrap());
    assert!(allows(&mut course, 2) && allows(&mut course, byte(b'x')) && !allows(&mut course, 1));
}

#[test]
fn what_is_no_grammar_is_refused_with_a_reason() {
    let grammars = Grammars::new(&vocab()).unwrap();
    let refused = |grammar: Grammar| grammars.begin(&grammar).err().map(|e| e.to_string()).unwrap_or_default();
    for (schema, why) in [
        (json!({"type": "text"}), "text"),
        (json!({"type": "object", "patternProperties": 7}), "patternProperties"),
        (json!({"$ref": "https://example.org/other"}), "ref"),
        (json!([1]), "a schema is an object"),
        (json!({"type": "string", "pattern": "("}), "regex"),
    ] {
        let found = refused(Grammar::JsonSchema(schema.clone()));
        assert!(found.contains(why), "{schema}: {found}");
    }
    assert!(refused(Grammar::Lark("start: other".into())).contains("other"));
    assert!(!refused(Grammar::Lark(String::new())).is_empty());
    assert!(
        refused(Grammar::Lark(format!("start: {}\"a\"{}", "(".repeat(200), ")".repeat(200)))).contains("levels deep")
    );
    let long = refused(Grammar::Lark(" ".repeat(MAX_GRAMMAR_BYTES + 1)));
    assert!(long.contains("16385 bytes"), "{long}");
    // Deep and wide ones end in a reason or a course, and in bounded time.
    let deep =
        (0..120).fold(json!({"type": "null"}), |inner, _| json!({"type": "array", "items": inner, "minItems": 2}));
    let _ = refused(Grammar::JsonSchema(deep));
    let _ = refused(Grammar::JsonSchema(json!({"type": "string", "pattern": "(a{1,900}){1,900}"})));
    let chain: String = (0..3000).map(|n| format!("r{n}: \"a\" r{} | \"b\"\n", n + 1)).collect();
    let _ = refused(Grammar::Lark(format!("start: r0\n{chain}r3000: \"c\"\n")));
}

/// No grammar takes as long, whatever it is, on a machine that is busy otherwise or emulated.
const LONG: std::time::Duration = std::time::Duration::from_secs(60);

/// On a stack as large as the I/O thread's; what is refused or taken is not the point.
#[test]
fn grammars_made_to_break_it_do_not() {
    let chain = |kind: &str, last: &str, count: usize| -> String {
        let rules = (0..count).map(|i| format!("{kind}{i}: {kind}{} \"x\"\n", i + 1));
        format!("start: {kind}0\n{}{kind}{count}: {last}\n", rules.collect::<String>())
    };
    let deep = (0..20).fold(json!({"type": "integer"}), |deep, level| match level % 2 {
        0 => json!({"items": deep}),
        _ => json!({"anyOf": [deep, {"type": "null"}]}),
    });
    let references = |count: usize| {
        let defs = (0..count).map(|i| (format!("d{i}"), json!({"$ref": format!("#/$defs/d{}", i + 1)})));
        let mut schema = json!({"$ref": "#/$defs/d0", "$defs": defs.collect::<serde_json::Map<String, Value>>()});
        schema["$defs"][format!("d{count}")] = json!({"type": "null"});
        schema
    };
    let patterns =
        |count: usize| (0..count).map(|i| json!({"type": "string", "pattern": format!("a{i}.*b")})).collect::<Vec<_>>();
    let doubled: String = (0..60).map(|i| format!("A{i}: A{} A{}\n", i + 1, i + 1)).collect();
    let intersected = |count: usize| {
        let names: Vec<String> = (0..count).map(|i| format!("A{i}")).collect();
        let rules: String = (0..count).map(|i| format!("A{i}: /.*a{i}.*/\n")).collect();
        format!("start: S\nS: {}\n{rules}", names.join(" & "))
    };
    let larks = [
        chain("A", "\"y\"", 190),
        chain("a", "\"y\"", 190),
        chain("a", "a0", 190),
        chain("A", "\"y\"", 490),
        chain("a", "\"y\"", 490),
        chain("A", "A0", 10),
        format!("start: /{}a{}/", "(".repeat(60), ")*".repeat(60)),
        "start: /(a{1000}){1000}/".into(),
        "start: /((a|b|ab)*c){500}/".into(),
        format!("start: {}\"a\"{}", "(".repeat(60), ")*".repeat(60)),
        format!("start: {}\"a\"{}", "(".repeat(5000), ")".repeat(5000)),
        format!("start: {}\"b\"", "\"a\" | ".repeat(1100)),
        format!("start: {}", "\"a\"? ".repeat(1400)),
        format!("start: T\nT: {}", "\"a\"? ".repeat(1400)),
        "start: %json {\"$ref\": \"#\"}".into(),
        "start: \"a\"{0,4000000000}".into(),
        format!("start: A0\n{doubled}A60: \"x\"\n"),
        intersected(8),
        intersected(20),
    ];
    let schemas = [
        deep,
        references(145),
        references(400),
        json!({"allOf": patterns(8)}),
        json!({"allOf": patterns(20)}),
        json!({"anyOf": patterns(100)}),
        json!({"$ref": "#"}),
        json!({"anyOf": [{"$ref": "#"}, {"type": "null"}]}),
        json!({"type": "string", "minLength": 100_000}),
        json!({"type": "array", "minItems": 1_000_000_000, "items": {"type": "null"}}),
        json!({"type": "string", "pattern": "^(a+)+(b{1,1000}){1,1000}$"}),
        json!({"type": "string", "pattern": "a?".repeat(500)}),
        json!({"type": "string", "pattern": "a?".repeat(5000)}),
        json!({"type": "number", "minimum": -1e300, "maximum": 1e300, "multipleOf": 1e-300}),
        json!({"type": "number", "multipleOf": 0}),
        json!({"type": "object", "minProperties": 100_000, "additionalProperties": true}),
        json!({"type": "object", "patternProperties": {"^a": {}, "b$": {}}}),
        json!({"enum": (0..3000).collect::<Vec<_>>()}),
    ];
    let grammars = larks.into_iter().map(Grammar::Lark).chain(schemas.map(Grammar::JsonSchema)).collect::<Vec<_>>();
    let run = move || {
        let all = Grammars::new(&vocab()).unwrap();
        for grammar in grammars {
            let told: String = format!("{grammar:?}").chars().take(60).collect();
            let began = std::time::Instant::now();
            let said = walk(&all, &grammar).map_or_else(|why| why.to_string(), str::to_owned);
            let took = began.elapsed();
            println!("{:5} ms {told}: {said}", took.as_millis());
            assert!(took < LONG, "{told} took {took:?}");
            assert!(said.chars().count() <= MAX_REASON_CHARS, "{said}");
        }
    };
    let thread = std::thread::Builder::new().stack_size(crate::serve::daemon::IO_STACK_BYTES);
    thread.spawn(run).unwrap().join().unwrap();
}

/// An answer of up to 200 tokens, each the last that may come: seldom the one that a model would take.
fn walk(all: &Grammars, grammar: &Grammar) -> Result<&'static str, GrammarError> {
    let mut course = all.begin(grammar)?;
    for _ in 0..200 {
        let Some(allowed) = course.allowed()? else { return Ok("whole") };
        let is_allowed = |id: &u32| *id != 2 && allowed.words()[*id as usize / 32] >> (id % 32) & 1 == 1;
        let Some(token) = (0..FIRST_WORD + 7).rev().find(is_allowed) else { return Ok("at its end") };
        if course.push(TokenId(token))? {
            return Ok("whole");
        }
    }
    Ok("going on")
}
