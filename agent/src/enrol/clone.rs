//! Sets aside what a clone of a VM has of the original: the key, with which it would report as the original, and the
//! original's samples.

use std::{
    fs::{self, DirBuilder},
    io::{self, ErrorKind},
    os::unix::fs::DirBuilderExt,
    path::Path,
};

use vmwatch_api::enrollment::Platform;

use super::identity::IdentityDir;
use crate::spool;

/// Number of identities and number of spools that are kept; older ones are deleted.
const KEPT: usize = 2;
/// In the new identity folder, the file that says why it is empty.
const REASON: &str = "clone.txt";
const SAMPLES: &str = "samples";

/// Moves key and samples to folders with the suffix `.clone-TIME`, and leaves an empty identity folder. The samples are moved
/// first: until the key is moved, each start finds the clone again.
pub(super) fn set_aside(
    identity: &IdentityDir,
    spool: &Path,
    recorded: &Platform,
    now: &Platform,
    time: u64,
) -> io::Result<()> {
    let samples = spool::sample_files(spool)?;
    if !samples.is_empty() {
        let folder = spool.join(aside(SAMPLES, time));
        create(&folder)?;
        for file in samples {
            fs::rename(spool.join(&file), folder.join(&file))?;
        }
    }
    prune(spool, SAMPLES)?;
    let (parent, name) = (identity.path().parent(), identity.path().file_name());
    let (Some(parent), Some(name)) = (parent, name.and_then(|name| name.to_str())) else {
        return Err(io::Error::new(
            ErrorKind::InvalidInput,
            "the identity folder has no name",
        ));
    };
    fs::rename(identity.path(), parent.join(aside(name, time)))?;
    create(identity.path())?;
    fs::write(identity.path().join(REASON), reason(recorded, now))?;
    prune(parent, name)
}

/// The reason why an identity folder is empty, if a clone was found.
pub(super) fn recorded_reason(identity: &IdentityDir) -> Option<String> {
    fs::read_to_string(identity.path().join(REASON)).ok()
}

fn reason(recorded: &Platform, now: &Platform) -> String {
    format!(
        "this VM is a clone: it is {} to its platform, and the VM that was enrolled is {}",
        now.as_str(),
        recorded.as_str()
    )
}

fn aside(name: &str, time: u64) -> String {
    format!("{name}.clone-{time:010}")
}

fn create(folder: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(folder)
}

/// Deletes the oldest folders that were set aside.
fn prune(parent: &Path, name: &str) -> io::Result<()> {
    let prefix = format!("{name}.clone-");
    let mut folders = Vec::new();
    for entry in fs::read_dir(parent)? {
        let entry = entry?;
        if entry
            .file_name()
            .to_str()
            .is_some_and(|found| found.starts_with(&prefix))
        {
            folders.push(entry.path());
        }
    }
    folders.sort();
    let excess = folders.len().saturating_sub(KEPT);
    folders.into_iter().take(excess).try_for_each(fs::remove_dir_all)
}

#[cfg(test)]
mod tests {
    use super::{super::identity::tests::enrolled, *};

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn key_and_samples_of_a_clone_are_set_aside_and_only_the_newest_kept() {
        let folder = tempfile::tempdir().unwrap();
        let identity = IdentityDir::new(folder.path().join("identity"));
        let platforms = ["dmi:1", "dmi:2"].map(|text| text.parse::<Platform>().unwrap());
        let set_aside = |time: u64| set_aside(&identity, folder.path(), &platforms[0], &platforms[1], time);
        let mut keys = Vec::new();
        for time in 1..=3 {
            let sample = format!("{time:020}.sample");
            fs::write(folder.path().join(&sample), "x").unwrap();
            keys.push(enrolled(&identity, 1));
            set_aside(time).unwrap();
            assert!(!identity.is_enrolled() && identity.load().unwrap().is_none());
            let reason = recorded_reason(&identity).unwrap();
            assert!(reason.contains("dmi:1") && reason.contains("dmi:2"), "{reason}");
            let moved = folder.path().join(aside(SAMPLES, time));
            assert_eq!(names(&moved), [sample]);
        }
        let kept = [
            "identity",
            "identity.clone-0000000002",
            "identity.clone-0000000003",
            "samples.clone-0000000002",
            "samples.clone-0000000003",
        ];
        assert_eq!(names(folder.path()), kept);
        let old = IdentityDir::new(folder.path().join(kept[2]))
            .load()
            .unwrap()
            .unwrap();
        assert_eq!(old.record.public_key, keys[2]);
        assert_ne!(keys[1], keys[2], "the clone gets a key of its own");
    }
}
