//! Tests that a service whose clock is wrong is not ready, so that it gets no requests that it would answer with 504.

use testkit::{PATIENCE, Program, Stack, eventually, fake_time_library};

#[tokio::test]
async fn service_with_wrong_clock_is_not_ready_and_reports_the_reason() {
    let library = fake_time_library().expect("`./dev test` installs libfaketime");
    let stack = Stack::builder()
        .replicas(Program::Gateway, 0)
        .replicas(Program::Metrics, 0)
        .replicas(Program::Lifecycle, 0)
        .start()
        .await;
    let auth = stack.replica(Program::Auth, 0);
    auth.ready().await;
    let restart = |clock: &str| {
        auth.process.kill9();
        auth.process.set("LD_PRELOAD", &library.display().to_string());
        auth.process.set("FAKETIME", clock);
        auth.process.set("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        auth.process.start_again();
    };
    restart("+10s");
    eventually(
        "the service reports that its clock is wrong",
        PATIENCE,
        async || {
            let reason = auth.readiness().await.err().ok_or("the service is ready")?;
            let is_reported = reason.contains("s ahead of the clock of NATS");
            is_reported.then_some(()).ok_or(reason)
        },
    )
    .await;
    restart("+0s");
    auth.ready().await;
}
