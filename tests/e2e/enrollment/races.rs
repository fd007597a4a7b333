//! Tests enrolments that are repeated, interrupted, or sent at the same time.

use futures::future::join_all;
use testkit::Program;
use vmwatch_api::{enrollment::JoinTokenUse, time::unix_millis, wire::FaultKind};

use super::{agent, builder, change, enroll, key, refused, token, token_record};

#[tokio::test]
async fn repeated_request_succeeds_without_another_use() {
    let stack = builder().replicas(Program::Auth, 2).start().await;
    let token = token(&stack, 1, false).await;
    let key = key();
    let first = enroll(&stack, &token, "vm-1", &key).await.unwrap();
    let stored = agent(&stack, "vm-1").await;
    // The answer may have been lost, and the token may expire before the agent tries again.
    change(&stack, &token, |record| record.expires_at_ms = unix_millis()).await;
    for _ in 0..5 {
        assert_eq!(enroll(&stack, &token, "vm-1", &key).await.unwrap(), first);
    }
    assert_eq!(token_record(&stack, &token).await.used, 1);
    assert_eq!(agent(&stack, "vm-1").await, stored);
    let other = enroll(&stack, &token, "vm-1", &super::key()).await;
    refused(other, FaultKind::Forbidden, "has expired");
}

/// A program was killed after it had taken the use and before it stored the agent.
#[tokio::test]
async fn interrupted_enrolment_is_completed_by_its_repetition() {
    let stack = builder().start().await;
    let (token, key) = (token(&stack, 1, false).await, key());
    change(&stack, &token, |record| {
        record.used = 1;
        record.last_use = Some(JoinTokenUse {
            instance_id: "vm-1".parse().unwrap(),
            public_key: key.clone(),
            agent_revision: 0,
        });
    })
    .await;
    for (vm, key) in [("vm-2", &key), ("vm-1", &super::key())] {
        refused(
            enroll(&stack, &token, vm, key).await,
            FaultKind::Forbidden,
            "is used up",
        );
    }
    enroll(&stack, &token, "vm-1", &key).await.unwrap();
    assert_eq!(token_record(&stack, &token).await.used, 1);
    assert_eq!(agent(&stack, "vm-1").await.unwrap().public_key, key);
}

#[tokio::test]
async fn one_of_two_agents_wins_the_last_use() {
    let stack = builder().replicas(Program::Auth, 2).start().await;
    for round in 0..40 {
        let vms = ["a", "b"].map(|vm| (format!("vm-{round}-{vm}"), key()));
        let once = token(&stack, 1, false).await;
        let racing = vms.iter().map(|(vm, key)| enroll(&stack, &once, vm, key));
        let outcomes = join_all(racing).await;
        for ((vm, key), outcome) in vms.iter().zip(&outcomes) {
            let stored = agent(&stack, vm).await.map(|agent| agent.public_key);
            assert_eq!(stored.as_ref(), outcome.is_ok().then_some(key), "round {round}");
        }
        let (won, lost): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
        assert_eq!((won.len(), lost.len()), (1, 1), "round {round}: {lost:?}");
        for outcome in lost {
            refused(outcome, FaultKind::Forbidden, "is used up");
        }
        assert_eq!(token_record(&stack, &once).await.used, 1, "round {round}");
    }
}

#[tokio::test]
async fn racing_requests_for_one_vm_enrol_one_agent() {
    let stack = builder().replicas(Program::Auth, 2).start().await;
    for round in 0..20 {
        // Two keys for one VM.
        let (vm, keys) = (format!("vm-{round}"), [key(), key()]);
        let many = token(&stack, 5, false).await;
        let outcomes = join_all(keys.iter().map(|key| enroll(&stack, &many, &vm, key))).await;
        let stored = agent(&stack, &vm).await.unwrap().public_key;
        for (key, outcome) in keys.iter().zip(outcomes) {
            if *key == stored {
                outcome.unwrap();
            } else {
                refused(outcome, FaultKind::Conflict, "has an agent");
            }
        }
        // The same request several times at once.
        let (vm, key) = (format!("same-{round}"), key());
        let once = token(&stack, 1, false).await;
        for outcome in join_all((0..4).map(|_| enroll(&stack, &once, &vm, &key))).await {
            outcome.unwrap();
        }
        assert_eq!(token_record(&stack, &once).await.used, 1, "round {round}");
    }
}

/// An agent whose record another agent changed, after it had taken its use, does not take a second one.
#[tokio::test]
async fn racing_replacements_take_one_use_each() {
    let stack = builder().replicas(Program::Auth, 2).start().await;
    for round in 0..20 {
        let vm = format!("vm-{round}");
        let tokens = [token(&stack, 5, true).await, token(&stack, 5, true).await];
        let keys = [key(), key()];
        let racing = tokens.iter().zip(&keys);
        let racing = racing.map(|(token, key)| enroll(&stack, token, &vm, key));
        for outcome in join_all(racing).await {
            outcome.unwrap();
        }
        for token in &tokens {
            assert_eq!(token_record(&stack, token).await.used, 1, "round {round}");
        }
    }
}
