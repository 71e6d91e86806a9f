//! Which compiler builds the kernel programs: a pure decision over probed facts.
//!
//! The kernel programs need `core` for `bpfel-unknown-none`, which no distribution ships prebuilt. Cargo builds it
//! (`-Z build-std=core`) with a compiler whose library source is at hand, and `bpf-linker` turns the bitcode into the
//! object. The linker must understand that compiler's LLVM.

use std::fmt;
use std::path::{Path, PathBuf};

/// The oldest compiler that the workspace supports (its `rust-version`), major and minor.
pub(crate) const OLDEST_RUSTC: (u32, u32) = (1, 95);

/// The `bpf-linker` that `setup` installs. Later ones want a system LLVM with its headers.
pub(crate) const LINKER_VERSION: &str = "0.10.3";

/// The LLVM major version that [`LINKER_VERSION`] is written for.
pub(crate) const LINKER_LLVM_MAJOR: u32 = 22;

/// Where a compiler comes from. The order of the variants is the order of preference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Origin {
    /// rustup's `nightly`: unstable cargo options need no further switch.
    Nightly,
    /// The compiler that builds the rest of the workspace.
    Active,
    /// Debian's package `rustc-web`, beside whatever rustup manages.
    Debian,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nightly => "rustup's nightly",
            Self::Active => "the active rustc",
            Self::Debian => "Debian's rustc",
        })
    }
}

/// Whether the installed `bpf-linker` can read this compiler's bitcode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum LinkProbe {
    /// No linker is installed, or the compiler was ruled out before it came to that.
    NotTried,
    /// A probe program was compiled and linked.
    Works,
    /// It was not; the linker's own words.
    Fails(String),
}

/// What is known about one installed compiler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Compiler {
    /// Where it comes from.
    pub(crate) origin: Origin,
    /// The compiler itself, not a rustup shim.
    pub(crate) rustc: PathBuf,
    /// The cargo to drive it with.
    pub(crate) cargo: PathBuf,
    /// Release as it calls itself, e.g. `1.96.0` or `1.97.0-nightly`.
    pub(crate) release: String,
    /// Major version of its LLVM; absent when it did not say.
    pub(crate) llvm_major: Option<u32>,
    /// Whether the source of `core` lies in its sysroot.
    pub(crate) library_source: bool,
    /// A shared LLVM of the same major version that `bpf-linker` can load, when one was found.
    pub(crate) llvm_library: Option<PathBuf>,
    /// Outcome of the link probe.
    pub(crate) link: LinkProbe,
}

impl Compiler {
    /// Whether unstable cargo options must be unlocked with `RUSTC_BOOTSTRAP`.
    pub(crate) fn needs_bootstrap(&self) -> bool {
        !self.release.contains("nightly") && !self.release.contains("dev")
    }

    /// Why this compiler can't build the kernel programs; `None` when it can, as far as is known.
    pub(crate) fn defect(&self) -> Option<String> {
        if !self.library_source {
            return Some("the library source (rust-src) is not in its sysroot".into());
        }
        match major_minor(&self.release) {
            Some(found) if found >= OLDEST_RUSTC => {}
            Some(_) => {
                let (major, minor) = OLDEST_RUSTC;
                return Some(format!(
                    "it is {}, but the workspace needs {major}.{minor} or newer",
                    self.release
                ));
            }
            None => return Some(format!("its release `{}` is not a version", self.release)),
        }
        match (&self.link, self.llvm_major) {
            (LinkProbe::Works, _) => None,
            (LinkProbe::Fails(cause), llvm_major) => {
                let llvm = llvm_major.map_or_else(|| "of unknown version".into(), |major| major.to_string());
                Some(format!("bpf-linker can't link what it emits (its LLVM is {llvm}): {cause}"))
            }
            (LinkProbe::NotTried, Some(LINKER_LLVM_MAJOR)) => None,
            (LinkProbe::NotTried, found) => {
                let llvm = found.map_or_else(|| "of unknown version".into(), |major| major.to_string());
                Some(format!(
                    "its LLVM is {llvm}, but bpf-linker {LINKER_VERSION} is written for LLVM {LINKER_LLVM_MAJOR}"
                ))
            }
        }
    }
}

/// The outcome of [`choose`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Choice<'a> {
    /// The compiler to use; `None` when none will do.
    pub(crate) compiler: Option<&'a Compiler>,
    /// Every compiler that was preferred to it and ruled out, with the defect.
    pub(crate) ruled_out: Vec<(&'a Compiler, String)>,
}

/// Takes the first compiler without a defect, in the order of [`Origin`].
pub(crate) fn choose(compilers: &[Compiler]) -> Choice<'_> {
    let mut ordered: Vec<&Compiler> = compilers.iter().collect();
    ordered.sort_by_key(|compiler| compiler.origin);
    let mut ruled_out = Vec::new();
    for compiler in ordered {
        match compiler.defect() {
            None => return Choice { compiler: Some(compiler), ruled_out },
            Some(defect) => ruled_out.push((compiler, defect)),
        }
    }
    Choice { compiler: None, ruled_out }
}

/// One way to get a compiler with its library source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Remedy {
    /// Install Debian's packages; needs root.
    DebianPackages,
    /// Add `rust-src` to the named rustup toolchain.
    RustSrc(String),
}

/// What `setup` may do about a missing compiler, in the order in which it tries.
///
/// `debian` is true on Debian itself: its derivatives do not carry the packages. `toolchain` is rustup's name of the
/// active toolchain, `None` without rustup; `toolchain_fits` says whether its release and LLVM would do.
pub(crate) fn remedies(
    debian: bool,
    root: bool,
    toolchain: Option<&str>,
    toolchain_fits: bool,
) -> Vec<Remedy> {
    let mut remedies = Vec::new();
    if debian && root {
        remedies.push(Remedy::DebianPackages);
    }
    if let Some(toolchain) = toolchain
        && toolchain_fits
    {
        remedies.push(Remedy::RustSrc(toolchain.to_owned()));
    }
    remedies
}

/// Major and minor of a release such as `1.97.0-nightly`.
pub(crate) fn major_minor(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// `release` and LLVM major out of `rustc -vV`.
pub(crate) fn parse_version(verbose_version: &str) -> Option<(String, Option<u32>)> {
    let field = |name: &str| verbose_version.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let release = field("release:")?.to_owned();
    let llvm_major = field("LLVM version:").and_then(|version| version.split('.').next()?.parse().ok());
    Some((release, llvm_major))
}

/// The major version in the name of an LLVM shared library: `libLLVM.so.22.1`, `libLLVM-22.so`,
/// `libLLVM-22-rust-1.95.0-stable.so`.
pub(crate) fn llvm_major_of(library: &Path) -> Option<u32> {
    let name = library.file_name()?.to_str()?.strip_prefix("libLLVM")?;
    let version = name.strip_prefix(".so.").or_else(|| name.strip_prefix('-'))?;
    let end = version.find(|c: char| !c.is_ascii_digit()).unwrap_or(version.len());
    version.get(..end)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compiler(origin: Origin, release: &str, llvm_major: u32, library_source: bool) -> Compiler {
        Compiler {
            origin,
            rustc: "/rustc".into(),
            cargo: "/cargo".into(),
            release: release.into(),
            llvm_major: Some(llvm_major),
            library_source,
            llvm_library: None,
            link: LinkProbe::NotTried,
        }
    }

    #[test]
    fn prefers_nightly_whatever_the_order_of_the_probes() {
        let found = [
            compiler(Origin::Debian, "1.96.0", 22, true),
            compiler(Origin::Active, "1.95.0", 22, true),
            compiler(Origin::Nightly, "1.97.0-nightly", 22, true),
        ];
        let choice = choose(&found);
        assert_eq!(choice.compiler.map(|c| c.origin), Some(Origin::Nightly));
        assert!(choice.ruled_out.is_empty());
    }

    #[test]
    fn a_compiler_without_library_source_is_ruled_out_and_named() {
        let found = [
            compiler(Origin::Nightly, "1.97.0-nightly", 22, false),
            compiler(Origin::Active, "1.95.0", 22, false),
            compiler(Origin::Debian, "1.96.0", 22, true),
        ];
        let choice = choose(&found);
        assert_eq!(choice.compiler.map(|c| c.origin), Some(Origin::Debian));
        assert_eq!(choice.ruled_out.len(), 2);
        assert!(choice.ruled_out[0].1.contains("rust-src"));
    }

    #[test]
    fn an_llvm_newer_than_the_linkers_is_ruled_out_unless_the_link_was_seen_to_work() {
        let mut found = [compiler(Origin::Nightly, "1.99.0-nightly", 23, true)];
        let choice = choose(&found);
        assert_eq!(choice.compiler, None);
        let defect = &choice.ruled_out[0].1;
        assert!(defect.contains("23") && defect.contains("22"), "{defect}");

        found[0].link = LinkProbe::Works;
        assert!(choose(&found).compiler.is_some());
    }

    #[test]
    fn a_failed_link_beats_a_matching_version() {
        let mut found = [compiler(Origin::Active, "1.95.0", 22, true)];
        found[0].link = LinkProbe::Fails("unknown attribute kind".into());
        let choice = choose(&found);
        assert_eq!(choice.compiler, None);
        assert!(choice.ruled_out[0].1.contains("unknown attribute kind"));
    }

    #[test]
    fn old_and_unreadable_releases_are_ruled_out() {
        for release in ["1.85.0", "1.94.9", "0.99.0", "nonsense"] {
            let found = [compiler(Origin::Debian, release, 22, true)];
            assert_eq!(choose(&found).compiler, None, "{release}");
        }
        assert!(choose(&[compiler(Origin::Debian, "2.0.0", 22, true)]).compiler.is_some());
    }

    #[test]
    fn nothing_installed_is_nothing_chosen() {
        assert_eq!(choose(&[]), Choice { compiler: None, ruled_out: Vec::new() });
    }

    #[test]
    fn only_a_stable_compiler_needs_the_bootstrap_switch() {
        assert!(compiler(Origin::Debian, "1.96.0", 22, true).needs_bootstrap());
        assert!(compiler(Origin::Active, "1.96.0-beta.3", 22, true).needs_bootstrap());
        assert!(!compiler(Origin::Active, "1.97.0-nightly", 22, true).needs_bootstrap());
    }

    #[test]
    fn packages_are_installed_by_root_on_debian_alone() {
        let src = || Remedy::RustSrc("stable".into());
        assert_eq!(remedies(true, true, Some("stable"), true), [Remedy::DebianPackages, src()]);
        assert_eq!(remedies(true, false, Some("stable"), true), [src()]);
        assert_eq!(remedies(false, true, Some("stable"), true), [src()]);
        assert_eq!(remedies(false, true, Some("stable"), false), []);
        assert_eq!(remedies(false, false, None, true), []);
    }

    #[test]
    fn reads_the_verbose_version() {
        let text =
            "rustc 1.96.0 (ac68faa20 2026-05-25)\nbinary: rustc\nrelease: 1.96.0\nLLVM version: 22.1.8\n";
        assert_eq!(parse_version(text), Some(("1.96.0".into(), Some(22))));
        assert_eq!(parse_version("release: 1.96.0\n"), Some(("1.96.0".into(), None)));
        assert_eq!(parse_version("command not found"), None);
    }

    #[test]
    fn reads_the_llvm_version_from_every_file_name_in_use() {
        for (name, major) in [
            ("libLLVM.so.22.1", Some(22)),
            ("libLLVM.so.22.1-rust-1.95.0-stable", Some(22)),
            ("libLLVM-22-rust-1.95.0-stable.so", Some(22)),
            ("libLLVM-14.0.6.so.1", Some(14)),
            ("libLLVM-15.so", Some(15)),
            ("libLLVM.so", None),
            ("libLLVMCore.a", None),
            ("libc.so.6", None),
        ] {
            assert_eq!(llvm_major_of(Path::new(name)), major, "{name}");
        }
    }
}
