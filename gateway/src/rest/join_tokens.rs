//! REST routes for join tokens, with which agents enrol, for administrators.

use std::{num::NonZeroU32, sync::Arc};

use axum::{
    extract::State,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vmwatch_api::{
    enrollment::{
        self, DEFAULT_JOIN_SECONDS, JoinTokenId, JoinTokenRef, JoinTokenSummary, JoinTokensCreate,
        JoinTokensList, JoinTokensRevoke, JoinVms,
    },
    sessions::Own,
};

use super::{
    PATH,
    caller::Caller,
    extract::{Json, NoParameters, Number, Path, Query},
    problem::Problem,
    time::Timestamp,
};
use crate::Gateway;

/// A join token, without its secret.
#[derive(Serialize, ToSchema)]
pub(super) struct JoinToken {
    /// Id of the join token. The token cannot be derived from it.
    id: JoinTokenId,
    /// Name of the administrator that created the token.
    created_by: String,
    /// Time at which the token was created.
    created_at: Timestamp,
    /// Time from which on the token is refused.
    expires_at: Timestamp,
    /// Number of VMs that can be enrolled with the token.
    uses: u32,
    /// Number of VMs that were enrolled with the token.
    used: u32,
    /// VMs whose agents may use the token.
    vms: JoinVms,
    /// Whether the token may enrol a VM that has an agent.
    replace: bool,
    /// Whether the token was revoked.
    revoked: bool,
}

impl From<JoinTokenSummary> for JoinToken {
    fn from(token: JoinTokenSummary) -> Self {
        Self {
            id: token.id,
            created_by: token.created_by,
            created_at: Timestamp::of_ms(token.created_at_ms),
            expires_at: Timestamp::of_ms(token.expires_at_ms),
            uses: token.uses,
            used: token.used,
            vms: token.vms,
            replace: token.replace,
            revoked: token.revoked,
        }
    }
}

/// Join tokens.
#[derive(Serialize, ToSchema)]
pub(super) struct JoinTokenList {
    /// Join tokens, newest first; also those that are used up, expired or revoked and still stored.
    join_tokens: Vec<JoinToken>,
}

/// A join token to create.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewJoinToken {
    /// For how many seconds the token is valid. Default: 3600.
    #[schema(inline)]
    valid_seconds: Option<Number<60, 7_776_000>>,
    /// How many VMs can be enrolled with the token. Default: 1.
    #[schema(inline)]
    uses: Option<Number<1, 10_000>>,
    /// VMs whose agents may use the token. Default: any.
    #[serde(default = "any_vm")]
    #[schema(default = json!("any"))]
    vms: JoinVms,
    /// Whether the token may enrol a VM that has an agent; the key of the old agent is revoked then. Default: false.
    #[serde(default)]
    replace: bool,
}

const fn any_vm() -> JoinVms {
    JoinVms::Any
}

impl From<NewJoinToken> for enrollment::NewJoinToken {
    fn from(token: NewJoinToken) -> Self {
        let seconds = token.valid_seconds.map(Number::get);
        let uses = token.uses.map(Number::get);
        // The conversions cannot fail, because the bounds of both types are equal.
        let within = |number: u64| u32::try_from(number).ok();
        Self {
            valid_seconds: seconds.and_then(within).unwrap_or(DEFAULT_JOIN_SECONDS),
            uses: uses
                .and_then(within)
                .and_then(NonZeroU32::new)
                .unwrap_or(NonZeroU32::MIN),
            vms: token.vms,
            replace: token.replace,
        }
    }
}

/// A join token that was just created.
#[derive(Serialize, ToSchema)]
pub(super) struct CreatedJoinToken {
    /// The token with its secret, which no other answer contains. Anyone with this token can enrol a VM.
    #[schema(
        pattern = "^vmj_[0-9a-f]{16}_[0-9a-f]{64}$",
        example = "vmj_00112233445566ff_00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"
    )]
    token: String,
    join_token: JoinToken,
    /// URL of the script that installs the agent and enrols the VM; null if this gateway does not serve it.
    #[schema(required, example = "https://vmwatch.example.com/install.sh")]
    install_url: Option<String>,
}

/// List join tokens
#[utoipa::path(
    get, path = "/join-tokens", tag = "agents", operation_id = "list_join_tokens",
    responses((status = OK, body = JoinTokenList, description = "the join tokens, at most 1000")),
)]
pub(super) async fn list(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Query(NoParameters {}): Query<NoParameters>,
) -> Result<axum::Json<JoinTokenList>, Problem> {
    let list = caller.ask::<JoinTokensList>(&gateway, &Own {}).await?;
    let join_tokens = list.tokens.into_iter().map(JoinToken::from).collect();
    Ok(axum::Json(JoinTokenList { join_tokens }))
}

/// Create a join token
///
/// An agent enrols with the token. Only this answer contains it; the server stores its hash.
#[utoipa::path(
    post, path = "/join-tokens", tag = "agents", operation_id = "create_join_token", request_body = NewJoinToken,
    responses((
        status = CREATED, body = CreatedJoinToken, description = "the join token and its secret",
        headers(("Location" = String, description = "path of the join token")),
    )),
)]
pub(super) async fn create(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Query(NoParameters {}): Query<NoParameters>,
    Json(token): Json<NewJoinToken>,
) -> Result<Response, Problem> {
    let created = caller.ask::<JoinTokensCreate>(&gateway, &token.into()).await?;
    let location = format!("{PATH}/join-tokens/{}", created.summary.id);
    let body = CreatedJoinToken {
        token: created.token.as_str().to_owned(),
        join_token: created.summary.into(),
        install_url: gateway.install.script_url(),
    };
    let mut response = (StatusCode::CREATED, axum::Json(body)).into_response();
    response
        .headers_mut()
        .extend(HeaderValue::from_str(&location).map(|location| (header::LOCATION, location)));
    Ok(response)
}

/// Revoke a join token
///
/// Agents that were enrolled with the token stay enrolled.
#[utoipa::path(
    delete, path = "/join-tokens/{join_token_id}", tag = "agents", operation_id = "revoke_join_token",
    params(("join_token_id" = JoinTokenId, Path, description = "id of the join token")),
    responses((status = NO_CONTENT, description = "the join token is revoked")),
)]
pub(super) async fn revoke(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Path(id): Path<JoinTokenId>,
    Query(NoParameters {}): Query<NoParameters>,
) -> Result<StatusCode, Problem> {
    caller
        .ask::<JoinTokensRevoke>(&gateway, &JoinTokenRef { id })
        .await?;
    Ok(StatusCode::NO_CONTENT)
}
