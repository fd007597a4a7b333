//! Two or more things under the same load, in turns.

use std::time::Duration;

use crate::{
    load::Load,
    report::{Report, number},
    statistics::Series,
    usage,
};

/// Requests of each side before anything counts.
const WARM_UP: Duration = Duration::from_secs(2);

/// Something that takes load.
pub(crate) struct Side {
    pub(crate) name: &'static str,
    pub(crate) load: Load,
    /// Whose CPU is counted, each with those that it has started.
    pub(crate) processes: Vec<(&'static str, u32)>,
}

/// What the rounds of a side came to, in their order.
#[derive(Debug, Default)]
pub(crate) struct Rounds {
    pub(crate) a_second: Vec<f64>,
    /// Microseconds a request, of all of its processes together.
    pub(crate) cpu: Vec<f64>,
    /// And of each.
    pub(crate) cpu_of: Vec<(&'static str, Vec<f64>)>,
    /// Milliseconds.
    pub(crate) median: Vec<f64>,
    pub(crate) p99: Vec<f64>,
}

/// How a comparison is made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) pairs: u32,
    pub(crate) time: Duration,
    pub(crate) connections: usize,
}

/// Loads the sides in turns, in turned order from pair to pair, after a warm-up of each.
pub(crate) async fn compare(sides: &[Side], plan: Plan) -> anyhow::Result<Vec<Rounds>> {
    let mut rounds: Vec<Rounds> = sides.iter().map(|_| Rounds::default()).collect();
    for side in sides {
        side.load.closed(plan.connections, WARM_UP).await?;
    }
    for pair in 0..plan.pairs as usize {
        for turn in 0..sides.len() {
            let place = (pair + turn) % sides.len();
            if let (Some(side), Some(rounds)) = (sides.get(place), rounds.get_mut(place)) {
                round(side, plan, rounds).await?;
            }
        }
        let told: Vec<_> = sides
            .iter()
            .zip(&rounds)
            .map(|(side, rounds)| {
                let rate = rounds.a_second.last().copied().unwrap_or(f64::NAN);
                format!("{}/s {}", number(rate, 0), side.name)
            })
            .collect();
        println!("pair {} of {}: {}", pair + 1, plan.pairs, told.join(", "));
    }
    Ok(rounds)
}

async fn round(side: &Side, plan: Plan, rounds: &mut Rounds) -> anyhow::Result<()> {
    let used = || -> anyhow::Result<Vec<f64>> {
        let processes = side.processes.iter();
        processes
            .map(|(_, pid)| usage::cpu_seconds_of_family(*pid))
            .collect()
    };
    let before = used()?;
    let outcome = side.load.closed(plan.connections, plan.time).await?;
    let after = used()?;
    #[expect(clippy::cast_precision_loss, reason = "requests of a round")]
    let requests = outcome.requests as f64;
    let mut all = 0.0;
    for (place, (name, _)) in side.processes.iter().enumerate() {
        let spent = after.get(place).unwrap_or(&0.0) - before.get(place).unwrap_or(&0.0);
        let each = spent * 1e6 / requests;
        all += each;
        match rounds.cpu_of.get_mut(place) {
            Some((_, series)) => series.push(each),
            None => rounds.cpu_of.push((name, vec![each])),
        }
    }
    rounds.cpu.push(all);
    rounds.a_second.push(outcome.a_second());
    rounds.median.push(outcome.took.median());
    rounds.p99.push(outcome.took.quantile(0.99));
    Ok(())
}

/// The ratios of pairs.
pub(crate) fn ratios(of: &[f64], to: &[f64]) -> Series {
    of.iter().zip(to).map(|(of, to)| of / to).collect()
}

/// A table of the sides, and figures whose names start with `prefix`.
pub(crate) fn tell(report: &mut Report, prefix: &str, sides: &[Side], rounds: &[Rounds]) {
    let series = |values: &[f64]| values.iter().copied().collect::<Series>();
    let mut rows = vec![
        [
            "",
            "requests/s",
            "least",
            "most",
            "median ms",
            "p99 ms",
            "CPU µs/request",
            "of which",
        ]
        .map(str::to_owned)
        .to_vec(),
    ];
    for (side, rounds) in sides.iter().zip(rounds) {
        let rate = series(&rounds.a_second);
        let cpu = series(&rounds.cpu).median();
        let (median, p99) = (series(&rounds.median).median(), series(&rounds.p99).median());
        let mut parts = Vec::new();
        for (process, used) in &rounds.cpu_of {
            let used = series(used).median();
            parts.push(format!("{process} {}", number(used, 1)));
            let name = format!("{prefix}_{}_cpu_us_a_request_{process}", word(side.name));
            report.figure(name.replace('-', "_"), used);
        }
        let name = |what: &str| format!("{prefix}_{}_{what}", word(side.name));
        report.figure(name("requests_a_second"), rate.median());
        report.figure(name("median_ms"), median);
        report.figure(name("p99_ms"), p99);
        report.figure(name("cpu_us_a_request"), cpu);
        rows.push(vec![
            side.name.to_owned(),
            number(rate.median(), 0),
            number(rate.least(), 0),
            number(rate.most(), 0),
            number(median, 2),
            number(p99, 2),
            number(cpu, 1),
            parts.join(", "),
        ]);
    }
    report.table(&rows);
}

fn word(name: &str) -> String {
    name.replace([' ', '-'], "_")
}
