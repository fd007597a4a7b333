//! The document of a row that a hypervisor measured. A value that the hypervisor does not know is missing in it.

use std::time::SystemTime;

use bson::{RawBson, RawDocumentBuf, rawdoc};
use vmwatch_api::{hypervisor_samples::HypervisorSample, measures::VmMeasures, time::UtcOffset};
use vmwatch_blocks::RowIdentity;

use super::{
    Documents, FAR_AHEAD, Refusal, micros_of, possible_moment, row_id,
    rows::{Dates, MAX_NAME, append, max_value, not_longer, within},
};

impl Documents {
    /// Validates a sample of a hypervisor and converts it into a MongoDB document, like [`Documents::from_sample`].
    pub fn from_hypervisor_sample(
        sample: &HypervisorSample,
        offset: UtcOffset,
        arrival: SystemTime,
    ) -> Result<Self, Refusal> {
        let moment = possible_moment(&sample.create_date, offset, arrival)?;
        Ok(Self {
            hypervisor: vec![document(sample, Dates::of(moment, arrival))?],
            arrival: Some(micros_of(arrival)),
            far_ahead: moment > arrival + FAR_AHEAD,
            ..Self::default()
        })
    }
}

fn document(sample: &HypervisorSample, at: Dates) -> Result<RawDocumentBuf, Refusal> {
    not_longer("hypervisor", &sample.hypervisor, MAX_NAME)?;
    let values = VmMeasures {
        cpu_util: sample.cpu_util,
        mem: sample.mem,
        disk_read: sample.disk_read,
        disk_write: sample.disk_write,
        net_incoming: sample.net_incoming,
        net_outgoing: sample.net_outgoing,
        cores: sample.cores.map(f64::from),
        steal: sample.steal,
        ..VmMeasures::default()
    };
    for (measure, value) in values.described() {
        within(measure.name, value.unwrap_or(0.0), max_value(measure.unit))?;
    }
    let cores = sample.cores.map(i32::try_from).transpose();
    let cores = cores.map_err(|_| Refusal::Number("cores"))?;
    let (instance, date) = (sample.instance_id.as_str(), sample.create_date.as_str());
    let mut row = rawdoc! {
        "instance_id": instance,
        "create_date": date,
        "_id": row_id(instance, date, at.second, RowIdentity::Hypervisor),
        "hypervisor": sample.hypervisor.as_str(),
        "sampled_at": at.effective,
    };
    for (name, value) in [
        ("cpu_util", sample.cpu_util),
        ("mem", sample.mem),
        ("disk_read", sample.disk_read),
        ("disk_write", sample.disk_write),
        ("net_incoming", sample.net_incoming),
        ("net_outgoing", sample.net_outgoing),
        ("steal", sample.steal),
    ] {
        append(&mut row, name, value.map(RawBson::Double));
    }
    append(&mut row, "cores", cores.map(RawBson::Int32));
    Ok(row)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(json: &serde_json::Value) -> HypervisorSample {
        let mut all = serde_json::json!({
            "instance_id": "vm-1", "create_date": "2017-01-01T21:37:59.001065", "hypervisor": "lab",
        });
        all.as_object_mut()
            .unwrap()
            .extend(json.as_object().unwrap().clone());
        serde_json::from_value(all).unwrap()
    }

    fn documents(sample: &HypervisorSample) -> Result<Documents, Refusal> {
        Documents::from_hypervisor_sample(sample, "+08:00".parse().unwrap(), SystemTime::now())
    }

    #[test]
    fn unknown_values_are_missing_in_the_row() {
        let row = &documents(&sample(&serde_json::json!({ "cpu_util": 1.5, "cores": 4 })))
            .unwrap()
            .hypervisor[0];
        let keys: Vec<_> = row
            .into_iter()
            .map(|element| element.unwrap().0.as_str())
            .collect();
        assert_eq!(
            keys,
            [
                "instance_id",
                "create_date",
                "_id",
                "hypervisor",
                "sampled_at",
                "cpu_util",
                "cores"
            ]
        );
        assert_eq!(
            (row.get_f64("cpu_util").unwrap(), row.get_i32("cores").unwrap()),
            (1.5, 4)
        );
    }

    #[test]
    fn impossible_values_are_refused() {
        for (json, field) in [
            (serde_json::json!({ "cpu_util": 100.1 }), "cpu_util"),
            (serde_json::json!({ "steal": -0.1 }), "steal"),
            (serde_json::json!({ "net_incoming": 1e300 }), "net_incoming"),
            (serde_json::json!({ "cores": u32::MAX }), "cores"),
        ] {
            assert_eq!(documents(&sample(&json)).unwrap_err(), Refusal::Number(field));
        }
        let long = sample(&serde_json::json!({ "hypervisor": "x".repeat(257) }));
        assert_eq!(
            documents(&long).unwrap_err(),
            Refusal::Text("hypervisor", MAX_NAME)
        );
        let ahead = sample(&serde_json::json!({ "create_date": "2999-01-01T00:00:00.000000" }));
        assert!(matches!(documents(&ahead).unwrap_err(), Refusal::Ahead(_)));
    }
}
