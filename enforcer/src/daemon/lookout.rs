//! Looks from time to time for what the kernel programs do not see.

use std::collections::BTreeSet;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use tokio::sync::mpsc::UnboundedSender;
use tracing::{error, info, warn};

use crate::cli::format;
use crate::datapath::{LINK_PIN, Live, LiveError, PinDir, TcpSocket, attached_cgroup};
use crate::lifecycle::unguarded::{self, Closed, Gap, UnguardedError};

/// A second look catches connections that were being accepted while the programs were attached.
const SECOND_LOOK: Duration = Duration::from_secs(1);
/// After that, for those whose report was lost, and for listeners.
const INTERVAL: Duration = Duration::from_secs(30);
/// Looks at the link in between.
const LINK_INTERVAL: Duration = Duration::from_secs(1);
/// Most connections that one look logs one by one.
const MAX_LOGGED: usize = 20;
/// Most sockets that are remembered as logged.
const MAX_REMEMBERED: usize = 4096;

/// What a later look saw.
pub(super) enum Seen {
    /// So many connections were closed.
    Closed(usize),
    /// The guarded cgroup was removed, so the kernel has detached the programs.
    Detached,
}

/// A thread that closes unguarded connections, or lists them in observe mode, and warns of listeners. It ends when this is
/// dropped.
pub(super) struct Lookout {
    _stop: Sender<()>,
}

impl Lookout {
    /// Has the first look at once, and gives how many connections it closed; says what it sees later to `seen`.
    ///
    /// # Errors
    /// The thread can't be made.
    pub(super) fn start(pins: &PinDir, seen: UnboundedSender<Seen>) -> std::io::Result<(Self, usize)> {
        let mut log = Log::default();
        let first = look(pins, &mut log);
        let (stop, stopped) = channel();
        let pins = pins.clone();
        std::thread::Builder::new()
            .name("lookout".into())
            .spawn(move || run(&pins, &stopped, &seen, &mut log))?;
        Ok((Self { _stop: stop }, first))
    }
}

fn run(pins: &PinDir, stopped: &Receiver<()>, seen: &UnboundedSender<Seen>, log: &mut Log) {
    let live = Live::open(pins).ok();
    // Another policy may protect what was open before.
    let generation =
        || live.as_ref().and_then(|live| live.configuration().ok()).map(|config| config.generation);
    let (mut next_look, mut looked_at) = (Instant::now() + SECOND_LOOK, generation());
    while stopped.recv_timeout(LINK_INTERVAL) == Err(RecvTimeoutError::Timeout) {
        // A pin that was deleted says nothing: the daemon itself holds the link.
        if attached_cgroup(&pins.pin(LINK_PIN)).is_ok_and(|cgroup| cgroup.is_none()) {
            let _ = seen.send(Seen::Detached);
            return;
        }
        let now_at = generation();
        if Instant::now() < next_look && now_at == looked_at {
            continue;
        }
        (next_look, looked_at) = (Instant::now() + INTERVAL, now_at);
        let count = look(pins, log);
        if count > 0 && seen.send(Seen::Closed(count)).is_err() {
            return;
        }
    }
}

fn look(pins: &PinDir, log: &mut Log) -> usize {
    match unguarded::close(pins) {
        Ok(closed) => {
            log.say(&closed);
            if closed.observed { 0 } else { closed.found.len() - closed.open }
        }
        // While it ends, the pins go before this thread.
        Err(UnguardedError::Maps(LiveError::NotLoaded(_))) => 0,
        Err(error) => {
            error!(%error, "cannot look for unguarded connections");
            0
        }
    }
}

/// What was logged already.
#[derive(Default)]
struct Log {
    cookies: BTreeSet<u64>,
}

impl Log {
    /// Whether a socket was not logged yet.
    fn is_new(&mut self, socket: &TcpSocket) -> bool {
        if self.cookies.len() >= MAX_REMEMBERED {
            self.cookies.clear();
        }
        self.cookies.insert(socket.cookie)
    }

    fn say(&mut self, closed: &Closed) {
        let new: Vec<_> = closed.found.iter().filter(|socket| self.is_new(socket)).collect();
        for socket in new.iter().take(MAX_LOGGED) {
            let (client, server) = (format::socket(&socket.ends.peer), format::socket(&socket.ends.local));
            if closed.observed {
                warn!(
                    cookie = socket.cookie,
                    client, server, "a connection from before the enforcement is not guarded"
                );
            } else {
                info!(
                    cookie = socket.cookie,
                    client, server, "a connection from before the enforcement is closed"
                );
            }
        }
        if new.len() > MAX_LOGGED {
            info!(all = new.len(), "more connections from before the enforcement were found");
        }
        if closed.open > 0 {
            error!(
                count = closed.open,
                "connections from before the enforcement could not be closed; they get no bytes"
            );
        }
        for (socket, gap) in &closed.listeners {
            if self.is_new(socket) {
                let (listener, process) =
                    (format::socket(&socket.ends.local), unguarded::holder(socket.inode));
                let process = process.as_deref().unwrap_or("unknown");
                match gap {
                    Gap::Outside => warn!(
                        listener,
                        process, "NOT GUARDED: this listener's socket was made outside the guarded cgroup"
                    ),
                    Gap::Wider => warn!(
                        listener,
                        process,
                        "this listener takes connections to addresses that the policy does not name; those are NOT GUARDED"
                    ),
                }
            }
        }
        for error in &closed.errors {
            warn!(%error, "while looking for unguarded connections");
        }
    }
}
