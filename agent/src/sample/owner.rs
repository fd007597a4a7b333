//! Attributes processes to their owners: a user, and a systemd unit or a container. All names come from files that every
//! user can read.

use std::{
    collections::{HashMap, HashSet},
    fs,
    io::Read,
    path::{Path, PathBuf},
    time::SystemTime,
};

use vmwatch_api::metrics::ProcessOwner;

use super::{cgroup::Container, command_line, proc_files::ProcFiles};

/// Maximum number of bytes that are read of the list of users.
const MAX_USERS_BYTES: u64 = 1 << 20;
/// Maximum number of containers whose names are kept.
const MAX_CONTAINERS: usize = 10_000;
/// Maximum length of a name in bytes.
const MAX_NAME: usize = 256;
/// Number of digits of a container's id that are reported if it has no name.
const SHORT_ID: usize = 12;

/// Reads the owners of processes, and keeps the names of users and containers.
#[derive(Debug)]
pub(super) struct Owners {
    users_file: PathBuf,
    users: HashMap<u32, String>,
    /// The modification time of the list of users when it was last read.
    users_read: Option<SystemTime>,
    logs: PathBuf,
    /// Names of containers by their id.
    containers: HashMap<String, String>,
    /// Containers that had no name when the names were last read.
    unnamed: HashSet<String>,
    command_lines: bool,
}

impl Owners {
    /// `root` is the root folder of the VM. Command lines are read only if `command_lines` is set.
    pub(super) fn new(root: &Path, command_lines: bool) -> Self {
        Self {
            users_file: root.join("etc/passwd"),
            users: HashMap::new(),
            users_read: None,
            logs: root.join("var/log/containers"),
            containers: HashMap::new(),
            unnamed: HashSet::new(),
            command_lines,
        }
    }

    /// Reads the names of users again if they have changed. The names of containers will be read again when a container
    /// without a known name is found.
    pub(super) fn refresh(&mut self) {
        self.unnamed.clear();
        let changed = fs::metadata(&self.users_file)
            .and_then(|file| file.modified())
            .ok();
        if changed != self.users_read {
            self.users_read = changed;
            self.users = read_users(&self.users_file);
        }
    }

    /// The owner of a process. A part that cannot be read, for example because the process has just ended, is missing.
    pub(super) fn of(&mut self, files: &mut ProcFiles, pid: u32, parent_pid: u32) -> ProcessOwner {
        let user = files.user_id(pid).map(|id| self.user(id));
        let place = files.place(pid).unwrap_or_default();
        let command_line = if self.command_lines {
            files.command_line(pid).and_then(command_line::reported)
        } else {
            None
        };
        ProcessOwner {
            user,
            parent_pid: Some(parent_pid),
            unit: place.unit.map(bounded),
            container: place.container.map(|container| self.container(container)),
            command_line,
            inherited: false,
        }
    }

    /// The name of a user, or the number if the list of users does not have it.
    pub(super) fn user(&self, id: u32) -> String {
        self.users.get(&id).cloned().unwrap_or_else(|| id.to_string())
    }

    fn container(&mut self, container: Container) -> String {
        let id = match container {
            Container::Named(name) => return bounded(name),
            Container::Id(id) => id,
        };
        if !self.containers.contains_key(&id) && self.unnamed.insert(id.clone()) && self.unnamed.len() == 1 {
            self.containers = read_containers(&self.logs);
        }
        let name = self.containers.get(&id).cloned();
        name.unwrap_or_else(|| id.get(..SHORT_ID).unwrap_or(&id).to_owned())
    }
}

fn bounded(mut name: String) -> String {
    name.truncate(name.floor_char_boundary(MAX_NAME));
    name
}

/// Reads the names of users from a file in the format of passwd(5). The names of a user directory such as LDAP are not
/// in it; these users are reported by their numbers.
fn read_users(file: &Path) -> HashMap<u32, String> {
    let mut content = Vec::new();
    let read = fs::File::open(file).and_then(|file| file.take(MAX_USERS_BYTES).read_to_end(&mut content));
    if read.is_err() {
        return HashMap::new();
    }
    let mut users = HashMap::new();
    for line in String::from_utf8_lossy(&content).lines() {
        let mut fields = line.split(':');
        if let (Some(name), Some(Ok(id))) = (fields.next(), fields.nth(1).map(str::parse)) {
            // The first of several names of a number counts, as for `ps`.
            users.entry(id).or_insert_with(|| bounded(name.to_owned()));
        }
    }
    users
}

/// Reads the names of Kubernetes containers from the names of their log files: `POD_NAMESPACE_CONTAINER-ID.log`.
fn read_containers(logs: &Path) -> HashMap<String, String> {
    let Ok(entries) = fs::read_dir(logs) else {
        return HashMap::new();
    };
    entries
        .take(MAX_CONTAINERS)
        .filter_map(|entry| {
            let name = entry.ok()?.file_name().into_string().ok()?;
            let (pod, id) = name.strip_suffix(".log")?.rsplit_once('-')?;
            let mut parts = pod.splitn(3, '_');
            let (pod, namespace, container) = (parts.next()?, parts.next()?, parts.next()?);
            Some((id.to_owned(), bounded(format!("{namespace}/{pod}/{container}"))))
        })
        .collect()
}
