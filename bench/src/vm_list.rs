//! Measures the list of VMs with a large fleet that reports all the time: the latency of its first page by every sort,
//! the requests of an open page, the memory that the VMs need, and the effect of a hypervisor that hangs. Also measures
//! scrapes of the metrics of this fleet.
//!
//! Three sets of programs run one after the other: a small fleet that sends as many samples, for comparison of the
//! memory; the large fleet with a healthy and a hung hypervisor; and three replicas of lifecycle-svc, whose calls to
//! the hypervisor are compared with those of one replica.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, ensure};
use async_nats::jetstream::Context;
use clap::Args;
use futures::future::join_all;
use serde::Deserialize;
use tempfile::TempDir;
use testkit::{
    Program, Stack, StackBuilder,
    cloud::{At, Cloud},
    eventually, no_requests, run_in_browser,
};
use vmwatch_api::{Role, Scope, time::UtcOffset};
use vmwatch_blocks::Encoder;
use vmwatch_service::config::UTC_OFFSET;

use crate::{
    fleet::{VM_INTERVAL, instance, sample_at},
    gateway::address,
    load::{self, Load, Outcome},
    report::{Bound, Report, number},
    samples::Message,
    scrapes, usage,
};

/// Command-line options of `bench fleet`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Number of simulated VMs that report
    #[arg(long, default_value_t = 10_000)]
    vms: u32,
    /// Duration of each round of list requests in seconds
    #[arg(long, default_value_t = 30)]
    seconds: u64,
}

/// List requests per second.
const RATE: f64 = 20.0;
/// Connections that send the list requests; more than are ever busy.
const CONNECTIONS: usize = 32;
/// Number of VMs in the small fleet.
const FEW: u32 = 10;
/// Time in which requests of the page and calls to the hypervisor are counted.
const MINUTE: Duration = Duration::from_mins(1);
/// Time limit for the large fleet to appear in the list.
const APPEARANCE: Duration = Duration::from_mins(3);
/// Samples are published in this interval, a few at a time, so that they arrive evenly.
const TICK: Duration = Duration::from_millis(20);
/// The values by which the list is sorted in turn, each with and without a search.
const SORTS: [&str; 9] = [
    "id",
    "name",
    "hypervisor",
    "state",
    "cpu",
    "mem",
    "disk",
    "net",
    "last_report",
];
/// Matches the ids of some of the VMs of either fleet.
const SEARCH: &str = "9";
/// Programs whose memory is compared, with the limit of the memory that 10,000 VMs may add, in MB.
const MEMORY: [(Program, &str, f64); 3] = [
    (Program::Metrics, "metrics-svc", 15.0),
    (Program::Lifecycle, "lifecycle-svc", 15.0),
    (Program::Gateway, "gateway", 5.0),
];

pub(crate) async fn run(options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let time = Duration::from_secs(options.seconds);
    let few = Fleet::start(FEW, options.vms).await?;
    report.describe(&few.stack)?;
    report.section("List of VMs");
    few.lists(time).await?;
    let before = few.resident_mb()?;
    drop(few);

    let fleet = Fleet::start(options.vms, options.vms).await?;
    let before_lists = fleet.published.load(Ordering::Relaxed);
    let lists = fleet.lists(time).await?;
    let published = u32::try_from(fleet.published.load(Ordering::Relaxed) - before_lists)?;
    let rate = f64::from(published) / lists.seconds;
    let text = format!("first page of {} VMs, {RATE} requests/s, p99, ms", options.vms);
    report.target(
        "list_p99_ms",
        &text,
        lists.took.quantile(0.99),
        1,
        Bound::AtMost(50.0),
    );
    report.figure("list_median_ms", lists.took.median());
    report.figure("fleet_samples_per_second", rate);
    report.paragraph(&format!(
        "The fleet sent {} samples/s during the requests.",
        number(rate, 0)
    ));
    let after = fleet.resident_mb()?;
    for ((_, program, limit), (after, before)) in MEMORY.iter().zip(after.into_iter().zip(before)) {
        let text = format!("memory that {} VMs add to {program}, MB", options.vms);
        let name = format!("fleet_memory_{}_mb", program.replace('-', "_"));
        report.target(&name, &text, after - before, 1, Bound::AtMost(*limit));
    }
    scrapes::run(&fleet.stack, &fleet.session, fleet.vms, report).await?;
    tab(&fleet, report).await?;
    hung(&fleet, time, report).await?;
    calls(&fleet, report).await
}

/// Counts the list requests of an open page, and measures how soon it shows rows.
async fn tab(fleet: &Fleet, report: &mut Report) -> anyhow::Result<()> {
    let figures = run_in_browser(&fleet.stack, "bench-fleet", &[], no_requests).await;
    let figure = |name: &str| figures.get(name).copied().context("the page measured nothing");
    let text = "first rows after signing in, ms";
    let first_rows = figure("tab_first_rows_ms")?;
    report.target("tab_first_rows_ms", text, first_rows, 0, Bound::AtMost(1000.0));
    let text = "list requests of an open page in a minute";
    let requests = figure("tab_list_requests_per_minute")?;
    report.target(
        "tab_list_requests_per_minute",
        text,
        requests,
        0,
        Bound::AtMost(12.0),
    );
    let text = "aborted list requests of an open page";
    let aborted = figure("tab_list_requests_aborted")?;
    report.target("tab_list_requests_aborted", text, aborted, 0, Bound::AtMost(0.0));
    Ok(())
}

/// Repeats the list requests while one of the two hypervisors does not answer.
async fn hung(fleet: &Fleet, time: Duration, report: &mut Report) -> anyhow::Result<()> {
    let held = fleet.hung.held(At::List);
    fleet.hung.hold(At::List);
    fleet.hung.wait_held(At::List, held).await;
    let lists = fleet.lists(time).await?;
    let text = "first page beside a hung hypervisor, p99, ms";
    let p99 = lists.took.quantile(0.99);
    report.target(
        "list_beside_hung_hypervisor_p99_ms",
        text,
        p99,
        1,
        Bound::AtMost(50.0),
    );
    let listed = fleet.count("").await?;
    ensure!(
        listed == fleet.vms + 1,
        "{listed} VMs are in the list beside a hung hypervisor"
    );
    fleet.hung.release(At::List);
    Ok(())
}

/// Compares the calls that three replicas of lifecycle-svc and one replica send to equal hypervisors.
async fn calls(fleet: &Fleet, report: &mut Report) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let cloud = cloud(fleet.vms).await;
    let without = [Program::Gateway, Program::Auth, Program::Metrics].into_iter();
    let stack = without.fold(Stack::builder(), |builder, program| builder.replicas(program, 0));
    let stack = stack.replicas(Program::Lifecycle, 3).set(
        Program::Lifecycle,
        "VMWATCH_HYPERVISORS",
        &cloud.entry(folder.path(), "three"),
    );
    let _stack = stack.start().await;
    // Each count begins and ends with a list, so that the ratio does not depend on when the lists fall.
    let (one, three) = tokio::join!(lists_per_minute(&fleet.cloud), lists_per_minute(&cloud));
    let text = "calls to a hypervisor, 3 replicas ÷ 1";
    report.target(
        "hypervisor_calls_ratio",
        text,
        three? / one?,
        2,
        Bound::AtMost(1.1),
    );
    Ok(())
}

/// Returns how often per minute the hypervisor is asked to list its VMs, measured over about a minute.
async fn lists_per_minute(cloud: &Cloud) -> anyhow::Result<f64> {
    let next = async || {
        let before = cloud.lists();
        eventually("the hypervisor is listed again", MINUTE, async || {
            let lists = cloud.lists();
            (lists > before)
                .then(|| (lists, Instant::now()))
                .ok_or_else(|| format!("{lists} lists"))
        })
        .await
    };
    let (first, began) = next().await;
    // The period in which the lists are counted.
    tokio::time::sleep(MINUTE).await;
    let (last, ended) = next().await;
    let count = u32::try_from(last - first)?;
    Ok(f64::from(count) * 60.0 / (ended - began).as_secs_f64())
}

/// A running vmwatch with a fleet of VMs that report.
struct Fleet {
    stack: Stack,
    vms: u32,
    /// The hypervisor that has all VMs except one.
    cloud: Cloud,
    /// The hypervisor that has one VM, and that a round makes hang.
    hung: Cloud,
    session: String,
    published: Arc<AtomicU64>,
    reports: tokio::task::JoinHandle<()>,
    _folder: TempDir,
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.reports.abort();
    }
}

impl Fleet {
    /// Starts the programs, and waits until all VMs are in the list and have reported. `rate_of` VMs would send as many
    /// samples at the default interval.
    async fn start(vms: u32, rate_of: u32) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let (cloud, hung) = (cloud(vms).await, Cloud::start(&[(HUNG_VM, "ACTIVE")]).await);
        let hypervisors = [
            cloud.entry(folder.path(), "healthy"),
            hung.entry(folder.path(), "hung"),
        ];
        let stack = stack()
            .set(Program::Lifecycle, "VMWATCH_HYPERVISORS", &hypervisors.join(","))
            .start()
            .await;
        let published = Arc::new(AtomicU64::new(0));
        let fleet = Self {
            session: stack.session(Role::Admin, Scope::All).await,
            reports: tokio::spawn(publish(
                stack.bus.jetstream_for_tests().clone(),
                vms,
                rate_of,
                UTC_OFFSET.default.parse()?,
                Arc::clone(&published),
            )),
            stack,
            vms,
            cloud,
            hung,
            published,
            _folder: folder,
        };
        fleet.appears().await;
        Ok(fleet)
    }

    async fn appears(&self) {
        let all = self.vms + 1;
        eventually("all VMs are in the list and report", APPEARANCE, async || {
            let counts = tokio::try_join!(self.count(""), self.count("&agent=reporting"));
            let counts = counts.map_err(|error| error.to_string())?;
            (counts == (all, self.vms))
                .then_some(())
                .ok_or_else(|| format!("{} of {all} VMs are in the list, {} report", counts.0, counts.1))
        })
        .await;
    }

    /// Returns how many VMs match a filter.
    async fn count(&self, filter: &str) -> anyhow::Result<u32> {
        #[derive(Deserialize)]
        struct Page {
            total: u32,
        }
        let path = format!("/api/v1/vms?limit=1{filter}");
        let request = reqwest::Client::new().get(self.stack.gateway(0).url(&path));
        let answer = request.bearer_auth(&self.session).send().await?;
        let page: Page = answer.error_for_status()?.json().await?;
        Ok(page.total)
    }

    /// Requests the first page of the list by every sort in turn, with and without a search.
    async fn lists(&self, time: Duration) -> anyhow::Result<Outcome> {
        let requests = SORTS.iter().flat_map(|sort| {
            let paths = [
                format!("/api/v1/vms?sort={sort}"),
                format!("/api/v1/vms?sort={sort}&q={SEARCH}"),
            ];
            paths.map(|path| load::get(&path, &self.session))
        });
        let requests = Arc::new(requests.collect());
        let load = Load::expecting(address(&self.stack)?, &requests, b"{\"vms\":[{");
        load.open(CONNECTIONS, RATE, time).await
    }

    /// Returns the resident memory of the programs in [`MEMORY`].
    fn resident_mb(&self) -> anyhow::Result<[f64; 3]> {
        let [metrics, lifecycle, gateway] =
            MEMORY.map(|(program, ..)| usage::resident_mb(self.stack.replica(program, 0).process.id()));
        Ok([metrics?, lifecycle?, gateway?])
    }
}

/// Id of the VM that only the hung hypervisor has.
const HUNG_VM: &str = "ffffffff-1111-4111-8111-111111111111";

fn stack() -> StackBuilder {
    Stack::builder().durable().without_rates()
}

/// Starts a simulated cloud that has the VMs of a fleet.
async fn cloud(vms: u32) -> Cloud {
    let servers: Vec<_> = (0..vms).map(instance).collect();
    let servers: Vec<_> = servers.iter().map(|id| (id.as_str(), "ACTIVE")).collect();
    Cloud::start(&servers).await
}

/// Publishes samples of the VMs in turn until the task ends, as many per second as `rate_of` VMs with the default
/// interval do.
async fn publish(jetstream: Context, vms: u32, rate_of: u32, offset: UtcOffset, published: Arc<AtomicU64>) {
    let per_tick = f64::from(rate_of) * TICK.as_secs_f64() / VM_INTERVAL.as_secs_f64();
    let (mut due, mut next) = (0.0, 0);
    let Ok(mut encoder) = Encoder::new() else { return };
    let mut ticks = tokio::time::interval(TICK);
    loop {
        ticks.tick().await;
        due += per_tick;
        let mut publishing = Vec::new();
        while due >= 1.0 {
            due -= 1.0;
            let Ok(id) = instance(next % vms).parse() else {
                return;
            };
            next += 1;
            let sample = sample_at(&id, SystemTime::now(), offset, true, 0);
            if let Ok(message) = Message::encode(&sample, &mut encoder) {
                publishing.push(message.publish(&jetstream));
            }
        }
        let acknowledged = join_all(publishing).await;
        let count = acknowledged.iter().filter(|stored| stored.is_ok()).count();
        published.fetch_add(count as u64, Ordering::Relaxed);
    }
}
