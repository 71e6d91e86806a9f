//! The guest's file system: one image with everything, in memory.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use super::plan::Step;
use crate::probe::find_program;
use crate::process::{run, stdout_of};

/// Modules that the tests need, in an order in which they load. Missing ones are built in, or the test that needs them says so.
const MODULES: &[&str] = &[
    "inet_diag",
    "tcp_diag",
    "mptcp_diag",
    "tls",
    "veth",
    "dummy",
    "sch_ingress",
    "cls_bpf",
    "sch_netem",
    "tun",
    "llc",
    "stp",
    "garp",
    "mrp",
    "8021q",
];

/// Where programs lie in the guest: beside each other, as the tests look for them.
const PROGRAMS: &str = "t";

/// What `/init` does before and after the steps. The kernel's messages go to the second serial line, ours to the first.
const INIT_HEAD: &str = r#"#!/bin/busybox sh
export PATH=/t:/sbin:/bin HOME=/root ENFORCER_BIN=/t/enforcer ENFORCER_TEST_SKIP_LOG=/tmp/skipped ENFORCER_TEST_PATIENCE=4
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
exec </dev/null >/dev/ttyS0 2>&1
/bin/busybox --install -s /bin
mkdir -p /dev/shm /dev/pts
ln -s /proc/self/fd /dev/fd
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ip link set lo up
for module in $(cat /modules/order); do insmod "/modules/$module" || echo "module $module does not load"; done
ulimit -n 65536
step() {
    name=$1
    shift
    echo "@@ begin $name"
    "$@"
    echo "@@ end $name $?"
}
echo "@@ booted $(uname -r)"
"#;
const INIT_TAIL: &str = "echo '@@ done'\nsleep 1\npoweroff -f\n";

/// Builds images below a directory.
pub(super) struct ImageBuilder {
    directory: PathBuf,
    busybox: PathBuf,
}

impl ImageBuilder {
    /// `busybox` is a static one.
    pub(super) fn new(directory: PathBuf, busybox: PathBuf) -> Self {
        Self { directory, busybox }
    }

    /// The part that all guests share: programs with their libraries, and what the steps are.
    pub(super) fn common(&self, name: &str, programs: &[PathBuf], steps: &[Step]) -> Result<PathBuf> {
        let root = self.directory.join(format!("{name}.root"));
        let _ = fs::remove_dir_all(&root);
        for below in ["bin", "sbin", "proc", "sys", "dev", "tmp", "run", "root", "etc/ssl/certs", PROGRAMS] {
            make_dir(&root.join(below))?;
        }
        copy(&self.busybox, &root.join("bin/busybox"))?;
        let mut libraries = BTreeSet::new();
        for program in programs {
            let to = root.join(PROGRAMS).join(guest_name(program));
            strip(program, &to)?;
            libraries.extend(libraries_of(program)?);
        }
        for tool in ["ip", "tc"] {
            let Some(path) = find_program(tool, &["/usr/sbin".into(), "/sbin".into()]) else { continue };
            copy(&path, &root.join("sbin").join(tool))?;
            libraries.extend(libraries_of(&path)?);
        }
        for library in libraries {
            let to = root.join(library.strip_prefix("/").unwrap_or(&library));
            make_dir(to.parent().context("a library at the root")?)?;
            copy(&library, &to)?;
        }
        for (file, text) in [
            ("etc/hosts", "127.0.0.1 localhost\n::1 localhost\n"),
            ("etc/nsswitch.conf", "hosts: files\n"),
            ("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n"),
            ("policy.yaml", POLICY),
        ] {
            fs::write(root.join(file), text)?;
        }
        let init = root.join("init");
        let steps: String = steps.iter().map(Step::script).collect();
        fs::write(&init, format!("{INIT_HEAD}{steps}{INIT_TAIL}"))?;
        fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
        self.archive(&root)
    }

    /// The part of one kernel, with the common part before it: the modules.
    pub(super) fn image(&self, release: &str, unpacked: &Path, common: &Path) -> Result<PathBuf> {
        let root = self.directory.join(format!("{release}.modules"));
        let _ = fs::remove_dir_all(&root);
        let to = root.join("modules");
        make_dir(&to)?;
        let mut order = String::new();
        let found = files_below(unpacked)?;
        for module in MODULES {
            let wanted = format!("{module}.ko");
            let path = found.iter().find(|path| {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                name == wanted || name == format!("{wanted}.xz")
            });
            let Some(path) = path else { continue };
            let copied = to.join(path.file_name().unwrap_or_default());
            copy(path, &copied)?;
            if copied.extension().is_some_and(|extension| extension == "xz") {
                run(Command::new(&self.busybox).arg("unxz").arg(&copied))?;
            }
            order.push_str(&wanted);
            order.push('\n');
        }
        fs::write(to.join("order"), order)?;
        // The kernel takes several archives one behind the other.
        let mut bytes = fs::read(common).with_context(|| format!("can't read {}", common.display()))?;
        bytes.extend(fs::read(self.archive(&root)?)?);
        let image = self.directory.join(format!("{release}.cpio"));
        fs::write(&image, bytes).with_context(|| format!("can't write {}", image.display()))?;
        Ok(image)
    }

    fn archive(&self, root: &Path) -> Result<PathBuf> {
        let to = root.with_extension("part.cpio");
        // busybox writes names as it reads them: below `root`, relative.
        let script = "cd \"$1\" && find . | \"$2\" cpio -o -H newc > \"$3\"";
        let mut command = Command::new("sh");
        command.args(["-c", script, "archive"]).arg(root).arg(&self.busybox).arg(&to);
        run(&mut command)?;
        Ok(to)
    }
}

/// What the daemon is started with where it must refuse.
const POLICY: &str = "\
version: 1
issuers:
  - name: nobody
    issuer: https://issuer.example
    keys: {file: /keys.json}
    algorithms: [ES256]
servers:
  - name: nothing
    listen: [\"127.0.0.1:9999\"]
    resource: https://mcp.example/mcp
    issuers: [nobody]
";

/// Test programs lose the hash that cargo gives them.
fn guest_name(program: &Path) -> String {
    let name = program.file_name().unwrap_or_default().to_string_lossy();
    match name.rsplit_once('-') {
        Some((stem, hash)) if hash.len() == 16 && hash.chars().all(|c| c.is_ascii_hexdigit()) => stem.into(),
        _ => name.into_owned(),
    }
}

/// The image lies in the guest's memory: debug information is most of a program's size.
fn strip(program: &Path, to: &Path) -> Result<()> {
    if find_program("strip", &[]).is_some() {
        run(Command::new("strip").arg("-o").arg(to).arg(program))
    } else {
        copy(program, to)
    }
}

fn libraries_of(program: &Path) -> Result<Vec<PathBuf>> {
    let text = stdout_of(Command::new("ldd").arg(program))?;
    let libraries = libraries_in(&text);
    if libraries.is_empty() {
        bail!("`ldd {}` names no library", program.display());
    }
    Ok(libraries)
}

/// Reads the output of ldd(1).
fn libraries_in(text: &str) -> Vec<PathBuf> {
    text.lines()
        .filter_map(|line| {
            let line = line.trim();
            let path = line.split_once(" => ").map_or(line, |(_name, path)| path);
            path.starts_with('/').then(|| path.split(" (").next().unwrap_or(path).into())
        })
        .collect()
}

fn files_below(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in
            fs::read_dir(&directory).with_context(|| format!("can't read {}", directory.display()))?
        {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                directories.push(entry.path());
            } else {
                files.push(entry.path());
            }
        }
    }
    Ok(files)
}

/// The kernel in an unpacked package: `boot/vmlinuz-RELEASE`, or beside its modules.
pub(super) fn vmlinuz(unpacked: &Path) -> Result<PathBuf> {
    files_below(unpacked)?
        .into_iter()
        .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz")))
        .with_context(|| format!("no kernel in {}", unpacked.display()))
}

fn make_dir(path: &Path) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("can't create {}", path.display()))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).map(drop).with_context(|| format!("can't copy {} to {}", from.display(), to.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_what_ldd_names_with_a_path() {
        let text = "\tlinux-vdso.so.1 (0x00007f95)\n\tlibm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x00007f)\n\t/lib64/ld-linux-x86-64.so.2 (0x00007f95)\n";
        assert_eq!(
            libraries_in(text),
            [Path::new("/lib/x86_64-linux-gnu/libm.so.6"), Path::new("/lib64/ld-linux-x86-64.so.2")]
        );
        assert!(libraries_in("\tstatically linked\n").is_empty());
    }

    #[test]
    fn test_programs_lose_their_hash_and_others_keep_their_name() {
        assert_eq!(guest_name(Path::new("/x/e2e_cli-b9a14f8e217e16ad")), "e2e_cli");
        assert_eq!(guest_name(Path::new("/x/enforcer-upstream")), "enforcer-upstream");
    }
}
