//! Reads the files of processes in `/proc/<pid>`: `stat` and `io` for each row, and for a process that is new or has
//! changed also `status`, `cgroup` and `cmdline`.
//!
//! The `procfs` crate is not used because it is slower (35 µs per process): it decodes all 52 fields of `stat`, but a
//! process row needs only seven. The formats are described in proc(5) and by `do_task_stat` in the kernel's
//! `fs/proc/array.c`.

use std::{
    borrow::Cow,
    fmt::Write as _,
    io::{self, ErrorKind},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, OFlags, open, openat};

use super::{SampleError, cgroup::Place};

/// Maximum number of bytes that are read of a file. `stat` has 52 fields of at most 20 digits and a name, and `io` is
/// shorter; of the other files, the first bytes are sufficient.
const FILE_BYTES: usize = 8192;
/// Length at which the kernel truncates the name of a process (`TASK_COMM_LEN` without the terminating zero byte).
const COMM_BYTES: usize = 15;
/// Maximum length of a process name in bytes.
const MAX_NAME: usize = 256;

/// The pids of all processes, including zombies, as `ps` lists them.
pub(super) fn process_ids(proc: &Path) -> Result<Vec<u32>, SampleError> {
    let entries = std::fs::read_dir(proc).map_err(SampleError::List)?;
    entries
        .filter_map(|entry| match entry {
            Ok(entry) => entry.file_name().to_str()?.parse().ok().map(Ok),
            Err(error) => Some(Err(SampleError::List(error))),
        })
        .collect()
}

/// Reads the procfs files of processes into a buffer that is reused.
#[derive(Debug)]
pub(super) struct ProcFiles {
    root: PathBuf,
    /// An open descriptor of the folder `root`: opening a path relative to it is 10 % faster than from `/`.
    dir: OwnedFd,
    path: String,
    content: Box<[u8; FILE_BYTES]>,
}

impl ProcFiles {
    pub(super) fn new(root: PathBuf) -> io::Result<Self> {
        Ok(Self {
            dir: open(&root, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?,
            root,
            path: String::new(),
            content: Box::new([0; FILE_BYTES]),
        })
    }

    pub(super) fn exist(&self, pid: u32) -> bool {
        self.root.join(pid.to_string()).exists()
    }

    pub(super) fn stat(&mut self, pid: u32) -> io::Result<Stat<'_>> {
        Stat::parse(self.read(pid, "stat")?).ok_or_else(|| ErrorKind::InvalidData.into())
    }

    /// The bytes that the process read and wrote; `None` if they cannot be read, for example because the agent lacks
    /// privileges.
    pub(super) fn disk_bytes(&mut self, pid: u32) -> Option<DiskBytes> {
        self.read(pid, "io").ok().and_then(DiskBytes::parse)
    }

    /// The name of a process: the kernel's name, or the base name of its program if the kernel truncated it.
    pub(super) fn name(&mut self, pid: u32, comm: &[u8]) -> String {
        let full = (comm.len() == COMM_BYTES)
            .then(|| self.command_line(pid).and_then(|line| full_name(comm, line)))
            .flatten();
        full.unwrap_or_else(|| String::from_utf8_lossy(comm).into_owned())
    }

    /// The effective user id of a process.
    pub(super) fn user_id(&mut self, pid: u32) -> Option<u32> {
        let status = self.read(pid, "status").ok()?;
        let ids = status
            .split(|&byte| byte == b'\n')
            .find_map(|line| line.strip_prefix(b"Uid:"))?;
        let effective = ids
            .split(u8::is_ascii_whitespace)
            .filter(|id| !id.is_empty())
            .nth(1)?;
        u32::try_from(number(effective)?).ok()
    }

    /// The systemd unit and the container of a process.
    pub(super) fn place(&mut self, pid: u32) -> Option<Place> {
        let file = self.read(pid, "cgroup").ok()?;
        Some(Place::parse(&String::from_utf8_lossy(file)))
    }

    /// The arguments of a process, each followed by a zero byte.
    pub(super) fn command_line(&mut self, pid: u32) -> Option<&[u8]> {
        self.read(pid, "cmdline").ok()
    }

    fn read(&mut self, pid: u32, file: &str) -> io::Result<&[u8]> {
        self.path.clear();
        // The result is ignored because writing to a `String` cannot fail.
        let _ = write!(self.path, "{pid}/{file}");
        let file = openat(&self.dir, self.path.as_str(), OFlags::CLOEXEC, Mode::empty())?;
        // A single read is sufficient, because the kernel returns a file of this size at once.
        let length = rustix::io::read(&file, self.content.as_mut_slice())?;
        Ok(self.content.get(..length).unwrap_or_default())
    }
}

/// The base name of the program in `argv[0]`, up to the first space after the kernel's name; `None` if it does not begin
/// with the kernel's name, because the process has changed one of them.
fn full_name(comm: &[u8], command_line: &[u8]) -> Option<String> {
    let program = command_line.split(|&byte| byte == 0).next()?;
    let base = program.rsplit(|&byte| byte == b'/').next()?;
    let rest = base.strip_prefix(comm)?;
    let end = rest.iter().position(|&byte| byte == b' ').unwrap_or(rest.len());
    let mut name = String::from_utf8_lossy(base.get(..comm.len() + end)?).into_owned();
    name.truncate(name.floor_char_boundary(MAX_NAME));
    Some(name)
}

/// Whether the error means that the process has ended.
pub(super) fn is_gone(error: &io::Error) -> bool {
    error.kind() == ErrorKind::NotFound
        || error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error())
}

/// The fields of `/proc/<pid>/stat` that a process row needs.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Stat<'a> {
    /// The process name as in the file, where line breaks and backslashes are escaped as `\n` and `\\`.
    comm: &'a [u8],
    state: u8,
    pub(super) parent_pid: u32,
    threads: u64,
    /// CPU time of the process in user mode and kernel mode, in clock ticks.
    pub(super) cpu_ticks: u64,
    /// CPU time of the children that the process reaped, in clock ticks.
    pub(super) child_ticks: u64,
    /// Start time of the process, in clock ticks since boot.
    pub(super) start_ticks: u64,
    /// Resident memory of the process, in memory pages.
    pub(super) rss_pages: u64,
}

impl<'a> Stat<'a> {
    /// Parses the content of `/proc/<pid>/stat`; `None` if it does not have the format of proc(5).
    pub(super) fn parse(file: &'a [u8]) -> Option<Self> {
        // The process name may contain spaces and parentheses; the fields after it do not.
        let open = file.iter().position(|&byte| byte == b'(')?;
        let close = file.iter().rposition(|&byte| byte == b')')?;
        let comm = file.get(open + 1..close)?;
        let mut fields = file
            .get(close + 1..)?
            .split(u8::is_ascii_whitespace)
            .filter(|field| !field.is_empty());
        // `nth` skips fields. The numbers in the comments are the field numbers of proc(5).
        let state = *fields.next()?.first()?; // 3
        // A pid fits into 22 bits.
        let parent_pid = u32::try_from(number(fields.next()?)?).ok()?; // 4
        let user_ticks = number(fields.nth(9)?)?; // 14
        let system_ticks = number(fields.next()?)?; // 15
        let child_user_ticks = number(fields.next()?)?; // 16
        let child_system_ticks = number(fields.next()?)?; // 17
        let threads = number(fields.nth(2)?)?; // 20
        let start_ticks = number(fields.nth(1)?)?; // 22
        let rss = fields.nth(1)?; // 24, can be negative for a moment on older kernels
        let rss_pages = if rss.starts_with(b"-") { 0 } else { number(rss)? };
        Some(Self {
            comm,
            state,
            parent_pid,
            threads,
            cpu_ticks: user_ticks.saturating_add(system_ticks),
            child_ticks: child_user_ticks.saturating_add(child_system_ticks),
            start_ticks,
            rss_pages,
        })
    }

    /// Whether the process has ended and only waits for its parent to reap it. The state is the same if the main thread
    /// has ended while other threads run, but then the thread count is higher.
    pub(super) fn has_ended(&self) -> bool {
        matches!(self.state, b'Z' | b'X' | b'x') && self.threads <= 1
    }

    /// The kernel's name of the process, without escapes.
    pub(super) fn comm(&self) -> Cow<'a, [u8]> {
        if !self.comm.contains(&b'\\') {
            return Cow::Borrowed(self.comm);
        }
        let mut plain = Vec::with_capacity(self.comm.len());
        let mut bytes = self.comm.iter().copied().peekable();
        while let Some(byte) = bytes.next() {
            let escaped = match (byte, bytes.peek()) {
                (b'\\', Some(b'n')) => b'\n',
                (b'\\', Some(b'\\')) => b'\\',
                _ => {
                    plain.push(byte);
                    continue;
                }
            };
            plain.push(escaped);
            bytes.next();
        }
        Cow::Owned(plain)
    }
}

/// The bytes that a process read from disks and wrote to disks, according to `/proc/<pid>/io`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DiskBytes {
    pub(super) read: u64,
    pub(super) written: u64,
}

impl DiskBytes {
    /// Parses the content of `/proc/<pid>/io`; `None` if a line is missing.
    pub(super) fn parse(file: &[u8]) -> Option<Self> {
        let value = |key: &[u8]| {
            file.split(|&byte| byte == b'\n')
                .find_map(|line| line.strip_prefix(key))
                .and_then(|value| number(value.trim_ascii()))
        };
        Some(Self {
            read: value(b"read_bytes:")?,
            written: value(b"write_bytes:")?,
        })
    }
}

fn number(digits: &[u8]) -> Option<u64> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const REST: &str = "S 1 475071 475071 34826 475071 4194304 94 0 0 0 12 30 4 5 20 0 3 0 201288208 5738496 225 \
                        18446744073709551615 1 1 0 0 0 0 0 0 0 0 0 0 17 4 0 0 0 0 0 0 0 0 0 0 0 0 0";

    #[test]
    fn stat_fields_are_parsed_as_proc_man_page_describes() {
        let file = format!("475071 (cat) {REST}\n");
        let stat = Stat::parse(file.as_bytes()).unwrap();
        assert_eq!((&*stat.comm(), stat.parent_pid), (&b"cat"[..], 1));
        assert_eq!(
            (stat.cpu_ticks, stat.start_ticks, stat.rss_pages),
            (42, 201_288_208, 225)
        );
        assert_eq!(stat.child_ticks, 9);
        assert!(!stat.has_ended());
    }

    #[test]
    fn process_name_with_any_characters_is_parsed() {
        for (comm, name) in [
            (&b"a) S 1 (b"[..], "a) S 1 (b"),
            (b")", ")"),
            (b"", ""),
            (b"two words", "two words"),
            (b"tab\there", "tab\there"),
            (br"back\\slash\nline", "back\\slash\nline"),
            (br"\\n", "\\n"),
            (b"bad \xff\xfe", "bad \u{fffd}\u{fffd}"),
            ("进程".as_bytes(), "进程"),
            // The kernel truncates names to 15 bytes, which can cut a character.
            (&"进程进程进".as_bytes()[..14], "进程进程\u{fffd}"),
        ] {
            let file = [b"7 (", comm, b") ", REST.as_bytes()].concat();
            let stat = Stat::parse(&file).unwrap();
            assert_eq!(String::from_utf8_lossy(&stat.comm()), name);
            assert_eq!(stat.start_ticks, 201_288_208);
        }
    }

    #[test]
    fn truncated_name_is_completed_from_the_program() {
        let long = "x".repeat(400);
        let path = format!("/opt/{long}");
        for (comm, command_line, name) in [
            (
                "systemd-journal",
                "/lib/systemd/systemd-journald\0",
                Some("systemd-journald"),
            ),
            (
                "systemd-journal",
                "systemd-journald\0--flag\0",
                Some("systemd-journald"),
            ),
            (
                "gnome-session-b",
                "/usr/libexec/gnome-session-binary --session=x\0",
                Some("gnome-session-binary"),
            ),
            (
                "my long program",
                "/opt/my dir/my long programs here\0",
                Some("my long programs"),
            ),
            (
                "fifteen-letters",
                "/bin/fifteen-letters\0",
                Some("fifteen-letters"),
            ),
            ("systemd-journal", "/bin/other\0", None),
            ("kworker/u8:3-ev", "", None),
            ("xxxxxxxxxxxxxxx", &path, Some(&long[..256])),
        ] {
            assert_eq!(
                full_name(comm.as_bytes(), command_line.as_bytes()).as_deref(),
                name,
                "{command_line}"
            );
        }
        // The kernel cut the name within a character.
        let name = "进程进程进程".as_bytes();
        assert_eq!(full_name(&name[..15], name).as_deref(), Some("进程进程进程"));
    }

    #[test]
    fn zombie_process_has_ended_unless_other_threads_run() {
        let zombie = format!("7 (z) {}", REST.replacen('S', "Z", 1));
        assert!(!Stat::parse(zombie.as_bytes()).unwrap().has_ended());
        let alone = zombie.replace("20 0 3 0", "20 0 1 0");
        assert!(Stat::parse(alone.as_bytes()).unwrap().has_ended());
    }

    #[test]
    fn malformed_proc_files_are_rejected() {
        for file in [
            "",
            "7",
            "7 (",
            "7 (cat",
            "7 )cat(",
            "7 (cat) S 1 2 3",
            "7 (cat) S 1 x",
        ] {
            assert_eq!(Stat::parse(file.as_bytes()), None, "{file}");
        }
        let negative = format!("7 (cat) {}", REST.replace(" 225 ", " -3 "));
        assert_eq!(Stat::parse(negative.as_bytes()).unwrap().rss_pages, 0);
    }

    #[test]
    fn only_bytes_read_from_or_written_to_disk_are_counted() {
        let file = b"rchar: 1\nwchar: 2\nsyscr: 3\nsyscw: 4\nread_bytes: 4096\nwrite_bytes: 8192\n\
                     cancelled_write_bytes: 5\n";
        let bytes = DiskBytes {
            read: 4096,
            written: 8192,
        };
        assert_eq!(DiskBytes::parse(file), Some(bytes));
        for malformed in [&b""[..], b"read_bytes: 1\n", b"read_bytes: x\nwrite_bytes: 1\n"] {
            assert_eq!(DiskBytes::parse(malformed), None);
        }
    }

    proptest! {
        #[test]
        fn process_name_and_counters_round_trip_through_stat_format(
            comm in proptest::collection::vec(any::<u8>(), 0..64),
            user in 0..u64::MAX / 2, system in 0..u64::MAX / 2, start: u64, pages in 0..i64::MAX,
        ) {
            // The test escapes names as the kernel does (proc_task_name in fs/proc/array.c).
            let mut escaped = Vec::new();
            for &byte in &comm {
                match byte {
                    b'\n' => escaped.extend(br"\n"),
                    b'\\' => escaped.extend(br"\\"),
                    _ => escaped.push(byte),
                }
            }
            let numbers = format!(") R 1 1 1 0 -1 4194304 94 0 0 0 {user} {system} 0 0 20 0 1 0 {start} 57 {pages} 18\n");
            let file = [b"1 (", &escaped[..], numbers.as_bytes()].concat();
            let stat = Stat::parse(&file).unwrap();
            prop_assert_eq!(&*stat.comm(), &comm);
            prop_assert_eq!(stat.cpu_ticks, user + system);
            prop_assert_eq!(stat.start_ticks, start);
            prop_assert_eq!(stat.rss_pages, pages.unsigned_abs());
        }

        #[test]
        fn parsing_arbitrary_proc_files_does_not_panic(file in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = Stat::parse(&file).map(|stat| stat.comm().len());
            let _ = DiskBytes::parse(&file);
        }
    }
}
