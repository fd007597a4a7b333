//! The rows of the table: filtered, grouped and sorted processes.

use std::{cmp::Ordering, collections::BTreeMap};

use crate::{
    answers::{Process, Timestamp},
    commands::ps::full_name,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sort {
    Cpu,
    Mem,
    Disk,
    Pid,
    Name,
}

/// The property by which processes are grouped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Group {
    Name,
    Unit,
    User,
}

impl Group {
    /// The grouping after this one, when the user presses the key again.
    pub(crate) const fn next(current: Option<Self>) -> Option<Self> {
        match current {
            None => Some(Self::Name),
            Some(Self::Name) => Some(Self::Unit),
            Some(Self::Unit) => Some(Self::User),
            Some(Self::User) => None,
        }
    }

    pub(crate) const fn title(self) -> &'static str {
        match self {
            Self::Name => "name",
            Self::Unit => "unit",
            Self::User => "user",
        }
    }

    fn key(self, process: &Process) -> String {
        match self {
            Self::Name => process.name.clone(),
            Self::Unit => process
                .unit
                .clone()
                .or_else(|| process.container.clone())
                .unwrap_or_else(|| "-".to_owned()),
            Self::User => process.user.clone().unwrap_or_else(|| "-".to_owned()),
        }
    }
}

/// How the processes of a table are shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct View {
    pub(crate) sort: Sort,
    /// Whether the usual order is reversed: descending for usage, ascending for names and pids.
    pub(crate) reversed: bool,
    pub(crate) group: Option<Group>,
    /// Only processes with this text in name, user, unit, container or command line; case does not matter.
    pub(crate) filter: String,
}

impl Default for View {
    fn default() -> Self {
        Self {
            sort: Sort::Cpu,
            reversed: false,
            group: None,
            filter: String::new(),
        }
    }
}

/// A process, several that are summed in one row, or a group.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Row {
    /// Identifies the row in other tables of the VM.
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) pid: Option<u32>,
    /// Number of processes; `None` if unknown.
    pub(crate) count: Option<u32>,
    pub(crate) user: Option<String>,
    pub(crate) unit: Option<String>,
    pub(crate) cpu: f64,
    pub(crate) mem: f64,
    pub(crate) read: f64,
    pub(crate) write: f64,
    pub(crate) started_at: Option<Timestamp>,
    pub(crate) has_ended: bool,
    /// What is known about a single process, for the line of details.
    pub(crate) details: String,
}

impl View {
    pub(crate) fn rows(&self, processes: &[Process]) -> Vec<Row> {
        let filter = self.filter.to_lowercase();
        let matching = processes.iter().filter(|process| matches(process, &filter));
        let mut rows: Vec<Row> = match self.group {
            None => matching.map(row).collect(),
            Some(group) => grouped(matching, group),
        };
        rows.sort_by(|a, b| {
            let order = self.sort.compare(a, b);
            let order = if self.reversed { order.reverse() } else { order };
            order.then_with(|| a.id.cmp(&b.id))
        });
        rows
    }
}

impl Sort {
    fn compare(self, a: &Row, b: &Row) -> Ordering {
        match self {
            Self::Cpu => b.cpu.total_cmp(&a.cpu),
            Self::Mem => b.mem.total_cmp(&a.mem),
            Self::Disk => (b.read + b.write).total_cmp(&(a.read + a.write)),
            // Rows of several processes have no pid and come last.
            Self::Pid => a.pid.unwrap_or(u32::MAX).cmp(&b.pid.unwrap_or(u32::MAX)),
            Self::Name => a.name.cmp(&b.name),
        }
    }
}

fn matches(process: &Process, filter: &str) -> bool {
    let texts = [
        &process.user,
        &process.unit,
        &process.container,
        &process.command_line,
    ];
    let texts = texts.into_iter().flatten().chain([&process.name]);
    filter.is_empty() || texts.into_iter().any(|text| text.to_lowercase().contains(filter))
}

fn row(process: &Process) -> Row {
    let started = process
        .started_at
        .map(|at| at.0.as_millisecond())
        .unwrap_or_default();
    let id = match process.pid {
        Some(pid) => format!("{pid}.{started}"),
        None => format!("{}.{}", process.name, process.user.as_deref().unwrap_or_default()),
    };
    Row {
        id,
        name: process.name.clone(),
        pid: process.pid,
        count: process.processes,
        user: process.user.clone(),
        unit: process.unit.clone().or_else(|| process.container.clone()),
        cpu: process.cpu_util,
        mem: process.mem,
        read: process.disk_read,
        write: process.disk_write,
        started_at: process.started_at,
        has_ended: process.ended_at.is_some(),
        details: details(process),
    }
}

fn details(process: &Process) -> String {
    let mut parts = vec![full_name(process)];
    let mut add = |title: &str, value: Option<String>| {
        parts.extend(value.map(|value| format!("{title} {value}")));
    };
    add("pid", process.pid.map(|pid| pid.to_string()));
    add("parent", process.parent_pid.map(|pid| pid.to_string()));
    add("user", process.user.clone());
    add("unit", process.unit.clone());
    add("container", process.container.clone());
    parts.join("  ")
}

fn grouped<'a>(processes: impl Iterator<Item = &'a Process>, group: Group) -> Vec<Row> {
    let mut groups: BTreeMap<String, Row> = BTreeMap::new();
    for process in processes {
        let name = group.key(process);
        let row = groups.entry(name.clone()).or_insert_with(|| Row {
            id: name.clone(),
            details: name.clone(),
            name,
            pid: None,
            count: Some(0),
            user: None,
            unit: None,
            cpu: 0.0,
            mem: 0.0,
            read: 0.0,
            write: 0.0,
            started_at: None,
            has_ended: false,
        });
        row.count = row
            .count
            .zip(process.processes)
            .map(|(sum, count)| sum.saturating_add(count));
        row.cpu += process.cpu_util;
        row.mem += process.mem;
        row.read += process.disk_read;
        row.write += process.disk_write;
    }
    groups.into_values().collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::json;

    use super::*;

    /// A process of a table.
    pub(crate) fn process(name: &str, pid: Option<u32>, cpu: f64, user: &str, unit: Option<&str>) -> Process {
        serde_json::from_value(json!({ "processes": pid.map_or(5471, |_| 1), "name": name, "pid": pid, "cpu_util": cpu,
            "mem": 1.5, "disk_read": 0.0, "disk_write": 2048.0, "started_at": pid.map(|_| "2026-11-27T13:00:00Z"),
            "ended_at": null, "exit_code": null, "user": user, "parent_pid": 1, "unit": unit, "container": null,
            "command_line": null }))
        .unwrap()
    }

    fn table() -> Vec<Process> {
        vec![
            process("nginx", Some(30), 5.0, "www", Some("nginx.service")),
            process("nginx", Some(20), 5.0, "www", Some("nginx.service")),
            process("postgres", Some(10), 120.5, "postgres", None),
            process("sh", None, 51.9, "root", None),
        ]
    }

    fn shown(view: &View) -> Vec<String> {
        let rows = view.rows(&table());
        rows.iter()
            .map(|row| format!("{} {:?} {:.1}", row.name, row.count, row.cpu))
            .collect()
    }

    #[test]
    fn rows_are_sorted_with_a_stable_order() {
        let names = |sort, reversed| {
            let view = View {
                sort,
                reversed,
                ..View::default()
            };
            let rows = view.rows(&table());
            rows.iter().map(|row| row.pid.unwrap_or(0)).collect::<Vec<_>>()
        };
        assert_eq!(names(Sort::Cpu, false), [10, 0, 20, 30]);
        assert_eq!(names(Sort::Cpu, true), [20, 30, 0, 10]);
        assert_eq!(names(Sort::Pid, false), [10, 20, 30, 0]);
        assert_eq!(names(Sort::Name, false), [20, 30, 10, 0]);
    }

    #[test]
    fn groups_sum_up_their_processes() {
        let group = |group| View {
            group,
            ..View::default()
        };
        assert_eq!(
            shown(&group(Some(Group::Name))),
            [
                "postgres Some(1) 120.5",
                "sh Some(5471) 51.9",
                "nginx Some(2) 10.0"
            ]
        );
        assert_eq!(
            shown(&group(Some(Group::Unit))),
            ["- Some(5472) 172.4", "nginx.service Some(2) 10.0"]
        );
        assert_eq!(shown(&group(Some(Group::User))).len(), 3);
        let mut current = None;
        let cycle = [(); 4].map(|()| {
            current = Group::next(current);
            current.map(Group::title)
        });
        assert_eq!(cycle, [Some("name"), Some("unit"), Some("user"), None]);
    }

    #[test]
    fn filter_finds_texts_in_all_properties() {
        let filtered = |filter: &str| {
            let view = View {
                filter: filter.to_owned(),
                ..View::default()
            };
            view.rows(&table()).len()
        };
        let counts = ["", "NGINX", "service", "root", "postgres", "none"].map(filtered);
        assert_eq!(counts, [4, 2, 2, 1, 1, 0]);
    }
}
