//! What a vocabulary says it holds covers what the process really took: the memory plan relies on it.
//! One test alone in its process, since the kernel counts memory by process.
#![allow(clippy::unwrap_used)]

#[path = "common/models.rs"]
mod models;

use hearth::model::gguf::Gguf;
use hearth::model::vocab::raw_vocab;
use hearth::sys::map::Mapping;
use hearth::text::Vocab;

/// Anonymous memory of this process, bytes.
fn anonymous_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

#[test]
fn vocabularies_take_no_more_than_they_say() {
    for (variable, file) in
        [("HEARTH_MODEL", "SmolLM2-135M-Instruct-Q4_1.gguf"), ("HEARTH_GEMMA_MODEL", "gemma-3-270m-Q4_K_M.gguf")]
    {
        let path = models::path(variable, file);
        let mapping = Mapping::open(&path).unwrap_or_else(|e| panic!("{e}; run `make model` or set {variable}"));
        let gguf = Gguf::parse(mapping.bytes()).unwrap();
        let before = anonymous_bytes();
        let vocab = Vocab::new(&raw_vocab(&gguf).unwrap()).unwrap();
        let loaded = anonymous_bytes();
        let text = "The quick brown fox jumps over 13 lazy dogs.\n\n".repeat(20);
        assert!(vocab.encode(&text, true, true).unwrap().len() > 100);
        let used = anonymous_bytes().saturating_sub(before);
        let said = vocab.memory_bytes();
        println!("{file}: says {said}, loading took {}, with use {used}", loaded.saturating_sub(before));
        assert!(used <= said, "{file}: took {used} bytes, said {said}");
        assert!(said <= 4 * used, "{file}: took {used} bytes, said {said}, a plan of which little is true");
    }
}
