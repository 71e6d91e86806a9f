//! Shows the enforcer at work on a real MCP server, step by step, and checks each step.

use std::io::{IsTerminal, Stdout};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Parser;
use enforcer_tests::demo::{Narrator, Stage, play};
use enforcer_tests::guard::Deadline;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// How long the clean-up may take once the time limit is over.
const CLEANUP_LIMIT: Duration = Duration::from_secs(60);
/// Exit code after Ctrl-C, as shells have it.
const INTERRUPTED: u8 = 130;

/// Exit codes: 0 when every step went as promised, 1 when one did not or could not be done, 130 after Ctrl-C
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    /// The enforcer to show
    #[arg(long, env = "ENFORCER_BIN", value_name = "PROGRAM")]
    enforcer: PathBuf,
    /// Wait before each step, 3 seconds if none are given, to be read along
    #[arg(long, value_name = "SECS", num_args = 0..=1, default_missing_value = "3", default_value = "0", hide_default_value = true)]
    pause: u64,
    /// Stop, clean up and fail after this many seconds, pauses not counted
    #[arg(long, value_name = "SECS", default_value_t = 180)]
    time_limit: u64,
}

/// How the play ended, other than by an error.
enum End {
    Played,
    Interrupted(&'static str),
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let colors =
        std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let mut narrator = Narrator::new(std::io::stdout(), colors, Duration::from_secs(arguments.pause));
    let code = match show(&arguments, &mut narrator).await {
        Ok(End::Played) => conclude(&mut narrator),
        Ok(End::Interrupted(by)) => {
            narrator.line(&format!("\n{by}: everything was removed again")).map(|()| INTERRUPTED)
        }
        Err(error) => Err(error),
    };
    match code {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let text = narrator.redact(&format!("{error:#}"));
            eprintln!("enforcer-demo: {text}");
            ExitCode::FAILURE
        }
    }
}

/// Plays the demo, and takes the stage down however it ended.
async fn show(arguments: &Arguments, narrator: &mut Narrator<Stdout>) -> Result<End> {
    // At most 20 steps have a pause before them.
    let limit = Duration::from_secs(arguments.time_limit.saturating_add(arguments.pause.saturating_mul(20)));
    let _deadline = Deadline::new("enforcer-demo", limit.saturating_add(CLEANUP_LIMIT));
    // From here on these no longer end the program where it stands.
    let mut interrupt = Signals::new()?;
    let mut stage = Stage::new(&arguments.enforcer)?;
    let played = tokio::select! {
        biased;
        by = interrupt.next() => Ok(End::Interrupted(by)),
        () = tokio::time::sleep(limit) => Err(anyhow::anyhow!("not done within {limit:?}")),
        played = play(&mut stage, narrator) => played.map(|()| End::Played),
    };
    let closed = stage.close();
    match (played, closed) {
        (Ok(end), Ok(())) => Ok(end),
        (Ok(_), Err(error)) => Err(error).context("cleaning up"),
        (Err(error), Ok(())) => Err(error),
        (Err(error), Err(cleanup)) => bail!("{error:#}; and cleaning up: {cleanup:#}"),
    }
}

fn conclude(narrator: &mut Narrator<Stdout>) -> Result<u8> {
    let (promises, broken) = (narrator.promises(), narrator.broken().to_vec());
    if broken.is_empty() {
        narrator.line(&format!("\nAll {promises} promises were kept; everything was removed again."))?;
        return Ok(0);
    }
    narrator.line(&format!("\n{} of {promises} promises were NOT kept:", broken.len()))?;
    for promise in &broken {
        narrator.line(&format!("  {promise}"))?;
    }
    Ok(1)
}

/// The signals by which people and terminals end a program.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => "interrupted",
            _ = self.terminate.recv() => "terminated",
            _ = self.hangup.recv() => "the terminal is gone",
        }
    }
}
