//! Commands on VMs, and what became of them.

use std::sync::Arc;

use axum::extract::State;
use serde::{Deserialize, Serialize};
use shared::{
    api::{
        InstanceId,
        lifecycle::{
            self, MachineState, OperationFilter, OperationId, OperationPlace, OperationRef, OperationState,
            OperationsGet, OperationsList, Verb,
        },
    },
    wire::FaultKind,
};
use utoipa::{IntoParams, ToSchema};

use super::{
    caller::Caller,
    cursors::OperationCursor,
    extract::{NoParameters, PageLimit, Path, Query, known, page_limit},
    problem::Problem,
    time::Timestamp,
};
use crate::Gateway;

/// What can be done to a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Action {
    /// Makes it run.
    Start,
    /// Asks its system to shut down, as its power button does.
    Stop,
    /// Asks its system to start anew.
    Reboot,
    /// Starts its system anew without asking it, as its reset button does.
    Reset,
    /// Cuts its power.
    ForceStop,
}

impl Action {
    /// The action of a command; `None` of one that only a newer version knows.
    const fn of(verb: Verb, hard: bool) -> Option<Self> {
        match (verb, hard) {
            (Verb::Start, _) => Some(Self::Start),
            (Verb::Stop, _) => Some(Self::Stop),
            (Verb::Reboot, false) => Some(Self::Reboot),
            (Verb::Reboot, true) => Some(Self::Reset),
            (Verb::ForceStop, _) => Some(Self::ForceStop),
            (Verb::Unknown, _) => None,
        }
    }

    /// The action, or `unknown` for one that only a newer version knows: it can be shown and not asked for.
    #[expect(
        clippy::ref_option,
        clippy::trivially_copy_pass_by_ref,
        reason = "serde calls it so"
    )]
    fn or_unknown<S: serde::Serializer>(action: &Option<Self>, serializer: S) -> Result<S::Ok, S::Error> {
        match action {
            Some(action) => action.serialize(serializer),
            None => serializer.serialize_str("unknown"),
        }
    }

    /// The command on the bus, and whether it is the hard form.
    pub(super) const fn verb(self) -> (Verb, bool) {
        match self {
            Self::Start => (Verb::Start, false),
            Self::Stop => (Verb::Stop, false),
            Self::Reboot => (Verb::Reboot, false),
            Self::Reset => (Verb::Reboot, true),
            Self::ForceStop => (Verb::ForceStop, false),
        }
    }
}

/// The record of a command on a VM.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Operation {
    /// Its id.
    pub(super) id: OperationId,
    /// What was asked.
    #[serde(serialize_with = "Action::or_unknown")]
    #[schema(value_type = Action)]
    action: Option<Action>,
    /// Of which VM.
    instance_id: InstanceId,
    /// Where that VM is, once it was found.
    #[schema(required)]
    hypervisor: Option<String>,
    /// Who asked.
    user: String,
    /// From which address, as the gateway saw it.
    #[schema(required)]
    source: Option<String>,
    /// What the logs name the request that it came with.
    request_id: String,
    /// When it was asked.
    requested_at: Timestamp,
    /// Until when it may be begun.
    deadline: Timestamp,
    /// When it ended.
    #[schema(required)]
    finished_at: Option<Timestamp>,
    /// How far it has come.
    state: OperationState,
    /// The VM's state when it succeeded.
    #[schema(required)]
    machine_state: Option<MachineState>,
    /// Why it did not succeed.
    #[schema(required)]
    failure: Option<Failure>,
    /// What happened, the oldest first.
    history: Vec<Happening>,
}

/// Why a command did not succeed.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Failure {
    /// The kind, for programs.
    code: FaultKind,
    /// In plain words.
    detail: String,
}

/// Something that happened to a command.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Happening {
    /// When.
    at: Timestamp,
    /// How far the command had come then.
    state: OperationState,
    /// What; where the hypervisor spoke, in its own words.
    text: String,
}

impl From<lifecycle::Operation> for Operation {
    fn from(operation: lifecycle::Operation) -> Self {
        Self {
            action: Action::of(operation.verb, operation.hard),
            id: operation.id,
            instance_id: operation.instance_id,
            hypervisor: operation.hypervisor,
            user: operation.user,
            source: operation.source,
            request_id: operation.request_id,
            requested_at: Timestamp::of_ms(operation.requested_at_ms),
            deadline: Timestamp::of_ms(operation.deadline_ms),
            finished_at: operation.finished_at_ms.map(Timestamp::of_ms),
            state: operation.state,
            machine_state: operation.machine,
            failure: operation.fault.map(|fault| Failure {
                code: fault.kind,
                detail: fault.message,
            }),
            history: operation.history.into_iter().map(Happening::from).collect(),
        }
    }
}

impl From<lifecycle::Event> for Happening {
    fn from(event: lifecycle::Event) -> Self {
        Self {
            at: Timestamp::of_ms(event.at_ms),
            state: event.state,
            text: event.text,
        }
    }
}

/// Commands.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct OperationList {
    /// The newest first.
    operations: Vec<Operation>,
    /// What `cursor` is for the next page; null on the last.
    #[schema(required)]
    next: Option<OperationCursor>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct OperationsQuery {
    /// On this VM only.
    instance_id: Option<InstanceId>,
    /// In this state only.
    #[serde(default, deserialize_with = "known")]
    state: Option<OperationState>,
    /// At most how many, the newest; 100 unless given.
    #[param(inline)]
    limit: Option<PageLimit>,
    /// `next` of the page before.
    cursor: Option<OperationCursor>,
}

/// List commands
#[utoipa::path(
    get, path = "/operations", tag = "operations", operation_id = "list_operations", params(OperationsQuery),
    responses((status = OK, body = OperationList, description = "the newest commands on VMs that the session may see")),
)]
pub(super) async fn list(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Query(query): Query<OperationsQuery>,
) -> Result<axum::Json<OperationList>, Problem> {
    let filter = OperationFilter {
        instance_id: query.instance_id,
        state: query.state,
        before: query.cursor.map(|place| place.0),
        limit: page_limit(query.limit),
    };
    let page = caller.ask::<OperationsList>(&gateway, &filter).await?;
    let last = page.operations.last().filter(|_| page.more);
    let next = last.map(|last| OperationCursor(OperationPlace::of(last)));
    Ok(axum::Json(OperationList {
        operations: page.operations.into_iter().map(Operation::from).collect(),
        next,
    }))
}

/// Read a command
#[utoipa::path(
    get, path = "/operations/{operation_id}", tag = "operations", operation_id = "get_operation",
    params(("operation_id" = OperationId, Path, description = "the command's id")),
    responses((status = OK, body = Operation, description = "the command as it is now")),
)]
pub(super) async fn get(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Path(operation_id): Path<OperationId>,
    Query(NoParameters {}): Query<NoParameters>,
) -> Result<axum::Json<Operation>, Problem> {
    let asked = OperationRef { operation_id };
    let operation = caller.ask::<OperationsGet>(&gateway, &asked).await?;
    Ok(axum::Json(operation.into()))
}
