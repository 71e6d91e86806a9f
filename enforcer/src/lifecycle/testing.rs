//! What privileged tests need: an enforcement, a cgroup and a mount namespace of their own, gone when they end.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use enforcer_common::abi::{ABI_VERSION, Config, Endpoint, EndpointKey, FAMILY_V4, MODE_ENFORCE};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::datapath::{Maps, PinDir, load};
use crate::keys::BootInstant;
use crate::lifecycle::{UnloadOptions, paths, unload};

/// Whether the test may run; says so in the list of skipped tests if not.
pub(crate) fn is_root(test: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root && let Some(log) = std::env::var_os("ENFORCER_TEST_SKIP_LOG") {
        let mut log = fs::OpenOptions::new().append(true).create(true).open(log).unwrap();
        writeln!(log, "{test}: loading eBPF programs and mounting need root").unwrap();
    }
    root
}

/// Runs `test` in a thread with a mount table of its own.
pub(crate) fn in_own_mount_namespace(test: impl FnOnce() + Send + 'static) {
    let ran = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
        test();
    });
    if let Err(panic) = ran.join() {
        std::panic::resume_unwind(panic);
    }
}

/// A process is in one cgroup at a time.
static CGROUP: Mutex<()> = Mutex::new(());

/// A child cgroup that this process is in while the value lives.
pub(crate) struct TestCgroup {
    pub(crate) path: PathBuf,
    home: PathBuf,
    _turn: MutexGuard<'static, ()>,
}

impl TestCgroup {
    pub(crate) fn enter(name: &str) -> Self {
        let turn = CGROUP.lock().unwrap_or_else(PoisonError::into_inner);
        let root = paths::cgroup2_root().unwrap();
        let text = fs::read_to_string("/proc/self/cgroup").unwrap();
        let home = text.lines().find_map(|line| line.strip_prefix("0::/")).unwrap();
        let home = root.join(home);
        let path = root.join(format!("enforcer-{name}-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        let cgroup = Self { path, home, _turn: turn };
        enter(&cgroup.path);
        cgroup
    }
}

fn enter(cgroup: &Path) {
    fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string()).unwrap();
}

impl Drop for TestCgroup {
    fn drop(&mut self) {
        enter(&self.home);
        // Leaving is not finished at once.
        for _ in 0..100 {
            if fs::remove_dir(&self.path).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}

/// A loaded enforcement that guards 127.0.0.1:`port` in a cgroup, unloaded by force on drop.
pub(crate) struct TestEnforcement {
    pub(crate) pins: PinDir,
    pub(crate) maps: Maps,
}

impl TestEnforcement {
    pub(crate) fn start(name: &str, cgroup: &TestCgroup, port: u16) -> Self {
        let bpffs = Path::new(paths::BPFFS);
        let _ = paths::ensure_bpffs(bpffs).unwrap();
        let name = format!("enforcer-{name}-{}", std::process::id());
        let pins = paths::pin_dir(bpffs, &name);
        let making = paths::pin_dir(bpffs, &format!("{name}-making"));
        let mut loaded = load(&making).unwrap();
        let mut maps = Maps::open(&making).unwrap();
        let now_ns = BootInstant::now().since_boot().as_nanos() as u64;
        maps.set_config(Config {
            abi_version: ABI_VERSION,
            mode: MODE_ENFORCE,
            generation: 1,
            heartbeat_ns: now_ns,
            heartbeat_limit_ns: u64::MAX / 2,
            loaded_ns: now_ns,
            daemon_started_ns: now_ns,
            daemon_pid: std::process::id(),
            draining: 0,
            ..Config::NONE
        })
        .unwrap();
        let mut addr = [0; 16];
        addr[..4].copy_from_slice(&[127, 0, 0, 1]);
        let key = EndpointKey { addr, port, family: FAMILY_V4, zero: 0 };
        maps.set_endpoint(key, Endpoint { endpoint_id: 0, unavailable_reply_id: 0 }).unwrap();
        loaded.attach(&cgroup.path).unwrap();
        loaded.commit(&pins).unwrap();
        Self { pins, maps }
    }
}

impl Drop for TestEnforcement {
    fn drop(&mut self) {
        let options = UnloadOptions { drain_timeout: std::time::Duration::ZERO, force: true };
        let _ = unload(&self.pins, &options);
    }
}
