//! REST routes for user management by administrators and for changing one's own password.

use std::sync::Arc;

use axum::{
    extract::State,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, PercentEncode, utf8_percent_encode};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use vmwatch_api::{
    Method, Role, Scope, UserName,
    auth::Password,
    users::{
        self, NewPassword, PasswordChange, UserChange, UserPage, UserRef, UsersAdd, UsersGet, UsersList,
        UsersRemove, UsersSetPassword, UsersUpdate,
    },
};

use super::{
    PATH,
    caller::Caller,
    extract::{Json, NoParameters, PageLimit, Path, Query, page_limit},
    problem::Problem,
    time::Timestamp,
};
use crate::Gateway;

/// A user account.
#[derive(Serialize, ToSchema)]
pub(super) struct User {
    /// Name of the user.
    name: UserName,
    /// Role of the user.
    role: Role,
    /// VMs that the user may see.
    scope: Scope,
    /// Whether the user is a service account, which cannot log in and acts only through API tokens.
    service_account: bool,
    /// Time at which the user was created.
    created_at: Timestamp,
}

impl From<users::User> for User {
    fn from(user: users::User) -> Self {
        Self {
            name: user.name,
            role: user.role,
            scope: user.scope,
            service_account: user.service,
            created_at: Timestamp::of_ms(user.created_at_ms),
        }
    }
}

/// A page of users.
#[derive(Serialize, ToSchema)]
pub(super) struct UserList {
    /// Users, sorted by name.
    users: Vec<User>,
    /// Value of `after` for the next page; null on the last page.
    #[schema(required)]
    next: Option<UserName>,
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct UsersQuery {
    /// The `next` value of the previous page: return only users whose names come after it.
    after: Option<UserName>,
    /// Maximum number of users in the answer. Default: 100.
    #[param(inline)]
    limit: Option<PageLimit>,
}

/// A user to create.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewUser {
    /// Name of the user: letters and digits of one script and ASCII punctuation, without spaces (RFC 8265). Names that
    /// differ only in case are the same.
    name: UserName,
    /// Initial password of the user; absent for a service account.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<String>, nullable = false, format = Password, min_length = 8)]
    password: Option<NewPassword>,
    /// Create a service account: a user that cannot log in and acts only through API tokens. It cannot be an
    /// administrator. Default: false.
    #[serde(default)]
    service_account: bool,
    /// Role of the user.
    role: Role,
    /// VMs that the user may see. Default: all.
    #[serde(default = "all_vms")]
    #[schema(default = json!("all"))]
    scope: Scope,
}

const fn all_vms() -> Scope {
    Scope::All
}

/// Changes to a user; absent fields leave the user unchanged.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Change {
    /// New role of the user.
    #[serde(default, deserialize_with = "present")]
    #[schema(nullable = false)]
    role: Option<Role>,
    /// VMs that the user may see from now on.
    #[serde(default, deserialize_with = "present")]
    #[schema(nullable = false)]
    scope: Option<Scope>,
}

/// A new password for a user.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Passwords {
    /// The new password.
    #[schema(value_type = String, format = Password, min_length = 8)]
    password: NewPassword,
    /// Current password of the user; required when users change their own password.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<String>, nullable = false, format = Password, min_length = 1)]
    old_password: Option<Password>,
}

/// Decodes a field that may be absent but not null.
fn present<'de, T, D>(deserializer: D) -> Result<Option<T>, D::Error>
where
    T: Deserialize<'de>,
    D: serde::Deserializer<'de>,
{
    T::deserialize(deserializer).map(Some)
}

/// List users
#[utoipa::path(
    get, path = "/users", tag = "users", operation_id = "list_users", params(UsersQuery),
    responses((status = OK, body = UserList, description = "a page of users")),
)]
pub(super) async fn list(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Query(UsersQuery { after, limit }): Query<UsersQuery>,
) -> Result<axum::Json<UserList>, Problem> {
    let page = UserPage {
        after,
        limit: page_limit(limit),
    };
    let list = caller.ask::<UsersList>(&gateway, &page).await?;
    let users: Vec<User> = list.users.into_iter().map(User::from).collect();
    let next = users.last().filter(|_| list.more).map(|user| user.name.clone());
    Ok(axum::Json(UserList { users, next }))
}

/// Create a user
///
/// A name that RFC 8265 does not allow, or that mixes scripts, is refused with 422. A service account gets its API
/// tokens from administrators.
#[utoipa::path(
    post, path = "/users", tag = "users", operation_id = "add_user", request_body = NewUser,
    responses((
        status = CREATED, body = User, description = "the user",
        headers(("Location" = String, description = "path of the user")),
    ),
        (status = CONFLICT, response = super::openapi::Conflict),
        (status = UNPROCESSABLE_ENTITY, response = super::openapi::Unprocessable),
    ),
)]
pub(super) async fn add(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Query(NoParameters {}): Query<NoParameters>,
    Json(user): Json<NewUser>,
) -> Result<Response, Problem> {
    let NewUser {
        name,
        password,
        service_account,
        role,
        scope,
    } = user;
    if service_account == password.is_some() {
        let rule = "body: a user needs a password, and a service account has none";
        return Err(Problem::contradictory(rule));
    }
    let user = users::NewUser {
        name: name.try_into().map_err(Problem::user_name)?,
        password,
        role,
        scope,
    };
    let user = User::from(caller.ask::<UsersAdd>(&gateway, &user).await?);
    let location = format!("{PATH}/users/{}", percent_encoded(user.name.as_str()));
    let mut response = (StatusCode::CREATED, axum::Json(user)).into_response();
    response
        .headers_mut()
        .extend(HeaderValue::from_str(&location).map(|location| (header::LOCATION, location)));
    Ok(response)
}

/// Read a user
#[utoipa::path(
    get, path = "/users/{user_name}", tag = "users", operation_id = "get_user",
    params(("user_name" = UserName, Path, description = "user name")),
    responses((status = OK, body = User, description = "the user")),
)]
pub(super) async fn get(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Path(name): Path<UserName>,
    Query(NoParameters {}): Query<NoParameters>,
) -> Result<axum::Json<User>, Problem> {
    let user = caller.ask::<UsersGet>(&gateway, &UserRef { name }).await?;
    Ok(axum::Json(user.into()))
}

/// Change the role or scope of a user
///
/// Ends all sessions of the user, because sessions carry the role and the scope. The last administrator cannot be
/// demoted.
#[utoipa::path(
    patch, path = "/users/{user_name}", tag = "users", operation_id = "update_user", request_body = Change,
    params(("user_name" = UserName, Path, description = "user name")),
    responses(
        (status = OK, body = User, description = "the changed user"),
        (status = CONFLICT, response = super::openapi::Conflict),
    ),
)]
pub(super) async fn update(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Path(name): Path<UserName>,
    Query(NoParameters {}): Query<NoParameters>,
    Json(Change { role, scope }): Json<Change>,
) -> Result<axum::Json<User>, Problem> {
    let change = UserChange { name, role, scope };
    let user = caller.ask::<UsersUpdate>(&gateway, &change).await?;
    Ok(axum::Json(user.into()))
}

/// Delete a user
///
/// Ends all sessions of the user. The last administrator cannot be deleted.
#[utoipa::path(
    delete, path = "/users/{user_name}", tag = "users", operation_id = "remove_user",
    params(("user_name" = UserName, Path, description = "user name")),
    responses(
        (status = NO_CONTENT, description = "the user is deleted"),
        (status = CONFLICT, response = super::openapi::Conflict),
    ),
)]
pub(super) async fn remove(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Path(name): Path<UserName>,
    Query(NoParameters {}): Query<NoParameters>,
) -> Result<StatusCode, Problem> {
    caller.ask::<UsersRemove>(&gateway, &UserRef { name }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Set a password
///
/// Users set their own password by giving the current one; administrators can set the password of any user. Ends all
/// sessions of the user, including the session that sent the request.
#[utoipa::path(
    put, path = "/users/{user_name}/password", tag = "users", operation_id = "set_password", request_body = Passwords,
    params(("user_name" = UserName, Path, description = "user name")),
    responses(
        (status = NO_CONTENT, description = "the password is set"),
        (status = CONFLICT, response = super::openapi::Conflict),
    ),
)]
pub(super) async fn set_password(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Path(name): Path<UserName>,
    Query(NoParameters {}): Query<NoParameters>,
    Json(Passwords {
        password,
        old_password,
    }): Json<Passwords>,
) -> Result<StatusCode, Problem> {
    let change = PasswordChange {
        name,
        password,
        old_password,
    };
    let info = UsersSetPassword::INFO;
    let context = caller.context(&gateway, info.kind);
    if change.old_password.is_some() {
        // Checking the current password costs a hash and reveals whether the password is correct, so it counts as a
        // login attempt.
        gateway.admission.check_source(&info, &context)?;
    }
    gateway.call::<UsersSetPassword>(&context, &change).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Characters to percent-encode: all but the unreserved characters of RFC 3986.
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

/// Percent-encodes text for use as one segment of a path.
fn percent_encoded(text: &str) -> PercentEncode<'_> {
    utf8_percent_encode(text, SEGMENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_segment_is_percent_encoded() {
        assert_eq!(percent_encoded("a.b-c_d~1").to_string(), "a.b-c_d~1");
        assert_eq!(percent_encoded("a/b ?#é%").to_string(), "a%2Fb%20%3F%23%C3%A9%25");
    }
}
