use std::os::unix::fs::PermissionsExt;

use tempfile::TempDir;
use vmwatch_api::enrollment::JoinToken;

use super::*;

pub(crate) fn token(number: u8) -> JoinToken {
    JoinToken::from_random([number; 8], [number; 32])
}

fn instance() -> InstanceId {
    "vm-1".parse().unwrap()
}

fn dir(folder: &TempDir) -> IdentityDir {
    IdentityDir::new(folder.path().join("identity"))
}

fn record(key: &Key, number: u8) -> Record {
    Record {
        instance_id: instance(),
        public_key: key.public().clone(),
        platform: Some("dmi:6abf5a1e-b85c-4e5f-ba02-f96e22cbd02e".parse().unwrap()),
        join_token: token(number).id,
        answer: Enrolled {
            instance_id: instance(),
            nats_urls: vec!["nats://127.0.0.1:4222".to_owned()],
            ca_certificates: format!("PEM {number}"),
            utc_offset: "+08:00".parse().unwrap(),
            vm_interval_ms: 10_000,
            process_interval_ms: 60_000,
        },
    }
}

/// Enrols with the join token of this number.
pub(crate) fn enrolled(dir: &IdentityDir, number: u8) -> AgentKey {
    let locked = dir.lock().unwrap();
    let key = locked.key_for(&instance(), &token(number).id).unwrap();
    locked.store(&record(&key, number)).unwrap();
    key.public().clone()
}

fn key_of(dir: &IdentityDir) -> AgentKey {
    let identity = dir.load().unwrap().unwrap();
    assert_eq!(identity.record.public_key, *identity.key.public());
    identity.record.public_key
}

#[test]
fn enrolment_repeated_with_the_same_token_uses_the_same_key() {
    let folder = tempfile::tempdir().unwrap();
    let dir = dir(&folder);
    let key = |number: u8| {
        let locked = dir.lock().unwrap();
        locked
            .key_for(&instance(), &token(number).id)
            .unwrap()
            .public()
            .clone()
    };
    let first = key(1);
    assert_eq!(key(1), first, "the answer was lost");
    assert!(dir.load().unwrap().is_none());
    assert_eq!(enrolled(&dir, 1), first);
    assert_eq!(key(1), first, "the enrolment was complete");
    let second = key(2);
    assert_ne!(second, first);
    assert_eq!(
        key_of(&dir),
        first,
        "the old key counts until the new one is enrolled"
    );
    assert_eq!(enrolled(&dir, 2), second);
    assert_eq!(key_of(&dir), second);
}

#[test]
fn interrupted_enrolment_leaves_the_old_or_the_new_identity() {
    let folder = tempfile::tempdir().unwrap();
    let dir = dir(&folder);
    let first = enrolled(&dir, 1);
    let old_seed = fs::read(dir.path.join(SEED)).unwrap();
    let locked = dir.lock().unwrap();
    let key = locked.key_for(&instance(), &token(2).id).unwrap();
    let new_seed = fs::read(dir.path.join(NEW_SEED)).unwrap();
    assert_eq!(key_of(&dir), first);

    // A kill while a file is written leaves a part of it under a temporary name.
    fs::write(dir.path.join(".enrollment.json.partial"), "{").unwrap();
    assert_eq!(key_of(&dir), first);
    locked.store(&record(&key, 2)).unwrap();
    // A kill before the new seed got its final name.
    fs::write(dir.path.join(SEED), old_seed).unwrap();
    fs::write(dir.path.join(NEW_SEED), new_seed).unwrap();
    fs::write(dir.path.join(CA), "PEM 1").unwrap();
    assert_eq!(key_of(&dir), *key.public());
    assert_eq!(fs::read_to_string(dir.path.join(CA)).unwrap(), "PEM 2");
    assert!(!dir.path.join(NEW_SEED).exists());
    assert_eq!(key_of(&dir), *key.public());
}

#[test]
fn identity_is_readable_only_by_its_user_and_seed_is_not_in_debug_output() {
    let folder = tempfile::tempdir().unwrap();
    let dir = dir(&folder);
    enrolled(&dir, 1);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(&dir.path), 0o700);
    for name in [SEED, RECORD, CA, LOCK] {
        assert_eq!(mode(&dir.path.join(name)), 0o600, "{name}");
    }
    let identity = dir.load().unwrap().unwrap();
    let seed = fs::read_to_string(dir.path.join(SEED)).unwrap();
    let seed = seed.lines().next().unwrap();
    assert!(seed.starts_with("SU") && !format!("{identity:?}").contains(seed));
    assert!(!fs::read_to_string(dir.path.join(RECORD)).unwrap().contains(seed));
    assert_eq!(identity.key.into_seed(), seed);
}

#[test]
fn damaged_identity_is_reported_and_replaced_by_an_enrolment() {
    let folder = tempfile::tempdir().unwrap();
    let dir = dir(&folder);
    let first = enrolled(&dir, 1);
    fs::write(dir.path.join(SEED), "SUAM").unwrap();
    let error = dir.load().unwrap_err().to_string();
    assert!(error.contains("damaged") && error.contains("enroll"), "{error}");
    assert_ne!(enrolled(&dir, 1), first);
    fs::write(dir.path.join(RECORD), "{").unwrap();
    assert!(dir.load().is_err());
    enrolled(&dir, 1);
    assert!(dir.load().unwrap().is_some());
}

#[test]
fn second_enrolment_at_the_same_time_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let dir = dir(&folder);
    let _locked = dir.lock().unwrap();
    assert!(matches!(dir.lock().unwrap_err(), IdentityError::Busy));
}
