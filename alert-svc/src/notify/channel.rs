//! The task of one channel, which sends its messages one after the other. A receiver that hangs or fails delays only its own
//! channel.

use std::{sync::Arc, time::Duration};

use metrics::counter;
use tokio::{
    sync::Notify,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::warn;
use vmwatch_api::{
    alerts::{
        RecordId,
        channels::{Attempt, ChannelTarget, MAX_ANSWER},
    },
    time::unix_millis,
};
use zeroize::Zeroizing;

use super::{
    Context, backoff,
    content::{self, Content, View},
    outbox::millis,
    send::{LIMIT, SendError, alertmanager, email, webhook},
    states::State,
    template,
};
use crate::{
    AlertError,
    store::{StoredChannel, StoredMessage},
};

/// Time for which a stopping task lets an attempt in progress continue.
const GRACE: Duration = Duration::from_secs(5);
/// Pause after the database failed.
const STORE_PAUSE: Duration = Duration::from_secs(2);

/// Sends the messages of a channel.
pub(super) struct ChannelTask {
    pub(super) context: Context,
    pub(super) id: RecordId,
    pub(super) channel: StoredChannel,
    /// Notified when a message of the channel is due.
    pub(super) wake: Arc<Notify>,
    pub(super) stop: CancellationToken,
}

/// What came of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// No message is due.
    Idle,
    Delivered,
    Failed,
}

impl ChannelTask {
    /// Sends messages until the task is stopped.
    pub(super) async fn run(self) {
        let mut state = State::new(&self.context.store, &self.channel.id);
        let secret = match self.secret() {
            Ok(secret) => secret,
            Err(problem) => {
                // A changed channel gets a new task.
                state.set_unsent(problem).await;
                return self.stop.cancelled().await;
            }
        };
        let mut failures = 0_u64;
        while !self.stop.is_cancelled() {
            let attempt = self.attempt(
                secret.as_ref().map(|secret| secret.as_str()),
                &mut state,
                failures,
            );
            let Some(outcome) = self.finished(attempt).await else {
                return;
            };
            match outcome {
                Ok(Outcome::Idle) => {
                    self.stop.run_until_cancelled(self.wake.notified()).await;
                }
                Ok(Outcome::Delivered) => failures = 0,
                Ok(Outcome::Failed) => {
                    failures = failures.saturating_add(1);
                    self.stop
                        .run_until_cancelled(sleep(backoff::pause(failures)))
                        .await;
                }
                Err(error) => {
                    counter!("vmwatch_alert_outbox_failed_total").increment(1);
                    warn!(%error, channel = self.channel.id, "the messages of a channel could not be read or written; retrying");
                    self.stop.run_until_cancelled(sleep(STORE_PAUSE)).await;
                }
            }
        }
    }

    /// Opens the channel's secret. The error is a text for administrators.
    fn secret(&self) -> Result<Option<Zeroizing<String>>, String> {
        let Some(sealed) = &self.channel.secret else {
            return Ok(None);
        };
        let opened = self
            .context
            .delivery
            .keys
            .open(&self.id, &self.channel.spec.target, sealed);
        opened.map(Some).map_err(|error| error.to_string())
    }

    /// Waits for an attempt; if the task is stopped, only for a short time.
    async fn finished<T>(&self, attempt: impl Future<Output = T>) -> Option<T> {
        tokio::pin!(attempt);
        if let Some(done) = self.stop.run_until_cancelled(&mut attempt).await {
            return Some(done);
        }
        timeout(GRACE, attempt).await.ok()
    }

    /// Sends the next message that is due.
    async fn attempt(
        &self,
        secret: Option<&str>,
        state: &mut State,
        failures: u64,
    ) -> Result<Outcome, AlertError> {
        let outbox = &self.context.outbox;
        let Some(claimed) = outbox.claim(&self.id, unix_millis()).await? else {
            return Ok(Outcome::Idle);
        };
        let content = self.content(&claimed).await?;
        let at_ms = unix_millis();
        let begun = Instant::now();
        let text_problem = self.template_problem(&content);
        let sent = if content.is_void() {
            Ok("nothing was sent, because the alerts of the message no longer exist".to_owned())
        } else {
            let sending = timeout(LIMIT, self.send(&content, secret));
            sending.await.unwrap_or(Err(SendError::Timeout))
        };
        let outcome = if sent.is_ok() { "delivered" } else { "failed" };
        let kind = self.channel.spec.target.kind();
        counter!("vmwatch_alert_attempts_total", "kind" => kind, "outcome" => outcome).increment(1);
        let mut attempt = Attempt {
            at_ms,
            took_ms: millis(begun.elapsed()),
            delivered: sent.is_ok(),
            answer: match &sent {
                Ok(answer) => answer.clone(),
                Err(error) => error.to_string(),
            },
        };
        truncate(&mut attempt.answer);
        let now_ms = unix_millis();
        if attempt.delivered {
            outbox.delivered(&claimed, &attempt, now_ms).await?;
            outbox.release(&self.id, failures > 0, now_ms).await?;
            state.set(None, text_problem).await;
            return Ok(Outcome::Delivered);
        }
        let pause = backoff::pause(claimed.message.tries);
        outbox
            .failed(&claimed, &attempt, now_ms.saturating_add(millis(pause)))
            .await?;
        state.set(Some(attempt.answer), text_problem).await;
        Ok(Outcome::Failed)
    }

    async fn content(&self, message: &StoredMessage) -> Result<Content, AlertError> {
        let view = View {
            now_ms: unix_millis(),
            utc_offset: self.context.delivery.utc_offset,
            public_url: &self.context.delivery.public_url,
        };
        let name = self.channel.spec.name.as_str();
        content::read(&self.context.store, &message.message, name, view).await
    }

    fn template_problem(&self, content: &Content) -> Option<String> {
        let spec = &self.channel.spec;
        let template = spec.template.as_ref();
        let is_webhook = matches!(spec.target, ChannelTarget::Webhook { .. });
        match template
            .filter(|_| is_webhook)
            .and_then(|template| template::body(template, content))
        {
            Some(body) => body.err(),
            None => template::render(template, content, &content.alerts).problem,
        }
    }

    async fn send(&self, content: &Content, secret: Option<&str>) -> Result<String, SendError> {
        let sender = &self.context.delivery.sender;
        let spec = &self.channel.spec;
        let template = spec.template.as_ref();
        match &spec.target {
            ChannelTarget::Webhook { url } => webhook::send(sender, url, secret, content, template).await,
            ChannelTarget::Alertmanager { url } => {
                let heartbeat = spec
                    .heartbeat_seconds
                    .map(|seconds| Duration::from_secs(seconds.into()));
                alertmanager::send(sender, url, secret, content, template, heartbeat).await
            }
            ChannelTarget::Email {
                server,
                tls,
                from,
                to,
                user,
            } => {
                let text = template::render(template, content, &content.alerts).text;
                let mail = email::Mail {
                    server,
                    tls: *tls,
                    from,
                    to,
                    user: user.as_deref(),
                    password: secret,
                };
                email::send(sender, mail, content, text).await
            }
        }
    }
}

/// Cuts an answer to the length that is kept.
fn truncate(answer: &mut String) {
    while answer.len() > MAX_ANSWER {
        answer.pop();
    }
}
