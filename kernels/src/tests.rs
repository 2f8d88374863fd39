//! Every set against the specification, and the specification against f64.
