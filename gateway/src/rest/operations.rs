//! REST routes that list and read operations (actions on VMs and their results).

use std::sync::Arc;

use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use vmwatch_api::{
    InstanceId,
    actions::{self, Refusal, Refused, VmAction},
    lifecycle::{
        self, MachineState, OperationFilter, OperationId, OperationPosition, OperationRef, OperationState,
        OperationsGet, OperationsList, Verb,
    },
    wire::FaultKind,
};

use super::{
    caller::Caller,
    cursors::OperationCursor,
    extract::{NoParameters, PageLimit, Path, Query, known, page_limit},
    problem::Problem,
    time::Timestamp,
};
use crate::Gateway;

/// An action on a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Action {
    /// Starts or resumes the VM.
    Start,
    /// Asks the guest to shut down, like the power button.
    Stop,
    /// Asks the guest to reboot.
    Reboot,
    /// Restarts the VM without asking the guest, like the reset button.
    Reset,
    /// Powers the VM off without asking the guest.
    ForceStop,
}

/// An action that is not allowed.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct RefusedAction {
    /// The action.
    action: Action,
    /// Machine-readable reason. More values may be added.
    code: Refusal,
    /// Description of the reason for users.
    detail: String,
}

impl RefusedAction {
    /// The refused actions that this gateway knows.
    pub(super) fn list(refused: &Refused) -> Vec<Self> {
        let known = refused.iter().filter_map(|(action, reason)| {
            Some(Self {
                action: Action::known(*action)?,
                code: *reason,
                detail: reason.text().to_owned(),
            })
        });
        known.collect()
    }
}

impl Action {
    /// The actions that are allowed, given those that are not.
    pub(super) fn allowed(refused: &Refused) -> Vec<Self> {
        actions::allowed(refused)
            .into_iter()
            .filter_map(Self::known)
            .collect()
    }

    const fn known(action: VmAction) -> Option<Self> {
        let (verb, hard) = action.verb();
        Self::of(verb, hard)
    }

    /// Converts a verb on the bus to the action of the REST API; `None` for a verb that only newer versions know.
    pub(super) const fn of(verb: Verb, hard: bool) -> Option<Self> {
        match (verb, hard) {
            (Verb::Start, _) => Some(Self::Start),
            (Verb::Stop, _) => Some(Self::Stop),
            (Verb::Reboot, false) => Some(Self::Reboot),
            (Verb::Reboot, true) => Some(Self::Reset),
            (Verb::ForceStop, _) => Some(Self::ForceStop),
            (Verb::Unknown, _) => None,
        }
    }

    /// Serializes the action. An action that only newer versions know becomes `unknown`, which clients can display but
    /// not request.
    #[expect(
        clippy::ref_option,
        clippy::trivially_copy_pass_by_ref,
        reason = "serde requires this signature"
    )]
    pub(super) fn or_unknown<S: serde::Serializer>(
        action: &Option<Self>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match action {
            Some(action) => action.serialize(serializer),
            None => serializer.serialize_str("unknown"),
        }
    }

    /// The action's verb in bus messages, and whether the action is forced, which means that the guest is not asked.
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

/// Operation: the record of an action on a VM.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Operation {
    /// Id of the operation.
    pub(super) id: OperationId,
    /// Requested action on the VM.
    #[serde(serialize_with = "Action::or_unknown")]
    #[schema(value_type = Action)]
    action: Option<Action>,
    /// Id of the VM.
    instance_id: InstanceId,
    /// Name of the hypervisor that has the VM; null until it is found.
    #[schema(required)]
    hypervisor: Option<String>,
    /// User that requested the operation.
    user: String,
    /// Client address of the request, as seen by the gateway.
    #[schema(required)]
    source: Option<String>,
    /// Id of the HTTP request that requested the operation, as in the logs.
    request_id: String,
    /// Time at which the operation was requested.
    requested_at: Timestamp,
    /// Time after which the action is not sent to the hypervisor any more.
    deadline: Timestamp,
    /// Time at which the operation ended; null while it is in progress.
    #[schema(required)]
    finished_at: Option<Timestamp>,
    /// Current state of the operation.
    state: OperationState,
    /// State of the VM after the operation has succeeded; null otherwise.
    #[schema(required)]
    machine_state: Option<MachineState>,
    /// Reason why the operation failed; null otherwise.
    #[schema(required)]
    failure: Option<Failure>,
    /// Steps of the operation so far, oldest first.
    history: Vec<Happening>,
}

/// Reason why an operation failed.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Failure {
    /// Machine-readable kind of the error.
    code: FaultKind,
    /// Description of the error for users.
    detail: String,
}

/// A step in the progress of an operation.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Happening {
    /// Time of the step.
    at: Timestamp,
    /// State of the operation after the step.
    state: OperationState,
    /// Description of the step for users. Messages of the hypervisor are quoted verbatim.
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

/// A page of operations.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct OperationList {
    /// Operations, newest first.
    operations: Vec<Operation>,
    /// Value of `cursor` for the next page; null on the last page.
    #[schema(required)]
    next: Option<OperationCursor>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct OperationsQuery {
    /// Return only operations on this VM.
    instance_id: Option<InstanceId>,
    /// Return only operations in this state.
    #[serde(default, deserialize_with = "known")]
    state: Option<OperationState>,
    /// Maximum number of operations in the answer. Default: 100.
    #[param(inline)]
    limit: Option<PageLimit>,
    /// The `next` value of the previous page.
    cursor: Option<OperationCursor>,
}

/// List operations
#[utoipa::path(
    get, path = "/operations", tag = "operations", operation_id = "list_operations", params(OperationsQuery),
    responses((status = OK, body = OperationList, description = "operations on VMs that the user may see, newest first")),
)]
pub(super) async fn list(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Query(query): Query<OperationsQuery>,
) -> Result<axum::Json<OperationList>, Problem> {
    let filter = OperationFilter {
        instance_id: query.instance_id,
        state: query.state,
        before: query.cursor.map(|cursor| cursor.0),
        limit: page_limit(query.limit),
    };
    let page = caller.ask::<OperationsList>(&gateway, &filter).await?;
    let last = page.operations.last().filter(|_| page.more);
    let next = last.map(|last| OperationCursor(OperationPosition::from_operation(last)));
    Ok(axum::Json(OperationList {
        operations: page.operations.into_iter().map(Operation::from).collect(),
        next,
    }))
}

/// Read an operation
#[utoipa::path(
    get, path = "/operations/{operation_id}", tag = "operations", operation_id = "get_operation",
    params(("operation_id" = OperationId, Path, description = "operation id")),
    responses((status = OK, body = Operation, description = "the operation")),
)]
pub(super) async fn get(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Path(operation_id): Path<OperationId>,
    Query(NoParameters {}): Query<NoParameters>,
) -> Result<axum::Json<Operation>, Problem> {
    let request = OperationRef { operation_id };
    let operation = caller.ask::<OperationsGet>(&gateway, &request).await?;
    Ok(axum::Json(operation.into()))
}
