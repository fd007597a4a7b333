//! Tests the command `enroll`.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
};

use nkeys::KeyPair;
use serde_json::Value;
use testkit::{PATIENCE, Process, eventually, free_port};

use super::{
    Vm,
    gateway::{Answer, Certificates, FakeGateway},
    token,
};

/// A user that exists nowhere; files can belong to it.
const OTHER_USER: u32 = 64_999;

#[tokio::test]
async fn enroll_registers_its_key_and_stores_the_identity_for_the_agents_user() {
    let vm = Vm::new();
    let certificates = Certificates::new(false);
    let gateway = FakeGateway::start_with(&[Answer::enrols()], Some(certificates.acceptor())).await;
    let ca_file = vm.folder.path().join("ca.crt");
    fs::write(&ca_file, certificates.ca).unwrap();
    let root = rustix::process::geteuid().is_root();
    if root {
        // Root runs the command, but the agent's user owns the state folder.
        fs::set_permissions(vm.folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        chown(vm.state(), Some(OTHER_USER), Some(OTHER_USER)).unwrap();
    }
    let ca_file = ca_file.display().to_string();
    let further = ["--instance-id", "vm-7", "--ca-file", &ca_file];
    let (code, output) = vm.enrols(&gateway.url, &further).await;
    assert_eq!(code, 0, "{output}");

    let seed = fs::read_to_string(vm.identity().join("agent.seed")).unwrap();
    let key = KeyPair::from_seed(seed.lines().next().unwrap())
        .unwrap()
        .public_key();
    assert!(
        output.contains(&format!("enrolled vm-7 with the key {key}")),
        "{output}"
    );
    let request = &gateway.requests()[0];
    assert_eq!(request["token"], token(1).to_string());
    assert_eq!(request["instance_id"], "vm-7");
    assert_eq!(request["public_key"], key);
    let record = vm.record();
    assert_eq!(record["instance_id"], "vm-7");
    assert_eq!(record["public_key"], key);
    assert_eq!(record["answer"]["nats_urls"][0], "tls://bus.example:4222");
    assert_eq!(record["platform"], request["platform"]);

    let mut names: Vec<_> = fs::read_dir(vm.identity())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["agent.seed", "enrollment.json", "lock"]);
    for name in ["", "agent.seed", "enrollment.json", "lock"] {
        let found = fs::metadata(vm.identity().join(name)).unwrap();
        let mode = if name.is_empty() { 0o700 } else { 0o600 };
        assert_eq!(found.mode() & 0o7777, mode, "{name}");
        if root {
            assert_eq!((found.uid(), found.gid()), (OTHER_USER, OTHER_USER), "{name}");
        }
    }
}

/// Returns an answer of the gateway, and what the command makes of it: exit code and advice.
fn answers() -> Vec<(Answer, i32, &'static str)> {
    let retry_after = |seconds: &str| vec![("retry-after", seconds.to_owned())];
    vec![
        (
            Answer::problem(401, "The join token is wrong."),
            77,
            "is wrong; ask an administrator",
        ),
        (
            Answer::problem(403, "The join token\u{1b}[31m is expired."),
            77,
            "The join token[31m is expired;",
        ),
        (
            Answer::problem(409, "VM vm-1 has an agent"),
            79,
            "allows replacement",
        ),
        (
            Answer::problem(400, "instance_id is invalid"),
            65,
            "instance_id is invalid",
        ),
        (Answer::problem(503, ""), 69, "HTTP status 503"),
        (
            Answer::Http(429, retry_after("3600"), String::new()),
            75,
            "try again in 3600 s",
        ),
        (Answer::problem(404, ""), 81, "HTTP status 404"),
        (
            Answer::Http(
                302,
                vec![("location", "https://a.example".to_owned())],
                String::new(),
            ),
            81,
            "redirection",
        ),
        (
            Answer::Http(201, Vec::new(), "<html>".to_owned()),
            81,
            "not the answer of a vmwatch gateway",
        ),
        (
            Answer::Http(201, Vec::new(), format!("\"{}\"", "x".repeat(70_000))),
            81,
            "more than 65536 bytes",
        ),
        (Answer::Enrols(Vec::new()), 81, "no valid URLs"),
        (
            Answer::EnrolsWith("tls://a.example".to_owned(), "no certificate".to_owned()),
            81,
            "not PEM certificates",
        ),
        (
            Answer::Enrols(vec!["http://a.example".to_owned()]),
            81,
            "no valid URLs",
        ),
    ]
}

#[tokio::test]
async fn each_refusal_has_an_exit_code_and_advice_and_stores_no_identity() {
    let vm = Vm::new();
    let gateway = FakeGateway::start(&[Answer::enrols()]).await;
    for (answer, expected, advice) in answers() {
        gateway.answer(std::slice::from_ref(&answer));
        let (code, output) = vm.enrols(&gateway.url, &[]).await;
        assert_eq!(code, expected, "{answer:?}: {output}");
        assert!(
            output.contains(advice) && !output.contains('\u{1b}'),
            "{answer:?}: {output}"
        );
        assert!(!vm.identity().join("enrollment.json").exists());
    }
    let keys: Vec<_> = gateway
        .requests()
        .iter()
        .map(|request| request["public_key"].clone())
        .collect();
    assert!(
        keys.iter().all(|key| *key == keys[0]),
        "one token, one key: {keys:?}"
    );

    let wait = Answer::Http(429, vec![("retry-after", "1".to_owned())], String::new());
    gateway.answer(&[wait, Answer::enrols()]);
    let (code, output) = vm.enrols(&gateway.url, &[]).await;
    assert_eq!(code, 0, "{output}");
    assert!(output.contains("trying again in 1 s"), "{output}");
}

#[tokio::test]
async fn each_fault_of_network_and_input_has_an_exit_code_and_sends_no_token() {
    let vm = Vm::new();
    let tls = async |certificates: &Certificates| {
        FakeGateway::start_with(&[Answer::enrols()], Some(certificates.acceptor())).await
    };
    let untrusted = tls(&Certificates::new(false)).await;
    let outdated = Certificates::new(true);
    let expired = tls(&outdated).await;
    let file = |name: &str, content: &str| {
        let path = vm.folder.path().join(name);
        fs::write(&path, content).unwrap();
        path.display().to_string()
    };
    let other_ca = file("other.crt", &Certificates::new(false).ca);
    let ca = file("ca.crt", &outdated.ca);
    let (empty, no_token) = (file("empty", ""), file("no-token", "hunter2"));
    let refused = format!("http://127.0.0.1:{}", free_port());
    let cases: [(&str, &[&str], i32, &str); 9] = [
        (
            "https://gateway.invalid",
            &["--ca-file", &ca],
            68,
            "cannot be resolved",
        ),
        (&refused, &[], 69, "no firewall blocks the port"),
        (
            &untrusted.url,
            &["--ca-file", &other_ca],
            76,
            "give it with --ca-file",
        ),
        (&expired.url, &["--ca-file", &ca], 80, "check the clock"),
        (
            &untrusted.url,
            &["--ca-file", &empty],
            66,
            "contains no PEM certificate",
        ),
        (
            &untrusted.url,
            &["--ca-file", "/nonexistent"],
            66,
            "cannot be read",
        ),
        ("http://gateway.invalid", &[], 64, "http:// only for this machine"),
        (&untrusted.url, &["--instance-id", "a.b"], 64, "must be 1 to 64"),
        (&untrusted.url, &["--token"], 64, "unexpected argument"),
    ];
    for (url, further, expected, advice) in cases {
        let (code, output) = vm.enrols(url, further).await;
        assert_eq!(code, expected, "{url} {further:?}: {output}");
        assert!(output.contains(advice), "{url} {further:?}: {output}");
    }
    for (token_file, expected) in [(&empty, 66), (&no_token, 77), (&"/nonexistent".to_owned(), 66)] {
        let args = ["enroll", "--gateway", &untrusted.url, "--token-file", token_file];
        let (code, output) = super::ended(Process::start(vm.spec("enroll", &args))).await;
        assert_eq!(code, expected, "{output}");
        assert!(!output.contains("hunter2"), "{output}");
    }
    assert_eq!((untrusted.requests().len(), expired.requests().len()), (0, 0));
}

#[tokio::test]
async fn killed_enrolment_is_repeated_with_the_same_key() {
    let vm = Vm::new();
    let gateway = FakeGateway::start(&[Answer::Nothing]).await;
    let token = vm.token(1);
    let args = ["enroll", "--gateway", &gateway.url, "--token-file", &token];
    for attempt in 1..=2 {
        let process = Process::start(vm.spec("enroll", &args));
        eventually("the gateway gets the request", PATIENCE, async || {
            let count = gateway.requests().len();
            (count == attempt).then_some(()).ok_or_else(|| process.log())
        })
        .await;
        process.kill9();
        assert!(!vm.identity().join("enrollment.json").exists());
    }
    gateway.answer(&[Answer::enrols()]);
    for _ in 0..2 {
        let (code, output) = vm.enrols(&gateway.url, &[]).await;
        assert_eq!(code, 0, "{output}");
    }
    let requests = gateway.requests();
    let key = vm.record()["public_key"].clone();
    assert_eq!(requests.len(), 4);
    assert!(
        requests.iter().all(|request| request["public_key"] == key),
        "{requests:?}"
    );
    assert!(!vm.identity().join("agent.seed.new").exists());

    // Another token is another enrolment.
    let token = vm.token(2);
    let args = ["enroll", "--gateway", &gateway.url, "--token-file", &token];
    let (code, output) = super::ended(Process::start(vm.spec("enroll", &args))).await;
    assert_eq!(code, 0, "{output}");
    assert_ne!(vm.record()["public_key"], key);
}

#[tokio::test]
async fn enroll_warns_if_the_clock_differs_from_the_gateways() {
    let vm = Vm::new();
    let gateway = FakeGateway::start(&[Answer::enrols()]).await;
    let (code, output) = vm.enrols(&gateway.url, &[]).await;
    assert_eq!(code, 0);
    assert!(!output.contains("clock"), "{output}");
    let request: Value = gateway.requests()[0].clone();
    let body = serde_json::json!({
        "instance_id": request["instance_id"], "nats_urls": ["nats://a.example"], "utc_offset": "+00:00",
        "vm_interval_ms": 10_000, "process_interval_ms": 60_000,
    });
    let past = vec![("date", "Thu, 01 Jan 2015 00:00:00 GMT".to_owned())];
    gateway.answer(&[Answer::Http(201, past, body.to_string())]);
    let (code, output) = vm.enrols(&gateway.url, &[]).await;
    assert_eq!(code, 0);
    assert!(
        output.contains("warning: the clock of this VM") && output.contains("ahead of the gateway's"),
        "{output}"
    );
}
