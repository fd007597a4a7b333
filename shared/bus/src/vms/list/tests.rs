use std::time::Instant;

use vmwatch_api::{
    actions::{Refusal, VmAction, all_refused},
    agents::{AgentText, VmLimit},
    events::{OverLimitEvent, UnstoredEvent, UnstoredReason},
    measures::VmValues,
    metrics::Limit,
    vms::NewestSample,
};

use super::*;

const NOW: u64 = 1_800_000_000_000;
const SILENT_AFTER: u64 = 60_000;

/// The tables that a list reads.
#[derive(Default)]
struct Tables {
    inventory: InventoryTable,
    labels: LabelTable,
    rows: Rows,
    measured: Rows,
    statuses: StatusTable,
}

impl Tables {
    fn vms(&self) -> Vms<'_> {
        Vms {
            inventory: &self.inventory,
            labels: &self.labels,
            measures: Some(Measures {
                rows: &self.rows,
                measured: &self.measured,
                silent_after_ms: SILENT_AFTER,
                utc_offset: UtcOffset::UTC,
                statuses: &self.statuses,
                version: "0.10.0",
            }),
        }
    }

    fn report(&mut self, id: &str, cpu: f64, ago_ms: u64) {
        let sample = newest(cpu, ago_ms);
        assert!(self.rows.note(&id.parse().unwrap(), sample, NOW - ago_ms, None));
    }

    /// Adds a row that the hypervisor measured.
    fn measure(&mut self, id: &str, cpu: f64, ago_ms: u64) {
        let sample = newest(cpu, ago_ms);
        assert!(
            self.measured
                .note(&id.parse().unwrap(), sample, NOW - ago_ms, None)
        );
    }

    fn label(&mut self, id: &str, key: &str, value: &str) {
        let labels = serde_json::json!({ key: value });
        let labels = serde_json::from_value(labels).unwrap();
        self.labels.set(id.parse().unwrap(), labels);
    }

    fn page(&self, query: &VmQuery) -> VmPage {
        self.vms().list(&Scope::All, query, NOW).unwrap()
    }
}

fn newest(cpu: f64, ago_ms: u64) -> NewestSample {
    NewestSample {
        at_ms: NOW - ago_ms,
        values: VmValues {
            cpu_util: Some(cpu),
            mem: Some(100.0 - cpu),
            disk_read: Some(0.0),
            disk_write: Some(0.0),
            net_incoming: Some(cpu * 2.0),
            net_outgoing: Some(0.0),
            proc: None,
            ..VmValues::default()
        },
        restricted: None,
    }
}

fn query(json: &str) -> VmQuery {
    serde_json::from_str(json).unwrap()
}

fn ids(page: &VmPage) -> Vec<&str> {
    page.vms.iter().map(|vm| vm.instance_id.as_str()).collect()
}

/// Reads page after page, and changes the tables after each.
fn walk(tables: &mut Tables, mut query: VmQuery, mut change: impl FnMut(&mut Tables)) -> Vec<String> {
    let mut seen = Vec::new();
    for _ in 0..1000 {
        let page = tables.page(&query);
        assert!(page.vms.len() <= usize::from(query.limit.get()));
        seen.extend(ids(&page).into_iter().map(str::to_owned));
        let Some(next) = page.next else { return seen };
        query.cursor = Some(next);
        change(tables);
    }
    panic!("the list has no end: {seen:?}");
}

fn example() -> Tables {
    let (running, off) = (MachineState::Running, MachineState::ShutOff);
    let mut tables = Tables {
        inventory: InventoryTable::default()
            .with("lab", "a", "Web", running)
            .with("lab", "b", "db", off)
            .with("attic", "c", "web-2", running)
            .label("attic", "c", "os", "Debian"),
        ..Tables::default()
    };
    tables.report("a", 5.0, 0);
    tables.report("c", 50.0, 0);
    tables.report("D", 20.0, 0);
    tables.report("e", 90.0, SILENT_AFTER + 1);
    tables.label("b", "env", "prod");
    tables
}

#[test]
fn list_can_be_sorted_by_every_value_in_both_directions() {
    let tables = example();
    for (sort, ascending, descending) in [
        ("id", "D a b c e", "e c b a D"),
        ("name", "b a c D e", "c a b D e"),
        ("hypervisor", "c a b D e", "a b c D e"),
        ("state", "a c b D e", "b a c D e"),
        ("cpu", "a D c b e", "c D a b e"),
        ("mem", "c D a b e", "a D c b e"),
        ("disk", "D a c b e", "D a c b e"),
        ("net", "a D c b e", "c D a b e"),
        ("last_report", "e D a c b", "D a c e b"),
    ] {
        for (order, expected) in [("asc", ascending), ("desc", descending)] {
            let query = query(&format!(r#"{{"sort":"{sort}","order":"{order}"}}"#));
            let page = tables.page(&query);
            assert_eq!(ids(&page).join(" "), expected, "{sort} {order}");
            assert_eq!((page.total, &page.next), (5, &None));
        }
    }
}

#[test]
fn list_can_be_filtered() {
    let tables = example();
    for (filter, expected) in [
        (r#""search":"WEB""#, "a c"),
        (r#""search":"d""#, "D b c"),
        (r#""search":"ATTIC""#, "c"),
        (r#""search":"os=deb""#, "c"),
        (r#""search":"env=P""#, "b"),
        (r#""search":"""#, "D a b c e"),
        (r#""search":"nothing""#, ""),
        (r#""state":"running""#, "a c"),
        (r#""agent":"reporting""#, "D a c"),
        (r#""agent":"silent""#, "e"),
        (r#""agent":"never""#, "b"),
        (r#""hypervisor":"lab""#, "a b"),
        (r#""hypervisor":"la""#, ""),
        (r#""label":"env""#, "b"),
        (r#""label":"env=prod""#, "b"),
        (r#""label":"env=test""#, ""),
        (r#""label":"hv/os""#, "c"),
        (r#""label":"hv/os=Debian""#, "c"),
        (r#""label":"os""#, ""),
        (r#""state":"running","search":"web","hypervisor":"lab""#, "a"),
    ] {
        let page = tables.page(&query(&format!("{{{filter}}}")));
        assert_eq!(ids(&page).join(" "), expected, "{filter}");
        assert_eq!(page.total, page.vms.len() as u64);
    }
    let found = tables.page(&query(r#"{"search":"web-2"}"#));
    let [vm] = found.vms.as_slice() else {
        panic!("{found:?}")
    };
    assert_eq!(
        vm.labels,
        BTreeMap::from([("hv/os".to_owned(), "Debian".to_owned())])
    );
    assert_eq!(
        (vm.agent, vm.state),
        (Some(Agent::Reporting), Some(MachineState::Running))
    );
    assert_eq!(vm.cpu_sparkline.last(), Some(&Some(50.0)));
}

#[test]
fn vm_without_an_agent_has_the_values_of_its_hypervisor() {
    let mut tables = example();
    // `a` and `b` are known to a hypervisor, `m` only by what was measured of it.
    tables.measure("a", 99.0, 0);
    tables.measure("b", 30.0, 0);
    tables.measure("e", 40.0, 0);
    tables.measure("m", 60.0, 0);
    tables.measure("old", 70.0, SILENT_AFTER + 1);
    let page = tables.page(&VmQuery::default());
    assert_eq!(ids(&page).join(" "), "D a b c e m old");
    let of = |id: &str| page.vms.iter().find(|vm| vm.instance_id.as_str() == id).unwrap();
    let cpu = |sample: Option<NewestSample>| sample.and_then(|sample| sample.values.cpu_util);
    for (id, agent, reported, measured, peak) in [
        ("a", Agent::Reporting, Some(5.0), Some(99.0), Some(5.0)),
        ("b", Agent::Never, None, Some(30.0), Some(30.0)),
        ("c", Agent::Reporting, Some(50.0), None, Some(50.0)),
        ("m", Agent::Never, None, Some(60.0), Some(60.0)),
        // What a hypervisor measured long ago is not listed.
        ("old", Agent::Never, None, None, None),
    ] {
        let vm = of(id);
        assert_eq!(vm.agent, Some(agent), "{id}");
        assert_eq!(
            (cpu(vm.sample), cpu(vm.hypervisor_sample)),
            (reported, measured),
            "{id}"
        );
        assert_eq!(vm.cpu_sparkline.last().copied().flatten(), peak, "{id}");
        assert_eq!(vm.last_report_ms.is_some(), reported.is_some(), "{id}");
        assert_eq!(&tables.vms().get(&vm.instance_id, NOW).unwrap().vm, vm, "{id}");
    }
    // The values of an agent that reports come first; those of a silent one are stale.
    for (sort, expected) in [
        ("cpu", "m c e b D a old"),
        ("mem", "a D b e c m old"),
        ("net", "m c e b D a old"),
    ] {
        let page = tables.page(&query(&format!(r#"{{"sort":"{sort}"}}"#)));
        assert_eq!(ids(&page).join(" "), expected, "{sort}");
    }
    let page = tables.page(&query(r#"{"agent":"never"}"#));
    assert_eq!(ids(&page).join(" "), "b m old");
    let only = Scope::Only(vec!["m".parse().unwrap(), "b".parse().unwrap()]);
    let page = tables.vms().list(&only, &VmQuery::default(), NOW).unwrap();
    assert_eq!(ids(&page).join(" "), "b m");
}

#[test]
fn list_contains_only_the_scope() {
    let tables = example();
    let only = |ids: &[&str]| Scope::Only(ids.iter().map(|id| id.parse().unwrap()).collect());
    for (scope, expected, hypervisors) in [
        (only(&["e", "c", "nothing", "c"]), "c e", "attic"),
        (only(&["D"]), "D", ""),
        (only(&[]), "", ""),
        (Scope::Unknown, "", ""),
        (Scope::All, "D a b c e", "attic lab"),
    ] {
        let page = tables.vms().list(&scope, &VmQuery::default(), NOW).unwrap();
        assert_eq!(ids(&page).join(" "), expected, "{scope:?}");
        assert_eq!(page.total, page.vms.len() as u64);
        let names: Vec<_> = page.hypervisors.iter().map(|part| part.name.as_str()).collect();
        assert_eq!(names.join(" "), hypervisors, "{scope:?}");
    }
}

#[test]
fn vm_on_two_hypervisors_is_listed_once_with_both_names() {
    let mut tables = example();
    tables.inventory = std::mem::take(&mut tables.inventory).with("attic", "a", "old", MachineState::ShutOff);
    let shown = |json: &str| {
        let page = tables.page(&query(json));
        let found = page.vms.iter().find(|vm| vm.instance_id.as_str() == "a");
        found.map(|vm| (vm.hypervisor.clone().unwrap(), vm.also_on.join(" ")))
    };
    let both = |shown: &str, other: &str| Some((shown.to_owned(), other.to_owned()));
    assert_eq!(shown("{}"), both("lab", "attic"), "the copy that runs is shown");
    assert_eq!(shown(r#"{"hypervisor":"attic"}"#), both("attic", "lab"));
    assert_eq!(shown(r#"{"state":"shut_off"}"#), both("attic", "lab"));
    assert_eq!(shown(r#"{"search":"old"}"#), both("lab", "attic"));
    assert_eq!(shown(r#"{"hypervisor":"attic","state":"running"}"#), None);
    let pages = walk(&mut tables, query(r#"{"limit":1}"#), |_| ());
    assert_eq!(pages.join(" "), "D a b c e");
    let detail = tables.vms().get(&"a".parse().unwrap(), NOW).unwrap();
    assert_eq!(detail.hypervisors.len(), 2);
}

#[test]
fn start_of_a_vm_that_may_run_on_another_hypervisor_is_refused() {
    let mut tables = example();
    let minute = 60_000;
    let unreachable = Some(Refusal::FormerHypervisorUnreachable);
    for (on_attic, is_reachable, listed_ago_ms, reason) in [
        (MachineState::Paused, true, 0, Some(Refusal::NotOffElsewhere)),
        (MachineState::ShutOff, true, 0, None),
        // An unreachable hypervisor may still run the VM for the time of the setting.
        (MachineState::Running, false, 0, unreachable),
        (MachineState::ShutOff, false, minute, unreachable),
        (MachineState::Running, false, minute + 1, None),
    ] {
        tables.inventory = std::mem::take(&mut tables.inventory)
            .with("attic", "b", "db", on_attic)
            .hypervisor_at("attic", is_reachable, NOW - listed_ago_ms);
        let vm = tables.vms().get(&"b".parse().unwrap(), NOW).unwrap().vm;
        assert_eq!(vm.refused, all_refused(Refusal::SeveralHypervisors));
        let copies: Vec<_> = vm
            .copies
            .iter()
            .map(|copy| (copy.hypervisor.as_str(), copy.state))
            .collect();
        assert_eq!(copies, [("attic", on_attic), ("lab", MachineState::ShutOff)]);
        let lab = vm.copies[1].refused.get(&VmAction::Start);
        assert_eq!(lab, reason.as_ref(), "{on_attic:?} {listed_ago_ms}");
    }
    let refused = |id: &str| tables.vms().get(&id.parse().unwrap(), NOW).unwrap().vm.refused;
    assert_eq!(
        refused("a"),
        [(VmAction::Reset, Refusal::Locked)].into(),
        "as stored"
    );
    assert_eq!(refused("D"), all_refused(Refusal::NoHypervisor));
}

#[test]
fn cursor_of_another_list_is_refused() {
    let tables = example();
    let mut other = query(r#"{"sort":"cpu","limit":1}"#);
    other.cursor = tables.page(&query(r#"{"sort":"mem","limit":1}"#)).next;
    let fault = tables.vms().list(&Scope::All, &other, NOW).unwrap_err();
    assert_eq!(fault.kind, FaultKind::Invalid);
    assert!(fault.message.contains("cursor"), "{fault}");
}

#[test]
fn pages_contain_each_unchanged_vm_once_while_others_change() {
    let mut tables = Tables::default();
    for index in 0..50 {
        tables.report(&format!("kept-{index:02}"), f64::from(index * 2), 0);
        tables.report(&format!("moving-{index:02}"), f64::from(index * 2 + 1), 0);
    }
    for (sort, order) in [
        ("cpu", "desc"),
        ("cpu", "asc"),
        ("id", "asc"),
        ("last_report", "desc"),
    ] {
        for limit in [1, 7, 100] {
            let mut turn = 0;
            let query = query(&format!(
                r#"{{"sort":"{sort}","order":"{order}","limit":{limit}}}"#
            ));
            let seen = walk(&mut tables, query, |tables| {
                turn += 1;
                let changed = format!("moving-{:02}", turn % 50);
                match turn % 3 {
                    0 => tables.rows.remove(&changed.parse().unwrap()),
                    1 => tables.report(&changed, f64::from(turn * 37 % 100), 0),
                    _ => tables.report(&format!("new-{turn}"), f64::from(turn * 53 % 100), 1),
                }
            });
            let mut kept: Vec<_> = seen.iter().filter(|id| id.starts_with("kept")).collect();
            let sorted = kept.is_sorted() || kept.iter().rev().is_sorted();
            assert!(
                sorted || sort == "last_report",
                "{sort} {order} {limit}: {kept:?}"
            );
            kept.sort_unstable();
            kept.dedup();
            assert_eq!(kept.len(), 50, "{sort} {order} {limit}");
            assert_eq!(seen.iter().filter(|id| id.starts_with("kept")).count(), 50);
        }
    }
}

#[test]
fn page_is_limited_in_bytes() {
    let mut tables = Tables::default();
    for index in 0..1000 {
        let id = format!("vm-{index:04}");
        tables.inventory =
            std::mem::take(&mut tables.inventory).with("lab", &id, &"\"".repeat(255), MachineState::Running);
        tables.label(&id, "note", &"\"".repeat(255));
    }
    let mut query = query(r#"{"limit":1000}"#);
    let page = tables.page(&query);
    assert!(page.vms.len() < 1000 && page.next.is_some());
    assert!(serde_json::to_vec(&page).unwrap().len() < 1 << 20);
    query.limit = Limit::new(1000).unwrap();
    assert_eq!(walk(&mut tables, query, |_| ()).len(), 1000);
}

#[test]
fn hypervisors_that_are_unreachable_or_late_come_first() {
    let tables = Tables {
        inventory: InventoryTable::default()
            .hypervisor_at("a-current", true, NOW)
            .hypervisor_at("b-late", true, NOW - 600_000)
            .hypervisor_at("c-down", false, NOW - 1000)
            .with("d-unlisted", "x", "x", MachineState::Running),
        ..Tables::default()
    };
    let parts = tables.page(&VmQuery::default()).hypervisors;
    let shown: Vec<_> = parts
        .iter()
        .map(|part| (part.name.as_str(), part.reachable, part.late))
        .collect();
    assert_eq!(
        shown,
        [
            ("b-late", true, true),
            ("c-down", false, false),
            ("d-unlisted", false, false),
            ("a-current", true, false),
        ]
    );
    assert_eq!(
        (parts[1].listed_at_ms, parts[2].listed_at_ms),
        (Some(NOW - 1000), None)
    );
}

#[test]
fn vm_whose_samples_are_not_stored_reports_with_the_reason() {
    let mut tables = example();
    let mut unstored = |id: &str, reason| {
        let event = UnstoredEvent {
            instance_id: id.parse().unwrap(),
            at_ms: NOW - 5000,
            arrived_ms: NOW,
            reason,
        };
        assert!(tables.rows.note_unstored(&event));
    };
    // A VM with old rows, and a VM of a hypervisor that has none.
    unstored("e", UnstoredReason::Expired);
    unstored("b", UnstoredReason::Expired);
    let page = tables.page(&query(r#"{"agent":"faulty"}"#));
    assert_eq!(ids(&page), ["b", "e"]);
    for vm in &page.vms {
        assert_eq!(vm.agent, Some(Agent::Reporting));
        assert_eq!(vm.agent_faults, [AgentFault::ExpiredRows { age_ms: 5000 }]);
    }
    assert_eq!(ids(&tables.page(&query(r#"{"agent":"silent"}"#))).len(), 0);
    let page = tables.page(&query(r#"{"sort":"cpu"}"#));
    assert_eq!(ids(&page).join(" "), "c D a b e", "old values come last");
}

#[test]
fn vm_above_a_limit_is_shown_with_the_limit_and_since_when() {
    let mut tables = example();
    let event = OverLimitEvent {
        instance_id: "a".parse().unwrap(),
        limit: VmLimit::Rows,
        since_ms: NOW - 60_000,
        at_ms: NOW - 1000,
    };
    assert_eq!(tables.rows.note_over_limit(&event), Some(NOW - 60_000));
    let page = tables.page(&query(r#"{"agent":"faulty"}"#));
    assert_eq!((ids(&page), tables.vms().count_faulty(NOW)), (vec!["a"], 1));
    let fault = AgentFault::OverLimit {
        limit: VmLimit::Rows,
        for_ms: 60_000,
    };
    assert_eq!(page.vms[0].agent_faults, [fault]);
    tables.rows.remove(&event.instance_id);
    assert_eq!(tables.page(&query(r#"{"agent":"faulty"}"#)).total, 0);
}

#[test]
fn vm_has_version_of_its_agent_and_whether_it_is_outdated() {
    let mut tables = example();
    for (id, version) in [("a", "0.9.9"), ("c", "0.10.0")] {
        let status = format!(r#"{{"version":"{version}","architecture":"x86_64"}}"#);
        let status = serde_json::from_str(&status).unwrap();
        tables.statuses.set(id.parse().unwrap(), Some(status));
    }
    let page = tables.page(&VmQuery::default());
    let versions = page.vms.iter().map(|vm| {
        let version = vm.agent_version.as_ref().map(AgentText::as_str);
        (vm.instance_id.as_str(), version, vm.agent_outdated)
    });
    let expected = [
        ("D", None, false),
        ("a", Some("0.9.9"), true),
        ("b", None, false),
        ("c", Some("0.10.0"), false),
        ("e", None, false),
    ];
    assert_eq!(versions.collect::<Vec<_>>(), expected);
    let detail = tables.vms().get(&"a".parse().unwrap(), NOW).unwrap();
    assert_eq!(detail.agent_status.unwrap().architecture.as_str(), "x86_64");
}

#[test]
fn list_without_measures_has_no_agents() {
    let tables = example();
    let vms = Vms {
        measures: None,
        ..tables.vms()
    };
    let page = vms.list(&Scope::All, &query(r#"{"sort":"cpu"}"#), NOW).unwrap();
    assert_eq!(ids(&page), ["a", "b", "c"]);
    assert!(
        page.vms
            .iter()
            .all(|vm| vm.agent.is_none() && vm.sample.is_none())
    );
    let page = vms
        .list(&Scope::All, &query(r#"{"agent":"never"}"#), NOW)
        .unwrap();
    assert_eq!(page.total, 0, "the status of agents is unknown");
}

/// Prints the cost of a page; it is not limited, because the machine may be busy.
#[test]
fn list_of_ten_thousand_vms_is_sorted_and_searched() {
    let mut tables = Tables::default();
    for index in 0..10_000_u32 {
        let id = format!("{index:08}-0000-4000-8000-000000000000");
        let name = format!("Web-{index}");
        tables.inventory =
            std::mem::take(&mut tables.inventory).with("lab", &id, &name, MachineState::Running);
        tables.report(&id, f64::from(index * 7919 % 10_000) / 100.0, 0);
    }
    for (json, total) in [
        (r#"{"sort":"cpu"}"#, 10_000),
        (r#"{"sort":"name","search":"web-99"}"#, 111),
    ] {
        let query = query(json);
        let begun = Instant::now();
        let page = tables.page(&query);
        println!("{json}: {:?}", begun.elapsed());
        assert_eq!(
            (page.total, page.vms.len()),
            (total, usize::from(query.limit.get()))
        );
    }
}

#[test]
fn current_values_come_from_the_source_that_reports() {
    let mut tables = example();
    // The agent of `e` is silent, and `b` has none.
    for (id, cpu) in [("a", 99.0), ("b", 30.0), ("e", 40.0)] {
        tables.measure(id, cpu, 0);
    }
    tables.report("silent", 70.0, SILENT_AFTER + 1);
    let read = |scope: &Scope, after: Option<&str>| {
        let after = after.map(|id| id.parse().unwrap());
        let page = tables.vms().current(scope, after.as_ref(), NOW, |_| ());
        assert_eq!(page.next, None);
        let values = page.vms.iter().map(|vm| {
            let cpu = vm.sample.and_then(|sample| sample.values.cpu_util);
            (vm.instance_id.to_string(), cpu)
        });
        values.collect::<Vec<_>>()
    };
    let all = [
        ("D", Some(20.0)),
        ("a", Some(5.0)),
        ("b", Some(30.0)),
        ("c", Some(50.0)),
        ("e", Some(40.0)),
        ("silent", None),
    ]
    .map(|(id, cpu)| (id.to_owned(), cpu));
    assert_eq!(read(&Scope::All, None), all);
    assert_eq!(read(&Scope::All, Some("b")), all[3..]);
    let only = Scope::Only(["e", "b", "nothing"].map(|id| id.parse().unwrap()).into());
    assert_eq!(read(&only, None), [all[2].clone(), all[4].clone()]);
    assert_eq!(read(&only, Some("b")), all[4..5]);
    assert!(read(&Scope::Unknown, None).is_empty());
}

#[test]
fn page_of_current_values_fits_into_a_message() {
    let tables = example();
    let long = "x".repeat(300_000);
    let read = |after: Option<&InstanceId>| {
        tables.vms().current(&Scope::All, after, NOW, |vm| {
            vm.labels.insert("long".to_owned(), long.clone());
        })
    };
    let (mut seen, mut after) = (Vec::new(), None);
    for _ in 0..3 {
        let page = read(after.as_ref());
        assert!(page.vms.len() <= 2, "{}", page.vms.len());
        seen.extend(page.vms.into_iter().map(|vm| vm.instance_id.to_string()));
        after = page.next;
    }
    assert_eq!((seen.join(" "), after), ("D a b c e".to_owned(), None));
}
