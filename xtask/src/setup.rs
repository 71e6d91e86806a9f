//! `cargo xtask setup`: what is needed, what is there, and getting the rest.

use std::env;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, bail};

use crate::probe::{self, Linker, version_of};
use crate::process::{run, shown};
use crate::toolchain::{
    Choice, Compiler, LINKER_LLVM_MAJOR, LINKER_VERSION, LinkProbe, OLDEST_RUSTC, Remedy, choose,
    major_minor, remedies,
};
use crate::workspace::Workspace;

/// What the kernel programs are built with.
#[derive(Debug, Clone)]
pub(crate) struct BpfToolchain {
    /// Compiles them.
    pub(crate) compiler: Compiler,
    /// Links them.
    pub(crate) linker: Linker,
}

/// A command that closes a gap, and whether `setup` may run it itself.
struct Fix {
    command: Command,
    /// Why it is left to the user; `None` when it is not.
    left_to_user: Option<&'static str>,
}

/// One thing that was looked for.
struct Need {
    name: &'static str,
    purpose: &'static str,
    found: Result<String, String>,
    optional: bool,
    /// Alternatives: the first that works is enough.
    fixes: Vec<Fix>,
}

impl Need {
    fn is_gap(&self) -> bool {
        self.found.is_err() && !self.optional
    }
}

/// What one look at the machine gave.
struct Survey {
    needs: Vec<Need>,
    toolchain: Option<BpfToolchain>,
}

/// Lists, and without `check_only` installs; fails when something is missing in the end.
pub(crate) fn setup(workspace: &Workspace, check_only: bool) -> Result<()> {
    let survey = survey(workspace);
    print_needs(&survey.needs);
    if !survey.needs.iter().any(Need::is_gap) {
        println!("Everything needed is here.");
        return Ok(());
    }
    if check_only {
        bail!("something needed is missing; `cargo xtask setup` installs it, or run the commands above");
    }
    close_gaps(workspace, survey).map(drop)
}

/// For the other subcommands: silent when nothing is missing, else the same as `setup`.
pub(crate) fn ensure(workspace: &Workspace) -> Result<BpfToolchain> {
    let survey = survey(workspace);
    let toolchain = if survey.needs.iter().any(Need::is_gap) {
        print_needs(&survey.needs);
        close_gaps(workspace, survey)?
    } else {
        survey.toolchain
    };
    let Some(toolchain) = toolchain else {
        bail!("no toolchain for the kernel programs; run `cargo xtask setup`")
    };
    eprintln!("kernel programs: {}", describe(&toolchain.compiler));
    Ok(toolchain)
}

fn close_gaps(workspace: &Workspace, survey: Survey) -> Result<Option<BpfToolchain>> {
    for need in survey.needs.into_iter().filter(Need::is_gap) {
        for mut fix in need.fixes.into_iter().filter(|fix| fix.left_to_user.is_none()) {
            match run(&mut fix.command) {
                Ok(()) => break,
                // What is still missing afterwards is said below, with the commands that are left.
                Err(error) => eprintln!("{}: {error:#}", need.name),
            }
        }
    }
    let after = self::survey(workspace);
    print_needs(&after.needs);
    let missing: Vec<&str> = after.needs.iter().filter(|need| need.is_gap()).map(|need| need.name).collect();
    if !missing.is_empty() {
        bail!("still missing: {}; the commands above say how to get it", missing.join(", "));
    }
    Ok(after.toolchain)
}

fn print_needs(needs: &[Need]) {
    for need in needs {
        match &need.found {
            Ok(what) => println!("found     {:<22} {what}", need.name),
            Err(why) => {
                let state = if need.optional { "optional " } else { "MISSING  " };
                println!("{state} {:<22} {why} ({})", need.name, need.purpose);
                for (index, fix) in need.fixes.iter().enumerate() {
                    let lead = if index == 0 { "get it with:" } else { "or with:" };
                    let note =
                        fix.left_to_user.map(|why| format!("   [yours to run: {why}]")).unwrap_or_default();
                    println!("{:32} {lead} {}{note}", "", shown(&fix.command));
                }
            }
        }
    }
}

fn describe(compiler: &Compiler) -> String {
    let llvm = compiler.llvm_major.map_or_else(|| "?".into(), |major| major.to_string());
    format!("{} {} (LLVM {llvm}, {})", compiler.origin, compiler.release, compiler.rustc.display())
}

fn survey(workspace: &Workspace) -> Survey {
    let linker = probe::linker();
    let compilers = probe::compilers(workspace, linker.as_ref());
    let choice = choose(&compilers);
    let toolchain = match (choice.compiler, &linker) {
        (Some(compiler), Some(linker)) => {
            Some(BpfToolchain { compiler: compiler.clone(), linker: linker.clone() })
        }
        _ => None,
    };
    let needs = vec![
        c_compiler(),
        component(workspace, "rustfmt", "fmt"),
        component(workspace, "clippy", "clippy"),
        bpf_compiler(workspace, &compilers, &choice),
        bpf_linker(workspace, linker.as_ref(), &choice),
        tool("ip (iproute2)", "ip", "-V", "network namespaces of the end-to-end tests", "iproute2"),
        tool("nft (nftables)", "nft", "-v", "address translation in the end-to-end tests", "nftables"),
        interpreter("python3", "end-to-end tests against Python's HTTP server; skipped without"),
        interpreter("node", "end-to-end tests against Node's HTTP server; skipped without"),
    ];
    Survey { needs, toolchain }
}

fn c_compiler() -> Need {
    let program = env::var_os("CC").unwrap_or_else(|| "cc".into());
    let found = version_of(program.as_ref(), &["--version"])
        .ok_or_else(|| format!("`{} --version` can't be run", program.display()));
    Need {
        name: "C compiler",
        purpose: "links every program here, and ring has parts in C",
        found,
        optional: false,
        fixes: vec![apt(&["gcc", "libc6-dev"])],
    }
}

fn component(workspace: &Workspace, name: &'static str, subcommand: &str) -> Need {
    let mut cargo = workspace.cargo();
    let found = crate::process::stdout_of(cargo.args([subcommand, "--version"]))
        .map(|text| text.trim().to_owned())
        .map_err(|_error| format!("`cargo {subcommand}` can't be run"));
    let mut rustup = Command::new("rustup");
    rustup.args(["component", "add", name]).current_dir(&workspace.root);
    Need {
        name,
        purpose: "cargo xtask check",
        found,
        optional: false,
        fixes: vec![Fix { command: rustup, left_to_user: None }],
    }
}

fn bpf_compiler(workspace: &Workspace, compilers: &[Compiler], choice: &Choice<'_>) -> Need {
    let reasons: Vec<String> = choice
        .ruled_out
        .iter()
        .map(|(compiler, defect)| format!("{} {}: {defect}", compiler.origin, compiler.release))
        .collect();
    let found = match choice.compiler {
        Some(compiler) if reasons.is_empty() => {
            Ok(format!("{}; it is the first choice and fits", describe(compiler)))
        }
        Some(compiler) => Ok(format!("{}; ruled out before it: {}", describe(compiler), reasons.join("; "))),
        None if reasons.is_empty() => Err("no compiler found".into()),
        None => Err(reasons.join("; ")),
    };
    // When a compiler fails by the link alone, the linker is the gap, and no other compiler closes it.
    let blame_linker = choose(&untried(compilers)).compiler.is_some();
    let fixes = if blame_linker { Vec::new() } else { compiler_fixes(workspace, compilers) };
    Need {
        name: "kernel-program rustc",
        purpose: "builds `core` and the eBPF programs from source",
        found,
        optional: false,
        fixes,
    }
}

/// The same compilers, as if no linker were installed.
fn untried(compilers: &[Compiler]) -> Vec<Compiler> {
    compilers.iter().map(|compiler| Compiler { link: LinkProbe::NotTried, ..compiler.clone() }).collect()
}

fn compiler_fixes(workspace: &Workspace, compilers: &[Compiler]) -> Vec<Fix> {
    let toolchain = probe::active_rustup_toolchain(workspace);
    let active = compilers.iter().find(|compiler| !compiler.rustc.starts_with("/usr/bin"));
    let fits = active.is_some_and(|compiler| {
        compiler.llvm_major == Some(LINKER_LLVM_MAJOR)
            && major_minor(&compiler.release).is_some_and(|release| release >= OLDEST_RUSTC)
    });
    let debian = probe::is_debian();
    let mut fixes: Vec<Fix> = remedies(debian, probe::is_root(), toolchain.as_deref(), fits)
        .into_iter()
        .map(|remedy| match remedy {
            Remedy::DebianPackages => apt(&["rustc-web", "rust-web-src"]),
            Remedy::RustSrc(toolchain) => {
                let mut command = Command::new("rustup");
                command.args(["component", "add", "rust-src", "--toolchain", &toolchain]);
                Fix { command, left_to_user: None }
            }
        })
        .collect();
    if debian && !probe::is_root() {
        fixes.push(apt(&["rustc-web", "rust-web-src"]));
    }
    let mut nightly = Command::new("rustup");
    nightly.args(["toolchain", "install", "nightly", "--profile", "minimal", "--component", "rust-src"]);
    fixes.push(Fix { command: nightly, left_to_user: Some("it adds or updates a whole toolchain") });
    fixes
}

fn bpf_linker(workspace: &Workspace, linker: Option<&Linker>, choice: &Choice<'_>) -> Need {
    let mut command = workspace.cargo();
    command.args(["install", "bpf-linker", "--version", LINKER_VERSION, "--locked"]);
    let mut left_to_user = None;
    let found = match linker {
        None => Err("not found, or it can't be run".into()),
        Some(linker) => {
            let what = format!("{} ({})", linker.version, linker.path.display());
            let is_ours = linker.version.ends_with(LINKER_VERSION);
            let usable = choice.compiler.is_some() || is_ours;
            if usable {
                Ok(what)
            } else {
                command.arg("--force");
                left_to_user = Some("it replaces a program that you installed");
                Err(format!("{what} links for no compiler here; {LINKER_VERSION} is the tested one"))
            }
        }
    };
    Need {
        name: "bpf-linker",
        purpose: "links the eBPF programs; takes some minutes to build",
        found,
        optional: false,
        fixes: vec![Fix { command, left_to_user }],
    }
}

/// A program of the system that the end-to-end tests run.
fn tool(name: &'static str, program: &str, version: &str, purpose: &'static str, package: &str) -> Need {
    let more = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    let found = probe::find_program(program, &more)
        .and_then(|path| version_of(&path, &[version]))
        .ok_or_else(|| format!("`{program} {version}` can't be run"));
    Need { name, purpose, found, optional: false, fixes: vec![apt(&[package])] }
}

fn interpreter(name: &'static str, purpose: &'static str) -> Need {
    let found = probe::find_program(name, &[])
        .and_then(|path| version_of(&path, &["--version"]))
        .ok_or_else(|| "not found".into());
    Need { name, purpose, found, optional: true, fixes: Vec::new() }
}

/// Debian's package manager, which only root may use; elsewhere the package names are a hint.
fn apt(packages: &[&str]) -> Fix {
    let has_apt = probe::find_program("apt-get", &[]).is_some();
    let left_to_user = match (has_apt, probe::is_root()) {
        (true, true) => None,
        (true, false) => Some("it needs root"),
        (false, _) => Some("this machine has no apt-get; use its own package manager"),
    };
    let packages = packages.join(" ");
    let mut command = Command::new("sh");
    command.args(["-c", &format!("apt-get update && apt-get install -y --no-install-recommends {packages}")]);
    command.env("DEBIAN_FRONTEND", "noninteractive");
    Fix { command, left_to_user }
}
