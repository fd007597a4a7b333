//! Records samples from real agents: one on this machine, and one in a QEMU guest.

use std::{
    collections::BTreeSet,
    env,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::ensure;
use futures::StreamExt;
use testkit::{Libvirtd, Program, Stack, eventually};
use tokio::task::JoinHandle;
use vmwatch_api::metrics::{SAMPLE_SUBJECT_PREFIX, Sample};
use vmwatch_blocks::{SAMPLE_LIMITS, decode_sample};

use crate::samples;

/// The intervals of the recorded agents: as many samples of the VM for each of its processes as by default, but twenty
/// times as often.
const INTERVALS: [&str; 2] = ["500ms", "3s"];
const PROCESS_INTERVAL: Duration = Duration::from_secs(3);
/// The VM id of the guest.
const GUEST: &str = "5d6b1c9a-3f0e-4a57-9a86-2f4c1e0b7d11";
/// The setting with the folder of the guest's kernel and file system.
const GUEST_IMAGE: &str = "VMWATCH_TEST_GUEST";
/// Maximum number of recorded messages, which is far more than two agents send in the time of the benchmark.
const MAX_MESSAGES: usize = 20_000;

/// Running agents whose samples are recorded.
pub(super) struct Recording {
    _stack: Stack,
    /// The hypervisor of the guest, if the guest's image is installed.
    guest: Option<Libvirtd>,
    messages: Arc<Mutex<Vec<(Sample, usize)>>>,
    task: JoinHandle<()>,
}

/// The recorded samples of an agent, and the sizes of their messages in bytes.
pub(super) type Recorded = Vec<(Sample, usize)>;

impl Drop for Recording {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Recording {
    pub(super) async fn start() -> anyhow::Result<Self> {
        let [vm, processes] = INTERVALS;
        let stack = samples::stack()
            .replicas(Program::Agent, 1)
            .set(Program::Agent, "VMWATCH_AGENT_VM_INTERVAL", vm)
            .set(Program::Agent, "VMWATCH_AGENT_PROCESS_INTERVAL", processes)
            .start()
            .await;
        let subject = format!("{SAMPLE_SUBJECT_PREFIX}>");
        let mut published = stack.bus.client_for_tests().subscribe(subject).await?;
        let messages = Arc::new(Mutex::new(Vec::new()));
        let into = Arc::clone(&messages);
        let task = tokio::spawn(async move {
            while let Some(message) = published.next().await {
                let mut messages = into.lock().unwrap_or_else(PoisonError::into_inner);
                if let Ok(sample) = decode_sample(&message.payload, SAMPLE_LIMITS)
                    && messages.len() < MAX_MESSAGES
                {
                    messages.push((sample, message.payload.len()));
                }
            }
        });
        let guest = match env::var_os(GUEST_IMAGE) {
            Some(_) => Some(start_guest(&stack).await),
            None => None,
        };
        Ok(Self {
            _stack: stack,
            guest,
            messages,
            task,
        })
    }

    /// Waits until each agent has sent this number of samples of processes, and returns all samples of each.
    pub(super) async fn finish(self, samples: u32) -> anyhow::Result<Vec<(&'static str, Recorded)>> {
        let mut agents = vec![("recorded from this machine", testkit::THIS_MACHINE)];
        if self.guest.is_some() {
            agents.push(("recorded from a QEMU guest", GUEST));
        }
        let limit = PROCESS_INTERVAL * samples + Duration::from_mins(3);
        let mut recorded = Vec::new();
        for (name, instance) in agents {
            eventually("the agents have sent enough samples", limit, async || {
                let sent = self.samples_of_processes(instance);
                (sent >= samples as usize)
                    .then_some(())
                    .ok_or_else(|| format!("{instance} has sent {sent} samples of its processes"))
            })
            .await;
            let messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
            let own = messages
                .iter()
                .filter(|(sample, _)| sample.instance_id.as_str() == instance);
            recorded.push((name, own.cloned().collect()));
        }
        ensure!(!self.task.is_finished(), "recording ended early");
        Ok(recorded)
    }

    /// Number of samples of its processes that a VM has sent. A sample may have come in several messages.
    fn samples_of_processes(&self, instance: &str) -> usize {
        let messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        let own = messages
            .iter()
            .filter(|(sample, _)| sample.instance_id.as_str() == instance && !sample.processes.is_empty());
        let moments: BTreeSet<_> = own.map(|(sample, _)| sample.create_date.as_str()).collect();
        moments.len()
    }
}

/// Starts a guest with an agent.
async fn start_guest(stack: &Stack) -> Libvirtd {
    let [vm, processes] = INTERVALS;
    let libvirtd = Libvirtd::start().await;
    // QEMU's user network maps 10.0.2.2 to this machine's loopback address.
    let bus = stack.nats.url().replace("127.0.0.1", "10.0.2.2");
    let settings = [
        ("NATS_URL", &*bus),
        ("AGENT_VM_INTERVAL", vm),
        ("AGENT_PROCESS_INTERVAL", processes),
    ];
    libvirtd.define_guest(GUEST, &settings);
    libvirtd.virsh(&["start", GUEST]);
    libvirtd
}
