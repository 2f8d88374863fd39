//! What can be wrong with a GGUF file, with the numbers that say where.
//! Next on the data's way: the command line or `serve`, which prints it and refuses the file.

/// Why a GGUF file was refused, or a value in it.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum GgufError {
    /// The file ends inside something.
    #[error("file truncated at byte {offset}: {wanted} needs {need} bytes, {have} are left")]
    Truncated {
        /// Where the missing thing begins, bytes from the start of the file.
        offset: u64,
        /// What was to be read.
        wanted: &'static str,
        /// Its size, bytes.
        need: u64,
        /// Bytes left in the file.
        have: u64,
    },
    /// The first four bytes are not `GGUF`.
    #[error("not a GGUF file: it begins with bytes {magic:02x?}, expected \"GGUF\" (47 47 55 46)")]
    NotGguf {
        /// The bytes found.
        magic: [u8; 4],
    },
    /// A container from before GGUF.
    #[error("a legacy {name} file (before GGUF); convert it to GGUF version 3")]
    Legacy {
        /// The old container's name.
        name: &'static str,
    },
    /// Written on a big-endian machine.
    #[error("a big-endian GGUF file (version field {raw:#010x}); only little-endian files are supported")]
    BigEndian {
        /// The version field as read.
        raw: u32,
    },
    /// A version that is not parsed here.
    #[error("GGUF version {found} is not supported; versions 2 and 3 are")]
    Version {
        /// The version found.
        found: u32,
    },
    /// A count or length over its limit.
    #[error("{what} at byte {offset} is {found}, over the limit of {limit}")]
    OverLimit {
        /// What was counted.
        what: &'static str,
        /// Where the number stands.
        offset: u64,
        /// The number found.
        found: u64,
        /// The limit.
        limit: u64,
    },
    /// Arrays in arrays, too deep.
    #[error("arrays nested deeper than {limit} at byte {offset}")]
    TooDeep {
        /// Where.
        offset: u64,
        /// The limit.
        limit: usize,
    },
    /// A metadata type id that GGUF does not define.
    #[error("metadata type id {found} at byte {offset} is not one of GGUF's 13 (0 to 12)")]
    BadValueType {
        /// Where the id stands.
        offset: u64,
        /// The id.
        found: u32,
    },
    /// A boolean that is neither 0 nor 1.
    #[error("boolean at byte {offset} is {found}, must be 0 or 1")]
    BadBool {
        /// Where.
        offset: u64,
        /// The byte.
        found: u8,
    },
    /// A name that is not UTF-8, or empty.
    #[error("{what} at byte {offset} is {problem}")]
    BadName {
        /// "metadata key" or "tensor name".
        what: &'static str,
        /// Where its text begins.
        offset: u64,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The same metadata key or tensor name twice.
    #[error("{what} `{name}` occurs twice")]
    Duplicate {
        /// "metadata key" or "tensor name".
        what: &'static str,
        /// The name.
        name: String,
    },
    /// `general.alignment` is no usable alignment.
    #[error("general.alignment is {found}, must be a power of two up to {limit}")]
    BadAlignment {
        /// The value found.
        found: u64,
        /// The largest that is taken.
        limit: u64,
    },
    /// One part of a model that was split over several files.
    #[error("part {part} of a model split into {count} files; merge them into one (gguf-split --merge) first")]
    Split {
        /// This part, counted from 1.
        part: u64,
        /// How many parts there are.
        count: u64,
    },
    /// A tensor with too many dimensions, or too many elements.
    #[error("tensor `{name}`: {problem} (dimensions {dims:?})")]
    BadShape {
        /// The tensor.
        name: String,
        /// Its dimensions as found.
        dims: [u64; 4],
        /// What is wrong with them.
        problem: &'static str,
    },
    /// A tensor whose rows are no whole number of quantization blocks.
    #[error("tensor `{name}`: a row of {cols} values is no multiple of the {block} values in a {ggml_type} block")]
    PartialBlock {
        /// The tensor.
        name: String,
        /// Values in a row.
        cols: u64,
        /// Values in a block.
        block: u64,
        /// The type's name.
        ggml_type: &'static str,
    },
    /// A tensor that does not begin on the file's alignment.
    #[error("tensor `{name}`: offset {offset} in the data section is no multiple of the alignment {alignment}")]
    Misaligned {
        /// The tensor.
        name: String,
        /// Its offset in the data section.
        offset: u64,
        /// The file's alignment.
        alignment: u64,
    },
    /// A tensor that ends outside the file.
    #[error("tensor `{name}`: {bytes} bytes at {start} end after the file's {file_bytes} bytes")]
    OutOfFile {
        /// The tensor.
        name: String,
        /// Its absolute offset.
        start: u64,
        /// Its size.
        bytes: u64,
        /// The file's size.
        file_bytes: u64,
    },
    /// Two tensors share bytes.
    #[error("tensors `{first}` and `{second}` overlap at byte {offset}")]
    Overlap {
        /// The one that begins first.
        first: String,
        /// The one that begins inside it.
        second: String,
        /// Where the second begins.
        offset: u64,
    },
    /// A value of another type than wanted.
    #[error("metadata `{key}` is {found}, wanted {wanted}")]
    WrongType {
        /// The key.
        key: String,
        /// The type found.
        found: String,
        /// The type wanted.
        wanted: &'static str,
    },
    /// A number that does not fit the type wanted.
    #[error("metadata `{key}` is {found}, out of range for {wanted}")]
    OutOfRange {
        /// The key.
        key: String,
        /// The number found.
        found: String,
        /// The type wanted.
        wanted: &'static str,
    },
    /// A string that is not UTF-8.
    #[error("metadata `{key}` is not UTF-8 from its byte {at} on")]
    NotUtf8 {
        /// The key.
        key: String,
        /// Bytes of it that are valid.
        at: usize,
    },
    /// A key that must be there.
    #[error("metadata `{key}` is missing ({wanted} wanted)")]
    Missing {
        /// The key.
        key: String,
        /// The type wanted.
        wanted: &'static str,
    },
}
