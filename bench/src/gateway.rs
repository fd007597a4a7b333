//! Compares reads through gateway, bus and service with other implementations. All implementations receive the same
//! requests in alternating rounds, read the same database, and return identical bytes.

use std::{
    net::SocketAddr,
    path::Path,
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime},
};

use anyhow::{Context, ensure};
use clap::Args;
use metrics_svc::documents::Documents;
use serde_json::json;
use testkit::{Program, Stack, StackBuilder, codes};
use vmwatch_api::{Role, Scope, metrics::Sample};
use vmwatch_blocks::Encoder;
use vmwatch_service::config::UTC_OFFSET;

use crate::{
    echo,
    fleet::{Fleet, PROCESS_INTERVAL, Random},
    load::{self, Load, Outcome},
    peers::{self, OneProcess, Peer},
    report::{Bound, Report, number},
    samples::{self, Message},
    sides::{self, Plan, Side, compare, ratios},
    statistics::Series,
    store::raw::{self, FlatRows},
};

/// Command-line options of `bench gateway`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Number of measured pairs of rounds
    #[arg(long, default_value_t = 5)]
    pairs: u32,
    /// Duration of a round in seconds
    #[arg(long, default_value_t = 4)]
    seconds: u64,
    /// Number of VMs whose rows are read
    #[arg(long, default_value_t = 1000)]
    vms: u32,
    /// Measure only the path through gateway and bus, with answers from memory instead of the database
    #[arg(long)]
    pub(crate) bus_path_only: bool,
}

/// Number of connections for reads from the database. With more connections, requests would only wait for the database.
const READERS: usize = 32;
/// Number of connections for reads from memory.
const CALLERS: usize = 64;
/// Requests per second of the open loop.
const RATE: f64 = 1000.0;
/// Number of processes of each VM.
const PROCESSES: u32 = 10;
/// Number of rows per request, as in the documented examples.
const LIMIT: u32 = 4;
/// Number of different requests, each for a random VM.
const REQUESTS: u32 = 8192;
/// The time for which answers are cached.
const KEPT: Duration = Duration::from_secs(1);
/// Number of sessions in the table while the cost of the session check is measured.
const SESSIONS: u32 = 100_000;
/// The setting for the time for which answers are cached.
pub(crate) const KEPT_SETTING: &str = "VMWATCH_NEWEST_ROWS_KEPT";

/// The documented methods that are compared.
const METHODS: [(&str, u32); 2] = [("611611", codes::VM), ("611711", codes::PROCESSES)];

pub(crate) async fn run(options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let folder = tempfile::Builder::new().prefix("vmwatch-bench-").tempdir()?;
    let plan = Plan {
        pairs: options.pairs,
        time: Duration::from_secs(options.seconds),
        connections: READERS,
    };
    way(report, folder.path(), plan).await?;
    if options.bus_path_only {
        return Ok(());
    }
    reads(report, folder.path(), plan, options.vms).await
}

/// Builds a test environment without the cache of newest rows.
pub(crate) fn stack() -> StackBuilder {
    Stack::builder()
        .durable()
        // One user sends all requests.
        .without_read_limit()
        .set(Program::Metrics, KEPT_SETTING, "0s")
        // By default the test harness makes programs ping the NATS server three times per second, to detect a frozen
        // server quickly. Benchmarks do not need that.
        .set(Program::Gateway, "VMWATCH_NATS_PING_INTERVAL", "10s")
        .set(Program::Metrics, "VMWATCH_NATS_PING_INTERVAL", "10s")
}

/// Measures the path through gateway and bus, with a service that answers from memory.
async fn way(report: &mut Report, folder: &Path, plan: Plan) -> anyhow::Result<()> {
    let stack = stack()
        .replicas(Program::Metrics, 0)
        .replicas(Program::Lifecycle, 0)
        .start()
        .await;
    report.describe(&stack)?;
    report.section("The path through gateway and bus");
    report.paragraph(
        "Method 611611 returns one row from memory. *vmwatch* is the gateway, nats-server and a service that answers \
         at once; *axum* parses the request, checks the session and renders the same answer in one process; *bare \
         axum* returns the request's bytes.",
    );
    let session = stack.session(Role::Viewer, Scope::All).await;
    let service = peers::echo(&stack, folder)?;
    let one = |name, checked, sessions| OneProcess {
        name,
        kept: Duration::ZERO,
        echo: true,
        checked,
        sessions,
    };
    let axum = peers::one_process(&stack, folder, &session, one("axum", true, 0)).await?;
    let requests = requests(
        &session,
        codes::VM,
        &["6abf5a1e-b85c-4e5f-ba02-f96e22cbd02e".to_owned()],
    );
    let processes = [
        ("gateway", stack.replica(Program::Gateway, 0).process.id()),
        ("nats-server", stack.nats.server.id()),
        ("service", service.id()),
    ];
    let ours = ours(&stack, &requests, &processes)?;
    let bare = Load::expecting(
        axum.at(),
        &Arc::new(vec![load::post("/echo", "{\"method\":611611}")]),
        b"{\"method",
    );
    let mut bare_side = axum.side(&requests, &[]);
    (bare_side.name, bare_side.load) = ("bare axum", bare);
    let sides = [ours, axum.side(&requests, &[]), bare_side];
    same_answers(&sides[..2]).await?;
    let plan = Plan {
        connections: CALLERS,
        ..plan
    };
    let rounds = compare(&sides, plan).await?;
    sides::tell(report, "echo", &sides, &rounds);
    let [ours, axum_rounds, bare] = rounds.as_slice() else {
        anyhow::bail!("one result per side was expected");
    };
    let to_axum = ratios(&ours.per_second, &axum_rounds.per_second).median();
    report.target(
        "echo_to_axum",
        "requests/s, answers from memory through vmwatch ÷ axum",
        to_axum,
        2,
        Bound::AtLeast(0.5),
    );
    let to_bare = ratios(&ours.per_second, &bare.per_second).median();
    report.figure("echo_to_bare_axum", to_bare);
    report.paragraph(&format!(
        "vmwatch ÷ bare axum, which neither parses nor checks anything: {}.",
        number(to_bare, 2)
    ));
    added(report, &stack, &sides[0].load, plan).await?;
    drop(axum);
    checks(report, &stack, folder, &session, plan).await
}

/// Measures the latency that the gateway and the service add to a bare NATS request, at a fixed rate.
async fn added(report: &mut Report, stack: &Stack, ours: &Load, plan: Plan) -> anyhow::Result<()> {
    report.section("Latency at a fixed rate");
    report.paragraph(&format!(
        "Requests are sent in an open loop at {}/s and timed from when they were due: method 611611 over HTTP through \
         gateway, bus and service, and a bare NATS request to the same service.",
        number(RATE, 0)
    ));
    let client = stack.bus.client_for_tests().clone();
    let raw = async || -> anyhow::Result<Outcome> {
        let client = client.clone();
        load::at_rate(RATE, plan.time, move || {
            let client = client.clone();
            async move {
                client.request(echo::RAW_SUBJECT, "{}".into()).await?;
                Ok(())
            }
        })
        .await
    };
    raw().await?;
    ours.open(CALLERS, RATE, plan.time).await?;
    let (mut over, mut bare) = (Vec::new(), Vec::new());
    for pair in 0..plan.pairs {
        if pair.is_multiple_of(2) {
            over.push(ours.open(CALLERS, RATE, plan.time).await?);
            bare.push(raw().await?);
        } else {
            bare.push(raw().await?);
            over.push(ours.open(CALLERS, RATE, plan.time).await?);
        }
    }
    let at = |outcomes: &[Outcome], share| -> Series {
        outcomes
            .iter()
            .map(|outcome| outcome.took.quantile(share))
            .collect()
    };
    let mut rows = vec![["ms", "p50", "p90", "p99", "p99, min to max"].map(str::to_owned)];
    for (name, outcomes) in [("gateway", &over), ("bare NATS request", &bare)] {
        let [p50, p90, p99] = [0.5, 0.9, 0.99].map(|share| at(outcomes, share).median());
        for (what, value) in [("p50", p50), ("p90", p90), ("p99", p99)] {
            report.figure(format!("at_rate_{}_{what}_ms", name.replace(' ', "_")), value);
        }
        let spread = at(outcomes, 0.99);
        let spread = format!("{} to {}", number(spread.min(), 2), number(spread.max(), 2));
        rows.push([
            name.to_owned(),
            number(p50, 2),
            number(p90, 2),
            number(p99, 2),
            spread,
        ]);
    }
    report.table(&rows);
    let differences: Series = over
        .iter()
        .zip(&bare)
        .map(|(over, bare)| over.took.quantile(0.99) - bare.took.quantile(0.99))
        .collect();
    let text = "p99 latency added to a bare NATS request at 1,000/s, ms";
    report.target("p99_added_ms", text, differences.median(), 2, Bound::AtMost(0.5));
    Ok(())
}

/// Measures the cost of the session check.
async fn checks(
    report: &mut Report,
    stack: &Stack,
    folder: &Path,
    session: &str,
    plan: Plan,
) -> anyhow::Result<()> {
    report.section("The session check");
    report.paragraph(&format!(
        "The gateway's session check (SHA-256 of the token, a lookup in a table of {} sessions) cannot be switched off. \
         It is measured in the one-process service that answers from memory, where its share is larger.",
        number(f64::from(SESSIONS), 0)
    ));
    let one = |name, checked| OneProcess {
        name,
        kept: Duration::ZERO,
        echo: true,
        checked,
        sessions: SESSIONS,
    };
    let with = peers::one_process(stack, folder, session, one("with the check", true)).await?;
    let without = peers::one_process(stack, folder, session, one("without", false)).await?;
    let requests = requests(
        session,
        codes::VM,
        &["6abf5a1e-b85c-4e5f-ba02-f96e22cbd02e".to_owned()],
    );
    let sides = [with.side(&requests, &[]), without.side(&requests, &[])];
    let rounds = compare(&sides, plan).await?;
    sides::tell(report, "session_check", &sides, &rounds);
    let [with, without] = rounds.as_slice() else {
        anyhow::bail!("one result per side was expected");
    };
    let ratio = ratios(&with.per_second, &without.per_second).median();
    let text = "requests/s with ÷ without the session check";
    report.target("session_check_ratio", text, ratio, 2, Bound::AtLeast(0.95));
    Ok(())
}

/// Compares reads from the database with a one-process service, Python and Node.
async fn reads(report: &mut Report, folder: &Path, plan: Plan, vms: u32) -> anyhow::Result<()> {
    let stack = stack().start().await;
    report.describe(&stack)?;
    let instances = fill(&stack, vms).await?;
    fill_flat(&stack, vms).await?;
    let session = stack.session(Role::Viewer, Scope::All).await;
    let one = |name, kept| OneProcess {
        name,
        kept,
        echo: false,
        checked: true,
        sessions: 0,
    };
    let axum = peers::one_process(&stack, folder, &session, one("one process", Duration::ZERO)).await?;
    report.section("Uncached reads");
    report.paragraph(&format!(
        "Each request reads the newest {LIMIT} rows of a random VM out of {vms}, over {} connections.",
        plan.connections
    ));
    let reads = (session.as_str(), instances.as_slice());
    let what = ("", "requests/s uncached ÷ one process", 0.9);
    each_method(report, &stack, &axum, reads, plan, what).await?;
    drop(axum);
    others(report, &stack, folder, &session, &instances, plan).await?;

    let metrics = stack.replica(Program::Metrics, 0);
    metrics.process.set(KEPT_SETTING, "1s");
    metrics.process.terminate(testkit::PATIENCE).await;
    metrics.restart().await;
    let axum = peers::one_process(&stack, folder, &session, one("one process", KEPT)).await?;
    let plan = Plan {
        connections: CALLERS,
        ..plan
    };
    report.section("Reads with answers cached for 1 s");
    report.paragraph(&format!(
        "The same requests over {} connections, with the cache of metrics-svc on both sides.",
        plan.connections
    ));
    let what = (
        "_kept",
        "requests/s cached for 1 s ÷ one process with the same cache",
        0.5,
    );
    each_method(report, &stack, &axum, reads, plan, what).await?;
    crate::footprint::after_reads(report, &stack)
}

/// Compares each documented method. The last argument contains the suffix of the result names, a description of the
/// comparison, and the minimum ratio to reach.
async fn each_method(
    report: &mut Report,
    stack: &Stack,
    axum: &Peer,
    (session, instances): (&str, &[String]),
    plan: Plan,
    (end, what, least): (&str, &str, f64),
) -> anyhow::Result<()> {
    for (name, method) in METHODS {
        let figure = format!("read_{name}{end}");
        let text = format!("{name}, {what}");
        let target = (figure.as_str(), text.as_str(), least);
        against(report, stack, axum, (session, method, instances), plan, target).await?;
    }
    Ok(())
}

/// Compares vmwatch with the one-process service in answering one documented method.
async fn against(
    report: &mut Report,
    stack: &Stack,
    axum: &Peer,
    (session, method, instances): (&str, u32, &[String]),
    plan: Plan,
    (figure, text, least): (&str, &str, f64),
) -> anyhow::Result<()> {
    println!("{figure}");
    let requests = requests(session, method, instances);
    let sides = [
        ours(stack, &requests, &services(stack))?,
        axum.side(&requests, &[]),
    ];
    same_answers(&sides).await?;
    let rounds = compare(&sides, plan).await?;
    report.paragraph(&format!("`{method}`:"));
    sides::tell(report, figure, &sides, &rounds);
    let [ours, theirs] = rounds.as_slice() else {
        anyhow::bail!("one result per side was expected");
    };
    let ratio = ratios(&ours.per_second, &theirs.per_second).median();
    report.target(
        &format!("{figure}_to_one_process"),
        text,
        ratio,
        2,
        Bound::AtLeast(least),
    );
    Ok(())
}

/// Compares the CPU time of vmwatch with that of typical services in Python and Node.
async fn others(
    report: &mut Report,
    stack: &Stack,
    folder: &Path,
    session: &str,
    instances: &[String],
    plan: Plan,
) -> anyhow::Result<()> {
    report.section("CPU compared with Python and Node");
    report.paragraph(
        "Uncached requests of methods 611611 and 611711, mixed. The database's CPU time is not counted. Python and \
         Node check the session against a set with one entry.",
    );
    let mixed: Vec<_> = METHODS
        .iter()
        .map(|(_, method)| requests(session, *method, instances))
        .collect();
    let mixed = mixed.iter().flat_map(|requests| requests.iter());
    let mut mixed: Vec<_> = mixed.cloned().collect();
    Random::new().shuffle(&mut mixed);
    let requests = Arc::new(mixed);
    let nats = [("nats-server", stack.nats.server.id())];
    let python = peers::wsgi(stack, folder, session).await?;
    let node = peers::node(stack, folder, session).await?;
    let sides = [
        ours(stack, &requests, &services(stack))?,
        python.side(&requests, &[]),
        node.side(&requests, &nats),
    ];
    same_answers(&sides).await?;
    let rounds = compare(&sides, plan).await?;
    sides::tell(report, "peers", &sides, &rounds);
    let [ours, python, node] = rounds.as_slice() else {
        anyhow::bail!("one result per side was expected");
    };
    for (name, figure, theirs) in [
        ("Python WSGI", "cpu_to_python", python),
        ("Node", "cpu_to_node", node),
    ] {
        let ratio = ratios(&ours.cpu, &theirs.cpu).median();
        let text = format!("CPU time per request ÷ {name}");
        report.target(figure, &text, ratio, 2, Bound::AtMost(0.25));
    }
    Ok(())
}

/// Returns the vmwatch processes and NATS servers that take part in a read. The database is not counted.
fn services(stack: &Stack) -> [(&'static str, u32); 3] {
    [
        ("gateway", stack.replica(Program::Gateway, 0).process.id()),
        ("nats-server", stack.nats.server.id()),
        ("metrics-svc", stack.replica(Program::Metrics, 0).process.id()),
    ]
}

fn ours(
    stack: &Stack,
    requests: &Arc<Vec<Vec<u8>>>,
    processes: &[(&'static str, u32)],
) -> anyhow::Result<Side> {
    Ok(Side {
        name: "vmwatch",
        load: Load::success(address(stack)?, requests),
        processes: processes.to_vec(),
    })
}

/// Returns the address of the gateway.
pub(crate) fn address(stack: &Stack) -> anyhow::Result<SocketAddr> {
    let url = stack.gateway(0).url("");
    let address = url.trim_start_matches("http://").trim_end_matches('/');
    address.parse().context("cannot parse the gateway's address")
}

/// Returns requests of a documented method, each for a random VM.
pub(crate) fn requests(session: &str, method: u32, instances: &[String]) -> Arc<Vec<Vec<u8>>> {
    let mut random = Random::new();
    let picked = (0..REQUESTS).filter_map(|_| instances.get(random.below(instances.len())));
    let requests = picked.map(|instance| {
        let body = json!({
            "method": method, "data": { "instance_id": instance }, "session_id": session, "limit": LIMIT,
        });
        load::post(gateway::legacy::PATH, &body.to_string())
    });
    Arc::new(requests.collect())
}

/// Stores recent rows of `vms` VMs through metrics-svc and returns the ids of the VMs.
pub(crate) async fn fill(stack: &Stack, vms: u32) -> anyhow::Result<Vec<String>> {
    println!("storing rows of {vms} VMs");
    let samples = minute(vms)?;
    let mut encoder = Encoder::new()?;
    let messages = samples.iter().map(|sample| Message::encode(sample, &mut encoder));
    let jetstream = stack.bus.jetstream_for_tests();
    samples::publish(jetstream, messages.collect::<Result<_, _>>()?).await?;
    samples::drained(jetstream).await?;
    let mut ids: Vec<_> = samples
        .iter()
        .map(|sample| sample.instance_id.to_string())
        .collect();
    ids.sort();
    ids.dedup();
    Ok(ids)
}

/// Stores the same rows for the programs in Python and Node, which have one document per row in collections of their own.
async fn fill_flat(stack: &Stack, vms: u32) -> anyhow::Result<()> {
    let offset = UTC_OFFSET.default.parse()?;
    let rows = FlatRows::open(&stack.database.handle(), "baseline_");
    rows.prepare().await?;
    let documents = minute(vms)?;
    let documents = documents
        .iter()
        .map(|sample| Documents::from_sample(sample, offset, SystemTime::now()));
    rows.insert(&raw::batches(documents.collect::<Result<Vec<_>, _>>()?), 1)
        .await
}

/// The samples of a minute that ended a moment before this function was first called.
fn minute(vms: u32) -> anyhow::Result<Vec<Sample>> {
    static START: OnceLock<SystemTime> = OnceLock::new();
    let start = *START.get_or_init(|| SystemTime::now() - 2 * PROCESS_INTERVAL);
    Ok(Fleet::new(vms, PROCESSES)?.minute(start, UTC_OFFSET.default.parse()?))
}

/// Waits until the gateway answers successfully, because a service may still be subscribing.
async fn answers_at_all(side: &Side) {
    testkit::eventually("the service answers", testkit::PATIENCE, async || {
        side.load
            .answers(1)
            .await
            .map(drop)
            .map_err(|error| format!("{error:#}"))
    })
    .await;
}

/// Asserts that all compared programs give the same answers; otherwise their speeds could not be compared.
async fn same_answers(sides: &[Side]) -> anyhow::Result<()> {
    let mut first = None;
    for side in sides {
        answers_at_all(side).await;
        let answers = side.load.answers(20).await?;
        let expected = first.get_or_insert_with(|| answers.clone());
        for (answer, expected) in answers.iter().zip(expected.iter()) {
            ensure!(
                answer == expected,
                "{} answers\n{answer}\ninstead of\n{expected}",
                side.name
            );
        }
    }
    Ok(())
}
