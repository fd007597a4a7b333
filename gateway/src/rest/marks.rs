//! REST route for the marks of a VM's charts: operations, alerts, and starts of the VM and of its agent.

use std::sync::Arc;

use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use vmwatch_api::{
    InstanceId,
    alerts::{Alert, AlertFilter, AlertState, AlertsList, RecordId, Severity, Title},
    history::TimeRange,
    lifecycle::{Operation, OperationFilter, OperationId, OperationPosition, OperationState, OperationsList},
    metrics::Limit,
    starts::{Start, Started, StartsQuery, VmStarts},
    wire::Fault,
};

use super::{
    caller::Caller,
    extract::{PageLimit, Path, Query, page_limit},
    operations::Action,
    problem::Problem,
    range::range,
    time::Timestamp,
};
use crate::Gateway;

/// Maximum number of pages of operations that a request reads.
const MAX_PAGES: usize = 3;
/// Number of operations or alerts on a page, which is also limited in bytes.
const PAGE: u64 = 1000;
/// An id that comes before those of all operations of the same time.
const FIRST_ID: &str = "00000000000000000000000000000000";

/// Something that happened to a VM, to be marked on its charts.
#[derive(Debug, Serialize, ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(super) enum Mark {
    /// An action on the VM.
    Operation {
        /// Time at which the operation was requested.
        at: Timestamp,
        /// Time at which the operation ended; null while it is in progress.
        #[schema(required)]
        until: Option<Timestamp>,
        /// Id of the operation.
        id: OperationId,
        /// Requested action on the VM.
        #[serde(serialize_with = "Action::or_unknown")]
        #[schema(value_type = Action)]
        action: Option<Action>,
        /// Current state of the operation.
        state: OperationState,
        /// User that requested the operation.
        user: String,
    },
    /// An alert of the VM that fires or has fired.
    Alert {
        /// Time at which the alert began to fire.
        at: Timestamp,
        /// Time at which its condition ended; null if it holds.
        #[schema(required)]
        until: Option<Timestamp>,
        /// Id of the alert.
        id: RecordId,
        /// Name of the rule when the alert began.
        rule_name: Title,
        /// Severity of the rule when the alert began.
        severity: Severity,
        /// What of the VM the alert is about, such as a mount point; empty for the VM itself.
        subject: String,
        /// State of the alert.
        state: AlertState,
    },
    /// The start of the VM: that of its first process.
    VmStart {
        /// Time of the start, by the clock of the VM.
        at: Timestamp,
    },
    /// The start of the agent in the VM.
    AgentStart {
        /// Time of the start, by the clock of the VM.
        at: Timestamp,
    },
}

/// A source of marks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum MarkSource {
    /// Operations on the VM.
    Operations,
    /// Alerts of the VM.
    Alerts,
    /// Process tables, which show when the VM and the agent were started.
    Processes,
}

/// The marks of a VM's charts.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct MarkList {
    /// Start of the time range.
    from: Timestamp,
    /// End of the time range.
    to: Timestamp,
    /// Marks in chronological order.
    marks: Vec<Mark>,
    /// Whether the time range has further, earlier marks that are not listed because they are too many.
    cut: bool,
    /// Sources that could not be read, so that their marks are missing.
    missing: Vec<MarkSource>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct MarksQuery {
    /// Start of the time range, at most 400 days before its end. Default: one hour before its end.
    from: Option<Timestamp>,
    /// End of the time range. Default: now.
    to: Option<Timestamp>,
    /// Maximum number of marks in the answer. The newest are listed. Default: 100.
    #[param(inline)]
    limit: Option<PageLimit>,
}

/// Read the marks of a VM's charts
///
/// Returns what happened to a VM in a time range: operations that were requested, alerts that were firing, and starts
/// of the VM and of its agent. Starts are known from process tables, so a VM without agent has none. Operations and
/// alerts are listed as long as they are kept, by default 7 and 90 days.
#[utoipa::path(
    get, path = "/vms/{instance_id}/marks", tag = "vms", operation_id = "marks",
    params(("instance_id" = InstanceId, Path, description = "VM id"), MarksQuery),
    responses(
        (status = OK, body = MarkList, description = "the newest marks of the time range"),
        (status = UNPROCESSABLE_ENTITY, response = super::openapi::Contradictory),
    ),
)]
pub(super) async fn marks(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Path(instance_id): Path<InstanceId>,
    Query(query): Query<MarksQuery>,
) -> Result<axum::Json<MarkList>, Problem> {
    let range = range(query.from, query.to)?;
    let starts = StartsQuery::new(instance_id, range)
        .map_err(|rule| Problem::contradictory(format!("query: {rule}")))?;
    let sources = Sources {
        gateway: &gateway,
        caller: &caller,
        starts,
    };
    let (operations, alerts, starts) = tokio::join!(sources.operations(), sources.alerts(), sources.starts());
    let mut found = Found::default();
    let mut missing = Vec::new();
    let mut fault = None;
    for (source, read) in [
        (MarkSource::Operations, operations),
        (MarkSource::Alerts, alerts),
        (MarkSource::Processes, starts),
    ] {
        match read {
            Ok(more) => found.add(more),
            Err(failed) => {
                let (kind, cause) = (failed.kind, failed.cause_chain());
                tracing::debug!(?source, %kind, cause, "reading marks failed: {}", failed.logged());
                missing.push(source);
                fault = Some(failed);
            }
        }
    }
    match fault {
        Some(fault) if missing.len() == 3 => Err(fault.into()),
        _ => {
            let limit = usize::from(page_limit(query.limit).get());
            Ok(axum::Json(found.into_list(range, limit, missing)))
        }
    }
}

/// Marks of one or several sources, and whether there are more.
#[derive(Default)]
struct Found {
    marks: Vec<Mark>,
    cut: bool,
}

impl Found {
    fn add(&mut self, more: Self) {
        self.marks.extend(more.marks);
        self.cut |= more.cut;
    }

    fn into_list(mut self, range: TimeRange, limit: usize, missing: Vec<MarkSource>) -> MarkList {
        self.marks.sort_by_key(Mark::at);
        let excess = self.marks.len().saturating_sub(limit);
        self.marks.drain(..excess);
        MarkList {
            from: Timestamp::of_ms(range.from_ms()),
            to: Timestamp::of_ms(range.to_ms()),
            marks: self.marks,
            cut: self.cut || excess > 0,
            missing,
        }
    }
}

/// Reads the marks of each source.
struct Sources<'a> {
    gateway: &'a Gateway,
    caller: &'a Caller,
    /// Selects the starts, and so also the VM and the time range of the other sources.
    starts: StartsQuery,
}

impl Sources<'_> {
    /// Reads the operations that were requested in the time range.
    async fn operations(&self) -> Result<Found, Fault> {
        let (from_ms, to_ms) = (self.starts.range().from_ms(), self.starts.range().to_ms());
        let end = FIRST_ID.parse().ok().map(|id| OperationPosition {
            requested_at_ms: to_ms,
            id,
        });
        let mut filter = OperationFilter {
            instance_id: Some(self.starts.instance_id.clone()),
            state: None,
            before: end,
            limit: Limit::new(PAGE).unwrap_or_default(),
        };
        let mut found = Found::default();
        for _ in 0..MAX_PAGES {
            let page = self.caller.ask::<OperationsList>(self.gateway, &filter).await?;
            let last = page.operations.last();
            let is_over = !page.more || last.is_none_or(|last| last.requested_at_ms < from_ms);
            filter.before = last.map(OperationPosition::from_operation);
            let in_range = page
                .operations
                .into_iter()
                .filter(|operation| operation.requested_at_ms >= from_ms);
            found.marks.extend(in_range.map(Mark::from));
            if is_over {
                return Ok(found);
            }
        }
        found.cut = true;
        Ok(found)
    }

    /// Reads the alerts that were firing in the time range: first those that still are.
    async fn alerts(&self) -> Result<Found, Fault> {
        let (mut found, range) = (Found::default(), self.starts.range());
        for state in [None, Some(AlertState::Resolved)] {
            let filter = AlertFilter {
                state,
                instance_id: Some(self.starts.instance_id.clone()),
                from_ms: Some(range.from_ms()),
                to_ms: Some(range.to_ms()),
                limit: Limit::new(PAGE).unwrap_or_default(),
                ..AlertFilter::default()
            };
            let page = self.caller.ask::<AlertsList>(self.gateway, &filter).await?;
            let fired = page.alerts.into_iter().filter(|alert| {
                let fired_ms = alert.fired_ms.unwrap_or(alert.since_ms);
                alert.state != AlertState::Pending && fired_ms < range.to_ms()
            });
            found.marks.extend(fired.map(Mark::from));
            found.cut |= page.next.is_some();
        }
        Ok(found)
    }

    /// Reads the starts of the VM and of its agent in the time range.
    async fn starts(&self) -> Result<Found, Fault> {
        let list = self.caller.ask::<VmStarts>(self.gateway, &self.starts).await?;
        Ok(Found {
            marks: list.starts.into_iter().filter_map(Mark::of_start).collect(),
            cut: list.cut,
        })
    }
}

impl Mark {
    const fn at(&self) -> Timestamp {
        match self {
            Self::Operation { at, .. }
            | Self::Alert { at, .. }
            | Self::VmStart { at }
            | Self::AgentStart { at } => *at,
        }
    }

    /// The mark of a start; `None` for one that only newer versions know.
    fn of_start(start: Start) -> Option<Self> {
        let at = Timestamp::of_ms(start.at_ms);
        match start.what {
            Started::Vm => Some(Self::VmStart { at }),
            Started::Agent => Some(Self::AgentStart { at }),
            Started::Unknown => None,
        }
    }
}

impl From<Operation> for Mark {
    fn from(operation: Operation) -> Self {
        Self::Operation {
            at: Timestamp::of_ms(operation.requested_at_ms),
            until: operation.finished_at_ms.map(Timestamp::of_ms),
            id: operation.id,
            action: Action::of(operation.verb, operation.hard),
            state: operation.state,
            user: operation.user,
        }
    }
}

impl From<Alert> for Mark {
    fn from(alert: Alert) -> Self {
        Self::Alert {
            at: Timestamp::of_ms(alert.fired_ms.unwrap_or(alert.since_ms)),
            until: alert.resolved_ms.map(Timestamp::of_ms),
            id: alert.id,
            rule_name: alert.rule_name,
            severity: alert.severity,
            subject: alert.subject,
            state: alert.state,
        }
    }
}
