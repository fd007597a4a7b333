//! Replays the five examples of the documented API: stores the rows of the examples, sends their requests, and compares
//! the answers byte for byte.

use std::{fs, path::PathBuf};

use mongodb::bson::{Bson, Document, doc};
use testkit::{Program, Stack};
use vmwatch_api::{Role, Scope};

use crate::{old_rows::expire_twice, rows::blocks};

const GOLDEN: [&str; 5] = [
    "458753-login",
    "611711-getVMMonitoringProcData",
    "611611-getVMMonitoringData",
    "611712-getVMMonitoringProcByNameData",
    "32523-startmonitor",
];
/// The examples that are answered from rows.
const ROWS: [&str; 3] = [GOLDEN[1], GOLDEN[2], GOLDEN[3]];
const COLLECTIONS: [&str; 2] = ["vm_samples", "process_samples"];
/// The session ids in the documented examples.
const SESSIONS: [&str; 2] = [
    "9afdb1ec-d396-4ba3-af7a-1e38fd8751ca",
    "768a07b5-2206-4952-b445-21162571a19a",
];

/// A request and its expected answer, from a golden file. Lines that begin with `#` describe corrections of the
/// document.
struct Golden {
    request: String,
    answer: String,
}

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn read(name: &str) -> String {
    let path = path(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

impl Golden {
    fn read(name: &str) -> Self {
        let text = read(&format!("golden/{name}.golden"));
        let line = |mark| {
            text.lines()
                .find_map(|line| line.strip_prefix(mark))
                .unwrap()
                .to_owned()
        };
        Self {
            request: line("> "),
            answer: line("< "),
        }
    }
}

/// The stored hash of the documented example's password.
const HASH_OF_123456: &str =
    "$argon2id$v=19$m=19456,t=2,p=1$c29tZXNhbHRzb21lc2FsdA$gLCkzEyWRMbQQn4Hx018riGVG9PpJjML5Zpm28Rr088";

/// The documented rows are answered as documented while they are flat, after `compact-flat`, and after `load`. The rows
/// have no internal date, so the database never deletes them.
#[tokio::test]
async fn documented_examples_get_byte_identical_answers() {
    let stack = Stack::builder()
        .set(Program::Metrics, "VMWATCH_NEWEST_ROWS_KEPT", "0s")
        .set(Program::Metrics, "VMWATCH_FLAT_CHECK_INTERVAL", "0s")
        .start()
        .await;
    // The password of the documented example is shorter than the minimum for new passwords. Users that were stored
    // earlier may have such passwords, so the test stores the hash directly.
    let database = stack.database.handle();
    let users = database.collection::<Document>("users");
    let short = doc! { "$set": { "password_hash": HASH_OF_123456 } };
    let updated = users.update_one(doc! { "_id": "admin" }, short).await.unwrap();
    assert_eq!(updated.matched_count, 1);
    for collection in COLLECTIONS {
        let text = read(&format!("golden/{collection}.jsonl"));
        let rows: Vec<_> = text.lines().map(stored).collect();
        database.collection(collection).insert_many(rows).await.unwrap();
    }
    for session in SESSIONS {
        stack
            .session_of(session.parse().unwrap(), Role::Operator, Scope::All)
            .await;
    }
    assert_answers(&stack, &GOLDEN).await;

    let compact = ["compact-flat", "--delete-after", "0s"];
    let done = stack.command(Program::Metrics, &compact, "");
    assert!(!done.contains("stay flat"), "{done}");
    for collection in COLLECTIONS {
        let flat = database.collection::<Document>(collection);
        assert_eq!(flat.count_documents(doc! {}).await.unwrap(), 0, "{done}");
    }
    expire_twice(&stack).await;
    assert_answers(&stack, &ROWS).await;

    blocks(&stack.database).delete_many(doc! {}).await.unwrap();
    let files = COLLECTIONS.map(|collection| path(&format!("golden/{collection}.jsonl")));
    let load = ["load", files[0].to_str().unwrap(), files[1].to_str().unwrap()];
    stack.command(Program::Metrics, &load, "");
    expire_twice(&stack).await;
    assert_answers(&stack, &ROWS).await;
}

/// Sends the requests of examples and compares the answers.
async fn assert_answers(stack: &Stack, names: &[&str]) {
    for &name in names {
        let golden = Golden::read(name);
        let answer = stack.gateway(0).post_text(golden.request.clone()).await;
        let mut body = answer.body.clone();
        if name == "458753-login" {
            let fresh = answer.json()["session_id"].as_str().unwrap().to_owned();
            assert_ne!(fresh, SESSIONS[0]);
            body = body.replace(&fresh, SESSIONS[0]);
        }
        assert_eq!(body, golden.answer, "{name}");
        assert_eq!(
            (answer.http, answer.content_type.as_deref()),
            (200, Some("application/json")),
            "{name}"
        );
    }
}

/// Parses a line of mongoexport's format: a number without a decimal point is an Int32, a number with one is a Double.
fn stored(line: &str) -> Document {
    let row: Document = serde_json::from_str(line).unwrap();
    assert!(matches!(row.get("_id"), Some(Bson::ObjectId(_))), "{row}");
    let count = row.get("pid").or_else(|| row.get("proc"));
    assert!(matches!(count, Some(Bson::Int32(_))), "{row}");
    assert!(matches!(row.get("cpu_util"), Some(Bson::Double(_))), "{row}");
    row
}

/// The golden files equal the examples in the document, except for white space and the errors that
/// docs/api/wire-contract.md lists.
#[test]
fn golden_files_equal_documented_examples() {
    const SLIPS: [(&str, &str); 5] = [
        ("f96e22cbd0e", "f96e22cbd02e"),
        ("f96e22cbd02;", "f96e22cbd02e;"),
        ("f96e22cbd02e,", "f96e22cbd02e',"),
        ("2017-1-01", "2017-01-01"),
        ("'cpu_util':0.,", "'cpu_util':0.0,"),
    ];
    let squeezed = |text: &str| text.split_whitespace().collect::<String>();
    let mut document = squeezed(&read("../docs/api/vm-monitoring-api.md"));
    for (slip, mended) in SLIPS {
        assert!(document.contains(slip), "{slip}");
        document = document.replace(slip, mended);
    }
    let between = |from: &'static str, to: &'static str| {
        let parts = document.split(from).skip(1);
        parts
            .map(move |part| part.split(to).next().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    let requests = between("###使用说明", "###输出数据");
    let mut answers = between("<code>", "</code>");
    // In the document, the answer to `startmonitor` has a different session id than the request.
    answers[4] = answers[4].replace(SESSIONS[1], SESSIONS[0]);
    for (index, name) in GOLDEN.into_iter().enumerate() {
        let golden = Golden::read(name);
        assert_eq!(squeezed(&golden.request), requests[index], "{name}");
        assert_eq!(squeezed(&golden.answer), answers[index], "{name}");
    }
}
