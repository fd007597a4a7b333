//! Renders the text of messages with the channel's template, or with the default one. The template of a webhook can also make
//! its whole body.

use minijinja::{Environment, UndefinedBehavior, value::Serde};
use serde::Serialize;
use serde_json::{Map, Value};
use vmwatch_api::alerts::channels::{Purpose, Template};

use super::content::{AlertContent, Content};

const DEFAULT: &str = include_str!("default.txt");
const TEST: &str = "This is a test message from vmwatch. No alert is firing because of it.";
const HEARTBEAT: &str = "vmwatch evaluates alerts. If these messages stop, it does not.";
/// Maximum number of steps for rendering a template, and additional steps for each alert. They also limit the length of the text.
const FUEL: u64 = 20_000;
const FUEL_PER_ALERT: u64 = 2_000;

/// A text, and why it is not the one of the channel's template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Text {
    pub(super) text: String,
    pub(super) problem: Option<String>,
}

/// Renders the text of a message for some of its alerts. If the template fails, the default text is used.
pub(super) fn render(template: Option<&Template>, content: &Content, alerts: &[AlertContent]) -> Text {
    let usual = usual(content, alerts);
    let is_of_alerts = matches!(content.message.purpose, Purpose::Change | Purpose::Repeat);
    let rendered = template
        .filter(|_| is_of_alerts)
        .map(|template| evaluate(template.as_str(), content, alerts, &usual));
    match rendered {
        Some(Ok(text)) => Text { text, problem: None },
        Some(Err(problem)) => Text {
            text: usual,
            problem: Some(problem),
        },
        None => Text {
            text: usual,
            problem: None,
        },
    }
}

/// The body of a webhook, if the template is that of a JSON object: it begins with a brace that begins no expression, statement
/// or comment. The error is a text for users.
pub(super) fn body(template: &Template, content: &Content) -> Option<Result<String, String>> {
    let template = template.as_str();
    let rest = template.trim_start().strip_prefix('{')?;
    if rest.starts_with(['{', '%', '#']) {
        return None;
    }
    let usual = usual(content, &content.alerts);
    let rendered = evaluate(template, content, &content.alerts, &usual);
    Some(rendered.and_then(|body| {
        let parsed = serde_json::from_str::<Map<String, Value>>(&body);
        parsed
            .map(|_| body)
            .map_err(|error| format!("the template renders no JSON object: {error}"))
    }))
}

/// The text of a message without a template.
fn usual(content: &Content, alerts: &[AlertContent]) -> String {
    match content.message.purpose {
        Purpose::Test => TEST.to_owned(),
        Purpose::Heartbeat => HEARTBEAT.to_owned(),
        Purpose::Change | Purpose::Repeat => default(content, alerts),
    }
}

/// Checks a template with an alert that has all fields. The error is a text for users.
pub(crate) fn check(template: &Template) -> Result<(), String> {
    let environment = Environment::new();
    let parsed = environment.template_from_named_str("template", template.as_str());
    parsed.map(drop).map_err(|error| describe(&error))
}

fn default(content: &Content, alerts: &[AlertContent]) -> String {
    // A test renders the default template with and without each field, so only a defect could make this fail.
    evaluate(DEFAULT, content, alerts, "").unwrap_or_else(|_| {
        let lines: Vec<_> = alerts.iter().map(|alert| alert.summary.as_str()).collect();
        lines.join("\n")
    })
}

/// Renders a template. `usual` is the text without it.
fn evaluate(
    template: &str,
    content: &Content,
    alerts: &[AlertContent],
    usual: &str,
) -> Result<String, String> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    let count = u64::try_from(alerts.len()).unwrap_or(u64::MAX);
    environment.set_fuel(Some(FUEL.saturating_add(FUEL_PER_ALERT.saturating_mul(count))));
    environment.set_recursion_limit(50);
    let seen = Context {
        status: content.status(),
        purpose: content.message.purpose,
        channel: &content.channel,
        group: &content.message.group,
        link: &content.public_url,
        title: content.subject(),
        text: usual,
        alerts,
    };
    let parsed = environment
        .template_from_named_str("template", template)
        .map_err(|error| describe(&error))?;
    let text = parsed.render(Serde(&seen)).map_err(|error| describe(&error))?;
    if text.trim().is_empty() {
        return Err("the template renders an empty text".to_owned());
    }
    Ok(text.trim_end().to_owned())
}

/// What templates see.
#[derive(Serialize)]
struct Context<'a> {
    status: &'static str,
    purpose: Purpose,
    channel: &'a str,
    group: &'a std::collections::BTreeMap<String, String>,
    link: &'a str,
    /// One line that describes the message.
    title: String,
    /// The text without the template.
    text: &'a str,
    alerts: &'a [AlertContent],
}

fn describe(error: &minijinja::Error) -> String {
    let line = error
        .line()
        .map_or(String::new(), |line| format!(" in line {line}"));
    let detail = error
        .detail()
        .map_or(String::new(), |detail| format!(": {detail}"));
    format!("the template fails{line}: {}{detail}", error.kind())
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use vmwatch_api::alerts::channels::Message;

    use super::*;

    fn message(purpose: &str) -> Content {
        let message: Message = serde_json::from_value(json!({
            "id": "a".repeat(32), "channel_id": "b".repeat(32), "purpose": purpose, "alerts": [], "created_ms": 1,
        }))
        .unwrap();
        Content {
            message,
            channel: "chat".to_owned(),
            alerts: Vec::new(),
            now_ms: 1,
            public_url: "https://vmwatch.example.com".to_owned(),
        }
    }

    fn template(text: &str) -> Template {
        serde_json::from_value(json!(text)).unwrap()
    }

    /// The templates for chat services in docs/alerts.md.
    #[test]
    fn documented_templates_make_the_bodies_of_chat_services() {
        let documented: Vec<_> = include_str!("../../../docs/alerts.md")
            .split("\n\n")
            .filter(|paragraph| paragraph.starts_with("    {\"") && paragraph.contains("tojson"))
            .collect();
        let texts = [
            ("/text", "slack"),
            ("/attachments/0/content/body/0/text", "teams"),
            ("/message", "ntfy"),
            ("/text/content", "dingtalk"),
            ("/text/content", "wecom"),
            ("/content/text", "feishu"),
        ];
        assert_eq!(documented.len(), texts.len(), "{documented:?}");
        for (text, (pointer, service)) in documented.into_iter().zip(texts) {
            let with = |text: &str| {
                let body = super::body(&template(text), &message("test")).unwrap().unwrap();
                let body: Value = serde_json::from_str(&body).unwrap();
                body.pointer(pointer).unwrap().as_str().unwrap().to_owned()
            };
            assert!(with(text).contains("This is a test message"), "{service}");
            // A text with what services interpret.
            let special = text.replace("text |", "\"<!here> & \\\"x\\\"\\ny\" |");
            let expected = match service {
                "slack" => "&lt;!here&gt; &amp; \"x\"\ny",
                "teams" => "<!here> & \"x\"\n\ny",
                "ntfy" | "feishu" => "<!here> & \"x\"\ny",
                _ => continue,
            };
            assert_eq!(with(&special), expected, "{service}");
        }
    }

    #[test]
    fn json_templates_quote_texts_and_report_what_is_no_json() {
        let quoted = template(r#" {"text": {{ (title ~ "\"\n") | tojson }}}"#);
        let body = super::body(&quoted, &message("heartbeat")).unwrap().unwrap();
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(body, json!({ "text": "[HEARTBEAT] vmwatch works\"\n" }));
        let unquoted = template(r#"{"text": {{ text }}}"#);
        let problem = super::body(&unquoted, &message("test")).unwrap().unwrap_err();
        assert!(problem.contains("no JSON object"), "{problem}");
        for text in ["{{ text }}", "{% for alert in alerts %}{% endfor %}x", "plain"] {
            assert_eq!(super::body(&template(text), &message("test")), None, "{text}");
        }
    }
}
