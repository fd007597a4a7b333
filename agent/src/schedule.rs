//! When to sample what: at steady intervals from a random phase; what was missed is counted, never made up for.

use std::time::Duration;

use shared::jitter::jittered;
use tokio::time::Instant;

use crate::config::Intervals;

/// The moments of the samples.
#[derive(Debug)]
pub(crate) struct Schedule {
    intervals: Intervals,
    next: Instant,
    /// Samples of the VM until the processes' next turn; 0 means that it is theirs.
    until_processes: u64,
}

/// What is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tick {
    /// Moments that have passed unused since the last one.
    pub(crate) missed: u64,
    /// Whether the processes are due as well.
    pub(crate) processes: bool,
}

impl Schedule {
    /// The first moment is half an interval to one and a half from now, so that agents started together do not sample
    /// together. It carries the processes, so that a new VM shows them at once.
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

    /// What is due at a moment not before [`Schedule::next`].
    pub(crate) fn wake(&mut self, now: Instant) -> Tick {
        let late = now.saturating_duration_since(self.next).as_nanos();
        let missed = u64::try_from(late / self.intervals.vm.as_nanos()).unwrap_or(u64::MAX);
        let passed = missed.saturating_add(1);
        self.next += duration_of(self.intervals.vm, passed);
        let processes = self.until_processes <= missed;
        let round = u64::from(self.intervals.vm_per_process);
        self.until_processes = if processes {
            // Their turns keep their places, whatever was missed.
            round - 1 - (missed - self.until_processes) % round
        } else {
            self.until_processes - passed
        };
        Tick { missed, processes }
    }
}

fn duration_of(interval: Duration, times: u64) -> Duration {
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

    fn on_time(schedule: &mut Schedule) -> bool {
        let tick = schedule.wake(schedule.next() + Duration::from_millis(3));
        assert_eq!(tick.missed, 0);
        tick.processes
    }

    #[tokio::test(start_paused = true)]
    async fn it_starts_at_a_random_phase_and_keeps_its_interval() {
        let now = Instant::now();
        let starts: Vec<_> = (0..50).map(|_| schedule().next() - now).collect();
        assert!(starts.iter().all(|start| (VM / 2..=VM * 3 / 2).contains(start)));
        assert!(starts.iter().any(|start| *start != starts[0]));

        let mut schedule = schedule();
        let first = schedule.next();
        let turns: Vec<_> = (0..7).map(|_| on_time(&mut schedule)).collect();
        assert_eq!(turns, [true, false, false, true, false, false, true]);
        assert_eq!(schedule.next(), first + VM * 7);
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_missed_is_counted_and_the_processes_keep_their_turns() {
        let mut schedule = schedule();
        let first = schedule.next();
        assert!(on_time(&mut schedule));
        // Moments 1 to 3 pass, 3 being the processes' turn; it is 4 now, and they are taken with it.
        let tick = schedule.wake(first + VM * 4 + Duration::from_secs(1));
        assert_eq!(
            tick,
            Tick {
                missed: 3,
                processes: true
            }
        );
        assert_eq!(schedule.next(), first + VM * 5);
        assert!(!on_time(&mut schedule));
        assert!(on_time(&mut schedule));
        assert_eq!(schedule.next(), first + VM * 7);
    }

    #[tokio::test(start_paused = true)]
    async fn any_lateness_keeps_the_turns() {
        let mut schedule = schedule();
        let (first, mut place) = (schedule.next(), 0_u64);
        for late in [0, 1, 5, 2, 0, 7, 3, 30, 1, 0, 0, 4] {
            let from = place;
            place += late;
            let tick = schedule.wake(first + duration_of(VM, place));
            let turn_passed = (from..=place).any(|moment| moment.is_multiple_of(3));
            assert_eq!(
                tick,
                Tick {
                    missed: late,
                    processes: turn_passed
                }
            );
            place += 1;
        }
    }
}
