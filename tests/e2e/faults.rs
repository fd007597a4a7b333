//! Programs and servers that are killed, frozen, unreachable or flooded under load: which failures clients see, and
//! recovery without intervention. Each test is a row of docs/faults.md and prints its figures.
//!
//! The short forms run with all tests. `./dev soak` runs the long forms, selected by `VMWATCH_TEST_SOAK` and
//! `VMWATCH_TEST_OUTAGE`.

#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::float_cmp,
    reason = "counts and quantiles as figures, all of them small"
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

/// Time limit of a refusal: well below every deadline of the gateway, even on a busy machine.
const AT_ONCE: Duration = Duration::from_secs(1);

/// Duration of the mixed load in `./dev soak`; `None` in an ordinary test run.
fn soak() -> Option<Duration> {
    let given = env::var("VMWATCH_TEST_SOAK").ok()?;
    Some(
        given
            .parse::<Span>()
            .expect("VMWATCH_TEST_SOAK is a span such as 60m")
            .0,
    )
}

/// Selects the size for the short or the long form of a test.
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

/// Makes a session, and a row for it to read.
async fn session(stack: &Stack) -> String {
    store_vms(stack, [vm_row("vm-1", "2017-01-01T21:37:59.001065", 1)]).await;
    stack.session(Role::Operator, Scope::All).await
}

async fn answers(gateway: &Gateway, session: &str) {
    eventually("rows are answered", PATIENCE, async || {
        let answer = gateway.post(&vm_request(session)).await;
        if answer.status() == 1 {
            Ok(())
        } else {
            Err(answer.body)
        }
    })
    .await;
}

/// Whether the answer is 503 with `Retry-After` and the method's envelope, without waiting for a deadline.
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
