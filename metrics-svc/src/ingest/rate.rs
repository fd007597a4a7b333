//! Limits the rate at which samples of each VM are stored. A message above its VM's rate is not lost: it returns to the
//! stream with a delay. If this fills the VM's share of the stream, the NATS server refuses further messages of the VM,
//! and the agent keeps them in its spool. Messages of other VMs are not affected.
//!
//! Each VM has token buckets for messages, for bytes, for rows and for the five-minute rollups that its rows change. A
//! returned message is scheduled after the messages returned before it, for about the time at which its tokens will be
//! available. It is therefore delivered only twice: before and after its return.
//!
//! The limits apply per replica: several replicas together accept several times as much.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use tokio::time::Instant;
use tracing::warn;
use vmwatch_api::agents::VmLimit;

use crate::config::RateSettings;

/// Capacity of a token bucket, as the time in which it fills.
const BURST: Duration = Duration::from_secs(10);
/// Messages that metrics-svc returns to NATS for later delivery are all due at multiples of this time: whenever
/// messages become due, NATS scans all unacknowledged messages, so fewer distinct times mean fewer scans.
const RETURN_GRID: Duration = Duration::from_millis(250);
/// A returned message is accepted up to this long before its tokens are available, because timers are inexact and each
/// replica has its own token buckets.
const EARLY: Duration = Duration::from_secs(1);
/// Maximum number of VMs with an entry. Only VMs above or near their rate need an entry; the token buckets of all
/// others are full.
const MAX_VMS: usize = 65_536;
/// Maximum number of messages whose returns are counted; beyond it, the oldest messages are forgotten. With the default
/// settings, the consumer never has this many unacknowledged messages.
const MAX_RETURNED: usize = 100_000;
/// Minimum interval between log messages about one VM above its rate.
const LOG_INTERVAL: Duration = Duration::from_mins(1);
/// Minimum interval between two reports that a VM is above one of its rates.
const REPORT_INTERVAL: Duration = Duration::from_secs(10);
/// The limits of the four rates.
const LIMITS: [VmLimit; 4] = [VmLimit::Messages, VmLimit::Bytes, VmLimit::Rows, VmLimit::Buckets];

/// What a message takes from the token buckets of its VM.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Cost {
    pub(super) bytes: usize,
    pub(super) rows: usize,
    /// Start of the five-minute time bucket of the message's rows.
    pub(super) five_minutes: Option<u64>,
}

/// Identifies a delivery of a message.
#[derive(Debug, Clone, Copy)]
pub(super) struct Delivery {
    pub(super) stream_sequence: u64,
    /// How often JetStream has delivered this message, including this delivery.
    pub(super) delivered: i64,
}

impl Delivery {
    /// Delivery of a message that has no delivery information.
    pub(super) const UNKNOWN: Self = Self {
        stream_sequence: 0,
        delivered: 1,
    };
}

/// Whether a message is accepted now or returned to the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Decision {
    /// Accept the message. `returns` is how often this replica has returned the message; those deliveries must not
    /// count as failed attempts.
    Take { returns: i64 },
    /// Return the message to the stream, to be redelivered after this delay. `report` is the limit that the VM is above, if
    /// that is to be reported.
    Return {
        delay: Duration,
        report: Option<VmLimit>,
    },
}

/// Token buckets of all VMs.
#[derive(Debug)]
pub(super) struct Rates {
    /// Rates per second: messages, bytes, rows, five-minute rollups.
    per_second: [f64; 4],
    /// Point in time from which all times in [`Vm`] are counted.
    start: Instant,
    vms: HashMap<String, Vm>,
    /// When the table has this number of VMs, the entries of idle VMs are removed.
    sweep_at: usize,
    returned: BTreeMap<u64, i64>,
}

/// Token buckets of a VM. All times are relative to [`Rates::start`].
#[derive(Debug, Default)]
struct Vm {
    /// For each of the four rates, the time at which the rate will have produced the tokens for all messages accepted
    /// so far. A message is accepted if this time is at most one burst ([`BURST`]) in the future.
    paid_at: [Duration; 4],
    /// Earliest time at which the next returned message may be redelivered, so that it follows all messages returned
    /// before it.
    next_return: Duration,
    five_minutes: Option<u64>,
    logged_at: Option<Duration>,
    /// When it was last reported that the VM is above each rate.
    reported_at: [Option<Duration>; 4],
}

impl Vm {
    /// The limit that delays the VM's messages most, unless that was reported recently.
    fn report(&mut self, now: Duration) -> Option<VmLimit> {
        let rates = self.paid_at.iter().zip(&mut self.reported_at).zip(LIMITS);
        let ((_, reported_at), limit) = rates.max_by_key(|((paid_at, _), _)| **paid_at)?;
        let is_due = reported_at.is_none_or(|reported_at| reported_at + REPORT_INTERVAL <= now);
        is_due.then(|| {
            *reported_at = Some(now);
            limit
        })
    }
}

impl Rates {
    pub(super) fn new(settings: RateSettings) -> Self {
        Self {
            per_second: [
                settings.messages,
                settings.bytes,
                settings.rows,
                settings.five_minutes,
            ],
            start: Instant::now(),
            vms: HashMap::new(),
            sweep_at: 1024,
            returned: BTreeMap::new(),
        }
    }

    /// Decides whether a message of this VM is accepted now.
    pub(super) fn decide(&mut self, instance: &str, cost: Cost, delivery: Delivery) -> Decision {
        let now = self.start.elapsed();
        let returns = self.returned.get(&delivery.stream_sequence).copied().unwrap_or(0);
        if !self.vms.contains_key(instance) {
            self.sweep(now);
            if self.vms.len() >= MAX_VMS {
                return Decision::Take { returns };
            }
        }
        let vm = self.vms.entry(instance.to_owned()).or_default();
        let prices = prices(self.per_second, cost, vm.five_minutes);
        let free_at = vm
            .paid_at
            .iter()
            .max()
            .copied()
            .unwrap_or_default()
            .saturating_sub(BURST);
        let (waits, comes_back) = (vm.next_return > now, delivery.delivered > 1);
        let is_free = if comes_back {
            free_at <= now + EARLY
        } else {
            // A new message is not accepted while returned messages wait, because they take precedence.
            free_at <= now && !waits
        };
        if is_free {
            for (paid_at, price) in vm.paid_at.iter_mut().zip(prices) {
                *paid_at = now.max(*paid_at) + price;
            }
            vm.five_minutes = cost.five_minutes.or(vm.five_minutes);
            self.returned.remove(&delivery.stream_sequence);
            return Decision::Take { returns };
        }
        let at = vm.next_return.max(free_at).max(now);
        vm.next_return = at + prices.into_iter().max().unwrap_or_default();
        if vm
            .logged_at
            .is_none_or(|logged_at| logged_at + LOG_INTERVAL <= now)
        {
            vm.logged_at = Some(now);
            warn!(instance, wait = ?at.saturating_sub(now), "VM sends samples faster than allowed; further samples wait in the stream");
        }
        let report = vm.report(now);
        self.returned.insert(delivery.stream_sequence, returns + 1);
        while self.returned.len() > MAX_RETURNED {
            self.returned.pop_first();
        }
        Decision::Return {
            delay: on_grid(at).saturating_sub(now),
            report,
        }
    }

    /// Occasionally removes the entries of VMs whose token buckets are full again.
    fn sweep(&mut self, now: Duration) {
        if self.vms.len() < self.sweep_at {
            return;
        }
        self.vms.retain(|_, vm| {
            let busy = vm.paid_at.iter().any(|&paid_at| paid_at > now);
            let logged = vm
                .logged_at
                .is_some_and(|logged_at| logged_at + LOG_INTERVAL > now);
            busy || logged || vm.next_return > now
        });
        self.sweep_at = (2 * self.vms.len()).clamp(1024, MAX_VMS);
    }
}

/// For each rate, the time in which it produces the tokens that a message costs.
fn prices(per_second: [f64; 4], cost: Cost, last: Option<u64>) -> [Duration; 4] {
    let touched = cost.five_minutes.is_some_and(|start| Some(start) != last);
    let amounts = [1, cost.bytes, cost.rows, usize::from(touched)];
    let mut prices = [Duration::ZERO; 4];
    for ((price, amount), rate) in prices.iter_mut().zip(amounts).zip(per_second) {
        // The amounts of one message are small and the rates are at least 1, so the quotient fits a duration.
        let amount = u32::try_from(amount).unwrap_or(u32::MAX);
        *price = Duration::try_from_secs_f64(f64::from(amount) / rate).unwrap_or(BURST);
    }
    prices
}

fn on_grid(at: Duration) -> Duration {
    let grid = RETURN_GRID.as_millis().max(1);
    let steps = at.as_millis() / grid + 1;
    Duration::from_millis(u64::try_from(steps * grid).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    const ROWS_PER_SECOND: f64 = 100.0;

    fn rates() -> Rates {
        Rates::new(RateSettings {
            messages: 10.0,
            bytes: 1e9,
            rows: ROWS_PER_SECOND,
            five_minutes: 5.0,
            dead_letter_interval: Duration::from_mins(1),
        })
    }

    fn first(stream_sequence: u64) -> Delivery {
        Delivery {
            stream_sequence,
            delivered: 1,
        }
    }

    fn small() -> Cost {
        Cost {
            bytes: 100,
            rows: 1,
            five_minutes: Some(0),
        }
    }

    /// Delivers messages as JetStream does until all are accepted: a returned message is delivered again after its
    /// delay. Returns the number of deliveries of each message, and the total time.
    async fn deliver(rates: &mut Rates, instance: &str, costs: &[Cost]) -> (Vec<i64>, Duration) {
        let start = Instant::now();
        let mut waiting: BTreeMap<(Instant, u64), i64> = BTreeMap::new();
        for sequence in 0..costs.len() as u64 {
            waiting.insert((start, sequence), 0);
        }
        let mut deliveries = vec![0; costs.len()];
        while let Some(((at, sequence), before)) = waiting.pop_first() {
            advance(at.saturating_duration_since(Instant::now())).await;
            let delivered = before + 1;
            let delivery = Delivery {
                stream_sequence: sequence,
                delivered,
            };
            let index = usize::try_from(sequence).unwrap();
            match rates.decide(instance, costs[index], delivery) {
                Decision::Take { returns } => {
                    assert_eq!(
                        returns, before,
                        "every earlier delivery must have been returned because of the rate"
                    );
                    deliveries[index] = delivered;
                }
                Decision::Return { delay, .. } => {
                    waiting.insert((Instant::now() + delay, sequence), delivered);
                }
            }
        }
        (deliveries, start.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn messages_above_vm_rate_are_delivered_at_most_twice() {
        let mut rates = rates();
        let (deliveries, took) = deliver(&mut rates, "vm-1", &vec![small(); 600]).await;
        // A burst of ten seconds is accepted at once; the remaining 500 messages are accepted at ten per second.
        assert!(deliveries.iter().filter(|&&times| times == 1).count() >= 100);
        assert!(deliveries.iter().all(|&times| times <= 2), "{deliveries:?}");
        assert!(
            (Duration::from_secs(49)..Duration::from_secs(52)).contains(&took),
            "{took:?}"
        );
        assert!(rates.returned.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn rows_count_towards_vm_rate_but_message_larger_than_burst_is_accepted() {
        let mut rates = rates();
        let large = Cost {
            rows: 2000,
            ..small()
        };
        let (deliveries, took) = deliver(&mut rates, "vm-1", &[large; 4]).await;
        assert!(deliveries.iter().all(|&times| times <= 2), "{deliveries:?}");
        // The row tokens for one message take 20 s to produce. The first message is accepted at once, each further
        // message when the VM owes the tokens of at most one burst.
        assert!(
            (Duration::from_secs(49)..Duration::from_secs(53)).contains(&took),
            "{took:?}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn changed_five_minute_rollups_count_towards_vm_rate() {
        let mut rates = Rates::new(RateSettings {
            messages: 1e6,
            bytes: 1e9,
            rows: 1e6,
            five_minutes: 5.0,
            dead_letter_interval: Duration::from_mins(1),
        });
        let costs: Vec<_> = (0..300)
            .map(|number| Cost {
                five_minutes: Some(number),
                ..small()
            })
            .collect();
        let (_, took) = deliver(&mut rates, "vm-1", &costs).await;
        assert!(
            (Duration::from_secs(49)..Duration::from_secs(52)).contains(&took),
            "{took:?}"
        );
        let (_, took) = deliver(&mut rates, "vm-2", &vec![small(); 300]).await;
        assert_eq!(took, Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn vm_above_its_rate_does_not_delay_other_vms() {
        let mut rates = rates();
        for sequence in 0..300 {
            rates.decide("vm-1", small(), first(sequence));
        }
        assert_eq!(
            rates.decide("vm-2", small(), first(300)),
            Decision::Take { returns: 0 }
        );
        let Decision::Return { delay, .. } = rates.decide("vm-1", small(), first(301)) else {
            panic!("a message above the VM's rate was accepted");
        };
        assert!(
            (Duration::from_secs(19)..Duration::from_secs(22)).contains(&delay),
            "{delay:?}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn limit_that_vm_is_above_is_reported_at_intervals() {
        let many_rows = Cost {
            rows: 1000,
            ..small()
        };
        for (cost, limit) in [(small(), VmLimit::Messages), (many_rows, VmLimit::Rows)] {
            let mut rates = rates();
            let mut report = |sequence| match rates.decide("vm-1", cost, first(sequence)) {
                Decision::Take { .. } => None,
                Decision::Return { report, .. } => report,
            };
            let reports = (0..300).filter_map(&mut report).collect::<Vec<_>>();
            assert_eq!(reports, [limit]);
            advance(REPORT_INTERVAL.saturating_sub(Duration::from_millis(1))).await;
            assert_eq!(report(300), None);
            advance(Duration::from_millis(1)).await;
            assert_eq!(report(301), Some(limit));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn rate_limiter_forgets_idle_vms() {
        let mut rates = rates();
        for vm in 0..1024 {
            rates.decide(&format!("vm-{vm}"), small(), first(vm));
        }
        advance(Duration::from_secs(2)).await;
        rates.decide("another", small(), first(2000));
        assert_eq!(rates.vms.len(), 1);
    }
}
