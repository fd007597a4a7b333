//! Figures that a test measures, for people and for scripts.

use std::{env, fs::OpenOptions, io::Write};

use serde_json::json;

/// Prints `figure NAME VALUE`, and adds it as a line of JSON to the file that `VMWATCH_FIGURES` names. The name ends in
/// its unit, unless it is a count. `./dev test` and `./dev soak` show the figures of a run at its end.
pub fn figure(name: &str, value: f64) {
    println!("figure {name} {value}");
    let Some(file) = env::var_os("VMWATCH_FIGURES").filter(|file| !file.is_empty()) else {
        return;
    };
    // One write of a short line at the end of a file: tests in other processes do the same.
    let line = format!("{}\n", json!({ "name": name, "value": value }));
    let file = OpenOptions::new().create(true).append(true).open(file);
    let written = file.and_then(|mut file| file.write_all(line.as_bytes()));
    written.expect("the file that VMWATCH_FIGURES names can be written");
}
