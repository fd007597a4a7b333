//! Tests that password guessing is throttled, and that neither answers nor response times reveal which users exist.

use std::{
    env,
    net::{IpAddr, Ipv4Addr},
    time::Instant,
};

use futures::{StreamExt, stream};
use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use testkit::{ADMIN, Answer, Program, Stack, codes, figure};

use crate::ingest_support::metric;

fn login(user: &str, password: &str) -> Value {
    json!({ "method": codes::LOGIN, "data": { "user_name": user, "password": password } })
}

/// Returns whether the test runs under `./dev soak`, where it makes more pairs of logins.
fn is_soak() -> bool {
    env::var_os("VMWATCH_TEST_SOAK").is_some_and(|minutes| !minutes.is_empty())
}

/// Returns the probability that a random value of the first list is greater than a random value of the second. Equal
/// values count half. This is the Mann–Whitney U statistic divided by the product of the two counts.
fn superiority(first: &[f64], second: &[f64]) -> f64 {
    let points = first.iter().flat_map(|one| {
        second.iter().map(move |other| match one.total_cmp(other) {
            std::cmp::Ordering::Greater => 1.0,
            std::cmp::Ordering::Equal => 0.5,
            std::cmp::Ordering::Less => 0.0,
        })
    });
    points.sum::<f64>() / count(first.len() * second.len())
}

fn count(number: usize) -> f64 {
    f64::from(u32::try_from(number).expect("the count fits into 32 bits"))
}

/// Logins with existing and with unknown names get equal answers, and a rank statistic shows no difference between
/// their response times.
///
/// One argon2id verification takes about 45 ms of one core, so the test makes 2,000 logins only under `./dev soak`. An
/// ordinary test run makes 400 logins. With fewer logins, the statistic varies more by chance, so an ordinary test run
/// allows a difference of four standard deviations instead of 0.05.
#[tokio::test]
async fn login_does_not_reveal_existing_users() {
    let each = if is_soak() { 1000 } else { 200 };
    let stack = Stack::builder()
        .without_login_limit()
        .replicas(Program::Metrics, 0)
        .replicas(Program::Lifecycle, 0)
        .set(Program::Auth, "VMWATCH_LOCKOUT_FAILURES", "1000000")
        .set(Program::Auth, "VMWATCH_SOURCE_FAILURES", "1000000")
        .set(Program::Auth, "VMWATCH_USER_FAILURES", "1000000")
        .start()
        .await;
    let gateway = stack.gateway(0);
    let (mut known, mut unknown) = (Vec::new(), Vec::new());
    let shape = |answer: &Answer| {
        (
            answer.http,
            answer.body.clone(),
            answer.retry_after.clone(),
            answer.content_type.clone(),
        )
    };
    let mut shapes = Vec::new();
    for turn in 0..2 * each {
        // The order within the pairs alternates, so that variations of the machine's speed affect both kinds alike.
        let is_known = matches!(turn % 4, 0 | 3);
        // All names have the same length, and each unknown name is used only once.
        let name = if is_known {
            ADMIN.0.to_owned()
        } else {
            format!("x{:04}", turn % 10_000)
        };
        let sent = login(&name, "a wrong password");
        let started = Instant::now();
        let answer = gateway.post(&sent).await;
        let took = started.elapsed().as_secs_f64();
        if is_known {
            known.push(took);
        } else {
            unknown.push(took);
        }
        shapes.push(shape(&answer));
    }
    assert_eq!((shapes[0].0, known.len(), unknown.len()), (200, each, each));
    assert!(
        shapes.iter().all(|shape| *shape == shapes[0]),
        "answers for existing and unknown users differ: {shapes:?}"
    );
    let slower = superiority(&known, &unknown);
    figure("login_known_slower_than_unknown_probability", slower);
    figure("login_times_compared", count(2 * each));
    // The standard deviation of the statistic for equal distributions: sqrt((n + m + 1) / 12nm).
    let deviation = (count(2 * each + 1) / (12.0 * count(each * each))).sqrt();
    let allowed = f64::max(0.05, 4.0 * deviation);
    assert!(
        (slower - 0.5).abs() <= allowed,
        "the response times differ: the statistic {slower} is not within 0.5 ± {allowed}"
    );
}

#[test]
fn rank_statistic_detects_shifted_times() {
    let times: Vec<_> = (0..100).map(|turn| count((turn * 37) % 100)).collect();
    let later: Vec<_> = times.iter().map(|time| time + 1000.0).collect();
    assert!((superiority(&times, &times) - 0.5).abs() < 1e-9);
    assert!((superiority(&later, &times) - 1.0).abs() < 1e-9);
    assert!(superiority(&times, &later).abs() < 1e-9);
}

/// One address guesses ten thousand passwords: half of them for one user, the others for a hundred users. No guess
/// succeeds, and most guesses are refused before a password is hashed, although two replicas of auth-svc verify them.
/// Other logins succeed at the first attempt: a login of the attacked user from another address, and a login of another
/// user from the attacker's address.
#[tokio::test]
async fn password_guessing_is_throttled_without_blocking_other_logins() {
    const GUESSES: usize = 10_000;
    let stack = Stack::builder()
        .without_login_limit()
        .replicas(Program::Auth, 2)
        .replicas(Program::Metrics, 0)
        .replicas(Program::Lifecycle, 0)
        .start()
        .await;
    let gateway = stack.gateway(0);
    let users: Vec<_> = (0..100).map(|number| format!("user-{number}")).collect();
    // Two of the names exist. No answer may reveal which.
    for user in [&users[0], &users[99]] {
        stack.command(Program::Auth, &["user", "add", user], "correct for this one\n");
    }
    stack.command(
        Program::Auth,
        &["user", "add", "bystander"],
        "another one's password\n",
    );
    let url = gateway.url("/wsgi_app.py");
    let from = |address: [u8; 4]| {
        let address = IpAddr::V4(Ipv4Addr::from(address));
        Client::builder().local_address(address).build().unwrap()
    };
    let attacker = from([127, 0, 0, 1]);
    let guess = async |turn: usize| {
        let user = if turn.is_multiple_of(2) {
            ADMIN.0
        } else {
            &users[(turn / 2) % users.len()]
        };
        let sent = login(user, &format!("guess-{turn}"));
        let answer = attacker.post(&url).body(sent.to_string()).send().await.unwrap();
        let (status, body) = (answer.status(), answer.text().await.unwrap());
        let session = serde_json::from_str::<Value>(&body).unwrap()["session_id"].clone();
        assert_eq!(session, "", "{body}");
        status
    };
    let statuses: Vec<_> = stream::iter(0..GUESSES)
        .map(guess)
        .buffer_unordered(16)
        .collect()
        .await;
    let of = |status: StatusCode| statuses.iter().filter(|found| **found == status).count();
    let (tried, throttled) = (of(StatusCode::OK), of(StatusCode::TOO_MANY_REQUESTS));
    let unavailable = of(StatusCode::SERVICE_UNAVAILABLE);
    figure("password_guesses", count(GUESSES));
    figure("password_guesses_accepted", 0.0);
    figure("password_guesses_throttled", count(throttled));
    figure("password_guesses_tried", count(tried));
    assert_eq!(tried + throttled + unavailable, GUESSES, "{statuses:?}");
    // auth-svc verifies five guesses for each user. After a hundred failures from the address, it verifies only one
    // guess for each user. Concurrent guesses may exceed these limits slightly.
    assert!(
        tried <= 5 + 100 + users.len() + 64,
        "{tried} guesses were verified"
    );
    for index in [0, 1] {
        let replica = stack.replica(Program::Auth, index);
        let refused = metric(replica, "vmwatch_logins_throttled_total").await;
        assert!(refused > 0.0, "replica {index} throttled no login");
    }

    let enter = async |client: &Client, user: &str, password: &str| {
        let answer = client
            .post(&url)
            .body(login(user, password).to_string())
            .send()
            .await
            .unwrap();
        let body = answer.text().await.unwrap();
        assert!(body.starts_with(r#"{"status_code":1,"#), "{user}: {body}");
    };
    enter(&from([127, 0, 0, 2]), ADMIN.0, ADMIN.1).await;
    enter(&from([127, 0, 0, 3]), &users[0], "correct for this one").await;
    enter(&attacker, "bystander", "another one's password").await;
}
