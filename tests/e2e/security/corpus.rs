//! The corpus of `./dev fuzz` as a plain test: the same functions on the same files.

use std::{fs, path::Path};

#[allow(unreachable_pub, reason = "a crate of its own under cargo-fuzz")]
#[path = "../../fuzz/src/lib.rs"]
mod targets;

type Target = fn(&[u8]);

#[test]
fn parses_corpus_without_panic() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let targets: [(&str, Target); 3] = [
        ("request", targets::request),
        ("python_repr", targets::python_repr),
        ("sample", targets::sample),
    ];
    for (name, target) in targets {
        let files: Vec<_> = fs::read_dir(corpus.join(name)).unwrap().flatten().collect();
        assert!(files.len() >= 5, "{name}");
        for file in files {
            let bytes = fs::read(file.path()).unwrap();
            // Also a prefix of the file, as left by a broken connection.
            for end in 0..=bytes.len() {
                target(&bytes[..end]);
            }
        }
    }
}
