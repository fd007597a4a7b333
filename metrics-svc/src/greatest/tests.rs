use vmwatch_api::processes::ProcessName;

use super::*;

const NOW: u64 = 1_800_000_000_000;

fn one(name: &str, cpu_util: f64, mem: f64) -> ProcessUse {
    ProcessUse {
        name: ProcessName::new(name).unwrap(),
        cpu_util: Some(cpu_util),
        mem: Some(mem),
    }
}

fn event(id: &str, at_ms: u64, greatest: Vec<ProcessUse>, names_left_out: u32) -> ProcessesEvent {
    ProcessesEvent {
        instance_id: id.parse().unwrap(),
        at_ms,
        rows: 1,
        greatest,
        names_left_out,
    }
}

/// The listed processes of a VM as `name cpu mem`, and the number of values left out.
fn listed(table: &GreatestProcesses, scope: &Scope, id: &str, now_ms: u64) -> (Vec<String>, u64) {
    let mut vm = CurrentVm {
        instance_id: id.parse().unwrap(),
        name: None,
        hypervisor: None,
        state: None,
        labels: BTreeMap::new(),
        agent: None,
        agent_version: None,
        agent_faulty: false,
        last_report_ms: None,
        sample: None,
        processes: Vec::new(),
    };
    let ranks = table.ranks(scope, now_ms).unwrap();
    let left_out = table.complete(&mut vm, &ranks, now_ms);
    let text = |value: Option<f64>| value.map_or("-".to_owned(), |value| value.to_string());
    let shown = vm
        .processes
        .iter()
        .map(|one| format!("{} {} {}", one.name.as_str(), text(one.cpu_util), text(one.mem)));
    let mut shown: Vec<_> = shown.collect();
    shown.sort();
    (shown, left_out)
}

#[test]
fn greatest_of_all_vms_in_scope_are_listed_and_others_counted() {
    let table = GreatestProcesses::new(6);
    table.note(
        &event("vm-1", 1, vec![one("java", 90.0, 50.0), one("cron", 0.0, 1.0)], 3),
        NOW,
    );
    table.note(
        &event("vm-2", 1, vec![one("java", 80.0, 2.0), one("sshd", 0.0, 1.0)], 0),
        NOW,
    );
    let all = |id| listed(&table, &Scope::All, id, NOW);
    // Of equal values, that of the smaller id is listed. Three names of vm-1 have two values each.
    assert_eq!(
        all("vm-1"),
        (vec!["cron 0 1".to_owned(), "java 90 50".to_owned()], 6)
    );
    assert_eq!(all("vm-2"), (vec!["java 80 2".to_owned()], 2));
    let only = Scope::Only(vec!["vm-2".parse().unwrap()]);
    let (shown, left_out) = listed(&table, &only, "vm-2", NOW);
    assert_eq!((shown.len(), left_out), (2, 0));
    table.remove(&"vm-1".parse().unwrap());
    assert_eq!(all("vm-1"), (Vec::new(), 0));
}

#[test]
fn newest_sample_replaces_older_ones_and_its_parts_are_summed() {
    let table = GreatestProcesses::new(20);
    table.note(&event("vm-1", 5, vec![one("old", 1.0, 1.0)], 0), NOW);
    table.note(&event("vm-1", 7, vec![one("java", 1.5, 2.0)], 1), NOW);
    table.note(
        &event("vm-1", 7, vec![one("java", 2.0, 3.0), one("cron", 0.5, 0.5)], 1),
        NOW,
    );
    table.note(&event("vm-1", 6, vec![one("late", 1.0, 1.0)], 0), NOW);
    let (shown, left_out) = listed(&table, &Scope::All, "vm-1", NOW);
    assert_eq!(
        (shown.join(", "), left_out),
        ("cron 0.5 0.5, java 3.5 5".to_owned(), 4)
    );
    let late = listed(&table, &Scope::All, "vm-1", NOW + LISTED_FOR_MS + 1);
    assert_eq!(late, (Vec::new(), 0));
}

#[test]
fn great_consumers_are_kept_among_many_idle_names() {
    let idle = (0..50).map(|index| one(&format!("idle-{index:02}"), 0.0, 0.0));
    let busy = [one("zz-cpu", 99.0, 0.0), one("zz-mem", 0.0, 42.0)];
    let (kept, left_out) = sums::greatest(idle.chain(busy));
    assert_eq!((kept.len(), left_out), (2 * NAMES, 32));
    for name in ["zz-cpu", "zz-mem"] {
        assert!(kept.iter().any(|one| one.name.as_str() == name), "{name}");
    }
}

#[test]
fn nothing_is_kept_unless_configured() {
    for series in [0, 1] {
        let table = GreatestProcesses::new(series);
        table.note(&event("vm-1", 5, vec![one("java", 1.0, 1.0)], 0), NOW);
        assert!(table.read().is_empty() && table.ranks(&Scope::All, NOW).is_none());
    }
}
