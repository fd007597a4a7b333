//! Tests that the list of VMs shows agents whose samples are wrong or too many: a wrong clock, another UTC offset, two agents
//! with one id, samples that are not stored, and limits of a VM.

use testkit::{PATIENCE, Program, Stack, THIS_MACHINE, eventually};
use vmwatch_api::{
    Scope,
    agents::{AgentFault, VmLimit},
    lifecycle::Target,
    time::{UtcOffset, unix_millis},
    vms::{Agent, AgentFilter, Get, List, ListedVm, VmQuery},
};

use crate::{
    history_support::{HOUR, SECOND, call, call_in, publish, publish_by_clock, sample, stack, stored},
    ingest_support::Publisher,
    rows::stored_vms,
};

/// The VM as the list has it.
pub(crate) async fn listed(stack: &Stack, id: &str) -> Result<ListedVm, String> {
    let target = Target {
        instance_id: id.parse().unwrap(),
    };
    let detail = call_in::<Get>(stack, Scope::All, &target).await;
    Ok(detail.map_err(|fault| fault.to_string())?.vm)
}

pub(crate) async fn faults(stack: &Stack, id: &str) -> Result<Vec<AgentFault>, String> {
    Ok(listed(stack, id).await?.agent_faults)
}

/// Waits until this metric of each replica of metrics-svc has this value.
async fn every_replica_counts(stack: &Stack, metric: &str, expected: f64) {
    for replica in [0, 1].map(|replica| stack.replica(Program::Metrics, replica)) {
        eventually("the replica counts the VMs", PATIENCE, async || {
            let count = replica.metric(metric).await;
            (count == Some(expected))
                .then_some(())
                .ok_or(format!("{count:?}"))
        })
        .await;
    }
}

/// Waits until the VM has a fault that `is_wanted` selects.
async fn fault(stack: &Stack, id: &str, is_wanted: impl Fn(&AgentFault) -> bool) -> AgentFault {
    eventually("the VM shows the fault", PATIENCE, async || {
        let faults = faults(stack, id).await?;
        faults
            .iter()
            .copied()
            .find(&is_wanted)
            .ok_or(format!("{faults:?}"))
    })
    .await
}

#[tokio::test]
async fn vm_shows_wrong_clock_wrong_utc_offset_and_a_second_agent() {
    let stack = stack()
        .replicas(Program::Metrics, 2)
        .replicas(Program::Agent, 2)
        .set(Program::Metrics, "VMWATCH_UTC_OFFSET", "+08:00")
        .set(Program::Agent, "VMWATCH_UTC_OFFSET", "+07:00")
        .set(Program::Agent, "VMWATCH_INSTANCE_ID", THIS_MACHINE)
        .start()
        .await;
    // Replicas ignore messages that they see in another order, so the number of messages that are needed varies.
    let clock = eventually("the VM shows the wrong clock", PATIENCE, async || {
        let sample = sample("vm-behind", unix_millis() - SECOND, "+08:00", 5.0);
        publish_by_clock(&stack, &sample, -60_000).await;
        let faults = faults(&stack, "vm-behind").await?;
        faults.first().copied().ok_or("no fault is shown".to_owned())
    })
    .await;
    let AgentFault::Clock { ahead_ms } = clock else {
        panic!("{clock:?}");
    };
    assert!((-62_000..=-60_000).contains(&ahead_ms), "{ahead_ms}");

    let offset = fault(&stack, THIS_MACHINE, |fault| {
        matches!(fault, AgentFault::UtcOffset { .. })
    })
    .await;
    let of = |text: &str| text.parse::<UtcOffset>().unwrap();
    assert_eq!(
        offset,
        AgentFault::UtcOffset {
            agent: of("+07:00"),
            deployment: of("+08:00")
        }
    );
    fault(&stack, THIS_MACHINE, |fault| *fault == AgentFault::TwoAgents).await;

    publish(&stack, &sample("vm-right", unix_millis() - SECOND, "+08:00", 5.0)).await;
    let mut query = VmQuery::default();
    let ids = async |query: &VmQuery| {
        let page = call::<List>(&stack, query).await;
        page.vms
            .into_iter()
            .map(|vm| vm.instance_id.to_string())
            .collect::<Vec<_>>()
    };
    eventually("the list has all three VMs", PATIENCE, async || {
        let all = ids(&query).await;
        (all.len() == 3).then_some(()).ok_or(format!("{all:?}"))
    })
    .await;
    query.filter.agent = Some(AgentFilter::Faulty);
    eventually("the filter selects the VMs with faults", PATIENCE, async || {
        let faulty = ids(&query).await;
        let is_right = faulty.len() == 2 && !faulty.contains(&"vm-right".to_owned());
        is_right.then_some(()).ok_or(format!("{faulty:?}"))
    })
    .await;
}

/// The list shows a VM whose samples arrive and are not stored as reporting, with the reason, on every replica.
#[tokio::test]
async fn vm_shows_why_its_samples_are_not_stored_until_one_is() {
    let stack = stack()
        .replicas(Program::Metrics, 2)
        .set(Program::Metrics, "VMWATCH_VM_RETENTION", "10m")
        .set(Program::Metrics, "VMWATCH_SILENT_AFTER", "1s")
        .start()
        .await;
    let send = async |at_ms: u64| publish(&stack, &sample("vm-1", at_ms, "+00:00", 5.0)).await;
    let is_right = async || {
        send(unix_millis()).await;
        eventually("no fault is shown", PATIENCE, async || {
            let faults = faults(&stack, "vm-1").await?;
            faults.is_empty().then_some(()).ok_or(format!("{faults:?}"))
        })
        .await;
    };
    // A clock that is eight hours ahead is no reason to refuse a sample.
    send(unix_millis() + 8 * HOUR).await;
    is_right().await;
    stored(&stack).await;
    assert_eq!(stored_vms(&stack.database).await.len(), 2);

    send(unix_millis() + 25 * HOUR).await;
    let ahead = fault(&stack, "vm-1", |fault| {
        matches!(fault, AgentFault::DateAhead { .. })
    })
    .await;
    let AgentFault::DateAhead { ahead_ms } = ahead else {
        panic!("{ahead:?}");
    };
    assert!((24 * HOUR..=25 * HOUR).contains(&ahead_ms), "{ahead_ms}");
    eventually(
        "a VM with a reason is not shown as silent",
        PATIENCE,
        async || {
            let vm = listed(&stack, "vm-1").await?;
            assert_eq!(vm.agent, Some(Agent::Reporting), "{vm:?}");
            let is_old = vm
                .last_report_ms
                .is_some_and(|at_ms| unix_millis() > at_ms + 2 * SECOND);
            is_old
                .then_some(())
                .ok_or("its last row is not old enough yet".to_owned())
        },
    )
    .await;
    publish(&stack, &sample("vm-silent", unix_millis(), "+00:00", 5.0)).await;
    every_replica_counts(&stack, "vmwatch_vms_fell_silent", 1.0).await;
    every_replica_counts(&stack, "vmwatch_vms_with_agent_faults", 1.0).await;
    is_right().await;

    send(unix_millis() - HOUR).await;
    let expired = fault(&stack, "vm-1", |fault| {
        matches!(fault, AgentFault::ExpiredRows { .. })
    })
    .await;
    let AgentFault::ExpiredRows { age_ms } = expired else {
        panic!("{expired:?}");
    };
    assert!((HOUR..HOUR + 60 * SECOND).contains(&age_ms), "{age_ms}");
    is_right().await;
    stored(&stack).await;
    let rows = stored_vms(&stack.database).await;
    assert_eq!(rows.len(), 5, "neither refused nor expired rows are stored");
    let metrics = [0, 1].map(|replica| stack.replica(Program::Metrics, replica));
    let mut counted = 0.0;
    for replica in metrics {
        counted += replica
            .metric("vmwatch_rows_expired_total")
            .await
            .unwrap_or_default();
    }
    assert!((counted - 1.0).abs() < 0.1, "{counted}");
}

/// The replica that returns a VM's messages to the stream notices the limit, and all replicas show it.
#[tokio::test]
async fn vm_above_its_limits_is_shown_with_each_of_them_and_since_when() {
    let stack = stack()
        .replicas(Program::Metrics, 2)
        .set(Program::Metrics, "VMWATCH_VM_MESSAGES_PER_SECOND", "1")
        .set(Program::Metrics, "VMWATCH_STREAM_MESSAGES_PER_VM", "100")
        .start()
        .await;
    let began_ms = unix_millis();
    let mut publisher = Publisher::new(&stack, "vm-1", 1);
    let mut limits = async || {
        let sample = publisher.sample();
        while publisher.send(&sample).await.is_ok() {}
        let faults = faults(&stack, "vm-1").await?.into_iter();
        let limits = faults.map(|fault| match fault {
            AgentFault::OverLimit { limit, for_ms } => (limit, for_ms),
            other => panic!("{other:?}"),
        });
        Ok::<_, String>(limits.collect::<Vec<_>>())
    };
    let shown = eventually("the VM shows both limits", PATIENCE, async || {
        let shown = limits().await?;
        (shown.len() == 2)
            .then_some(shown.clone())
            .ok_or(format!("{shown:?}"))
    })
    .await;
    assert_eq!(
        shown.iter().map(|(limit, _)| *limit).collect::<Vec<_>>(),
        [VmLimit::Messages, VmLimit::Waiting]
    );
    let passed_ms = unix_millis() - began_ms;
    assert!(shown.iter().all(|(_, for_ms)| *for_ms <= passed_ms), "{shown:?}");
    publish(&stack, &sample("vm-2", unix_millis(), "+00:00", 5.0)).await;
    eventually("another VM is listed without a fault", PATIENCE, async || {
        let faults = faults(&stack, "vm-2").await?;
        assert_eq!(faults, []);
        Ok(())
    })
    .await;
    every_replica_counts(&stack, "vmwatch_vms_with_agent_faults", 1.0).await;

    // A replica that starts learns from the others since when the VM has been above the limit.
    let metrics = stack.replica(Program::Metrics, 0);
    metrics.process.kill9();
    metrics.restart().await;
    let restarted_ms = unix_millis();
    eventually("both replicas show since when", PATIENCE, async || {
        for _ in 0..10 {
            let shown = limits().await?;
            let since_ms = shown.first().map(|(_, for_ms)| unix_millis() - for_ms);
            if since_ms.is_none_or(|since_ms| since_ms >= restarted_ms) {
                return Err(format!("{shown:?}"));
            }
        }
        Ok(())
    })
    .await;
}
