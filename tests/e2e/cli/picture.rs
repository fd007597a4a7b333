//! The picture of `vmwatch top` for the README, drawn from a real screen.

use std::{env, fs, path::Path};

use testkit::{PATIENCE, eventually};
use vmwatch_api::Role;

use super::{ago, running, stored, user};
use crate::rest::client::stack;

/// Draws the screen as SVG. With `VMWATCH_PICTURES=1` the picture in docs/screenshots is replaced.
#[tokio::test]
async fn picture_of_top_shows_its_screen() {
    let stack = stack().start().await;
    // Name, user, unit; CPU, memory, rates of reads and writes.
    let rows = [
        (
            ["mariadbd", "mysql", "mariadb.service"],
            [152.7, 41.3, 33_210.0, 410.0],
        ),
        (["gzip", "root", "backup.service"], [99.6, 0.1, 0.0, 5_480.0]),
        (
            ["mysqldump", "root", "backup.service"],
            [88.4, 2.1, 12_900.0, 0.0],
        ),
        (
            ["php-fpm8.2", "www-data", "php8.2-fpm.service"],
            [18.1, 6.2, 0.0, 12.0],
        ),
        (["nginx", "www-data", "nginx.service"], [4.2, 0.9, 0.0, 64.5]),
        (
            ["redis-server", "redis", "redis-server.service"],
            [2.3, 3.4, 0.0, 0.0],
        ),
        (
            ["systemd-journal", "root", "systemd-journald.service"],
            [0.9, 0.8, 0.0, 28.0],
        ),
        (["sshd", "root", "ssh.service"], [0.1, 0.2, 0.0, 0.0]),
    ];
    let history = |minutes: u64, cpu: f64| {
        let mut sample = running(ago(minutes * 60 + 300), &["nginx"]);
        sample.vm.as_mut().unwrap().cpu_util = Some(cpu);
        sample
    };
    let mut newest = running(ago(300), &rows.map(|(texts, _)| texts[0]));
    for (process, ([name, user, unit], [cpu, mem, read, write])) in newest.processes.iter_mut().zip(rows) {
        name.clone_into(&mut process.cmd);
        (process.cpu_util, process.mem) = (cpu, mem);
        (process.disk_read, process.disk_write) = (read, write);
        process.owner.user = Some(user.to_owned());
        process.owner.unit = Some(unit.to_owned());
    }
    newest.vm.as_mut().unwrap().cpu_util = Some(91.4);
    let loads = [7.0, 9.0, 8.0, 12.0, 10.0, 9.0, 14.0, 30.0, 52.0, 74.0, 88.0, 93.0];
    let mut samples: Vec<_> = (1_u64..)
        .zip(loads.iter().rev())
        .map(|(slot, cpu)| history(slot * 4, *cpu))
        .collect();
    samples.reverse();
    samples.push(newest);
    stored(&stack, &samples).await;
    let cli = user(&stack, Role::Viewer).await;
    // The chart of an hour comes from rollups, which are computed after the samples are stored.
    eventually("the history of an hour is computed", PATIENCE, async || {
        let history = cli.output(&["history", "vm-1", "--from", "-1h", "--points", "20"]);
        if history.lines().count() > loads.len() / 2 {
            Ok(())
        } else {
            Err(history)
        }
    })
    .await;
    let terminal = cli.terminal(&["top", "vm-1", "--at", "-4m"], 100, 16);
    terminal.shows("mysqldump").await;
    terminal.shows("CPU of 1 h").await;
    let picture = terminal.svg();
    assert!(
        picture.contains("mysqldump") && picture.contains("PAST"),
        "{picture}"
    );
    assert!(picture.contains("fill=\"#f0c674\""), "the picture has no colours");
    if env::var_os("VMWATCH_PICTURES").is_some() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/screenshots/top.svg");
        fs::write(path, picture).unwrap();
    }
}
