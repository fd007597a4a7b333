//! `vmwatch-metrics rebuild`: rollups and the list of VMs, from the rows.

use indicatif::{ProgressBar, ProgressStyle};
use tokio_util::sync::CancellationToken;

use crate::{MetricsError, history::History};

/// Makes everything anew. It may be repeated, and stopped half-way: nothing is taken away before it is replaced.
pub(super) async fn run(history: &History) -> Result<String, MetricsError> {
    let bar = ProgressBar::new(0);
    let template = "{msg}  {wide_bar} {pos}/{len} VMs  {eta} left";
    bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
    let done = |instance: &vmwatch_api::InstanceId, of: usize| {
        bar.set_length(of as u64);
        bar.set_message(instance.to_string());
        bar.inc(1);
    };
    history.rebuild(&CancellationToken::new(), done).await?;
    bar.finish_and_clear();
    Ok(format!(
        "rebuilt the rollups and the list of {} VMs",
        bar.position()
    ))
}
