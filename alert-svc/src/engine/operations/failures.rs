//! Which VMs have operations that failed. It does no I/O.

use std::collections::{HashMap, HashSet};

use vmwatch_api::{
    InstanceId,
    lifecycle::{Operation, OperationState},
};

/// Failures count for this time. At first, the operations of this time are read.
pub(super) const DAY_MS: u64 = 86_400_000;

/// Failed operations on a VM since the last one that succeeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::engine) struct Failures {
    /// When the first one ended, in Unix milliseconds.
    pub(in crate::engine) first_ms: u64,
    /// When the last one ended, in Unix milliseconds.
    pub(in crate::engine) last_ms: u64,
}

/// The failures of each VM during the last day.
pub(in crate::engine) type FailuresByVm = HashMap<InstanceId, Failures>;

/// Operations on VMs, read from the newest to the oldest.
#[derive(Debug, Default)]
pub(super) struct Outcomes {
    failures: FailuresByVm,
    /// VMs on which an operation succeeded. Earlier failures do not count.
    succeeded: HashSet<InstanceId>,
}

impl Outcomes {
    /// Adds an operation that was requested before all those that were added.
    pub(super) fn add(&mut self, operation: &Operation) {
        let vm = &operation.instance_id;
        if operation.state == OperationState::Succeeded {
            self.succeeded.insert(vm.clone());
        } else if operation.state.is_failure() && !self.succeeded.contains(vm) {
            let at_ms = ended_ms(operation);
            let failures = self.failures.entry(vm.clone()).or_insert(Failures {
                first_ms: at_ms,
                last_ms: at_ms,
            });
            failures.first_ms = failures.first_ms.min(at_ms);
            failures.last_ms = failures.last_ms.max(at_ms);
        }
    }

    /// The failures of the last day, together with those known from earlier reads.
    pub(super) fn after(self, earlier: &FailuresByVm, now_ms: u64) -> FailuresByVm {
        let mut all = self.failures;
        for (vm, earlier) in earlier {
            if !self.succeeded.contains(vm) {
                let failures = all.entry(vm.clone()).or_insert(*earlier);
                failures.first_ms = failures.first_ms.min(earlier.first_ms);
                failures.last_ms = failures.last_ms.max(earlier.last_ms);
            }
        }
        all.retain(|_, failures| now_ms.saturating_sub(failures.last_ms) < DAY_MS);
        all
    }
}

/// When the operation ended, or was requested if it has not ended.
fn ended_ms(operation: &Operation) -> u64 {
    operation.finished_at_ms.unwrap_or(operation.requested_at_ms)
}

#[cfg(test)]
mod tests {
    use vmwatch_api::lifecycle::Verb;

    use super::*;
    use crate::engine::examples::operation;

    fn outcomes(newest_first: &[Operation]) -> Outcomes {
        let mut outcomes = Outcomes::default();
        for operation in newest_first {
            outcomes.add(operation);
        }
        outcomes
    }

    #[test]
    fn failures_of_a_vm_count_since_the_last_operation_that_succeeded() {
        let of = |state, ended_ms| operation("vm-1", Verb::Start, state, ended_ms);
        let (failed, succeeded) = (OperationState::Failed, OperationState::Succeeded);
        let vm: InstanceId = "vm-1".parse().unwrap();
        let read = outcomes(&[
            of(failed, 4000),
            of(failed, 3000),
            of(succeeded, 2000),
            of(failed, 1000),
        ]);
        let expected = Failures {
            first_ms: 3000,
            last_ms: 4000,
        };
        let known = read.after(&FailuresByVm::new(), 5000);
        assert_eq!(known.get(&vm), Some(&expected));

        let later = outcomes(&[of(failed, 9000)]).after(&known, 9500);
        let expected = Failures {
            last_ms: 9000,
            ..expected
        };
        assert_eq!(later.get(&vm), Some(&expected));
        // Any number of failures of a VM takes the same memory.
        let many: Vec<_> = (10_000..20_000).rev().map(|at| of(failed, at)).collect();
        assert_eq!(outcomes(&many).after(&later, 20_000).len(), 1);
        assert_eq!(
            outcomes(&[of(succeeded, 9600)]).after(&later, 9700),
            FailuresByVm::new()
        );
        assert_eq!(
            Outcomes::default().after(&later, 9000 + DAY_MS),
            FailuresByVm::new()
        );
    }
}
