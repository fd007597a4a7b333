//! The answers of the simulated cloud. `./dev peer nova` runs tests that compare them with the real services.

use std::{collections::HashMap, time::SystemTime};

use axum::{
    Json, Router,
    extract::{Path as UrlPath, Query, State},
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde_json::{Value, json};

use super::{ADMIN, At, CREDENTIAL, Cloud, Obedience, PASSWORD, Server, USER, is_admin, usual_power};

/// Keystone answers below `/identity`, and Nova below `/compute`.
pub(super) fn router(cloud: Cloud) -> Router {
    Router::new()
        .route("/identity/v3/auth/tokens", post(log_in))
        .route("/compute/v2.1/servers", get(list))
        .route("/compute/v2.1/servers/detail", get(list))
        .route("/compute/v2.1/servers/{id}", get(show))
        .route("/compute/v2.1/servers/{id}/action", post(act))
        .route("/compute/v2.1/servers/{id}/os-instance-actions", get(actions))
        .route(
            "/compute/v2.1/servers/{id}/os-instance-actions/{request}",
            get(action),
        )
        .with_state(cloud)
}

fn refusal(status: StatusCode, kind: &str, message: &str) -> Response {
    (
        status,
        Json(json!({kind: {"code": status.as_u16(), "message": message}})),
    )
        .into_response()
}

fn unauthorized() -> Response {
    refusal(
        StatusCode::UNAUTHORIZED,
        "error",
        "The request you have made requires authentication.",
    )
}

async fn log_in(State(cloud): State<Cloud>, Json(body): Json<Value>) -> Response {
    let identity = &body["auth"]["identity"];
    let user = &identity["password"]["user"];
    let has_password = |name: &str, password: &str, project: &str| {
        user["name"] == name
            && user["password"] == password
            && user["domain"]["name"] == "Default"
            && body["auth"]["scope"]["project"]["name"] == project
    };
    let by_admin = has_password(ADMIN.0, ADMIN.1, "admin");
    let by_password = by_admin || has_password(USER, PASSWORD, "vms");
    let credential = &identity["application_credential"];
    let by_credential = credential["id"] == CREDENTIAL.0
        && credential["secret"] == CREDENTIAL.1
        && body["auth"].get("scope").is_none();
    if !(by_password || by_credential) {
        return unauthorized();
    }
    let mut inner = cloud.lock();
    inner.logins += 1;
    let name = if by_admin { ADMIN.0 } else { "token" };
    let token = format!("{name}-{}", inner.logins);
    inner.tokens.insert(token.clone());
    let expires = jiff::Timestamp::try_from(SystemTime::now() + inner.token_life).unwrap();
    let endpoint = |interface: &str, region: &str, url: &str| json!({"interface": interface, "region_id": region, "url": url});
    let elsewhere = "http://127.0.0.1:9/";
    let mut compute = vec![endpoint("admin", "here", elsewhere)];
    compute.extend(
        inner
            .regions
            .iter()
            .map(|(region, path)| endpoint("public", region, &format!("http://{}{path}", cloud.address))),
    );
    let body = json!({"token": {
        "expires_at": expires.strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string(),
        "catalog": [
            {"type": "identity", "endpoints": [endpoint("public", "here", elsewhere)]},
            {"type": "compute", "endpoints": compute},
        ],
    }});
    (StatusCode::CREATED, [("x-subject-token", token)], Json(body)).into_response()
}

/// A server as Nova shows it. Versions before 2.9 do not report locks, versions before 2.16 hosts, and versions before 2.26
/// tags. Only administrators see whether the host is up.
fn shown(id: &str, server: &Server, headers: &HeaderMap) -> Value {
    let mut shown = json!({
        "id": id,
        "name": server.name,
        "status": server.status,
        "OS-EXT-STS:task_state": server.task,
        "OS-EXT-STS:power_state": server.power,
        "metadata": server.metadata,
    });
    let is_new = headers
        .get("openstack-api-version")
        .is_some_and(|version| version == "compute 2.26");
    if is_new {
        shown["locked"] = json!(server.locked);
        shown["tags"] = json!(server.tags);
        if is_admin(headers) {
            let has_host = server.status != "SHELVED_OFFLOADED";
            let usual = if has_host { "UP" } else { "" };
            shown["host_status"] = json!(server.host.as_deref().unwrap_or(usual));
        }
    }
    if let Some(fault) = &server.fault {
        shown["fault"] = json!({"code": 500, "message": fault});
    }
    shown
}

async fn show(State(cloud): State<Cloud>, UrlPath(id): UrlPath<String>, headers: HeaderMap) -> Response {
    if !cloud.admits(&headers) {
        return unauthorized();
    }
    cloud.pass(At::Read).await;
    let inner = cloud.lock();
    if let Some((status, body)) = &inner.instead {
        return (StatusCode::from_u16(*status).unwrap(), body.clone()).into_response();
    }
    match inner.servers.get(&id) {
        Some(server) => Json(json!({"server": shown(&id, server, &headers)})).into_response(),
        None => refusal(
            StatusCode::NOT_FOUND,
            "itemNotFound",
            &format!("Instance {id} could not be found."),
        ),
    }
}

async fn list(
    State(cloud): State<Cloud>,
    Query(query): Query<HashMap<String, String>>,
    headers: HeaderMap,
) -> Response {
    if !cloud.admits(&headers) {
        return unauthorized();
    }
    cloud.lock().lists += 1;
    cloud.pass(At::List).await;
    let inner = cloud.lock();
    let after = query.get("marker").cloned().unwrap_or_default();
    let asked: usize = query.get("limit").map_or(1000, |limit| limit.parse().unwrap());
    let size = asked.min(inner.page_size);
    let listed = |&(id, server): &(&String, &Server)| *id > after && server.status != "SOFT_DELETED";
    let mut rest = inner.servers.iter().filter(listed);
    let servers: Vec<_> = rest
        .by_ref()
        .take(size)
        .map(|(id, server)| shown(id, server, &headers))
        .collect();
    let mut page = json!({"servers": servers});
    if rest.next().is_some() {
        page["servers_links"] = json!([{"rel": "next", "href": "http://127.0.0.1:9/"}]);
    }
    Json(page).into_response()
}

/// Returns the statuses in which Nova accepts the action, the task that the action sets, and the resulting status.
fn meaning(command: &str, is_hard: bool) -> (&'static [&'static str], &'static str, &'static str) {
    match command {
        "reboot" if is_hard => (
            &["ACTIVE", "SHUTOFF", "PAUSED", "SUSPENDED", "ERROR"],
            "rebooting_hard",
            "ACTIVE",
        ),
        "unshelve" => (&["SHELVED", "SHELVED_OFFLOADED"], "unshelving", "ACTIVE"),
        "os-start" => (&["SHUTOFF"], "powering-on", "ACTIVE"),
        "os-stop" => (&["ACTIVE", "ERROR"], "powering-off", "SHUTOFF"),
        "reboot" => (&["ACTIVE"], "reboot_started", "ACTIVE"),
        "unpause" => (&["PAUSED"], "unpausing", "ACTIVE"),
        "resume" => (&["SUSPENDED"], "resuming", "ACTIVE"),
        other => panic!("no such action: {other}"),
    }
}

async fn act(
    State(cloud): State<Cloud>,
    UrlPath(id): UrlPath<String>,
    headers: HeaderMap,
    Json(body): Json<Value>,
) -> Response {
    if !cloud.admits(&headers) {
        return unauthorized();
    }
    let command = body.as_object().unwrap().keys().next().unwrap().clone();
    cloud.pass(At::Arrived).await;
    let is_hard = body["reboot"]["type"] == "HARD";
    let answer = cloud.carry_out(&id, &command, is_hard, is_admin(&headers));
    cloud
        .lock()
        .commands
        .push((id, command, answer.status().as_u16()));
    cloud.pass(At::Done).await;
    answer
}

impl Cloud {
    /// Locks do not apply to administrators.
    fn carry_out(&self, id: &str, command: &str, is_hard: bool, is_admin: bool) -> Response {
        let mut inner = self.lock();
        let obedience = inner.obedience;
        let Some(server) = inner.servers.get_mut(id) else {
            return refusal(
                StatusCode::NOT_FOUND,
                "itemNotFound",
                &format!("Instance {id} could not be found."),
            );
        };
        if server.locked && !is_admin {
            let what = format!("Instance {id} is locked");
            return refusal(StatusCode::CONFLICT, "conflictingRequest", &what);
        }
        let (from, task, to) = meaning(command, is_hard);
        if !from.contains(&server.status.as_str()) || server.task.is_some() {
            let what = format!(
                "Cannot '{command}' instance {id} while it is in vm_state {} task_state {:?}",
                server.status, server.task
            );
            return refusal(StatusCode::CONFLICT, "conflictingRequest", &what);
        }
        match obedience {
            Obedience::AtOnce => {
                to.clone_into(&mut server.status);
                server.power = usual_power(to);
            }
            Obedience::Later => server.task = Some(task.to_owned()),
            Obedience::Fails => server.last_failure = Some("No valid host: the disk is gone".to_owned()),
        }
        StatusCode::ACCEPTED.into_response()
    }
}

async fn actions(State(cloud): State<Cloud>, UrlPath(id): UrlPath<String>) -> Response {
    let inner = cloud.lock();
    let failure = inner
        .servers
        .get(&id)
        .and_then(|server| server.last_failure.as_ref());
    let message = failure.map(|_| "Error");
    let action = json!({"action": "start", "request_id": "req-1", "message": message});
    Json(json!({"instanceActions": [action]})).into_response()
}

async fn action(
    State(cloud): State<Cloud>,
    UrlPath((id, request)): UrlPath<(String, String)>,
    headers: HeaderMap,
) -> Response {
    let details = cloud
        .lock()
        .servers
        .get(&id)
        .and_then(|server| server.last_failure.clone());
    let version = headers
        .get("openstack-api-version")
        .map(|version| version.to_str().unwrap());
    // Versions of Nova before 2.84 do not report details of a failure.
    let event = if version == Some("compute 2.84") {
        json!({"details": details})
    } else {
        json!({})
    };
    let action = json!({"action": "start", "request_id": request, "message": "Error", "events": [event]});
    Json(json!({"instanceAction": action})).into_response()
}
