//! Malformed messages: taken out of the stream and counted for their VM, and one per minute and VM kept as a dead letter.
//! The loop that reads the stream never waits for a dead letter.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use async_nats::jetstream::{AckKind, Context, Message};
use metrics::counter;
use tokio::{sync::mpsc, task::JoinHandle, time::Instant};
use tracing::warn;

use super::{batch::acknowledge, dead_letter::keep};

/// Between two dead letters of a VM, and between two lines in the log.
const EVERY: Duration = Duration::from_mins(1);
/// Dead letters that wait to be published.
const WAITING: usize = 64;
/// VMs with a dead letter in the last minute.
const MOST_VMS: usize = 65_536;
/// VMs that have a metric of their own; all others share one.
const MOST_NAMED: usize = 100;

/// What has been refused lately.
#[derive(Debug)]
pub(super) struct Refusals {
    letters: mpsc::Sender<Letter>,
    lately: HashMap<String, Lately>,
    /// How many entries there may be before old ones are dropped.
    sweep_at: usize,
    named: HashSet<String>,
}

/// The last dead letter of a VM.
#[derive(Debug)]
struct Lately {
    at: Instant,
    /// Refused since, without a dead letter.
    more: u64,
}

#[derive(Debug)]
struct Letter {
    message: Message,
    reason: String,
}

impl Refusals {
    /// Starts the task that publishes dead letters; it ends when the value is dropped and all are published or given up.
    pub(super) fn start(jetstream: Context) -> (Self, JoinHandle<()>) {
        let (letters, mut waiting) = mpsc::channel::<Letter>(WAITING);
        let publishing = tokio::spawn(async move {
            while let Some(Letter { message, reason }) = waiting.recv().await {
                keep(&jetstream, &message, &reason).await;
            }
        });
        let refusals = Self {
            letters,
            lately: HashMap::new(),
            sweep_at: 1024,
            named: HashSet::new(),
        };
        (refusals, publishing)
    }

    /// Takes a message out of the stream.
    pub(super) async fn refuse(&mut self, instance: &str, message: Message, reason: String) {
        counter!("vmwatch_samples_refused_total", "vm" => self.label(instance)).increment(1);
        let Some(more) = self.due(instance, Instant::now()) else {
            acknowledge(&message, AckKind::Term).await;
            return;
        };
        warn!(
            instance,
            reason, more, "a sample was refused; see `vmwatch-metrics dead-letters list`"
        );
        if let Err(full) = self.letters.try_send(Letter { message, reason }) {
            counter!("vmwatch_dead_letters_dropped_total").increment(1);
            acknowledge(&full.into_inner().message, AckKind::Term).await;
        }
    }

    /// Whether this VM may have a dead letter now, and how many of its messages had none since the last.
    fn due(&mut self, instance: &str, now: Instant) -> Option<u64> {
        if let Some(lately) = self.lately.get_mut(instance) {
            if now < lately.at + EVERY {
                lately.more += 1;
                return None;
            }
            lately.at = now;
            return Some(std::mem::take(&mut lately.more));
        }
        if self.lately.len() >= self.sweep_at {
            self.lately.retain(|_, lately| now < lately.at + EVERY);
            self.sweep_at = (2 * self.lately.len()).clamp(1024, MOST_VMS);
        }
        if self.lately.len() >= MOST_VMS {
            return None;
        }
        self.lately
            .insert(instance.to_owned(), Lately { at: now, more: 0 });
        Some(0)
    }

    /// The VM's name in the metrics.
    fn label(&mut self, instance: &str) -> String {
        if self.named.contains(instance) {
            return instance.to_owned();
        }
        if self.named.len() >= MOST_NAMED {
            return "other".to_owned();
        }
        self.named.insert(instance.to_owned());
        instance.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusals() -> Refusals {
        Refusals {
            letters: mpsc::channel(1).0,
            lately: HashMap::new(),
            sweep_at: 1024,
            named: HashSet::new(),
        }
    }

    #[tokio::test]
    async fn a_vm_has_one_dead_letter_per_minute() {
        let (mut refusals, now) = (refusals(), Instant::now());
        assert_eq!(refusals.due("vm-1", now), Some(0));
        assert_eq!(refusals.due("vm-1", now + EVERY / 2), None);
        assert_eq!(refusals.due("vm-2", now + EVERY / 2), Some(0));
        assert_eq!(refusals.due("vm-1", now + EVERY), Some(1));
    }

    #[tokio::test]
    async fn the_tables_are_bounded() {
        let (mut refusals, now) = (refusals(), Instant::now());
        for vm in 0..MOST_VMS {
            assert_eq!(refusals.due(&vm.to_string(), now), Some(0));
        }
        assert_eq!(refusals.due("one more", now), None);
        assert_eq!(refusals.due("one more", now + EVERY), Some(0));
        assert_eq!(refusals.lately.len(), 1);
        let labels: HashSet<_> = (0..1000).map(|vm| refusals.label(&vm.to_string())).collect();
        assert_eq!(labels.len(), MOST_NAMED + 1);
        assert_eq!(refusals.label("0"), "0");
    }
}
