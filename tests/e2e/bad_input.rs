//! Tests input that no vmwatch client sends: the documented API refuses it as documented, the database never interprets
//! it as an operator, and all programs keep working.

use reqwest::Method;
use serde_json::{Value, json};
use testkit::{ADMIN, Answer, Gateway, MACHINES, Program, Stack, codes, failure};
use vmwatch_api::{Role, Scope, lifecycle::MachineState};

use crate::rows::{process_row, store_processes, store_vms, vm_row};

/// Maximum size of a request body in bytes.
const MOST: usize = 64 * 1024;

/// Starts a test environment with one process row that contains a secret. No error message may contain this secret.
async fn stack_with_rows() -> (Stack, String) {
    let stack = Stack::builder().without_login_limit().start().await;
    let date = "2017-01-01T21:37:59.001065";
    store_vms(&stack, [vm_row("vm-1", date, 1)]).await;
    store_processes(&stack, [process_row("vm-1", date, "init", 1)]).await;
    let session = stack.session(Role::Admin, Scope::All).await;
    (stack, session)
}

/// Asserts that the gateway still answers requests after the bad input, and that no VM was started. The harness checks
/// for panics when each program ends.
async fn still_works(stack: &Stack, session: &str) {
    let gateway = stack.gateway(0);
    assert_eq!(
        gateway
            .rows(session, codes::VM, 10, json!({ "instance_id": "vm-1" }))
            .await
            .len(),
        1
    );
    gateway.login(ADMIN.0, ADMIN.1).await;
    assert_eq!(
        stack.machine_state(MACHINES[0].0).await,
        MachineState::ShutOff,
        "no VM was started"
    );
    stack.ready().await;
}

fn message(answer: &Answer) -> String {
    let quoted = answer.message();
    // Python's `repr` chooses single or double quotes, depending on the text.
    quoted[1..quoted.len() - 1].to_owned()
}

#[tokio::test]
async fn request_body_that_is_not_an_object_gets_400() {
    let (stack, session) = stack_with_rows().await;
    let gateway = stack.gateway(0);
    let refused = failure(3, &Value::Null, "", "'the body must be one JSON object'");
    let good = format!(r#"{{"method":611611,"session_id":"{session}","data":{{"instance_id":"vm-1"}}}}"#);
    let bodies: Vec<Vec<u8>> = vec![
        b"".to_vec(),
        b" ".to_vec(),
        b"{".to_vec(),
        b"null".to_vec(),
        b"7".to_vec(),
        b"\"text\"".to_vec(),
        b"[]".to_vec(),
        format!("[{good}]").into_bytes(),
        good.as_bytes()[..good.len() - 1].to_vec(),
        format!("{good}{good}").into_bytes(),
        format!("{good};").into_bytes(),
        good.replace('"', "'").into_bytes(),
        b"{\"method\":611611,}".to_vec(),
        b"{\"method\":0611611}".to_vec(),
        b"{\"limit\":NaN}".to_vec(),
        b"{\"method\":\"\\ud8\"}".to_vec(),
        b"{\"method\":611611,\"x\":\"\xff\xfe\"}".to_vec(),
        b"\xef\xbb\xbf{}".to_vec(),
        b"{\"\xc0\x80\":1}".to_vec(),
        b"\0".repeat(100),
        "[".repeat(60_000).into_bytes(),
        "{\"a\":".repeat(12_000).into_bytes(),
        format!("{{\"data\":{}", "[".repeat(60_000)).into_bytes(),
        format!("method=611611&session_id={session}").into_bytes(),
    ];
    for body in bodies {
        let shown = String::from_utf8_lossy(&body[..body.len().min(80)]).into_owned();
        let answer = gateway.post_text(body).await;
        assert_eq!((answer.http, &answer.body), (400, &refused), "{shown}");
        assert_eq!(answer.content_type.as_deref(), Some("application/json"));
    }
    still_works(&stack, &session).await;
}

#[tokio::test]
async fn request_body_above_64_kib_is_refused() {
    let (stack, session) = stack_with_rows().await;
    let gateway = stack.gateway(0);
    let sized = |size: usize| {
        let mut body =
            format!(r#"{{"method":611611,"session_id":"{session}","data":{{"instance_id":"vm-1"}},"x":""#);
        body.push_str(&"x".repeat(size - body.len() - 2));
        body + "\"}"
    };
    let largest = gateway.post_text(sized(MOST)).await;
    assert_eq!((largest.http, largest.status()), (200, 1), "{largest:?}");
    let refused = failure(3, &Value::Null, "", "'the body must be at most 64 KiB'");
    for size in [MOST + 1, 1 << 20, 10 << 20] {
        let answer = gateway.post_text(sized(size)).await;
        assert_eq!((answer.http, answer.body), (413, refused.clone()), "{size} bytes");
    }
    // This request has a body of unknown length.
    let chunks = (0..200).map(|_| Ok::<_, std::io::Error>("x".repeat(1024)));
    let stream = reqwest::Body::wrap_stream(futures::stream::iter(chunks));
    let answer = gateway.post_text(stream).await;
    assert_eq!((answer.http, answer.body), (413, refused));
    still_works(&stack, &session).await;
}

#[tokio::test]
async fn documented_api_answers_405_to_other_http_methods() {
    let (stack, session) = stack_with_rows().await;
    let gateway = stack.gateway(0);
    let refused = failure(3, &Value::Null, "", "'this path supports only POST'");
    for verb in [
        Method::GET,
        Method::PUT,
        Method::DELETE,
        Method::PATCH,
        Method::OPTIONS,
        Method::TRACE,
    ] {
        let answer = gateway.send(verb.clone(), None, "{}").await.unwrap();
        assert_eq!((answer.http, answer.body), (405, refused.clone()), "{verb}");
        assert_eq!(answer.content_type.as_deref(), Some("application/json"));
    }
    // A response to HEAD has no body.
    let answer = gateway.send(Method::HEAD, None, "").await.unwrap();
    assert_eq!((answer.http, answer.body.as_str()), (405, ""));
    still_works(&stack, &session).await;
}

/// The error for an unknown method lists the known codes, in the same order as the documented error of method 611711,
/// and echoes the request's method, or null if it is not a number.
#[tokio::test]
async fn error_for_unknown_method_lists_known_methods() {
    let (stack, session) = stack_with_rows().await;
    let gateway = stack.gateway(0);
    let known = "'method must be one of 458753 (login), 611711 (getVMMonitoringProcData), 611611 (getVMMonitoringData), \
                 611712 (getVMMonitoringProcByNameData), 32523 (startmonitor)'";
    for (sent, echoed) in [
        (json!(1), json!(1)),
        (json!("1"), json!(1)),
        (json!(-611_611), json!(-611_611)),
        (json!(611_611.5), json!(611_611.5)),
        (json!(u64::MAX), json!(u64::MAX)),
        (json!("getVMMonitoringData"), Value::Null),
        (json!(""), Value::Null),
        (Value::Null, Value::Null),
        (json!(true), Value::Null),
        (json!([611_611]), Value::Null),
        (json!({ "$gt": 0 }), Value::Null),
    ] {
        let answer = gateway
            .post(&json!({ "method": sent, "session_id": session }))
            .await;
        assert_eq!(
            (answer.http, answer.body),
            (200, failure(3, &echoed, &session, known)),
            "{sent}"
        );
    }
    let answer = gateway.post(&json!({})).await;
    assert_eq!(
        (answer.http, answer.body),
        (200, failure(3, &Value::Null, "", known))
    );
    still_works(&stack, &session).await;
}

/// Sends each field with values of every other type and of extreme sizes. The gateway must refuse the request, name the
/// field and the violated rule, not repeat the input, and return no row.
#[tokio::test]
async fn invalid_field_is_named_in_the_error() {
    let (stack, session) = stack_with_rows().await;
    let gateway = stack.gateway(0);
    let operators = [
        json!({ "$gt": "" }),
        json!({ "$ne": null }),
        json!({ "$regex": ".*" }),
        json!({ "$where": "sleep(10000)" }),
        json!(["vm-1"]),
        json!(7),
        json!(1e300),
        json!(true),
    ];
    let ids = operators.iter().cloned().chain([
        Value::Null,
        json!(""),
        json!(";"),
        json!("vm-1;x"),
        json!("vm.1"),
        json!("vm-1.>"),
        json!("*"),
        json!("$where"),
        json!("$SRV"),
        json!("../../etc/passwd"),
        json!("vm-1\u{0}"),
        json!("vm-1' || '1'=='1"),
        json!("ｖｍ-1"),
        json!("x".repeat(65)),
        json!("x".repeat(60_000)),
    ]);
    for id in ids {
        let data = json!({ "instance_id": id });
        for method in [
            codes::VM,
            codes::PROCESSES,
            codes::PROCESSES_BY_NAME,
            codes::START,
        ] {
            refused(gateway, &session, method, json!({ "data": data }), "instance_id").await;
        }
    }
    for name in operators.iter().cloned().chain([json!("x".repeat(257))]) {
        let inside = json!({ "data": { "instance_id": "vm-1", "proc_name": name } });
        let above = json!({ "data": { "instance_id": "vm-1" }, "proc_name": name });
        for change in [inside, above] {
            refused(gateway, &session, codes::PROCESSES_BY_NAME, change, "proc_name").await;
        }
    }
    let limits = operators
        .iter()
        .filter(|value| **value != json!(7))
        .cloned()
        .chain([
            json!(0),
            json!(-1),
            json!(1001),
            json!(u64::MAX),
            json!(1.5),
            json!("0"),
            json!("-5"),
            json!("ten"),
            json!("4 "),
            json!("99999999999999999999999999"),
            Value::Null,
        ]);
    for limit in limits {
        let change = json!({ "data": { "instance_id": "vm-1" }, "limit": limit });
        refused(
            gateway,
            &session,
            codes::VM,
            change,
            "limit must be an integer from 1 to 1000",
        )
        .await;
    }
    for text in operators.iter().cloned().chain([json!("x".repeat(129))]) {
        let change = json!({ "data": { "instance_id": "vm-1" }, "message_id": text });
        refused(gateway, &session, codes::VM, change, "message_id").await;
        let change = json!({ "data": { "instance_id": "vm-1" }, "format": text });
        refused(gateway, &session, codes::VM, change, "format").await;
    }
    for data in [Value::Null, json!([]), json!("vm-1"), json!(1)] {
        refused(gateway, &session, codes::VM, json!({ "data": data }), "data").await;
    }
    refused(gateway, &session, codes::VM, json!({}), "instance_id").await;
    still_works(&stack, &session).await;
}

/// Sends a request of the given method with the given change, and asserts that the documented API refuses it.
async fn refused(gateway: &Gateway, session: &str, method: u32, change: Value, rule: &str) {
    let mut request = json!({ "method": method, "session_id": session });
    for (key, value) in change.as_object().unwrap() {
        request[key] = value.clone();
    }
    let answer = gateway.post(&request).await;
    let shown: String = request.to_string().chars().take(200).collect();
    assert_eq!(
        (answer.http, answer.status()),
        (200, 3),
        "{shown}: {}",
        answer.body
    );
    assert!(message(&answer).contains(rule), "{shown}: {}", answer.body);
    let exact = failure(3, &json!(method), session, &answer.message());
    assert_eq!(answer.body, exact, "{shown}");
    for secret in ["$", "etc/passwd", "xxxx", "1=="] {
        assert!(
            !answer.message().contains(secret),
            "the answer must not repeat the input: {}",
            answer.body
        );
    }
}

/// Database operators in the user name or password of a login do not bypass the password check.
#[tokio::test]
async fn login_refuses_values_that_are_not_strings() {
    let (stack, session) = stack_with_rows().await;
    let gateway = stack.gateway(0);
    let (user, password) = (json!(ADMIN.0), json!(ADMIN.1));
    let wrong = [
        json!({ "$gt": "" }),
        json!({ "$ne": "x" }),
        json!({ "$regex": "^" }),
        json!([ADMIN.1]),
        json!([ADMIN.0]),
        json!(1),
        json!(true),
        Value::Null,
        json!(""),
        json!("x".repeat(1025)),
    ];
    let users = wrong.iter().map(|user| (user, &password, "user_name"));
    let passwords = wrong.iter().map(|password| (&user, password, "password"));
    for (user_name, password, field) in users.chain(passwords) {
        let data = json!({ "user_name": user_name, "password": password });
        let answer = gateway
            .post(&json!({ "method": codes::LOGIN, "data": data }))
            .await;
        assert_eq!(
            (answer.http, answer.status()),
            (200, 3),
            "{data}: {}",
            answer.body
        );
        assert!(
            message(&answer).starts_with(&format!("{field} must be a text of 1 to ")),
            "{}",
            answer.body
        );
        assert_eq!(answer.json()["session_id"], "");
        assert!(!answer.body.contains("\"data\""), "{}", answer.body);
    }
    for missing in [
        json!({}),
        json!({ "user_name": ADMIN.0 }),
        json!({ "password": ADMIN.1 }),
    ] {
        let answer = gateway
            .post(&json!({ "method": codes::LOGIN, "data": missing }))
            .await;
        assert_eq!(
            (answer.http, answer.status()),
            (200, 3),
            "{missing}: {}",
            answer.body
        );
    }
    still_works(&stack, &session).await;
}

/// Valid JSON with unusual spelling is read as Python's `json` module reads it.
#[tokio::test]
async fn documented_api_reads_unusual_json_like_python() {
    let (stack, session) = stack_with_rows().await;
    let gateway = stack.gateway(0);
    let plain = gateway
        .post(&json!({ "method": codes::VM, "session_id": session, "data": { "instance_id": "vm-1" } }))
        .await;
    assert_eq!(plain.status(), 1);
    let head = format!(r#"{{"method":611611,"session_id":"{session}","#);
    for same in [
        // If a key is repeated, the last value counts, as in Python.
        format!(
            r#"{{"method":1,"session_id":"x","data":7,{}"#,
            &format!(r#"{head}"data":{{"instance_id":"vm-1"}}}}"#)[1..]
        ),
        format!(r#"{head}"data":{{"instance_id":{{"$gt":""}},"instance_id":"vm-1"}}}}"#),
        format!(r#"{head}"d\u0061ta":{{"inst\u0061nce_id":"\u0076m-1"}}}}"#),
        format!("\r\n\t {head}\"data\" : {{ \"instance_id\" : \"vm-1\" }} }}\n\n"),
        format!(
            r#"{head}"data":{{"instance_id":"vm-1"}},"x":{}{}}}"#,
            "[".repeat(31),
            "]".repeat(31)
        ),
        format!(
            r#"{head}"data":{{"instance_id":"vm-1"}},"x":1e999999,"y":{}}}"#,
            "9".repeat(10_000)
        ),
    ] {
        let answer = gateway.post_text(same.clone()).await;
        assert_eq!(answer.body, plain.body, "{}", &same[..same.len().min(200)]);
    }
    // This value is deeply nested inside a field that the gateway reads.
    let deep = format!(
        r#"{head}"data":{{"instance_id":{}{}}}}}"#,
        "[".repeat(30),
        "]".repeat(30)
    );
    let answer = gateway.post_text(deep).await;
    assert_eq!((answer.http, answer.status()), (200, 3), "{}", answer.body);
    assert!(message(&answer).contains("instance_id"), "{}", answer.body);
    for program in [Program::Gateway, Program::Metrics] {
        assert_eq!(stack.replica(program, 0).process.ended(), None);
    }
    still_works(&stack, &session).await;
}
