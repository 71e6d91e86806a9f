//! Puts the kernel programs where `include_bytes_aligned!` finds them.
//!
//! `cargo xtask build` makes the object first and names it in `ENFORCER_BPF_OBJECT`; a plain `cargo build` afterwards
//! takes the one that lies in the workspace's `target/bpf`.

use std::path::{Path, PathBuf};
use std::{env, fs, process};

const OBJECT_VARIABLE: &str = "ENFORCER_BPF_OBJECT";
const OBJECT_NAME: &str = "enforcer-ebpf";

/// `e_ident` of a 64-bit little-endian ELF file, ELF specification, "ELF Identification".
const ELF64_LITTLE_ENDIAN: &[u8] = b"\x7fELF\x02\x01";
/// Offset and value of `e_machine`: `EM_BPF`, `elf.h`.
const ELF_MACHINE_OFFSET: usize = 18;
const ELF_MACHINE_BPF: [u8; 2] = 247_u16.to_le_bytes();

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed={OBJECT_VARIABLE}");
    if let Err(message) = embed() {
        println!("cargo::error={message}");
        process::exit(1);
    }
}

fn embed() -> Result<(), String> {
    let object = match env::var_os(OBJECT_VARIABLE) {
        Some(path) => PathBuf::from(path),
        None => variable("CARGO_MANIFEST_DIR")?.join("../target/bpf").join(OBJECT_NAME),
    };
    println!("cargo::rerun-if-changed={}", object.display());
    let bytes = fs::read(&object).map_err(|error| {
        format!(
            "the kernel programs are not built: can't read {} ({error}). Run `cargo xtask build`, which builds them \
             and then this crate; plain cargo commands work from then on.",
            object.display()
        )
    })?;
    check_is_bpf(&bytes).map_err(|found| {
        format!("{} is not a BPF object: {found}. Run `cargo xtask build` to make one.", object.display())
    })?;
    write(&variable("OUT_DIR")?.join(OBJECT_NAME), &bytes)
}

fn check_is_bpf(bytes: &[u8]) -> Result<(), String> {
    if !bytes.starts_with(ELF64_LITTLE_ENDIAN) {
        return Err("it does not start as a 64-bit little-endian ELF file does".into());
    }
    match bytes.get(ELF_MACHINE_OFFSET..ELF_MACHINE_OFFSET + 2) {
        Some(machine) if machine == ELF_MACHINE_BPF => Ok(()),
        found => Err(format!("its ELF machine is {found:?}, BPF is {ELF_MACHINE_BPF:?}")),
    }
}

fn variable(name: &str) -> Result<PathBuf, String> {
    env::var_os(name).map(PathBuf::from).ok_or_else(|| format!("cargo did not set {name}"))
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), String> {
    fs::write(path, bytes).map_err(|error| format!("can't write {}: {error}", path.display()))
}
