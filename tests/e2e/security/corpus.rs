//! Runs the functions that `./dev fuzz` tests, on the files of its corpus.

use std::{fs, path::Path};

#[allow(unreachable_pub, reason = "the module is a separate crate under cargo-fuzz")]
#[path = "../../fuzz/src/lib.rs"]
mod targets;

type Target = fn(&[u8]);

#[test]
fn fuzz_corpus_causes_no_panic() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let targets: [(&str, Target); 5] = [
        ("request", targets::request),
        ("python_repr", targets::python_repr),
        ("sample", targets::sample),
        ("block", targets::block),
        ("encoded_sample", targets::encoded_sample),
    ];
    for (name, target) in targets {
        let files: Vec<_> = fs::read_dir(corpus.join(name)).unwrap().flatten().collect();
        assert!(files.len() >= 5, "{name}");
        for file in files {
            let bytes = fs::read(file.path()).unwrap();
            // Each prefix of the file is also tested, because a broken connection leaves a prefix.
            for end in 0..=bytes.len() {
                target(&bytes[..end]);
            }
        }
    }
}
