//! Computes from rollups when a rule would have fired in the last seven days.

mod reads;
mod timeline;

use std::{collections::BTreeMap, sync::Arc};

use futures::{StreamExt, stream};
use vmwatch_api::{
    alerts::rules::{Condition, Firing, MeasureName, PREVIEW_MS, Preview, PreviewVm, RuleSpec, Threshold},
    history::VmBucket,
    time::unix_millis,
    wire::Fault,
};
use vmwatch_bus::Context;

use self::{reads::SelectedVm, timeline::Bucket};
use super::Handlers;
use crate::AlertError;

/// Number of VMs whose history is read at the same time: the share of one user of the heavy reads of a metrics-svc.
const AT_ONCE: usize = 2;
/// Time before the deadline at which reading ends, in milliseconds, so that the answer arrives in time.
const RESERVE_MS: u64 = 300;
/// Maximum number of firings of a VM that are answered, the newest.
const MAX_FIRINGS: usize = 100;

/// The condition of a rule, if rollups show whether it held.
#[derive(Clone, Copy)]
enum Evaluated {
    Measure(MeasureName, Threshold),
    Silence,
}

/// What the history of a VM showed.
type Outcome = Result<(PreviewVm, u64), Fault>;

impl Handlers {
    /// Computes when a rule would have fired for up to 50 VMs that the principal may see.
    pub(super) async fn preview_rule(
        self: Arc<Self>,
        mut context: Context,
        spec: RuleSpec,
    ) -> Result<Preview, AlertError> {
        context.deadline_ms = context.deadline_ms.saturating_sub(RESERVE_MS);
        let to_ms = unix_millis();
        let from_ms = to_ms.saturating_sub(PREVIEW_MS);
        let mut preview = Preview {
            from_ms,
            to_ms,
            limitation: Some(limitation(&spec.condition).to_owned()),
            ..Preview::default()
        };
        if matches!(spec.condition, Condition::NotReceiving {}) {
            return Ok(preview);
        }
        let (vms, selected) = self.selected_vms(&context, &spec.vms).await?;
        preview.selected = selected;
        let Some(evaluated) = Evaluated::condition(&spec.condition) else {
            return Ok(preview);
        };
        let for_ms = u64::from(spec.for_seconds) * 1000;
        let outcomes: Vec<Outcome> = stream::iter(vms)
            .map(|vm| self.preview_vm(&context, vm, evaluated, for_ms, (from_ms, to_ms)))
            .buffer_unordered(AT_ONCE)
            .collect()
            .await;
        collect(&mut preview, outcomes);
        Ok(preview)
    }

    /// Computes when the rule would have fired for a VM, and the length of the longest time bucket that was read.
    async fn preview_vm(
        &self,
        context: &Context,
        vm: SelectedVm,
        evaluated: Evaluated,
        for_ms: u64,
        (from_ms, to_ms): (u64, u64),
    ) -> Outcome {
        let mut series = self
            .history(context, &vm.instance_id, (from_ms, to_ms), false)
            .await?;
        let measure = match evaluated {
            Evaluated::Measure(measure, _) => Some(measure),
            Evaluated::Silence => None,
        };
        // Only a rule about a measure applies to VMs without an agent.
        if series.is_empty() && measure.is_some() {
            series = self
                .history(context, &vm.instance_id, (from_ms, to_ms), true)
                .await?;
        }
        let step_ms = series.iter().map(|(_, step_ms)| *step_ms).max().unwrap_or(0);
        let buckets = in_order(&series, measure);
        let firing = match evaluated {
            Evaluated::Measure(_, threshold) => timeline::beyond(&buckets, threshold, for_ms, to_ms),
            Evaluated::Silence => timeline::silent(&buckets, for_ms, to_ms),
        };
        let vm = PreviewVm {
            instance_id: vm.instance_id,
            vm_name: vm.name,
            firing: newest(firing),
        };
        Ok((vm, step_ms))
    }
}

impl Evaluated {
    const fn condition(condition: &Condition) -> Option<Self> {
        match condition {
            Condition::Measure { measure, threshold } => Some(Self::Measure(*measure, *threshold)),
            Condition::AgentSilent {} => Some(Self::Silence),
            _ => None,
        }
    }
}

/// What a preview of the rule cannot show; a text for users.
const fn limitation(condition: &Condition) -> &'static str {
    match condition {
        Condition::Measure { .. } => {
            "computed from time buckets of at least five minutes, so shorter peaks and gaps are not seen"
        }
        Condition::AgentSilent {} => {
            "computed from time buckets of at least five minutes; gaps while vmwatch itself received no samples, and times at which a VM was stopped, also count as silence"
        }
        Condition::Filesystem { .. } => {
            "there is no preview of rules about filesystems, because rollups do not contain them"
        }
        Condition::ProcessCount { .. } | Condition::ProcessCpu { .. } | Condition::ProcessMem { .. } => {
            "there is no preview of rules about processes, because rollups do not contain them"
        }
        Condition::VmState { .. } => {
            "there is no preview of rules about states of VMs, because earlier states are not stored"
        }
        Condition::AgentFault { .. } => {
            "there is no preview of rules about faults of agents, because earlier faults are not stored"
        }
        Condition::OperationFailed {} => {
            "there is no preview of rules about operations; the list of operations shows those that failed"
        }
        Condition::NotReceiving {} => {
            "there is no preview of this rule, because it is about vmwatch itself and not about VMs"
        }
    }
}

/// The time buckets in order, without overlaps: a bucket at the border of two parts is in both.
fn in_order(series: &[(VmBucket, u64)], measure: Option<MeasureName>) -> Vec<Bucket> {
    let mut buckets: Vec<Bucket> = Vec::with_capacity(series.len());
    for (bucket, step_ms) in series {
        let last_ms = buckets.last().map_or(0, |last| last.to_ms);
        if bucket.at_ms < last_ms {
            continue;
        }
        let stat = measure.and_then(|wanted| {
            let mut stats = bucket.stats.described();
            stats.find_map(|(measure, stat)| (measure.name == wanted.as_str()).then_some(stat))?
        });
        buckets.push(Bucket {
            from_ms: bucket.at_ms,
            to_ms: bucket.at_ms.saturating_add(*step_ms),
            stat,
        });
    }
    buckets
}

fn newest(mut firing: Vec<Firing>) -> Vec<Firing> {
    firing.drain(..firing.len().saturating_sub(MAX_FIRINGS));
    firing
}

/// Adds what the histories showed to the preview.
fn collect(preview: &mut Preview, outcomes: Vec<Outcome>) {
    let mut unread = BTreeMap::new();
    for outcome in outcomes {
        match outcome {
            Ok((vm, step_ms)) => {
                preview.evaluated += 1;
                preview.step_ms = preview.step_ms.max(step_ms);
                if !vm.firing.is_empty() {
                    preview.vms.push(vm);
                }
            }
            Err(fault) => *unread.entry(fault.message).or_default() += 1,
        }
    }
    preview.unread = unread;
    preview.vms.sort_by(|one, other| {
        let order = other.firing.len().cmp(&one.firing.len());
        order.then_with(|| one.instance_id.cmp(&other.instance_id))
    });
}

#[cfg(test)]
mod tests {
    use vmwatch_api::{history::Stat, wire::FaultKind};

    use super::*;

    fn bucket(at_ms: u64, cpu: f64) -> VmBucket {
        let mut bucket = VmBucket {
            at_ms,
            count: 1,
            ..VmBucket::default()
        };
        bucket.stats.cpu_util = Some(Stat {
            min: cpu,
            avg: cpu,
            max: cpu,
        });
        bucket
    }

    #[test]
    fn bucket_at_the_border_of_two_parts_counts_once() {
        let series = [
            (bucket(0, 1.0), 10),
            (bucket(10, 2.0), 10),
            (bucket(10, 2.0), 10),
            (bucket(20, 3.0), 10),
        ];
        let buckets = in_order(&series, MeasureName::new("cpu_util"));
        let values: Vec<_> = buckets
            .iter()
            .map(|bucket| (bucket.from_ms, bucket.stat.unwrap().max))
            .collect();
        assert_eq!(values, [(0, 1.0), (10, 2.0), (20, 3.0)]);
        assert!(in_order(&series, None).iter().all(|bucket| bucket.stat.is_none()));
    }

    #[test]
    fn preview_counts_unread_vms_by_reason_and_sorts_by_firings() {
        let vm = |id: &str, firings| PreviewVm {
            instance_id: id.parse().unwrap(),
            vm_name: None,
            firing: vec![
                Firing {
                    from_ms: 0,
                    to_ms: 1,
                    peak: None
                };
                firings
            ],
        };
        let timeout = || Err(Fault::new(FaultKind::Timeout, "too late"));
        let outcomes = vec![
            Ok((vm("a", 1), 5)),
            Ok((vm("b", 2), 10)),
            Ok((vm("c", 0), 5)),
            timeout(),
            timeout(),
        ];
        let mut preview = Preview::default();
        collect(&mut preview, outcomes);
        let ids: Vec<_> = preview.vms.iter().map(|vm| vm.instance_id.as_str()).collect();
        assert_eq!(ids, ["b", "a"]);
        assert_eq!((preview.evaluated, preview.step_ms), (3, 10));
        assert_eq!(preview.unread, BTreeMap::from([("too late".to_owned(), 2)]));
        assert_eq!(
            newest(vec![
                Firing {
                    from_ms: 0,
                    to_ms: 1,
                    peak: None
                };
                101
            ])
            .len(),
            100
        );
    }
}
