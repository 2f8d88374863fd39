//! A tiny GGUF writer: metadata and tensors of zeros, enough for a vocabulary and a hostile twin of it.
#![allow(dead_code)]

/// A file in the making.
#[derive(Default)]
pub struct Writer {
    metadata: Vec<u8>,
    metadata_count: u64,
    tensors: Vec<u8>,
    tensor_count: u64,
    data_bytes: u64,
}

impl Writer {
    pub fn u32(&mut self, key: &str, value: u32) -> &mut Self {
        self.entry(key, 4, &value.to_le_bytes())
    }

    pub fn bool(&mut self, key: &str, value: bool) -> &mut Self {
        self.entry(key, 7, &[u8::from(value)])
    }

    pub fn str(&mut self, key: &str, value: &str) -> &mut Self {
        self.entry(key, 8, &string(value))
    }

    pub fn strs(&mut self, key: &str, values: &[&str]) -> &mut Self {
        self.array(key, 8, values.len(), &values.iter().flat_map(|value| string(value)).collect::<Vec<u8>>())
    }

    pub fn i32s(&mut self, key: &str, values: &[i32]) -> &mut Self {
        self.array(key, 5, values.len(), &values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>())
    }

    pub fn f32s(&mut self, key: &str, values: &[f32]) -> &mut Self {
        self.array(key, 6, values.len(), &values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>())
    }

    /// A tensor of zeros; `bytes` must fit type and dimensions.
    pub fn tensor(&mut self, name: &str, dims: &[u64], type_id: u32, bytes: u64) -> &mut Self {
        self.tensors.extend(string(name));
        self.tensors.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|extent| self.tensors.extend(extent.to_le_bytes()));
        self.tensors.extend(type_id.to_le_bytes());
        self.tensors.extend(self.data_bytes.to_le_bytes());
        self.tensor_count += 1;
        self.data_bytes = (self.data_bytes + bytes).next_multiple_of(32);
        self
    }

    /// The file, and how many bytes of it are header.
    pub fn finish(&self) -> (Vec<u8>, usize) {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend(self.tensor_count.to_le_bytes());
        out.extend(self.metadata_count.to_le_bytes());
        out.extend(&self.metadata);
        out.extend(&self.tensors);
        let header = out.len();
        out.resize(header.next_multiple_of(32) + self.data_bytes as usize, 0);
        (out, header)
    }

    fn array(&mut self, key: &str, element: u32, len: usize, elements: &[u8]) -> &mut Self {
        let head = [&element.to_le_bytes()[..], &(len as u64).to_le_bytes()].concat();
        self.entry(key, 9, &[&head, elements].concat())
    }

    fn entry(&mut self, key: &str, kind: u32, value: &[u8]) -> &mut Self {
        self.metadata.extend(string(key));
        self.metadata.extend(kind.to_le_bytes());
        self.metadata.extend(value);
        self.metadata_count += 1;
        self
    }
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}
