//! Tests programs and servers that are killed, frozen, unreachable or flooded under load. Each test checks which
//! failures clients see and that the system recovers without intervention. Each test corresponds to a row of
//! docs/faults.md and prints the figures of that row.
//!
//! All tests run in a short form by default. `./dev soak` runs long forms, which the variables `VMWATCH_TEST_SOAK` and
//! `VMWATCH_TEST_OUTAGE` select.

#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::float_cmp,
    reason = "the printed figures are small numbers"
)]

mod bus;
mod connections;
mod corpus;
mod database;
mod disk;
mod http;
mod isolation;
mod load;
mod malformed;
mod mixed;
mod overload;
mod replicas;
mod restarts;
mod restore;
mod rollback;
mod timeouts;

use std::{env, time::Duration};

use serde_json::{Value, json};
use testkit::{Answer, Gateway, PATIENCE, Stack, codes, eventually, failure};
use vmwatch_api::{Role, Scope};
use vmwatch_service::config::Span;

use crate::rows::{store_vms, vm_row};

/// Time limit of a refusal that must not wait: well below every deadline of the gateway, and long enough for a busy
/// machine.
const AT_ONCE: Duration = Duration::from_secs(3);

/// Returns the duration of the mixed load in `./dev soak`, or `None` in an ordinary test run.
fn soak() -> Option<Duration> {
    let given = env::var("VMWATCH_TEST_SOAK").ok()?;
    Some(
        given
            .parse::<Span>()
            .expect("VMWATCH_TEST_SOAK is a duration such as 60m")
            .0,
    )
}

/// Returns the second value under `./dev soak`, and the first in an ordinary test run.
fn size<T>(ordinary: T, of_a_soak: T) -> T {
    if soak().is_some() { of_a_soak } else { ordinary }
}

fn vm_request(session: &str) -> Value {
    json!({ "method": codes::VM, "session_id": session, "data": { "instance_id": "vm-1" } })
}

fn start_request(session: &str, machine: &str) -> Value {
    json!({ "method": codes::START, "session_id": session, "data": { "instance_id": machine } })
}

fn login_request() -> Value {
    let (user, password) = testkit::ADMIN;
    json!({ "method": codes::LOGIN, "data": { "user_name": user, "password": password } })
}

/// Logs in as the administrator and stores a VM row that the session can read.
async fn session(stack: &Stack) -> String {
    store_vms(stack, [vm_row("vm-1", "2017-01-01T21:37:59.001065", 1)]).await;
    stack.session(Role::Operator, Scope::All).await
}

async fn answers(gateway: &Gateway, session: &str) {
    eventually("a read of rows succeeds", PATIENCE, async || {
        let answer = gateway.post(&vm_request(session)).await;
        if answer.status() == 1 {
            Ok(())
        } else {
            Err(answer.body)
        }
    })
    .await;
}

/// Asserts that the answer is a 503 with `Retry-After` and the method's envelope, and that the gateway sent it without
/// waiting for a deadline.
fn assert_unavailable(answer: &Answer, method: u32, session: &str) {
    assert_eq!(answer.http, 503, "{answer:?}");
    assert_eq!(answer.retry_after.as_deref(), Some("1"));
    assert_eq!(
        answer.body,
        failure(3, &json!(method), session, &answer.message())
    );
    assert!(answer.message().contains("try again shortly"), "{answer:?}");
    assert!(answer.took < AT_ONCE, "{answer:?}");
}
