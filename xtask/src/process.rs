//! Running other programs: said aloud, bounded in time, never left behind.

use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::workspace::BPF_OBJECT_VARIABLE;

/// How often a running step is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// How long a step's output may stay open after the step itself ended.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// Waits for the end of its input, then ends the process group `$1`: politely, so that a daemon can detach its
/// programs, and after five seconds for good.
const GUARD_SCRIPT: &str = r#"read -r _; kill -s TERM -- "-$1" || exit 0; sleep 5; kill -s KILL -- "-$1""#;

/// A command as a user would type it, with the variables that make a difference to what it does. The object's place
/// is left out: without the variable, the build script looks in the same place.
pub(crate) fn shown(command: &Command) -> String {
    let mut text = String::new();
    for (name, value) in command.get_envs() {
        let (name, Some(value)) = (name.to_string_lossy(), value) else { continue };
        if (name.starts_with("ENFORCER_") && name != BPF_OBJECT_VARIABLE) || name.starts_with("RUSTC") {
            text.push_str(&format!("{name}={} ", value.display()));
        }
    }
    let program = Path::new(command.get_program());
    // Cargo tells its whole path; users type its name.
    let name = program.file_name().filter(|name| *name == "cargo").unwrap_or(program.as_os_str());
    text.push_str(&name.to_string_lossy());
    for argument in command.get_args() {
        let argument = argument.to_string_lossy();
        text.push(' ');
        if argument.is_empty() || argument.contains(|c: char| c.is_whitespace() || "\"'$*;&|<>".contains(c)) {
            text.push('\'');
            text.push_str(&argument.replace('\'', r"'\''"));
            text.push('\'');
        } else {
            text.push_str(&argument);
        }
    }
    text
}

/// Runs to the end with the terminal's own output; an error names the command and how it ended.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    eprintln!("$ {}", shown(command));
    let status = command
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("can't start `{}`; is it installed and on the PATH?", shown(command)))?;
    if !status.success() {
        bail!("`{}` failed ({status}); its own messages are above", shown(command));
    }
    Ok(())
}

/// The standard output of a command that succeeded; an error quotes the end of what it said on standard error.
pub(crate) fn stdout_of(command: &mut Command) -> Result<String> {
    let output =
        command.stdin(Stdio::null()).output().with_context(|| format!("can't start `{}`", shown(command)))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let cause = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
        bail!("`{}` failed ({}): {}", shown(command), output.status, cause.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// How a bounded step ended.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// It ended by itself, in time, and successfully.
    pub(crate) success: bool,
    /// It was killed because its time was up.
    pub(crate) timed_out: bool,
    /// Its standard output, line by line.
    pub(crate) lines: Vec<String>,
    /// How long it took.
    pub(crate) took: Duration,
}

/// Runs a step in a process group of its own. The group is ended when `limit` is over, when the step is (nothing may
/// outlive it), and when xtask itself dies, by Ctrl-C or otherwise.
pub(crate) fn run_bounded(command: &mut Command, limit: Duration) -> Result<Outcome> {
    run_bounded_as("", command, limit)
}

/// [`run_bounded`] of one among several at a time: its lines are shown behind a name.
pub(crate) fn run_bounded_as(name: &str, command: &mut Command, limit: Duration) -> Result<Outcome> {
    eprintln!("$ {}", shown(command));
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .process_group(0)
        .spawn()
        .with_context(|| format!("can't start `{}`; is it installed and on the PATH?", shown(command)))?;
    let guard = Guard::over(&child)?;
    let stdout = child.stdout.take().context("the step's output was not captured")?;
    let (sender, receiver) = mpsc::channel();
    let name = name.to_owned();
    thread::spawn(move || {
        for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).into_owned();
            println!("{name}{line}");
            if sender.send(line).is_err() {
                break;
            }
        }
    });

    let status = wait_until(&mut child, start + limit)?;
    let timed_out = status.is_none();
    let status = match status {
        Some(status) => {
            guard.end_stragglers(&child);
            status
        }
        None => guard.end_group(&mut child)?,
    };
    let mut lines = Vec::new();
    let drained_by = Instant::now() + DRAIN_LIMIT;
    while let Ok(line) = receiver.recv_timeout(drained_by.saturating_duration_since(Instant::now())) {
        lines.push(line);
    }
    Ok(Outcome { success: status.success() && !timed_out, timed_out, lines, took: start.elapsed() })
}

/// Polls, because the standard library can't wait with a limit; `None` when the time was up.
fn wait_until(child: &mut Child, deadline: Instant) -> Result<Option<ExitStatus>> {
    loop {
        if let Some(status) = child.try_wait().context("can't wait for the step")? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        thread::sleep(POLL_INTERVAL);
    }
}

/// A shell that outlives xtask by as much as it takes to end the step's process group. It notices our end by the end
/// of its input, so it works for a death that no handler sees.
struct Guard {
    shell: Child,
    input: Option<ChildStdin>,
}

impl Guard {
    fn over(child: &Child) -> Result<Self> {
        let mut shell = Command::new("sh")
            .args(["-c", GUARD_SCRIPT, "xtask-guard", &child.id().to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .context("can't start `sh`, which guards the step's process group")?;
        let input = shell.stdin.take();
        Ok(Self { shell, input })
    }

    /// Time is up: let the guard do its work, and collect the step.
    fn end_group(mut self, child: &mut Child) -> Result<ExitStatus> {
        drop(self.input.take());
        let status = child.wait().context("can't wait for the step that was ended")?;
        self.shell.wait().context("can't wait for the guard")?;
        Ok(status)
    }

    /// The step ended by itself: stand the guard down, and end what the step left running.
    fn end_stragglers(mut self, child: &Child) {
        // Both may fail only because there is nothing left to end.
        let _ = self.shell.kill();
        let _ = self.shell.wait();
        let group = child.id().to_string();
        let _ = Command::new("sh")
            .args(["-c", r#"kill -s KILL -- "-$1""#, "xtask-guard", &group])
            .stderr(Stdio::null())
            .status();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    fn is_running(pid: &str) -> bool {
        // A zombie that waits for its new parent is as good as gone.
        std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
    }

    #[test]
    fn quotes_what_a_shell_would_split() {
        let mut command = Command::new("/somewhere/bin/cargo");
        command.args(["test", "a b", "it's", "--x=1", ""]).env("ENFORCER_BIN", "/e").env("HOME", "/h");
        assert_eq!(shown(&command), r"ENFORCER_BIN=/e cargo test 'a b' 'it'\''s' --x=1 ''");
    }

    #[test]
    fn a_step_in_time_keeps_its_lines_and_its_status() {
        let good = run_bounded(&mut shell("echo one; echo two"), Duration::from_secs(10)).unwrap();
        assert!(good.success && !good.timed_out);
        assert_eq!(good.lines, ["one", "two"]);
        let bad = run_bounded(&mut shell("exit 3"), Duration::from_secs(10)).unwrap();
        assert!(!bad.success && !bad.timed_out);
    }

    #[test]
    fn a_step_over_its_time_is_ended_with_its_children() {
        let script = "sleep 60 & echo $!; wait";
        let outcome = run_bounded(&mut shell(script), Duration::from_millis(300)).unwrap();
        assert!(outcome.timed_out && !outcome.success);
        assert!(outcome.took < Duration::from_secs(30));
        assert!(!is_running(&outcome.lines[0]));
    }

    #[test]
    fn a_process_that_a_finished_step_left_behind_is_ended() {
        let outcome = run_bounded(&mut shell("sleep 60 & echo $!"), Duration::from_secs(10)).unwrap();
        assert!(outcome.success);
        thread::sleep(POLL_INTERVAL);
        assert!(!is_running(&outcome.lines[0]));
    }

    #[test]
    fn an_error_quotes_the_cause() {
        let error = stdout_of(&mut shell("echo first >&2; echo the cause >&2; exit 1")).unwrap_err();
        assert!(error.to_string().ends_with("the cause"), "{error}");
        let error = stdout_of(&mut Command::new("no-such-program-here")).unwrap_err();
        assert!(error.to_string().contains("no-such-program-here"));
    }
}
