//! Records the results of measurements made by tests.

use std::{env, fs::OpenOptions, io::Write};

use serde_json::json;

/// Prints `figure NAME VALUE` and appends the value as a JSON line to the file named by `VMWATCH_FIGURES`. The name
/// ends with the unit, unless the value is a count. Panics if the value is not finite, because then nothing was
/// measured. `./dev test` and `./dev soak` print all values at the end of a run.
pub fn figure(name: &str, value: f64) {
    assert!(value.is_finite(), "{name} is {value}");
    println!("figure {name} {value}");
    let Some(file) = env::var_os("VMWATCH_FIGURES").filter(|file| !file.is_empty()) else {
        return;
    };
    // The line is appended with a single write, because tests in other processes write to the same file.
    let line = format!("{}\n", json!({ "name": name, "value": value }));
    let file = OpenOptions::new().create(true).append(true).open(file);
    let written = file.and_then(|mut file| file.write_all(line.as_bytes()));
    written.expect("writing to the file named by VMWATCH_FIGURES succeeds");
}
