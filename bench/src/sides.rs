//! Compares programs by giving them the same load in alternating rounds.

use std::time::Duration;

use crate::{
    load::Load,
    report::{Report, number},
    statistics::Series,
    usage,
};

/// Duration of the load on each program before the first measured round.
const WARM_UP: Duration = Duration::from_secs(2);

/// A program that is compared with others.
pub(crate) struct Side {
    pub(crate) name: &'static str,
    pub(crate) load: Load,
    /// The processes whose CPU time is counted, each including its children.
    pub(crate) processes: Vec<(&'static str, u32)>,
}

/// The results of one program, with one entry per round.
#[derive(Debug, Default)]
pub(crate) struct Rounds {
    pub(crate) per_second: Vec<f64>,
    /// CPU time of all processes per request, in microseconds.
    pub(crate) cpu: Vec<f64>,
    /// CPU time of each process per request, in microseconds.
    pub(crate) cpu_of: Vec<(&'static str, Vec<f64>)>,
    /// Median latency in milliseconds.
    pub(crate) median: Vec<f64>,
    /// 99th percentile of the latency in milliseconds.
    pub(crate) p99: Vec<f64>,
}

/// The parameters of a comparison.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) pairs: u32,
    pub(crate) time: Duration,
    pub(crate) connections: usize,
}

/// Warms up each program. Then loads the programs one after the other, `pairs` times; the order rotates each time.
pub(crate) async fn compare(sides: &[Side], plan: Plan) -> anyhow::Result<Vec<Rounds>> {
    let mut rounds: Vec<Rounds> = sides.iter().map(|_| Rounds::default()).collect();
    for side in sides {
        side.load.closed(plan.connections, WARM_UP).await?;
    }
    for pair in 0..plan.pairs as usize {
        for turn in 0..sides.len() {
            let index = (pair + turn) % sides.len();
            if let (Some(side), Some(rounds)) = (sides.get(index), rounds.get_mut(index)) {
                round(side, plan, rounds).await?;
            }
        }
        let rates: Vec<_> = sides
            .iter()
            .zip(&rounds)
            .map(|(side, rounds)| {
                let rate = rounds.per_second.last().copied().unwrap_or(f64::NAN);
                format!("{}/s {}", number(rate, 0), side.name)
            })
            .collect();
        println!("pair {} of {}: {}", pair + 1, plan.pairs, rates.join(", "));
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
    #[expect(
        clippy::cast_precision_loss,
        reason = "a round has far fewer than 2^52 requests"
    )]
    let requests = outcome.requests as f64;
    let mut all = 0.0;
    for (index, (name, _)) in side.processes.iter().enumerate() {
        let spent = after.get(index).unwrap_or(&0.0) - before.get(index).unwrap_or(&0.0);
        let each = spent * 1e6 / requests;
        all += each;
        match rounds.cpu_of.get_mut(index) {
            Some((_, series)) => series.push(each),
            None => rounds.cpu_of.push((name, vec![each])),
        }
    }
    rounds.cpu.push(all);
    rounds.per_second.push(outcome.per_second());
    rounds.median.push(outcome.took.median());
    rounds.p99.push(outcome.took.quantile(0.99));
    Ok(())
}

/// Returns the ratio of each pair of values.
pub(crate) fn ratios(of: &[f64], to: &[f64]) -> Series {
    of.iter().zip(to).map(|(of, to)| of / to).collect()
}

/// Reports a table of the programs, and results whose names begin with `prefix`.
pub(crate) fn tell(report: &mut Report, prefix: &str, sides: &[Side], rounds: &[Rounds]) {
    let series = |values: &[f64]| values.iter().copied().collect::<Series>();
    let mut rows = vec![
        [
            "",
            "requests/s",
            "min",
            "max",
            "median ms",
            "p99 ms",
            "CPU time, µs/request",
            "CPU time by process",
        ]
        .map(str::to_owned)
        .to_vec(),
    ];
    for (side, rounds) in sides.iter().zip(rounds) {
        let rate = series(&rounds.per_second);
        let cpu = series(&rounds.cpu).median();
        let (median, p99) = (series(&rounds.median).median(), series(&rounds.p99).median());
        let mut parts = Vec::new();
        for (process, used) in &rounds.cpu_of {
            let used = series(used).median();
            parts.push(format!("{process} {}", number(used, 1)));
            let name = format!("{prefix}_{}_cpu_us_per_request_{process}", word(side.name));
            report.figure(name.replace('-', "_"), used);
        }
        let name = |what: &str| format!("{prefix}_{}_{what}", word(side.name));
        report.figure(name("requests_per_second"), rate.median());
        report.figure(name("median_ms"), median);
        report.figure(name("p99_ms"), p99);
        report.figure(name("cpu_us_per_request"), cpu);
        rows.push(vec![
            side.name.to_owned(),
            number(rate.median(), 0),
            number(rate.min(), 0),
            number(rate.max(), 0),
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
