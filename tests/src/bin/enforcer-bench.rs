//! What the enforcer costs: paired, interleaved measurements against the same server without it.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::{Parser, ValueEnum};
use enforcer_tests::bench::{self, Plan};
use enforcer_tests::guard::Deadline;

/// Measures what the enforcer adds to a request, against the same server without it.
///
/// Needs root. The daemon measured is the one that ENFORCER_BIN names, else `enforcer` beside this program. A missed
/// target is shown and is no failure; a wrong answer or a broken connection is one (exit code 1).
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// A minute instead of five: does everything work, and what is the order of magnitude?
    #[arg(long)]
    quick: bool,
    /// Measure one thing only
    #[arg(long, value_enum, conflicts_with_all = ["json", "markdown"])]
    only: Option<Only>,
    /// Write figures and raw samples as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write machine, command and table into this document, between its marker comments
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
}

/// What can be measured by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Only {
    /// How long streams of revoked and of expired tokens go on
    Revocation,
    /// How many packets one core drops at the shield
    Shield,
    /// What limits cost, how exactly they hold, and what a flood of bad tokens does to others
    Limits,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let (plan, limit_minutes) = if arguments.quick { (Plan::QUICK, 5) } else { (Plan::FULL, 15) };
    let _deadline = Deadline::new("enforcer-bench", Duration::from_secs(limit_minutes * 60));
    bench::catch_signals()?;
    if let Some(only) = arguments.only {
        println!("{}\n", bench::Machine::describe()?.line());
        let table = match only {
            Only::Revocation => {
                bench::table(&bench::revocation_figures(&bench::revocation::measure(plan.revoked_streams)?)?)
            }
            Only::Shield => bench::table(&bench::shield_figures(&bench::shield::measure(
                plan.shield_rounds,
                plan.run_ms,
            )?)?),
            Only::Limits => bench::table(&bench::limit_figures(&bench::limits::measure(plan)?)?),
        };
        print!("{table}");
        return Ok(());
    }
    let start = Instant::now();
    let command = if arguments.quick { "cargo xtask bench --quick" } else { "cargo xtask bench" };
    let report = bench::run(plan, command.to_owned(), |step| {
        eprintln!("[{:>5.1} s] {step}", start.elapsed().as_secs_f64());
    })?;
    println!("{}\n", report.machine.line());
    print!("{}", bench::table(&bench::figures(&report.samples)?));
    if let Some(path) = &arguments.json {
        bench::write_json(&report, path)?;
    }
    if let Some(path) = &arguments.markdown {
        bench::write_markdown(&report, path)?;
    }
    Ok(())
}
