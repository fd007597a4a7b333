//! Loads what `top` shows for a moment, and finds the previous and the next process table.

use futures::future::{try_join, try_join3};
use jiff::{SignedDuration, Timestamp};
use serde_json::json;
use vmwatch_api::{
    InstanceId,
    measures::{VmMeasures, VmValues},
};

use crate::{
    answers::{Process, ProcessTable, Series, Vm},
    client::Client,
    error::CliError,
    output::typed,
    time::{hour_before, to_query},
};

/// Maximum number of processes that are read of a table.
const MAX_PROCESSES: usize = 10_000;
/// Points of the chart of the last hour, as many as the list of VMs has.
const SPARKLINE_POINTS: &str = "20";
/// The shortest and the longest step in which the next table is looked for.
const STEPS: (SignedDuration, SignedDuration) = (SignedDuration::from_secs(1), SignedDuration::from_hours(1));
/// Maximum number of steps of each search for the next table. Doubled steps of a second span years.
const MAX_PROBES: u32 = 32;

/// The moment to load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Load {
    Live,
    /// The table of a moment: the newest that is not later.
    At(Timestamp),
    /// The table before the one of this time.
    Before(Timestamp),
    /// The table after the one of this time. The expected interval between tables is given.
    After(Timestamp, SignedDuration),
}

/// What is shown for a moment.
#[derive(Debug, Clone)]
pub(crate) struct Snapshot {
    /// Time of the process table; `None` if none is stored.
    pub(crate) at: Option<Timestamp>,
    /// The requested moment; `None` if live.
    pub(crate) wanted: Option<Timestamp>,
    pub(crate) processes: Vec<Process>,
    pub(crate) total: u64,
    /// The part of the VM's CPU time that the processes explain, 0 to 1.
    pub(crate) explained: Option<f64>,
    pub(crate) values: Option<VmMeasures<Option<f64>>>,
    /// CPU usage in the hour before the moment.
    pub(crate) sparkline: Vec<Option<f64>>,
    /// The state of the VM now; only if live.
    pub(crate) vm: Option<Vm>,
}

/// Loads a moment; `None` if there is no earlier table.
pub(crate) async fn load(client: &Client, id: &InstanceId, what: Load) -> Result<Option<Snapshot>, CliError> {
    match what {
        Load::Live => live(client, id).await.map(Some),
        Load::At(at) => past(client, id, at).await.map(Some),
        Load::Before(at) => {
            let before = at.checked_sub(SignedDuration::from_millis(1)).unwrap_or(at);
            let found = past(client, id, before).await?;
            Ok(found.at.map(|at| Snapshot {
                wanted: Some(at),
                ..found
            }))
        }
        Load::After(at, interval) => match next_table(client, id, at, interval).await? {
            Some(next) => past(client, id, next).await.map(Some),
            None => live(client, id).await.map(Some),
        },
    }
}

async fn live(client: &Client, id: &InstanceId) -> Result<Snapshot, CliError> {
    let path = format!("/vms/{id}");
    let vm = client.get::<Vm>(&path, &[]);
    let (vm, table) = try_join(vm, processes(client, id, None)).await?;
    Ok(Snapshot {
        values: vm.values().map(VmValues::as_floats),
        sparkline: vm.cpu_sparkline.clone(),
        vm: Some(vm),
        ..snapshot(table, None)
    })
}

async fn past(client: &Client, id: &InstanceId, at: Timestamp) -> Result<Snapshot, CliError> {
    let minute_before = at.checked_sub(SignedDuration::from_mins(1)).unwrap_or(at);
    let (table, hour, minute) = try_join3(
        processes(client, id, Some(at)),
        samples(client, id, hour_before(at), at, SPARKLINE_POINTS),
        samples(client, id, minute_before, at, "12"),
    )
    .await?;
    let newest = minute.buckets.last().or(hour.buckets.last());
    Ok(Snapshot {
        values: newest.map(|bucket| bucket.stats.map(|stat| stat.map(|stat| stat.avg))),
        sparkline: hour
            .buckets
            .iter()
            .map(|bucket| bucket.stats.cpu_util.map(|stat| stat.max))
            .collect(),
        ..snapshot(table, Some(at))
    })
}

fn snapshot(table: ProcessTable, wanted: Option<Timestamp>) -> Snapshot {
    let used = table.vm_cpu.map(|cpu| cpu.total()).filter(|used| *used > 0.0);
    Snapshot {
        at: table.at.map(|at| at.0),
        wanted,
        total: table.total,
        explained: used.map(|used| table.cpu_seconds / used),
        processes: table.processes,
        values: None,
        sparkline: Vec::new(),
        vm: None,
    }
}

/// Reads all pages of a process table.
async fn processes(
    client: &Client,
    id: &InstanceId,
    at: Option<Timestamp>,
) -> Result<ProcessTable, CliError> {
    let query = [("at", at.map(to_query))];
    let path = format!("/vms/{id}/processes");
    let list = client.list(&path, &query, "processes", MAX_PROCESSES).await?;
    let mut head = list.head;
    if let Some(fields) = head.as_object_mut() {
        fields.insert("processes".to_owned(), json!([]));
    }
    let table: ProcessTable =
        serde_json::from_value(head).map_err(|error| CliError::Answer(error.to_string()))?;
    Ok(ProcessTable {
        processes: typed(list.items)?,
        ..table
    })
}

async fn samples(
    client: &Client,
    id: &InstanceId,
    from: Timestamp,
    to: Timestamp,
    points: &str,
) -> Result<Series, CliError> {
    let query = [
        ("from", Some(to_query(from))),
        ("to", Some(to_query(to))),
        ("points", Some(points.to_owned())),
    ];
    client.get(&format!("/vms/{id}/samples"), &query).await
}

/// Finds the first process table after a moment; `None` if there is none. The REST API only finds the newest table up
/// to a moment, so this asks for later and later moments until there is another table, and then searches between the
/// last two.
async fn next_table(
    client: &Client,
    id: &InstanceId,
    after: Timestamp,
    interval: SignedDuration,
) -> Result<Option<Timestamp>, CliError> {
    let now = Timestamp::now();
    let mut step = interval.clamp(STEPS.0, STEPS.1);
    let mut none_until = after;
    for _ in 0..MAX_PROBES {
        let until = none_until.checked_add(step).unwrap_or(now).min(now);
        if let Some(found) = table_time(client, id, until)
            .await?
            .filter(|found| *found > after)
        {
            return first_between(client, id, after, none_until, found)
                .await
                .map(Some);
        }
        if until == now {
            break;
        }
        none_until = until;
        step = step.saturating_mul(2);
    }
    Ok(None)
}

/// Finds the first process table after a moment by bisection. There is none up to `none_until`, and one at `found`.
async fn first_between(
    client: &Client,
    id: &InstanceId,
    after: Timestamp,
    mut none_until: Timestamp,
    mut found: Timestamp,
) -> Result<Timestamp, CliError> {
    for _ in 0..MAX_PROBES {
        let before = found.checked_sub(SignedDuration::from_millis(1)).unwrap_or(after);
        match table_time(client, id, before).await? {
            Some(earlier) if earlier > after && earlier < found => found = earlier,
            _ => break,
        }
        let middle = none_until
            .checked_add(found.duration_since(none_until) / 2)
            .unwrap_or(found);
        match table_time(client, id, middle).await? {
            Some(earlier) if earlier > after => found = earlier,
            _ => none_until = middle,
        }
    }
    Ok(found)
}

/// The time of the newest process table up to a moment.
async fn table_time(client: &Client, id: &InstanceId, at: Timestamp) -> Result<Option<Timestamp>, CliError> {
    let query = [("at", Some(to_query(at))), ("limit", Some("1".to_owned()))];
    let table: ProcessTable = client.get(&format!("/vms/{id}/processes"), &query).await?;
    Ok(table.at.map(|at| at.0))
}
