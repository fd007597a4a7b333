//! Reads which VMs a rule selects, and their history.

use vmwatch_api::{
    InstanceId,
    alerts::rules::{PREVIEW_VMS, VmSelector},
    history::{Points, TimeRange, VmBucket, VmHistory, VmHistoryQuery, VmHypervisorHistory, VmSeries},
    metrics::Limit,
    vms::{List, VmFilter, VmQuery},
    wire::{Fault, FaultKind},
};
use vmwatch_bus::Context;

use crate::handlers::Handlers;

/// Number of parts in which the history of a VM is read, and of the time buckets of each part. With these, a time
/// bucket is five minutes long, the shortest rollup.
const PARTS: u64 = 2;
const POINTS: u64 = 1100;

/// A VM that the rule selects.
pub(super) struct SelectedVm {
    pub(super) instance_id: InstanceId,
    pub(super) name: Option<String>,
}

impl Handlers {
    /// The first VMs that the rule selects, by id, and the number of all of them.
    pub(super) async fn selected_vms(
        &self,
        context: &Context,
        selector: &VmSelector,
    ) -> Result<(Vec<SelectedVm>, u64), Fault> {
        let mut query = VmQuery {
            filter: VmFilter {
                hypervisor: selector.hypervisor.clone(),
                ..VmFilter::default()
            },
            limit: Limit::new(1000).unwrap_or_default(),
            ..VmQuery::default()
        };
        let (mut selected, mut count) = (Vec::new(), 0);
        loop {
            let page = self.bus.call::<List>(context, &query).await?;
            for vm in page.vms {
                let hypervisors = vm.hypervisor.iter().chain(&vm.also_on);
                let hypervisors: Vec<_> = hypervisors.map(String::as_str).collect();
                if !selector.contains(&vm.instance_id, vm.name.as_deref(), &hypervisors, &vm.labels) {
                    continue;
                }
                count += 1;
                if selected.len() < PREVIEW_VMS {
                    selected.push(SelectedVm {
                        instance_id: vm.instance_id,
                        name: vm.name,
                    });
                }
            }
            if page.next.is_none() {
                return Ok((selected, count));
            }
            query.cursor = page.next;
        }
    }

    /// Reads the time buckets of a VM, each with its length.
    pub(super) async fn history(
        &self,
        context: &Context,
        instance_id: &InstanceId,
        (from_ms, to_ms): (u64, u64),
        of_hypervisor: bool,
    ) -> Result<Vec<(VmBucket, u64)>, Fault> {
        let mut read = Vec::new();
        let part_ms = (to_ms - from_ms) / PARTS;
        for part in 0..PARTS {
            let start_ms = from_ms + part * part_ms;
            let Some(range) = TimeRange::new(start_ms, start_ms + part_ms) else {
                continue;
            };
            let mut query = VmHistoryQuery {
                instance_id: instance_id.clone(),
                range,
                points: Points::new(POINTS).unwrap_or_default(),
                after_ms: None,
            };
            loop {
                let series = self.page(context, &query, of_hypervisor).await?;
                let step_ms = series.step_ms;
                read.extend(series.buckets.into_iter().map(|bucket| (bucket, step_ms)));
                if series.next.is_none() {
                    break;
                }
                query.after_ms = series.next;
            }
        }
        Ok(read)
    }

    async fn page(
        &self,
        context: &Context,
        query: &VmHistoryQuery,
        of_hypervisor: bool,
    ) -> Result<VmSeries, Fault> {
        if context.remaining().is_zero() {
            let text = "the time limit of the request had passed";
            return Err(Fault::new(FaultKind::Timeout, text));
        }
        if of_hypervisor {
            self.bus.call::<VmHypervisorHistory>(context, query).await
        } else {
            self.bus.call::<VmHistory>(context, query).await
        }
    }
}
