//! Adding a method takes its declaration, a handler and one row in the gateway's table of method codes. This test
//! declares a method, and adds a row for it to a copy of that table. The method is then served on the bus, audited
//! under its subject, and answered under its method code in the documented API.

use std::sync::Arc;

use gateway::{
    config::GatewaySettings,
    legacy::{Documented, PATH, Shape, TABLE},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use testkit::{PATIENCE, Program, Stack, eventually, free_port};
use tokio_util::sync::CancellationToken;
use vmwatch_api::{
    Access, Class, InstanceId, Kind, Method, MethodInfo, Role, Scope, Service,
    audit::{AuditRecord, AuditResult},
    lifecycle::Target,
    time::unix_millis,
};
use vmwatch_bus::{
    audit::{self, Audit},
    serve::{Refused, ServeSettings, Server},
};
use vmwatch_service::{config::Environment, program};

/// A bus method that only this test declares.
struct Snapshot;

#[derive(Debug, Serialize, Deserialize)]
struct Taken {
    snapshot: String,
}

impl Method for Snapshot {
    type Params = Target;
    type Reply = Taken;
    const INFO: MethodInfo = MethodInfo {
        service: Service::Lifecycle,
        subject: "lifecycle.snapshot",
        access: Access::Role(Role::Operator),
        kind: Kind::Command,
        class: Class::Command,
    };

    fn instance(params: &Target) -> Option<&InstanceId> {
        Some(&params.instance_id)
    }
}

const CODE: u32 = 32_599;

fn record(action: &str, user: &str, target: &Target, request_id: &str, result: AuditResult) -> AuditRecord {
    AuditRecord {
        at_ms: unix_millis(),
        action: action.to_owned(),
        user: user.to_owned(),
        api_token: None,
        source: None,
        target: Some(target.instance_id.to_string()),
        request_id: request_id.to_owned(),
        operation_id: None,
        result,
        detail: String::new(),
    }
}

/// Builds a service that serves the new method and audits refused and executed requests.
fn server(stack: &Stack) -> Server {
    let settings = ServeSettings::read(&Environment::from_variables([])).unwrap();
    let audit = Arc::new(Audit::new(&stack.bus, true));
    let of_refusals = Arc::clone(&audit);
    Server::new(&stack.bus, Service::Lifecycle, settings)
        .on_refusal(move |refused: Refused| {
            let audit = Arc::clone(&of_refusals);
            async move {
                let target: Target = serde_json::from_slice(&refused.body).unwrap();
                let (context, action) = (&refused.context, refused.method.subject);
                let result = AuditResult::Refused;
                let record = record(action, context.user(), &target, &context.request_id, result);
                audit.end(&record, &context.request_id).await;
            }
        })
        .method(Snapshot, move |context, target: Target| {
            let audit = Arc::clone(&audit);
            async move {
                let (action, result) = (Snapshot::INFO.subject, AuditResult::Succeeded);
                let record = record(action, context.user(), &target, &context.request_id, result);
                audit.end(&record, &context.request_id).await;
                Ok(Taken {
                    snapshot: format!("{}-1", target.instance_id),
                })
            }
        })
}

/// Starts a gateway in this process whose table has one additional row. Returns the gateway's address.
fn gateway_with(stack: &Stack, row: Documented) -> String {
    let (listen, health) = (free_port(), free_port());
    let (listen, health) = (format!("127.0.0.1:{listen}"), format!("127.0.0.1:{health}"));
    let environment = Environment::from_variables([
        ("VMWATCH_NATS_URL", stack.nats.url()),
        ("VMWATCH_LISTEN", &listen),
        ("VMWATCH_HEALTH_LISTEN", &health),
    ]);
    let mut settings = GatewaySettings::read(&environment).unwrap();
    settings.documented = [TABLE, &[row]].concat().leak();
    tokio::spawn(async move {
        let telemetry = settings.telemetry.clone();
        program::run("vmwatch-gateway", &telemetry, |program| {
            gateway::run(settings, program)
        })
        .await
    });
    format!("http://{listen}{PATH}")
}

async fn post(url: &str, session: &str) -> Option<String> {
    let body = json!({ "method": CODE, "data": { "instance_id": "vm-1;" }, "session_id": session });
    let sent = reqwest::Client::new().post(url).json(&body).send().await.ok()?;
    sent.text().await.ok()
}

#[tokio::test]
async fn new_bus_method_is_served_and_audited_and_has_a_method_code() {
    let stack = Stack::builder().replicas(Program::Metrics, 0).start().await;
    let shutdown = CancellationToken::new();
    let serving = tokio::spawn(server(&stack).run(shutdown.clone(), || ()));
    let row = Documented {
        code: CODE,
        name: "snapshot",
        method: Snapshot::INFO,
        success: "snapshot taken",
        shape: Shape::Null,
    };
    let url = gateway_with(&stack, row);

    let operator = stack.session(Role::Operator, Scope::All).await;
    let answer = eventually("the new method is answered", PATIENCE, async || {
        let answer = post(&url, &operator).await.ok_or("the gateway does not answer")?;
        let json: Value = serde_json::from_str(&answer).map_err(|error| error.to_string())?;
        (json["status_code"] == 1).then_some(answer.clone()).ok_or(answer)
    })
    .await;
    // This text is the expected answer; the new method needs no other golden file.
    assert_eq!(
        answer,
        format!(
            r#"{{"status_code":1,"session_id":"{operator}","message_id":"","message":"'snapshot taken'","data":null,"method":32599}}"#
        )
    );
    let viewer = stack.session(Role::Viewer, Scope::All).await;
    let refused: Value = serde_json::from_str(&post(&url, &viewer).await.unwrap()).unwrap();
    assert_eq!(refused["message"], "'this request requires the role operator'");

    let records = audit::newest(&stack.bus, 100).await.unwrap();
    let audited: Vec<_> = records
        .iter()
        .filter(|record| record.action == "lifecycle.snapshot")
        .map(|record| (record.result, record.target.as_deref()))
        .collect();
    let target = Some("vm-1");
    assert!(audited.contains(&(AuditResult::Refused, target)), "{audited:?}");
    assert!(audited.contains(&(AuditResult::Succeeded, target)), "{audited:?}");

    // Without the additional row, the code is unknown.
    let unknown = stack.gateway(0).post(&json!({ "method": CODE })).await;
    assert!(
        unknown
            .message()
            .starts_with("'method must be one of 458753 (login)"),
        "{}",
        unknown.message()
    );
    shutdown.cancel();
    serving.await.unwrap().unwrap();
}
