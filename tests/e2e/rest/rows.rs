//! Tests the export of stored rows over REST: complete and in order on any number of pages, in both formats.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use testkit::{PATIENCE, Program, Stack, eventually};
use vmwatch_api::{InstanceId, Role, Scope, time::unix_millis};

use super::client::{Api, process, publish, rfc3339, sample, stack};
use crate::{
    history_support::filesystem,
    rows::{process_row, store_processes},
};

const SAMPLES: u64 = 40;
const PROCESSES: u32 = 120;

/// Publishes samples of a VM, five seconds apart, with a row that repeats. Returns the time range.
async fn publish_samples(stack: &Stack, base: u64) -> String {
    for step in 0..SAMPLES {
        let mut sample = sample("vm-1", base + step * 5000, 20.0);
        sample.processes = (1..=PROCESSES)
            .map(|pid| process("worker", pid, 1.0, base))
            .collect();
        sample.processes.push(process("=1+\"1\",2", 500, 2.5, base));
        sample.filesystems = vec![filesystem("/", 40 << 30), filesystem("/mnt/a,b", 8 << 40)];
        publish(stack, &sample).await;
    }
    format!("from={}&to={}", rfc3339(base), rfc3339(base + SAMPLES * 5000))
}

/// Reads all pages of an export. Returns their text and their number.
async fn export(api: &Api, path: &str) -> (String, usize) {
    let (mut text, mut pages, mut cursor) = (String::new(), 0, String::new());
    loop {
        let page = api.get(&format!("{path}{cursor}")).await;
        assert_eq!(page.status, 200, "{page:?}");
        assert!(page.body.len() < 1 << 20, "{} bytes", page.body.len());
        text.push_str(&page.body);
        pages += 1;
        assert!(pages < 100, "the export must end");
        match page.header("x-next-cursor") {
            Some(next) => cursor = format!("&cursor={next}"),
            None => return (text, pages),
        }
    }
}

fn rows_of(lines: &str) -> Vec<Value> {
    lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Asserts that the filesystems of the samples are exported, and answered for a moment. Only the REST API has them.
async fn assert_filesystems(stack: &Stack, api: &Api, base: u64, range: &str) {
    let (csv, _) = export(api, &format!("/vms/vm-1/rows?kind=filesystem&format=csv&{range}")).await;
    assert!(csv.starts_with("mount_point,filesystem,used_bytes,total_bytes,instance_id,create_date,_id\r\n"));
    assert_eq!(
        csv.matches("\r\n/,ext4,21474836480,42949672960,vm-1,").count(),
        40
    );
    assert_eq!(
        csv.matches("\r\n\"/mnt/a,b\",ext4,4398046511104,8796093022208,vm-1,")
            .count(),
        40
    );
    let newest = api.read("/vms/vm-1/filesystems").await;
    let root = json!({ "mount_point": "/", "filesystem": "ext4", "used_bytes": 20_u64 << 30, "total_bytes": 40_u64 << 30 });
    assert_eq!(
        (
            &newest["filesystems"][0],
            newest["filesystems"].as_array().unwrap().len()
        ),
        (&root, 2)
    );
    assert_eq!(newest["at"], rfc3339(base + (SAMPLES - 1) * 5000));
    let earlier = api
        .read(&format!("/vms/vm-1/filesystems?at={}", rfc3339(base + 7000)))
        .await;
    assert_eq!(earlier["at"], rfc3339(base + 5000));
    let none = json!({ "at": null, "filesystems": [] });
    assert_eq!(
        api.read(&format!("/vms/vm-1/filesystems?at={}", rfc3339(base - 1)))
            .await,
        none
    );
    let mine = Scope::Only(vec!["mine".parse::<InstanceId>().unwrap()]);
    let limited = Api::with(stack, Role::Admin, mine).await;
    assert_eq!(limited.read("/vms/vm-1/filesystems").await, none);
}

#[tokio::test]
async fn rows_are_exported_completely_in_pages_as_json_lines_and_csv() {
    let stack = stack().without_rates().start().await;
    let api = Api::with(&stack, Role::Viewer, Scope::All).await;
    let base = (unix_millis() / 60_000 - 30) * 60_000;
    let range = publish_samples(&stack, base).await;
    let path = format!("/vms/vm-1/rows?kind=process&{range}");
    let expected = usize::try_from(SAMPLES).unwrap() * (PROCESSES as usize + 1);
    let (lines, pages) = eventually("all rows are stored", PATIENCE, async || {
        let (lines, pages) = export(&api, &path).await;
        let found = lines.lines().count();
        (found == expected)
            .then_some((lines, pages))
            .ok_or(format!("{found} rows"))
    })
    .await;
    assert!(pages >= 2, "the rows do not fit on one page");
    let rows = rows_of(&lines);
    let dates: Vec<_> = rows
        .iter()
        .map(|row| row["create_date"].as_str().unwrap())
        .collect();
    assert!(dates.is_sorted(), "the oldest rows come first");
    let ids: BTreeSet<_> = rows.iter().map(|row| row["_id"].as_str().unwrap()).collect();
    assert_eq!(ids.len(), expected, "each row is exported once");
    assert_eq!(
        (&rows[0]["cmd"], &rows[0]["shutdown_time"]),
        (&json!("worker"), &json!(null))
    );

    // The CSV has the same rows. The name of a process is quoted and cannot be a formula.
    let (csv, _) = export(&api, &format!("{path}&format=csv")).await;
    assert_eq!(csv.matches("\r\n").count(), expected + 1, "one header line");
    assert!(csv.starts_with("net_incoming,shutdown_time,mem,net_outgoing,cmd,pid,"));
    let formula = "1.5,,1.0,0.5,\"'=1+\"\"1\"\",2\",500,vm-1,";
    assert_eq!(
        csv.matches(formula).count(),
        usize::try_from(SAMPLES).unwrap(),
        "{}",
        &csv[..2000]
    );

    // Filters select processes, a pid or a name.
    let (lines, _) = export(&api, &format!("{path}&pid=7")).await;
    let pids: BTreeSet<_> = rows_of(&lines).iter().map(|row| row["pid"].as_u64()).collect();
    assert_eq!((lines.lines().count(), pids), (40, BTreeSet::from([Some(7)])));
    let (lines, _) = export(&api, &format!("{path}&name=%3D1%2B%221%22,2")).await;
    assert_eq!(lines.lines().count(), 40);
    let (lines, _) = export(&api, &format!("/vms/vm-1/rows?{range}")).await;
    let first = &rows_of(&lines)[0];
    assert_eq!((lines.lines().count(), &first["cpu_util"]), (40, &json!(20.0)));
    // Rows of VMs also have the measures that only the REST API has: null in JSON and empty in CSV where they are absent.
    assert_eq!(
        (&first["cores"], &first["load"], first.get("swap")),
        (&json!(4), &json!(1.25), Some(&json!(null)))
    );
    let (csv, _) = export(&api, &format!("/vms/vm-1/rows?format=csv&{range}")).await;
    let lines: Vec<_> = csv.lines().take(2).collect();
    assert!(
        lines[0].ends_with(",proc,cores,steal,load,swap,pressure_cpu,pressure_mem,pressure_io"),
        "{}",
        lines[0]
    );
    assert!(lines[1].ends_with(",2,4,,1.25,,12.5,,"), "{}", lines[1]);

    assert_filesystems(&stack, &api, base, &range).await;

    // Flat rows of the same moment are on several pages too.
    let date = "2017-01-01T21:37:59.001065";
    store_processes(&stack, (0..5000).map(|pid| process_row("old", date, "old", pid))).await;
    let old = "/vms/old/rows?kind=process&from=2017-01-01T00:00:00Z&to=2017-01-02T00:00:00Z";
    let (lines, pages) = export(&api, old).await;
    let ids: BTreeSet<_> = rows_of(&lines).iter().map(|row| row["_id"].to_string()).collect();
    assert_eq!((lines.lines().count(), ids.len()), (5000, 5000));
    assert!(pages >= 2);

    // A VM outside the scope is like one without rows.
    let mine = Scope::Only(vec!["mine".parse::<InstanceId>().unwrap()]);
    let limited = Api::with(&stack, Role::Admin, mine).await;
    assert_eq!(export(&limited, &path).await, (String::new(), 1));
    for query in [
        "kind=disk",
        "format=xml",
        "cursor=1",
        "pid=-1",
        "name=",
        "limit=1",
    ] {
        api.get(&format!("/vms/vm-1/rows?{query}"))
            .await
            .problem(400, "invalid");
    }
    for query in [
        "kind=process&name=a&pid=1",
        "name=a",
        "kind=filesystem&name=a",
        "from=2017-01-02T00:00:00Z&to=2017-01-01T00:00:00Z",
    ] {
        api.get(&format!("/vms/vm-1/rows?{query}"))
            .await
            .problem(422, "contradictory");
    }

    // While metrics-svc is unreachable, a page fails as a whole, so that a partial file is never taken for a complete one.
    stack.replica(Program::Metrics, 0).process.kill9();
    api.becomes_unavailable(&path).await;
}
