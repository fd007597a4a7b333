//! Users, for administrators; and one's own password.

use std::sync::Arc;

use axum::{
    extract::State,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use shared::api::{
    Method, Role, Scope,
    auth::{Password, UserName},
    users::{
        self, NewPassword, PasswordChange, UserChange, UserPage, UserRef, UsersAdd, UsersGet, UsersList,
        UsersRemove, UsersSetPassword, UsersUpdate,
    },
};
use utoipa::{IntoParams, ToSchema};

use super::{
    PATH,
    caller::Caller,
    extract::{Json, NoParameters, PageLimit, Path, Query, page_limit},
    problem::Problem,
    time::Timestamp,
};
use crate::Gateway;

/// A user.
#[derive(Serialize, ToSchema)]
pub(super) struct User {
    /// Its name.
    name: UserName,
    /// What it may do.
    role: Role,
    /// Which VMs it may see.
    scope: Scope,
    /// When it was made.
    created_at: Timestamp,
}

impl From<users::User> for User {
    fn from(user: users::User) -> Self {
        Self {
            name: user.name,
            role: user.role,
            scope: user.scope,
            created_at: Timestamp::of_ms(user.created_at_ms),
        }
    }
}

/// A page of users.
#[derive(Serialize, ToSchema)]
pub(super) struct UserList {
    /// In the order of their names.
    users: Vec<User>,
    /// What `after` is for the next page; null on the last.
    #[schema(required)]
    next: Option<UserName>,
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct UsersQuery {
    /// Only names behind this one: `next` of the page before.
    after: Option<UserName>,
    /// At most how many; 100 unless given.
    #[param(inline)]
    limit: Option<PageLimit>,
}

/// A user to be made.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewUser {
    /// Its name.
    name: UserName,
    /// Its first password.
    #[schema(value_type = String, format = Password, min_length = 8)]
    password: NewPassword,
    /// What it may do.
    role: Role,
    /// Which VMs it may see; all unless given.
    #[serde(default = "everything")]
    #[schema(default = json!("all"))]
    scope: Scope,
}

const fn everything() -> Scope {
    Scope::All
}

/// What to change of a user; what is absent stays.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Change {
    /// What it may do.
    #[serde(default, deserialize_with = "given")]
    #[schema(nullable = false)]
    role: Option<Role>,
    /// Which VMs it may see.
    #[serde(default, deserialize_with = "given")]
    #[schema(nullable = false)]
    scope: Option<Scope>,
}

/// A new password.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Passwords {
    /// The password from now on.
    #[schema(value_type = String, format = Password, min_length = 8)]
    password: NewPassword,
    /// The password until now: needed by who changes its own.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<String>, nullable = false, format = Password, min_length = 1)]
    old_password: Option<Password>,
}

/// Of a field that may be absent, but not null.
fn given<'de, T, D>(deserializer: D) -> Result<Option<T>, D::Error>
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

/// Make a user
#[utoipa::path(
    post, path = "/users", tag = "users", operation_id = "add_user", request_body = NewUser,
    responses((
        status = CREATED, body = User, description = "the user",
        headers(("Location" = String, description = "the user's address")),
    ), (status = CONFLICT, response = super::openapi::Conflict)),
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
        role,
        scope,
    } = user;
    let user = users::NewUser {
        name,
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
    params(("user_name" = UserName, Path, description = "the user's name")),
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

/// Change a user's role or scope
///
/// This ends its sessions, since they carry both. The last administrator stays one.
#[utoipa::path(
    patch, path = "/users/{user_name}", tag = "users", operation_id = "update_user", request_body = Change,
    params(("user_name" = UserName, Path, description = "the user's name")),
    responses(
        (status = OK, body = User, description = "the user as it is now"),
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

/// Remove a user
///
/// This ends its sessions. The last administrator stays.
#[utoipa::path(
    delete, path = "/users/{user_name}", tag = "users", operation_id = "remove_user",
    params(("user_name" = UserName, Path, description = "the user's name")),
    responses(
        (status = NO_CONTENT, description = "the user is no more"),
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
/// One's own with the old one, another's as an administrator. This ends all sessions of the user, the one that the
/// request is made with included.
#[utoipa::path(
    put, path = "/users/{user_name}/password", tag = "users", operation_id = "set_password", request_body = Passwords,
    params(("user_name" = UserName, Path, description = "the user's name")),
    responses((status = NO_CONTENT, description = "the password is set")),
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
        // Checking it costs a hash, and tells whether it is right: as a login.
        gateway.admission.check_source(&info, &context)?;
    }
    gateway.call::<UsersSetPassword>(&context, &change).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// As one segment of a path (RFC 3986: all but the unreserved characters).
fn percent_encoded(text: &str) -> String {
    use std::fmt::Write as _;
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' | b'-' | b'.' | b'_' | b'~' => out.push(char::from(byte)),
            // Writing to a String cannot fail.
            _ => drop(write!(out, "%{byte:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_segment_of_an_address() {
        assert_eq!(percent_encoded("a.b-c_d~1"), "a.b-c_d~1");
        assert_eq!(percent_encoded("a/b ?#é%"), "a%2Fb%20%3F%23%C3%A9%25");
    }
}
