//! Loading, attaching and pinning the kernel programs.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use aya::maps::{MapError, SockHash, SockMap};
use aya::programs::{
    CgroupAttachMode, CgroupSkb, CgroupSkbAttachType, CgroupSockAddr, Program, ProgramError, SkSkb, SockOps,
    Xdp,
    links::{FdLink, PinnedLink},
};
use aya::{Ebpf, EbpfError, EbpfLoader, VerifierLogLevel};
use enforcer_common::abi::map;

use super::shield::{self, SHIELD};
use super::{EBPF_OBJECT, LINKS, OffsetError, PinDir, TcpOffsets, sys};

/// Why the programs are not in the kernel. Whatever had been done before the error was undone.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The kernel's type information is missing.
    #[error(transparent)]
    Offsets(#[from] OffsetError),
    /// The object or a map was refused.
    #[error("the kernel refused the eBPF object: {}", chain(.0))]
    Object(#[from] EbpfError),
    /// A program was refused by the verifier, or could not be attached.
    #[error("the kernel refused the program `{name}`: {}", chain(.source))]
    Program {
        /// The program.
        name: &'static str,
        /// What the kernel said.
        source: ProgramError,
    },
    /// A program of a living enforcement could not be replaced.
    #[error("cannot put the program `{name}` in its predecessor's place: {source}")]
    Replace {
        /// The program.
        name: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// A map is not as it should be.
    #[error("map `{name}`: {}", chain(.source))]
    Map {
        /// The map.
        name: &'static str,
        /// What is wrong.
        source: MapError,
    },
    /// The object lacks something; the build is broken.
    #[error("the embedded eBPF object has no `{0}`; build again with `cargo xtask build`")]
    Missing(&'static str),
    /// A pin could not be made.
    #[error("cannot pin under {path}: {reason}; is a bpffs mounted there?")]
    Pin {
        /// Where.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The cgroup could not be opened.
    #[error("cannot open the cgroup {path}: {source}")]
    Cgroup {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// Lines of a verifier log that are shown: its last ones say what is wrong.
const MAX_LOG_LINES: usize = 12;

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    last_lines(&text)
}

/// The first line, which says what failed, and the last ones.
fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    match lines.split_first() {
        Some((first, rest)) if rest.len() > MAX_LOG_LINES => {
            let left_out = rest.len() - MAX_LOG_LINES;
            let last = rest.get(left_out..).unwrap_or_default().join("\n");
            format!("{first}\n({left_out} lines left out)\n{last}")
        }
        _ => text.to_owned(),
    }
}

/// The programs are in the kernel, their maps are pinned, nothing is attached to a cgroup yet.
pub struct Loaded {
    ebpf: Ebpf,
    pins: PinDir,
    links: Vec<PinnedLink>,
    committed: bool,
}

/// Loads the programs and pins maps and programs in `pins`, which must be empty or absent.
///
/// # Errors
/// See [`LoadError`].
pub fn load(pins: &PinDir) -> Result<Loaded, LoadError> {
    std::fs::create_dir_all(pins.path()).map_err(|error| pin_error(pins.path(), &error))?;
    match load_into(pins) {
        Ok(ebpf) => Ok(Loaded { ebpf, pins: pins.clone(), links: Vec::new(), committed: false }),
        Err(error) => {
            let _ = pins.remove();
            Err(error)
        }
    }
}

fn load_into(pins: &PinDir) -> Result<Ebpf, LoadError> {
    let mut ebpf = load_programs(pins)?;
    attach_to_sockets(&mut ebpf, pins)?;
    for name in PROGRAMS {
        pin(&mut ebpf, name, &pins.pin(&pin_of(name)))?;
    }
    Ok(ebpf)
}

/// Puts this program's own kernel programs in the place of those of a living enforcement, over the same maps. At no moment is
/// there none. Connections that are open keep the judge that they were accepted under.
///
/// # Errors
/// See [`LoadError`]. Some programs may have been replaced then; the others guard as before.
pub fn replace(pins: &PinDir) -> Result<(), LoadError> {
    let mut ebpf = load_programs(pins)?;
    // The kernel updates no link whose interface is gone. Its pin goes when the shield is raised.
    let shields =
        shield::link_pins(pins).into_iter().filter(|(index, path)| shield::is_attached(*index, path));
    let shields = shields.map(|(_, path)| (SHIELD, path));
    let links = LINKS.map(|(name, link)| (name, pins.pin(link)));
    for (name, path) in links.into_iter().chain(shields) {
        let link = sys::open(&path).map_err(|error| pin_error(&path, &error))?;
        let program =
            any_program(&mut ebpf, name)?.fd().map_err(|source| LoadError::Program { name, source })?.as_fd();
        match sys::update_link(link.as_fd(), program) {
            // It went at this moment.
            Err(error) if name == SHIELD && error.raw_os_error() == Some(libc::ENOLINK) => {}
            done => done.map_err(|source| LoadError::Replace { name, source })?,
        }
    }
    attach_to_sockets(&mut ebpf, pins)?;
    for name in PROGRAMS {
        let (lasting, beside) = (pins.pin(&pin_of(name)), pins.pin(&format!("{}_new", pin_of(name))));
        // Of a daemon that was killed right here.
        let _ = std::fs::remove_file(&beside);
        pin(&mut ebpf, name, &beside)?;
        std::fs::rename(&beside, &lasting).map_err(|error| pin_error(&lasting, &error))?;
    }
    Ok(())
}

/// Opens or makes the maps, by their pins, and loads all programs.
fn load_programs(pins: &PinDir) -> Result<Ebpf, LoadError> {
    let offsets = TcpOffsets::of_running_kernel()?;
    let mut loader = EbpfLoader::new();
    // A refusal's reason without the verifier's whole way to it, which takes many attempts and half a minute to get.
    loader.verifier_log_level(VerifierLogLevel::STATS);
    loader
        .override_global("TCP_WRITE_SEQ_OFFSET", &offsets.write_seq, true)
        .override_global("TCP_SND_UNA_OFFSET", &offsets.snd_una, true)
        .override_global("RECEIVE_QUEUE_LEN_OFFSET", &offsets.receive_queue_len, true)
        .override_global("TCP_RCV_NXT_OFFSET", &offsets.rcv_nxt, true)
        .override_global("TCP_COPIED_SEQ_OFFSET", &offsets.copied_seq, true)
        .override_global("RECEIVE_BUFFER_OFFSET", &offsets.receive_buffer, true)
        .override_global("LOW_WATER_OFFSET", &offsets.low_water, true)
        .override_global("SK_SOCKET_OFFSET", &offsets.socket, true)
        .override_global("SOCKET_FILE_OFFSET", &offsets.file, true)
        .override_global("FILE_FLAGS_OFFSET", &offsets.file_flags, true)
        .override_global("SOCK_NET_OFFSET", &offsets.net, true)
        .override_global("NET_COOKIE_OFFSET", &offsets.net_cookie, true);
    for name in map::ALL {
        loader.map_pin_path(name, pins.pin(name));
    }
    let mut ebpf = loader.load(EBPF_OBJECT)?;
    for name in ["judge", "inject"] {
        let program: &mut SkSkb = program(&mut ebpf, name)?;
        program.load().map_err(|source| LoadError::Program { name, source })?;
    }
    for name in ["connect4", "connect6"] {
        let program: &mut CgroupSockAddr = program(&mut ebpf, name)?;
        program.load().map_err(|source| LoadError::Program { name, source })?;
    }
    let tag_flow: &mut SockOps = program(&mut ebpf, "tag_flow")?;
    tag_flow.load().map_err(|source| LoadError::Program { name: "tag_flow", source })?;
    let gate: &mut CgroupSkb = program(&mut ebpf, "gate")?;
    gate.load().map_err(|source| LoadError::Program { name: "gate", source })?;
    let shield: &mut Xdp = program(&mut ebpf, SHIELD)?;
    shield.load().map_err(|source| LoadError::Program { name: SHIELD, source })?;
    Ok(ebpf)
}

/// Sockets that join the maps from here on come under these programs.
fn attach_to_sockets(ebpf: &mut Ebpf, pins: &PinDir) -> Result<(), LoadError> {
    let sockets =
        SockHash::<_, u64>::try_from(ebpf.map(map::SOCKETS).ok_or(LoadError::Missing(map::SOCKETS))?)
            .map_err(|source| LoadError::Map { name: map::SOCKETS, source })?
            .fd()
            .try_clone()
            .map_err(|error| pin_error(pins.path(), &error))?;
    let injectors = SockMap::try_from(ebpf.map(map::INJECTORS).ok_or(LoadError::Missing(map::INJECTORS))?)
        .map_err(|source| LoadError::Map { name: map::INJECTORS, source })?
        .fd()
        .try_clone()
        .map_err(|error| pin_error(pins.path(), &error))?;
    for (name, socket_map) in [("judge", &sockets), ("inject", &injectors)] {
        let program: &mut SkSkb = program(ebpf, name)?;
        let failed = |source| LoadError::Program { name, source };
        let link = program.attach(socket_map).map_err(failed)?;
        // The map keeps the program: it must outlive this process, and does not detach when the link is dropped.
        std::mem::forget(program.take_link(link).map_err(failed)?);
    }
    Ok(())
}

/// The programs that are pinned.
const PROGRAMS: &[&str] = &["judge", "inject", "connect4", "connect6", "tag_flow", "gate", SHIELD];

pub(super) fn pin_of(program: &str) -> String {
    format!("prog_{program}")
}

fn pin(ebpf: &mut Ebpf, name: &'static str, path: &Path) -> Result<(), LoadError> {
    any_program(ebpf, name)?.pin(path).map_err(|error| pin_error(path, &error))
}

fn any_program<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut Program, LoadError> {
    ebpf.program_mut(name).ok_or(LoadError::Missing(name))
}

fn program<'a, P>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut P, LoadError>
where
    &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
{
    any_program(ebpf, name)?.try_into().map_err(|source| LoadError::Program { name, source })
}

fn pin_error(path: &Path, error: &dyn std::error::Error) -> LoadError {
    LoadError::Pin { path: path.to_owned(), reason: chain(error) }
}

/// Attaches a program to the cgroup. No flag: a link always shares its cgroup with others, and the kernel refuses to be told so.
fn attach(ebpf: &mut Ebpf, name: &'static str, cgroup: &File) -> Result<FdLink, LoadError> {
    let failed = |source| LoadError::Program { name, source };
    let link = match any_program(ebpf, name)? {
        Program::CgroupSockAddr(connect) => {
            let link = connect.attach(cgroup, CgroupAttachMode::Single).map_err(failed)?;
            FdLink::try_from(connect.take_link(link).map_err(failed)?)
        }
        Program::SockOps(tag_flow) => {
            let link = tag_flow.attach(cgroup, CgroupAttachMode::Single).map_err(failed)?;
            FdLink::try_from(tag_flow.take_link(link).map_err(failed)?)
        }
        Program::CgroupSkb(gate) => {
            let ingress = CgroupSkbAttachType::Ingress;
            let link = gate.attach(cgroup, ingress, CgroupAttachMode::Single).map_err(failed)?;
            FdLink::try_from(gate.take_link(link).map_err(failed)?)
        }
        _ => return Err(LoadError::Missing(name)),
    };
    link.map_err(|_| LoadError::Missing("cgroup links (Linux 5.7)"))
}

impl Loaded {
    /// From now on, connections that protected endpoints in `cgroup` accept are guarded.
    ///
    /// # Errors
    /// See [`LoadError`]; nothing stays attached then.
    pub fn attach(&mut self, cgroup: &Path) -> Result<(), LoadError> {
        let file =
            File::open(cgroup).map_err(|source| LoadError::Cgroup { path: cgroup.to_owned(), source })?;
        for (name, pin) in LINKS {
            let link = attach(&mut self.ebpf, name, &file)?;
            let pin = self.pins.pin(pin);
            self.links.push(link.pin(&pin).map_err(|error| pin_error(&pin, &error))?);
        }
        Ok(())
    }

    /// Moves the pins to their lasting place, which must not exist; from here on they outlive this value. Gives the links: while they
    /// are held, the programs stay attached even if somebody deletes the pins.
    ///
    /// # Errors
    /// See [`LoadError`].
    pub fn commit(mut self, to: &PinDir) -> Result<Vec<PinnedLink>, LoadError> {
        std::fs::rename(self.pins.path(), to.path()).map_err(|error| pin_error(to.path(), &error))?;
        self.committed = true;
        Ok(std::mem::take(&mut self.links))
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        if !self.committed {
            let _ = self.pins.remove();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_long_log_the_end_is_kept() {
        assert_eq!(last_lines("one\ntwo"), "one\ntwo");
        let log: String = (0..10_000).map(|line| format!("{line}\n")).collect();
        let cut = last_lines(&log);
        assert!(cut.starts_with("0\n(9987 lines left out)\n9988\n"), "{cut}");
        assert!(cut.ends_with("\n9999"), "{cut}");
    }
}
