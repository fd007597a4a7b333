//! Records results that tests measure.

use std::{env, fs::OpenOptions, io::Write};

use serde_json::json;

/// Prints `figure NAME VALUE` and appends it as a JSON line to the file in `VMWATCH_FIGURES`. The name ends in the unit,
/// unless it is a count. Panics if the value is not finite, because the test then measured nothing. `./dev test` and `./dev soak` print all results at the end of a run.
pub fn figure(name: &str, value: f64) {
    assert!(value.is_finite(), "{name} is {value}");
    println!("figure {name} {value}");
    let Some(file) = env::var_os("VMWATCH_FIGURES").filter(|file| !file.is_empty()) else {
        return;
    };
    // Appends the line with a single write, because tests in other processes write to the same file.
    let line = format!("{}\n", json!({ "name": name, "value": value }));
    let file = OpenOptions::new().create(true).append(true).open(file);
    let written = file.and_then(|mut file| file.write_all(line.as_bytes()));
    written.expect("writing the file in VMWATCH_FIGURES");
}
