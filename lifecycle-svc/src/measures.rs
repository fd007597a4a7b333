//! Measures of VMs as their hypervisor sees them, so that a VM without an agent has measures too.
//!
//! The replica that polls a hypervisor reads the counters of its VMs at regular intervals, computes the measures from two
//! consecutive readings, and publishes them in the stream of samples. If this fails, the measures of the interval are
//! lost; this is counted and logged. Reading has a permit of its own, and no VM is changed to get more measures.

mod publish;
mod readings;

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use metrics::{counter, histogram};
use tokio::time::sleep_until;
use tracing::{debug, info, warn};
use vmwatch_api::time::CreateDate;

use self::readings::{Origin, Readings};
use crate::{
    config::MeasureSettings,
    driver::{Driver, DriverError, MAX_LISTED},
    fence::LeaseEnd,
    inventory::Inventory,
};

/// Maximum time for publishing the measures of one interval.
const PUBLISH_LIMIT: Duration = Duration::from_secs(10);

/// Measures the VMs of one hypervisor.
pub(crate) struct Measures {
    inventory: Arc<Inventory>,
    hypervisor: String,
    settings: MeasureSettings,
}

impl Measures {
    pub(crate) fn new(inventory: &Arc<Inventory>, hypervisor: &str, settings: MeasureSettings) -> Self {
        Self {
            inventory: Arc::clone(inventory),
            hypervisor: hypervisor.to_owned(),
            settings,
        }
    }

    /// Publishes measures every interval; never returns. It must run only while this replica holds the lease on polling
    /// the hypervisor. The first samples have no rates, because a rate needs two readings.
    pub(crate) async fn run(&self, driver: &dyn Driver, lease_end: &LeaseEnd) {
        let mut readings = Readings::default();
        let mut is_failing = false;
        loop {
            let next = tokio::time::Instant::now() + self.settings.interval;
            let read = self.read(driver, &mut readings, lease_end).await;
            match &read {
                Ok(()) if is_failing => {
                    info!(
                        hypervisor = self.hypervisor,
                        "reading the counters of VMs succeeds again"
                    );
                }
                Ok(()) => {}
                Err(error) if is_failing => {
                    debug!(hypervisor = self.hypervisor, %error, "reading the counters of VMs failed again");
                }
                Err(error) => {
                    warn!(hypervisor = self.hypervisor, %error, "reading the counters of VMs failed; retrying at each interval");
                }
            }
            is_failing = read.is_err();
            sleep_until(next).await;
        }
    }

    /// Reads the counters and publishes the measures since the previous reading.
    async fn read(
        &self,
        driver: &dyn Driver,
        readings: &mut Readings,
        lease_end: &LeaseEnd,
    ) -> Result<(), DriverError> {
        let began = Instant::now();
        let stats = driver.stats().await;
        let result = if stats.is_ok() { "complete" } else { "failed" };
        counter!("vmwatch_hypervisor_measurements_total", "hypervisor" => self.hypervisor.clone(), "result" => result)
            .increment(1);
        histogram!("vmwatch_hypervisor_measurement_seconds", "hypervisor" => self.hypervisor.clone())
            .record(began.elapsed());
        let stats = stats.inspect_err(|_| readings.clear())?;
        if stats.len() >= MAX_LISTED {
            warn!(
                hypervisor = self.hypervisor,
                most = MAX_LISTED,
                "the hypervisor has more active VMs than can be measured; the remaining VMs have no measures"
            );
        }
        let origin = Origin {
            hypervisor: &self.hypervisor,
            create_date: CreateDate::at(SystemTime::now(), self.settings.utc_offset),
        };
        let mut samples = readings.samples(&origin, stats, Instant::now());
        samples.retain(|sample| {
            self.inventory
                .is_measured_on(&self.hypervisor, &sample.instance_id)
        });
        // If the lease has passed, another replica may measure the VMs already.
        if !lease_end.has_passed() {
            let limit = self.settings.interval.min(PUBLISH_LIMIT);
            publish::all(&self.inventory.bus, &self.hypervisor, samples, limit).await;
        }
        Ok(())
    }
}
