//! Computes the CPU time of processes that ended between two passes over `/proc`, from what the kernel adds to the
//! children's times (`cutime` and `cstime`) of the process that reaps them.
//!
//! When a process is reaped, the kernel adds all of its own and its children's CPU time to its parent's children's times.
//! The part that earlier passes read from the process itself is subtracted, so that only the time since the previous pass
//! remains. A pass is not a moment: if a parent was read before it reaped a child, its time grows only in the next pass.
//! The converse must not happen: if a child was read before its parent reaped it, its time would be counted with both. A
//! pass therefore reads parents first ([`Reaped::sort`]).

use std::collections::{BTreeMap, HashMap};

/// The pid of the process that reaps orphans.
const INIT: u32 = 1;
/// Maximum number of ancestors that are followed.
const MAX_ANCESTORS: usize = 64;

/// The CPU times of a process, in clock ticks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Counted {
    pub(super) start_ticks: u64,
    /// CPU time of the process itself.
    pub(super) own: u64,
    /// CPU time of the children that it reaped, and of those that they reaped.
    pub(super) children: u64,
    pub(super) parent_pid: u32,
    /// Whether the process has ended and waits to be reaped.
    pub(super) is_zombie: bool,
}

/// CPU time of an ended process that earlier passes have counted. It is subtracted from the growth of its reaper's
/// children's times.
#[derive(Debug, Clone, Copy)]
struct Debt {
    /// The process that probably reaped it.
    reaper: u32,
    ticks: u64,
    /// Whether the parent had ended as well, so that another process may be the reaper.
    is_orphan: bool,
}

/// The times of the previous pass.
#[derive(Debug, Default)]
pub(super) struct Reaped {
    previous: Option<HashMap<u32, Counted>>,
    /// Debts of the previous pass for which the reaper's time had not grown yet.
    debts: Vec<Debt>,
}

impl Reaped {
    /// The times of a process in the previous pass.
    pub(super) fn previous(&self, pid: u32) -> Option<Counted> {
        self.previous.as_ref()?.get(&pid).copied()
    }

    /// Sorts pids into an order in which parents precede their children: that of their starts, as far as the previous pass
    /// knows these. The order of pids is not such an order, because the kernel reuses low pids. Processes that reap orphans
    /// are ancestors too.
    pub(super) fn sort(&self, pids: &mut [u32]) {
        pids.sort_by_key(|pid| {
            (
                self.previous(*pid)
                    .map_or(u64::MAX, |process| process.start_ticks),
                *pid,
            )
        });
    }

    /// Takes the times of a pass. Returns the CPU time in ticks of the processes that ended since the previous pass, by
    /// the process that reaped them or will reap them.
    pub(super) fn advance(&mut self, now: HashMap<u32, Counted>) -> BTreeMap<u32, u64> {
        let Some(previous) = self.previous.take() else {
            self.previous = Some(now);
            return BTreeMap::new();
        };
        let mut growth: BTreeMap<u32, u64> = BTreeMap::new();
        for (pid, process) in &now {
            let then = previous
                .get(pid)
                .filter(|then| then.start_ticks == process.start_ticks);
            let children = process
                .children
                .saturating_sub(then.map_or(0, |then| then.children));
            if children > 0 {
                *growth.entry(*pid).or_default() += children;
            }
            let own = process.own.saturating_sub(then.map_or(0, |then| then.own));
            if process.is_zombie && own > 0 {
                *growth.entry(process.parent_pid).or_default() += own;
            }
        }
        let mut debts: Vec<Debt> = previous
            .iter()
            .filter(|(pid, then)| now.get(pid).is_none_or(|now| now.start_ticks != then.start_ticks))
            .map(|(_, then)| debt(then, &previous, &now))
            .collect();
        pay(&mut growth, &mut self.debts);
        pay(&mut growth, &mut debts);
        debts.retain(|debt| debt.ticks > 0);
        self.debts = debts;
        self.previous = Some(now);
        growth.retain(|_, ticks| *ticks > 0);
        growth
    }
}

/// What an ended process left, and the nearest ancestor that still exists.
fn debt(ended: &Counted, previous: &HashMap<u32, Counted>, now: &HashMap<u32, Counted>) -> Debt {
    let mut reaper = ended.parent_pid;
    for _ in 0..MAX_ANCESTORS {
        if now.contains_key(&reaper) {
            break;
        }
        reaper = previous.get(&reaper).map_or(INIT, |process| process.parent_pid);
    }
    Debt {
        reaper,
        ticks: ended.own.saturating_add(ended.children),
        is_orphan: reaper != ended.parent_pid,
    }
}

/// Subtracts each debt from the growth of its reaper. The debt of an orphan may also be subtracted from the growth of
/// another process, because its reaper is uncertain.
fn pay(growth: &mut BTreeMap<u32, u64>, debts: &mut [Debt]) {
    // Orphans come last, because the growth of another process can settle their debts.
    debts.sort_by_key(|debt| debt.is_orphan);
    for debt in debts.iter_mut() {
        if let Some(grown) = growth.get_mut(&debt.reaper) {
            settle(grown, debt);
        }
    }
    for debt in debts.iter_mut().filter(|debt| debt.is_orphan) {
        for grown in growth.values_mut() {
            settle(grown, debt);
        }
    }
}

fn settle(grown: &mut u64, debt: &mut Debt) {
    let paid = (*grown).min(debt.ticks);
    *grown -= paid;
    debt.ticks -= paid;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pid, own time, children's time, parent.
    fn pass<const N: usize>(processes: [(u32, u64, u64, u32); N]) -> HashMap<u32, Counted> {
        let counted = |(pid, own, children, parent_pid)| {
            let process = Counted {
                start_ticks: u64::from(pid),
                own,
                children,
                parent_pid,
                is_zombie: false,
            };
            (pid, process)
        };
        processes.into_iter().map(counted).collect()
    }

    fn zombie(mut pass: HashMap<u32, Counted>, pid: u32) -> HashMap<u32, Counted> {
        pass.get_mut(&pid).unwrap().is_zombie = true;
        pass
    }

    fn after<const N: usize>(passes: [HashMap<u32, Counted>; N]) -> Vec<Vec<(u32, u64)>> {
        let mut reaped = Reaped::default();
        let grown = passes.map(|pass| reaped.advance(pass).into_iter().collect());
        grown.into_iter().skip(1).collect()
    }

    #[test]
    fn time_of_unseen_children_is_that_of_their_parent() {
        let passes = [
            pass([(1, 5, 0, 0), (7, 10, 100, 1)]),
            pass([(1, 5, 0, 0), (7, 20, 350, 1)]),
        ];
        assert_eq!(after(passes), [[(7, 250)]]);
        // A new process counts all that it has reaped.
        let passes = [pass([(1, 5, 0, 0)]), pass([(1, 5, 0, 0), (8, 3, 40, 1)])];
        assert_eq!(after(passes), [[(8, 40)]]);
    }

    #[test]
    fn time_that_rows_of_the_child_had_is_not_counted_again() {
        let passes = [
            pass([(1, 0, 0, 0), (7, 0, 0, 1), (9, 1000, 50, 7)]),
            pass([(1, 0, 0, 0), (7, 0, 1080, 1)]),
        ];
        assert_eq!(after(passes), [[(7, 30)]]);
    }

    #[test]
    fn zombie_counts_when_it_ends_and_not_when_it_is_reaped() {
        let alive = pass([(7, 0, 0, 1), (9, 1000, 0, 7)]);
        let ended = zombie(pass([(7, 0, 0, 1), (9, 1040, 0, 7)]), 9);
        let unseen = zombie(pass([(7, 0, 0, 1), (9, 1040, 0, 7), (10, 6, 0, 7)]), 10);
        let unseen = zombie(unseen, 9);
        let reaped = pass([(7, 0, 1046, 1)]);
        let grown = after([alive, ended, unseen, reaped]);
        assert_eq!(grown, [vec![(7, 40)], vec![(7, 6)], vec![]]);
    }

    #[test]
    fn parent_that_was_read_before_it_reaped_is_counted_in_the_next_pass() {
        let passes = [
            pass([(7, 0, 0, 1), (9, 1000, 0, 7)]),
            pass([(7, 0, 0, 1)]),
            pass([(7, 0, 1010, 1)]),
        ];
        assert_eq!(after(passes), [vec![], vec![(7, 10)]]);
    }

    #[test]
    fn process_whose_parent_ignores_ended_children_hides_nothing_later() {
        let passes = [
            pass([(7, 0, 0, 1), (8, 0, 0, 1), (9, 1000, 0, 7)]),
            pass([(7, 0, 0, 1), (8, 0, 300, 1)]),
            pass([(7, 0, 0, 1), (8, 0, 300, 1)]),
            pass([(7, 0, 20, 1), (8, 0, 300, 1)]),
        ];
        assert_eq!(after(passes), [vec![(8, 300)], vec![], vec![(7, 20)]]);
    }

    #[test]
    fn orphans_are_counted_with_the_ancestor_that_inherits_their_time() {
        // 8 and its child 9 end; 7 reaps 8, which had reaped 9.
        let before = pass([(1, 0, 0, 0), (7, 0, 0, 1), (8, 100, 0, 7), (9, 500, 0, 8)]);
        let after_reaping = pass([(1, 0, 0, 0), (7, 0, 605, 1)]);
        assert_eq!(after([before.clone(), after_reaping]), [[(7, 5)]]);
        // 9 outlived 8, and init reaped it.
        let by_init = pass([(1, 0, 503, 0), (7, 0, 102, 1)]);
        let total: u64 = after([before, by_init])[0].iter().map(|(_, ticks)| ticks).sum();
        assert_eq!(total, 5);
    }

    #[test]
    fn parents_are_read_before_their_children() {
        // The kernel gave a low pid to the child of 900.
        let mut before = pass([(1, 0, 0, 0), (7, 0, 0, 900), (900, 0, 0, 1)]);
        before.get_mut(&7).unwrap().start_ticks = 1000;
        let mut reaped = Reaped::default();
        reaped.advance(before);
        let mut pids = [1, 3, 7, 900, 950];
        reaped.sort(&mut pids);
        assert_eq!(pids, [1, 900, 7, 3, 950]);
    }

    #[test]
    fn reused_pid_is_another_process() {
        let mut next = pass([(7, 0, 1005, 1), (9, 2, 0, 7)]);
        next.get_mut(&9).unwrap().start_ticks = 777;
        assert_eq!(after([pass([(7, 0, 0, 1), (9, 1000, 0, 7)]), next]), [[(7, 5)]]);
    }
}
