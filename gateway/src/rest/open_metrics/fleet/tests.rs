use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::{super::text::plain, *};

fn text(fleet: &Fleet) -> String {
    let parts = plain(encode(fleet).unwrap()).map(Result::unwrap);
    String::from_utf8(parts.collect::<Vec<_>>().concat()).unwrap()
}

fn vm(value: Value) -> CurrentVm {
    serde_json::from_value(value).unwrap()
}

fn web() -> CurrentVm {
    vm(json!({
        "instance_id": "vm-1", "name": "say \"hi\"\n\\", "hypervisor": "数据", "state": "running",
        "labels": { "a.b": "1", "a_b": "2", "hv/a-b": "3", "team": "" },
        "agent": "reporting", "agent_version": "0.2.0", "last_report_ms": 1_800_000_000_250_u64,
        "sample": {
            "at_ms": 1_800_000_000_000_u64, "cpu_util": 12.5, "mem": null, "disk_read": 2.0, "disk_write": 0.0,
            "net_incoming": 1.5, "net_outgoing": 0.5, "proc": 95, "cores": 4, "load": 1.25,
        },
    }))
}

#[test]
fn metrics_have_base_units_and_escaped_labels() {
    let fleet = Fleet {
        vms: vec![web(), vm(json!({ "instance_id": "vm-2", "agent": "never" }))],
        alerts: Some(BTreeMap::from([("critical".to_owned(), 2)])),
        stale: HashSet::from([Source::Labels]),
        processes_left_out: None,
    };
    let text = text(&fleet);
    let one = r#"instance_id="vm-1",name="say \"hi\"\n\\",hypervisor="数据""#;
    let other = r#"instance_id="vm-2",name="",hypervisor="""#;
    for line in [
        "vmwatch_vms 2".to_owned(),
        "vmwatch_source_current{source=\"labels\"} 0".to_owned(),
        "vmwatch_source_current{source=\"alerts\"} 1".to_owned(),
        "vmwatch_alerts_active{severity=\"critical\"} 2".to_owned(),
        "vmwatch_alerts_active{severity=\"info\"} 0".to_owned(),
        format!(
            "vmwatch_vm_info{{{one},agent_version=\"0.2.0\",label_a_b=\"1\",label_a_b_2=\"2\",label_hv_a_b=\"3\",label_team=\"\"}} 1"
        ),
        format!("vmwatch_vm_state{{{one},state=\"running\"}} 1"),
        format!("vmwatch_vm_agent_reporting{{{one}}} 1"),
        format!("vmwatch_vm_agent_reporting{{{other}}} 0"),
        format!("vmwatch_vm_agent_faulty{{{one}}} 0"),
        format!("vmwatch_vm_last_report_timestamp_seconds{{{one}}} 1800000000.25"),
        format!("vmwatch_vm_sample_timestamp_seconds{{{one}}} 1800000000"),
        format!("vmwatch_vm_cpu_usage_ratio{{{one}}} 0.125"),
        format!("vmwatch_vm_disk_read_bytes_per_second{{{one}}} 2048"),
        format!("vmwatch_vm_processes{{{one}}} 95"),
        format!("vmwatch_vm_load1{{{one}}} 1.25"),
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
    // An unknown value has no sample, and processes are not listed.
    for absent in [
        "vmwatch_vm_memory_usage_ratio{",
        "vmwatch_process_",
        "vmwatch_vm_cpu_usage_ratio{instance_id=\"vm-2\"",
    ] {
        assert!(!text.contains(absent), "{absent}\n{text}");
    }
}

/// Prometheus refuses the whole answer if a family's name does not end with its unit.
#[test]
fn every_family_begins_once_and_has_its_unit_and_help() {
    let fleet = Fleet {
        vms: vec![web()],
        alerts: Some(BTreeMap::new()),
        processes_left_out: Some(0),
        ..Fleet::default()
    };
    let text = text(&fleet);
    let of = |kind: &str| {
        let lines = text
            .lines()
            .filter_map(|line| line.strip_prefix(kind)?.split_once(' '));
        lines.collect::<Vec<_>>()
    };
    let names: Vec<_> = of("# TYPE ").into_iter().map(|(name, _)| name).collect();
    assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len());
    assert_eq!(names.len(), 26, "{names:?}");
    for (name, unit) in of("# UNIT ") {
        assert!(name.ends_with(&format!("_{unit}")), "{name} {unit}");
    }
    for (name, help) in of("# HELP ") {
        assert!(
            help.ends_with('.') && !help.contains(['\\', '"', '\n']),
            "{name} {help}"
        );
        assert!(names.contains(&name));
    }
    assert_eq!(of("# HELP ").len(), names.len());
    let mut family = "";
    for line in text.lines() {
        match line
            .strip_prefix("# TYPE ")
            .and_then(|rest| rest.split(' ').next())
        {
            Some(name) => family = name,
            None => assert!(
                line.starts_with('#') || line.starts_with(family),
                "{family}: {line}"
            ),
        }
    }
    assert!(text.ends_with("\n# EOF\n"));
}

#[test]
fn series_of_processes_are_limited_and_counted() {
    let many: Vec<_> = (0..MAX_PROCESS_SERIES / 2 + 10)
        .map(|index| json!({ "name": format!("name {index}"), "cpu_util": 150.0, "mem": 2.5 }))
        .collect();
    let fleet = Fleet {
        vms: vec![vm(json!({ "instance_id": "vm-1", "processes": many }))],
        processes_left_out: Some(7),
        ..Fleet::default()
    };
    let text = text(&fleet);
    let series = text
        .lines()
        .filter(|line| line.starts_with("vmwatch_process_") && line.contains('{'));
    assert_eq!(series.count(), MAX_PROCESS_SERIES);
    let vm = r#"instance_id="vm-1",name="",hypervisor="""#;
    for line in [
        format!("vmwatch_process_cpu_usage_cores{{{vm},process=\"name 0\"}} 1.5"),
        format!("vmwatch_process_memory_usage_ratio{{{vm},process=\"name 0\"}} 0.025"),
        "vmwatch_process_series_left_out 27".to_owned(),
    ] {
        assert!(text.lines().any(|found| found == line), "{line}");
    }
}
