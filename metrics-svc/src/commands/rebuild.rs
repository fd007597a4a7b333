//! `vmwatch-metrics rebuild` rebuilds the rollups, the list of VMs and the process names from the stored rows.

use indicatif::{ProgressBar, ProgressStyle};
use tokio_util::sync::CancellationToken;

use crate::{MetricsError, history::Histories};

/// Rebuilds all rollups, the list of VMs and the process names. It may be interrupted and repeated, because nothing
/// is removed before its replacement is written.
pub(super) async fn run(histories: &Histories) -> Result<String, MetricsError> {
    let bar = ProgressBar::new(0);
    let template = "{msg}  {wide_bar} {pos}/{len} VMs  {eta} left";
    bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
    let done = |instance: &vmwatch_api::InstanceId, total: usize| {
        bar.set_length(total as u64);
        bar.set_message(instance.to_string());
        bar.inc(1);
    };
    let mut vms = 0;
    for history in histories.both() {
        bar.set_position(0);
        vms = history.rebuild(&CancellationToken::new(), done).await?;
    }
    bar.finish_and_clear();
    Ok(format!(
        "rebuilt the rollups, the process names and the list of {vms} VMs"
    ))
}
