//! Runs each blocking libvirt call on its own thread.
//!
//! The runtime's blocking pool is shared by the whole process, including DNS look-ups; a few dozen hanging hosts would
//! exhaust it. A thread of its own costs about 20 µs and affects only the hypervisor that it calls.

use std::{io, thread};

use tokio::sync::oneshot;

/// Runs the call on a new thread. The receiver fails if the call panics. The caller must bound the number of threads by
/// a permit that the call holds until it returns.
pub(super) fn run<T: Send + 'static>(
    call: impl FnOnce() -> T + Send + 'static,
) -> io::Result<oneshot::Receiver<T>> {
    let (sender, receiver) = oneshot::channel();
    thread::Builder::new()
        .name("libvirt-call".to_owned())
        .spawn(move || {
            // Fails only if the caller stopped waiting at its deadline.
            let _ = sender.send(call());
        })?;
    Ok(receiver)
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, time::Duration};

    use super::*;

    /// The runtime has one blocking thread instead of 512; hung calls must not occupy it.
    #[test]
    fn hung_calls_do_not_use_blocking_pool() {
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
