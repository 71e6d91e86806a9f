//! Finds out what this machine has. Nothing here changes anything outside the target directory.

use std::env;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::process::stdout_of;
use crate::toolchain::{Compiler, LinkProbe, Origin, llvm_major_of, parse_version};
use crate::workspace::Workspace;

/// Debian's compiler; rustup's comes first on the PATH.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";

/// A program whose bitcode the linker must understand. It is compiled for the host, because `core` for the kernel's
/// target does not exist yet at this point; the linker re-targets it.
const PROBE_SOURCE: &str =
    "#![no_std]\n#[unsafe(no_mangle)]\npub extern \"C\" fn probe(x: u64) -> u64 { x ^ 1 }\n";

/// An installed `bpf-linker`.
#[derive(Debug, Clone)]
pub(crate) struct Linker {
    /// The program.
    pub(crate) path: PathBuf,
    /// What it says of its version.
    pub(crate) version: String,
}

/// True when we may do what only root may. The owner of our own `/proc` entry is our effective user.
pub(crate) fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|me| me.uid() == 0)
}

/// True on Debian itself, by `ID` in os-release(5).
pub(crate) fn is_debian() -> bool {
    fs::read_to_string("/etc/os-release")
        .is_ok_and(|text| text.lines().any(|line| matches!(line.trim(), "ID=debian" | "ID=\"debian\"")))
}

/// Looks on the PATH, then in `more` directories.
pub(crate) fn find_program(name: &str, more: &[PathBuf]) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(more.iter().cloned())
        .map(|directory| directory.join(name))
        .find(|candidate| candidate.is_file())
}

/// First line of what a program says of its version; `None` when it can't be run.
pub(crate) fn version_of(program: &Path, arguments: &[&str]) -> Option<String> {
    let text = stdout_of(Command::new(program).args(arguments)).ok()?;
    Some(text.lines().next().unwrap_or_default().trim().to_owned())
}

/// Where `cargo install` puts programs.
pub(crate) fn cargo_bin_dir() -> Option<PathBuf> {
    let home =
        env::var_os("CARGO_HOME").map(PathBuf::from).or_else(|| Some(env::home_dir()?.join(".cargo")))?;
    Some(home.join("bin"))
}

/// The `bpf-linker` to use, if one runs.
pub(crate) fn linker() -> Option<Linker> {
    let path = find_program("bpf-linker", cargo_bin_dir().as_slice())?;
    let version = version_of(&path, &["--version"])?;
    Some(Linker { path, version })
}

/// Name of the toolchain that rustup has active here; `None` without rustup.
pub(crate) fn active_rustup_toolchain(workspace: &Workspace) -> Option<String> {
    let text = stdout_of(rustup().current_dir(&workspace.root).args(["show", "active-toolchain"])).ok()?;
    text.split_whitespace().next().map(str::to_owned)
}

/// A rustup that installs nothing on its own account.
fn rustup() -> Command {
    let mut command = Command::new("rustup");
    command.env("RUSTUP_AUTO_INSTALL", "0");
    command
}

/// Every compiler worth a look, each tried with the linker when there is one.
pub(crate) fn compilers(workspace: &Workspace, linker: Option<&Linker>) -> Vec<Compiler> {
    let active_cargo: PathBuf = env::var_os("CARGO").unwrap_or_else(|| "cargo".into()).into();
    let mut found: Vec<Compiler> = Vec::new();
    let nightly = stdout_of(rustup().args(["which", "--toolchain", "nightly", "rustc"])).ok();
    if let Some(nightly) = nightly {
        found.extend(compiler(Origin::Nightly, Path::new(nightly.trim()), None));
    }
    let mut active = Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    if let Ok(sysroot) = stdout_of(active.current_dir(&workspace.root).args(["--print", "sysroot"])) {
        let rustc = Path::new(sysroot.trim()).join("bin/rustc");
        if found.iter().all(|other| other.rustc != rustc) {
            found.extend(compiler(Origin::Active, &rustc, Some(&active_cargo)));
        }
    }
    if is_debian() && found.iter().all(|other| other.rustc != Path::new(DEBIAN_RUSTC)) {
        found.extend(compiler(Origin::Debian, Path::new(DEBIAN_RUSTC), Some(&active_cargo)));
    }
    if let Some(linker) = linker {
        for compiler in &mut found {
            if compiler.library_source {
                compiler.link = try_link(workspace, compiler, linker);
            }
        }
    }
    found
}

/// What one compiler says of itself. Without `cargo`, the one beside it drives it.
fn compiler(origin: Origin, rustc: &Path, cargo: Option<&Path>) -> Option<Compiler> {
    let (release, llvm_major) = parse_version(&stdout_of(Command::new(rustc).arg("-vV")).ok()?)?;
    let sysroot = PathBuf::from(stdout_of(Command::new(rustc).args(["--print", "sysroot"])).ok()?.trim());
    let library_source = sysroot.join("lib/rustlib/src/rust/library/Cargo.toml").is_file();
    let llvm_library = llvm_major.and_then(|major| find_llvm(&sysroot, major));
    let cargo = cargo.map_or_else(|| rustc.with_file_name("cargo"), Path::to_owned);
    Some(Compiler {
        origin,
        rustc: rustc.to_owned(),
        cargo,
        release,
        llvm_major,
        library_source,
        llvm_library,
        link: LinkProbe::NotTried,
    })
}

/// The shared LLVM that belongs to a compiler: rustup's lies in `lib`, Debian's one directory deeper.
fn find_llvm(sysroot: &Path, major: u32) -> Option<PathBuf> {
    let lib = sysroot.join("lib");
    let multiarch = lib.join(format!("{}-linux-gnu", env::consts::ARCH));
    let mut found: Vec<PathBuf> = [lib, multiarch]
        .iter()
        .filter_map(|directory| fs::read_dir(directory).ok())
        .flat_map(|entries| entries.filter_map(Result::ok))
        .map(|entry| entry.path())
        // rustup's `libLLVM-22-rust-*.so` is a linker script of a few bytes.
        .filter(|path| {
            llvm_major_of(path) == Some(major) && fs::metadata(path).is_ok_and(|m| m.len() > 1 << 20)
        })
        .collect();
    found.sort();
    found.pop()
}

/// A directory with the compiler's LLVM in it and nothing else: `bpf-linker` loads the first `libLLVM*` that it meets
/// in `LD_LIBRARY_PATH`, and a system's library directory may hold several.
pub(crate) fn llvm_dir(workspace: &Workspace, compiler: &Compiler) -> Result<Option<PathBuf>> {
    let Some(library) = &compiler.llvm_library else { return Ok(None) };
    let name = format!("llvm-{:?}", compiler.origin).to_lowercase();
    let directory = workspace.bpf_build_dir().join(name);
    fs::create_dir_all(&directory).with_context(|| format!("can't create {}", directory.display()))?;
    let link = directory.join("libLLVM.so");
    if fs::read_link(&link).ok().as_ref() != Some(library) {
        // Absent on the first run.
        let _ = fs::remove_file(&link);
        std::os::unix::fs::symlink(library, &link)
            .with_context(|| format!("can't create {}", link.display()))?;
    }
    Ok(Some(directory))
}

/// `LD_LIBRARY_PATH` with `first` in front.
pub(crate) fn library_path(first: &Path) -> std::ffi::OsString {
    let mut joined = first.as_os_str().to_owned();
    if let Some(rest) = env::var_os("LD_LIBRARY_PATH").filter(|rest| !rest.is_empty()) {
        joined.push(":");
        joined.push(rest);
    }
    joined
}

fn try_link(workspace: &Workspace, compiler: &Compiler, linker: &Linker) -> LinkProbe {
    match link_probe_program(workspace, compiler, linker) {
        Ok(()) => LinkProbe::Works,
        Err(error) => LinkProbe::Fails(format!("{error:#}")),
    }
}

fn link_probe_program(workspace: &Workspace, compiler: &Compiler, linker: &Linker) -> Result<()> {
    let llvm_dir = llvm_dir(workspace, compiler)?;
    let directory = workspace.bpf_build_dir().join("probe");
    fs::create_dir_all(&directory).with_context(|| format!("can't create {}", directory.display()))?;
    let source = directory.join("probe.rs");
    fs::write(&source, PROBE_SOURCE).with_context(|| format!("can't write {}", source.display()))?;
    let (bitcode, object) = (directory.join("probe.bc"), directory.join("probe.o"));
    stdout_of(
        Command::new(&compiler.rustc)
            .args(["--edition=2024", "--crate-type=lib", "--emit=llvm-bc", "-O", "-o"])
            .args([&bitcode, &source]),
    )?;
    let mut link = Command::new(&linker.path);
    if let Some(llvm_dir) = llvm_dir {
        link.env("LD_LIBRARY_PATH", library_path(&llvm_dir));
    }
    link.env("RUST_BACKTRACE", "0");
    link.args(["--target=bpfel-unknown-none", "--cpu=v3", "--btf", "--export=probe", "-o"]);
    stdout_of(link.args([&object, &bitcode])).map(drop)
}
