//! From a cgroup's id to its path. The id is the inode number of its directory.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use enforcer_common::abi::{Caller, LOST_CGROUPS};

use super::labels::{self, Labels};
use super::{Identity, Workload};

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
    /// Root of the file system in which container runtimes describe their containers.
    host_root: PathBuf,
    known: HashMap<u64, Arc<Workload>>,
    /// Of containers, by id: one may have many cgroups, and make more.
    labels: HashMap<String, Labels>,
    /// What the last walk found.
    paths: HashMap<u64, PathBuf>,
    next_walk: Option<Instant>,
}

impl Workloads {
    /// For the hierarchy that is mounted at `root`.
    #[must_use]
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            host_root: PathBuf::from("/"),
            known: HashMap::new(),
            labels: HashMap::new(),
            paths: HashMap::new(),
            next_walk: None,
        }
    }

    /// Container runtimes are those of the host whose root is here.
    #[must_use]
    pub fn with_host_root(self, host_root: impl Into<PathBuf>) -> Self {
        Self { host_root: host_root.into(), ..self }
    }

    /// The workloads of all cgroups that there are, those around others before them. `None`: there are too many to look at.
    #[must_use]
    pub fn all(&mut self) -> Option<Vec<Workload>> {
        let mut found: Vec<_> = cgroups(&self.root).take(MAX_CGROUPS + 1).collect();
        if found.len() > MAX_CGROUPS {
            return None;
        }
        found.sort_by(|(_, a), (_, b)| a.cmp(b));
        let read = |(id, path): (u64, PathBuf)| {
            let path = self.below_root(&path);
            self.read(id, Some(path))
        };
        Some(found.into_iter().map(read).collect())
    }

    /// The workload that a process is in now.
    ///
    /// # Errors
    /// The process is gone, or its cgroup can't be seen from here.
    pub fn of_process(&mut self, pid: u32) -> std::io::Result<Workload> {
        let path = path_of(pid)?;
        let cgroup_id = self.id_of(&path)?;
        Ok(self.read(cgroup_id, Some(path)))
    }

    fn read(&mut self, cgroup_id: u64, path: Option<String>) -> Workload {
        // Of one that is going away around it nobody knows whose part it was.
        let named = path.as_deref().and_then(Identity::named);
        let named_cgroup_id = named.map(|path| self.id_of(path).unwrap_or(LOST_CGROUPS));
        let workload = Workload { named_cgroup_id, ..Workload::of(cgroup_id, path) };
        let Some(container) = &workload.identity.container_id else { return workload };
        if self.labels.len() >= MAX_KNOWN {
            self.labels.clear();
        }
        let read = || labels::of(&self.host_root, &workload.identity);
        let labels = self.labels.entry(container.clone()).or_insert_with(read).clone();
        Workload { labels, ..workload }
    }

    fn below_root(&self, directory: &Path) -> String {
        format!("/{}", directory.strip_prefix(&self.root).unwrap_or(directory).display())
    }

    fn id_of(&self, path: &str) -> std::io::Result<u64> {
        Ok(fs::metadata(self.root.join(path.trim_start_matches('/')))?.ino())
    }

    /// The workload of a caller; `None`: the caller is unknown. Looks where the process says that it is, which costs two system calls,
    /// then through the whole hierarchy, if that was not just done.
    pub fn of_caller(&mut self, caller: &Caller) -> Option<Arc<Workload>> {
        if !caller.is_known() {
            return None;
        }
        let id = caller.cgroup_id;
        let known = self.known.get(&id).map(Arc::clone);
        if let Some(known) = known.as_ref().filter(|known| known.cgroup_path.is_some()) {
            return Some(Arc::clone(known));
        }
        // Also of one that was not found before: the process knows better.
        if let Some(path) = self.path_of_process(caller) {
            return Some(self.remember(id, Some(path)));
        }
        if known.is_some() {
            return known;
        }
        let walked = self.walk();
        match self.paths.get(&id) {
            Some(path) => {
                let path = self.below_root(path);
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
        let workload = Arc::new(self.read(cgroup_id, path));
        self.known.insert(cgroup_id, Arc::clone(&workload));
        workload
    }

    /// The process may have ended, and another have its number, or it may have gone elsewhere since: then the directory is another one.
    fn path_of_process(&self, caller: &Caller) -> Option<String> {
        if caller.pid == 0 {
            return None;
        }
        let path = path_of(caller.pid).ok()?;
        (self.id_of(&path).ok()? == caller.cgroup_id).then_some(path)
    }

    /// Looks through the hierarchy, unless that was just done: whether it did, and saw all.
    fn walk(&mut self) -> bool {
        let begin = Instant::now();
        if self.next_walk.is_some_and(|next| begin < next) {
            return false;
        }
        self.paths = cgroups(&self.root).take(MAX_CGROUPS).collect();
        let end = Instant::now();
        self.next_walk = Some(end + ((end - begin) * WALK_SHARE).max(MIN_INTERVAL));
        self.paths.len() < MAX_CGROUPS
    }
}

/// The path of a process's cgroup.
fn path_of(pid: u32) -> std::io::Result<String> {
    let table = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let path = table.lines().find_map(|line| line.strip_prefix("0::"));
    // Outside of what is mounted here.
    let path = path.filter(|path| path.split('/').all(|name| name != ".."));
    path.map(str::to_owned)
        .ok_or_else(|| std::io::Error::other("it is in no cgroup that can be seen from here"))
}

#[cfg(test)]
mod tests {
    use enforcer_common::abi::LOST_CGROUPS;

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
        assert!([&agent, &slice, &made].iter().all(|own| own.source_cgroup_id() == own.cgroup_id));
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
            assert_eq!(gone.source_cgroup_id(), LOST_CGROUPS);
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

    #[test]
    fn a_container_has_the_labels_that_its_runtime_wrote() {
        const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
        let (root, host) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let inner = root.path().join("docker").join(ID).join("inner");
        fs::create_dir_all(&inner).unwrap();
        let described = host.path().join("var/lib/docker/containers").join(ID);
        fs::create_dir_all(&described).unwrap();
        let text = r#"{"Config": {"Labels": {"app": "agent"}}}"#;
        fs::write(described.join("config.v2.json"), text).unwrap();
        let mut workloads = Workloads::new(root.path()).with_host_root(host.path());
        let id = fs::metadata(&inner).unwrap().ino();
        let found = workloads.of_caller(&caller(id, 0)).unwrap();
        assert_eq!(found.labels.get("app").map(String::as_str), Some("agent"));
        // Remembered with the workload, and for other cgroups of the container.
        fs::remove_dir_all(host.path().join("var")).unwrap();
        assert_eq!(workloads.of_caller(&caller(id, 0)), Some(Arc::clone(&found)));
        let outer = fs::metadata(inner.parent().unwrap()).unwrap().ino();
        // Charged as the container.
        assert_eq!((found.named_cgroup_id, found.source_cgroup_id()), (Some(outer), outer));
        assert_eq!(workloads.of_caller(&caller(outer, 0)).unwrap().labels, found.labels);
        let all = workloads.all().unwrap();
        let paths: Vec<_> = all.iter().filter_map(|workload| workload.cgroup_path.clone()).collect();
        let container = format!("/docker/{ID}");
        assert_eq!(paths, ["/", "/docker", &container, &format!("{container}/inner")]);
    }

    #[test]
    fn a_process_is_where_it_is() {
        let Ok(root) = crate::lifecycle::paths::cgroup2_root() else { return };
        let own = Workloads::new(root).of_process(std::process::id()).unwrap();
        assert!(own.cgroup_path.is_some() && own.cgroup_id != 0);
        assert!(Workloads::new("/nonexistent").of_process(u32::MAX).is_err());
    }
}
