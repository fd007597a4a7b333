//! What explains an alert, as shown by the REST API.

use serde::Serialize;
use utoipa::ToSchema;
use vmwatch_api::{
    alerts::{
        self,
        culprits::{self, TopMeasure, TopProcess},
    },
    lifecycle::OperationId,
    processes::ProcessRowKind,
};

use crate::rest::time::Timestamp;

/// An operation on the VM of an alert.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::rest) struct EndedBy {
    /// Id of the operation, whose record may have expired.
    operation_id: OperationId,
    /// What the operation did, such as `stop`.
    action: String,
    /// Name of the user that requested the operation.
    user: String,
}

impl From<alerts::EndedBy> for EndedBy {
    fn from(operation: alerts::EndedBy) -> Self {
        Self {
            operation_id: operation.operation_id,
            action: operation.action,
            user: operation.user,
        }
    }
}

/// A process, or several that are summed in one row, that explains an alert.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::rest) struct Culprit {
    /// Whether the row describes one process or several.
    kind: ProcessRowKind,
    /// Name of the process.
    name: String,
    /// Process id; null for several processes.
    #[schema(required)]
    pid: Option<u32>,
    /// Time at which the process started; null for several processes.
    #[schema(required)]
    started_at: Option<Timestamp>,
    /// Number of processes of a sum; null for one process or if unknown.
    #[schema(required)]
    processes: Option<u32>,
    /// User of the process; null if unknown.
    #[schema(required)]
    user: Option<String>,
    /// systemd unit of the process; null if it belongs to none.
    #[schema(required)]
    unit: Option<String>,
    /// Name of the container of the process; null if it runs in none.
    #[schema(required)]
    container: Option<String>,
    /// Command line of the process without secrets; null unless the agent is configured to report it.
    #[schema(required)]
    command_line: Option<String>,
    /// CPU seconds in the time range, mean memory in percent of the VM's memory, or KiB read and written.
    amount: f64,
    /// Part of the VM's amount, 0 to 1; null if that is unknown.
    #[schema(required)]
    share: Option<f64>,
    /// Exit code, if the process ended in the time range; null if unknown.
    #[schema(required)]
    exit_code: Option<u32>,
    /// Time at which the process ended; null if it did not.
    #[schema(required)]
    ended_at: Option<Timestamp>,
}

impl From<TopProcess> for Culprit {
    fn from(process: TopProcess) -> Self {
        let is_one = process.kind == ProcessRowKind::Process;
        Self {
            kind: process.kind,
            name: process.name,
            pid: is_one.then_some(process.pid),
            started_at: is_one.then(|| Timestamp::of_ms(process.started_ms)),
            processes: process.processes,
            user: process.owner.user,
            unit: process.owner.unit,
            container: process.owner.container,
            command_line: process.owner.command_line,
            amount: process.amount,
            share: process.share,
            exit_code: process.exit_code,
            ended_at: process.ended_ms.map(Timestamp::of_ms),
        }
    }
}

/// What explains an alert.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::rest) struct Culprits {
    /// Start of the time range whose processes were compared.
    from: Timestamp,
    /// End of that time range.
    to: Timestamp,
    /// Measure by which the processes were compared.
    measure: TopMeasure,
    /// Whether these are the processes of the last known table, because the VM has sent nothing since.
    last_known: bool,
    /// At most 5 processes, those with the greatest amount first.
    processes: Vec<Culprit>,
    /// Last operation on the VM, for alerts about silent agents and states of VMs; null if there was none.
    #[schema(required)]
    operation: Option<EndedBy>,
    /// Why processes could not be found; null if they could.
    #[schema(required)]
    problem: Option<String>,
}

impl From<culprits::Culprits> for Culprits {
    fn from(culprits: culprits::Culprits) -> Self {
        Self {
            from: Timestamp::of_ms(culprits.from_ms),
            to: Timestamp::of_ms(culprits.to_ms),
            measure: culprits.measure,
            last_known: culprits.last_known,
            processes: culprits.processes.into_iter().map(Culprit::from).collect(),
            operation: culprits.operation.map(EndedBy::from),
            problem: culprits.problem,
        }
    }
}
