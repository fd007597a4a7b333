//! Stores how far the samples of VMs have been evaluated, spread over some minutes. What is not stored is read again
//! from the stream of evaluation records after a restart.

use std::time::Duration;

use futures::{StreamExt, TryStreamExt, stream};
use metrics::counter;
use mongodb::bson::{Document, doc};
use tokio::{task::JoinHandle, time::timeout};
use tracing::{debug, warn};
use vmwatch_api::InstanceId;

use super::{samples::Samples, silence::Standstills};
use crate::{
    AlertError,
    store::{ENGINE_STATE, Store, StoredState, signed, unsigned},
};

/// Interval at which the progress of all VMs is stored, in milliseconds.
const PASS_MS: u64 = 240_000;
/// Interval at which the state of the engine is stored, in milliseconds.
const STATE_MS: u64 = 30_000;
/// Number of VMs that are stored at once, and at the same time.
const CHUNK: usize = 100;
const AT_ONCE: usize = 4;
/// Time limit for storing everything at shutdown.
const LAST_LIMIT: Duration = Duration::from_secs(5);

/// What was stored before.
#[derive(Debug, Default)]
pub(super) struct Stored {
    pub(super) standstills: Standstills,
    /// Position up to which the effects of evaluation records are stored.
    pub(super) saved_sequence: u64,
}

/// Reads the state of the engine, and the progress of all VMs.
pub(super) async fn read(store: &Store, samples: &mut Samples) -> Result<Stored, AlertError> {
    let state = store.state.find_one(doc! { "_id": ENGINE_STATE }).await?;
    let stored = state.map(|state| Stored {
        standstills: serde_json::from_str(&state.standstills).unwrap_or_else(|error| {
            broken("alert_state");
            warn!(%error, "the stored standstills of ingestion could not be decoded; they are ignored");
            Standstills::default()
        }),
        saved_sequence: unsigned(state.saved_sequence),
    });
    let mut all = store.progress.find(doc! {}).await?;
    while let Some(progress) = all.try_next().await? {
        match progress.id.parse() {
            Ok(vm) => samples.restore(&vm, unsigned(progress.newest_ms), unsigned(progress.arrived_ms)),
            Err(error) => {
                broken("alert_progress");
                warn!(%error, "the progress of a VM has an invalid id; it is ignored");
            }
        }
    }
    Ok(stored.unwrap_or_default())
}

/// Counts a record that could not be decoded.
fn broken(collection: &'static str) {
    counter!("vmwatch_broken_records_total", "collection" => collection).increment(1);
}

/// How far records have been evaluated, and how far the changes of alerts that they caused are stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) evaluated: u64,
    pub(super) written: u64,
}

type Rows = Vec<(InstanceId, u64, u64)>;

/// A pass over all VMs whose progress is unsaved.
#[derive(Debug)]
struct Pass {
    left: Vec<InstanceId>,
    /// Position of the newest record that was evaluated when the pass began.
    sequence: u64,
    /// Whether storing a part failed.
    failed: bool,
}

/// Stores progress in the background, one chunk at a time.
#[derive(Debug)]
pub(super) struct Saver {
    store: Store,
    pass: Option<Pass>,
    /// Rows to be stored once the changes of alerts up to this position are stored.
    prepared: Option<(u64, Rows)>,
    passed_ms: u64,
    saved_sequence: u64,
    state_ms: u64,
    standstills: usize,
    writing: Option<JoinHandle<(Rows, Result<(), AlertError>)>>,
}

impl Saver {
    pub(super) fn new(store: &Store, saved_sequence: u64, now_ms: u64) -> Self {
        Self {
            store: store.clone(),
            pass: None,
            prepared: None,
            passed_ms: now_ms,
            saved_sequence,
            state_ms: 0,
            standstills: 0,
            writing: None,
        }
    }

    /// Stores the next chunk if it is due and the last one has been stored. Progress is stored only after the changes
    /// of alerts that belong to it: otherwise records whose changes were not written would later count as old.
    pub(super) async fn tick(
        &mut self,
        samples: &mut Samples,
        standstills: &Standstills,
        position: Position,
        now_ms: u64,
    ) {
        if self
            .writing
            .as_ref()
            .is_some_and(|writing| !writing.is_finished())
        {
            return;
        }
        self.take_result(samples).await;
        let (intervals, _) = standstills.state();
        let state_is_due = now_ms.saturating_sub(self.state_ms) >= STATE_MS || intervals != self.standstills;
        if self.pass.is_none() && now_ms.saturating_sub(self.passed_ms) >= PASS_MS {
            self.passed_ms = now_ms;
            self.pass = Some(Pass {
                left: samples.unsaved(),
                sequence: position.evaluated,
                failed: false,
            });
        }
        if self.prepared.is_none() {
            let rows = self.next_rows(samples);
            self.prepared = (!rows.is_empty()).then_some((position.evaluated, rows));
        }
        let ready = self
            .prepared
            .take_if(|(sequence, _)| *sequence <= position.written);
        let rows = ready.map(|(_, rows)| rows).unwrap_or_default();
        if rows.is_empty() && !state_is_due {
            return;
        }
        let state = state_is_due.then(|| self.state(standstills));
        if state_is_due {
            (self.state_ms, self.standstills) = (now_ms, intervals);
        }
        let store = self.store.clone();
        self.writing = Some(tokio::spawn(async move {
            let written = write(&store, &rows, state).await;
            (rows, written)
        }));
    }

    /// The next rows of the pass. The pass ends when there are none.
    fn next_rows(&mut self, samples: &mut Samples) -> Rows {
        let Some(pass) = &mut self.pass else {
            return Vec::new();
        };
        if pass.left.is_empty() {
            if !pass.failed {
                self.saved_sequence = pass.sequence;
            }
            self.pass = None;
            return Vec::new();
        }
        let rest = pass.left.len().saturating_sub(CHUNK);
        let chunk = pass.left.split_off(rest);
        chunk
            .into_iter()
            .filter_map(|vm| samples.take_unsaved(vm))
            .collect()
    }

    async fn take_result(&mut self, samples: &mut Samples) {
        let Some(writing) = self.writing.take() else {
            return;
        };
        let failed = match writing.await {
            Ok((_, Ok(()))) => return,
            Ok((rows, Err(error))) => {
                debug!(%error, "storing the progress of VMs failed; retrying");
                rows
            }
            Err(error) => {
                warn!(%error, "storing the progress of VMs panicked");
                Vec::new()
            }
        };
        counter!("vmwatch_alert_progress_failed_total").increment(1);
        for (vm, ..) in failed {
            samples.not_saved(&vm);
        }
        // What failed is stored in the next pass.
        if let Some(pass) = &mut self.pass {
            pass.failed = true;
        }
        self.state_ms = 0;
    }

    fn state(&self, standstills: &Standstills) -> StoredState {
        StoredState {
            id: ENGINE_STATE.to_owned(),
            // Encoding cannot fail, because the intervals are numbers.
            standstills: serde_json::to_string(standstills).unwrap_or_default(),
            saved_sequence: signed(self.saved_sequence),
        }
    }

    /// Stores everything at shutdown, as far as the time limit permits.
    pub(super) async fn finish(
        mut self,
        samples: &mut Samples,
        standstills: &Standstills,
        position: Position,
    ) {
        let saving = async {
            self.take_result(samples).await;
            if position.written == position.evaluated {
                let unsaved = samples.unsaved().into_iter();
                let mut rows: Rows = unsaved.filter_map(|vm| samples.take_unsaved(vm)).collect();
                rows.extend(self.prepared.take().map(|(_, rows)| rows).unwrap_or_default());
                write(&self.store, &rows, None).await?;
                self.saved_sequence = position.evaluated;
            }
            write(&self.store, &[], Some(self.state(standstills))).await
        };
        match timeout(LAST_LIMIT, saving).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => warn!(%error, "storing the progress of VMs failed; records will be read again"),
            Err(_) => warn!("storing the progress of VMs takes too long; records will be read again"),
        }
    }
}

async fn write(
    store: &Store,
    rows: &[(InstanceId, u64, u64)],
    state: Option<StoredState>,
) -> Result<(), AlertError> {
    let updates: Vec<(Document, Document)> = rows
        .iter()
        .map(|(vm, newest_ms, arrived_ms)| {
            let newer = doc! {
                "$max": { "newest_ms": signed(*newest_ms), "arrived_ms": signed(*arrived_ms) },
            };
            (doc! { "_id": vm.as_str() }, newer)
        })
        .collect();
    let writes = stream::iter(updates).map(|(own, newer)| {
        let progress = store.progress.clone();
        async move { progress.update_one(own, newer).upsert(true).await }
    });
    let mut writes = writes.buffer_unordered(AT_ONCE);
    while let Some(written) = writes.next().await {
        written?;
    }
    if let Some(state) = state {
        let own: Document = doc! { "_id": ENGINE_STATE };
        store.state.replace_one(own, state).upsert(true).await?;
    }
    Ok(())
}
