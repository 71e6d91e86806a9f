//! The control socket's server.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinHandle;
use tracing::{debug, warn};

use crate::control::{MAX_LINE_BYTES, Request, Response, socket_path};

/// Connections that are served at a time; others wait in the socket's backlog.
const MAX_CONNECTIONS: usize = 4;
/// How long a request may take to arrive, and its answer to be read.
const IO_LIMIT: Duration = Duration::from_secs(10);

/// A request and where its answer goes.
pub(super) struct Order {
    pub(super) request: Request,
    pub(super) answer: oneshot::Sender<Response>,
}

/// The socket; dropped, it is closed and removed.
pub(super) struct Control {
    path: PathBuf,
    task: JoinHandle<()>,
}

impl Control {
    /// Listens. Call it with the daemon's lock in hand: what a dead daemon left at the path is replaced.
    pub(super) fn listen(pin_name: &str) -> anyhow::Result<(Self, mpsc::Receiver<Order>)> {
        let path = socket_path(pin_name);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot replace {}", path.display()));
            }
            _ => {}
        }
        let listener = bind(&path).with_context(|| format!("cannot listen on {}", path.display()))?;
        let (orders, received) = mpsc::channel(MAX_CONNECTIONS);
        Ok((Self { path, task: tokio::spawn(accept(listener, orders)) }, received))
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.task.abort();
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Nobody else can enter the socket's directory, and nobody else may use the socket.
fn bind(path: &Path) -> std::io::Result<UnixListener> {
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

async fn accept(listener: UnixListener, orders: mpsc::Sender<Order>) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let orders = orders.clone();
                tokio::spawn(async move {
                    if let Err(error) = serve(stream, &orders).await {
                        debug!(%error, "control connection");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                warn!(%error, "the control socket does not accept");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

/// One request, one answer.
async fn serve(stream: UnixStream, orders: &mpsc::Sender<Order>) -> anyhow::Result<()> {
    let uid = stream.peer_cred()?.uid();
    if !may_control(uid, nix::unistd::geteuid().as_raw()) {
        warn!(uid, "somebody else's use of the control socket was refused");
        return Ok(());
    }
    let (reader, mut writer) = stream.into_split();
    let mut line = String::new();
    let mut reader = BufReader::new(reader.take(MAX_LINE_BYTES));
    tokio::time::timeout(IO_LIMIT, reader.read_line(&mut line)).await??;
    let response = match serde_json::from_str(&line) {
        Err(error) => Response::Failed { error: format!("not a request: {error}") },
        Ok(request) => {
            let (answer, answered) = oneshot::channel();
            let sent = orders.send(Order { request, answer }).await.is_ok();
            let ending = || Response::Failed { error: "the daemon is ending".to_owned() };
            if sent { answered.await.unwrap_or_else(|_| ending()) } else { ending() }
        }
    };
    let mut text = serde_json::to_vec(&response)?;
    text.push(b'\n');
    tokio::time::timeout(IO_LIMIT, writer.write_all(&text)).await??;
    Ok(())
}

/// Root, and whoever the daemon is.
const fn may_control(uid: u32, own_uid: u32) -> bool {
    uid == 0 || uid == own_uid
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_else_may_control() {
        assert!(may_control(0, 0) && may_control(0, 7) && may_control(7, 7));
        assert!(!may_control(7, 0) && !may_control(8, 7));
    }
}
