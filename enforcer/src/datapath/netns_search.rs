//! The search for network namespaces in a thread of its own: whoever has many processes makes it long, and must not hold up
//! anybody else.

use std::collections::{BTreeSet, HashSet};
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::netns::{MAX_NAMESPACES, search};

/// After a search the thread rests as long as it took, at most this long.
const MAX_REST: Duration = Duration::from_secs(2);

/// What became of a search.
#[derive(Debug)]
pub struct Searched {
    /// Cookie of the namespace.
    pub netns_cookie: u64,
    /// A sock_diag socket in it; `None`: it was not found.
    pub netlink: Option<OwnedFd>,
}

/// The thread. It ends when this is dropped.
#[derive(Debug)]
pub struct NamespaceSearch {
    /// Asked for, and not answered yet.
    asked: HashSet<u64>,
    questions: SyncSender<u64>,
    answers: mpsc::Receiver<Searched>,
}

impl NamespaceSearch {
    /// Starts the thread.
    ///
    /// # Errors
    /// It can't be made.
    pub fn start() -> std::io::Result<Self> {
        Self::start_with(search)
    }

    fn start_with(
        search: impl Fn(&mut BTreeSet<u64>, &mut dyn FnMut(u64, OwnedFd)) + Send + 'static,
    ) -> std::io::Result<Self> {
        let (questions, asked) = sync_channel(MAX_NAMESPACES);
        let (answer, answers) = mpsc::channel(MAX_NAMESPACES);
        std::thread::Builder::new()
            .name("netns-search".into())
            .spawn(move || run(&asked, &answer, search))?;
        Ok(Self { asked: HashSet::new(), questions, answers })
    }

    /// Has a namespace searched, if it is not yet. Returns at once; `false`: too many are.
    #[must_use]
    pub fn ask(&mut self, netns_cookie: u64) -> bool {
        if self.asked.contains(&netns_cookie) {
            return true;
        }
        let asked = self.asked.len() < MAX_NAMESPACES && self.questions.try_send(netns_cookie).is_ok();
        asked && self.asked.insert(netns_cookie)
    }

    /// Waits for an answer. Can be dropped at any time.
    pub async fn answer(&mut self) -> Searched {
        match self.answers.recv().await {
            Some(searched) => {
                self.asked.remove(&searched.netns_cookie);
                searched
            }
            // The thread is gone; questions fail.
            None => std::future::pending().await,
        }
    }
}

fn run(
    questions: &Receiver<u64>,
    answers: &mpsc::Sender<Searched>,
    search: impl Fn(&mut BTreeSet<u64>, &mut dyn FnMut(u64, OwnedFd)),
) {
    while let Ok(first) = questions.recv() {
        // One walk for all that are wanted.
        let mut wanted = BTreeSet::from([first]);
        wanted.extend(questions.try_iter());
        let start = Instant::now();
        // Whoever asked is gone if an answer can't be sent; the next question tells.
        let tell = |netns_cookie, netlink| _ = answers.blocking_send(Searched { netns_cookie, netlink });
        search(&mut wanted, &mut |netns_cookie, netlink| tell(netns_cookie, Some(netlink)));
        wanted.into_iter().for_each(|netns_cookie| tell(netns_cookie, None));
        std::thread::sleep(start.elapsed().min(MAX_REST));
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::datapath::netns::netlink_here;

    #[tokio::test]
    async fn questions_return_at_once_however_long_the_search_takes() {
        let gate = Arc::new(Mutex::new(()));
        let closed = gate.lock().unwrap();
        let walks = Arc::clone(&gate);
        let mut search = NamespaceSearch::start_with(move |wanted, found| {
            drop(walks.lock());
            let even: Vec<u64> = wanted.iter().copied().filter(|cookie| cookie % 2 == 0).collect();
            for cookie in even {
                wanted.remove(&cookie);
                let any = std::io::stderr().as_fd().try_clone_to_owned().unwrap();
                found(cookie, any);
            }
        })
        .unwrap();
        let all = MAX_NAMESPACES as u64;
        assert!((0..all).all(|cookie| search.ask(cookie)));
        assert!(search.ask(0), "it is searched already");
        assert!(!search.ask(all), "and no more fit");
        drop(closed);
        let mut answered = BTreeSet::new();
        for _ in 0..all {
            let Searched { netns_cookie, netlink } = search.answer().await;
            assert_eq!(netlink.is_some(), netns_cookie % 2 == 0);
            answered.insert(netns_cookie);
        }
        assert_eq!(answered.len() as u64, all);
        assert!(search.ask(all), "there is room again");
        assert!(search.answer().await.netlink.is_some());
    }

    #[tokio::test]
    async fn this_namespace_is_found() {
        // Of a privileged test's machine; without rights no namespace can be entered.
        let Ok((_, here)) = netlink_here() else { return };
        let mut search = NamespaceSearch::start().unwrap();
        assert!(search.ask(here) && search.ask(u64::MAX));
        let answers = [search.answer().await, search.answer().await];
        assert!(answers.iter().any(|answer| answer.netns_cookie == u64::MAX && answer.netlink.is_none()));
        let found = answers.iter().find(|answer| answer.netns_cookie == here).unwrap();
        assert!(found.netlink.is_some() || !nix::unistd::geteuid().is_root());
    }
}
