use proptest::prelude::*;
use tempfile::TempDir;
use vmwatch_api::metrics::Sample;
use vmwatch_blocks::{Encoder, encode_sample};
use vmwatch_service::config::ByteSize;

use super::*;

fn instance() -> InstanceId {
    "vm-1".parse().unwrap()
}

fn open_with(dir: &TempDir, blocks: u64) -> Spool {
    let settings = SpoolSettings {
        dir: dir.path().join("spool"),
        limit: ByteSize(blocks * BLOCK),
    };
    open_at(&settings).unwrap()
}

fn open_at(settings: &SpoolSettings) -> Result<Spool, SpoolError> {
    Spool::open(settings, instance(), SpoolLock::take(&settings.dir)?)
}

fn open(dir: &TempDir) -> Spool {
    open_with(dir, 1000)
}

/// Returns a sample part of this size with a valid head. The spool does not decode what follows the head.
pub(crate) fn part(sequence: u64, bytes: usize) -> Queued {
    let date = format!("2017-01-01T21:37:59.{sequence:06}");
    let sample = Sample {
        instance_id: instance(),
        create_date: date.parse().unwrap(),
        part: 3,
        net_incoming: 0.0,
        net_outgoing: 0.0,
        vm: None,
        vm_cpu: None,
        sums: Vec::new(),
        short_lived: None,
        filesystems: Vec::new(),
        processes: Vec::new(),
    };
    let mut body = encode_sample(&sample, &mut Encoder::new().unwrap()).unwrap();
    body.resize(bytes, b'x');
    seal(&mut body);
    Queued {
        sequence,
        part: Part {
            id: format!("vm-1:{date}:3"),
            body: body.into(),
        },
    }
}

/// Corrects the checksum of an encoded sample.
fn seal(body: &mut [u8]) {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&body[..4]);
    crc.update(&body[8..]);
    body[4..8].copy_from_slice(&crc.finalize().to_le_bytes());
}

fn drain(spool: &mut Spool) -> Vec<u64> {
    let mut sequences = Vec::new();
    while let Some(queued) = spool.oldest().unwrap() {
        assert_eq!(queued, part(queued.sequence, queued.part.body.len()));
        spool.remove(queued.sequence);
        sequences.push(queued.sequence);
    }
    sequences
}

fn files(dir: &TempDir) -> Vec<String> {
    let entries = fs::read_dir(dir.path().join("spool")).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn spooled_parts_survive_a_restart_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let mut spool = open(&dir);
    for sequence in 0..3 {
        spool.push(&part(sequence, 200)).unwrap();
    }
    assert_eq!(spool.oldest().unwrap(), Some(part(0, 200)));
    spool.remove(0);
    drop(spool);

    let mut spool = open(&dir);
    assert_eq!(spool.next_sequence(), 3);
    spool.push(&part(3, 9000)).unwrap();
    assert_eq!(spool.waiting().load(Ordering::Relaxed), 3);
    assert_eq!(drain(&mut spool), [1, 2, 3]);
    assert_eq!(spool.waiting().load(Ordering::Relaxed), 0);
    assert_eq!(files(&dir), [LOCK]);
}

#[test]
fn full_spool_drops_oldest_parts() {
    let dir = tempfile::tempdir().unwrap();
    let mut spool = open_with(&dir, 4);
    for sequence in 0..6 {
        spool.push(&part(sequence, 100)).unwrap();
    }
    assert_eq!(files(&dir).len(), 4 + 1);
    // This sample part needs two blocks, so the two oldest ones are dropped.
    spool.push(&part(6, 4097)).unwrap();
    drop(spool);
    // A smaller size limit takes effect when the spool is opened.
    let mut spool = open_with(&dir, 3);
    assert_eq!(drain(&mut spool), [5, 6]);
}

#[test]
fn spool_files_damaged_by_a_crash_are_skipped() {
    let dir = tempfile::tempdir().unwrap();
    let mut spool = open(&dir);
    for sequence in 0..5 {
        spool.push(&part(sequence, 200)).unwrap();
    }
    let path = |sequence| dir.path().join("spool").join(file_name(sequence));
    drop(spool);
    fs::write(dir.path().join("spool").join(UNFINISHED), "half").unwrap();
    fs::write(path(0), "").unwrap();
    fs::write(path(1), &part(1, 200).part.body[..100]).unwrap();
    fs::write(path(2), vec![0; 200]).unwrap();
    fs::write(dir.path().join("spool/README"), "not ours").unwrap();

    let mut spool = open(&dir);
    fs::remove_file(path(3)).unwrap();
    assert_eq!(drain(&mut spool), [4]);
    assert_eq!(files(&dir), ["README", LOCK]);
}

#[test]
fn cloned_vm_drops_spooled_parts_of_the_original_vm() {
    let dir = tempfile::tempdir().unwrap();
    let mut spool = open(&dir);
    spool.push(&part(0, 200)).unwrap();
    drop(spool);
    let settings = SpoolSettings {
        dir: dir.path().join("spool"),
        limit: ByteSize(1 << 20),
    };
    let mut clone = Spool::open(
        &settings,
        "vm-2".parse().unwrap(),
        SpoolLock::take(&settings.dir).unwrap(),
    )
    .unwrap();
    assert_eq!(clone.oldest().unwrap(), None);
    assert_eq!(files(&dir), [LOCK]);
}

#[test]
fn spool_rejects_second_agent_and_unusable_folder() {
    let dir = tempfile::tempdir().unwrap();
    let first = open(&dir);
    let settings = SpoolSettings {
        dir: dir.path().join("spool"),
        limit: ByteSize(1 << 20),
    };
    let refused = open_at(&settings).unwrap_err();
    assert!(matches!(refused, SpoolError::Taken { .. }));
    assert!(
        refused
            .to_string()
            .starts_with("VMWATCH_AGENT_SPOOL_DIR: another agent uses ")
    );
    drop(first);
    open_at(&settings).unwrap();

    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let settings = SpoolSettings {
        dir: file,
        ..settings
    };
    let bad = open_at(&settings).unwrap_err();
    assert!(matches!(bad, SpoolError::Dir { .. }), "{bad}");
}

#[test]
fn part_written_twice_is_spooled_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut spool = open_with(&dir, 2);
    for sequence in [0, 1, 1, 1] {
        spool.push(&part(sequence, 200)).unwrap();
    }
    assert_eq!(drain(&mut spool), [1]);
    assert_eq!(spool.bytes, 0);
}

#[test]
fn failed_write_leaves_spool_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    let mut spool = open(&dir);
    spool.push(&part(0, 200)).unwrap();
    fs::create_dir(dir.path().join("spool").join(UNFINISHED)).unwrap();
    spool.push(&part(1, 200)).unwrap_err();
    fs::remove_dir(dir.path().join("spool").join(UNFINISHED)).unwrap();
    spool.push(&part(2, 200)).unwrap();
    assert_eq!(drain(&mut spool), [0, 2]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Performs random operations, including restarts, on the spool and on a list in memory, and compares the two.
    #[test]
    fn spool_behaves_like_a_bounded_queue(steps in proptest::collection::vec((0_u8..4, 100_usize..20_000), 1..40)) {
        let dir = tempfile::tempdir().unwrap();
        let (limit, mut spool) = (8, open_with(&dir, 8));
        let mut expected: Vec<(u64, u64)> = Vec::new();
        for (sequence, (step, bytes)) in (0..).zip(steps) {
            match step {
                0 => {
                    drop(spool);
                    spool = open_with(&dir, limit);
                }
                1 => {
                    let oldest = spool.oldest().unwrap().map(|queued| queued.sequence);
                    prop_assert_eq!(oldest, expected.first().map(|&(sequence, _)| sequence));
                    if let Some(oldest) = oldest {
                        spool.remove(oldest);
                        expected.remove(0);
                    }
                }
                _ => {
                    spool.push(&part(sequence, bytes)).unwrap();
                    expected.push((sequence, on_disk(bytes as u64) / BLOCK));
                    while expected.iter().map(|&(_, blocks)| blocks).sum::<u64>() > limit {
                        expected.remove(0);
                    }
                }
            }
        }
        let left: Vec<_> = expected.into_iter().map(|(sequence, _)| sequence).collect();
        prop_assert_eq!(drain(&mut spool), left);
    }
}
