//! Refuses malformed messages and rows: removes the messages from the stream, counts them per VM, and keeps one per interval and VM as
//! a dead letter. The task that reads the stream never waits for the publication of a dead letter.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use async_nats::jetstream::{AckKind, Message};
use metrics::counter;
use tokio::{sync::mpsc, task::JoinHandle, time::Instant};
use tracing::warn;
use vmwatch_bus::Bus;

use super::{
    batch::acknowledge,
    dead_letter::{publish_copy, publish_then_remove},
};
use crate::documents::RefusedRows;

/// Minimum interval between two reports that a VM has more refused samples than dead letters.
const REPORT_INTERVAL: Duration = Duration::from_secs(10);
/// Maximum number of dead letters that wait to be published.
const QUEUE_LENGTH: usize = 64;
/// Maximum number of VMs that may have a dead letter within one interval.
const MAX_VMS: usize = 65_536;
/// Maximum number of VMs with their own metric label; all further VMs share the label `other`.
const MAX_NAMED: usize = 100;

/// Recent refusals of malformed messages, by VM.
#[derive(Debug)]
pub(super) struct Refusals {
    letters: mpsc::Sender<Letter>,
    /// Minimum interval between two dead letters of a VM, and between two log messages about it.
    interval: Duration,
    recent: HashMap<String, Recent>,
    /// When the table has this number of VMs, old entries are removed.
    sweep_at: usize,
    named: HashSet<String>,
}

/// The most recent dead letter of a VM.
#[derive(Debug)]
struct Recent {
    at: Instant,
    /// Number of messages of the VM that were refused without a dead letter since this dead letter.
    more: u64,
    /// When it was last reported that there are such messages.
    reported_at: Option<Instant>,
}

#[derive(Debug)]
struct Letter {
    message: Message,
    reason: String,
    /// Whether the message stays in the stream, because its other rows are still to be stored.
    keep: bool,
}

impl Refusals {
    /// Starts the task that publishes dead letters. The task ends when the returned `Refusals` is dropped and no dead
    /// letter waits any more.
    pub(super) fn start(bus: Bus, interval: Duration) -> (Self, JoinHandle<()>) {
        let (letters, mut waiting) = mpsc::channel::<Letter>(QUEUE_LENGTH);
        let publishing = tokio::spawn(async move {
            while let Some(letter) = waiting.recv().await {
                if letter.keep {
                    publish_copy(&bus, &letter.message, &letter.reason).await;
                } else {
                    publish_then_remove(&bus, &letter.message, &letter.reason).await;
                }
            }
        });
        let refusals = Self {
            letters,
            interval,
            recent: HashMap::new(),
            sweep_at: 1024,
            named: HashSet::new(),
        };
        (refusals, publishing)
    }

    /// Refuses a message: removes it from the stream, and publishes it as a dead letter unless its VM has had one
    /// recently. Returns whether it is to be reported that the VM has more refused messages than dead letters.
    pub(super) async fn refuse(&mut self, instance: &str, message: Message, reason: String) -> bool {
        counter!("vmwatch_samples_refused_total", "vm" => self.label(instance)).increment(1);
        let now = Instant::now();
        let Some(more) = self.due(instance, now) else {
            acknowledge(&message, AckKind::Term).await;
            return self.is_report_due(instance, now);
        };
        warn!(
            instance,
            reason, more, "sample refused; see `vmwatch-metrics dead-letters list`"
        );
        let letter = Letter {
            message,
            reason,
            keep: false,
        };
        if let Err(full) = self.letters.try_send(letter) {
            counter!("vmwatch_dead_letters_dropped_total").increment(1);
            acknowledge(&full.into_inner().message, AckKind::Term).await;
        }
        false
    }

    /// Counts refused rows of a message whose other rows will be stored, and publishes the message as a dead letter
    /// unless its VM has had one recently. Returns the same as [`Refusals::refuse`].
    pub(super) fn refuse_rows(&mut self, instance: &str, message: &Message, refused: &RefusedRows) -> bool {
        counter!("vmwatch_samples_refused_total", "vm" => self.label(instance)).increment(1);
        counter!("vmwatch_rows_refused_total").increment(refused.count);
        let now = Instant::now();
        let Some(more) = self.due(instance, now) else {
            return self.is_report_due(instance, now);
        };
        warn!(
            instance,
            rows = refused.count,
            reason = refused.reason,
            more,
            "rows of a sample refused; see `vmwatch-metrics dead-letters list`"
        );
        let letter = Letter {
            message: message.clone(),
            reason: refused.reason.clone(),
            keep: true,
        };
        if self.letters.try_send(letter).is_err() {
            counter!("vmwatch_dead_letters_dropped_total").increment(1);
        }
        false
    }

    fn is_report_due(&mut self, instance: &str, now: Instant) -> bool {
        let Some(recent) = self.recent.get_mut(instance) else {
            return false;
        };
        let is_due = recent.reported_at.is_none_or(|at| at + REPORT_INTERVAL <= now);
        if is_due {
            recent.reported_at = Some(now);
        }
        is_due
    }

    /// Returns `None` if no dead letter may be published, because this VM has had one within the last interval or because
    /// too many VMs have. Otherwise returns how many messages of the VM were refused without a dead letter since its
    /// last one.
    fn due(&mut self, instance: &str, now: Instant) -> Option<u64> {
        if let Some(recent) = self.recent.get_mut(instance) {
            if now < recent.at + self.interval {
                recent.more += 1;
                return None;
            }
            recent.at = now;
            return Some(std::mem::take(&mut recent.more));
        }
        if self.recent.len() >= self.sweep_at {
            let interval = self.interval;
            self.recent.retain(|_, recent| now < recent.at + interval);
            self.sweep_at = (2 * self.recent.len()).clamp(1024, MAX_VMS);
        }
        if self.recent.len() >= MAX_VMS {
            return None;
        }
        let recent = Recent {
            at: now,
            more: 0,
            reported_at: None,
        };
        self.recent.insert(instance.to_owned(), recent);
        Some(0)
    }

    /// Value of the VM label in metrics.
    fn label(&mut self, instance: &str) -> String {
        if self.named.contains(instance) {
            return instance.to_owned();
        }
        if self.named.len() >= MAX_NAMED {
            return "other".to_owned();
        }
        self.named.insert(instance.to_owned());
        instance.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_mins(1);

    fn refusals() -> Refusals {
        Refusals {
            letters: mpsc::channel(1).0,
            interval: INTERVAL,
            recent: HashMap::new(),
            sweep_at: 1024,
            named: HashSet::new(),
        }
    }

    #[tokio::test]
    async fn dead_letters_are_limited_to_one_per_interval_and_vm() {
        let (mut refusals, now) = (refusals(), Instant::now());
        assert_eq!(refusals.due("vm-1", now), Some(0));
        assert_eq!(refusals.due("vm-1", now + INTERVAL / 2), None);
        assert_eq!(refusals.due("vm-2", now + INTERVAL / 2), Some(0));
        assert_eq!(refusals.due("vm-1", now + INTERVAL), Some(1));
    }

    #[tokio::test]
    async fn refused_messages_without_dead_letter_are_reported_at_intervals() {
        let (mut refusals, now) = (refusals(), Instant::now());
        assert!(!refusals.is_report_due("vm-1", now), "nothing was refused");
        refusals.due("vm-1", now);
        assert!(refusals.is_report_due("vm-1", now));
        assert!(!refusals.is_report_due("vm-1", now + REPORT_INTERVAL / 2));
        assert!(refusals.is_report_due("vm-1", now + REPORT_INTERVAL));
    }

    #[tokio::test]
    async fn number_of_vms_with_dead_letters_is_bounded() {
        let (mut refusals, now) = (refusals(), Instant::now());
        for vm in 0..MAX_VMS {
            assert_eq!(refusals.due(&vm.to_string(), now), Some(0));
        }
        assert_eq!(refusals.due("one more", now), None);
        assert_eq!(refusals.due("one more", now + INTERVAL), Some(0));
        assert_eq!(refusals.recent.len(), 1);
        let labels: HashSet<_> = (0..1000).map(|vm| refusals.label(&vm.to_string())).collect();
        assert_eq!(labels.len(), MAX_NAMED + 1);
        assert_eq!(refusals.label("0"), "0");
    }
}
