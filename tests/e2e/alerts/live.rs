//! Tests live events of alerts about vmwatch itself.

use reqwest::Method;
use testkit::MACHINES;
use vmwatch_api::{Role, Scope};

use super::api::{evaluates, only, stack, store_alert};
use crate::rest::{
    client::{Api, Reply},
    events::Follower,
};

#[tokio::test]
async fn alert_about_vmwatch_itself_is_a_live_event_for_users_with_access_to_all_vms() {
    let stack = stack().start().await;
    let [(mine, _), ..] = MACHINES;
    let all = Api::with(&stack, Role::Operator, Scope::All).await;
    let limited = Api::with(&stack, Role::Operator, only(&[mine])).await;
    evaluates(&stack).await;
    // The selection of VMs does not hide it.
    let mut follower = Follower::of(&all, &format!("?kind=alert&instance_id={mine}"), None).await;
    let mut other = Follower::of(&limited, "?kind=alert", None).await;
    follower.expect("ready").await;
    other.expect("ready").await;
    let own = store_alert(&stack, 'a', None, "firing", 1000).await;
    let of_vm = store_alert(&stack, 'b', Some(mine), "firing", 2000).await;
    for id in [&own, &of_vm] {
        let path = format!("/alerts/{id}/acknowledgement");
        let acknowledged = Reply::of(all.request(Method::PUT, &path)).await;
        assert_eq!(acknowledged.status, 200, "{acknowledged:?}");
        let event = follower.expect("alert").await;
        assert_eq!(event.data, acknowledged.json());
    }
    // A user with a limited scope receives only the alert of the VM.
    assert_eq!(other.expect("alert").await.data["id"], of_vm);
}
