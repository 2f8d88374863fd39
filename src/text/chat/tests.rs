//! Templates in the styles of the families we meet, and templates that mean harm.
#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};

use super::*;

fn compile(source: &str) -> ChatTemplate {
    ChatTemplate::compile(source, "<s>", "</s>").unwrap()
}

fn render(source: &str, messages: Value) -> String {
    compile(source).render(&ChatInput::new(&messages)).unwrap()
}

fn error(source: &str) -> ChatError {
    ChatTemplate::compile(source, "", "").unwrap_err()
}

fn turns() -> Value {
    json!([
        { "role": "system", "content": " Be brief. " },
        { "role": "user", "content": "Hi" },
        { "role": "assistant", "content": "Hello" },
        { "role": "user", "content": "2+2?" },
    ])
}

#[test]
fn llama3_style() {
    let source = "\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now(\"%d %b %Y\") %}
    {%- else %}
        {%- set date_string = \"26 Jul 2024\" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = \"\" %}
{%- endif %}
{{- \"<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: \" + date_string + \"\\n\\n\" + system_message + \"<|eot_id|>\" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
";
    let messages = turns();
    let template = compile(source);
    let undated = template.render(&ChatInput::new(&messages)).unwrap();
    assert_eq!(
        undated,
        "<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\nBe brief.<|eot_id|>\
         <|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>\
         <|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    );
    let dated = template.render(&ChatInput { date: Some("2026-11-23"), ..ChatInput::new(&messages) }).unwrap();
    assert_eq!(dated, undated.replace("26 Jul 2024", "23 Nov 2026"));
    let refused = template.render(&ChatInput { date: Some("today"), ..ChatInput::new(&messages) }).unwrap_err();
    assert_eq!(refused.to_string(), "`today` is no date; wanted YYYY-MM-DD, or YYYY-MM-DDTHH:MM:SS");
}

#[test]
fn qwen2_style_with_tools() {
    let source = r##"{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {{- "# Tools\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for message in messages %}
    {%- if message.role == "user" %}{% set ns.last = loop.index0 %}{% endif %}
    {%- if (message.role == "user") or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\n<tool_call>\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}{{- tool_call.arguments | tojson }}{{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"##;
    let tools =
        json!([{ "type": "function", "function": { "name": "add", "parameters": { "x": [1, 2.5, null], "e": {} } } }]);
    let messages = json!([
        { "role": "user", "content": "1+2? <é>" },
        { "role": "assistant", "tool_calls": [{ "function": { "name": "add", "arguments": { "a": 1, "b": "'&" } } }] },
    ]);
    let extra = json!({ "enable_thinking": false, "messages": [] });
    let input = ChatInput { tools: Some(&tools), extra: extra.as_object(), ..ChatInput::new(&messages) };
    assert_eq!(
        compile(source).render(&input).unwrap(),
        "<|im_start|>system\n# Tools\n<tools>\n\
         {\"type\": \"function\", \"function\": {\"name\": \"add\", \"parameters\": {\"x\": [1, 2.5, null], \"e\": {}}}}\n\
         </tools><|im_end|>\n<|im_start|>user\n1+2? <é><|im_end|>\n<|im_start|>assistant\n<tool_call>\n\
         {\"name\": \"add\", \"arguments\": {\"a\": 1, \"b\": \"'&\"}}\n</tool_call><|im_end|>\n<|im_start|>assistant\n\
         <think>\n\n</think>\n\n"
    );
}

#[test]
fn gemma_style_refuses_in_its_own_words() {
    let source = "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
        {% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
        {{ raise_exception('Conversation roles must alternate') }}{% endif %}\
        {% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}\
        {{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}\
        {% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}";
    let template = compile(source);
    assert_eq!(
        template.render(&ChatInput::new(&turns())).unwrap_err(),
        ChatError::Raised { message: "System role not supported".to_string() }
    );
    let messages = json!([{ "role": "user", "content": " a " }, { "role": "assistant", "content": "b" }, { "role": "user", "content": "c" }]);
    assert_eq!(
        template.render(&ChatInput::new(&messages)).unwrap(),
        "<s><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\n"
    );
    let twice = json!([{ "role": "user", "content": "a" }, { "role": "user", "content": "b" }]);
    assert_eq!(
        template.render(&ChatInput::new(&twice)).unwrap_err().to_string(),
        "the chat template refuses these messages: Conversation roles must alternate"
    );
}

#[test]
fn mistral_and_phi_styles() {
    let mistral = "{%- if messages[0][\"role\"] == \"system\" %}\n    {%- set system_message = messages[0][\"content\"].strip() %}\n    \
        {%- set loop_messages = messages[1:] %}\n{%- else %}\n    {%- set loop_messages = messages %}\n{%- endif %}\n{{- bos_token }}\n\
        {%- for message in loop_messages %}\n    {%- if message['role'] == 'user' %}\n        \
        {%- if loop.last and system_message is defined %}\n            {{- '[INST] ' + system_message + '\\n\\n' + message['content'] + '[/INST]' }}\n        \
        {%- else %}\n            {{- '[INST] ' + message['content'] + '[/INST]' }}\n        {%- endif %}\n    {%- else %}\n        \
        {{- ' ' + message['content'] + eos_token }}\n    {%- endif %}\n{%- endfor %}\n";
    assert_eq!(render(mistral, turns()), "<s>[INST] Hi[/INST] Hello</s>[INST] Be brief.\n\n2+2?[/INST]");

    let phi = "{% for message in messages %}\n{% if message['role'] in ['system', 'user'] %}\n{{'<|' + message['role'] + '|>\n' + message['content'].lstrip() + '<|end|>\n'}}\
        {% else %}\n{{'<|assistant|>\n' + message.get('content', '') + '<|end|>\n'}}{% endif %}\n{% endfor %}\n\
        {% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}";
    assert_eq!(
        render(phi, turns()),
        "<|system|>\nBe brief. <|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>\n<|user|>\n2+2?<|end|>\n<|assistant|>\n"
    );
}

#[test]
fn python_habits() {
    let list = json!([{ "role": "user", "content": [{ "type": "text", "text": "a" }, { "type": "image" }] }]);
    let source = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}\
        {% if part['type'] == 'image' %}{% continue %}{% endif %}{{ part.text.upper() }}{% endfor %}{% endif %}\
        {% for key, value in m.items() %}{{ key }};{% endfor %}{% endfor %}";
    assert_eq!(render(source, list.clone()), "Arole;content;");
    assert_eq!(
        render(
            "{{ 'a,b'.split(',')[-1] }}{{ 'x'.startswith('x') }}{{ {'b': 1, 'a': 'é'} | tojson(indent=2, sort_keys=true) }}",
            list.clone()
        ),
        "bTrue{\n  \"a\": \"é\",\n  \"b\": 1\n}"
    );
    assert_eq!(
        render("{{ ['é'] | tojson(ensure_ascii=true, separators=(',', ':')) }}{{ [] | tojson(2) }}", list.clone()),
        "[\"\\u00e9\"][]"
    );
    assert_eq!(render("a{% generation %}\nb{%- endgeneration -%}\n c", list.clone()), "abc");
    assert_eq!(render("  {% if true %}\nx\n  {% endif %}\n{{ 1 }}\n\n", list), "x\n1\n");
}

#[test]
fn a_broken_template_is_found_at_load() {
    assert!(matches!(error("a\nb {% if %}"), ChatError::Broken { line: 2, .. }));
    assert!(matches!(error("{% for x in messages %}"), ChatError::Broken { .. }));
    assert!(matches!(error("\n\n{{ messages | nosuchfilter }}"), ChatError::Broken { line: 3, .. }));
    assert!(matches!(error("{{ nosuchfunction() }}"), ChatError::Broken { line: 1, .. }));
    assert!(matches!(error("{% include 'other' %}"), ChatError::Broken { .. }));
    assert!(matches!(error(&" ".repeat(MAX_TEMPLATE_BYTES + 1)), ChatError::TooLarge { .. }));
    assert!(error("x\n{{ 1 +").to_string().starts_with("chat template, line 2: syntax error"));
    assert!(error("{%").to_string().contains("line 1"));
    assert!(error(&"{{ ".repeat(5000)).to_string().contains("line 1"));
    assert!(error(&format!("{{{{ {}1{} }}}}", "(".repeat(5000), ")".repeat(5000))).to_string().contains("line 1"));
}

#[test]
fn the_clock_is_never_read() {
    let template = compile("\n{{ strftime_now('%Y') }}");
    let messages = json!([]);
    assert_eq!(template.render(&ChatInput::new(&messages)).unwrap_err(), ChatError::NeedsDate { line: 2 });
    assert_eq!(
        template.render(&ChatInput { date: Some("2026-11-23"), ..ChatInput::new(&messages) }).unwrap(),
        "\n2026"
    );
}

#[test]
fn a_hostile_template_ends() {
    let nested = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}";
    assert!(matches!(error(nested), ChatError::TooManySteps { .. }));
    assert_eq!(error("{% set x = 'x' * 90000 %}{% for a in range(9999) %}{{ x }}{% endfor %}"), ChatError::TooLong);
    let messages = json!([]);
    let endless = compile("{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}").render(&ChatInput::new(&messages));
    assert!(matches!(endless, Err(ChatError::Render { .. })), "{endless:?}");
    let failing = compile("\n{{ messages[0].content.nothing.more }}").render(&ChatInput::new(&messages)).unwrap_err();
    assert!(matches!(failing, ChatError::Render { line: 2, .. }), "{failing}");
}
