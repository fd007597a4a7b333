use std::time::Duration;

use super::*;

/// A fake `/proc` in a temporary folder.
struct Proc(tempfile::TempDir);

impl Proc {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let proc = Self(dir);
        proc.write("stat", "cpu 1 1 1 1\nctxt 1\nbtime 1482236500\nprocesses 1\n");
        proc.set_uptime(100);
        proc
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.0.path().join(name), text).unwrap();
    }

    fn set_uptime(&self, seconds: u64) {
        self.write("uptime", &format!("{seconds}.00 0.00\n"));
    }

    fn set_process(&self, pid: u32, start_ticks: u64, cpu_ticks: u64, disk: Option<(u64, u64)>) {
        self.set_process_in_state("S", pid, start_ticks, cpu_ticks, disk);
    }

    fn set_process_in_state(
        &self,
        state: &str,
        pid: u32,
        start_ticks: u64,
        cpu_ticks: u64,
        disk: Option<(u64, u64)>,
    ) {
        std::fs::create_dir_all(self.0.path().join(pid.to_string())).unwrap();
        let numbers = format!("1 1 1 0 -1 0 0 0 0 0 {cpu_ticks} 0 0 0 20 0 1 0 {start_ticks} 0 25 0");
        self.write(
            &format!("{pid}/stat"),
            &format!("{pid} (p{start_ticks}) {state} {numbers}\n"),
        );
        if let Some((read, written)) = disk {
            self.write(
                &format!("{pid}/io"),
                &format!("rchar: 9\nread_bytes: {read}\nwrite_bytes: {written}\n"),
            );
        }
    }

    fn remove(&self, pid: u32) {
        std::fs::remove_dir_all(self.0.path().join(pid.to_string())).unwrap();
    }

    fn primed(&self) -> ProcessSampler {
        self.primed_for(Selection::All)
    }

    fn primed_for(&self, selection: Selection) -> ProcessSampler {
        let roots = Roots {
            proc: self.0.path().to_owned(),
            ..Roots::default()
        };
        let mut sampler = ProcessSampler::new(selection, roots).unwrap();
        sampler.prime().unwrap();
        sampler
    }
}

/// Makes the previous sample seem 10,000 s older, so the time the test itself takes is negligible.
fn age(sampler: &mut ProcessSampler) {
    sampler.age(Duration::from_secs(10_000));
}

fn read(sampler: &mut ProcessSampler) -> Vec<ProcessSample> {
    let mut rows = sampler.read(1000 * 4096).unwrap().rows;
    rows.sort_by_key(|row| (row.pid, row.shutdown_time.is_none()));
    rows
}

#[test]
fn process_row_has_rates_since_the_previous_sample() {
    let proc = Proc::new();
    proc.set_process(7, 1607, 1000, Some((1024, 4096)));
    let mut sampler = proc.primed();
    age(&mut sampler);
    proc.set_process(7, 1607, 1000 + 1_500_000, Some((1024 + 20_480_000, 4096)));
    let rows = read(&mut sampler);
    let expected = ProcessSample {
        cmd: "p1607".into(),
        pid: 7,
        cpu_util: 150.0,
        mem: 2.5,
        disk_read: 2.0,
        disk_write: 0.0,
        running_time: 1_482_236_516.07,
        shutdown_time: None,
        cpu_seconds: Some(15_000.0),
        exit_code: None,
        owner: ProcessOwner {
            parent_pid: Some(1),
            ..ProcessOwner::default()
        },
    };
    assert_eq!(rows, [expected]);
}

#[test]
fn usage_of_new_process_counts_toward_the_last_interval() {
    let proc = Proc::new();
    let mut sampler = proc.primed();
    age(&mut sampler);
    proc.set_process(8, 10_001, 500_000, Some((10_240_000, 0)));
    // This process started before the previous sample, which does not contain it. It is therefore unknown how much of
    // its usage occurred since then.
    proc.set_process(9, 5, 500_000, Some((1 << 40, 0)));
    let rows = read(&mut sampler);
    assert_eq!((rows[0].cpu_util, rows[0].disk_read), (50.0, 1.0));
    assert_eq!((rows[1].cpu_util, rows[1].disk_read), (0.0, 0.0));
}

#[test]
fn ended_process_gets_exactly_one_final_row() {
    let proc = Proc::new();
    proc.set_process(7, 1607, 0, None);
    let mut sampler = proc.primed();
    assert_eq!(read(&mut sampler)[0].shutdown_time, None);
    proc.remove(7);
    let before = unix_seconds(SystemTime::now());
    let last = read(&mut sampler);
    assert_eq!(last.len(), 1);
    assert_eq!(
        (last[0].pid, last[0].cmd.as_str(), last[0].running_time),
        (7, "p1607", 1_482_236_516.07)
    );
    assert!(last[0].shutdown_time.unwrap() >= before);
    assert_eq!(read(&mut sampler), []);
}

#[test]
fn zombie_process_counts_as_ended() {
    let proc = Proc::new();
    proc.set_process(7, 1607, 0, None);
    let mut sampler = proc.primed();
    read(&mut sampler);
    proc.set_process_in_state("Z", 7, 1607, 0, None);
    assert!(read(&mut sampler)[0].shutdown_time.is_some());
    assert_eq!(read(&mut sampler), []);
}

#[test]
fn reused_pid_ends_old_process_and_reports_new_one() {
    let proc = Proc::new();
    proc.set_process(7, 1607, 9000, Some((1 << 30, 0)));
    let mut sampler = proc.primed();
    read(&mut sampler);
    age(&mut sampler);
    proc.set_process(7, 11_000, 100_000, Some((0, 0)));
    let rows = read(&mut sampler);
    assert_eq!(rows.len(), 2);
    assert!(rows[0].cmd == "p1607" && rows[0].shutdown_time.is_some());
    assert!(rows[1].cmd == "p11000" && rows[1].shutdown_time.is_none());
    assert_eq!((rows[1].cpu_util, rows[1].running_time), (10.0, 1_482_236_610.0));
    assert_eq!(read(&mut sampler).len(), 1);
}

#[test]
fn unreported_process_gets_no_last_row() {
    let proc = Proc::new();
    proc.set_process(7, 1, 0, None);
    proc.set_process(8, 2, 0, None);
    let mut sampler = proc.primed_for(Selection::Top {
        count: 1,
        pinned: vec![],
    });
    // The processes have equal memory usage, so the one with the lower pid is selected.
    assert_eq!(
        read(&mut sampler).iter().map(|row| row.pid).collect::<Vec<_>>(),
        [7]
    );
    proc.remove(7);
    proc.remove(8);
    assert_eq!(
        read(&mut sampler).iter().map(|row| row.pid).collect::<Vec<_>>(),
        [7]
    );
    assert_eq!(read(&mut sampler), []);
}

#[test]
fn previously_reported_process_gets_a_final_row_when_it_ends() {
    let proc = Proc::new();
    proc.set_process(7, 1, 0, Some((0, 0)));
    proc.set_process(8, 2, 0, Some((0, 0)));
    let mut sampler = proc.primed_for(Selection::Top {
        count: 1,
        pinned: vec![],
    });
    let pids = |rows: Vec<ProcessSample>| rows.iter().map(|row| row.pid).collect::<Vec<_>>();
    age(&mut sampler);
    proc.set_process(8, 2, 500_000, Some((0, 0)));
    // Process 8 is selected by CPU usage. Both processes use the same memory, so process 7, the lower pid, is selected
    // by memory usage.
    assert_eq!(pids(read(&mut sampler)), [7, 8]);
    assert_eq!(pids(read(&mut sampler)), [7]);
    proc.remove(8);
    let rows = read(&mut sampler);
    assert!(rows[1].pid == 8 && rows[1].shutdown_time.is_some(), "{rows:?}");
}

#[test]
fn temporarily_unreadable_process_does_not_count_as_ended() {
    let proc = Proc::new();
    proc.set_process(7, 1607, 0, None);
    let mut sampler = proc.primed();
    read(&mut sampler);
    proc.write("7/stat", "half a li");
    assert_eq!(read(&mut sampler), []);
    proc.set_process(7, 1607, 0, None);
    assert_eq!(read(&mut sampler)[0].shutdown_time, None);
}

#[test]
fn processes_are_not_reported_as_ended_if_process_list_is_unreadable() {
    let proc = Proc::new();
    proc.set_process(7, 1607, 0, None);
    let mut sampler = proc.primed();
    read(&mut sampler);
    let (path, moved) = (proc.0.path().to_owned(), proc.0.path().with_extension("moved"));
    std::fs::rename(&path, &moved).unwrap();
    assert!(sampler.read(1).is_err());
    std::fs::rename(&moved, &path).unwrap();
    assert_eq!(read(&mut sampler)[0].shutdown_time, None);
}

#[test]
fn decreased_process_counter_gives_rate_of_zero() {
    let proc = Proc::new();
    proc.set_process(7, 1607, 1000, Some((1000, 1000)));
    let mut sampler = proc.primed();
    age(&mut sampler);
    proc.set_process(7, 1607, 10, Some((0, 1000 + 1_000_000)));
    let rows = read(&mut sampler);
    assert_eq!(
        (rows[0].cpu_util, rows[0].disk_read, rows[0].disk_write),
        (0.0, 0.0, 0.1)
    );
}
