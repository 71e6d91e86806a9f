//! From a cgroup's id to its path. The id is the inode number of its directory.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use enforcer_common::abi::Caller;

use super::Workload;

/// How many cgroups are looked at in one walk, at most.
const MAX_CGROUPS: usize = 8_192;
/// How many workloads are remembered.
const MAX_KNOWN: usize = 4_096;
/// How old what a walk found may be. Callers whose cgroup is gone could cause a walk each.
const MIN_INTERVAL: Duration = Duration::from_secs(1);
/// Of its time, one who resolves callers walks at most one part in so many.
const WALK_SHARE: u32 = 20;

/// The cgroups from `root` on, that one included, with their ids. What can't be read is left out.
pub(crate) fn cgroups(root: &Path) -> impl Iterator<Item = (u64, PathBuf)> + use<> {
    let mut waiting = vec![root.to_owned()];
    std::iter::from_fn(move || {
        loop {
            let directory = waiting.pop()?;
            let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
            let children = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            waiting.extend(children.map(|entry| entry.path()));
            if let Ok(metadata) = fs::metadata(&directory) {
                return Some((metadata.ino(), directory));
            }
        }
    })
}

/// The workloads that were met, by the ids of their cgroups. The kernel gives no id out twice, so one that is gone is remembered as what it
/// was.
#[derive(Debug)]
pub struct Workloads {
    root: PathBuf,
    known: HashMap<u64, Arc<Workload>>,
    /// What the last walk found.
    paths: HashMap<u64, PathBuf>,
    next_walk: Option<Instant>,
}

impl Workloads {
    /// For the hierarchy that is mounted at `root`.
    #[must_use]
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), known: HashMap::new(), paths: HashMap::new(), next_walk: None }
    }

    /// The workload of a caller; `None`: the caller is unknown. Looks where the process says that it is, which costs two system calls,
    /// then through the whole hierarchy, if that was not just done.
    pub fn of_caller(&mut self, caller: &Caller) -> Option<Arc<Workload>> {
        if !caller.is_known() {
            return None;
        }
        let id = caller.cgroup_id;
        if let Some(known) = self.known.get(&id) {
            return Some(Arc::clone(known));
        }
        if let Some(path) = self.path_of_process(caller) {
            return Some(self.remember(id, Some(path)));
        }
        let walked = self.walk();
        match self.paths.get(&id) {
            Some(path) => {
                let below = path.strip_prefix(&self.root).unwrap_or(path).display();
                let path = format!("/{below}");
                Some(self.remember(id, Some(path)))
            }
            // It is gone for good, or was never in sight.
            None if walked => Some(self.remember(id, None)),
            None => Some(Arc::new(Workload::of(id, None))),
        }
    }

    fn remember(&mut self, cgroup_id: u64, path: Option<String>) -> Arc<Workload> {
        if self.known.len() >= MAX_KNOWN {
            self.known.clear();
        }
        let workload = Arc::new(Workload::of(cgroup_id, path));
        self.known.insert(cgroup_id, Arc::clone(&workload));
        workload
    }

    /// The process may have ended, and another have its number, or it may have gone elsewhere since: then the directory is another one.
    fn path_of_process(&self, caller: &Caller) -> Option<String> {
        let table = fs::read_to_string(format!("/proc/{}/cgroup", caller.pid)).ok()?;
        let path = table.lines().find_map(|line| line.strip_prefix("0::"))?;
        // Outside of what is mounted here.
        if path.split('/').any(|name| name == "..") {
            return None;
        }
        let metadata = fs::metadata(self.root.join(path.trim_start_matches('/'))).ok()?;
        (metadata.ino() == caller.cgroup_id).then(|| path.to_owned())
    }

    /// Looks through the hierarchy, unless that was just done: whether it did.
    fn walk(&mut self) -> bool {
        let begin = Instant::now();
        if self.next_walk.is_some_and(|next| begin < next) {
            return false;
        }
        self.paths = cgroups(&self.root).take(MAX_CGROUPS).collect();
        let end = Instant::now();
        self.next_walk = Some(end + ((end - begin) * WALK_SHARE).max(MIN_INTERVAL));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(cgroup_id: u64, pid: u32) -> Caller {
        Caller { cgroup_id, pid, ..Caller::UNKNOWN }
    }

    #[test]
    fn directories_are_found_by_their_numbers_in_one_walk_and_remembered() {
        let root = tempfile::tempdir().unwrap();
        let paths =
            ["system.slice/agent.service", "system.slice", "made/by/hand"].map(|path| root.path().join(path));
        paths.iter().for_each(|path| fs::create_dir_all(path).unwrap());
        let mut workloads = Workloads::new(root.path());
        let mut of =
            |path: &Path| workloads.of_caller(&caller(fs::metadata(path).unwrap().ino(), 0)).unwrap();
        let [agent, slice, made] = [of(&paths[0]), of(&paths[1]), of(&paths[2])];
        assert_eq!((agent.name().as_str(), agent.source()), ("agent.service", "unit"));
        assert_eq!((slice.name().as_str(), slice.source()), ("/system.slice", "path"));
        assert_eq!((made.name().as_str(), made.source()), ("/made/by/hand", "path"));
        let id = agent.cgroup_id;
        fs::remove_dir_all(&paths[0]).unwrap();
        assert_eq!(workloads.of_caller(&caller(id, 0)), Some(agent));
    }

    #[test]
    fn unknown_callers_have_none_and_gone_cgroups_only_a_number() {
        let root = tempfile::tempdir().unwrap();
        let mut workloads = Workloads::new(root.path());
        assert_eq!(workloads.of_caller(&Caller::UNKNOWN), None);
        // This process is in a cgroup, but not in that one.
        for id in [u64::MAX, u64::MAX, u64::MAX - 1] {
            let gone = workloads.of_caller(&caller(id, std::process::id())).unwrap();
            assert_eq!((gone.name(), gone.source()), (format!("cgroup {id}"), "gone"));
        }
        // The first was looked for, the second came too soon after that to be sure.
        assert_eq!(workloads.known.len(), 1);
    }

    #[test]
    fn a_walk_is_not_made_for_each_caller() {
        let root = tempfile::tempdir().unwrap();
        let mut workloads = Workloads::new(root.path());
        assert!(workloads.walk());
        assert!(!workloads.walk());
        let late = root.path().join("late");
        fs::create_dir(&late).unwrap();
        let id = fs::metadata(&late).unwrap().ino();
        assert_eq!(workloads.of_caller(&caller(id, 0)).unwrap().source(), "gone");
        workloads.next_walk = None;
        assert_eq!(workloads.of_caller(&caller(id, 0)).unwrap().name(), "/late");
    }
}
