//! Tests of the rules by which records become changes of alerts.

mod clocks;

use vmwatch_api::{
    alerts::{
        AlertState,
        evaluation::{EvaluationRecord, FilesystemUse, Source, WatchedNames, WatchedProcesses},
        rules::{Rule, UnreadableRule},
    },
    processes::ProcessName,
};

use super::{
    examples::{alert, cpu, record, rule},
    machine::{Machine, Reading, Step, Transition},
    samples::{Evaluation, Samples},
    watched::Watched,
};
use crate::{definitions::Definitions, known_vms::VmFacts};

const START: u64 = 1_000_000_000;
const CPU: &str =
    r#"{"kind":"measure","measure":"cpu_util","threshold":{"direction":"above","limit":90.0,"clear":80.0}}"#;
const DISK: &str =
    r#"{"kind":"filesystem","mount_point":"/*","threshold":{"direction":"above","limit":90.0}}"#;
const MISSING: &str =
    r#"{"kind":"process_count","name":"postgres","threshold":{"direction":"below","limit":1.0}}"#;
const BUSY: &str =
    r#"{"kind":"process_cpu","name":"postgres","threshold":{"direction":"above","limit":100.0}}"#;

/// What evaluates records, as in a replica that holds the lease.
#[derive(Default)]
struct Evaluator {
    machine: Machine,
    samples: Samples,
    watched: Watched,
    facts: VmFacts,
}

impl Evaluator {
    fn new(rules: &[Rule]) -> Self {
        let mut evaluator = Self::default();
        assert_eq!(evaluator.set_rules(rules), []);
        let names = rules
            .iter()
            .filter_map(|rule| rule.spec.condition.process().cloned());
        let names = WatchedNames {
            names: names.collect(),
        };
        evaluator.watched.set(&names, 5);
        evaluator
    }

    fn set_rules(&mut self, rules: &[Rule]) -> Vec<Step> {
        let mut definitions = Definitions::default();
        definitions.rules = rules.to_vec();
        let mut out = Vec::new();
        self.machine.set_rules(&definitions, START + 900_000, &mut out);
        steps(&out)
    }

    fn take(&mut self, record: &EvaluationRecord) -> Vec<Transition> {
        let mut out = Vec::new();
        let mut evaluation = Evaluation {
            machine: &mut self.machine,
            watched: &self.watched,
            facts: &self.facts,
            out: &mut out,
        };
        self.samples.evaluate(record, &mut evaluation);
        out
    }

    fn steps(&mut self, record: &EvaluationRecord) -> Vec<Step> {
        steps(&self.take(record))
    }
}

fn steps(transitions: &[Transition]) -> Vec<Step> {
    transitions.iter().map(|transition| transition.step).collect()
}

/// Seconds after the start.
fn at(second: u64) -> u64 {
    START + second * 1000
}

const FIRES: Step = Step::Begin { fires: true };
const PENDS: Step = Step::Begin { fires: false };

fn resolved(held_second: u64) -> Step {
    Step::Resolve {
        held_ms: Some(at(held_second)),
    }
}

#[test]
fn condition_fires_after_its_duration_and_ends_at_the_clear_value() {
    let mut evaluator = Evaluator::new(&[rule(CPU, 60)]);
    let mut step = |second, value| evaluator.steps(&cpu("vm-1", at(second), value));
    assert_eq!(step(0, 89.0), []);
    assert_eq!(step(10, 91.0), [PENDS]);
    assert_eq!(step(60, 85.0), []);
    assert_eq!(step(70, 95.0), [Step::Fire]);
    assert_eq!(step(80, 81.0), []);
    assert_eq!(step(90, 80.0), [resolved(80)]);
    assert_eq!(step(100, 85.0), []);
}

#[test]
fn condition_that_ends_before_its_duration_fires_nothing() {
    let mut evaluator = Evaluator::new(&[rule(CPU, 60)]);
    let mut step = |second, value| evaluator.steps(&cpu("vm-1", at(second), value));
    assert_eq!(step(0, 95.0), [PENDS]);
    assert_eq!(step(50, 10.0), [Step::Withdraw]);
    assert_eq!(step(60, 95.0), [PENDS]);
    assert_eq!(step(119, 95.0), []);
    assert_eq!(step(120, 95.0), [Step::Fire]);
}

#[test]
fn records_that_are_evaluated_again_after_a_restart_make_the_same_alert() {
    let rules = [rule(CPU, 10)];
    let records = [
        cpu("vm-1", at(0), 95.0),
        cpu("vm-1", at(10), 95.0),
        cpu("vm-1", at(20), 95.0),
    ];
    let mut before = Evaluator::new(&rules);
    let first: Vec<_> = records.iter().flat_map(|record| before.take(record)).collect();
    assert_eq!(steps(&first), [PENDS, Step::Fire]);
    // Killed before anything was written: all of it happens again, with the same beginning.
    let mut lost = Evaluator::new(&rules);
    let again: Vec<_> = records.iter().flat_map(|record| lost.take(record)).collect();
    assert_eq!(again, first);
    // Killed after everything was written and before the records were acknowledged: nothing happens.
    let mut restarted = Evaluator::new(&rules);
    let mut stored = alert(&rules[0], Some("vm-1"), "", at(10));
    stored.since_ms = at(0);
    let mut out = Vec::new();
    restarted.machine.restore(&stored, at(30), &mut out);
    assert_eq!(out, []);
    for record in &records {
        assert_eq!(restarted.take(record), []);
    }
    assert_eq!(restarted.steps(&cpu("vm-1", at(30), 10.0)), [resolved(20)]);
}

#[test]
fn pending_alert_continues_after_a_restart() {
    let rules = [rule(CPU, 60)];
    let mut restarted = Evaluator::new(&rules);
    let mut stored = alert(&rules[0], Some("vm-1"), "", at(0));
    (stored.state, stored.fired_ms) = (AlertState::Pending, None);
    restarted.machine.restore(&stored, at(30), &mut Vec::new());
    assert_eq!(restarted.steps(&cpu("vm-1", at(50), 95.0)), []);
    assert_eq!(restarted.steps(&cpu("vm-1", at(60), 95.0)), [Step::Fire]);
}

#[test]
fn older_record_does_not_end_an_alert_that_began_later() {
    let rules = [rule(CPU, 0)];
    let mut restarted = Evaluator::new(&rules);
    let stored = alert(&rules[0], Some("vm-1"), "", at(20));
    restarted.machine.restore(&stored, at(30), &mut Vec::new());
    assert_eq!(restarted.steps(&cpu("vm-1", at(10), 10.0)), []);
    assert_eq!(restarted.steps(&cpu("vm-1", at(20), 95.0)), []);
    assert_eq!(restarted.machine.len(), 1);
}

#[test]
fn record_that_is_older_than_the_newest_of_its_vm_is_ignored() {
    let mut evaluator = Evaluator::new(&[rule(CPU, 0)]);
    assert_eq!(evaluator.steps(&cpu("vm-1", at(10), 10.0)), []);
    assert_eq!(evaluator.steps(&cpu("vm-1", at(9), 95.0)), []);
    assert_eq!(evaluator.steps(&cpu("vm-2", at(9), 95.0)), [FIRES]);
}

#[test]
fn samples_from_a_spool_begin_and_end_nothing_and_show_that_the_vm_is_not_silent() {
    let mut evaluator = Evaluator::new(&[rule(CPU, 0)]);
    let late = |second, value| EvaluationRecord {
        arrived_ms: at(1000),
        ..cpu("vm-1", at(second), value)
    };
    assert_eq!(evaluator.steps(&late(100, 95.0)), []);
    let id = "vm-1".parse().unwrap();
    assert_eq!(evaluator.samples.get(&id).unwrap().arrived_ms, at(1000));
    assert_eq!(evaluator.steps(&cpu("vm-1", at(1000), 95.0)), [FIRES]);
    let later = |second, value| EvaluationRecord {
        arrived_ms: at(2000),
        ..cpu("vm-1", at(second), value)
    };
    assert_eq!(evaluator.steps(&later(1100, 10.0)), []);
    assert_eq!(evaluator.steps(&cpu("vm-1", at(2000), 10.0)), [resolved(1000)]);
}

#[test]
fn pending_condition_begins_again_after_a_long_gap() {
    let mut evaluator = Evaluator::new(&[rule(CPU, 300)]);
    let mut step = |second, value| evaluator.steps(&cpu("vm-1", at(second), value));
    assert_eq!(step(0, 95.0), [PENDS]);
    // The VM was off for an hour, and is busy while it boots.
    assert_eq!(step(3600, 95.0), [Step::Withdraw, PENDS]);
    assert_eq!(step(3700, 10.0), [Step::Withdraw]);
}

#[test]
fn condition_of_an_agent_with_a_long_interval_fires_at_the_third_sample() {
    let mut evaluator = Evaluator::new(&[rule(CPU, 300)]);
    let mut step = |second, value| evaluator.steps(&cpu("vm-1", at(second), value));
    assert_eq!(step(0, 95.0), [PENDS]);
    assert_eq!(step(3600, 95.0), [Step::Withdraw, PENDS]);
    assert_eq!(step(7200, 95.0), [Step::Fire]);
}

#[test]
fn value_of_a_firing_alert_is_renewed_once_per_minute() {
    let mut evaluator = Evaluator::new(&[rule(CPU, 0)]);
    let mut step = |second, value| evaluator.steps(&cpu("vm-1", at(second), value));
    assert_eq!(step(0, 95.0), [FIRES]);
    assert_eq!(step(50, 96.0), []);
    assert_eq!(step(60, 97.0), [Step::Refresh]);
    assert_eq!(step(120, 97.0), []);
}

#[test]
fn mount_points_of_a_vm_are_two_alerts() {
    let mut evaluator = Evaluator::new(&[rule(DISK, 0)]);
    let mut take = |second, used: &[(&str, f64)]| {
        let filesystems = used.iter().map(|(mount_point, used)| FilesystemUse {
            mount_point: (*mount_point).to_owned(),
            used: *used,
        });
        let record = EvaluationRecord {
            filesystems: filesystems.collect(),
            ..record("vm-1", at(second))
        };
        let subjects = evaluator.take(&record).into_iter();
        subjects
            .map(|one| (one.key.subject, one.step))
            .collect::<Vec<_>>()
    };
    let all = take(0, &[("/", 95.0), ("/var", 96.0), ("/home", 10.0)]);
    assert_eq!(all, [("/".to_owned(), FIRES), ("/var".to_owned(), FIRES)]);
    assert_eq!(
        take(60, &[("/", 10.0), ("/var", 96.0)]),
        [("/".to_owned(), resolved(0))]
    );
    // A sample without filesystems says nothing about them.
    assert_eq!(take(2000, &[]), []);
    // A filesystem that was unmounted is no longer full.
    assert_eq!(take(2060, &[("/", 10.0)]), [("/var".to_owned(), resolved(60))]);
}

/// A part of a sample with this many processes named `postgres`, each with 60 % of a core.
fn part(second: u64, part: u32, processes: u32) -> EvaluationRecord {
    let name = ProcessName::new("postgres").unwrap();
    let watched = WatchedProcesses {
        name,
        processes,
        cpu_util: f64::from(processes) * 60.0,
        mem: 1.0,
    };
    EvaluationRecord {
        part,
        has_processes: true,
        processes: if processes == 0 { Vec::new() } else { vec![watched] },
        watched_revision: 5,
        ..record("vm-1", at(second))
    }
}

#[test]
fn missing_process_is_decided_when_the_next_sample_begins() {
    let mut evaluator = Evaluator::new(&[rule(MISSING, 0)]);
    assert_eq!(evaluator.steps(&part(0, 0, 0)), []);
    assert_eq!(evaluator.steps(&part(0, 1, 1)), []);
    assert_eq!(evaluator.steps(&part(60, 0, 0)), []);
    assert_eq!(evaluator.steps(&part(60, 1, 0)), []);
    // A sample without process rows completes the one before as well, and says nothing about processes.
    let began = evaluator.take(&cpu("vm-1", at(70), 1.0));
    assert_eq!(steps(&began), [FIRES]);
    assert_eq!(
        (began[0].since_ms, began[0].value, began[0].key.subject.as_str()),
        (at(60), Some(0.0), "postgres")
    );
    assert_eq!(evaluator.steps(&cpu("vm-1", at(80), 1.0)), []);
    assert_eq!(evaluator.steps(&part(120, 0, 1)), []);
    assert_eq!(evaluator.steps(&cpu("vm-1", at(130), 1.0)), [resolved(60)]);
}

#[test]
fn parts_of_a_sample_are_summed_once_each() {
    let mut evaluator = Evaluator::new(&[rule(BUSY, 0)]);
    assert_eq!(evaluator.steps(&part(0, 0, 1)), []);
    assert_eq!(
        evaluator.steps(&part(0, 0, 1)),
        [],
        "the part was delivered twice"
    );
    // A sum above the limit is decided at once.
    assert_eq!(evaluator.steps(&part(0, 1, 1)), [FIRES]);
    // A sum below it only when the sample is complete.
    assert_eq!(evaluator.steps(&part(60, 0, 1)), []);
    assert_eq!(evaluator.steps(&part(120, 0, 1)), [resolved(0)]);
}

#[test]
fn name_that_the_agents_list_did_not_have_is_not_missing() {
    let mut evaluator = Evaluator::new(&[rule(MISSING, 0)]);
    for (second, revision) in [(0, 4), (60, 0), (120, 5)] {
        let record = EvaluationRecord {
            watched_revision: revision,
            ..part(second, 0, 0)
        };
        assert_eq!(evaluator.steps(&record), []);
    }
    assert_eq!(evaluator.steps(&part(180, 0, 0)), [FIRES]);
}

#[test]
fn hypervisor_counts_only_while_the_agent_is_silent() {
    let mut evaluator = Evaluator::new(&[rule(CPU, 0)]);
    let measured = |second, value| EvaluationRecord {
        source: Source::Hypervisor,
        ..cpu("vm-1", at(second), value)
    };
    assert_eq!(evaluator.steps(&cpu("vm-1", at(0), 10.0)), []);
    assert_eq!(evaluator.steps(&measured(119, 95.0)), []);
    assert_eq!(evaluator.steps(&measured(120, 95.0)), [FIRES]);
    let id = "vm-1".parse().unwrap();
    assert_eq!(
        evaluator.samples.get(&id).unwrap().arrived_ms,
        at(0),
        "the agent is silent"
    );
    assert_eq!(evaluator.steps(&cpu("vm-1", at(130), 10.0)), [resolved(120)]);
}

#[test]
fn change_of_what_a_rule_means_ends_its_alerts_and_other_changes_do_not() {
    let old = rule(CPU, 0);
    let mut evaluator = Evaluator::new(std::slice::from_ref(&old));
    assert_eq!(evaluator.steps(&cpu("vm-1", at(0), 95.0)), [FIRES]);
    let mut renamed = old.clone();
    (renamed.revision, renamed.spec.name) = (2, "another name".parse().unwrap());
    assert_eq!(evaluator.set_rules(&[renamed.clone()]), []);
    let mut longer = renamed;
    (longer.revision, longer.spec.for_seconds) = (3, 60);
    let ended = Step::Resolve { held_ms: None };
    assert_eq!(evaluator.set_rules(&[longer.clone()]), [ended]);
    assert_eq!(evaluator.steps(&cpu("vm-1", at(1000), 95.0)), [PENDS]);
    longer.spec.enabled = false;
    assert_eq!(evaluator.set_rules(&[longer]), [Step::Withdraw]);
    assert_eq!(evaluator.steps(&cpu("vm-1", at(1010), 95.0)), []);
}

#[test]
fn alerts_of_rules_that_changed_during_a_restart_end() {
    let old = rule(CPU, 0);
    let mut changed = rule(DISK, 0);
    changed.id = old.id.clone();
    let stored = alert(&old, Some("vm-1"), "", at(0));
    for (rules, ends) in [(vec![old], false), (vec![changed], true), (Vec::new(), true)] {
        let mut restarted = Evaluator::new(&rules);
        let mut out = Vec::new();
        restarted.machine.restore(&stored, at(10), &mut out);
        assert_eq!(!out.is_empty(), ends);
    }
}

#[test]
fn alerts_of_a_rule_that_this_version_cannot_decode_stay() {
    let own = rule(CPU, 0);
    let mut evaluator = Evaluator::new(std::slice::from_ref(&own));
    assert_eq!(evaluator.steps(&cpu("vm-1", at(0), 95.0)), [FIRES]);
    let unreadable = UnreadableRule {
        id: own.id,
        revision: 2,
        name: None,
        problem: "of a newer version".to_owned(),
    };
    let mut definitions = Definitions::default();
    definitions.unreadable = vec![unreadable];
    let mut out = Vec::new();
    evaluator.machine.set_rules(&definitions, at(10), &mut out);
    assert_eq!((out, evaluator.machine.len()), (Vec::new(), 1));
}

#[test]
fn rule_applies_only_to_the_vms_that_it_selects() {
    let mut selective = rule(CPU, 0);
    selective.spec.vms = serde_json::from_str(r#"{"labels":["env=prod"]}"#).unwrap();
    let mut evaluator = Evaluator::new(&[selective]);
    assert_eq!(evaluator.steps(&cpu("vm-1", at(0), 95.0)), []);
    evaluator.facts.labels.insert("env".to_owned(), "prod".to_owned());
    assert_eq!(evaluator.steps(&cpu("vm-1", at(10), 95.0)), [FIRES]);
}

#[test]
fn condition_whose_alert_was_lost_begins_again() {
    let mut evaluator = Evaluator::new(&[rule(CPU, 0)]);
    let began = evaluator.take(&cpu("vm-1", at(0), 95.0));
    evaluator.machine.forget(&began[0].key);
    assert_eq!(evaluator.steps(&cpu("vm-1", at(10), 95.0)), [FIRES]);
}

#[test]
fn time_of_a_state_counts_from_its_beginning() {
    let off = rule(r#"{"kind":"vm_state","states":["shut_off"]}"#, 60);
    let mut evaluator = Evaluator::new(std::slice::from_ref(&off));
    let vm = "vm-1".parse().unwrap();
    let mut out = Vec::new();
    for second in [30, 59, 60, 61] {
        let reading = Reading::holds(true, at(0), at(second));
        evaluator
            .machine
            .observe(&off, Some(&vm), "lab", reading, &mut out);
    }
    assert_eq!(steps(&out), [PENDS, Step::Fire]);
    assert_eq!((out[1].at_ms, out[1].since_ms), (at(60), at(0)));
}
