//! Micro-benchmarks live in `benches/`, a file per question: `cargo bench -p dormouse-bench`.
