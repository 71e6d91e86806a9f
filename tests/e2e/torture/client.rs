//! A client that keeps account of the bytes a server must have read.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use enforcer_tests::raw::{Connection, Response, Segmentation};
use ring::digest::{Context, SHA256};

use super::{PATIENCE, Scene};

/// A connection, and a running SHA-256 over what was sent with permission.
pub(crate) struct Client {
    /// The connection itself, for what the methods below don't do.
    pub(crate) connection: Connection,
    allowed: Context,
    allowed_bytes: u64,
}

/// SHA-256 in hexadecimal, as the recorder writes it.
fn hex(hash: &Context) -> String {
    hash.clone().finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Client {
    /// Connects.
    pub(crate) fn open(addr: SocketAddr) -> Result<Self> {
        Ok(Self::on(Connection::open(addr, PATIENCE)?))
    }

    /// Takes a connection on which nothing was sent yet.
    pub(crate) fn on(connection: Connection) -> Self {
        Self { connection, allowed: Context::new(&SHA256), allowed_bytes: 0 }
    }

    /// From here on the server must also read these bytes.
    pub(crate) fn expect_read(&mut self, bytes: &[u8]) {
        self.allowed.update(bytes);
        self.allowed_bytes += bytes.len() as u64;
    }

    /// Sends a request that must reach the server, and gives its answer, which must be a 200.
    pub(crate) fn good_cut(
        &mut self,
        request: &[u8],
        cut: &Segmentation,
        pause: Duration,
    ) -> Result<Response> {
        self.expect_read(request);
        self.connection.send_segmented(request, cut, pause)?;
        let response = self.connection.read_response()?;
        ensure!(response.status == 200, "{}: {}", response.status, String::from_utf8_lossy(&response.body));
        Ok(response)
    }

    /// As [`Client::good_cut`], in one write.
    pub(crate) fn good(&mut self, request: &[u8]) -> Result<Response> {
        self.good_cut(request, &Segmentation::Whole, Duration::ZERO)
    }

    /// Sends a request of which the server must read nothing, and which is answered with `status`.
    pub(crate) fn refused_cut(
        &mut self,
        request: &[u8],
        cut: &Segmentation,
        status: u16,
    ) -> Result<Response> {
        self.connection.send_segmented(request, cut, Duration::ZERO)?;
        let response = self.connection.read_response()?;
        ensure!(
            response.status == status,
            "{} in place of {status}: {}",
            response.status,
            String::from_utf8_lossy(&response.body)
        );
        Ok(response)
    }

    /// As [`Client::refused_cut`], in one write.
    pub(crate) fn refused(&mut self, request: &[u8], status: u16) -> Result<Response> {
        self.refused_cut(request, &Segmentation::Whole, status)
    }

    /// Checks that the server has read exactly what was allowed so far.
    pub(crate) fn verify(&self, scene: &Scene) -> Result<()> {
        let peer = self.connection.local_addr()?;
        let record = scene.server.wait_for_bytes(peer, self.allowed_bytes, PATIENCE)?;
        self.compare(record.bytes_read, &record.sha256)
    }

    /// Closes, waits until the server has seen the end, and checks that it has read exactly what was allowed.
    pub(crate) fn finish(self, scene: &Scene) -> Result<()> {
        let peer = self.connection.local_addr()?;
        self.connection.finish_sending().ok();
        let record = scene.closed_record(peer)?;
        self.compare(record.bytes_read, &record.sha256)
    }

    /// Expects that the enforcer has cut the connection and that the server got exactly what was allowed. A connection
    /// that was never served (no record) has read nothing.
    pub(crate) fn finish_cut_off(mut self, scene: &Scene) -> Result<()> {
        let peer = self.connection.local_addr()?;
        self.connection.expect_closed()?;
        let record = scene.closed_record(peer)?;
        self.compare(record.bytes_read, &record.sha256)
    }

    fn compare(&self, bytes_read: u64, sha256: &str) -> Result<()> {
        ensure!(
            bytes_read == self.allowed_bytes,
            "the server read {bytes_read} bytes, {} were allowed",
            self.allowed_bytes
        );
        ensure!(
            sha256 == hex(&self.allowed),
            "the server read {bytes_read} bytes, but not those that were sent"
        );
        Ok(())
    }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Client")
            .field("addr", &self.connection.local_addr().context("closed").ok())
            .field("allowed_bytes", &self.allowed_bytes)
            .finish_non_exhaustive()
    }
}
