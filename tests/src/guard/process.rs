//! Child processes whose output is kept and which never outlive the test.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Cgroup;

/// A running child. Its output goes to unlinked temporary files; on drop it is killed by its id and reaped.
#[derive(Debug)]
pub struct Proc {
    name: String,
    child: Child,
    stdout: File,
    stderr: File,
}

/// What a program that ran to its end left.
#[derive(Debug, Clone)]
pub struct Finished {
    /// How it ended.
    pub status: ExitStatus,
    /// Everything it wrote to standard output (bytes that are not UTF-8 replaced).
    pub stdout: String,
    /// Everything it wrote to standard error.
    pub stderr: String,
}

impl Proc {
    /// Starts `command` with no input. It runs in the network namespace of this process's main
    /// thread, whatever thread calls, unless [`super::NetNs::place`] was applied to it.
    ///
    /// # Errors
    /// When the program can't be started; the message names it.
    pub fn spawn(name: &str, command: Command) -> Result<Self> {
        Self::spawn_with_input(name, command, b"")
    }

    /// As [`Proc::spawn`], with `input` as its standard input (from a file: end of file follows).
    ///
    /// # Errors
    /// When the program can't be started or the input can't be stored.
    pub fn spawn_with_input(name: &str, mut command: Command, input: &[u8]) -> Result<Self> {
        let (stdout, stderr) = (append_file()?, append_file()?);
        let mut stdin = tempfile::tempfile()?;
        stdin.write_all(input)?;
        stdin.seek(SeekFrom::Start(0))?;
        command
            .stdin(stdin)
            .stdout(Stdio::from(stdout.try_clone()?))
            .stderr(Stdio::from(stderr.try_clone()?));
        die_with_parent(&mut command);
        let child = spawn_from_lasting_thread(command).with_context(|| format!("cannot start {name}"))?;
        Ok(Self { name: name.to_owned(), child, stdout, stderr })
    }

    /// Process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Everything written to standard output so far.
    #[must_use]
    pub fn stdout(&self) -> String {
        contents(&self.stdout)
    }

    /// Everything written to standard error so far.
    #[must_use]
    pub fn stderr(&self) -> String {
        contents(&self.stderr)
    }

    /// Waits for a complete line of either stream that contains `pattern`, and gives that line.
    ///
    /// # Errors
    /// When the process ends or `timeout` passes before such a line; the message holds the output.
    pub fn wait_for_line(&mut self, pattern: &str, timeout: Duration) -> Result<String> {
        let end = Instant::now() + timeout;
        loop {
            // The state first: what a process wrote before it ended is then seen below.
            let ended = self.child.try_wait()?;
            for text in [self.stdout(), self.stderr()] {
                let mut complete = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
                if let Some(line) = complete.find(|line| line.contains(pattern)) {
                    return Ok(line.trim_end().to_owned());
                }
            }
            let why = match ended {
                Some(status) => format!("ended with {status}"),
                None if Instant::now() >= end => format!("did not say it within {timeout:?}"),
                None => {
                    thread::sleep(Duration::from_millis(5));
                    continue;
                }
            };
            bail!(
                "{}: waiting for {pattern:?}: {why}\nstdout: {}\nstderr: {}",
                self.name,
                self.stdout(),
                self.stderr()
            );
        }
    }

    /// Sends a signal to the process (never to a reaped id).
    ///
    /// # Errors
    /// When it can't be sent.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if self.child.try_wait()?.is_none() {
            kill(Pid::from_raw(i32::try_from(self.pid())?), signal)
                .with_context(|| format!("{signal} to {}", self.name))?;
        }
        Ok(())
    }

    /// SIGTERM, then waits for the end.
    ///
    /// # Errors
    /// When it has not ended within `timeout`.
    pub fn terminate(&mut self, timeout: Duration) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        self.wait(timeout)
    }

    /// SIGKILL, then waits for the end.
    ///
    /// # Errors
    /// When the signal can't be sent or the process can't be reaped.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::SIGKILL)?;
        Ok(self.child.wait()?)
    }

    /// Waits for the end without a signal.
    ///
    /// # Errors
    /// When it has not ended within `timeout`.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let name = self.name.clone();
        super::wait_until(&format!("the end of {name}"), timeout, || self.child.try_wait().transpose())?
            .with_context(|| format!("waiting for {name}"))
    }

    /// How it ended, or `None` while it runs.
    ///
    /// # Errors
    /// When the process can't be reaped.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// User and system time used so far by all its threads. See [`cpu_time`].
    ///
    /// # Errors
    /// When it has ended and was reaped.
    pub fn cpu_time(&self) -> Result<Duration> {
        cpu_time(self.pid())
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        // Both fail only when the process is gone already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Starts `command` inside `cgroup`.
///
/// # Errors
/// As [`Cgroup::place`] and [`Proc::spawn`].
pub fn spawn_in(cgroup: &Cgroup, name: &str, mut command: Command) -> Result<Proc> {
    cgroup.place(&mut command)?;
    Proc::spawn(name, command)
}

/// Runs `command` to its end with `input` on standard input.
///
/// # Errors
/// When it can't be started or does not end within `timeout`.
pub fn run(name: &str, command: Command, input: &[u8], timeout: Duration) -> Result<Finished> {
    let mut process = Proc::spawn_with_input(name, command, input)?;
    let status = process.wait(timeout)?;
    Ok(Finished { status, stdout: process.stdout(), stderr: process.stderr() })
}

/// User and system time of a process and its threads, from fields 14 and 15 of `/proc/PID/stat`
/// (proc_pid_stat(5)); its unit is a clock tick, 10 ms here.
///
/// # Errors
/// When there is no such process.
pub fn cpu_time(pid: u32) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The command name (field 2) may hold anything, so count from behind its closing parenthesis.
    let (_, rest) = stat.rsplit_once(')').context("no command name in stat")?;
    let field = |index: usize| -> Result<u64> {
        Ok(rest.split_whitespace().nth(index).context("short stat line")?.parse()?)
    };
    let ticks = field(11)? + field(12)?;
    // SAFETY: sysconf(3) only reads a constant of the system.
    let per_second = u64::try_from(unsafe { libc::sysconf(libc::_SC_CLK_TCK) })?;
    Ok(Duration::from_millis(ticks * 1000 / per_second.max(1)))
}

/// The path of a program of this workspace that was built beside the running one
/// (`target/<profile>/NAME`; tests themselves run from `target/<profile>/deps`).
///
/// # Errors
/// When it is not there, naming the command that builds it.
pub fn bin_path(name: &str) -> Result<PathBuf> {
    let this = std::env::current_exe().context("where is the running program?")?;
    this.ancestors()
        .skip(1)
        .take(2)
        .map(|directory| directory.join(name))
        .find(|path| Path::is_file(path))
        .with_context(|| format!("{name} is not beside {}: cargo build --workspace", this.display()))
}

fn append_file() -> Result<File> {
    let named = tempfile::NamedTempFile::new()?;
    // Append: the two descriptors of parent and child then never overwrite each other.
    Ok(fs::OpenOptions::new().read(true).append(true).open(named.path())?)
}

fn contents(file: &File) -> String {
    let mut bytes = Vec::new();
    let mut reader = AtOffset { file, offset: 0 };
    drop(reader.read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Reads without moving the offset that the child shares.
struct AtOffset<'a> {
    file: &'a File,
    offset: u64,
}

impl Read for AtOffset<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(buffer, self.offset)?;
        self.offset += count as u64;
        Ok(count)
    }
}

fn die_with_parent(command: &mut Command) {
    let parent = std::process::id();
    // SAFETY: prctl(2), getppid(2) and _exit(2) are plain system calls, allowed between fork and exec.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(io::Error::last_os_error());
            }
            // The parent may have died before the line above.
            if libc::getppid().cast_unsigned() != parent {
                libc::_exit(1);
            }
            Ok(())
        });
    }
}

type SpawnOrder = (Command, Sender<io::Result<Child>>);

/// PR_SET_PDEATHSIG fires when the *thread* that forked ends, so all children are forked by one
/// thread that lives as long as the process.
fn spawn_from_lasting_thread(command: Command) -> Result<Child> {
    static SPAWNER: OnceLock<Sender<SpawnOrder>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (orders, inbox) = channel::<SpawnOrder>();
        thread::spawn(move || {
            // A thread starts in its creator's namespace, which may be a test's; /proc/self is the main thread's.
            if let Ok(home) = File::open("/proc/self/ns/net") {
                let _ = setns(home, CloneFlags::CLONE_NEWNET);
            }
            for (mut command, reply) in inbox {
                drop(reply.send(command.spawn()));
            }
        });
        orders
    });
    let (reply, answer) = channel();
    spawner.send((command, reply)).map_err(|_| anyhow!("the spawning thread has ended"))?;
    Ok(answer.recv()??)
}
