//! Compares reads of the newest rows: a long history with an hour of history, and blocks with one document per row.

use std::time::{Duration, Instant, SystemTime};

use anyhow::ensure;
use metrics_svc::documents::Documents;
use serde_json::json;
use testkit::{PATIENCE, Program, codes};
use vmwatch_api::InstanceId;

use super::{
    Scale,
    activity::{ACTIVITIES, Vm},
    raw::{self, FlatRows},
    reads::Setup,
};
use crate::{
    gateway::address,
    load::{self, Connection},
    report::{Bound, Report, number},
    statistics::Series,
};

/// The reads of newest rows: name, method and limit.
const READS: [(&str, u32, u32); 3] = [
    ("newest_10_process_rows", codes::PROCESSES, 10),
    ("newest_1000_process_rows", codes::PROCESSES, 1000),
    ("newest_10_vm_rows", codes::VM, 10),
];
/// Number of the VM whose rows are documents.
const FLAT_VM: u32 = 2;
/// Minutes of rows of that VM.
const FLAT_MINUTES: u32 = 60;

/// Compares the VM with a long history and the one with an hour.
pub(super) async fn run(setup: &Setup, scale: &Scale, report: &mut Report) -> anyhow::Result<()> {
    let vms = [("long history", &setup.long), ("an hour", &setup.short)];
    let ratios = compare(setup, vms, scale, report, "newest").await?;
    for ((name, ..), ratio) in READS.iter().zip(ratios) {
        let text = format!(
            "{} through the gateway, {} days of history ÷ an hour",
            name.replace('_', " "),
            scale.days
        );
        let figure = format!("{name}_long_to_short");
        report.target(&figure, &text, ratio, 2, Bound::AtMost(1.2));
    }
    Ok(())
}

/// Compares the VM with an hour of blocks and one with an hour of rows in the flat collections.
pub(super) async fn compare_with_flat(
    setup: &Setup,
    scale: &Scale,
    report: &mut Report,
) -> anyhow::Result<()> {
    let mut vm = Vm::new(FLAT_VM, ACTIVITIES[1], setup.offset)?;
    let documents = (0..FLAT_MINUTES).rev().map(|minute| {
        let at = setup.end - Duration::from_mins(1) * minute;
        Documents::from_sample(vm.next(at), setup.offset, SystemTime::now())
    });
    let batches = raw::batches(documents.collect::<Result<Vec<_>, _>>()?);
    FlatRows::open(&setup.stack.database.handle(), "")
        .insert(&batches, 1)
        .await?;
    // metrics-svc checks at its start whether the flat collections have rows.
    let metrics = setup.stack.replica(Program::Metrics, 0);
    metrics.process.terminate(PATIENCE).await;
    metrics.restart().await;
    report.paragraph(
        "For comparison with one document per row, a third VM has an hour of rows in the flat collections. These are \
         then read for every VM.",
    );
    let vms = [("blocks", &setup.short), ("documents", &vm.id().clone())];
    let ratios = compare(setup, vms, scale, report, "flat").await?;
    for ((name, ..), ratio) in READS.iter().zip(ratios) {
        let text = format!(
            "{} through the gateway, blocks ÷ one document per row",
            name.replace('_', " ")
        );
        report.target(
            &format!("{name}_blocks_to_flat"),
            &text,
            ratio,
            2,
            Bound::AtMost(1.0),
        );
    }
    Ok(())
}

/// Sends each read for both VMs in turn, one after the other. Returns the ratios of the medians.
async fn compare(
    setup: &Setup,
    vms: [(&str, &InstanceId); 2],
    scale: &Scale,
    report: &mut Report,
    figures: &str,
) -> anyhow::Result<Vec<f64>> {
    let mut connection = Connection::open(address(&setup.stack)?).await?;
    let [(first, _), (second, _)] = vms;
    let mut rows = vec![["median (99 %), ms", first, second, "ratio"].map(str::to_owned)];
    let mut ratios = Vec::new();
    for (name, method, limit) in READS {
        let requests = vms.map(|(_, vm)| request(&setup.session, method, vm, limit));
        let mut took = [Vec::new(), Vec::new()];
        for repeat in 0..scale.newest {
            // The order changes, because the first read may warm caches for the second.
            for turn in [repeat % 2, (repeat + 1) % 2] {
                let (Some(request), Some(took)) = (requests.get(turn), took.get_mut(turn)) else {
                    continue;
                };
                let started = Instant::now();
                let body = connection.send(request).await?;
                took.push(started.elapsed().as_secs_f64() * 1e3);
                if repeat == 0 {
                    check(name, body, limit)?;
                }
            }
        }
        let [one, other] = took.map(|took| took.into_iter().collect::<Series>());
        let ratio = one.median() / other.median();
        let cell = |took: &Series| {
            format!(
                "{} ({})",
                number(took.median(), 2),
                number(took.quantile(0.99), 2)
            )
        };
        rows.push([name.replace('_', " "), cell(&one), cell(&other), number(ratio, 2)]);
        for ((side, _), took) in vms.iter().zip([&one, &other]) {
            report.figure(
                format!("{figures}_{name}_{}_ms", side.replace(' ', "_")),
                took.median(),
            );
        }
        ratios.push(ratio);
    }
    report.table(&rows);
    Ok(ratios)
}

fn request(session: &str, method: u32, vm: &InstanceId, limit: u32) -> Vec<u8> {
    let body = json!({
        "method": method, "data": { "instance_id": vm }, "session_id": session, "limit": limit,
    });
    load::post(gateway::legacy::PATH, &body.to_string())
}

/// Checks that the answer has the requested number of rows.
fn check(name: &str, body: &[u8], limit: u32) -> anyhow::Result<()> {
    let text = String::from_utf8_lossy(body);
    let rows = text.matches("u'create_date'").count();
    let beginning: String = text.chars().take(500).collect();
    ensure!(
        rows == limit as usize,
        "{name}: {rows} rows instead of {limit}: {beginning}"
    );
    Ok(())
}
