//! Servers' own parsers, as programs beside us.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread;

use serde::Deserialize;

/// A request as a server saw it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Seen {
    pub(super) method: String,
    pub(super) target: String,
    pub(super) authorization: Vec<String>,
    pub(super) content_length: Vec<String>,
    pub(super) transfer_encoding: Vec<String>,
    /// Bytes of its body.
    pub(super) body: u64,
}

/// How a server read a stream.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Reading {
    pub(super) requests: Vec<Seen>,
    /// It refused what came behind them.
    pub(super) refused: bool,
}

/// A running reader.
pub(super) struct Reader {
    pub(super) name: &'static str,
    child: Child,
    to: Option<ChildStdin>,
    from: BufReader<ChildStdout>,
}

impl Reader {
    /// Both readers. They are programs that the end-to-end tests need as well, so one that is missing is an error.
    pub(super) fn all() -> Vec<Self> {
        vec![Self::start("node", "node", "node.js"), Self::start("python", "python3", "python.py")]
    }

    fn start(name: &'static str, program: &str, script: &str) -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/readers").join(script);
        let mut child = Command::new(program)
            .arg(script)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{program} is needed as an HTTP parser: {error}"));
        let (to, from) = (child.stdin.take(), child.stdout.take().expect("it is piped"));
        Self { name, child, to, from: BufReader::new(from) }
    }

    /// How it reads each of these streams.
    pub(super) fn read(&mut self, streams: &[Vec<u8>]) -> Vec<Reading> {
        let to = self.to.as_mut().expect("it is open");
        thread::scope(|scope| {
            // At once, or both sides would wait for each other's full pipe.
            let writing = scope.spawn(move || {
                for stream in streams {
                    to.write_all(&(stream.len() as u32).to_le_bytes())?;
                    to.write_all(stream)?;
                }
                to.flush()
            });
            let mut lines = String::new();
            let readings = streams
                .iter()
                .map(|_| {
                    lines.clear();
                    self.from.read_line(&mut lines).expect("it answers");
                    serde_json::from_str(&lines)
                        .unwrap_or_else(|error| panic!("{}: {error}: {lines}", self.name))
                })
                .collect();
            writing.join().expect("no panic").expect("it reads");
            readings
        })
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        drop(self.to.take());
        let _ = self.child.wait();
    }
}
