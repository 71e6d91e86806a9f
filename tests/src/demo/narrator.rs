//! What the audience reads.

use std::io::Write;
use std::time::Duration;

use anyhow::{Context, Result};

/// Stands where a token would have been printed.
const REDACTED: &str = "[token]";
/// Width of the column before a step's text.
const MARGIN: &str = "              ";

/// Writes the steps and keeps count of broken promises. No token passes: the narrator knows them all, and one in a text is a
/// broken promise of its own.
pub struct Narrator<W> {
    out: W,
    colors: bool,
    pause: Duration,
    secrets: Vec<String>,
    step: u32,
    promises: u32,
    broken: Vec<String>,
}

impl<W: Write> Narrator<W> {
    /// Writes to `out`, with ANSI colors if asked for, and waits for `pause` before each step but the first.
    pub fn new(out: W, colors: bool, pause: Duration) -> Self {
        Self { out, colors, pause, secrets: Vec::new(), step: 0, promises: 0, broken: Vec::new() }
    }

    /// Makes sure that this is never shown.
    pub fn keep_secret(&mut self, token: &str) {
        self.secrets.push(token.to_owned());
    }

    /// Number of promises checked so far.
    pub fn promises(&self) -> u32 {
        self.promises
    }

    /// The promises that were not kept, each with its step.
    pub fn broken(&self) -> &[String] {
        &self.broken
    }

    /// Begins a step.
    ///
    /// # Errors
    /// When the output can't be written, as with all methods that write.
    pub async fn step(&mut self, title: &str) -> Result<()> {
        if self.step > 0 {
            tokio::time::sleep(self.pause).await;
        }
        self.step += 1;
        let heading = self.colored("1", &format!("{:2}. {title}", self.step));
        self.line(&format!("\n{heading}"))
    }

    /// Says what is done.
    ///
    /// # Errors
    /// As [`Narrator::step`].
    pub fn done(&mut self, text: &str) -> Result<()> {
        self.labelled("done", text)
    }

    /// Says what is promised.
    ///
    /// # Errors
    /// As [`Narrator::step`].
    pub fn promised(&mut self, text: &str) -> Result<()> {
        self.labelled("promised", text)
    }

    /// Says something that was measured and that nothing was promised about.
    ///
    /// # Errors
    /// As [`Narrator::step`].
    pub fn measured(&mut self, text: &str) -> Result<()> {
        self.labelled("measured", text)
    }

    /// Says what happened, and whether that is as promised.
    ///
    /// # Errors
    /// As [`Narrator::step`].
    pub fn happened(&mut self, kept: bool, text: &str) -> Result<()> {
        self.promises += 1;
        let mark = if kept {
            self.colored("32", "as promised")
        } else {
            let first = text.lines().next().unwrap_or_default();
            let broken = self.redact(&format!("step {}: {first}", self.step));
            self.broken.push(broken);
            self.colored("1;31", "NOT AS PROMISED")
        };
        let (first, rest) = text.split_once('\n').unwrap_or((text, ""));
        self.labelled("happened", &format!("{first}  [{mark}]"))?;
        for line in rest.lines() {
            self.more(line)?;
        }
        Ok(())
    }

    /// Shows a text of several lines, e.g. a command's output.
    ///
    /// # Errors
    /// As [`Narrator::step`].
    pub fn block(&mut self, title: &str, text: &str) -> Result<()> {
        let title = self.colored("36", title);
        self.line(&format!("    {title}"))?;
        for line in text.lines() {
            self.line(&format!("      {line}"))?;
        }
        Ok(())
    }

    /// Goes on with the text of the line before.
    ///
    /// # Errors
    /// As [`Narrator::step`].
    pub fn more(&mut self, text: &str) -> Result<()> {
        self.line(&format!("{MARGIN}{text}"))
    }

    /// A line outside of the steps.
    ///
    /// # Errors
    /// As [`Narrator::step`].
    pub fn line(&mut self, text: &str) -> Result<()> {
        let text = self.redact(text);
        writeln!(self.out, "{text}").and_then(|()| self.out.flush()).context("cannot write to the output")
    }

    /// The text with every known token left out; one that was there counts as a broken promise.
    pub fn redact(&mut self, text: &str) -> String {
        let mut clean = text.to_owned();
        for secret in &self.secrets {
            if clean.contains(secret.as_str()) {
                clean = clean.replace(secret.as_str(), REDACTED);
                self.broken.push(format!("step {}: a token was about to be shown", self.step));
            }
        }
        clean
    }

    fn labelled(&mut self, label: &str, text: &str) -> Result<()> {
        self.line(&format!("    {label:<10}{text}"))
    }

    fn colored(&self, code: &str, text: &str) -> String {
        if self.colors { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(tell: impl FnOnce(&mut Narrator<Vec<u8>>) -> Result<()>) -> Result<(String, Vec<String>)> {
        let mut narrator = Narrator::new(Vec::new(), false, Duration::ZERO);
        narrator.keep_secret("eyJ.secret.token");
        tell(&mut narrator)?;
        Ok((String::from_utf8(narrator.out)?, narrator.broken))
    }

    #[test]
    fn a_kept_promise_counts_and_a_broken_one_is_named() -> Result<()> {
        let (text, broken) = told(|narrator| {
            narrator.step = 1;
            narrator.happened(true, "HTTP 200")?;
            narrator.happened(false, "HTTP 500\nmore")?;
            assert_eq!(narrator.promises(), 2);
            Ok(())
        })?;
        assert!(text.contains("HTTP 200  [as promised]\n"), "{text}");
        assert!(text.contains("HTTP 500  [NOT AS PROMISED]\n"), "{text}");
        assert_eq!(broken, ["step 1: HTTP 500"]);
        Ok(())
    }

    #[test]
    fn a_token_is_never_shown_and_trying_to_is_a_broken_promise() -> Result<()> {
        let (text, broken) = told(|narrator| {
            narrator.step = 1;
            narrator.block("curl", "Authorization: Bearer eyJ.secret.token")
        })?;
        assert!(!text.contains("secret") && text.contains("Bearer [token]"), "{text}");
        assert_eq!(broken.len(), 1);
        Ok(())
    }

    #[test]
    fn without_a_terminal_there_are_no_escapes() -> Result<()> {
        let (text, _) = told(|narrator| {
            narrator.step = 1;
            narrator.happened(false, "x")
        })?;
        assert!(!text.contains('\x1b'), "{text}");
        Ok(())
    }
}
