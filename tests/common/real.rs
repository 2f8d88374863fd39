//! Where the real models are: `HEARTH_MODEL` / `HEARTH_GEMMA_MODEL`, or where `make model` puts them.

use std::path::PathBuf;

/// SmolLM2-135M-Instruct Q4_1.
pub fn smollm2() -> PathBuf {
    model("HEARTH_MODEL", "SmolLM2-135M-Instruct-Q4_1.gguf", "make model")
}

fn model(variable: &str, file: &str, fetch: &str) -> PathBuf {
    let path = std::env::var_os(variable).map(PathBuf::from).unwrap_or_else(|| {
        let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let cache = cache.unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache"));
        cache.join("hearth/models").join(file)
    });
    assert!(path.is_file(), "{} is not there: run `{fetch}`, or set {variable}", path.display());
    path
}
