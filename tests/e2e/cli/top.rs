//! `vmwatch top` in a terminal.

use testkit::{PATIENCE, Program, eventually};
use vmwatch_api::{Role, Scope, time::unix_millis};

use super::{ago, running, stored, user};
use crate::rest::client::{publish, stack};

const ENTER: &str = "\r";
const LEFT: &str = "\x1b[D";
const RIGHT: &str = "\x1b[C";
const DOWN: &str = "\x1b[B";

#[tokio::test]
async fn top_follows_new_tables_and_steps_through_the_past() {
    let stack = stack().start().await;
    let samples = [
        running(ago(7200), &["backup", "nginx"]),
        running(ago(40), &["cron", "nginx"]),
        running(ago(30), &["stress", "nginx"]),
    ];
    stored(&stack, &samples).await;
    let cli = user(&stack, Role::Viewer).await;
    let mut terminal = cli.terminal(&["top", "vm-1"], 100, 24);
    terminal.shows("stress").await;
    terminal.shows("LIVE").await;
    publish(&stack, &running(ago(1), &["fresh", "nginx"])).await;
    terminal.shows("fresh").await;

    for (key, name) in [
        (LEFT, "stress"),
        (LEFT, "cron"),
        (LEFT, "backup"),
        (RIGHT, "cron"),
        (RIGHT, "stress"),
    ] {
        terminal.send(key);
        terminal
            .shows_that(name, |screen| screen.contains(name) && screen.contains("PAST "))
            .await;
    }
    terminal.send("@-1h");
    terminal.shows("moment: -1h").await;
    terminal.send(ENTER);
    terminal.shows("backup").await;
    terminal.send("@noon");
    terminal.send(ENTER);
    terminal.shows("\"noon\" is no time; write now").await;
    terminal.send("\x1b");
    terminal
        .shows_that("no prompt", |screen| {
            !screen.contains("moment:") && !screen.contains("noon")
        })
        .await;
    terminal.send("l");
    terminal
        .shows_that("the newest table", |screen| {
            screen.contains("LIVE") && screen.contains("fresh")
        })
        .await;

    terminal.send("q");
    assert!(terminal.ended().await.success());
    assert!(
        !terminal.is_full_screen(),
        "the screen of the shell is not restored"
    );
}

#[tokio::test]
async fn next_table_is_found_after_a_long_gap() {
    let stack = stack().start().await;
    let mut samples = vec![running(ago(7200), &["backup"]), running(ago(1900), &["cron"])];
    samples.extend(
        (1..=30)
            .rev()
            .map(|minutes| running(ago(minutes * 60), &["stress"])),
    );
    stored(&stack, &samples).await;
    let cli = user(&stack, Role::Viewer).await;
    let terminal = cli.terminal(&["top", "vm-1", "--at", "-1h"], 80, 24);
    terminal.shows("backup").await;
    terminal.send(RIGHT);
    terminal
        .shows_that("the next table", |screen| {
            screen.contains("cron") && screen.contains("PAST ")
        })
        .await;
}

#[tokio::test]
async fn rows_are_sorted_grouped_filtered_and_described() {
    let stack = stack().start().await;
    let mut sample = running(ago(1), &["stress", "nginx", "nginx", "bash"]);
    sample.processes[1].owner.user = Some("www".to_owned());
    sample.processes[1].owner.unit = Some("nginx.service".to_owned());
    stored(&stack, &[sample]).await;
    let cli = user(&stack, Role::Viewer).await;
    let terminal = cli.terminal(&["top", "vm-1"], 120, 24);
    terminal.shows("stress").await;
    let order = |screen: &str, names: [&str; 2]| {
        let at = names.map(|name| screen.find(name));
        at[0].is_some() && at[0] < at[1]
    };
    terminal
        .shows_that("stress first", |screen| order(screen, ["stress", "bash"]))
        .await;
    terminal.send("n");
    terminal
        .shows_that("bash first", |screen| order(screen, ["bash", "stress"]))
        .await;
    terminal.send("g");
    terminal
        .shows_that("groups", |screen| {
            screen.matches("nginx").count() == 1 && screen.contains("COUNT")
        })
        .await;
    terminal.send("ggg/NGINX.S");
    terminal.send(ENTER);
    terminal
        .shows_that("one row", |screen| {
            screen.contains("filter: NGINX.S") && !screen.contains("stress")
        })
        .await;
    terminal.send(DOWN);
    terminal.shows("user www  unit nginx.service").await;
    terminal.send("?");
    terminal.shows("Any key closes this help.").await;
}

#[tokio::test]
async fn forty_columns_without_colours_are_enough() {
    let stack = stack().start().await;
    stored(
        &stack,
        &[running(ago(1), &["a-process-with-a-long-name", "nginx"])],
    )
    .await;
    let cli = user(&stack, Role::Viewer).await.set("NO_COLOR", "1");
    let terminal = cli.terminal(&["top", "vm-1"], 40, 12);
    terminal.shows("nginx").await;
    let screen = terminal.text();
    let titles = screen.lines().find(|line| line.contains("CPU%")).unwrap();
    assert_eq!(
        titles.split_whitespace().collect::<Vec<_>>(),
        ["PID", "CPU%", "MEM%", "NAME"],
        "{screen}"
    );
    assert!(screen.contains("a-process-with"), "{screen}");
    assert!(screen.contains("CPU 40.0 %"), "{screen}");
    let output = terminal.output();
    let colours: Vec<_> = output
        .split("\x1b[")
        .filter_map(|rest| rest.split_once('m'))
        .collect();
    assert!(colours.len() > 5, "{output:?}");
    assert!(
        !colours.iter().any(|(parameters, _)| is_colour(parameters)),
        "{output:?}"
    );
}

/// Whether the parameters of "Select Graphic Rendition" choose a colour.
fn is_colour(parameters: &str) -> bool {
    let mut numbers = parameters.split(';').map(str::parse::<u8>);
    numbers.any(|number| matches!(number, Ok(30..=38 | 40..=48 | 90..=107)))
}

#[tokio::test]
async fn resized_terminal_is_drawn_again() {
    let stack = stack().start().await;
    stored(&stack, &[running(ago(1), &["stress", "nginx"])]).await;
    let cli = user(&stack, Role::Viewer).await;
    let mut terminal = cli.terminal(&["top", "vm-1"], 120, 24);
    terminal.shows("STARTED").await;
    terminal.resize(40, 12);
    terminal
        .shows_that("few columns", |screen| {
            screen.contains("stress") && !screen.contains("STARTED")
        })
        .await;
    terminal.resize(1, 1);
    terminal.resize(120, 24);
    terminal
        .shows_that("all columns", |screen| {
            screen.contains("stress") && screen.contains("STARTED")
        })
        .await;
    terminal.send("q");
    assert!(terminal.ended().await.success());
}

#[tokio::test]
async fn closed_terminal_ends_top() {
    let stack = stack().start().await;
    stored(&stack, &[running(ago(1), &["stress"])]).await;
    let cli = user(&stack, Role::Viewer).await;
    let mut terminal = cli.terminal(&["top", "vm-1"], 80, 24);
    terminal.shows("stress").await;
    terminal.close();
    assert_eq!(terminal.ended().await.code(), Some(0));
}

#[tokio::test]
async fn top_connects_again_and_ends_with_its_session() {
    let stack = stack().start().await;
    stored(&stack, &[running(ago(20), &["stress"])]).await;
    let cli = user(&stack, Role::Viewer).await;
    let mut terminal = cli.terminal(&["top", "vm-1"], 100, 24);
    terminal.shows("LIVE").await;
    let gateway = stack.replica(Program::Gateway, 0);
    gateway.process.kill9();
    terminal.shows("NOT CONNECTED").await;
    gateway.restart().await;
    terminal.shows("LIVE").await;
    publish(&stack, &running(unix_millis() / 1000 * 1000, &["fresh"])).await;
    terminal.shows("fresh").await;

    let token = stack.session(Role::Viewer, Scope::All).await;
    let api = crate::rest::client::Api::of(stack.gateway(0)).holding(&token);
    let other = testkit::Cli::with_token(stack.gateway(0), &token);
    let mut ending = other.terminal(&["top", "vm-1"], 100, 24);
    ending.shows("LIVE").await;
    eventually("the session has ended", PATIENCE, async || {
        let reply = api.delete("/sessions/current").await;
        if matches!(reply.status, 204 | 401) {
            Ok(())
        } else {
            Err(format!("{reply:?}"))
        }
    })
    .await;
    assert_eq!(ending.ended().await.code(), Some(77), "{}", ending.text());
    terminal.send("\x03");
    assert!(terminal.ended().await.success());
}
