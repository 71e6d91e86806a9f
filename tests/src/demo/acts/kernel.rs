//! What the kernel holds and counts, as the enforcer's own commands show it.

use std::io::Write;
use std::time::Duration;

use anyhow::{Result, anyhow};
use serde_json::{Value, json};

use super::{CALL_LIMIT, Show};
use crate::demo::cli::Counters;
use crate::mcp::{self, CallOutcome, Session};
use crate::raw::{Connection, RequestBuilder};

/// How many known requests are sent to show that the daemon does not see them.
const REPEATS: u64 = 1000;
/// How long these may take; it is a matter of a second.
const REPEATS_LIMIT: Duration = Duration::from_secs(60);

impl<W: Write> Show<'_, W> {
    pub(super) async fn what_the_kernel_holds(&mut self, connection: &Connection) -> Result<()> {
        self.narrator.step("What the kernel holds now").await?;
        self.narrator.done("the maps are read by the enforcer's own commands")?;
        self.narrator
            .promised("the open connection: 6 requests, of which only the first 3 went to the daemon")?;
        self.table("flows")?;
        let client = connection.local_addr()?.to_string();
        let flows = self.stage.cli().rows("flows")?;
        let flow = flows.iter().find(|row| row.get("client_address") == Some(&json!(client)));
        let number = |name: &str| flow.and_then(|row| row.get(name)).and_then(Value::as_u64);
        let found = ["requests", "punts", "allowed", "refused"].map(number);
        let told = found.map(|count| count.map_or_else(|| "?".to_owned(), |count| count.to_string()));
        let [requests, punts, allowed, refused] = &told;
        self.narrator.happened(
            found == [Some(6), Some(3), Some(2), Some(1)],
            &format!(
                "requests {requests}, to the daemon {punts}; by the kernel alone: passed {allowed}, refused {refused}"
            ),
        )?;

        self.narrator.promised("a verdict for each head that was judged: some allow, some deny")?;
        self.table("verdicts")?;
        let verdicts = self.stage.cli().rows("verdicts")?;
        let of_kind = |kind: &str| count(&verdicts, &[("kind", kind), ("state", "current")]);
        let (allow, deny) = (of_kind("allow"), of_kind("deny"));
        self.narrator.happened(allow >= 2 && deny >= 1, &format!("{allow} allow, {deny} deny"))?;

        self.narrator.promised("a grant for each token that was accepted, and none for the others")?;
        self.table("grants")?;
        let grants = self.stage.cli().rows("grants")?;
        let of = |subject: &str| count(&grants, &[("subject", subject), ("state", "active")]);
        let (alice, bob, carol, dave) = (of("alice"), of("bob"), of("carol"), of("dave"));
        self.narrator.happened(
            alice == 3 && bob == 1 && grants.len() == 4,
            &format!("alice {alice} (she used 3 tokens), bob {bob}, carol {carol}, dave {dave}"),
        )
    }

    pub(super) async fn known_calls(&mut self) -> Result<()> {
        self.narrator.step("Known requests never leave the kernel").await?;
        self.narrator
            .done(&format!("alice's client makes one call, and then the same call {REPEATS} times more"))?;
        self.narrator.promised(&format!(
            "{REPEATS} more requests allowed by the kernel; nothing more to the daemon, nothing cut off"
        ))?;
        let mint = self.sound("alice")?;
        let token = self.sign(&mint)?;
        let url = self.stage.resource()?;
        let newest = mcp::newest_version();
        let started = Session::start(&url, Some(&token), &newest);
        let session = match tokio::time::timeout(CALL_LIMIT, started).await?? {
            Ok(session) => session,
            Err(refused) => return self.narrator.happened(false, &super::told(&Ok(refused))),
        };
        // The first one makes the head known.
        let first = answered(&session, 1).await;
        let before = self.stage.cli().counters()?;
        let cpu_before = self.stage.daemon_cpu_time()?;
        let rest = tokio::time::timeout(REPEATS_LIMIT, answered(&session, REPEATS)).await;
        let cpu_ms = self.stage.daemon_cpu_time()?.saturating_sub(cpu_before).as_millis();
        let after = self.stage.cli().counters()?;
        session.close().await;
        let told = match first.and(rest.unwrap_or_else(|_| Err(anyhow!("not done within {REPEATS_LIMIT:?}"))))
        {
            Ok(()) => format!("the server answered all {REPEATS} calls"),
            Err(error) => format!("{error:#}"),
        };
        self.narrator.happened(told.starts_with("the server"), &told)?;
        self.compare(&before, &after, "allowed")?;
        self.narrator.measured(&format!(
            "CPU time that the daemon used meanwhile: {cpu_ms} ms (the clock ticks in 10 ms)"
        ))
    }

    pub(super) async fn known_refusals(&mut self, mut connection: Connection) -> Result<()> {
        self.narrator.step("Known refusals are answered by the kernel itself").await?;
        self.narrator.done(&format!(
            "a call without a token is sent once, and then {REPEATS} times more, on the connection of step 8"
        ))?;
        self.narrator.promised(&format!(
            "{REPEATS} times 401, written by the kernel; nothing more to the daemon, nothing to the server"
        ))?;
        // The refusal of a call without a token holds until policy changes; that of a bad token is judged again soon.
        let host = self.stage.addr()?.to_string();
        let request = RequestBuilder::mcp_call(&host, "/mcp", None, "echo").build();
        let first = connection.roundtrip(&request)?;
        let before = self.stage.cli().counters()?;
        let mut refused = 0;
        for _ in 0..REPEATS {
            let response = connection.roundtrip(&request)?;
            let alike = response.header("www-authenticate") == first.header("www-authenticate");
            refused += u64::from(first.status == 401 && response.status == 401 && alike);
        }
        let after = self.stage.cli().counters()?;
        self.narrator.happened(
            refused == REPEATS,
            &format!("{refused} times HTTP 401 with the first one's challenge"),
        )?;
        self.compare(&before, &after, "refused")?;
        let reached = after.reached_server().saturating_sub(before.reached_server());
        self.narrator
            .happened(reached == 0, &format!("passed or injected to the server, by the counters: {reached}"))
    }

    /// Shows the counters before and after the repeats; exactly one may have moved, by their number.
    fn compare(&mut self, before: &Counters, after: &Counters, moved: &str) -> Result<()> {
        let rows = [
            (format!("{moved} by the kernel"), before.get(moved), after.get(moved), REPEATS),
            ("sent to the daemon (all punt-..)".to_owned(), before.punts(), after.punts(), 0),
            ("injected by the daemon".to_owned(), before.get("injected"), after.get("injected"), 0),
            ("answered by the daemon".to_owned(), before.get("answered"), after.get("answered"), 0),
            ("connections cut off (all dead-..)".to_owned(), before.dead(), after.dead(), 0),
        ];
        let mut table = format!("{:<36}{:>9}{:>9}{:>9}\n", "", "BEFORE", "AFTER", "MORE");
        let mut kept = true;
        for (name, before, after, expected) in &rows {
            let more = after.saturating_sub(*before);
            kept &= after.checked_sub(*before) == Some(*expected);
            table.push_str(&format!("{name:<36}{before:>9}{after:>9}{more:>9}\n"));
        }
        self.narrator.block("read by `enforcer counters` before and after:", &table)?;
        let told = if kept { "exactly that" } else { "the counters moved otherwise" };
        self.narrator.happened(kept, told)
    }

    /// Shows the table that a command prints.
    fn table(&mut self, noun: &str) -> Result<()> {
        let table = self.stage.cli().table(noun)?;
        let shown = self.stage.cli().shown(noun);
        self.narrator.block(&format!("$ {shown}"), &table)
    }
}

/// How many rows have these values.
fn count(rows: &[Value], values: &[(&str, &str)]) -> usize {
    let fits = |row: &&Value| values.iter().all(|(name, value)| row.get(*name) == Some(&json!(value)));
    rows.iter().filter(fits).count()
}

/// Makes the call `times` times; each must be answered rightly.
async fn answered(session: &Session, times: u64) -> Result<()> {
    for index in 1..=times {
        let outcome = session.call("add", json!({ "a": 2, "b": 3 })).await;
        let right =
            matches!(&outcome, Ok(CallOutcome::Answered { text, is_error: false, .. }) if text == "5");
        if !right {
            return Err(anyhow!("call {index} of {times}: {}", super::told(&outcome)));
        }
    }
    Ok(())
}
