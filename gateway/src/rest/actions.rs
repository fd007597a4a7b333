//! REST routes that start, stop and reboot VMs.
//!
//! On the bus, a request for an action is answered when the operation has ended. These routes answer as soon as the
//! operation's record exists, with the address of the record. They know the operation's id in advance, because it is
//! derived from the idempotency key.

use std::{sync::Arc, time::Duration};

use axum::{
    extract::{FromRequestParts, State},
    http::{HeaderValue, StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
};
use futures::{StreamExt, stream};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout};
use utoipa::ToSchema;
use vmwatch_api::{
    InstanceId, Kind, Method, MethodInfo,
    lifecycle::{
        self, ActionTarget, ForceStop, OperationId, OperationRef, OperationState, OperationsGet, Reboot,
        RebootTarget, Start, Stop,
    },
    wire::{Fault, FaultKind},
};
use vmwatch_bus::{Context, limits::Permit, random_id};

use super::{
    PATH,
    caller::Caller,
    extract::{Json, NoParameters, Number, Path, Query, Text},
    operations::{Action, Operation},
    problem::Problem,
};
use crate::Gateway;

/// Interval at which the gateway reads the record of a new operation until the operation has begun.
const LOOK: Duration = Duration::from_millis(50);
/// How long a request waits for its recorded operation to begin; after that, the answer shows the operation's state at
/// that time.
const PATIENCE: Duration = Duration::from_secs(1);
/// Time limit of a request for several VMs. Actions that have not begun by then are not carried out.
const WHOLE: Duration = Duration::from_mins(5);
/// Maximum number of VMs in one request, and the default number of concurrent actions.
const MAX_VMS: usize = 100;
const TOGETHER: u64 = 4;
/// Number of VMs on which a request acts concurrently.
type Together = Number<1, 16>;

/// The caller's idempotency key, or a new random key. Of several actions on one VM with the same key only the first
/// takes effect.
#[derive(Debug)]
pub(super) struct IdempotencyKey(String);

impl FromRequestParts<Arc<Gateway>> for IdempotencyKey {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &Arc<Gateway>) -> Result<Self, Problem> {
        let Some(value) = parts.headers.get("idempotency-key") else {
            return Ok(Self(random_id()));
        };
        let fits =
            |key: &&str| (1..=128).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_graphic());
        let key = value.to_str().ok().filter(fits);
        key.map(|key| Self(key.to_owned()))
            .ok_or_else(|| Problem::invalid("Idempotency-Key must be 1 to 128 visible ASCII characters"))
    }
}

/// Request body for an action on one VM.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Command {
    /// Action to carry out on the VM.
    action: Action,
    /// Name of the hypervisor that is to carry out the action. Required if several hypervisors have the VM.
    #[schema(inline)]
    hypervisor: Option<Text<128>>,
}

/// Act on a VM
///
/// Records the operation and returns its record and the address of the record, without waiting for the action to
/// complete. A VM that no hypervisor has is answered with 404. If the hypervisors do not say within one second whether
/// they have it, the answer is 202 and the record shows the result. The record and the live events show the progress
/// and the result of the operation. Requests with the same `Idempotency-Key` take effect once: repeated requests return
/// the record of the first request.
#[utoipa::path(
    post, path = "/vms/{instance_id}/actions", tag = "operations", operation_id = "act", request_body = Command,
    params(
        ("instance_id" = InstanceId, Path, description = "VM id"),
        ("Idempotency-Key" = Option<String>, Header, description = "1 to 128 visible ASCII characters. Default: random",
         pattern = "^[!-~]{1,128}$"),
    ),
    responses(
        (status = ACCEPTED, body = Operation, description = "the operation is recorded",
         headers(("Location" = String, description = "path of the operation"))),
        (status = CONFLICT, response = super::openapi::Conflict),
    ),
)]
pub(super) async fn act(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Path(instance_id): Path<InstanceId>,
    IdempotencyKey(key): IdempotencyKey,
    Query(NoParameters {}): Query<NoParameters>,
    Json(Command { action, hypervisor }): Json<Command>,
) -> Result<Response, Problem> {
    let target = ActionTarget {
        instance_id,
        hypervisor: hypervisor.map(Text::into_inner),
    };
    let given = SubmittedAction::new(&gateway, &caller, target, action, &key);
    let operation = Operation::from(given.begin().await?);
    let location = format!("{PATH}/operations/{}", operation.id);
    let mut response = (StatusCode::ACCEPTED, axum::Json(operation)).into_response();
    response
        .headers_mut()
        .extend(HeaderValue::from_str(&location).map(|location| (header::LOCATION, location)));
    Ok(response)
}

/// Request body for an action on several VMs.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct CommandForSeveral {
    /// Action to carry out on each VM.
    action: Action,
    /// Ids of the VMs, in the order in which to act on them.
    #[serde(deserialize_with = "some_vms")]
    #[schema(min_items = 1, max_items = 100)]
    instance_ids: Vec<InstanceId>,
    /// Number of VMs on which to act concurrently. Default: 4.
    #[schema(inline)]
    at_once: Option<Together>,
}

fn some_vms<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<InstanceId>, D::Error> {
    let ids = Vec::<InstanceId>::deserialize(deserializer)?;
    if (1..=MAX_VMS).contains(&ids.len()) {
        Ok(ids)
    } else {
        Err(serde::de::Error::custom(format!(
            "must be a list of 1 to {MAX_VMS} VM ids"
        )))
    }
}

/// Result of a request that acts on several VMs, for one of them.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Outcome {
    /// Id of the VM.
    instance_id: InstanceId,
    /// The operation; null if no operation began.
    #[schema(required)]
    operation: Option<Operation>,
    /// Reason why no operation began; null if one did.
    #[schema(required)]
    refusal: Option<Refusal>,
}

/// Reason why no operation began.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Refusal {
    /// Machine-readable kind of the error.
    code: FaultKind,
    /// Description of the error for users.
    detail: String,
}

/// Results of a request that acts on several VMs.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Outcomes {
    /// One result per VM, in the order of the request.
    outcomes: Vec<Outcome>,
}

/// Act on several VMs
///
/// Acts on a limited number of VMs at a time and returns when the last operation has ended, after at most five minutes.
/// Actions that have not begun by then, or when the client disconnects, are not carried out. Operations that have begun
/// continue in either case; their records and the live events show the result.
#[utoipa::path(
    post, path = "/actions", tag = "operations", operation_id = "act_on_several", request_body = CommandForSeveral,
    params(
        ("Idempotency-Key" = Option<String>, Header, description = "1 to 128 visible ASCII characters. Default: random",
         pattern = "^[!-~]{1,128}$"),
    ),
    responses((status = OK, body = Outcomes, description = "the outcome for each VM")),
)]
pub(super) async fn act_on_several(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    IdempotencyKey(key): IdempotencyKey,
    Query(NoParameters {}): Query<NoParameters>,
    Json(command): Json<CommandForSeveral>,
) -> Result<axum::Json<Outcomes>, Problem> {
    let _permit = gateway.admission.enter_batch(&caller.principal().user).await?;
    let together = command.at_once.map_or(TOGETHER, Together::get);
    let until = Instant::now() + WHOLE;
    let (gateway, caller, key) = (&gateway, &caller, key.as_str());
    let outcomes: Vec<Outcome> = stream::iter(command.instance_ids)
        .map(|instance_id| async move {
            let info = method(command.action);
            let turn = gateway
                .admission
                .enter_until(&info, &caller.principal().user, until);
            let outcome = match turn.await {
                Ok(permit) => {
                    let given = SubmittedAction::new(
                        gateway,
                        caller,
                        instance_id.clone().into(),
                        command.action,
                        key,
                    );
                    given.wait_for_end(permit).await
                }
                Err(_) => Err(Fault::new(
                    FaultKind::Timeout,
                    "the request's time limit passed before the action on this VM began",
                )),
            };
            Outcome::new(instance_id, outcome)
        })
        .buffered(usize::try_from(together).unwrap_or(1))
        .collect()
        .await;
    // The role check does not depend on the VM: if one action is forbidden, all are, and the whole request fails.
    match outcomes.iter().find_map(Outcome::forbidden) {
        Some(detail) => Err(Fault::new(FaultKind::Forbidden, detail).into()),
        None => Ok(axum::Json(Outcomes { outcomes })),
    }
}

impl Outcome {
    fn forbidden(&self) -> Option<String> {
        let refusal = self.refusal.as_ref()?;
        (refusal.code == FaultKind::Forbidden).then(|| refusal.detail.clone())
    }

    fn new(instance_id: InstanceId, outcome: Result<lifecycle::Operation, Fault>) -> Self {
        let (operation, refusal) = match outcome {
            Ok(operation) => (Some(operation.into()), None),
            Err(fault) => {
                let refusal = Refusal {
                    code: fault.kind,
                    detail: fault.message,
                };
                (None, Some(refusal))
            }
        };
        Self {
            instance_id,
            operation,
            refusal,
        }
    }
}

/// An action on one VM that is being submitted to lifecycle-svc.
struct SubmittedAction<'a> {
    gateway: &'a Arc<Gateway>,
    caller: &'a Caller,
    context: Context,
    target: ActionTarget,
    action: Action,
    record: OperationRef,
}

impl<'a> SubmittedAction<'a> {
    fn new(
        gateway: &'a Arc<Gateway>,
        caller: &'a Caller,
        target: ActionTarget,
        action: Action,
        key: &str,
    ) -> Self {
        let mut context = caller.context(gateway, Kind::Command);
        context.idempotency_key = Some(key.to_owned());
        let (user, id) = (&caller.principal().user, &target.instance_id);
        let operation_id = OperationId::from_idempotency_key(user, id, &method(action), key);
        Self {
            gateway,
            caller,
            context,
            target,
            action,
            record: OperationRef { operation_id },
        }
    }

    /// Sends the action to lifecycle-svc and waits until the operation has begun.
    async fn begin(self) -> Result<lifecycle::Operation, Fault> {
        let info = method(self.action);
        let permit = self.gateway.admission.enter(&info, &self.context).await?;
        let (gateway, context) = (Arc::clone(self.gateway), self.context.clone());
        let (target, action) = (self.target.clone(), self.action);
        // The task continues after the HTTP request was answered or cancelled.
        let mut call = tokio::spawn(async move { send(&gateway, &context, target, action, permit).await });
        let given_at = Instant::now();
        let mut pause = LOOK;
        loop {
            if let Ok(ended) = timeout(pause, &mut call).await {
                let ended = ended.map_err(|error| {
                    Fault::new(FaultKind::Internal, "an internal error occurred; it was logged")
                        .caused_by(error)
                })?;
                return self.ended(ended).await;
            }
            if let Ok(operation) = self.read_operation().await
                && self.is_ours(&operation)
                && (operation.state != OperationState::Requested || given_at.elapsed() > PATIENCE)
            {
                return known(operation);
            }
            pause = (pause * 2).min(PATIENCE);
        }
    }

    /// Sends the action to lifecycle-svc and waits until the operation has ended.
    async fn wait_for_end(self, permit: Permit) -> Result<lifecycle::Operation, Fault> {
        let target = self.target.clone();
        let ended = send(self.gateway, &self.context, target, self.action, permit).await;
        self.ended(ended).await
    }

    /// Returns the operation after lifecycle-svc has answered, or the fault if no operation exists or the existing one
    /// belongs to another request.
    async fn ended(&self, ended: Result<(), Fault>) -> Result<lifecycle::Operation, Fault> {
        let record = self.read_operation().await;
        match (ended, record) {
            (Ok(()), record) => record,
            (Err(_), Ok(record)) if self.is_ours(&record) => known(record),
            (Err(fault), _) => Err(fault),
        }
    }

    /// Whether the record is of this action. It is of a different one if the client used the same idempotency key for
    /// another action or hypervisor before.
    fn is_ours(&self, record: &lifecycle::Operation) -> bool {
        record.hard == self.action.verb().1 && record.requested_hypervisor == self.target.hypervisor
    }

    async fn read_operation(&self) -> Result<lifecycle::Operation, Fault> {
        self.caller.ask::<OperationsGet>(self.gateway, &self.record).await
    }
}

/// Returns the operation. If the VM does not exist, returns the fault: no operation ran, and the record only documents
/// the attempt. This check is needed because the record may be read before lifecycle-svc answers with the fault.
fn known(operation: lifecycle::Operation) -> Result<lifecycle::Operation, Fault> {
    match operation.fault {
        Some(fault) if fault.kind == FaultKind::NotFound => Err(Fault::new(fault.kind, fault.message)),
        _ => Ok(operation),
    }
}

/// Returns the bus method that carries out an action.
const fn method(action: Action) -> MethodInfo {
    match action {
        Action::Start => Start::INFO,
        Action::Stop => Stop::INFO,
        Action::ForceStop => ForceStop::INFO,
        Action::Reboot | Action::Reset => Reboot::INFO,
    }
}

/// Sends the action to lifecycle-svc and holds the permit until the operation has ended.
async fn send(
    gateway: &Gateway,
    context: &Context,
    target: ActionTarget,
    action: Action,
    _permit: Permit,
) -> Result<(), Fault> {
    let bus = &gateway.bus;
    match action {
        Action::Start => bus.call::<Start>(context, &target).await,
        Action::Stop => bus.call::<Stop>(context, &target).await,
        Action::ForceStop => bus.call::<ForceStop>(context, &target).await,
        Action::Reboot | Action::Reset => {
            let target = RebootTarget {
                instance_id: target.instance_id,
                hard: action.verb().1,
                hypervisor: target.hypervisor,
            };
            bus.call::<Reboot>(context, &target).await
        }
    }
    .map(drop)
}
