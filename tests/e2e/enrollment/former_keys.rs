//! Tests that a key that was revoked or replaced never returns.

use testkit::{Program, Stack};
use vmwatch_api::{
    enrollment::{AgentKey, CreatedJoinToken, JoinTokenUse},
    wire::FaultKind,
};

use super::{agent, builder, change, enroll, key, refused, revoke_agent, token, token_record};

/// Asserts that the token does not bring back the former key of a VM, neither to this VM nor to another one.
async fn is_shut_out(stack: &Stack, token: &CreatedJoinToken, vm: &str, former: &AgentKey) {
    let (stored, used) = (agent(stack, vm).await, token_record(stack, token).await.used);
    let back = enroll(stack, token, vm, former).await;
    refused(back, FaultKind::Forbidden, "was revoked or replaced");
    let elsewhere = enroll(stack, token, "vm-other", former).await;
    refused(
        elsewhere,
        FaultKind::Conflict,
        "belonged to the agent of another VM",
    );
    assert_eq!(agent(stack, vm).await, stored);
    assert_eq!(agent(stack, "vm-other").await, None);
    assert_eq!(token_record(stack, token).await.used, used);
}

#[tokio::test]
async fn no_token_brings_a_former_key_back() {
    let stack = builder().replicas(Program::Auth, 2).start().await;
    let [own, other] = [token(&stack, 9, true).await, token(&stack, 9, true).await];
    let [replaced, revoked, current] = [key(), key(), key()];
    enroll(&stack, &own, "vm-1", &replaced).await.unwrap();
    enroll(&stack, &own, "vm-1", &revoked).await.unwrap();
    revoke_agent(&stack, "vm-1").await.unwrap();
    enroll(&stack, &own, "vm-1", &current).await.unwrap();
    for token in [&own, &other] {
        for former in [&replaced, &revoked] {
            is_shut_out(&stack, token, "vm-1", former).await;
        }
    }
    // The former keys are kept while the current key is enrolled with another token, and after its revocation.
    enroll(&stack, &other, "vm-1", &current).await.unwrap();
    is_shut_out(&stack, &own, "vm-1", &replaced).await;
    revoke_agent(&stack, "vm-1").await.unwrap();
    let stored = agent(&stack, "vm-1").await.unwrap();
    assert_eq!(stored.former_keys, [replaced.clone(), revoked]);
    is_shut_out(&stack, &other, "vm-1", &replaced).await;
    is_shut_out(&stack, &other, "vm-1", &current).await;
}

/// The same holds for a token that is used up.
#[tokio::test]
async fn former_key_cannot_return_with_a_used_up_token() {
    let stack = builder().start().await;
    for replace in [true, false] {
        let vm = format!("vm-{replace}");
        let (first, second) = (token(&stack, 1, replace).await, token(&stack, 1, false).await);
        let [former, current] = [key(), key()];
        enroll(&stack, &first, &vm, &former).await.unwrap();
        revoke_agent(&stack, &vm).await.unwrap();
        enroll(&stack, &second, &vm, &current).await.unwrap();
        if !replace {
            revoke_agent(&stack, &vm).await.unwrap();
        }
        is_shut_out(&stack, &first, &vm, &former).await;
    }
}

/// The use of a token is bound to the agent record that it was taken for: an enrolment that was interrupted cannot be
/// completed once the VM has another agent.
#[tokio::test]
async fn interrupted_enrolment_is_not_completed_after_another_one() {
    let stack = builder().start().await;
    let [first, second] = [token(&stack, 1, true).await, token(&stack, 1, true).await];
    let [interrupted, current] = [key(), key()];
    change(&stack, &first, |record| {
        record.used = 1;
        record.last_use = Some(JoinTokenUse {
            instance_id: "vm-1".parse().unwrap(),
            public_key: interrupted.clone(),
            agent_revision: 0,
        });
    })
    .await;
    enroll(&stack, &second, "vm-1", &current).await.unwrap();
    let back = enroll(&stack, &first, "vm-1", &interrupted).await;
    refused(back, FaultKind::Forbidden, "is used up");
    assert_eq!(agent(&stack, "vm-1").await.unwrap().public_key, current);
}
