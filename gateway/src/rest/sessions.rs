//! REST routes that create, list and end sessions. The documented API uses the same sessions.

use std::sync::Arc;

use axum::{
    extract::State,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vmwatch_api::{
    Kind, Role, Scope, UserName,
    auth::{Credentials, Login, Password, Token},
    sessions::{Own, SessionId, SessionIdRef, SessionsEnd, SessionsList},
    time::unix_millis,
    users::{Logout, SessionRef},
};

use super::{
    caller::{Caller, Visitor, set_cookie},
    extract::{Json, NoParameters, Path, Query},
    problem::Problem,
    same_origin::SameOrigin,
    time::Timestamp,
};
use crate::Gateway;

/// Credentials with which to log in.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewSession {
    /// Name of the user.
    user_name: UserName,
    /// Password of the user.
    #[schema(value_type = String, format = Password, min_length = 1)]
    password: Password,
    /// Return the session token in a cookie that scripts cannot read, instead of in the response body; for web pages.
    #[serde(default)]
    cookie: bool,
}

/// A new session.
#[derive(Serialize, ToSchema)]
pub(super) struct Session {
    /// Token for `Authorization: Bearer …`; absent if it is in a cookie. Whoever has the token can act as the user.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, example = "9afdb1ec-d396-4ba3-af7a-1e38fd8751ca")]
    token: Option<Token>,
    #[serde(flatten)]
    who: Me,
}

/// The owner of the session or the API token of the request.
#[derive(Serialize, ToSchema)]
pub(super) struct Me {
    /// Name of the user.
    user_name: String,
    /// Role of the user; for an API token, the lesser of its own and its owner's role.
    role: Role,
    /// VMs that the user may see; for an API token, those that both the token and its owner may see.
    scope: Scope,
    /// Time at which the session or the API token expires.
    expires_at: Timestamp,
}

/// Log in
///
/// Creates a session, which is valid on every gateway and also in the documented API. The response to a failed login
/// does not reveal whether the name or the password was wrong.
#[utoipa::path(
    post, path = "/sessions", tag = "sessions", operation_id = "login", security(()), request_body = NewSession,
    responses((
        status = CREATED, body = Session, description = "the session",
        headers(("Set-Cookie" = Option<String>, description = "the session, if a cookie was requested")),
    )),
)]
pub(super) async fn login(
    State(gateway): State<Arc<Gateway>>,
    visitor: Visitor,
    headers: HeaderMap,
    SameOrigin(same_origin): SameOrigin,
    Query(NoParameters {}): Query<NoParameters>,
    Json(NewSession {
        user_name,
        password,
        cookie,
    }): Json<NewSession>,
) -> Result<Response, Problem> {
    if cookie {
        // Without this check another site could log its visitor in as a different user.
        same_origin?;
    }
    let context = visitor.context(&gateway, Kind::Query);
    let made = gateway
        .call::<Login>(&context, &Credentials { user_name, password })
        .await?;
    let seconds = made.expires_at_ms.saturating_sub(unix_millis()) / 1000;
    let session = Session {
        token: (!cookie).then_some(made.session_id),
        who: Me {
            user_name: made.principal.user,
            role: made.principal.role,
            scope: made.principal.scope,
            expires_at: Timestamp::of_ms(made.expires_at_ms),
        },
    };
    let mut response = (StatusCode::CREATED, axum::Json(session)).into_response();
    if cookie {
        put_cookie(
            &mut response,
            &set_cookie(&headers, &made.session_id.to_string(), seconds),
        );
    }
    Ok(response)
}

/// Log out
///
/// Ends the session that sent the request, on every gateway.
#[utoipa::path(
    delete, path = "/sessions/current", tag = "sessions", operation_id = "logout",
    responses((status = NO_CONTENT, description = "the session has ended")),
)]
pub(super) async fn logout(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    headers: HeaderMap,
    Query(NoParameters {}): Query<NoParameters>,
) -> Result<Response, Problem> {
    let session = SessionRef {
        session_id: caller.session_token()?,
    };
    caller.ask::<Logout>(&gateway, &session).await?;
    Ok(ended(&headers, true))
}

/// One of the user's sessions.
#[derive(Serialize, ToSchema)]
pub(super) struct OwnSession {
    /// Session id. The token cannot be derived from it.
    id: SessionId,
    /// Whether this session sent the request.
    current: bool,
    /// Time at which the user logged in.
    began_at: Timestamp,
    /// Time at which the session was last used, accurate to about a minute.
    last_used_at: Timestamp,
    /// Time at which the session ends if it is not used until then.
    idle_ends_at: Timestamp,
    /// Time at which the session ends even if it is used.
    expires_at: Timestamp,
    /// Client address from which the user logged in.
    #[schema(required)]
    source: Option<String>,
}

/// Live sessions of the user that sent the request.
#[derive(Serialize, ToSchema)]
pub(super) struct SessionList {
    /// Sessions, newest first.
    sessions: Vec<OwnSession>,
}

/// List your sessions
#[utoipa::path(
    get, path = "/sessions", tag = "sessions", operation_id = "list_sessions",
    responses((status = OK, body = SessionList, description = "the live sessions of the user")),
)]
pub(super) async fn list(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Query(NoParameters {}): Query<NoParameters>,
) -> Result<axum::Json<SessionList>, Problem> {
    let current = SessionId::from_token_hash(&caller.session_token()?.hash());
    let listed = caller.ask::<SessionsList>(&gateway, &Own {}).await?;
    let sessions = listed.sessions.into_iter().map(|session| OwnSession {
        current: session.id == current,
        id: session.id,
        began_at: Timestamp::of_ms(session.began_at_ms),
        last_used_at: Timestamp::of_ms(session.last_used_at_ms),
        idle_ends_at: Timestamp::of_ms(session.idle_ends_at_ms),
        expires_at: Timestamp::of_ms(session.expires_at_ms),
        source: session.source,
    });
    Ok(axum::Json(SessionList {
        sessions: sessions.collect(),
    }))
}

/// End one of your sessions
///
/// Ends the session on every gateway within a second.
#[utoipa::path(
    delete, path = "/sessions/{session_id}", tag = "sessions", operation_id = "end_session",
    params(("session_id" = SessionId, Path, description = "session id, as listed by `GET /sessions`")),
    responses((status = NO_CONTENT, description = "the session has ended")),
)]
pub(super) async fn end(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    headers: HeaderMap,
    Path(id): Path<SessionId>,
    Query(NoParameters {}): Query<NoParameters>,
) -> Result<Response, Problem> {
    let own = id == SessionId::from_token_hash(&caller.session_token()?.hash());
    caller.ask::<SessionsEnd>(&gateway, &SessionIdRef { id }).await?;
    Ok(ended(&headers, own))
}

/// Read the current user
#[utoipa::path(
    get, path = "/me", tag = "sessions", operation_id = "me",
    responses((status = OK, body = Me, description = "the user of the session or the API token")),
)]
pub(super) async fn me(caller: Caller, Query(NoParameters {}): Query<NoParameters>) -> axum::Json<Me> {
    let principal = caller.principal().clone();
    axum::Json(Me {
        user_name: principal.user,
        role: principal.role,
        scope: principal.scope,
        expires_at: Timestamp::of_ms(caller.expires_at_ms()),
    })
}

/// Response to a request that ended a session. If the session was the browser's own, the response also deletes the
/// cookie.
fn ended(headers: &HeaderMap, own: bool) -> Response {
    let mut response = StatusCode::NO_CONTENT.into_response();
    if own && headers.contains_key(header::COOKIE) {
        put_cookie(&mut response, &set_cookie(headers, "", 0));
    }
    response
}

fn put_cookie(response: &mut Response, cookie: &str) {
    // A cookie consists of a token and constants, so it is a valid header value.
    response
        .headers_mut()
        .extend(HeaderValue::from_str(cookie).map(|cookie| (header::SET_COOKIE, cookie)));
}
