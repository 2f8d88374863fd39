//! Where the tests find the real models. A missing model fails the test: a skip would look like a pass.

use std::path::PathBuf;

/// SmolLM2-135M-Instruct Q4_1.
#[allow(dead_code)]
pub fn smollm2() -> Vec<u8> {
    read("HEARTH_MODEL", "SmolLM2-135M-Instruct-Q4_1.gguf")
}

/// Gemma-3-270M Q4_K_M.
#[allow(dead_code)]
pub fn gemma3() -> Vec<u8> {
    read("HEARTH_GEMMA_MODEL", "gemma-3-270m-Q4_K_M.gguf")
}

/// Where `make model` puts a model, or where `variable` says it is.
pub fn path(variable: &str, file: &str) -> PathBuf {
    if let Some(path) = std::env::var_os(variable) {
        return path.into();
    }
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(|| {
        let home = std::env::var_os("HOME")?;
        Some(PathBuf::from(home).join(".cache"))
    });
    cache.unwrap_or_default().join("hearth/models").join(file)
}

fn read(variable: &str, file: &str) -> Vec<u8> {
    let path = path(variable, file);
    std::fs::read(&path).unwrap_or_else(|e| {
        panic!("this test needs the model {}: {e}; run `make model` or set {variable} to its path", path.display())
    })
}
