use proptest::prelude::*;

use super::*;

/// The record of `sh -c '…; exit 3'`, as Linux 6.18 sent it.
const PROCESS: &[u8] = include_bytes!("process.bin");
/// The records of a process with three threads, one of which outlived the main thread, as Linux 6.18 sent them.
const THREADS: &[u8] = include_bytes!("threads.bin");
/// The place of the structure in a message: after the headers, and the attributes around pid and structure.
const PLACE: usize = HEADERS + 16;

fn records(bytes: &[u8]) -> Vec<Record> {
    messages(bytes)
        .map(|(_, message)| Record::parse(message).unwrap())
        .collect()
}

fn composed(records: Vec<Record>) -> Vec<Exit> {
    let mut composer = Composer::default();
    let at = Instant::now();
    records
        .into_iter()
        .filter_map(|record| composer.add(record, at, 1_482_236_600.0))
        .collect()
}

#[test]
fn record_of_a_process_is_read() {
    let exits = composed(records(PROCESS));
    assert_eq!(exits.len(), 1);
    let exit = &exits[0];
    assert_eq!((exit.pid, exit.parent_pid, exit.user), (15_488, 15_447, 0));
    assert_eq!((exit.name.as_str(), exit.code), ("sh", 3));
    assert_eq!(exit.cpu_seconds, 0.107_869_040);
    assert_eq!(exit.elapsed, Duration::from_micros(162_658));
    assert_eq!(exit.started(), 1_482_236_599.84);
}

#[test]
fn process_with_threads_is_counted_once_when_its_last_thread_ends() {
    let records = records(THREADS);
    assert_eq!(records.len(), 3);
    assert_eq!(composed(records[..2].to_vec()), []);
    let exits = composed(records);
    assert_eq!(exits.len(), 1);
    let exit = &exits[0];
    // The last thread was not the main one, which gave the process its name and its exit status.
    assert_eq!((exit.pid, exit.name.as_str(), exit.code), (15_489, "main", 5));
    assert_eq!(exit.cpu_seconds, 0.132_064_582);
    assert_eq!(exit.elapsed, Duration::from_micros(354_899));
}

#[test]
fn versions_with_an_unknown_layout_are_refused() {
    for (version, is_known) in [
        (11, false),
        (12, true),
        (13, true),
        (15, false),
        (16, true),
        (99, true),
    ] {
        let mut message = PROCESS.to_vec();
        message[PLACE..PLACE + 2].copy_from_slice(&u16::to_ne_bytes(version));
        let expected = if is_known {
            Ok(())
        } else {
            Err(RecordError::Version(version))
        };
        assert_eq!(Record::parse(&message).map(drop), expected);
    }
}

#[test]
fn exit_codes_are_those_of_shells() {
    assert_eq!([0, 0x300, 9, 0x8b].map(exit_code), [0, 3, 137, 139]);
}

#[test]
fn table_of_main_threads_is_bounded() {
    let mut composer = Composer::default();
    let main = records(THREADS)[1].clone();
    for pid in 0..10 * u32::try_from(MAX_LEADERS).unwrap() {
        let record = Record {
            pid,
            process: pid,
            ..main.clone()
        };
        assert_eq!(composer.add(record, Instant::now(), 0.0), None);
        assert!(composer.leaders.len() <= MAX_LEADERS);
    }
}

proptest! {
    #[test]
    fn parsing_damaged_messages_does_not_panic(
        places in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8), length in 0..=THREADS.len(),
    ) {
        let mut bytes = THREADS.to_vec();
        for (place, byte) in places {
            bytes[place.index(THREADS.len())] = byte;
        }
        for (_, message) in messages(&bytes[..length]) {
            let _ = Record::parse(message);
        }
    }
}
