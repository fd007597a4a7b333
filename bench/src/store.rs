//! The stack that is measured, and the store under it.

use std::time::Duration;

use e2e::{Program, Stack, StackBuilder};
use metrics_svc::{
    config::{RetentionSettings, RowSettings},
    store::RowStore,
};
use shared::{
    config::{Environment, MONGODB_URI, UTC_OFFSET},
    store::StoreSettings,
};

/// Rows of any age stay: 50 years, the most that the setting takes.
const FOR_EVER: Duration = Duration::from_hours(24 * 365 * 50);

/// NATS, the database and one metrics-svc.
pub(crate) fn stack() -> StackBuilder {
    [Program::Gateway, Program::Auth, Program::Lifecycle]
        .into_iter()
        .fold(Stack::builder(), |builder, program| builder.replicas(program, 0))
        .set(Program::Metrics, "VMWATCH_VM_RETENTION", "18250d")
        .set(Program::Metrics, "VMWATCH_PROCESS_RETENTION", "18250d")
}

/// A store of our own in the same database, with the same indexes; the names of its collections start with `prefix`.
pub(crate) async fn open(stack: &Stack, prefix: &str) -> anyhow::Result<RowStore> {
    let env = Environment::of([(MONGODB_URI.name, stack.database.uri())]);
    let settings = StoreSettings::read(&env).map_err(|_| anyhow::anyhow!(env.problems().join("; ")))?;
    let rows = RowSettings {
        vms: format!("{prefix}vm_samples"),
        processes: format!("{prefix}process_samples"),
        offset: UTC_OFFSET.default.parse()?,
    };
    let retention = RetentionSettings {
        vms: FOR_EVER,
        processes: FOR_EVER,
    };
    let store = RowStore::open(&settings, &rows).await?;
    store.prepare(&retention).await?;
    Ok(store)
}
