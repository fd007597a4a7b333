//! Decides when to take samples: at fixed intervals, starting at a random time. Missed ticks are counted but never made
//! up.

use std::time::Duration;

use tokio::time::Instant;
use vmwatch_service::jitter::jittered;

use crate::config::Intervals;

/// Computes the ticks. Each tick is a time at which the VM is sampled, alone or together with its processes.
#[derive(Debug)]
pub(crate) struct Schedule {
    intervals: Intervals,
    next: Instant,
    /// Number of ticks before the next one that includes the processes; 0 if the next tick includes them.
    until_processes: u64,
}

/// What has to be sampled when the sampling loop wakes up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tick {
    /// Number of ticks missed since the sampling loop last woke up.
    pub(crate) missed: u64,
    /// Whether the processes have to be sampled as well.
    pub(crate) processes: bool,
}

impl Schedule {
    /// Starts a schedule. The first tick is 0.5 to 1.5 intervals from now, so agents started together do not take
    /// samples at the same time. The first tick includes the processes, so users see them soon after a VM starts.
    pub(crate) fn start(intervals: Intervals) -> Self {
        Self {
            next: Instant::now() + jittered(intervals.vm.mul_f64(1.5), 1.0 / 3.0),
            until_processes: 0,
            intervals,
        }
    }

    pub(crate) const fn next(&self) -> Instant {
        self.next
    }

    /// Returns what has to be sampled now, and advances to the next tick. `now` must not be before [`Schedule::next`].
    pub(crate) fn wake(&mut self, now: Instant) -> Tick {
        let late = now.saturating_duration_since(self.next).as_nanos();
        let missed = u64::try_from(late / self.intervals.vm.as_nanos()).unwrap_or(u64::MAX);
        let passed = missed.saturating_add(1);
        self.next += multiply(self.intervals.vm, passed);
        let processes = self.until_processes <= missed;
        let round = u64::from(self.intervals.vm_per_process);
        self.until_processes = if processes {
            // Missed ticks do not change which later ticks include the processes.
            round - 1 - (missed - self.until_processes) % round
        } else {
            self.until_processes - passed
        };
        Tick { missed, processes }
    }
}

fn multiply(interval: Duration, times: u64) -> Duration {
    let nanos = interval.as_nanos().saturating_mul(u128::from(times));
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    const VM: Duration = Duration::from_secs(10);

    fn schedule() -> Schedule {
        Schedule::start(Intervals {
            vm: VM,
            vm_per_process: 3,
        })
    }

    fn wake_on_time(schedule: &mut Schedule) -> bool {
        let tick = schedule.wake(schedule.next() + Duration::from_millis(3));
        assert_eq!(tick.missed, 0);
        tick.processes
    }

    #[tokio::test(start_paused = true)]
    async fn sampling_starts_at_random_time_and_keeps_its_interval() {
        let now = Instant::now();
        let starts: Vec<_> = (0..50).map(|_| schedule().next() - now).collect();
        assert!(starts.iter().all(|start| (VM / 2..=VM * 3 / 2).contains(start)));
        assert!(starts.iter().any(|start| *start != starts[0]));

        let mut schedule = schedule();
        let first = schedule.next();
        let process_ticks: Vec<_> = (0..7).map(|_| wake_on_time(&mut schedule)).collect();
        assert_eq!(process_ticks, [true, false, false, true, false, false, true]);
        assert_eq!(schedule.next(), first + VM * 7);
    }

    #[tokio::test(start_paused = true)]
    async fn missed_sampling_ticks_are_counted_and_keep_the_process_interval() {
        let mut schedule = schedule();
        let first = schedule.next();
        assert!(wake_on_time(&mut schedule));
        // Ticks 1 to 3 are missed. Tick 3 should have included the processes, so tick 4 includes them instead.
        let tick = schedule.wake(first + VM * 4 + Duration::from_secs(1));
        assert_eq!(
            tick,
            Tick {
                missed: 3,
                processes: true
            }
        );
        assert_eq!(schedule.next(), first + VM * 5);
        assert!(!wake_on_time(&mut schedule));
        assert!(wake_on_time(&mut schedule));
        assert_eq!(schedule.next(), first + VM * 7);
    }

    #[tokio::test(start_paused = true)]
    async fn process_sampling_keeps_its_interval_after_any_delay() {
        let mut schedule = schedule();
        let (first, mut number) = (schedule.next(), 0_u64);
        for missed in [0, 1, 5, 2, 0, 7, 3, 30, 1, 0, 0, 4] {
            let from = number;
            number += missed;
            let tick = schedule.wake(first + multiply(VM, number));
            let processes = (from..=number).any(|number| number.is_multiple_of(3));
            assert_eq!(tick, Tick { missed, processes });
            number += 1;
        }
    }
}
