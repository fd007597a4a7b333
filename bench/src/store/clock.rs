//! A clock for metrics-svc that is faster than the machine's, so that hours pass in minutes.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use testkit::{CLOCK_FILE, Program, StackBuilder, fake_time_library};
use tokio::task::JoinHandle;

/// Interval at which the clock is set. The program reads its new value within a second.
const STEP: Duration = Duration::from_millis(500);

/// A clock that starts in the past and is faster than the machine's.
pub(super) struct FastClock {
    face: Arc<Face>,
    setting: JoinHandle<()>,
}

struct Face {
    speed: u32,
    began: Instant,
    /// The time of the clock when it began.
    start: SystemTime,
    /// The file with the difference to the machine's clock in seconds.
    file: PathBuf,
}

impl Drop for FastClock {
    fn drop(&mut self) {
        self.setting.abort();
    }
}

impl FastClock {
    /// Starts a clock. `None` if the library is not installed.
    pub(super) fn start(folder: &Path, speed: u32, start: SystemTime) -> anyhow::Result<Option<Self>> {
        if fake_time_library().is_none() {
            return Ok(None);
        }
        let face = Arc::new(Face {
            speed,
            began: Instant::now(),
            start,
            file: folder.join("clock"),
        });
        face.set()?;
        let set = Arc::clone(&face);
        let setting = tokio::spawn(async move {
            let mut steps = tokio::time::interval(STEP);
            loop {
                steps.tick().await;
                if let Err(error) = set.set() {
                    println!("the clock of metrics-svc could not be set: {error}");
                }
            }
        });
        Ok(Some(Self { face, setting }))
    }

    /// The settings with which metrics-svc uses the clock.
    pub(super) fn used_by(&self, stack: StackBuilder) -> StackBuilder {
        let library = fake_time_library().unwrap_or_default();
        let settings = [
            ("LD_PRELOAD", library.display().to_string()),
            (CLOCK_FILE, self.face.file.display().to_string()),
            ("FAKETIME_CACHE_DURATION", "1".to_owned()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
        ];
        settings.iter().fold(stack, |stack, (name, value)| {
            stack.set(Program::Metrics, name, value)
        })
    }

    pub(super) fn now(&self) -> SystemTime {
        self.face.now()
    }
}

impl Face {
    fn now(&self) -> SystemTime {
        self.start + self.began.elapsed() * self.speed
    }

    fn set(&self) -> std::io::Result<()> {
        let behind = SystemTime::now().duration_since(self.now()).unwrap_or_default();
        let next = self.file.with_extension("next");
        fs::write(&next, format!("-{}\n", behind.as_secs()))?;
        fs::rename(next, &self.file)
    }
}
