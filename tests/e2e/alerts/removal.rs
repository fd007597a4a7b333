//! Tests that nothing of a removed VM is kept.

use mongodb::bson::{Document, doc};
use testkit::{MACHINES, PATIENCE, Program, Stack, eventually};
use vmwatch_api::time::unix_millis;

use super::{api::stack, engine_support::arrived};

async fn has_progress(stack: &Stack, vm: &str) -> bool {
    let progress = stack.database.handle().collection::<Document>("alert_progress");
    progress.find_one(doc! { "_id": vm }).await.unwrap().is_some()
}

#[tokio::test]
async fn progress_of_a_removed_vm_is_deleted() {
    let stack = stack().start().await;
    let [(known, _), ..] = MACHINES;
    let alert_svc = stack.replica(Program::Alert, 0);
    alert_svc.process.kill9();
    // Both VMs have been silent for twenty minutes. No service knows the second one.
    let vms = [known.to_owned(), "vm-removed".to_owned()];
    arrived(&stack, &vms, unix_millis() - 1_200_000).await;
    // Without a rule about silence, no check of silent VMs finds out that it was removed.
    let rules = stack.database.handle().collection::<Document>("alert_rules");
    let silence = doc! { "spec.condition.kind": "agent_silent" };
    let off = doc! { "$set": { "spec.enabled": false } };
    assert_eq!(rules.update_many(silence, off).await.unwrap().matched_count, 1);
    alert_svc.restart().await;
    eventually(
        "the progress of the removed VM is deleted",
        PATIENCE,
        async || {
            let is_kept = has_progress(&stack, "vm-removed").await;
            if is_kept {
                Err(alert_svc.process.log())
            } else {
                Ok(())
            }
        },
    )
    .await;
    assert!(has_progress(&stack, known).await);
}
