//! Visits every state that can be reached.

use std::collections::HashSet;

use super::world::World;

/// Choices of one step: those that were given are taken again, further ones begin with the first.
#[derive(Debug, Default)]
pub(super) struct Choices {
    /// What was taken, and of how many.
    taken: Vec<(usize, usize)>,
    at: usize,
}

impl Choices {
    /// One of so many, by number.
    pub(super) fn pick(&mut self, of: usize) -> usize {
        assert!(of > 0, "nothing to choose from");
        if self.at == self.taken.len() {
            self.taken.push((0, of));
        }
        self.at += 1;
        let (taken, before) = self.taken[self.at - 1];
        assert_eq!(before, of, "the same choices lead elsewhere");
        taken
    }

    /// On to the next choices; false: all were taken.
    fn next(&mut self) -> bool {
        self.taken.truncate(self.at);
        self.at = 0;
        while let Some((taken, of)) = self.taken.pop() {
            if taken + 1 < of {
                self.taken.push((taken + 1, of));
                return true;
            }
        }
        false
    }
}

/// What a search has seen.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Seen {
    pub(super) states: usize,
    /// States in which nothing can happen any more.
    pub(super) ends: usize,
}

/// From `start`, every step from every state, and the checks in each.
///
/// # Errors
/// The first violation, and how it came about.
pub(super) fn explore(start: World) -> Result<Seen, String> {
    const MAX_STATES: usize = 400_000;
    let mut visited = HashSet::from([start.key()]);
    let mut open = vec![start];
    let mut seen = Seen::default();
    while let Some(world) = open.pop() {
        seen.states += 1;
        assert!(seen.states < MAX_STATES, "too many states for a test: {}", world.history());
        if world.is_over() {
            seen.ends += 1;
            world.check_end().map_err(|what| format!("{what}: {}", world.history()))?;
        }
        if world.steps() == 0 {
            continue;
        }
        let mut choices = Choices::default();
        loop {
            let mut after = world.clone();
            after.step(&mut choices);
            after.check().map_err(|what| format!("{what}: {}", after.history()))?;
            if visited.insert(after.key()) {
                open.push(after);
            }
            if !choices.next() {
                break;
            }
        }
    }
    Ok(seen)
}
