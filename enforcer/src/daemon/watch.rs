//! Watching the policy file.
//!
//! Editors and deployment tools replace files rather than write into them: by renaming, or by turning a symbolic link. So what is
//! watched are the directories on the way to the file, and what counts is what the path leads to now.

use std::collections::BTreeSet;
use std::fs::Metadata;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tracing::warn;

/// How long nothing may happen before the file is taken as whole.
const QUIET: Duration = Duration::from_millis(100);
/// What no event tells (a file system without them, a directory that was moved) is seen this late at the latest.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Symbolic links on the way to the file; the kernel's own limit is 40.
const MAX_LINKS: usize = 40;

/// What tells one content of a file from the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size_bytes: u64,
    modified_ns: i128,
    changed_ns: i128,
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        let ns = |secs: i64, nanos: i64| i128::from(secs) * 1_000_000_000 + i128::from(nanos);
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size_bytes: metadata.size(),
            modified_ns: ns(metadata.mtime(), metadata.mtime_nsec()),
            changed_ns: ns(metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// Of what the path leads to.
    fn at(path: &Path) -> Option<Self> {
        std::fs::metadata(path).ok().map(|metadata| Self::of(&metadata))
    }
}

/// tokio asks for the descriptor itself.
struct Events(Inotify);

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// Starts watching; each change of the file sends one message. What changes before the receiver has looked counts as one.
pub(super) fn start(path: PathBuf) -> std::io::Result<mpsc::Receiver<()>> {
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
    // SAFETY: the inotify instance keeps its descriptor, and is not replaced while it is registered.
    let inotify = unsafe { AsyncFd::register(Events(inotify)) }?;
    let (changed, receiver) = mpsc::channel(1);
    let mut last = Stamp::at(&path);
    watch(&inotify, &path);
    tokio::spawn(async move {
        while !changed.is_closed() {
            let _ = tokio::time::timeout(LOOK_EVERY, event(&inotify)).await;
            while tokio::time::timeout(QUIET, event(&inotify)).await.is_ok() {}
            watch(&inotify, &path);
            let now = Stamp::at(&path);
            if now != last {
                match now {
                    Some(_) => drop(changed.try_send(())),
                    None => {
                        warn!(path = %path.display(), "the policy file is gone; the policy stays in force");
                    }
                }
                last = now;
            }
        }
    });
    Ok(receiver)
}

/// Waits for something to happen in one of the directories. Which event it was does not matter.
async fn event(inotify: &AsyncFd<Events>) {
    loop {
        let Ok(mut guard) = inotify.readable().await else { break };
        match guard.try_io(|inotify| Ok(inotify.get_ref().0.read_events()?)) {
            Ok(Ok(_)) => return,
            Ok(Err(_)) => break,
            Err(_would_block) => {}
        }
    }
    // No events are to be had: what is left is to look now and then.
    std::future::pending::<()>().await;
}

/// Watches the directories on the way to the file; those that are watched already stay so.
fn watch(inotify: &AsyncFd<Events>, path: &Path) {
    let flags = AddWatchFlags::IN_CLOSE_WRITE
        | AddWatchFlags::IN_MOVED_TO
        | AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_ATTRIB
        | AddWatchFlags::IN_ONLYDIR;
    for directory in directories(path) {
        // One that is missing is looked for again later.
        let _ = inotify.get_ref().0.add_watch(&directory, flags);
    }
}

/// The directories of the path, and of each symbolic link that it leads through.
fn directories(path: &Path) -> BTreeSet<PathBuf> {
    let mut directories = BTreeSet::new();
    let mut next = Some(path.to_owned());
    for _ in 0..MAX_LINKS {
        let Some(path) = next.take() else { break };
        let directory = match path.parent() {
            Some(parent) if parent != Path::new("") => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        if let Ok(target) = std::fs::read_link(&path) {
            next = Some(directory.join(target));
        }
        directories.insert(directory);
    }
    directories
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    const LIMIT: Duration = Duration::from_secs(20);

    async fn seen(receiver: &mut mpsc::Receiver<()>, what: &str) {
        let change = tokio::time::timeout(LIMIT, receiver.recv()).await;
        assert_eq!(change, Ok(Some(())), "{what}");
    }

    #[tokio::test]
    async fn every_way_of_replacing_a_file_is_seen() {
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join("policy.yaml");
        std::fs::write(&file, "1").unwrap();
        let mut receiver = start(file.clone()).unwrap();
        std::fs::write(&file, "22").unwrap();
        seen(&mut receiver, "written").await;
        let other = place.path().join(".policy.yaml.tmp");
        std::fs::write(&other, "333").unwrap();
        std::fs::rename(&other, &file).unwrap();
        seen(&mut receiver, "renamed over").await;
        std::fs::rename(&file, place.path().join("policy.yaml~")).unwrap();
        std::fs::write(&file, "4444").unwrap();
        seen(&mut receiver, "moved away and written anew").await;
    }

    #[tokio::test]
    async fn a_link_that_is_turned_is_seen() {
        // As in a mounted Kubernetes ConfigMap.
        let place = tempfile::tempdir().unwrap();
        for version in ["v1", "v2"] {
            std::fs::create_dir(place.path().join(version)).unwrap();
            std::fs::write(place.path().join(version).join("policy.yaml"), version).unwrap();
        }
        symlink("v1", place.path().join("..data")).unwrap();
        symlink("..data/policy.yaml", place.path().join("policy.yaml")).unwrap();
        let mut receiver = start(place.path().join("policy.yaml")).unwrap();
        symlink("v2", place.path().join("..data_tmp")).unwrap();
        std::fs::rename(place.path().join("..data_tmp"), place.path().join("..data")).unwrap();
        seen(&mut receiver, "turned").await;
    }

    #[test]
    fn every_directory_on_the_way_is_found() {
        let place = tempfile::tempdir().unwrap();
        let (a, b) = (place.path().join("a"), place.path().join("b"));
        std::fs::create_dir(&a).unwrap();
        std::fs::create_dir(&b).unwrap();
        symlink("../b/real", a.join("link")).unwrap();
        let found = directories(&a.join("link"));
        assert_eq!(found, BTreeSet::from([a.clone(), a.join("../b")]));
        assert_eq!(directories(Path::new("policy.yaml")), BTreeSet::from([PathBuf::from(".")]));
    }
}
