//! The watcher: a process that ends what a dead daemon had in its hands.
//!
//! A request that the daemon was working on when it died would wait for ever, and so would those that the kernel parks for it until
//! its last sign of life is too old. The next daemon takes care of both; if none comes in time, the watcher does. It is this same
//! program, started by the daemon with a pipe as its standard input, in a session of its own. It does nothing but wait for the
//! pipe's end, and holds neither the lock nor any map meanwhile.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use enforcer_common::abi::{Config, Ends, Flow};
use tracing::{info, warn};

use crate::core::Orphan;
use crate::datapath::{LiveError, Maps, PinDir, SocketDestroyer};

/// Name of the hidden command.
const COMMAND: &str = "watch";
/// What the daemon says when it leaves nothing behind.
const DISMISSED: u8 = b'.';
/// Pause between two looks.
const POLL: Duration = Duration::from_millis(50);
/// How often destruction is tried before the watcher gives up.
const ROUNDS: u32 = 40;

/// Which daemon is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Watched {
    /// Its process id.
    pub pid: u32,
    /// `CLOCK_BOOTTIME` of its start, in nanoseconds.
    pub started_ns: u64,
}

/// The daemon's end: while it is open the watcher waits.
#[derive(Debug)]
pub(super) struct Watcher {
    child: Child,
    pipe: Option<ChildStdin>,
    bpffs: std::path::PathBuf,
    pin_name: String,
    started_ns: u64,
}

impl Watcher {
    /// Starts the process.
    pub(super) fn start(bpffs: &Path, pin_name: &str, started_ns: u64) -> std::io::Result<Self> {
        // This very program, also if its file was replaced meanwhile.
        let mut command = Command::new("/proc/self/exe");
        command.arg(COMMAND).arg("--bpffs").arg(bpffs).args(["--pin-name", pin_name]);
        command.args(["--daemon-pid", &std::process::id().to_string()]);
        command.args(["--daemon-started-ns", &started_ns.to_string()]);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).current_dir("/");
        // SAFETY: setsid(2) is a plain system call, allowed between fork and exec.
        unsafe {
            command.pre_exec(|| {
                // What ends the daemon by its group or terminal must not end the watcher. It can't fail: a child leads no group.
                libc::setsid();
                Ok(())
            });
        }
        let mut child = command.spawn()?;
        let pipe = child.stdin.take();
        Ok(Self { child, pipe, bpffs: bpffs.to_owned(), pin_name: pin_name.to_owned(), started_ns })
    }

    /// Starts another one if the process has ended.
    pub(super) fn keep_alive(&mut self) {
        match self.child.try_wait() {
            Ok(None) => {}
            ended => {
                warn!(?ended, "the watcher has ended; another one is started");
                match Self::start(&self.bpffs, &self.pin_name, self.started_ns) {
                    Ok(watcher) => *self = watcher,
                    Err(error) => {
                        warn!(%error, "no watcher: what a crash leaves ends when the next daemon starts");
                    }
                }
            }
        }
    }

    /// Nothing is left behind: the process ends and does nothing.
    pub(super) fn dismiss(mut self) {
        if let Some(mut pipe) = self.pipe.take() {
            let _ = pipe.write_all(&[DISMISSED]);
        }
        let _ = self.child.wait();
    }
}

/// What to do about a daemon that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// Another daemon is there: all is its.
    Leave,
    /// The kernel still parks requests, and another daemon may come for them.
    Wait,
    /// End what is parked.
    End,
}

fn next(config: &Config, watched: Watched, now_ns: u64) -> Next {
    if config.daemon_pid != watched.pid || config.daemon_started_ns != watched.started_ns {
        Next::Leave
    } else if now_ns.saturating_sub(config.heartbeat_ns) < config.heartbeat_limit_ns {
        Next::Wait
    } else {
        Next::End
    }
}

/// Waits for the daemon's end, which is that of standard input, and then ends what it had in its hands, unless another daemon
/// comes.
///
/// # Errors
/// The maps can't be read.
pub fn watch(pins: &PinDir, watched: Watched) -> Result<(), LiveError> {
    // Whoever stops the daemon may signal all its processes.
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        // SAFETY: ignoring a signal involves no handler.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
    if is_dismissed() {
        return Ok(());
    }
    let mut destroyer = SocketDestroyer::default();
    let mut left = ROUNDS;
    // Without pins there is nothing that guards.
    while pins.exists() && left > 0 {
        let maps = Maps::open(pins)?;
        match next(&maps.live.configuration()?, watched, super::now().boot_ns) {
            Next::Leave => return Ok(()),
            Next::Wait => {}
            Next::End => {
                let parked = parked(&maps)?;
                // A program that saw the daemon alive may be about to park something.
                if parked.is_empty() && left < ROUNDS {
                    return Ok(());
                }
                left -= 1;
                // What was parked while we looked may be a new daemon's.
                if next(&maps.live.configuration()?, watched, super::now().boot_ns) == Next::Leave {
                    return Ok(());
                }
                end(&parked, &mut destroyer);
            }
        }
        drop(maps);
        std::thread::sleep(POLL);
    }
    Ok(())
}

/// Reads until the end; whether there was a word before it.
fn is_dismissed() -> bool {
    let mut byte = [0];
    loop {
        match std::io::stdin().read(&mut byte) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            read => return matches!(read, Ok(1)) && byte == [DISMISSED],
        }
    }
}

fn parked(maps: &Maps) -> Result<BTreeMap<u64, Flow>, LiveError> {
    let mut parked = BTreeMap::new();
    maps.live.each_flow(&mut |cookie, flow| {
        // In observe mode the bytes have passed already.
        if Orphan::of(cookie, flow).is_some_and(|orphan| !orphan.observed) {
            parked.insert(cookie, *flow);
        }
    })?;
    Ok(parked)
}

fn end(flows: &BTreeMap<u64, Flow>, destroyer: &mut SocketDestroyer) {
    if !flows.is_empty() {
        info!(
            flows = flows.len(),
            "the daemon is gone and no other came; ending the requests that wait for it"
        );
    }
    for (&cookie, flow) in flows {
        let ends = Ends { local: flow.local, peer: flow.peer };
        if let Err(error) = destroyer.destroy(flow.netns_cookie, cookie, flow.interface, ends) {
            warn!(cookie, %error, "a parked connection could not be destroyed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use enforcer_common::abi::{ABI_VERSION, MODE_ENFORCE};

    #[test]
    fn only_the_watched_daemons_requests_end_and_only_when_none_can_come_any_more() {
        let config = Config {
            abi_version: ABI_VERSION,
            mode: MODE_ENFORCE,
            generation: 1,
            heartbeat_ns: 100,
            heartbeat_limit_ns: 50,
            loaded_ns: 1,
            daemon_started_ns: 7,
            daemon_pid: 42,
            draining: 0,
            ..Config::NONE
        };
        let watched = Watched { pid: 42, started_ns: 7 };
        assert_eq!(next(&config, watched, 149), Next::Wait);
        assert_eq!(next(&config, watched, 150), Next::End);
        assert_eq!(next(&config, Watched { pid: 43, ..watched }, 150), Next::Leave);
        assert_eq!(next(&config, Watched { started_ns: 8, ..watched }, 150), Next::Leave);
    }
}
