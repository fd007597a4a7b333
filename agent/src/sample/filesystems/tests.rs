//! Tests with filesystems made for the purpose, some of which never answer.

use std::{
    fs,
    sync::{Condvar, Mutex},
};

use super::*;

/// Time limit of samples in which something hangs. All others answer within it, however busy the machine is.
const SHORT: Duration = Duration::from_secs(2);
/// Time limit of samples in which nothing hangs. It is not reached.
const LONG: Duration = Duration::from_mins(1);

/// Filesystems made for the purpose, some of which hang.
#[derive(Default)]
struct Filesystems {
    hanging: Mutex<HashSet<PathBuf>>,
    changed: Condvar,
    calls: Mutex<Vec<PathBuf>>,
}

impl Filesystems {
    fn hang(&self, mount_points: &[&str]) {
        *self.hanging.lock().unwrap() = mount_points.iter().map(PathBuf::from).collect();
        self.changed.notify_all();
    }

    fn measure(&self, path: &Path) -> io::Result<Space> {
        self.calls.lock().unwrap().push(path.to_owned());
        let hanging = self.hanging.lock().unwrap();
        drop(
            self.changed
                .wait_while(hanging, |hanging| hanging.contains(path))
                .unwrap(),
        );
        match path.to_str().unwrap() {
            "/unreadable" => Err(io::ErrorKind::PermissionDenied.into()),
            "/empty" => Ok(Space { used: 0, total: 0 }),
            _ => Ok(Space { used: 3, total: 8 }),
        }
    }

    /// The number of calls about a filesystem.
    fn calls_of(&self, mount_point: &str) -> usize {
        let calls = self.calls.lock().unwrap();
        calls.iter().filter(|path| **path == *mount_point).count()
    }
}

struct Fixture {
    filesystems: Arc<Filesystems>,
    sampler: FilesystemSampler,
    folder: tempfile::TempDir,
}

impl Fixture {
    fn new(local: &[&str], network: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let filesystems = Arc::new(Filesystems::default());
        let measured = Arc::clone(&filesystems);
        let list = folder.path().join("mountinfo");
        let sampler = FilesystemSampler::with_measure(
            list,
            "/".into(),
            Arc::new(move |path: &Path| measured.measure(path)),
        );
        let fixture = Self {
            filesystems,
            sampler,
            folder,
        };
        fixture.mount(local, network);
        fixture
    }

    fn mount(&self, local: &[&str], network: &[&str]) {
        let local = local.iter().map(|path| (path, "8", "ext4"));
        let network = network.iter().map(|path| (path, "0", "nfs4"));
        let lines = (1..)
            .zip(local.chain(network))
            .map(|(number, (path, major, kind))| {
                format!("{number} 1 {major}:{number} / {path} rw - {kind} source rw\n")
            });
        fs::write(self.folder.path().join("mountinfo"), lines.collect::<String>()).unwrap();
    }

    fn read(&mut self, limit: Duration) -> Vec<String> {
        let rows = self.sampler.read(limit);
        rows.into_iter().map(|row| row.mount_point).collect()
    }

    /// Ends all hanging calls, and waits until their answers have arrived.
    fn end_hanging(&mut self) {
        self.filesystems.hang(&[]);
        while !self.sampler.calls.is_empty() {
            let answer = self.sampler.answers.recv_timeout(LONG).unwrap();
            self.sampler.returned(&answer);
        }
    }
}

#[test]
fn filesystem_that_never_answers_delays_no_other_and_is_called_once() {
    let mut fixture = Fixture::new(&["/"], &["/dead", "/nfs"]);
    fixture.filesystems.hang(&["/dead"]);
    assert_eq!(fixture.read(SHORT), ["/", "/nfs"]);
    // Nothing is waited for any more, so the limit is not reached.
    assert_eq!(fixture.read(LONG), ["/", "/nfs"]);
    assert_eq!(fixture.read(LONG), ["/", "/nfs"]);
    assert_eq!(fixture.filesystems.calls_of("/dead"), 1);
    fixture.end_hanging();
    assert_eq!(fixture.read(LONG), ["/", "/dead", "/nfs"]);
    assert_eq!(fixture.filesystems.calls_of("/dead"), 2);
}

#[test]
fn hanging_network_filesystems_leave_a_thread_for_local_ones() {
    let dead: Vec<String> = (0..20).map(|number| format!("/dead-{number:02}")).collect();
    let dead: Vec<&str> = dead.iter().map(String::as_str).collect();
    let mut fixture = Fixture::new(&["/", "/var"], &dead);
    fixture.filesystems.hang(&dead);
    for _ in 0..3 {
        assert_eq!(fixture.read(SHORT), ["/", "/var"]);
        assert_eq!(fixture.sampler.calls.len(), NETWORK_CALLS);
    }
    let calls = fixture.filesystems.calls.lock().unwrap().len();
    assert_eq!(calls, NETWORK_CALLS + 3 * 2);
    fixture.end_hanging();
    assert_eq!(fixture.read(LONG).len(), 22);
}

#[test]
fn filesystems_beyond_the_limit_unreadable_and_empty_ones_have_no_rows() {
    let mut fixture = Fixture::new(&["/", "/unreadable", "/empty"], &[]);
    assert_eq!(fixture.read(LONG), ["/"]);
    assert!(
        fixture
            .sampler
            .logged
            .contains(&Problem::Unreadable("/unreadable".into()))
    );
    let many: Vec<String> = (0..100).map(|number| format!("/{number:03}")).collect();
    let mut many: Vec<&str> = many.iter().map(String::as_str).collect();
    let long = format!("/{}", "x".repeat(MOUNT_POINT_BYTES));
    many.push(&long);
    fixture.mount(&many, &["/nfs"]);
    let rows = fixture.read(LONG);
    assert_eq!(rows, many[..SAMPLE_FILESYSTEMS]);
    assert_eq!(
        fixture.sampler.logged,
        HashSet::from([Problem::TooMany, Problem::TooLong])
    );
    fixture.mount(&["/"], &[]);
    assert_eq!(fixture.read(LONG), ["/"]);
    assert!(fixture.sampler.logged.is_empty());
}

#[test]
fn space_of_a_real_filesystem_is_that_of_the_kernel() {
    let Space { used, total } = space(Path::new("/")).unwrap();
    assert!(used > 0 && used <= total, "{used} of {total}");
    assert!(space(Path::new("/no such folder")).is_err());
}
