#![allow(clippy::unwrap_used)]

use super::*;
use crate::wire::http::Reply;
use crate::wire::{Constraint, Finish, Logprob, Message, Outcome, Prompt, SamplingFields, Usage};

const STREAM: Reply = Reply { keep_alive: true, chunked: true, head_only: false };

fn request(method: &str, path: &str, body: &str) -> Request {
    Request { method: method.to_owned(), path: path.to_owned(), body: body.as_bytes().to_vec(), reply: STREAM }
}

fn chat(body: &str) -> Result<GenerateRequest, Reject> {
    match route(&request("POST", "/v1/chat/completions", body))? {
        Call::Generate(Style::Chat, generate) => Ok(*generate),
        other => panic!("{other:?}"),
    }
}

fn completion(body: &str) -> Result<GenerateRequest, Reject> {
    match route(&request("POST", "/v1/completions", body))? {
        Call::Generate(Style::Completion, generate) => Ok(*generate),
        other => panic!("{other:?}"),
    }
}

/// A chat request with one more field.
fn with(field: &str) -> Result<GenerateRequest, Reject> {
    chat(&format!(r#"{{"messages":[{{"role":"user","content":"hi"}}],{field}}}"#))
}

#[test]
fn paths_and_methods() {
    assert_eq!(route(&request("GET", "/health", "")), Ok(Call::Health));
    assert_eq!(route(&request("HEAD", "/v1/models", "")), Ok(Call::Models));
    assert_eq!(route(&request("GET", "/v1/models/m", "")), Ok(Call::Model("m".to_owned())));
    for (method, path, allow) in [
        ("GET", "/v1/chat/completions", "POST"),
        ("PUT", "/v1/completions", "POST"),
        ("POST", "/health", "GET, HEAD"),
        ("DELETE", "/v1/models/m", "GET, HEAD"),
    ] {
        let reject = route(&request(method, path, "")).unwrap_err();
        assert_eq!((reject.status, reject.allow), (405, Some(allow)), "{method} {path}");
    }
    for path in ["/", "/v1", "/v1/chat/completions/", "/v1/models/", "/health/x", "*"] {
        assert_eq!(route(&request("GET", path, "")).unwrap_err().status, 404, "{path}");
    }
}

#[test]
fn every_field_is_read() {
    let all = with(
        r#""temperature":0.5,"top_k":40,"top_p":0.9,"min_p":0.1,"repetition_penalty":1.1,"frequency_penalty":-2,
           "presence_penalty":2,"seed":-1,"max_completion_tokens":7,"max_tokens":7,"stop":["a","b"],"stream":true,
           "stream_options":{"include_usage":true},"logits_hash":true,"ignore_eos":true,"date":"1 May 2026",
           "model":"any","n":1,"tools":[],"logprobs":false,"response_format":{"type":"text"},"user":"u","what":{}"#,
    )
    .unwrap();
    assert_eq!(all.sampling.temperature, Some(0.5));
    assert_eq!((all.sampling.top_k, all.sampling.top_p, all.sampling.min_p), (Some(40), Some(0.9), Some(0.1)));
    assert_eq!(all.sampling.repetition_penalty, Some(1.1));
    assert_eq!((all.sampling.frequency_penalty, all.sampling.presence_penalty), (Some(-2.0), Some(2.0)));
    assert_eq!((all.sampling.seed, all.max_tokens), (Some(u64::MAX), Some(7)));
    assert_eq!(all.stop, ["a", "b"]);
    assert!(all.stream && all.include_usage && all.logits_hash && all.ignore_eos);
    assert_eq!(all.date.as_deref(), Some("1 May 2026"));

    let mut plain = GenerateRequest::new(Prompt::Chat(vec![Message::user("hi")]));
    assert_eq!(with(r#""temperature":null,"stop":null,"stream":null,"seed":null"#).unwrap(), plain);
    plain.stop = vec!["x".to_owned()];
    assert_eq!(with(r#""stop":"x""#).unwrap(), plain);
}

#[test]
fn a_field_out_of_range_is_named() {
    for (field, param) in [
        (r#""temperature":2.1"#, "temperature"),
        (r#""temperature":-0.1"#, "temperature"),
        (r#""temperature":"hot""#, "temperature"),
        (r#""temperature":1e400"#, ""),
        (r#""top_p":0"#, "top_p"),
        (r#""top_p":1e-300"#, "top_p"),
        (r#""top_k":-1"#, "top_k"),
        (r#""top_k":4294967296"#, "top_k"),
        (r#""top_k":1.5"#, "top_k"),
        (r#""min_p":1.5"#, "min_p"),
        (r#""repetition_penalty":0"#, "repetition_penalty"),
        (r#""frequency_penalty":3"#, "frequency_penalty"),
        (r#""presence_penalty":-3"#, "presence_penalty"),
        (r#""seed":1.5"#, "seed"),
        (r#""seed":18446744073709551616"#, "seed"),
        (r#""max_tokens":0"#, "max_tokens"),
        (r#""max_tokens":-5"#, "max_tokens"),
        (r#""max_tokens":1,"max_completion_tokens":2"#, "max_completion_tokens"),
        (r#""stop":"""#, "stop"),
        (r#""stop":[1]"#, "stop"),
        (r#""stop":{}"#, "stop"),
        (r#""stream":1"#, "stream"),
        (r#""stream_options":{"include_usage":true}"#, "stream_options"),
        (r#""stream":true,"stream_options":{"include_usage":1}"#, "stream_options.include_usage"),
        (r#""model":5"#, "model"),
        (r#""logits_hash":"yes""#, "logits_hash"),
        (r#""date":7"#, "date"),
        (r#""n":0"#, "n"),
        (r#""n":9"#, "n"),
        (r#""best_of":2"#, "best_of"),
        (r#""tools":[{"type":"function"}]"#, "tools"),
        (r#""tool_choice":"required""#, "tool_choice"),
        (r#""logprobs":1"#, "logprobs"),
        (r#""logprobs":true,"top_logprobs":21"#, "top_logprobs"),
        (r#""top_logprobs":3"#, "top_logprobs"),
        (r#""response_format":{"type":"xml"}"#, "response_format"),
        (r#""response_format":"json_object""#, "response_format"),
        (r#""response_format":{"type":"json_schema"}"#, "response_format.json_schema.schema"),
        (
            r#""response_format":{"type":"json_schema","json_schema":{"schema":7}}"#,
            "response_format.json_schema.schema",
        ),
        (r#""response_format":{"type":"json_object"},"grammar":"start: \"a\"""#, "grammar"),
        (r#""response_format":{"type":"json_object"},"ignore_eos":true"#, "ignore_eos"),
        (r#""grammar":7"#, "grammar"),
        (r#""logit_bias":{"5":101}"#, "logit_bias"),
        (r#""logit_bias":{"five":1}"#, "logit_bias"),
        (r#""logit_bias":[5]"#, "logit_bias"),
        (r#""typical_p":0"#, "typical_p"),
        (r#""xtc_probability":2"#, "xtc_probability"),
        (r#""xtc_threshold":-1"#, "xtc_threshold"),
        (r#""dry_multiplier":-1"#, "dry_multiplier"),
        (r#""dry_base":0.5"#, "dry_base"),
        (r#""dry_allowed_length":-1"#, "dry_allowed_length"),
        (r#""dry_penalty_last_n":-2"#, "dry_penalty_last_n"),
        (r#""dry_sequence_breakers":["x"]"#, "dry_sequence_breakers"),
        (r#""repeat_last_n":-2"#, "repeat_last_n"),
        (r#""repeat_penalty":0"#, "repeat_penalty"),
        (r#""repeat_penalty":1.5,"repetition_penalty":1.25"#, "repeat_penalty"),
        (r#""mirostat":3"#, "mirostat"),
        (r#""mirostat_tau":21"#, "mirostat_tau"),
        (r#""mirostat_eta":"x""#, "mirostat_eta"),
        (r#""dynatemp_range":3"#, "dynatemp_range"),
        (r#""dynatemp_exponent":0"#, "dynatemp_exponent"),
        (r#""user":7"#, "user"),
        (r#""modalities":["text","audio"]"#, "modalities"),
    ] {
        let reject = with(field).expect_err(field);
        assert_eq!(reject.status, 400, "{field}");
        assert_eq!(reject.param.as_deref().unwrap_or(""), param, "{field}: {reject}");
    }
}

#[test]
fn llama_cpps_sampling_fields_and_several_answers_are_read() {
    let all = with(
        r#""n":3,"best_of":3,"logprobs":true,"top_logprobs":5,"logit_bias":{"5":-100,"7":1.5},"repeat_penalty":1.5,
           "repeat_last_n":-1,"typical_p":0.5,"xtc_probability":0.25,"xtc_threshold":0.125,"dry_multiplier":0.5,
           "dry_base":1.5,"dry_allowed_length":3,"dry_penalty_last_n":64,"mirostat":2,"mirostat_tau":4,
           "mirostat_eta":0.5,"dynatemp_range":0.5,"dynatemp_exponent":2"#,
    )
    .unwrap();
    assert_eq!((all.n, all.logprobs), (3, Some(5)));
    let expected = SamplingFields {
        logit_bias: vec![(5, -100.0), (7, 1.5)],
        repetition_penalty: Some(1.5),
        repeat_last_n: Some(usize::MAX),
        typical_p: Some(0.5),
        xtc_probability: Some(0.25),
        xtc_threshold: Some(0.125),
        dry_multiplier: Some(0.5),
        dry_base: Some(1.5),
        dry_allowed_length: Some(3),
        dry_penalty_last_n: Some(64),
        mirostat: Some(2),
        mirostat_tau: Some(4.0),
        mirostat_eta: Some(0.5),
        dynatemp_range: Some(0.5),
        dynatemp_exponent: Some(2.0),
        ..SamplingFields::default()
    };
    assert_eq!(all.sampling, expected);
    assert_eq!(with(r#""logprobs":true"#).unwrap().logprobs, Some(0));
    assert_eq!(completion(r#"{"prompt":"x","logprobs":3}"#).unwrap().logprobs, Some(3));
    assert!(completion(r#"{"prompt":"x","logprobs":true}"#).is_err());
}

#[test]
fn text_to_tokens_and_back_in_llama_servers_shape() {
    let post = |path: &str, body: &str| route(&request("POST", path, body));
    let tokenize = |add_special, parse_special| Call::Tokenize { content: "hi".to_owned(), add_special, parse_special };
    assert_eq!(post("/tokenize", r#"{"content":"hi"}"#), Ok(tokenize(false, true)));
    let both = r#"{"content":"hi","add_special":true,"parse_special":false}"#;
    assert_eq!(post("/tokenize", both), Ok(tokenize(true, false)));
    assert_eq!(post("/detokenize", r#"{"tokens":[1,2]}"#), Ok(Call::Detokenize(vec![1, 2])));
    for (path, body, param) in [
        ("/tokenize", "{}", "content"),
        ("/tokenize", r#"{"content":7}"#, "content"),
        ("/tokenize", r#"{"content":"x","add_special":1}"#, "add_special"),
        ("/detokenize", "{}", "tokens"),
        ("/detokenize", r#"{"tokens":[-1]}"#, "tokens"),
    ] {
        assert_eq!(post(path, body).unwrap_err().param.as_deref(), Some(param), "{path} {body}");
    }
    assert_eq!(route(&request("GET", "/v1/models/a%20b%2x", "")), Ok(Call::Model("a b%2x".to_owned())));
    assert_eq!(route(&request("GET", "/v1/plan", "")), Ok(Call::Plan));
}

#[test]
fn a_format_and_a_grammar_are_constraints() {
    let constraint = |fields: &str| {
        chat(&format!(r#"{{"messages":[{{"role":"user","content":"hi"}}],{fields}}}"#)).unwrap().constraint
    };
    assert_eq!(constraint(r#""response_format":{"type":"text"}"#), None);
    let object = Some(Constraint::JsonSchema(json!({"type": "object"})));
    assert_eq!(constraint(r#""response_format":{"type":"json_object"}"#), object);
    let schema = r#""response_format":{"type":"json_schema","json_schema":{"name":"n","strict":true,"schema":{"type":"object"}}}"#;
    assert_eq!(constraint(schema), object);
    assert_eq!(constraint(r#""grammar":"start: /a/""#), Some(Constraint::Lark("start: /a/".to_owned())));
}

#[test]
fn log_probabilities_have_the_shape_of_their_api() {
    let mut request = GenerateRequest::new(Prompt::Text("x".to_owned()));
    let one = || Logprob { bytes: b"a".to_vec(), logprob: -0.5, top: vec![(b"a".to_vec(), -0.5), (vec![0xC3], -2.0)] };
    let mut out = Vec::new();
    let mut chat = Emitter::new(5, "m", Style::Chat, STREAM, &request);
    chat.delta(0, "a", Some(one()), &mut out);
    assert!(chat.finish(0, &DONE, &mut out));
    let body: Value = serde_json::from_str(&body_of(out)).unwrap();
    assert_eq!(
        body["choices"][0]["logprobs"].to_string(),
        r#"{"content":[{"token":"a","logprob":-0.5,"bytes":[97],"top_logprobs":[{"token":"a","logprob":-0.5,"bytes":[97]},{"token":"�","logprob":-2.0,"bytes":[195]}]}],"refusal":null}"#
    );
    request.stream = true;
    let mut out = Vec::new();
    let mut text = Emitter::new(5, "m", Style::Completion, Reply { chunked: false, ..STREAM }, &request);
    text.delta(0, "a", Some(one()), &mut out);
    text.delta(0, "a", Some(one()), &mut out);
    let lists = |offset: usize| {
        format!(
            r#""logprobs":{{"tokens":["a"],"token_logprobs":[-0.5],"top_logprobs":[{{"a":-0.5,"�":-2.0}}],"text_offset":[{offset}]}}"#
        )
    };
    let body = body_of(out);
    assert!(body.contains(&lists(0)) && body.contains(&lists(1)), "{body}");
}

#[test]
fn several_answers_end_as_one() {
    let mut request = GenerateRequest::new(Prompt::Text("x".to_owned()));
    request.n = 2;
    let mut out = Vec::new();
    let mut chat = Emitter::new(5, "m", Style::Chat, STREAM, &request);
    chat.delta(1, "b", None, &mut out);
    assert!(!chat.finish(1, &DONE, &mut out) && out.is_empty());
    chat.delta(0, "a", None, &mut out);
    assert!(chat.finish(0, &DONE, &mut out));
    let body: Value = serde_json::from_str(&body_of(out)).unwrap();
    let text = |at: usize| body["choices"][at]["message"]["content"].as_str();
    assert_eq!((text(0), text(1)), (Some("a"), Some("b")));
    assert_eq!((&body["usage"]["prompt_tokens"], &body["usage"]["completion_tokens"]), (&json!(3), &json!(4)));
}

#[test]
fn conversations() {
    let parts = r#"{"messages":[{"role":"developer","content":"be brief"},
        {"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]},
        {"role":"assistant","content":""}]}"#;
    let expected = vec![Message::system("be brief"), Message::user("a\nb"), Message::assistant("")];
    assert_eq!(chat(parts).unwrap().prompt, Prompt::Chat(expected));
    for (body, param) in [
        (r#"{}"#, "messages"),
        (r#"{"messages":null}"#, "messages"),
        (r#"{"messages":[]}"#, "messages"),
        (r#"{"messages":"hi"}"#, "messages"),
        (r#"{"messages":["hi"]}"#, "messages[0]"),
        (r#"{"messages":[{"content":"x"}]}"#, "messages[0].role"),
        (r#"{"messages":[{"role":"king","content":"x"}]}"#, "messages[0].role"),
        (r#"{"messages":[{"role":"tool","content":"x"}]}"#, "messages[0].role"),
        (r#"{"messages":[{"role":"user"}]}"#, "messages[0].content"),
        (r#"{"messages":[{"role":"user","content":7}]}"#, "messages[0].content"),
        (r#"{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}"#, "messages[0].content[0].type"),
        (r#"{"messages":[{"role":"user","content":[{"type":"text"}]}]}"#, "messages[0].content[0].text"),
        (r#"{"messages":[{"role":"user","content":["x"]}]}"#, "messages[0].content[0].type"),
        (r#"{"messages":[{"role":"assistant","content":"x","tool_calls":[1]}]}"#, "messages[0].tool_calls"),
    ] {
        let reject = chat(body).expect_err(body);
        assert_eq!((reject.status, reject.param.as_deref()), (400, Some(param)), "{body}");
    }
}

#[test]
fn completion_prompts() {
    let prompt = |p: &str| completion(&format!(r#"{{"prompt":{p}}}"#)).map(|r| r.prompt);
    assert_eq!(prompt(r#""x""#), Ok(Prompt::Text("x".to_owned())));
    assert_eq!(prompt(r#"["x"]"#), Ok(Prompt::Text("x".to_owned())));
    assert_eq!(prompt("[1,2]"), Ok(Prompt::Tokens(vec![1, 2])));
    assert_eq!(prompt("[[1,2]]"), Ok(Prompt::Tokens(vec![1, 2])));
    for wrong in [
        r#""""#,
        "[]",
        "[[]]",
        r#"["a","b"]"#,
        "[[1],[2]]",
        "[1,-1]",
        "[1.5]",
        "[4294967296]",
        "7",
        "{}",
        "null",
        r#"[1,"a"]"#,
    ] {
        let reject = prompt(wrong).expect_err(wrong);
        assert_eq!((reject.status, reject.param.as_deref()), (400, Some("prompt")), "{wrong}");
    }
}

#[test]
fn a_body_that_is_no_object_says_where() {
    for (body, needle) in [
        ("", "ends too early"),
        ("{\"messages\"", "ends too early"),
        ("{\n  x}", "line 2, column 3"),
        ("[]", "must be a JSON object"),
        ("\u{feff}{}", "is not JSON"),
    ] {
        let reject = chat(body).expect_err(body);
        assert_eq!((reject.status, reject.code), (400, Some("invalid_json")), "{body:?}");
        assert!(reject.message.contains(needle), "{}", reject.message);
    }
    let deep = "[".repeat(9_000);
    assert_eq!(chat(&deep).unwrap_err().status, 400);
}

#[test]
fn a_body_cannot_take_many_times_its_length() {
    let ids = |n: usize| format!("{{\"prompt\":[{}1]}}", "1,".repeat(n - 1));
    assert!(size_of::<Value>() <= 80);
    assert!(matches!(completion(&ids(32 * 1024)).unwrap().prompt, Prompt::Tokens(t) if t.len() == 32 * 1024));
    let many = completion(&ids(request::MAX_JSON_VALUES)).unwrap_err();
    assert_eq!((many.status, many.code), (413, Some("too_many_values")));
    assert!(with(&format!("\"x\":{}{}", "[".repeat(100_000), "]".repeat(100_000))).is_err());
    // Text is no value, whatever stands in it.
    let text = format!(r#"{{"prompt":"{}"}}"#, r#"\"[{,"#.repeat(20_000));
    assert!(completion(&text).is_ok());
}

#[test]
fn a_refusal_has_openais_shape() {
    assert_eq!(
        with(r#""top_p":7"#).unwrap_err().to_json().to_string(),
        r#"{"error":{"message":"`top_p` is 7: it must be over 0, up to 1","type":"invalid_request_error","param":"top_p","code":null}}"#
    );
    let long = Reject::context_exceeded(9000, 2048, "messages");
    assert_eq!(long.code, Some("context_length_exceeded"));
    assert!(long.message.contains("9000") && long.message.contains("2048"), "{long}");
}

const DONE: Outcome = Outcome {
    finish: Finish::Stop,
    usage: Usage { prompt_tokens: 3, completion_tokens: 2, cached_tokens: 1 },
    logits_hash: Some(0xAB),
};

fn body_of(out: Vec<u8>) -> String {
    let text = String::from_utf8(out).unwrap();
    text.split_once("\r\n\r\n").unwrap().1.to_owned()
}

#[test]
fn a_whole_answer_is_these_bytes() {
    let mut out = Vec::new();
    let request = GenerateRequest::new(Prompt::Text("x".to_owned()));
    let mut chat = Emitter::new(5, "m", Style::Chat, STREAM, &request);
    chat.delta(0, "a\"", None, &mut out);
    chat.delta(0, "b", None, &mut out);
    assert!(out.is_empty());
    chat.finish(0, &DONE, &mut out);
    assert_eq!(
        body_of(out),
        r#"{"id":"chatcmpl-5","object":"chat.completion","created":0,"model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"a\"b"},"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5,"prompt_tokens_details":{"cached_tokens":1}},"hearth":{"logits_hash":"00000000000000ab"}}"#
    );
    let mut out = Vec::new();
    let mut text = Emitter::new(6, "m", Style::Completion, STREAM, &request);
    text.delta(0, "ab", None, &mut out);
    text.finish(0, &Outcome { finish: Finish::Length, logits_hash: None, ..DONE }, &mut out);
    assert_eq!(
        body_of(out),
        r#"{"id":"cmpl-6","object":"text_completion","created":0,"model":"m","choices":[{"index":0,"text":"ab","logprobs":null,"finish_reason":"length"}],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5,"prompt_tokens_details":{"cached_tokens":1}}}"#
    );
}

#[test]
fn a_stream_is_these_bytes() {
    let mut request = GenerateRequest::new(Prompt::Text("x".to_owned()));
    request.stream = true;
    request.include_usage = true;
    let raw = Reply { chunked: false, ..STREAM };
    let mut out = Vec::new();
    let mut emitter = Emitter::new(1, "m", Style::Completion, raw, &request);
    emitter.delta(0, "", None, &mut out);
    assert!(out.is_empty());
    emitter.delta(0, "hi\n", None, &mut out);
    emitter.finish(0, &DONE, &mut out);
    let head = r#"data: {"id":"cmpl-1","object":"text_completion","created":0,"model":"m","choices":"#;
    let expected = [
        head,
        r#"[{"index":0,"text":"hi\n","logprobs":null,"finish_reason":null}],"usage":null}"#,
        "\n\n",
        head,
        r#"[{"index":0,"text":"","logprobs":null,"finish_reason":"stop"}],"usage":null,"hearth":{"logits_hash":"00000000000000ab"}}"#,
        "\n\n",
        head,
        r#"[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5,"prompt_tokens_details":{"cached_tokens":1}}}"#,
        "\n\ndata: [DONE]\n\n",
    ];
    assert_eq!(body_of(out), expected.concat());
}

#[test]
fn a_stream_that_breaks_ends_with_the_error() {
    let mut request = GenerateRequest::new(Prompt::Text("x".to_owned()));
    request.stream = true;
    let mut out = Vec::new();
    let mut emitter = Emitter::new(1, "m", Style::Chat, STREAM, &request);
    emitter.delta(0, "hi", None, &mut out);
    emitter.reject(&Reject::internal("broken"), &mut out);
    let text = String::from_utf8(out).unwrap();
    assert!(text.contains(r#"data: {"error":{"message":"broken","type":"server_error""#), "{text}");
    assert!(text.ends_with("data: [DONE]\n\n\r\n0\r\n\r\n"), "{text}");
    let mut out = Vec::new();
    Emitter::new(1, "m", Style::Chat, STREAM, &request).reject(&Reject::internal("broken"), &mut out);
    assert!(out.starts_with(b"HTTP/1.1 500 "));
}
