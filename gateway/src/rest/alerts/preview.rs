//! When a rule would have fired, as shown by the REST API.

use std::collections::BTreeMap;

use serde::Serialize;
use utoipa::ToSchema;
use vmwatch_api::{InstanceId, alerts::rules};

use crate::rest::time::Timestamp;

/// A time at which an alert would have been firing.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::rest) struct Firing {
    from: Timestamp,
    /// End of the firing, or of the preview if the condition still holds.
    to: Timestamp,
    /// Value farthest beyond the threshold; null if the condition compares none.
    #[schema(required)]
    peak: Option<f64>,
}

/// A VM for which a rule would have fired.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::rest) struct PreviewVm {
    /// Id of the VM.
    instance_id: InstanceId,
    /// Name of the VM on its hypervisor; null if no hypervisor has it.
    #[schema(required)]
    vm_name: Option<String>,
    /// Times at which the alert would have been firing, oldest first; at most 100, the newest.
    firing: Vec<Firing>,
}

/// When a rule would have fired in the last seven days.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::rest) struct Preview {
    /// Start of the preview.
    from: Timestamp,
    /// End of the preview.
    to: Timestamp,
    /// Length of the time buckets that were evaluated, in milliseconds; 0 if there were none.
    step_ms: u64,
    /// VMs for which the rule would have fired, those with the most firings first.
    vms: Vec<PreviewVm>,
    /// Number of VMs that were evaluated, at most 50.
    evaluated: u64,
    /// Number of VMs that the rule selects, of those that the user may see.
    selected: u64,
    /// What the preview does not show; null if it shows everything.
    #[schema(required)]
    limitation: Option<String>,
    /// Number of VMs whose history could not be read, by reason.
    unread: BTreeMap<String, u64>,
}

impl From<rules::Preview> for Preview {
    fn from(preview: rules::Preview) -> Self {
        Self {
            from: Timestamp::of_ms(preview.from_ms),
            to: Timestamp::of_ms(preview.to_ms),
            step_ms: preview.step_ms,
            vms: preview.vms.into_iter().map(PreviewVm::from).collect(),
            evaluated: preview.evaluated,
            selected: preview.selected,
            limitation: preview.limitation,
            unread: preview.unread,
        }
    }
}

impl From<rules::PreviewVm> for PreviewVm {
    fn from(vm: rules::PreviewVm) -> Self {
        let firing = vm.firing.into_iter().map(|firing| Firing {
            from: Timestamp::of_ms(firing.from_ms),
            to: Timestamp::of_ms(firing.to_ms),
            peak: firing.peak,
        });
        Self {
            instance_id: vm.instance_id,
            vm_name: vm.vm_name,
            firing: firing.collect(),
        }
    }
}
