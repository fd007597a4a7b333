//! The intervals of samples and the UTC offset: settings, or values of the enrolment.

use std::time::Duration;

use vmwatch_api::{enrollment::Enrolled, time::UtcOffset};
use vmwatch_service::config::{self, Environment, Invalid, Setting, Span, UTC_OFFSET, Value};

use super::enrolment::is_set;

pub(super) const VM_INTERVAL: Setting = Setting {
    name: "VMWATCH_AGENT_VM_INTERVAL",
    value: Value::Duration("100ms", "1h"),
    default: "10s",
    help: "interval at which the agent samples the VM's own measures, such as CPU and memory usage; if not set, an enrolled agent uses the interval of its enrolment",
};
pub(super) const PROCESS_INTERVAL: Setting = Setting {
    name: "VMWATCH_AGENT_PROCESS_INTERVAL",
    value: Value::Duration("100ms", "24h"),
    default: "60s",
    help: "interval at which the agent samples the VM's processes and filesystems; must be a whole multiple of VMWATCH_AGENT_VM_INTERVAL; if not set, an enrolled agent uses the interval of its enrolment",
};

/// The intervals at which the VM and its processes are sampled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Intervals {
    pub(crate) vm: Duration,
    /// Number of samples of the VM per sample of its processes; at least 1.
    pub(crate) vm_per_process: u32,
}

/// When samples are taken, and the offset of their times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Timing {
    pub(crate) intervals: Intervals,
    pub(crate) utc_offset: UtcOffset,
}

/// The values that are set in the environment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct GivenTiming {
    vm: Option<Duration>,
    process: Option<Duration>,
    utc_offset: Option<UtcOffset>,
}

impl Timing {
    /// Reads the settings of an agent that is not enrolled.
    pub(super) fn read(env: &Environment) -> Result<Self, Invalid> {
        let (vm, process) = (env.duration(&VM_INTERVAL), env.duration(&PROCESS_INTERVAL));
        let utc_offset = config::utc_offset(env);
        let intervals = intervals(vm?, process?).map_err(|why| env.problem(why))?;
        let utc_offset = utc_offset?;
        Ok(Self {
            intervals,
            utc_offset,
        })
    }

    /// The values of an enrolment. The error states which value is not permitted.
    pub(crate) fn enrolled(enrolled: &Enrolled) -> Result<Self, String> {
        GivenTiming::default().or(enrolled)
    }
}

impl GivenTiming {
    pub(super) fn read(env: &Environment) -> Result<Self, Invalid> {
        let duration = |setting: &Setting| {
            let set = is_set(env, setting);
            set.then(|| env.duration(setting)).transpose()
        };
        let (vm, process) = (duration(&VM_INTERVAL), duration(&PROCESS_INTERVAL));
        let utc_offset = env.optional(&UTC_OFFSET);
        Ok(Self {
            vm: vm?,
            process: process?,
            utc_offset: utc_offset?,
        })
    }

    /// Takes the values that are not set from the enrolment.
    pub(crate) fn or(self, enrolled: &Enrolled) -> Result<Timing, String> {
        let vm = self.vm.unwrap_or(Duration::from_millis(enrolled.vm_interval_ms));
        let process = self
            .process
            .unwrap_or(Duration::from_millis(enrolled.process_interval_ms));
        for (setting, value) in [(VM_INTERVAL, vm), (PROCESS_INTERVAL, process)] {
            let Some((least, most)) = setting.value.span_range() else {
                continue;
            };
            if value < least.0 || value > most.0 {
                return Err(format!(
                    "{}: {} is not from {least} to {most}",
                    setting.name,
                    Span(value)
                ));
            }
        }
        Ok(Timing {
            intervals: intervals(vm, process)?,
            utc_offset: self.utc_offset.unwrap_or(enrolled.utc_offset),
        })
    }
}

// The kernel accounts CPU time in ticks of 10 ms, so percentages over less than 100 ms would be mostly noise.
fn intervals(vm: Duration, process: Duration) -> Result<Intervals, String> {
    let multiple = process.as_millis() / vm.as_millis();
    let remainder = process.as_millis() % vm.as_millis();
    match u32::try_from(multiple) {
        Ok(vm_per_process @ 1..) if remainder == 0 => Ok(Intervals { vm, vm_per_process }),
        _ => Err(format!(
            "{} must be a whole multiple of {} ({})",
            PROCESS_INTERVAL.name,
            VM_INTERVAL.name,
            Span(vm)
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_override_values_of_the_enrolment() {
        let enrolled = |vm_interval_ms, process_interval_ms| Enrolled {
            instance_id: "vm-1".parse().unwrap(),
            nats_urls: Vec::new(),
            ca_certificates: String::new(),
            utc_offset: "+08:00".parse().unwrap(),
            vm_interval_ms,
            process_interval_ms,
        };
        let given = |vm: &str, offset: &str| {
            let env = Environment::from_variables([(VM_INTERVAL.name, vm), (UTC_OFFSET.name, offset)]);
            GivenTiming::read(&env).unwrap()
        };
        let timing = given("", "").or(&enrolled(5_000, 20_000)).unwrap();
        assert_eq!(
            (timing.intervals.vm.as_secs(), timing.intervals.vm_per_process),
            (5, 4)
        );
        assert_eq!(timing.utc_offset.to_string(), "+08:00");
        let timing = given("10s", "-01:00").or(&enrolled(5_000, 20_000)).unwrap();
        assert_eq!(
            (timing.intervals.vm.as_secs(), timing.intervals.vm_per_process),
            (10, 2)
        );
        assert_eq!(timing.utc_offset.to_string(), "-01:00");
        let error = given("7s", "").or(&enrolled(5_000, 20_000)).unwrap_err();
        assert!(error.contains("whole multiple"), "{error}");
        for (vm, process) in [(0, 60_000), (10_000, 0), (10_000, 25_000), (10_000, u64::MAX)] {
            assert!(
                Timing::enrolled(&enrolled(vm, process)).is_err(),
                "{vm} {process}"
            );
        }
    }
}
