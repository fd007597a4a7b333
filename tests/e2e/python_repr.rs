//! Compares the gateway's Python format of rows with the `repr` of a real `python3`.

use std::{
    cell::RefCell,
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::Duration,
};

use gateway::legacy::python_repr::{push_float, push_text, rows_to_python};
use proptest::{
    collection::{btree_map, vec},
    prelude::*,
};
use serde_json::{Value, json};

const CASES: u32 = 4096;
/// The number of rows that are compared. It is smaller than `CASES`, because a row has about a dozen strings and
/// numbers.
const ROW_CASES: u32 = 512;

/// A Python process that answers each line of JSON with a line of JSON.
pub(crate) struct Python {
    child: Child,
    questions: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Python {
    /// Starts a Python process that evaluates `expression` for each question. The expression reads the question from
    /// the variable `q`.
    pub(crate) fn judge(expression: &str) -> RefCell<Self> {
        let program = format!(
            "import json, sys\nfor line in sys.stdin:\n q = json.loads(line)\n print(json.dumps({expression}), flush=True)"
        );
        let mut child = Command::new("python3")
            .args(["-c", &program])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 is missing in PATH");
        let (questions, answers) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        RefCell::new(Self {
            child,
            questions,
            answers: BufReader::new(answers),
        })
    }

    pub(crate) fn ask(&mut self, question: &Value) -> Value {
        writeln!(self.questions, "{question}").unwrap();
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        serde_json::from_str(&answer).unwrap_or_else(|error| panic!("python3 on {question}: {error}"))
    }
}

impl Drop for Python {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Generates strings of every Unicode plane, with a high share of quotes, control characters and line separators.
fn text() -> impl Strategy<Value = String> {
    let special = "'\"\\\0\t\n\r\u{7f}\u{80}\u{a0}\u{ad}\u{ff}\u{100}\u{2028}\u{2029}\u{d7ff}\u{e000}\u{feff}\u{ffff}\u{10000}\u{10ffff}é中😀 az{}u,:#%";
    let special: Vec<char> = special.chars().collect();
    let any_char = prop_oneof![
        3 => proptest::sample::select(special),
        2 => proptest::char::range(' ', '~'),
        2 => proptest::char::range('\0', '\u{1ff}'),
        2 => proptest::char::range('\0', '\u{ffff}'),
        2 => proptest::char::range('\u{10000}', '\u{10ffff}'),
    ];
    vec(any_char, 0..24).prop_map(String::from_iter)
}

/// Generates floats of every magnitude, and floats at which Python changes its notation.
fn float() -> impl Strategy<Value = f64> {
    let digits = (-1_000_000_000_000_i64..1_000_000_000_000, -30_i32..30);
    prop_oneof![
        4 => any::<u64>().prop_map(f64::from_bits),
        4 => digits.prop_map(|(digits, power)| format!("{digits}e{power}").parse().unwrap()),
        // Sums of few powers of two are often exactly halfway between two decimals, where Python rounds to even.
        3 => (1_u64 << 49..1 << 53, -64_i32..64).prop_map(|(m, power)| Duration::from_secs(m).as_secs_f64() * 2_f64.powi(power)),
        2 => any::<i32>().prop_map(|tenths| f64::from(tenths) / 10.0),
        2 => (0_u64..4_000_000_000_000).prop_map(|millis| Duration::from_millis(millis).as_secs_f64()),
        1 => proptest::sample::select(vec![
            0.0, -0.0, 1e-4, 9.999e-5, 1e-5, 1e15, 1e16, 1e17, 9_007_199_254_740_993.0, 123_456_789_012_345_680.0,
            9_999_999_999_999_998.0, f64::MAX, f64::MIN_POSITIVE, 5e-324, f64::NAN, f64::INFINITY, f64::NEG_INFINITY,
        ]),
    ]
}

fn config(cases: u32) -> ProptestConfig {
    // Failed cases are not stored in a file; a failure prints the smallest failing case.
    ProptestConfig {
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

#[test]
fn python_format_of_strings_equals_pythons_ascii() {
    let python = Python::judge("ascii(q)");
    proptest!(config(CASES), |(text in text())| {
        let mut written = String::new();
        push_text(&mut written, &text);
        prop_assert_eq!(json!(written), python.borrow_mut().ask(&json!(text)));
    });
}

#[test]
fn python_format_of_floats_equals_pythons_repr() {
    // The number is sent to Python as its 64 bits, so that the comparison does not depend on how JSON writes numbers.
    let python = Python::judge(
        "(lambda x: repr(x) if x - x == 0 else 'None')(__import__('struct').unpack('>d', bytes.fromhex(q))[0])",
    );
    proptest!(config(CASES), |(float in float())| {
        let mut written = String::new();
        push_float(&mut written, float);
        let bits = format!("{:016x}", float.to_bits());
        prop_assert_eq!(json!(written), python.borrow_mut().ask(&json!(bits)));
    });
}

/// Generates any row that may be stored, as metrics-svc sends it: with null instead of non-finite numbers.
fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        text().prop_map(Value::from),
        float().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<bool>().prop_map(Value::from),
        Just(Value::Null),
    ]
}

/// When Python evaluates a row with `ObjectId=str`, as docs/api/wire-contract.md describes, it gets exactly the stored
/// values.
#[test]
fn row_in_python_format_evaluates_to_stored_values() {
    let python = Python::judge("[eval(row, {'ObjectId': str}) for row in q]");
    let id = proptest::string::string_regex("[0-9a-f]{24}").unwrap();
    let row = (btree_map(text(), value(), 0..8), id).prop_map(|(mut row, id)| {
        row.insert("_id".to_owned(), Value::from(id));
        row
    });
    proptest!(config(ROW_CASES), |(rows in vec(row, 0..3))| {
        let rows = json!(rows);
        let written: Value = serde_json::from_str(&rows_to_python(&rows.to_string()).unwrap()).unwrap();
        let read_back = python.borrow_mut().ask(&written);
        // The values are compared as text, to distinguish 1 from 1.0 and 0.0 from -0.0.
        prop_assert_eq!(read_back.to_string(), rows.to_string(), "{}", written);
    });
}
