//! Runs a real agent on this machine and compares the rows that the gateway returns with the values in `/proc`.

use std::{
    collections::HashSet,
    fs,
    os::unix::fs::symlink,
    process::Command,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};
use testkit::{Gateway, PATIENCE, Process, Program, Spec, Stack, THIS_MACHINE, codes, eventually};
use vmwatch_api::{Role, Scope, agents::status_subject};

use crate::rest::client::Api;

/// Reads the rows of this machine through the gateway, as an API client does.
struct Reader<'a> {
    gateway: &'a Gateway,
    session: String,
}

impl Reader<'_> {
    async fn rows(&self, method: u32, name: Option<&str>) -> Vec<Value> {
        let data = json!({ "instance_id": THIS_MACHINE, "proc_name": name });
        self.gateway.rows(&self.session, method, 1000, data).await
    }

    async fn named(&self, name: &str) -> Vec<Value> {
        self.rows(codes::PROCESSES_BY_NAME, Some(name)).await
    }

    /// Returns all process rows and the VM row that have the same date as the newest row of the process `name`.
    async fn sample_with(&self, name: &str) -> Result<(Vec<Value>, Value), String> {
        let date = self.named(name).await.swap_remove(0)["create_date"].take();
        let of_date = |rows: Vec<Value>| {
            rows.into_iter()
                .filter(|row| row["create_date"] == date)
                .collect::<Vec<_>>()
        };
        let vm = of_date(self.rows(codes::VM, None).await)
            .pop()
            .ok_or("the VM has no row")?;
        Ok((of_date(self.rows(codes::PROCESSES, None).await), vm))
    }
}

fn number(row: &Value, key: &str) -> f64 {
    row[key]
        .as_f64()
        .unwrap_or_else(|| panic!("{key} is not a number: {row}"))
}

fn now() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs_f64()
}

/// Returns the fields of `/proc/<pid>/stat` that follow the process name. The name is skipped because it may contain
/// spaces and parentheses.
fn stat(pid: u32) -> Vec<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields = stat.rsplit_once(')').unwrap().1.split_whitespace();
    fields.map(|field| field.parse().unwrap_or(0)).collect()
}

/// Returns a process's start time and its used CPU seconds, from fields 22, 14 and 15 of `/proc/<pid>/stat` (see
/// proc(5)).
fn started_and_used(pid: u32) -> (f64, f64) {
    let fields = stat(pid);
    let seconds = |ticks: u64| Duration::from_millis(ticks * 10).as_secs_f64();
    let uptime = fs::read_to_string("/proc/uptime").unwrap();
    let uptime: f64 = uptime.split_whitespace().next().unwrap().parse().unwrap();
    (
        now() - uptime + seconds(fields[19]),
        seconds(fields[11] + fields[12]),
    )
}

fn memory_in_use() -> f64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let of = |key: &str| -> f64 {
        let line = text.lines().find(|line| line.starts_with(key)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    100.0 * (1.0 - of("MemAvailable:") / of("MemTotal:"))
}

/// Starts a process with a unique name that uses one CPU core until it is killed.
fn burn(folder: &std::path::Path) -> (Process, String) {
    // The kernel truncates process names to 15 bytes.
    let name = format!("burn-{}", std::process::id());
    let program = folder.join(&name);
    symlink("/bin/sh", &program).unwrap();
    let process = Process::start(Spec {
        name: name.clone(),
        program,
        args: vec!["-c".to_owned(), "while :; do :; done".to_owned()],
        env: Vec::new(),
        log: folder.join("burner.log"),
    });
    (process, name)
}

#[tokio::test]
async fn agent_reports_process_until_it_ends() {
    let stack = Stack::builder()
        .replicas(Program::Agent, 1)
        .replicas(Program::Lifecycle, 0)
        .start()
        .await;
    let reader = Reader {
        gateway: stack.gateway(0),
        session: stack.session(Role::Viewer, Scope::All).await,
    };
    let folder = tempfile::tempdir().unwrap();
    let (burner, name) = burn(folder.path());

    let row = eventually("a row shows the process's CPU use", PATIENCE, async || {
        let (started, used) = started_and_used(burner.id());
        let average = 100.0 * used / (now() - started);
        let rows = reader.named(&name).await;
        let as_much = |row: &&Value| number(row, "cpu_util") > f64::max(average / 2.0, 1.0);
        rows.iter()
            .find(as_much)
            .cloned()
            .ok_or_else(|| format!("{average} % on average, and {rows:?}"))
    })
    .await;
    assert_eq!((&row["cmd"], &row["pid"]), (&json!(name), &json!(burner.id())));
    assert_eq!(
        (&row["instance_id"], &row["shutdown_time"]),
        (&json!(THIS_MACHINE), &Value::Null)
    );
    let (running_time, (started, _)) = (number(&row, "running_time"), started_and_used(burner.id()));
    // The kernel reports its boot time in whole seconds, so the start time may differ by up to one second.
    assert!(
        (running_time - started).abs() < 1.1,
        "{running_time} and {started}"
    );

    let sample = eventually("VM and process rows are stored", PATIENCE, async || {
        reader.sample_with(&name).await
    })
    .await;
    assert_sample_of_this_machine(&sample.0, &sample.1, burner.id());
    assert_filesystems_of_this_machine(&stack).await;

    let before_end = now();
    burner.kill9();
    let after_end = now();
    let last = eventually("a row shows the process's shutdown", PATIENCE, async || {
        let newest = reader.named(&name).await.swap_remove(0);
        if newest["shutdown_time"].is_null() {
            Err(newest.to_string())
        } else {
            Ok(newest)
        }
    })
    .await;
    let shutdown = number(&last, "shutdown_time");
    assert!(
        shutdown >= before_end - 0.1 && shutdown <= after_end + 10.0,
        "{before_end} {shutdown}"
    );
    assert_eq!(
        (&last["pid"], &last["running_time"]),
        (&row["pid"], &row["running_time"])
    );

    // This row must be the last row of the process: later samples must not contain the process.
    let newest_vm = async || reader.rows(codes::VM, None).await[0]["create_date"].clone();
    for _ in 0..3 {
        let before = newest_vm().await;
        eventually("the agent's next sample is stored", PATIENCE, async || {
            if newest_vm().await == before {
                Err("the newest sample has not changed".to_owned())
            } else {
                Ok(())
            }
        })
        .await;
    }
    let all = reader.named(&name).await;
    assert_eq!(all[0], last);
    assert!(
        all[1..].iter().all(|row| row["shutdown_time"].is_null()),
        "only the newest row has a shutdown time: {all:?}"
    );
    assert!(
        all.iter().all(|row| row["running_time"] == last["running_time"]),
        "all rows have the same start time: {all:?}"
    );
    assert!(
        all.iter().all(|row| number(row, "cpu_util") <= 110.0),
        "a single-threaded process uses at most one core: {all:?}"
    );
    let dates: HashSet<_> = all.iter().map(|row| row["create_date"].to_string()).collect();
    assert_eq!(dates.len(), all.len(), "each sample contains the process once");
}

/// Asserts that the REST API answers the root filesystem of this machine if that is on a disk, as the kernel describes it.
async fn assert_filesystems_of_this_machine(stack: &Stack) {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let kind = mounts.lines().rev().find_map(|line| {
        let words: Vec<_> = line.split(' ').collect();
        let dash = words.iter().position(|word| *word == "-").unwrap();
        (words[4] == "/").then(|| words[dash + 1].to_owned())
    });
    let on_disk = kind.filter(|kind| ["ext4", "xfs", "btrfs"].contains(&kind.as_str()));
    let size = Command::new("stat")
        .args(["-f", "-c", "%b %S", "/"])
        .output()
        .unwrap()
        .stdout;
    let size = String::from_utf8(size).unwrap();
    let size: Vec<u64> = size
        .split_whitespace()
        .map(|number| number.parse().unwrap())
        .collect();
    let api = Api::with(stack, Role::Viewer, Scope::All).await;
    let path = format!("/vms/{THIS_MACHINE}/filesystems");
    eventually(
        "the filesystems of this machine are stored",
        PATIENCE,
        async || {
            let found = api.read(&path).await;
            let root = found["filesystems"]
                .as_array()
                .unwrap()
                .iter()
                .find(|row| row["mount_point"] == "/");
            match (root, &on_disk) {
                (None, None) => Ok(()),
                (Some(root), Some(kind)) => {
                    assert_eq!(
                        (&root["filesystem"], &root["total_bytes"]),
                        (&json!(kind), &json!(size[0] * size[1]))
                    );
                    assert!(
                        root["used_bytes"].as_u64().unwrap() <= size[0] * size[1],
                        "{root}"
                    );
                    Ok(())
                }
                _ => Err(found.to_string()),
            }
        },
    )
    .await;
}

/// Asserts that the sample contains all processes of this machine, and that its VM row agrees with `/proc`.
fn assert_sample_of_this_machine(processes: &[Value], vm: &Value, burner: u32) {
    let alive = processes.iter().filter(|row| row["shutdown_time"].is_null());
    let alive: HashSet<_> = alive.map(|row| row["pid"].as_u64().unwrap()).collect();
    for pid in [burner, std::process::id()] {
        assert!(
            alive.contains(&u64::from(pid)),
            "process {pid} is missing from the sample"
        );
    }
    // Some processes may start or end between the agent's sample and this check.
    let (rows, count) = (
        u32::try_from(alive.len()).map(f64::from).unwrap(),
        number(vm, "proc"),
    );
    assert!(
        (rows - count).abs() <= 0.1 * count,
        "the sample has {rows} rows for {count} processes"
    );
    for row in processes {
        assert_eq!(row["net_incoming"], vm["net_incoming"]);
        assert_eq!(row["net_outgoing"], vm["net_outgoing"]);
    }
    let busy = number(vm, "cpu_util");
    assert!(
        busy > 0.0 && busy <= 100.0,
        "the VM's CPU utilisation is above 0 % and at most 100 %: {vm}"
    );
    assert!((number(vm, "mem") - memory_in_use()).abs() < 20.0, "{vm}");
    let date = vm["create_date"].as_str().unwrap();
    assert!(date.len() == 26 && date.as_bytes()[10] == b'T', "{date}");
}

/// The version of a running agent and the system of its VM are in the REST API, whichever replica received the status.
#[tokio::test]
async fn vm_shows_version_of_its_agent_and_its_system() {
    let stack = Stack::builder()
        .replicas(Program::Metrics, 2)
        .replicas(Program::Agent, 1)
        .start()
        .await;
    // A status that was sent before the services had started is lost.
    let agent = stack.replica(Program::Agent, 0);
    agent.process.kill9();
    agent.restart().await;
    let api = Api::with(&stack, Role::Viewer, Scope::All).await;
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let shown = async |version: &str, is_outdated: bool| {
        eventually("the VM shows the version of its agent", PATIENCE, async || {
            // Either replica may answer.
            for _ in 0..8 {
                let reply = api.get(&format!("/vms/{THIS_MACHINE}")).await;
                if reply.status != 200 {
                    return Err(format!("{reply:?}"));
                }
                let vm = reply.json();
                let found = (&vm["agent_version"], &vm["agent_outdated"], &vm["kernel"]);
                if found != (&json!(version), &json!(is_outdated), &json!(kernel.trim())) {
                    return Err(vm.to_string());
                }
            }
            Ok(())
        })
        .await;
    };
    shown(env!("CARGO_PKG_VERSION"), false).await;

    // An older agent, whose status is acknowledged, and messages that are no status.
    let id = THIS_MACHINE.parse().unwrap();
    let client = stack.bus.client_for_tests();
    let large = format!(
        r#"{{"version":"9.9.9","architecture":"a","more":"{}"}}"#,
        "x".repeat(8192)
    );
    for refused in [large, "{}".to_owned(), String::new()] {
        let subject = status_subject(&id);
        client.publish(subject, refused.into()).await.unwrap();
    }
    let older = format!(
        r#"{{"version":"0.0.9","architecture":"a","kernel":"{}"}}"#,
        kernel.trim()
    );
    eventually("the older version is stored", PATIENCE, async || {
        // A replica that has just written the status of the VM does not write it again.
        let answer = client.request(status_subject(&id), older.clone().into());
        let answer = tokio::time::timeout(Duration::from_secs(1), answer).await;
        let acknowledged = answer.map_err(|_| "no acknowledgement")?.unwrap();
        assert!(acknowledged.payload.is_empty() && acknowledged.status.is_none());
        let vm = api.read(&format!("/vms/{THIS_MACHINE}")).await;
        (vm["agent_version"] == "0.0.9")
            .then_some(())
            .ok_or(vm.to_string())
    })
    .await;
    shown("0.0.9", true).await;
    let page = api.read(&format!("/vms?q={THIS_MACHINE}")).await;
    assert_eq!(page["vms"][0]["agent_version"], "0.0.9", "{page}");
}
