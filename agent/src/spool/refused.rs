//! The folder with sample parts that NATS will never accept, such as one that is too large. The agent sends the following
//! parts, and keeps the newest refused ones for an administrator.

use std::{
    fs::{self, DirBuilder},
    io::{self, ErrorKind},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use vmwatch_api::time::unix_millis;

use crate::parts::Part;

const FOLDER: &str = "refused";
/// Number of sample parts that are kept, each of at most 512 KiB.
const KEPT: usize = 16;

#[derive(Debug)]
pub(super) struct Refused {
    dir: PathBuf,
    /// Distinguishes parts of one millisecond.
    count: u64,
}

impl Refused {
    pub(super) fn new(spool: &Path) -> Self {
        Self {
            dir: spool.join(FOLDER),
            count: 0,
        }
    }

    /// Writes the part to a file. Returns the file's path.
    pub(super) fn keep(&mut self, part: &Part) -> io::Result<PathBuf> {
        match DirBuilder::new().mode(0o700).create(&self.dir) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        self.make_room()?;
        self.count += 1;
        let name = format!("{:014}-{:06}.sample", unix_millis(), self.count);
        let path = self.dir.join(name);
        fs::write(&path, &part.body)?;
        Ok(path)
    }

    fn make_room(&self) -> io::Result<()> {
        let entries = fs::read_dir(&self.dir)?.map(|entry| Ok(entry?.path()));
        let mut files = entries.collect::<io::Result<Vec<_>>>()?;
        files.sort();
        let excess = (files.len() + 1).saturating_sub(KEPT);
        files.into_iter().take(excess).try_for_each(fs::remove_file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_newest_refused_parts_are_kept() {
        let spool = tempfile::tempdir().unwrap();
        let mut refused = Refused::new(spool.path());
        let part = |number: usize| Part {
            id: String::new(),
            body: number.to_string().into(),
        };
        let paths: Vec<_> = (0..KEPT + 3)
            .map(|number| refused.keep(&part(number)).unwrap())
            .collect();
        let (deleted, kept) = paths.split_at(3);
        assert!(deleted.iter().all(|path| !path.exists()));
        for (path, number) in kept.iter().zip(3_usize..) {
            assert_eq!(fs::read_to_string(path).unwrap(), number.to_string());
        }
    }
}
