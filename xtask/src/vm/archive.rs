//! Debian's archive: which kernels it has, and getting them. Nothing is installed, and apt's own state is not touched.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::process::{run, stdout_of};

/// Suites that kernels are taken from. Each series of the kernel is in at least one of them, and backports keep old ones.
const SUITES: &[(&str, bool)] = &[
    ("bookworm", false),
    ("bookworm-security", true),
    ("bookworm-backports", false),
    ("trixie", false),
    ("trixie-security", true),
    ("trixie-backports", false),
];
const MIRROR: &str = "http://deb.debian.org/debian/";
const SECURITY_MIRROR: &str = "http://deb.debian.org/debian-security/";
/// The flavour with the fewest drivers.
const FLAVOUR: &str = "-cloud-amd64";

/// Upstream versions whose kernel stalls a connection after injected bytes, from and to.
const STALLING: &[([u32; 3], [u32; 3])] = &[
    ([6, 12, 43], [6, 12, 74]),
    ([6, 16, 0], [6, 16, u32::MAX]),
    ([6, 17, 0], [6, 17, u32::MAX]),
    ([6, 18, 5], [6, 18, 12]),
];

/// A kernel in the archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Kernel {
    /// What `uname -r` says.
    pub(super) release: String,
    /// Version of its package.
    pub(super) version: String,
    /// What has to be unpacked.
    pub(super) packages: Vec<String>,
}

impl Kernel {
    /// Upstream's version, e.g. 6.1.192: the release of an old series does not hold it.
    fn upstream(&self) -> [u32; 3] {
        let upstream = self.version.split('-').next().unwrap_or_default();
        let mut parts = upstream.split('.').map(|part| part.parse().unwrap_or(0));
        std::array::from_fn(|_| parts.next().unwrap_or(0))
    }

    /// What decides between two of the same series: a backport (`~`) comes before what it was made from.
    fn order(&self) -> ([u32; 3], u32, bool) {
        let revision = self.version.split_once('-').map_or("", |(_upstream, revision)| revision);
        let digits: String = revision.chars().take_while(char::is_ascii_digit).collect();
        (self.upstream(), digits.parse().unwrap_or(0), !revision.contains('~'))
    }

    fn stalls(&self) -> bool {
        STALLING.iter().any(|(from, to)| (*from..=*to).contains(&self.upstream()))
    }
}

/// Which kernel of the archive is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    /// The newest that begins with these numbers.
    Series(&'static [u32]),
    /// The newest of those that stall.
    Stalling,
}

/// The newest kernel that fits; `None` when the archive has none (any more).
pub(super) fn newest(kernels: &[Kernel], wanted: Wanted) -> Option<&Kernel> {
    let fits = |kernel: &&Kernel| match wanted {
        Wanted::Series(numbers) => kernel.upstream().starts_with(numbers),
        Wanted::Stalling => kernel.stalls(),
    };
    kernels.iter().filter(fits).max_by_key(|kernel| kernel.order())
}

/// Reads `apt-cache dumpavail`: signed kernels of our flavour.
pub(super) fn kernels_of(index: &str) -> Vec<Kernel> {
    let stanzas: Vec<(&str, &str)> = index
        .split("\n\n")
        .filter_map(|stanza| {
            let field = |name: &str| stanza.lines().find_map(|line| line.strip_prefix(name));
            Some((field("Package: ")?, field("Version: ")?))
        })
        .filter(|(name, _version)| name.ends_with(FLAVOUR))
        .collect();
    let mut kernels: Vec<Kernel> = Vec::new();
    for (name, version) in &stanzas {
        let Some(release) = name.strip_prefix("linux-image-") else { continue };
        // Metapackages are named by their series or by nothing.
        if release.split(['.', '-']).filter(|part| part.starts_with(|c: char| c.is_ascii_digit())).count() < 3
        {
            continue;
        }
        // From 6.19 on the image's package only depends on two others.
        let binary = format!("linux-binary-{release}");
        let packages = if stanzas.iter().any(|(other, _version)| *other == binary) {
            vec![binary, format!("linux-modules-{release}")]
        } else {
            vec![(*name).to_owned()]
        };
        let kernel = Kernel { release: release.to_owned(), version: (*version).to_owned(), packages };
        if !kernels.contains(&kernel) {
            kernels.push(kernel);
        }
    }
    kernels
}

/// An apt with a configuration of its own.
pub(super) struct Archive {
    directory: PathBuf,
}

impl Archive {
    /// Configures it below `directory`; a fresh index is fetched unless `offline`.
    pub(super) fn open(directory: PathBuf, offline: bool) -> Result<Self> {
        for below in ["lists/partial", "cache/archives/partial", "debs"] {
            let path = directory.join(below);
            fs::create_dir_all(&path).with_context(|| format!("can't create {}", path.display()))?;
        }
        let archive = Self { directory };
        let known = stdout_of(Command::new("apt-get").args([
            "indextargets",
            "--format",
            "$(REPO_URI)",
            "Origin: Debian",
        ]))
        .unwrap_or_default();
        let sources = sources(&known);
        archive.write("sources.list", &sources)?;
        let at = |name: &str| archive.directory.join(name).display().to_string();
        let configuration = format!(
            "Dir::Etc::sourcelist \"{}\";\nDir::Etc::sourceparts \"-\";\nDir::State::lists \"{}\";\nDir::Cache \"{}\";\n\
             Acquire::Languages \"none\";\nAcquire::IndexTargets::deb::DEP-11::DefaultEnabled \"false\";\n\
             APT::Sandbox::User \"root\";\n",
            at("sources.list"),
            at("lists"),
            at("cache"),
        );
        archive.write("apt.conf", &configuration)?;
        if !offline {
            run(archive.apt("apt-get").args(["-q", "update"])).context(
                "the index of Debian's archive can't be fetched; --offline takes what was fetched before",
            )?;
        }
        Ok(archive)
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.directory.join(name);
        fs::write(&path, text).with_context(|| format!("can't write {}", path.display()))
    }

    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", self.directory.join("apt.conf"));
        command
    }

    /// All kernels of our flavour.
    pub(super) fn kernels(&self) -> Result<Vec<Kernel>> {
        Ok(kernels_of(&stdout_of(self.apt("apt-cache").arg("dumpavail"))?))
    }

    /// Unpacks packages into `to`, which is complete when it exists. Downloads are kept.
    pub(super) fn unpack(&self, packages: &[String], to: &Path) -> Result<()> {
        if to.is_dir() {
            return Ok(());
        }
        let debs = self.directory.join("debs");
        let missing: Vec<&String> = packages.iter().filter(|name| find_deb(&debs, name).is_none()).collect();
        if !missing.is_empty() {
            let mut download = self.apt("apt-get");
            download.current_dir(&debs).args(["-q", "download"]).args(missing);
            run(&mut download)?;
        }
        // Not `with_extension`: a release has dots of its own.
        let mut partial = to.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        // Left by a run that was cut short.
        let _ = fs::remove_dir_all(&partial);
        fs::create_dir_all(&partial).with_context(|| format!("can't create {}", partial.display()))?;
        for name in packages {
            let Some(deb) = find_deb(&debs, name) else { bail!("apt-get downloaded no package {name}") };
            run(Command::new("dpkg").arg("-x").arg(deb).arg(&partial))?;
        }
        fs::rename(&partial, to).with_context(|| format!("can't make {}", to.display()))
    }
}

/// A list of sources from the mirrors that the system uses itself, one a line, where it uses any.
fn sources(known: &str) -> String {
    let mirror = |default: &'static str| {
        let end = default.trim_start_matches("http://deb.debian.org");
        known.lines().find(|known| known.ends_with(end)).unwrap_or(default).to_owned()
    };
    let (main, security) = (mirror(MIRROR), mirror(SECURITY_MIRROR));
    let line = |(suite, is_security): &(&str, bool)| {
        format!("deb {} {suite} main\n", if *is_security { &security } else { &main })
    };
    SUITES.iter().map(line).collect()
}

fn find_deb(directory: &Path, package: &str) -> Option<PathBuf> {
    let entries = fs::read_dir(directory).ok()?;
    entries.flatten().map(|entry| entry.path()).find(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.strip_prefix(package).is_some_and(|rest| rest.starts_with('_')) && name.ends_with(".deb")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(packages: &[(&str, &str)]) -> String {
        packages
            .iter()
            .map(|(name, version)| format!("Package: {name}\nVersion: {version}\nArchitecture: amd64\n\n"))
            .collect()
    }

    fn archive() -> Vec<Kernel> {
        kernels_of(&index(&[
            ("linux-image-cloud-amd64", "6.1.192-2"),
            ("linux-image-6.12-cloud-amd64", "6.12.118-1"),
            ("linux-image-6.1.0-9-cloud-amd64", "6.1.99-1"),
            ("linux-image-6.1.0-56-cloud-amd64", "6.1.192-2"),
            ("linux-image-6.1.0-55-cloud-amd64", "6.1.192-1"),
            ("linux-image-6.1.0-55-cloud-amd64-dbg", "6.1.192-1"),
            ("linux-image-6.1.0-55-amd64", "6.1.192-1"),
            ("linux-image-6.12.74+deb12-cloud-amd64", "6.12.74-2~bpo12+1"),
            ("linux-image-6.12.85+deb12-cloud-amd64", "6.12.85-1~bpo12+1"),
            ("linux-image-6.12.85+deb13-cloud-amd64", "6.12.85-1"),
            ("linux-image-6.18.12+deb13-cloud-amd64", "6.18.12-1~bpo13+1"),
            ("linux-image-6.18.15+deb13-cloud-amd64", "6.18.15-1~bpo13+1"),
            ("linux-image-7.3.4+deb13-cloud-amd64", "7.3.4-1~bpo13+1"),
            ("linux-binary-7.3.4+deb13-cloud-amd64", "7.3.4-1~bpo13+1"),
            ("linux-modules-7.3.4+deb13-cloud-amd64", "7.3.4-1~bpo13+1"),
            ("linux-image-7.3.4+deb13-cloud-amd64-unsigned", "7.3.4-1~bpo13+1"),
        ]))
    }

    fn release(wanted: Wanted) -> Option<String> {
        newest(&archive(), wanted).map(|kernel| kernel.release.clone())
    }

    #[test]
    fn the_newest_of_a_series_by_number_not_by_letter() {
        let newest = |numbers| release(Wanted::Series(numbers));
        assert_eq!(newest(&[6, 1]).as_deref(), Some("6.1.0-56-cloud-amd64"));
        assert_eq!(newest(&[6, 12]).as_deref(), Some("6.12.85+deb13-cloud-amd64"));
        assert_eq!(newest(&[7]).as_deref(), Some("7.3.4+deb13-cloud-amd64"));
        assert_eq!(newest(&[6, 99]), None);
    }

    #[test]
    fn the_systems_mirror_is_used_where_it_has_one() {
        let list = sources("http://mirror.example/debian/\nhttp://mirror.example/other/\n");
        assert!(list.starts_with("deb http://mirror.example/debian/ bookworm main\n"), "{list}");
        assert!(list.contains("deb http://deb.debian.org/debian-security/ trixie-security main\n"), "{list}");
    }

    #[test]
    fn the_newest_that_stalls() {
        assert_eq!(release(Wanted::Stalling).as_deref(), Some("6.18.12+deb13-cloud-amd64"));
    }

    #[test]
    fn metapackages_other_flavours_and_symbols_are_no_kernels() {
        assert_eq!(archive().len(), 9);
    }

    #[test]
    fn a_split_image_is_two_packages() {
        let kernels = archive();
        let split = newest(&kernels, Wanted::Series(&[7])).unwrap();
        let wanted = ["linux-binary-7.3.4+deb13-cloud-amd64", "linux-modules-7.3.4+deb13-cloud-amd64"];
        assert_eq!(split.packages, wanted);
        let whole = newest(&kernels, Wanted::Series(&[6, 18])).unwrap();
        assert_eq!(whole.packages, ["linux-image-6.18.15+deb13-cloud-amd64"]);
    }
}
