//! The texts of messages.

use serde_json::json;
use vmwatch_api::{
    alerts::{
        Alert, AlertState, RecordId,
        channels::{Message, MessageAlert, Purpose, Template},
    },
    time::UtcOffset,
};

use crate::notify::{
    content::{self, Content, View},
    template,
};

/// 2017-01-01 02:51 UTC.
const STARTED: u64 = 1_483_239_060_000;
const NOW: u64 = STARTED + 360_000;

fn content(states: &[AlertState]) -> Content {
    let view = View {
        now_ms: NOW,
        utc_offset: UtcOffset::UTC,
        public_url: "https://vmwatch.example.com",
    };
    let alerts = states.iter().enumerate().map(|(number, &state)| {
        let alert: Alert = serde_json::from_value(json!({
            "id": RecordId::from_parts(&[&number.to_string()]), "rule_id": "b".repeat(32), "rule_name": "CPU high",
            "severity": "critical", "instance_id": format!("vm-{number}"), "vm_name": format!("db-{number}"),
            "condition": {
                "kind": "measure", "measure": "cpu_util", "threshold": { "direction": "above", "limit": 90.0 },
            },
            "state": state, "value": 97.0, "since_ms": STARTED + 60_000, "fired_ms": NOW, "revision": 1,
            "resolved_ms": (state == AlertState::Resolved).then_some(NOW + 300_000),
            "ended_by": { "operation_id": "0".repeat(32), "action": "stop", "user": "alice" },
            "culprits": {
                "from_ms": 0, "to_ms": NOW, "processes": [{
                    "name": "pg_restore", "pid": 4121, "started_ms": STARTED, "amount": 243.0, "share": 0.81,
                    "owner": { "user": "postgres", "unit": "backup.service" },
                }],
            },
        }))
        .unwrap();
        let reported = MessageAlert {
            id: alert.id.clone(),
            state,
        };
        content::prepare(&alert, &reported, view)
    });
    Content {
        message: Message {
            id: RecordId::from_parts(&["message"]),
            channel_id: RecordId::from_parts(&["channel"]),
            purpose: Purpose::Change,
            group: [("rule".to_owned(), "CPU high".to_owned())].into(),
            alerts: Vec::new(),
            created_ms: NOW,
            next_ms: None,
            delivered_ms: None,
            tries: 0,
            attempts: Vec::new(),
        },
        channel: "ops".to_owned(),
        alerts: alerts.collect(),
        now_ms: NOW,
        public_url: view.public_url.to_owned(),
    }
}

fn template(text: &str) -> Template {
    serde_json::from_value(json!(text)).unwrap()
}

#[test]
fn default_text_names_culprits_and_the_operation_that_ended_the_condition() {
    let content = content(&[AlertState::Firing, AlertState::Resolved]);
    let rendered = template::render(None, &content, &content.alerts);
    assert_eq!(rendered.problem, None);
    assert_eq!(
        rendered.text,
        "db-0: CPU above 90 % for 5 minutes (now 97 %)
  81 % of it pg_restore (pid 4121, user postgres, unit backup.service), started 02:51
  https://vmwatch.example.com/vms/vm-0
db-1: CPU above 90 % no longer, held for 10 minutes
  81 % of it pg_restore (pid 4121, user postgres, unit backup.service), started 02:51
  ended by: stop by alice
  https://vmwatch.example.com/vms/vm-1"
    );
}

#[test]
fn subject_counts_alerts_and_names_their_group() {
    let subject = |states: &[AlertState]| content(states).subject();
    let (firing, resolved) = (AlertState::Firing, AlertState::Resolved);
    assert_eq!(
        subject(&[firing]),
        "[FIRING] db-0: CPU above 90 % for 5 minutes (now 97 %)"
    );
    assert_eq!(subject(&[firing, firing]), "[FIRING] 2 alerts: CPU high");
    assert_eq!(subject(&[resolved, resolved]), "[RESOLVED] 2 alerts: CPU high");
    assert_eq!(
        subject(&[firing, resolved]),
        "[FIRING] 1 alerts firing, 1 resolved: CPU high"
    );
}

#[test]
fn template_sees_the_parts_of_alerts() {
    let content = content(&[AlertState::Firing]);
    let text = "{{ channel }} {{ status }} {{ group.rule }}
{%- for alert in alerts %} {{ alert.vm }}|{{ alert.condition }}|{{ alert.value }}|{{ alert.duration }}|
{%- for culprit in alert.culprits %}{{ culprit }}{% endfor %}|{{ alert.labels.severity }}{% endfor %}";
    let rendered = template::render(Some(&template(text)), &content, &content.alerts);
    assert_eq!(rendered.problem, None);
    assert_eq!(
        rendered.text,
        "ops firing CPU high db-0|CPU above 90 %|97 %|5 minutes|81 % of it pg_restore (pid 4121, user postgres, \
         unit backup.service), started 02:51|critical"
    );
}

#[test]
fn failing_endless_and_empty_templates_fall_back_to_the_default_text() {
    let content = content(&[AlertState::Firing]);
    let default = template::render(None, &content, &content.alerts).text;
    for (text, problem) in [
        ("{{ alerts[0].nothing }}", "undefined"),
        (
            "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}",
            "fuel",
        ),
        ("{% if %}", "syntax error"),
        ("{# nothing #}", "empty text"),
    ] {
        let rendered = template::render(Some(&template(text)), &content, &content.alerts);
        assert_eq!(rendered.text, default, "{text}");
        let shown = rendered.problem.unwrap();
        assert!(shown.contains(problem), "{text}: {shown}");
    }
    assert!(template::check(&template("{% if %}")).is_err());
    assert!(template::check(&template("{{ alerts[0].vm }}")).is_ok());
}
