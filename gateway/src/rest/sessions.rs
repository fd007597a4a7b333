//! Sessions: the same as the documented API's.

use std::sync::Arc;

use axum::{
    extract::State,
    http::{HeaderMap, HeaderValue, StatusCode, Uri, header},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use shared::{
    api::{
        Kind, Role, Scope,
        auth::{Credentials, Login, Password, Token, UserName},
        users::{Logout, SessionRef},
    },
    time::unix_millis,
};
use utoipa::ToSchema;

use super::{
    caller::{Caller, Visitor, check_same_origin, set_cookie},
    extract::{Json, NoParameters, Query},
    problem::Problem,
    time::Timestamp,
};
use crate::Gateway;

/// Who wants a session, and how it is to be carried.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewSession {
    /// The user's name.
    user_name: UserName,
    /// Its password.
    #[schema(value_type = String, format = Password, min_length = 1)]
    password: Password,
    /// For a page in a browser: the token comes in a cookie that scripts cannot read, and not in the answer.
    #[serde(default)]
    cookie: bool,
}

/// A session.
#[derive(Serialize, ToSchema)]
pub(super) struct Session {
    /// The token, for `Authorization: Bearer …`; absent where it is in a cookie. Whoever holds it is the user.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, example = "9afdb1ec-d396-4ba3-af7a-1e38fd8751ca")]
    token: Option<Token>,
    #[serde(flatten)]
    who: Me,
}

/// Who is behind a session.
#[derive(Serialize, ToSchema)]
pub(super) struct Me {
    /// The user's name.
    user_name: String,
    /// What the user may do.
    role: Role,
    /// Which VMs the user may see.
    scope: Scope,
    /// When the session ends by itself.
    expires_at: Timestamp,
}

/// Log in
///
/// Makes a session, which is good on every gateway and in the documented API as well. A wrong name and a wrong
/// password read the same.
#[utoipa::path(
    post, path = "/sessions", tag = "sessions", operation_id = "login", security(()), request_body = NewSession,
    responses((
        status = CREATED, body = Session, description = "the session",
        headers(("Set-Cookie" = Option<String>, description = "the session, where a cookie was asked for")),
    )),
)]
pub(super) async fn login(
    State(gateway): State<Arc<Gateway>>,
    visitor: Visitor,
    headers: HeaderMap,
    uri: Uri,
    Query(NoParameters {}): Query<NoParameters>,
    Json(NewSession {
        user_name,
        password,
        cookie,
    }): Json<NewSession>,
) -> Result<Response, Problem> {
    if cookie {
        // A foreign page must not log its visitor in as somebody else either.
        check_same_origin(&headers, &uri)?;
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
/// Ends the session that the request is made with, on every gateway.
#[utoipa::path(
    delete, path = "/sessions/current", tag = "sessions", operation_id = "logout",
    responses((status = NO_CONTENT, description = "the session is over")),
)]
pub(super) async fn logout(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    headers: HeaderMap,
    Query(NoParameters {}): Query<NoParameters>,
) -> Result<Response, Problem> {
    let session = SessionRef {
        session_id: caller.token,
    };
    caller.ask::<Logout>(&gateway, &session).await?;
    let mut response = StatusCode::NO_CONTENT.into_response();
    if headers.contains_key(header::COOKIE) {
        put_cookie(&mut response, &set_cookie(&headers, "", 0));
    }
    Ok(response)
}

/// Who am I
#[utoipa::path(
    get, path = "/me", tag = "sessions", operation_id = "me",
    responses((status = OK, body = Me, description = "the session's user")),
)]
pub(super) async fn me(caller: Caller, Query(NoParameters {}): Query<NoParameters>) -> axum::Json<Me> {
    let principal = caller.principal().clone();
    axum::Json(Me {
        user_name: principal.user,
        role: principal.role,
        scope: principal.scope,
        expires_at: Timestamp::of_ms(caller.session.expires_at_ms),
    })
}

fn put_cookie(response: &mut Response, cookie: &str) {
    // A cookie is made of a token and constants: it is always a header's value.
    response
        .headers_mut()
        .extend(HeaderValue::from_str(cookie).map(|cookie| (header::SET_COOKIE, cookie)));
}
