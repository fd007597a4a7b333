use std::time::UNIX_EPOCH;

use bson::RawBsonRef;
use vmwatch_api::{
    measures::VmMeasures,
    metrics::{
        CpuSeconds, FilesystemSample, ProcessOwner, ProcessSample, Restriction, ShortLived, SumSample,
        SystemSample,
    },
    processes::ProcessRowKind,
};

use super::*;
use crate::{
    processes::row::StoredProcess,
    vm_row::{RESTRICTED, VmRow},
};

fn sample() -> Sample {
    serde_json::from_str(
        r#"{"instance_id":"vm-1","create_date":"2017-01-01T21:37:59.001065","net_incoming":0.6,"net_outgoing":5.7,
            "vm":{"cpu_util":0.0,"mem":8.6,"disk_read":0.0,"disk_write":128.8,"proc":95},
            "processes":[{"cmd":"lvmetad","pid":479,"cpu_util":0.0,"mem":0.2,"disk_read":0.0,"disk_write":0.0,"running_time":1482236515.63}]}"#,
    )
    .unwrap()
}

fn documents(sample: &Sample) -> Result<Documents, Refusal> {
    let now = UNIX_EPOCH + Duration::from_secs(1_490_000_000);
    Documents::from_sample(sample, "+08:00".parse().unwrap(), now)
}

#[test]
fn document_of_a_sample_contains_every_measure() {
    let mut sample = sample();
    sample.vm.as_mut().unwrap().system = SystemSample {
        cores: Some(4),
        steal: Some(1.5),
        load: Some(2.25),
        swap: Some(12.0),
        pressure_cpu: Some(30.5),
        pressure_mem: Some(0.0),
        pressure_io: Some(7.0),
    };
    let row = &documents(&sample).unwrap().vms[0];
    let expected = VmMeasures {
        cpu_util: 0.0,
        mem: 8.6,
        disk_read: 0.0,
        disk_write: 128.8,
        net_incoming: 0.6,
        net_outgoing: 5.7,
        proc: 95.0,
        cores: 4.0,
        steal: 1.5,
        load: 2.25,
        swap: 12.0,
        pressure_cpu: 30.5,
        pressure_mem: 0.0,
        pressure_io: 7.0,
    };
    let read = VmRow::from_document(row).unwrap();
    assert_eq!((read.values, read.restricted), (expected.map(Some), None));
    assert_eq!(row.get(RESTRICTED).unwrap(), None);
}

#[test]
fn values_that_the_agent_cannot_measure_are_null() {
    let mut sample = sample();
    let vm = sample.vm.as_mut().unwrap();
    (vm.cpu_util, vm.mem, vm.proc) = (None, None, None);
    vm.restricted = Some(Restriction::PidNamespace);
    let row = &documents(&sample).unwrap().vms[0];
    for name in ["cpu_util", "mem", "proc"] {
        assert_eq!(row.get(name).unwrap(), Some(RawBsonRef::Null), "{name}");
    }
    for name in ["cores", "steal", "load", "swap", "pressure_io"] {
        assert_eq!(row.get(name).unwrap(), None, "{name}");
    }
    let read = VmRow::from_document(row).unwrap();
    assert_eq!(read.restricted, Some(Restriction::PidNamespace));
}

#[test]
fn process_may_use_more_than_the_memory_of_its_vm() {
    let mut sample = sample();
    sample.processes[0].mem = 312.5;
    let row = &documents(&sample).unwrap().processes[0];
    assert_eq!(row.get("mem").unwrap(), Some(RawBsonRef::Double(312.5)));
}

#[test]
fn row_of_a_process_has_its_cpu_time_and_owner_where_they_are_known() {
    let unknown = documents(&sample()).unwrap().processes.remove(0);
    for name in ["cpu_seconds", "vm_user_seconds", "user", "unit", "parent_pid"] {
        assert_eq!(unknown.get(name).unwrap(), None, "{name}");
    }
    let mut sample = sample();
    sample.vm_cpu = Some(CpuSeconds {
        user: 2.5,
        nice: 0.0,
        system: 0.75,
    });
    sample.processes[0].cpu_seconds = Some(1.25);
    sample.processes[0].owner = ProcessOwner {
        user: Some("root".to_owned()),
        parent_pid: Some(1),
        unit: Some("lvm2-lvmetad.service".to_owned()),
        container: None,
        command_line: Some("/sbin/lvmetad -f".to_owned()),
        inherited: true,
    };
    sample.processes[0].exit_code = Some(143);
    sample.short_lived = Some(ShortLived::Recorded);
    let row = &documents(&sample).unwrap().processes[0];
    let read = StoredProcess::read(row).unwrap();
    assert_eq!(read.vm_cpu, sample.vm_cpu);
    assert_eq!(read.row.cpu_seconds, Some(1.25));
    assert_eq!(read.row.owner, sample.processes[0].owner);
    assert_eq!(row.get("container").unwrap(), None);
    assert_eq!(
        (read.row.exit_code, read.short_lived),
        (Some(143), Some(ShortLived::Recorded))
    );

    sample.vm = None;
    sample.processes[0].owner.command_line = Some("x".repeat(513));
    assert_eq!(
        documents(&sample).unwrap_err(),
        Refusal::Text("command_line", 512)
    );
}

#[test]
fn summed_row_has_neither_pid_nor_start_and_fits_into_a_block() {
    let mut sample = sample();
    let of_user = |user: Option<&str>, processes| SumSample {
        cmd: "sh".to_owned(),
        processes,
        cpu_util: 80.0,
        cpu_seconds: 48.5,
        owner: ProcessOwner {
            user: user.map(str::to_owned),
            ..ProcessOwner::default()
        },
        ..SumSample::default()
    };
    sample.sums = vec![of_user(Some("root"), Some(1200)), of_user(None, None)];
    let documents = documents(&sample).unwrap();
    let mut rows = vmwatch_blocks::Rows::new(vmwatch_blocks::Kind::Process, "vm-1", 8 * 3_600_000);
    for document in &documents.processes {
        crate::blocks::push(&mut rows, document, None).unwrap();
    }
    let ids: Vec<_> = documents
        .processes
        .iter()
        .map(|row| row.get_object_id("_id").unwrap().bytes())
        .collect();
    assert_eq!(rows.ids(), ids);
    assert!(ids[1] != ids[2]);
    for (document, processes) in documents.processes[1..].iter().zip([Some(1200), None]) {
        for absent in ["pid", "running_time", "shutdown_time"] {
            assert_eq!(document.get(absent).unwrap(), None);
        }
        let read = StoredProcess::read(document).unwrap().row;
        assert_eq!((read.kind, read.processes), (ProcessRowKind::Sum, processes));
        assert_eq!(read.cpu_seconds, Some(48.5));
    }
}

#[test]
fn rows_of_filesystems_fit_into_a_block_and_impossible_ones_are_refused_alone() {
    let mut sample = sample();
    let filesystem = |mount_point: &str, used_bytes, total_bytes| FilesystemSample {
        mount_point: mount_point.to_owned(),
        filesystem: "ext4".to_owned(),
        used_bytes,
        total_bytes,
    };
    sample.filesystems = vec![
        filesystem("/", 5, 10),
        filesystem("/full", 1 << 40, 1 << 40),
        filesystem("/more used than there is", 11, 10),
        filesystem("/larger than any", 1, u64::MAX),
        filesystem(&"/long".repeat(1024), 1, 10),
    ];
    let documents = documents(&sample).unwrap();
    assert_eq!(documents.rows(), 4);
    let reason = documents.refused.unwrap().reason;
    for field in [
        "`used_bytes` is out of",
        "`total_bytes` is out of",
        "`mount_point` is longer",
    ] {
        assert!(reason.contains(&format!("filesystem: {field}")), "{reason}");
    }
    let mut rows = vmwatch_blocks::Rows::new(vmwatch_blocks::Kind::Filesystem, "vm-1", 8 * 3_600_000);
    for document in &documents.filesystems {
        crate::blocks::push(&mut rows, document, None).unwrap();
    }
    let ids: Vec<_> = documents
        .filesystems
        .iter()
        .map(|row| row.get_object_id("_id").unwrap().bytes())
        .collect();
    assert_eq!(rows.ids(), ids);
    assert!(ids.len() == 2 && ids[0] != ids[1]);

    sample.filesystems = (0..=SAMPLE_FILESYSTEMS)
        .map(|number| filesystem(&format!("/{number}"), 1, 2))
        .collect();
    assert_eq!(
        super::Documents::from_sample(&sample, UtcOffset::UTC, SystemTime::now()).unwrap_err(),
        Refusal::TooManyFilesystems
    );
}

#[test]
fn row_id_is_stable_and_starts_with_time_of_the_sample() {
    let (one, other) = (documents(&sample()).unwrap(), documents(&sample()).unwrap());
    assert_eq!(one.vms, other.vms);
    let id = one.vms[0].get_object_id("_id").unwrap();
    assert_eq!(id.timestamp().timestamp_millis(), 0x5869_0637 * 1000);
    // The id of a row must never change between versions; otherwise rows redelivered after an upgrade would be
    // stored twice.
    assert_eq!(id.to_hex(), "586906378b3cb134ee7c3336");
}

#[test]
fn process_that_reuses_a_pid_gets_another_row_id() {
    let mut twice = sample();
    twice.processes.push(ProcessSample {
        running_time: 1_482_236_600.0,
        ..twice.processes[0].clone()
    });
    let rows = documents(&twice).unwrap().processes;
    assert_ne!(
        rows[0].get_object_id("_id").unwrap(),
        rows[1].get_object_id("_id").unwrap()
    );
}

#[test]
fn impossible_row_is_refused_and_the_others_are_kept() {
    let mut many = sample();
    let process = many.processes[0].clone();
    let with_pid = |pid| ProcessSample {
        pid,
        ..process.clone()
    };
    many.processes = (0..50).map(with_pid).collect();
    many.processes[7].cpu_util = -1.0;
    let kept = documents(&many).unwrap();
    assert_eq!((kept.vms.len(), kept.processes.len()), (1, 49));
    let reason = "rows were refused and the others stored: process 7: `cpu_util` is out of range";
    let refused = |count, reason: &str| {
        let reason = reason.to_owned();
        Some(RefusedRows { count, reason })
    };
    assert_eq!(kept.refused, refused(1, reason));

    many.processes[7].cpu_util = 0.0;
    many.vm.as_mut().unwrap().mem = Some(101.0);
    let kept = documents(&many).unwrap();
    assert_eq!((kept.vms.len(), kept.processes.len()), (0, 50));
    let reason = "rows were refused and the others stored: VM: `mem` is out of range";
    assert_eq!(kept.refused, refused(1, reason));

    // 25 of 51 rows are impossible, and then 26.
    for process in &mut many.processes[..24] {
        process.disk_read = f64::NAN;
    }
    let kept = documents(&many).unwrap();
    assert_eq!((kept.vms.len(), kept.processes.len()), (0, 26));
    let reason = kept.refused.unwrap().reason;
    assert_eq!(reason.matches("is out of range").count(), MAX_REASONS);
    assert!(reason.ends_with("; 5 more rows"), "{reason}");
    many.processes[24].disk_read = f64::NAN;
    assert_eq!(documents(&many).unwrap_err(), Refusal::Number("mem"));
    assert_eq!(documents(&sample()).unwrap().refused, None);
}

#[test]
fn sample_with_value_out_of_range_is_refused() {
    let refused = |change: fn(&mut Sample)| {
        let mut sample = sample();
        change(&mut sample);
        documents(&sample).unwrap_err()
    };
    assert_eq!(
        refused(|s| s.net_incoming = -1.0),
        Refusal::Number("net_incoming")
    );
    assert_eq!(
        refused(|s| s.net_outgoing = f64::NAN),
        Refusal::Number("net_outgoing")
    );
    assert_eq!(
        refused(|s| {
            s.processes.clear();
            s.vm.as_mut().unwrap().cpu_util = Some(100.1);
        }),
        Refusal::Number("cpu_util")
    );
    assert_eq!(
        refused(|s| {
            s.vm = None;
            s.processes[0].mem = f64::INFINITY;
        }),
        Refusal::Number("mem")
    );
    assert_eq!(
        refused(|s| {
            s.vm = None;
            s.processes[0].pid = u32::MAX;
        }),
        Refusal::Number("pid")
    );
    assert_eq!(
        refused(|s| {
            s.vm = None;
            s.processes[0].cmd = "x".repeat(257);
        }),
        Refusal::Text("cmd", 256)
    );
    assert!(matches!(
        refused(|s| s.create_date = "2017-09-01T00:00:00.000000".parse().unwrap()),
        Refusal::Ahead(_)
    ));
    assert_eq!(
        refused(|s| s.create_date = "1969-12-31T00:00:00.000000".parse().unwrap()),
        Refusal::Time
    );
    assert_eq!(
        refused(|s| (s.vm, s.processes) = (None, Vec::new())),
        Refusal::Empty
    );
}
