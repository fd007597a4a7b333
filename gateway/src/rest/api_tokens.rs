//! REST routes for API tokens, which users create for themselves and administrators for service accounts.

use std::sync::Arc;

use axum::{
    extract::State,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema, openapi::schema::OneOfBuilder};
use vmwatch_api::{
    Role, Scope, UserName,
    alerts::Title,
    api_tokens::{
        self, ApiTokenAccess, ApiTokenId, ApiTokenPage, ApiTokenRef, ApiTokenSummary, ApiTokensCreate,
        ApiTokensList, ApiTokensRevoke, MAX_TOKEN_VMS, bounded_scope, known_access,
    },
    scope_schema,
    users::known_role,
};

use super::{
    PATH,
    caller::Caller,
    extract::{Json, NoParameters, Number, PageLimit, Path, Query, page_limit},
    problem::Problem,
    time::Timestamp,
};
use crate::Gateway;

/// For how many seconds a token is valid unless the request states it: 30 days.
const DEFAULT_SECONDS: u32 = 30 * 24 * 3600;

/// An API token, without its secret.
#[derive(Serialize, ToSchema)]
pub(super) struct ApiToken {
    /// Id of the token: the part of the token after `vmt_`. The token cannot be derived from it.
    id: ApiTokenId,
    /// Name of the token.
    name: Title,
    /// Name of the user that owns the token. Requests with the token are made in this name.
    owner: String,
    /// Name of the user that created the token.
    created_by: String,
    /// Time at which the token was created.
    created_at: Timestamp,
    /// Time from which on the token is refused.
    expires_at: Timestamp,
    /// Role of the token. A request gets the lesser of this and the owner's role.
    role: Role,
    /// VMs that the token may see, as far as its owner may see them.
    scope: Scope,
    /// The requests that the token may send.
    access: ApiTokenAccess,
    /// Time at which the token was last used, accurate to about a minute; null if it was never used.
    #[schema(required)]
    last_used_at: Option<Timestamp>,
    /// Client address of that use.
    #[schema(required)]
    last_source: Option<String>,
}

impl From<ApiTokenSummary> for ApiToken {
    fn from(token: ApiTokenSummary) -> Self {
        let (last_used_at, last_source) = match token.last_use {
            None => (None, None),
            Some(last) => (Some(Timestamp::of_ms(last.at_ms)), last.source),
        };
        Self {
            id: token.id,
            name: token.name,
            owner: token.owner,
            created_by: token.created_by,
            created_at: Timestamp::of_ms(token.created_at_ms),
            expires_at: Timestamp::of_ms(token.expires_at_ms),
            role: token.role,
            scope: token.scope,
            access: token.access,
            last_used_at,
            last_source,
        }
    }
}

/// A page of API tokens.
#[derive(Serialize, ToSchema)]
pub(super) struct ApiTokenList {
    /// API tokens, sorted by id; also those that expired in the last 30 days.
    tokens: Vec<ApiToken>,
    /// Value of `after` for the next page; null on the last page.
    #[schema(required)]
    next: Option<ApiTokenId>,
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ApiTokensQuery {
    /// Return the tokens of all users, for administrators. Default: false.
    #[serde(default)]
    all: bool,
    /// The `next` value of the previous page: return only tokens with ids after it.
    after: Option<ApiTokenId>,
    /// Maximum number of tokens in the answer. Default: 100.
    #[param(inline)]
    limit: Option<PageLimit>,
}

/// Schema of the scope of a new token.
fn token_scope_schema() -> OneOfBuilder {
    scope_schema(MAX_TOKEN_VMS)
        .description(Some(
            "VMs that the token may see, at most 100. Default: all that its owner may see.",
        ))
        .default(Some("all".into()))
}

/// An API token to create.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewApiToken {
    /// Name of the token, such as the program that will use it.
    name: Title,
    /// For how many seconds the token is valid. Default: 2592000, which is 30 days.
    #[schema(inline)]
    valid_seconds: Option<Number<60, 31_536_000>>,
    /// Role of the token, at most that of its owner. Default: viewer.
    #[serde(default = "viewer", deserialize_with = "known_role")]
    #[schema(default = json!("viewer"))]
    role: Role,
    #[serde(default = "all_vms", deserialize_with = "bounded_scope")]
    #[schema(schema_with = token_scope_schema)]
    scope: Scope,
    /// The requests that the token may send. Default: full.
    #[serde(default = "full", deserialize_with = "known_access")]
    #[schema(default = json!("full"))]
    access: ApiTokenAccess,
    /// Service account that will own the token, for administrators. Default: you own the token.
    service_account: Option<UserName>,
}

const fn viewer() -> Role {
    Role::Viewer
}

const fn all_vms() -> Scope {
    Scope::All
}

const fn full() -> ApiTokenAccess {
    ApiTokenAccess::Full
}

impl From<NewApiToken> for api_tokens::NewApiToken {
    fn from(token: NewApiToken) -> Self {
        let seconds = token.valid_seconds.map(Number::get);
        Self {
            name: token.name,
            // The conversion cannot fail, because the bounds of both types are equal.
            valid_seconds: seconds
                .and_then(|seconds| u32::try_from(seconds).ok())
                .unwrap_or(DEFAULT_SECONDS),
            role: token.role,
            scope: token.scope,
            access: token.access,
            service_account: token.service_account,
        }
    }
}

/// An API token that was just created.
#[derive(Serialize, ToSchema)]
pub(super) struct CreatedApiToken {
    /// The token with its secret, which no other answer contains. Anyone with this token can act as its owner, within
    /// its limits.
    #[schema(
        pattern = "^vmt_[0-9a-f]{16}_[0-9a-f]{64}$",
        example = "vmt_00112233445566ff_00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"
    )]
    token: String,
    api_token: ApiToken,
}

/// List API tokens
///
/// Lists your own tokens; with `all=true`, administrators see those of all users.
#[utoipa::path(
    get, path = "/tokens", tag = "tokens", operation_id = "list_api_tokens", params(ApiTokensQuery),
    responses((status = OK, body = ApiTokenList, description = "a page of API tokens")),
)]
pub(super) async fn list(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Query(ApiTokensQuery { all, after, limit }): Query<ApiTokensQuery>,
) -> Result<axum::Json<ApiTokenList>, Problem> {
    let page = ApiTokenPage {
        all,
        after,
        limit: page_limit(limit),
    };
    let list = caller.ask::<ApiTokensList>(&gateway, &page).await?;
    let tokens: Vec<ApiToken> = list.tokens.into_iter().map(ApiToken::from).collect();
    let next = tokens.last().filter(|_| list.more).map(|token| token.id);
    Ok(axum::Json(ApiTokenList { tokens, next }))
}

/// Create an API token
///
/// A program sends the token as `Authorization: Bearer …`. Only this answer contains it; the server stores its hash.
/// The token never permits more than its owner may do at the time of a request. It cannot change tokens, users,
/// passwords, sessions, join tokens or channels, and it is not accepted by the documented API of 2017.
#[utoipa::path(
    post, path = "/tokens", tag = "tokens", operation_id = "create_api_token", request_body = NewApiToken,
    responses(
        (
            status = CREATED, body = CreatedApiToken, description = "the API token and its secret",
            headers(("Location" = String, description = "path of the API token")),
        ),
        (status = CONFLICT, response = super::openapi::Conflict),
    ),
)]
pub(super) async fn create(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Query(NoParameters {}): Query<NoParameters>,
    Json(token): Json<NewApiToken>,
) -> Result<Response, Problem> {
    let created = caller.ask::<ApiTokensCreate>(&gateway, &token.into()).await?;
    let location = format!("{PATH}/tokens/{}", created.summary.id);
    let body = CreatedApiToken {
        token: created.token.as_str().to_owned(),
        api_token: created.summary.into(),
    };
    let mut response = (StatusCode::CREATED, axum::Json(body)).into_response();
    response
        .headers_mut()
        .extend(HeaderValue::from_str(&location).map(|location| (header::LOCATION, location)));
    Ok(response)
}

/// Revoke an API token
///
/// Every gateway refuses the token within a second. Administrators can revoke the tokens of all users.
#[utoipa::path(
    delete, path = "/tokens/{token_id}", tag = "tokens", operation_id = "revoke_api_token",
    params(("token_id" = ApiTokenId, Path, description = "id of the API token")),
    responses((status = NO_CONTENT, description = "the API token is revoked")),
)]
pub(super) async fn revoke(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Path(id): Path<ApiTokenId>,
    Query(NoParameters {}): Query<NoParameters>,
) -> Result<StatusCode, Problem> {
    caller
        .ask::<ApiTokensRevoke>(&gateway, &ApiTokenRef { id })
        .await?;
    Ok(StatusCode::NO_CONTENT)
}
