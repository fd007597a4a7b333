//! Tests VMs whose clock is slow.

use super::*;

/// A sample that arrives at this second from a VM whose clock is `slow` seconds behind.
fn slow(arrived: u64, slow: u64, value: f64) -> EvaluationRecord {
    EvaluationRecord {
        arrived_ms: at(arrived),
        ..cpu("vm-1", at(arrived - slow), value)
    }
}

#[test]
fn vm_with_a_slow_clock_is_evaluated_after_a_minute_as_of_the_arrival_of_its_samples() {
    let mut evaluator = Evaluator::new(&[rule(CPU, 30)]);
    for second in (5000..5060).step_by(10) {
        assert_eq!(evaluator.steps(&slow(second, 3600, 95.0)), [], "{second}");
    }
    let began = evaluator.take(&slow(5060, 3600, 95.0));
    assert_eq!((steps(&began), began[0].since_ms), (vec![PENDS], at(5060)));
    for second in [5070, 5080] {
        assert_eq!(evaluator.steps(&slow(second, 3600, 95.0)), []);
    }
    assert_eq!(evaluator.steps(&slow(5090, 3601, 95.0)), [Step::Fire]);
    // The clock is corrected.
    assert_eq!(evaluator.steps(&slow(5100, 0, 10.0)), [resolved(5090)]);
}

#[test]
fn spool_of_a_vm_with_a_slow_clock_fires_nothing() {
    let mut evaluator = Evaluator::new(&[rule(CPU, 0)]);
    for second in (5000..5060).step_by(10) {
        assert_eq!(evaluator.steps(&slow(second, 600, 10.0)), []);
    }
    // The agent sends what it has sampled every 10 s in half an hour without a connection.
    for sample in 0..180 {
        let record = EvaluationRecord {
            arrived_ms: at(7000) + sample * 20,
            ..cpu("vm-1", at(4600 + sample * 10), 95.0)
        };
        assert_eq!(evaluator.steps(&record), [], "{sample}");
    }
    assert_eq!(evaluator.steps(&slow(7010, 600, 95.0)), []);
    assert_eq!(evaluator.steps(&slow(7080, 600, 95.0)), [FIRES]);
}

#[test]
fn process_rule_of_a_vm_with_a_slow_clock_is_evaluated() {
    let mut evaluator = Evaluator::new(&[rule(MISSING, 0)]);
    let late = |second| EvaluationRecord {
        arrived_ms: at(second + 3600),
        ..part(second, 0, 0)
    };
    assert_eq!(evaluator.steps(&late(0)), []);
    assert_eq!(evaluator.steps(&late(60)), []);
    let began = evaluator.take(&late(120));
    assert_eq!((steps(&began), began[0].since_ms), (vec![FIRES], at(3660)));
}

#[test]
fn hypervisor_does_not_count_while_a_vm_with_a_slow_clock_is_evaluated() {
    let mut evaluator = Evaluator::new(&[rule(CPU, 0)]);
    let measured = |second, value| EvaluationRecord {
        source: Source::Hypervisor,
        ..cpu("vm-1", at(second), value)
    };
    // Until it is known that the samples of the agent are not from a spool, those of the hypervisor count.
    assert_eq!(evaluator.steps(&slow(5000, 3600, 10.0)), []);
    assert_eq!(evaluator.steps(&measured(5001, 95.0)), [FIRES]);
    assert_eq!(evaluator.steps(&slow(5060, 3600, 10.0)), [resolved(5001)]);
    assert_eq!(evaluator.steps(&measured(5061, 95.0)), []);
    assert_eq!(evaluator.steps(&measured(5180, 95.0)), [FIRES]);
}

#[test]
fn readings_of_a_delay_around_the_limit_are_in_order() {
    let mut evaluator = Evaluator::new(&[rule(CPU, 60)]);
    for second in (5000..5060).step_by(10) {
        assert_eq!(evaluator.steps(&slow(second, 121, 95.0)), []);
    }
    assert_eq!(evaluator.steps(&slow(5060, 119, 95.0)), [PENDS]);
    assert_eq!(evaluator.steps(&slow(5070, 122, 95.0)), []);
    assert_eq!(evaluator.steps(&slow(5119, 118, 95.0)), []);
    assert_eq!(evaluator.steps(&slow(5120, 119, 95.0)), [Step::Fire]);
}
