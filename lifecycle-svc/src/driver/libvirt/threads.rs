//! Runs each blocking libvirt call on its own thread.
//!
//! The runtime's pool of blocking threads is shared by the whole process, including DNS look-ups, and a few dozen
//! hanging hosts would exhaust it. Starting a thread costs about 20 µs, and a hanging thread affects only its
//! hypervisor.

use std::{io, thread};

use tokio::sync::oneshot;

/// Runs the call on a new thread. The returned receiver fails if the call panics. The caller must bound the number of
/// threads with a permit that the call holds until it returns.
pub(super) fn run<T: Send + 'static>(
    call: impl FnOnce() -> T + Send + 'static,
) -> io::Result<oneshot::Receiver<T>> {
    let (sender, receiver) = oneshot::channel();
    thread::Builder::new()
        .name("libvirt-call".to_owned())
        .spawn(move || {
            // Sending fails only if the caller has stopped waiting at its deadline.
            let _ = sender.send(call());
        })?;
    Ok(receiver)
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, time::Duration};

    use super::*;

    /// The test's runtime has one blocking thread instead of 512; hung calls must not occupy it.
    #[test]
    fn hung_libvirt_calls_do_not_use_blocking_thread_pool() {
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
    async fn panic_in_libvirt_call_is_reported_to_caller() {
        let panicked: oneshot::Receiver<()> = run(|| panic!("this panic is expected by the test")).unwrap();
        assert!(panicked.await.is_err());
    }
}
