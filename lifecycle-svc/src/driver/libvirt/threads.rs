//! A thread for each blocking call into libvirt.
//!
//! The runtime's own pool for blocking work is shared by everything, DNS look-ups included: a few dozen hosts that hang
//! would fill it. A thread of its own costs some 20 µs and holds up nothing but the hypervisor that it calls.

use std::{io, thread};

use tokio::sync::oneshot;

/// Runs the call on a new thread. The receiver fails if the call panics. The caller bounds the number of threads, by a
/// permit that the call keeps until it returns.
pub(super) fn run<T: Send + 'static>(
    call: impl FnOnce() -> T + Send + 'static,
) -> io::Result<oneshot::Receiver<T>> {
    let (sender, receiver) = oneshot::channel();
    thread::Builder::new()
        .name("libvirt-call".to_owned())
        .spawn(move || {
            // Fails only where the caller stopped waiting at its deadline.
            let _ = sender.send(call());
        })?;
    Ok(receiver)
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, time::Duration};

    use super::*;

    /// One blocking thread in the runtime stands for 512: hung calls must not take it.
    #[test]
    fn hung_calls_leave_the_runtimes_blocking_threads_free() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(1)
            .build()
            .unwrap();
        runtime.block_on(async {
            let (release, released) = mpsc::channel::<()>();
            let hung = run(move || released.recv().is_err()).unwrap();
            let free = tokio::task::spawn_blocking(|| "free");
            let answer = tokio::time::timeout(Duration::from_secs(10), free).await;
            assert_eq!(answer.unwrap().unwrap(), "free");
            drop(release);
            assert!(hung.await.unwrap());
        });
    }

    #[tokio::test]
    async fn reports_a_call_that_panicked() {
        let panicked: oneshot::Receiver<()> = run(|| panic!("expected by this test")).unwrap();
        assert!(panicked.await.is_err());
    }
}
