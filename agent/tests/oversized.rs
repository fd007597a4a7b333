//! Tests that a sample part which NATS will never accept because of its size does not hold up the following ones. It is split
//! or, if that is impossible, moved aside.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a panic fails the test"
)]

use std::{collections::BTreeSet, fs, path::Path};

use async_nats::jetstream::stream::{Config, RetentionPolicy, Stream};
use tempfile::TempDir;
use testkit::{Nats, PATIENCE, Process, Spec, eventually};
use vmwatch_api::metrics::{ProcessOwner, ProcessSample, SAMPLE_STREAM, SAMPLE_SUBJECT_PREFIX, Sample};
use vmwatch_blocks::{Encoder, SAMPLE_LIMITS, decode_sample, encode_sample};

const AGENT: &str = env!("CARGO_BIN_EXE_vmwatch-agent");
/// The largest message that NATS accepts, in bytes with headers. The agent's own samples are smaller.
const LIMIT: usize = 1150;
const ROWS: u32 = 200;

/// Random letters, which do not compress well.
fn letters(count: usize) -> String {
    let mut bits = vec![0; count];
    getrandom::fill(&mut bits).unwrap();
    bits.iter().map(|bits| char::from(b'A' + bits % 58)).collect()
}

fn sample(second: u32, processes: Vec<ProcessSample>) -> Sample {
    Sample {
        instance_id: "vm-1".parse().unwrap(),
        create_date: format!("2017-01-01T21:37:{second:02}.000000").parse().unwrap(),
        part: 1,
        net_incoming: 0.0,
        net_outgoing: 0.0,
        vm: None,
        vm_cpu: None,
        sums: Vec::new(),
        short_lived: None,
        filesystems: Vec::new(),
        processes,
    }
}

fn row(pid: u32) -> ProcessSample {
    ProcessSample {
        cmd: letters(15),
        pid,
        ..ProcessSample::default()
    }
}

/// Puts sample parts into the spool of an agent that will be started: one that can be split, one that cannot, and a small
/// one.
fn spool(folder: &Path) {
    let owner = ProcessOwner {
        command_line: Some(letters(1024)),
        unit: Some(letters(128)),
        container: Some(letters(64)),
        ..ProcessOwner::default()
    };
    let large = ProcessSample { owner, ..row(7) };
    let samples = [
        sample(1, (1..=ROWS).map(row).collect()),
        sample(2, vec![large]),
        sample(3, vec![row(1)]),
    ];
    fs::create_dir(folder.join("spool")).unwrap();
    for (number, sample) in samples.iter().enumerate() {
        let body = encode_sample(sample, &mut Encoder::new().unwrap()).unwrap();
        assert_eq!(body.len() > LIMIT - 250, number < 2, "{}", body.len());
        fs::write(folder.join(format!("spool/{number:020}.sample")), body).unwrap();
    }
}

fn agent(folder: &Path, nats: &Nats, login: &[(&str, &str)]) -> Process {
    let spool = folder.join("spool").display().to_string();
    let settings = [
        ("VMWATCH_INSTANCE_ID", "vm-1"),
        ("VMWATCH_AGENT_VM_INTERVAL", "200ms"),
        ("VMWATCH_AGENT_PROCESS_INTERVAL", "1s"),
        ("VMWATCH_AGENT_PROCESSES", "top:1"),
        ("VMWATCH_AGENT_SPOOL_DIR", &spool),
        ("VMWATCH_NATS_URL", nats.url()),
        ("VMWATCH_HEALTH_LISTEN", "127.0.0.1:0"),
    ];
    let all = settings.iter().chain(login);
    Process::start(Spec {
        name: "agent".to_owned(),
        program: AGENT.into(),
        args: Vec::new(),
        env: all
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect(),
        log: folder.join("agent.log"),
    })
}

async fn stream(nats: &Nats, max_message_size: i32) -> Stream {
    let bus = nats.connect("test").await;
    let config = Config {
        name: SAMPLE_STREAM.to_owned(),
        subjects: vec![format!("{SAMPLE_SUBJECT_PREFIX}*")],
        retention: RetentionPolicy::WorkQueue,
        max_message_size,
        ..Config::default()
    };
    bus.jetstream_for_tests().create_stream(config).await.unwrap()
}

/// Waits until the agent's own samples arrive, and checks what became of the spooled ones.
async fn assert_later_parts_arrive(folder: &TempDir, stream: &Stream) {
    let (mut pids, mut small, mut own, mut next) = (BTreeSet::new(), false, 0, 1);
    eventually("later parts arrive", PATIENCE * 4, async || {
        let last = stream
            .get_info()
            .await
            .map_err(|error| error.to_string())?
            .state
            .last_sequence;
        while next <= last {
            let message = stream
                .get_raw_message(next)
                .await
                .map_err(|error| error.to_string())?;
            let sample = decode_sample(&message.payload, SAMPLE_LIMITS).unwrap();
            match sample.create_date.as_str() {
                "2017-01-01T21:37:01.000000" => pids.extend(sample.processes.iter().map(|row| row.pid)),
                "2017-01-01T21:37:02.000000" => panic!("this part is too large"),
                "2017-01-01T21:37:03.000000" => small = true,
                _ => own += 1,
            }
            next += 1;
        }
        (own >= 2)
            .then_some(())
            .ok_or(format!("{} rows, {small}, {own}", pids.len()))
    })
    .await;
    assert!(small);
    assert_eq!(pids, (1..=ROWS).collect(), "each row arrives");
    let refused: Vec<_> = fs::read_dir(folder.path().join("spool/refused"))
        .unwrap()
        .collect();
    assert_eq!(refused.len(), 1);
    let body = fs::read(refused[0].as_ref().unwrap().path()).unwrap();
    let kept = decode_sample(&body, SAMPLE_LIMITS).unwrap();
    assert_eq!(kept.create_date.as_str(), "2017-01-01T21:37:02.000000");
    let log = fs::read_to_string(folder.path().join("agent.log")).unwrap();
    assert!(
        log.contains("splitting it") && log.contains("moved it aside"),
        "{log}"
    );
}

#[tokio::test]
async fn part_larger_than_the_server_accepts_is_split_or_moved_aside() {
    let folder = tempfile::tempdir().unwrap();
    let nats = Nats::start_configured(folder.path(), "", "").await;
    let stream = stream(&nats, -1).await;
    nats.server.kill9();
    nats.configure(folder.path(), "", &format!("max_payload: {LIMIT}"));
    nats.restart().await;
    spool(folder.path());
    let _agent = agent(folder.path(), &nats, &[]);
    assert_later_parts_arrive(&folder, &stream).await;
}

#[tokio::test]
async fn part_larger_than_the_stream_accepts_is_split_or_moved_aside() {
    let folder = tempfile::tempdir().unwrap();
    let nats = Nats::start_configured(folder.path(), "", "").await;
    let stream = stream(&nats, i32::try_from(LIMIT).unwrap()).await;
    spool(folder.path());
    let _agent = agent(folder.path(), &nats, &[]);
    assert_later_parts_arrive(&folder, &stream).await;
}

/// The account's limit is lower than the server's, as in deploy/nats/accounts.conf: the server closes the connection.
#[tokio::test]
async fn part_larger_than_the_account_allows_is_split_or_moved_aside() {
    let folder = tempfile::tempdir().unwrap();
    let accounts = format!(
        "accounts {{
            VMWATCH {{
                jetstream: enabled
                exports: [{{ service: \"vmwatch.v1.samples.*\", response_type: Singleton }}]
                users: [{{ user: test, password: test }}]
            }}
            AGENTS {{
                imports: [{{ service: {{ account: VMWATCH, subject: \"vmwatch.v1.samples.*\" }} }}]
                limits {{ max_payload: {LIMIT} }}
                users: [{{ user: agent, password: secret }}]
            }}
        }}
        no_auth_user: test"
    );
    let nats = Nats::start_configured(folder.path(), "", &accounts).await;
    let stream = stream(&nats, -1).await;
    spool(folder.path());
    let password = folder.path().join("password");
    fs::write(&password, "secret").unwrap();
    let password = password.display().to_string();
    let login = [
        ("VMWATCH_NATS_USER", "agent"),
        ("VMWATCH_NATS_PASSWORD_FILE", password.as_str()),
    ];
    let _agent = agent(folder.path(), &nats, &login);
    assert_later_parts_arrive(&folder, &stream).await;
}
