//! Operations on VMs: those that failed, and those that ended the condition of an alert. They are read from
//! lifecycle-svc.

mod failures;

use std::{sync::Arc, time::Duration};

use metrics::counter;
use tokio::{
    sync::{Mutex, watch},
    time::Instant,
};
use tracing::debug;
use vmwatch_api::{
    InstanceId, Principal, Role, Scope, Service,
    alerts::{Alert, EndedBy, rules::Condition},
    lifecycle::{Operation, OperationFilter, OperationPosition, OperationState, OperationsList, Verb},
    metrics::Limit,
    time::unix_millis,
    wire::Fault,
};
use vmwatch_bus::{Bus, Context};

pub(super) use self::failures::FailuresByVm;
use self::failures::{DAY_MS, Outcomes};

/// Deadline of a request.
pub(super) const DEADLINE: Duration = Duration::from_millis(1500);
/// Interval at which operations are read.
const INTERVAL: Duration = Duration::from_secs(10);
/// Number of operations of a page.
const PAGE: u64 = 200;
/// Maximum number of pages.
const MAX_PAGES: usize = 10;
/// Operations that were requested longer ago than this have ended and were read before.
const LOOK_BACK_MS: u64 = 3_600_000;
/// Time for which an answer is used again.
const FRESH: Duration = Duration::from_secs(1);
/// An operation explains the end of a condition that held at most this long after it.
const EFFECT_MS: u64 = 600_000;

/// The principal with which alert-svc reads from other services.
pub(super) fn context(limit: Duration) -> Context {
    Context::new(limit).as_principal(Principal {
        user: Service::Alert.name().to_owned(),
        role: Role::Viewer,
        scope: Scope::All,
    })
}

/// Reads operations.
#[derive(Debug)]
pub(super) struct Operations {
    bus: Bus,
    /// The newest operations of all VMs, and when they were read.
    newest: Mutex<Option<(Instant, Arc<Vec<Operation>>)>>,
}

impl Operations {
    pub(super) fn new(bus: &Bus) -> Self {
        Self {
            bus: bus.clone(),
            newest: Mutex::default(),
        }
    }

    /// The newest operations of all VMs. If lifecycle-svc does not answer, those that were read last.
    pub(super) async fn newest_of_all(&self) -> Arc<Vec<Operation>> {
        let mut newest = self.newest.lock().await;
        if let Some((at, operations)) = &*newest
            && at.elapsed() < FRESH
        {
            return Arc::clone(operations);
        }
        let operations = match self.list(None, None).await {
            Ok((operations, _)) => Arc::new(operations),
            Err(error) => {
                counter!("vmwatch_alert_sources_failed_total", "source" => "operations").increment(1);
                debug!(%error, "reading operations failed; an alert may not name the operation that ended it");
                newest
                    .as_ref()
                    .map(|(_, known)| Arc::clone(known))
                    .unwrap_or_default()
            }
        };
        *newest = Some((Instant::now(), Arc::clone(&operations)));
        operations
    }

    /// Whether the newest operation on the VM that had an effect stopped it.
    pub(super) async fn has_stopped(&self, vm: &InstanceId) -> Result<bool, Fault> {
        let (operations, _) = self.list(Some(vm), None).await?;
        Ok(last_effect(&operations, vm).is_some_and(|last| stops(last.verb)))
    }

    async fn list(
        &self,
        vm: Option<&InstanceId>,
        before: Option<OperationPosition>,
    ) -> Result<(Vec<Operation>, bool), Fault> {
        let filter = OperationFilter {
            instance_id: vm.cloned(),
            state: None,
            before,
            limit: Limit::new(PAGE).unwrap_or_default(),
        };
        let mut page = self
            .bus
            .call::<OperationsList>(&context(DEADLINE), &filter)
            .await?;
        // The steps of an operation are most of its size, and no rule is about them.
        for operation in &mut page.operations {
            operation.history = Vec::new();
        }
        Ok((page.operations, page.more))
    }

    /// The outcomes of the operations that were requested after this time.
    async fn since(&self, from_ms: u64) -> Result<Outcomes, Fault> {
        let mut outcomes = Outcomes::default();
        let mut before = None;
        for _ in 0..MAX_PAGES {
            let (page, more) = self.list(None, before).await?;
            for operation in &page {
                outcomes.add(operation);
            }
            let last = page.last();
            if !more || last.is_none_or(|last| last.requested_at_ms < from_ms) {
                return Ok(outcomes);
            }
            before = last.map(OperationPosition::from_operation);
        }
        counter!("vmwatch_alert_sources_failed_total", "source" => "operations").increment(1);
        debug!("there are too many operations; the oldest ones are not evaluated");
        Ok(outcomes)
    }

    /// Reads which operations failed for as long as somebody receives it.
    pub(super) async fn follow(self: Arc<Self>, receivers: watch::Sender<Option<Arc<FailuresByVm>>>) {
        let mut look_back_ms = DAY_MS;
        loop {
            let now_ms = unix_millis();
            match self.since(now_ms.saturating_sub(look_back_ms)).await {
                Ok(outcomes) => {
                    look_back_ms = LOOK_BACK_MS;
                    let earlier = receivers.borrow().clone().unwrap_or_default();
                    receivers.send_replace(Some(Arc::new(outcomes.after(&earlier, now_ms))));
                }
                Err(error) => {
                    counter!("vmwatch_alert_sources_failed_total", "source" => "operations").increment(1);
                    debug!(%error, "reading operations failed; retrying");
                }
            }
            tokio::time::sleep(INTERVAL).await;
        }
    }
}

/// Whether the action ends with the VM off.
const fn stops(verb: Verb) -> bool {
    matches!(verb, Verb::Stop | Verb::ForceStop)
}

/// Whether the operation has had an effect, or probably has one at the moment.
const fn has_effect(operation: &Operation) -> bool {
    matches!(
        operation.state,
        OperationState::Succeeded | OperationState::Running
    )
}

/// The newest operation on the VM that had an effect.
fn last_effect<'a>(operations: &'a [Operation], vm: &InstanceId) -> Option<&'a Operation> {
    let own = operations
        .iter()
        .filter(|one| one.instance_id == *vm && has_effect(one));
    own.max_by_key(|one| one.requested_at_ms)
}

/// Whether an operation can end such a condition.
fn can_end(operation: &Operation, condition: &Condition) -> bool {
    let restarts = operation.verb == Verb::Reboot;
    match condition {
        Condition::Measure { .. }
        | Condition::Filesystem { .. }
        | Condition::ProcessCount { .. }
        | Condition::ProcessCpu { .. }
        | Condition::ProcessMem { .. }
        | Condition::AgentFault { .. } => stops(operation.verb) || restarts,
        Condition::AgentSilent {} => operation.verb != Verb::Unknown,
        Condition::VmState { states } => operation.machine.is_none_or(|state| !states.contains(&state)),
        Condition::OperationFailed {} => true,
        Condition::NotReceiving {} => false,
    }
}

/// The operation that ended the condition of an alert: the newest one on the VM that had an effect since the alert
/// fired, can end the condition, and was not followed by a long time in which the condition still held.
pub(super) fn explaining(
    operations: &[Operation],
    vm: &InstanceId,
    alert: &Alert,
    held_ms: u64,
) -> Option<EndedBy> {
    let fired_ms = alert.fired_ms.unwrap_or(alert.since_ms);
    let explains = |one: &&Operation| {
        let ended_ms = one.finished_at_ms.unwrap_or(u64::MAX);
        one.instance_id == *vm
            && has_effect(one)
            && ended_ms >= fired_ms
            && ended_ms.saturating_add(EFFECT_MS) >= held_ms
            && can_end(one, &alert.condition)
    };
    let newest = operations
        .iter()
        .filter(explains)
        .max_by_key(|one| one.requested_at_ms)?;
    Some(EndedBy {
        operation_id: newest.id.clone(),
        action: newest.verb.as_str().to_owned(),
        user: newest.user.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::examples::{alert, operation, rule};

    fn explains(operation: Operation, condition: &str, held_ms: u64) -> bool {
        let alert = alert(&rule(condition, 0), Some("vm-1"), "", 1000);
        explaining(&[operation], &"vm-1".parse().unwrap(), &alert, held_ms).is_some()
    }

    const CPU: &str =
        r#"{"kind":"measure","measure":"cpu_util","threshold":{"direction":"above","limit":95}}"#;
    const OFF: &str = r#"{"kind":"vm_state","states":["shut_off"]}"#;

    #[test]
    fn reboot_explains_the_end_of_load_and_start_does_not() {
        let after = |verb| operation("vm-1", verb, OperationState::Succeeded, 2000);
        assert!(explains(after(Verb::Reboot), CPU, 3000));
        assert!(explains(after(Verb::Stop), CPU, 3000));
        assert!(!explains(after(Verb::Start), CPU, 3000));
        assert!(!explains(
            operation("vm-2", Verb::Stop, OperationState::Succeeded, 2000),
            CPU,
            3000
        ));
        assert!(!explains(
            operation("vm-1", Verb::Stop, OperationState::Failed, 2000),
            CPU,
            3000
        ));
    }

    #[test]
    fn operation_before_the_alert_or_long_before_its_end_explains_nothing() {
        let reboot = |ended| operation("vm-1", Verb::Reboot, OperationState::Succeeded, ended);
        assert!(!explains(reboot(999), CPU, 1500));
        assert!(explains(reboot(2000), CPU, 2000 + EFFECT_MS));
        assert!(!explains(reboot(2000), CPU, 2001 + EFFECT_MS));
    }

    #[test]
    fn operation_explains_the_end_of_a_state_that_it_does_not_lead_to() {
        let start = operation("vm-1", Verb::Start, OperationState::Succeeded, 2000);
        assert!(explains(start.clone(), OFF, 3000));
        // The hypervisor already reports the VM as running, and the operation is about to succeed.
        let running = Operation {
            state: OperationState::Running,
            finished_at_ms: None,
            machine: None,
            ..start
        };
        assert!(explains(running, OFF, 3000));
        let stop = operation("vm-1", Verb::Stop, OperationState::Succeeded, 2000);
        assert!(!explains(stop, OFF, 3000));
    }

    #[test]
    fn newest_operation_with_an_effect_decides_whether_a_vm_was_stopped() {
        let vm = "vm-1".parse().unwrap();
        let stop = operation("vm-1", Verb::Stop, OperationState::Succeeded, 1000);
        let failed = operation("vm-1", Verb::Start, OperationState::Failed, 2000);
        let other = operation("vm-2", Verb::Start, OperationState::Succeeded, 3000);
        let all = [other, failed, stop];
        assert_eq!(last_effect(&all, &vm).map(|one| one.verb), Some(Verb::Stop));
    }
}
