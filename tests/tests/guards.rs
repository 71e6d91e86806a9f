//! The guards do what they say, and leave nothing behind.

use std::net::{IpAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use enforcer_tests::guard::{Cgroup, Deadline, NetNs, Proc, run, spawn_in, veth_pair, wait_until};

const LIMIT: Duration = Duration::from_secs(20);

fn shell(script: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script]);
    command
}

#[test]
fn a_cgroup_holds_its_children_and_takes_them_along() -> Result<()> {
    let _deadline = Deadline::new("cgroup", LIMIT);
    let cgroup = Cgroup::new("holds")?;
    // The grandchild is nobody's `Proc`: only the cgroup knows it.
    let mut process = spawn_in(&cgroup, "shell", shell("sleep 1000 & echo grandchild $!; wait"))?;
    let line = process.wait_for_line("grandchild", LIMIT)?;
    let grandchild = line.trim_start_matches("grandchild ").to_owned();
    let pids = cgroup.pids()?;
    assert!(pids.contains(&process.pid()) && pids.len() == 2, "{pids:?}");
    assert!(cgroup.id()? > 0);
    let path = cgroup.path().to_owned();
    drop(cgroup);
    assert!(!path.exists());
    assert!(!process.wait(LIMIT)?.success());
    wait_until("the grandchild's end", LIMIT, || {
        let state = std::fs::read_to_string(format!("/proc/{grandchild}/stat")).unwrap_or_default();
        (state.is_empty() || state.contains(") Z ")).then_some(())
    })
}

#[test]
fn a_cgroup_of_a_dead_run_is_swept() -> Result<()> {
    let _deadline = Deadline::new("sweep", LIMIT);
    // Above the highest possible process id.
    let stale = Cgroup::mount_point()?.join("enforcer-test-99999999-0-stale");
    std::fs::create_dir(&stale)?;
    let parent = Cgroup::new("sweeper")?;
    assert!(!stale.exists());
    let child = parent.child("inner")?;
    assert!(child.path().starts_with(parent.path()));
    // The parent removes what is still inside.
    drop(parent);
    assert!(!child.path().exists());
    Ok(())
}

#[test]
fn namespaces_are_joined_by_a_veth_pair() -> Result<()> {
    let _deadline = Deadline::new("veth", LIMIT);
    let (a, b) = (NetNs::new("a")?, NetNs::new("b")?);
    let pair = veth_pair(&a, &b)?;
    for address in [IpAddr::from(pair.b.0), IpAddr::from(pair.b.1)] {
        let listener = b.run(|| TcpListener::bind((address, 0)))??;
        let target = listener.local_addr()?;
        let client = a.run(|| TcpStream::connect_timeout(&target, LIMIT))??;
        let (_, peer) = listener.accept()?;
        assert_eq!(peer, client.local_addr()?);
        assert!(peer.ip() == IpAddr::from(pair.a.0) || peer.ip() == IpAddr::from(pair.a.1));
    }
    // Nothing of it is seen from here.
    assert!(!Path::new("/sys/class/net").join(&pair.interface_a).exists());
    Ok(())
}

#[test]
fn a_child_runs_in_the_namespace_it_was_placed_in() -> Result<()> {
    let _deadline = Deadline::new("place", LIMIT);
    let ns = NetNs::new("place")?;
    let here = run("readlink", shell("readlink /proc/self/ns/net"), b"", LIMIT)?.stdout;
    let mut command = shell("readlink /proc/self/ns/net; cat /proc/net/dev");
    ns.place(&mut command)?;
    let there = run("readlink", command, b"", LIMIT)?.stdout;
    assert!(there.starts_with("net:["), "{there}");
    assert_ne!(there.lines().next(), here.lines().next());
    assert!(there.contains("lo:") && !there.contains("eth0:"), "{there}");
    // Without a placement: the main thread's namespace, also when called from inside another one.
    let inside = ns.run(|| run("readlink", shell("readlink /proc/self/ns/net"), b"", LIMIT))??.stdout;
    assert_eq!(inside, here);
    Ok(())
}

#[test]
fn a_process_is_watched_fed_and_ended() -> Result<()> {
    let _deadline = Deadline::new("process", LIMIT);
    let fed = run("cat", shell("cat; echo done >&2; exit 7"), b"fed\n", LIMIT)?;
    assert_eq!((fed.stdout.as_str(), fed.stderr.as_str(), fed.status.code()), ("fed\n", "done\n", Some(7)));

    let script = "trap 'echo got it; exit 5' TERM; echo ready; while :; do sleep 0.01; done";
    let mut process = Proc::spawn("trap", shell(script))?;
    assert_eq!(process.wait_for_line("ready", LIMIT)?, "ready");
    assert_eq!(process.terminate(LIMIT)?.code(), Some(5));
    assert!(process.stdout().contains("got it"));

    let mut silent = Proc::spawn("silent", shell("echo only this; exit 1"))?;
    let error = silent.wait_for_line("never said", LIMIT).unwrap_err().to_string();
    assert!(error.contains("only this") && error.contains("exit status: 1"), "{error}");

    let mut busy = Proc::spawn("busy", shell("while :; do :; done"))?;
    wait_until("CPU time", LIMIT, || busy.cpu_time().ok().filter(|used| *used >= Duration::from_millis(20)))?;
    assert!(!busy.kill()?.success());
    Ok(())
}

#[test]
fn a_child_outlives_the_thread_that_started_it_but_not_its_guard() -> Result<()> {
    let _deadline = Deadline::new("thread", LIMIT);
    let started = std::thread::spawn(|| Proc::spawn("sleep", shell("echo up; exec sleep 1000")));
    let mut process = started.join().expect("no panic")?;
    process.wait_for_line("up", LIMIT)?;
    std::thread::sleep(Duration::from_millis(50));
    assert!(process.try_wait()?.is_none(), "killed with the thread that started it");
    let pid = process.pid();
    drop(process);
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    Ok(())
}

#[test]
fn a_hung_test_is_aborted_with_its_name() -> Result<()> {
    if std::env::var_os("ENFORCER_TESTS_HANG").is_some() {
        let _deadline = Deadline::new("the hanging one", Duration::from_millis(50));
        std::thread::sleep(LIMIT);
        unreachable!("the watchdog aborts first");
    }
    let _deadline = Deadline::new("watchdog", LIMIT);
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--exact", "a_hung_test_is_aborted_with_its_name"]).env("ENFORCER_TESTS_HANG", "1");
    let finished = run("itself", command, b"", LIMIT)?;
    assert!(!finished.status.success());
    assert!(finished.stderr.contains("the hanging one: not done after 50ms"), "{}", finished.stderr);
    Ok(())
}
