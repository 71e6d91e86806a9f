//! `enforcer first-users`.

use clap::Args;
use enforcer_common::abi::{FirstUser, NameHash, text_str};
use serde::Serialize;

use super::exit::{FAILURE, OK, failed};
use super::format::{duration, hex, unix_secs};
use super::output::{Render, print, table};
use super::{Global, live};
use crate::revocation::store::parse_hex;

/// Which workload presented the first token of a principal, where policy binds it to that (`first_use`)
///
/// It keeps the principal's tokens until it is forgotten here, the enforcement is unloaded, or the machine is started again. Forget it when the principal really has moved: the
/// next workload that presents one of its tokens is the first one then.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  enforcer first-users
  enforcer first-users --forget 5bdcc146bf60754e6a042426089575c7")]
pub(super) struct Command {
    /// Forget one, by its id: 32 hexadecimal digits
    #[arg(long, value_name = "ID", value_parser = id)]
    forget: Option<NameHash>,
}

fn id(shown: &str) -> Result<NameHash, String> {
    parse_hex(shown)
        .ok_or_else(|| "an id is 32 hexadecimal digits, as `enforcer first-users` shows it".to_owned())
}

#[derive(Debug, Serialize)]
struct FirstUsers {
    /// By principal.
    first_users: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    id: String,
    principal: String,
    server: String,
    workload: String,
    age_s: u64,
}

impl FirstUsers {
    fn of(all: impl IntoIterator<Item = (NameHash, FirstUser)>, now_unix_secs: u64) -> Self {
        let row = |(key, user): (NameHash, FirstUser)| Row {
            id: hex(&key),
            principal: text_str(&user.principal).to_owned(),
            server: text_str(&user.server).to_owned(),
            workload: text_str(&user.workload).to_owned(),
            age_s: now_unix_secs.saturating_sub(user.at_unix_secs),
        };
        let mut first_users: Vec<_> = all.into_iter().map(row).collect();
        first_users.sort_by(|a, b| (&a.principal, &a.server, &a.id).cmp(&(&b.principal, &b.server, &b.id)));
        Self { first_users }
    }
}

impl Render for FirstUsers {
    fn text(&self) -> String {
        let rows = self.first_users.iter().map(|row| {
            [
                row.id.clone(),
                row.principal.clone(),
                row.server.clone(),
                row.workload.clone(),
                duration(row.age_s.saturating_mul(1000)),
            ]
        });
        table(["ID", "PRINCIPAL", "SERVER", "WORKLOAD", "AGE"], rows)
    }
}

pub(super) fn run(command: &Command, global: &Global) -> anyhow::Result<u8> {
    let mut live = live::open(global)?;
    if let Some(key) = &command.forget
        && live.first_users.remove(key).is_err()
    {
        let message = format!("there is no first user {}; see `enforcer first-users`", hex(key));
        return Err(failed(FAILURE, message));
    }
    print(global.output, &FirstUsers::of(live.first_users()?, unix_secs()))?;
    Ok(OK)
}

#[cfg(test)]
mod tests {
    use enforcer_common::abi::text;

    use super::*;

    #[test]
    fn rows_are_by_principal() {
        let user = |principal: &str| FirstUser {
            at_unix_secs: 40,
            workload_hash: [0; 16],
            workload: text("agent.service"),
            principal: text(principal),
            server: text("files"),
        };
        let shown = FirstUsers::of([([2; 16], user("corp/bob")), ([1; 16], user("corp/alice"))], 100);
        assert_eq!(
            shown.text(),
            "ID                                PRINCIPAL   SERVER  WORKLOAD       AGE\n\
             01010101010101010101010101010101  corp/alice  files   agent.service  1m00s\n\
             02020202020202020202020202020202  corp/bob    files   agent.service  1m00s\n"
        );
    }
}
