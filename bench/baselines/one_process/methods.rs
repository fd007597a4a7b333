//! The five methods of the documented API.

use std::time::Duration;

use anyhow::Context as _;
use argon2::{Argon2, PasswordVerifier, password_hash::phc::PasswordHash};
use gateway::legacy::python_repr::rows_to_python;
use metrics_svc::{deadline::Deadline, row_cache::RowQuery, store::RowKind};
use mongodb::bson::doc;
use serde::Deserialize;
use virt::{connect::Connect, domain::Domain};
use vmwatch_api::{auth::Token, metrics::Limit};

use crate::App;

/// Time limit of a database query.
const LIMIT: Duration = Duration::from_secs(5);

#[derive(Deserialize)]
struct Request {
    method: u32,
    data: Data,
    #[serde(default)]
    session_id: String,
    #[serde(default)]
    limit: Limit,
    proc_name: Option<String>,
}

#[derive(Deserialize)]
struct Data {
    #[serde(default)]
    instance_id: String,
    #[serde(default)]
    user_name: String,
    #[serde(default)]
    password: String,
    proc_name: Option<String>,
}

pub(crate) async fn answer(app: &App, body: &[u8]) -> anyhow::Result<String> {
    let request: Request = serde_json::from_slice(body)?;
    if request.method == 458_753 {
        return login(app, &request).await;
    }
    if !app.sessions.knows(&request.session_id) {
        return Ok(envelope(&request, 3, "invalid or expired session", "null"));
    }
    let (kind, message, cmd) = match request.method {
        611_611 => (RowKind::Vm, "success query vm information", None),
        611_711 => (RowKind::Process, "success query proc information", None),
        611_712 => {
            let cmd = request.proc_name.clone().or(request.data.proc_name.clone());
            (RowKind::Process, "success query proc information", cmd)
        }
        32_523 => return start(app, &request).await,
        other => anyhow::bail!("there is no method {other}"),
    };
    let rows = if let Some(echo) = &app.echo {
        echo.clone()
    } else {
        let question = RowQuery {
            kind,
            instance: request.data.instance_id.trim_end_matches([';', ' ']).parse()?,
            cmd,
            limit: request.limit,
            before: None,
        };
        app.newest.rows(question, Deadline::after(LIMIT)).await?.rows
    };
    Ok(envelope(&request, 1, message, &rows_to_python(rows.as_json())?))
}

fn envelope(request: &Request, status: u8, message: &str, data: &str) -> String {
    format!(
        r#"{{"status_code":{status},"session_id":"{}","message_id":"","message":"'{message}'","data":{data},"method":{}}}"#,
        request.session_id, request.method
    )
}

async fn login(app: &App, request: &Request) -> anyhow::Result<String> {
    let Data {
        user_name, password, ..
    } = &request.data;
    let user = app.users.find_one(doc! { "_id": user_name }).await?;
    let stored = user.as_ref().and_then(|user| user.get_str("password_hash").ok());
    let stored = stored.context("wrong user name or password")?.to_owned();
    let password = password.clone();
    let right = tokio::task::spawn_blocking(move || {
        let hash = PasswordHash::new(&stored).map_err(|error| anyhow::anyhow!("{error}"))?;
        anyhow::Ok(
            Argon2::default()
                .verify_password(password.as_bytes(), &hash)
                .is_ok(),
        )
    });
    anyhow::ensure!(right.await??, "wrong user name or password");
    let mut bits = [0; 16];
    getrandom::fill(&mut bits)?;
    let token = Token::from_random(bits);
    app.sessions.add(token, user_name);
    Ok(format!(
        r#"{{"status_code":1,"message":"'User authenticated sucessfully...'","method":458753,"session_id":"{token}","message_id":""}}"#
    ))
}

async fn start(app: &App, request: &Request) -> anyhow::Result<String> {
    let (uri, id) = (app.hypervisor.clone(), request.data.instance_id.clone());
    tokio::task::spawn_blocking(move || {
        let connect = Connect::open(Some(&uri))?;
        let domain = Domain::lookup_by_uuid_string(&connect, id.trim_end_matches([';', ' ']))?;
        if !domain.is_active()? {
            domain.create()?;
        }
        anyhow::Ok(())
    })
    .await??;
    Ok(format!(
        r#"{{"status_code":1,"session_id":"{}","message_id":"","message":"''","data":null,"method":32523}}"#,
        request.session_id
    ))
}
