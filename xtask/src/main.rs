//! Tasks of the workspace: `cargo xtask --help`.

mod build;
mod bypass;
mod check;
mod fuzz;
mod probe;
mod process;
mod setup;
mod show;
mod summary;
mod test;
mod toolchain;
mod vm;
mod workspace;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::workspace::Workspace;

/// Build, check, test and show the enforcer.
///
/// Every task first gets what it needs (see `setup`), so each works on a fresh clone. All of them work from any
/// directory of the workspace.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// List what build, tests, demo and benchmark need, and install what is missing.
    ///
    /// The kernel programs need a compiler with the source of `core` and `bpf-linker`. The first of these that fits is
    /// taken: rustup's nightly with rust-src, the active rustc with rust-src, Debian's rustc-web with rust-web-src.
    /// Debian packages are installed by root only; for everything that is not installed the exact command is printed.
    Setup {
        /// Only say what is there and what is missing; exit with 1 when something is.
        #[arg(long)]
        check: bool,
    },
    /// Build the kernel programs, then the host programs with them embedded.
    ///
    /// The object lands in target/bpf/enforcer-ebpf, always built for release; plain `cargo build` embeds it from
    /// there afterwards. Run this again after a change to enforcer-ebpf or enforcer-common.
    Build {
        /// Build the host programs for release [default: debug].
        #[arg(long, conflicts_with = "debug")]
        release: bool,
        /// Build the host programs for debugging, the default.
        #[arg(long)]
        debug: bool,
    },
    /// Run what CI runs besides the tests: format, lints, documentation, shape of the tree.
    Check,
    /// Run the checks, then every test: unit and property tests, then the end-to-end tests.
    ///
    /// The end-to-end tests load eBPF programs into the kernel and make cgroups and network namespaces of their own, so
    /// they need root. The last line is `N passed, N failed, N skipped`; every skip is listed with its reason.
    #[command(
        args_conflicts_with_subcommands = true,
        subcommand_precedence_over_arg = true,
        disable_help_subcommand = true,
        after_help = "Examples:\n  cargo xtask test                 everything\n  \
                      cargo xtask test --quick         fewer rounds, smaller bodies\n  \
                      cargo xtask test pipelining      only tests with this in their name, no checks\n  \
                      cargo xtask test vm              end-to-end tests in other kernels, under qemu"
    )]
    Test {
        #[command(subcommand)]
        elsewhere: Option<Elsewhere>,
        /// Fewer rounds and smaller bodies.
        #[arg(long)]
        quick: bool,
        /// Run the end-to-end tests on the daemon as it is released, not on the build with debug assertions.
        #[arg(long)]
        release: bool,
        /// Without root, run what can be run and count that as success.
        #[arg(long)]
        unprivileged: bool,
        /// How long the soak test churns, in minutes [default: one minute]; give the step as much and some more.
        #[arg(long, value_name = "MINUTES", value_parser = clap::value_parser!(u64).range(1..=600))]
        soak_minutes: Option<u64>,
        /// How often the kill test kills the daemon [default: 20]; 500 take about ten minutes.
        #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..=100_000))]
        kills: Option<u64>,
        /// Wall-clock limit of each step, in seconds; a step over it is ended with all its processes.
        #[arg(long, value_name = "SECONDS", default_value_t = 900, value_parser = clap::value_parser!(u64).range(1..))]
        step_limit_s: u64,
        /// Run only tests whose name contains one of these; leaves out the checks.
        #[arg(value_name = "FILTER")]
        filters: Vec<String>,
    },
    /// Compare how HTTP parsers read request heads that the kernel may let through, on generated heads.
    ///
    /// Heads are made from parts and spoiled at random; coverage does not guide it. `cargo xtask test` runs the same for a moment, and
    /// tries what lies in tests/fuzz-corpus. A head that is read in two ways is kept there.
    Fuzz {
        /// How long, in seconds.
        #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
        seconds: u64,
        /// Where the random numbers begin [default: the time].
        #[arg(long, value_name = "NUMBER")]
        seed: Option<u64>,
    },
    /// Show the enforcer at work on a real MCP server and client. Needs root; cleans up after itself.
    Demo {
        /// Passed on to the demo (`cargo xtask demo -- --help` lists them).
        #[arg(value_name = "ARGS", trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Measure what the enforcer costs, paired and interleaved with the bare server. Needs root.
    Bench {
        /// Shorter runs: good for a look, not for a number to keep.
        #[arg(long)]
        quick: bool,
        /// Also write the results and the raw samples to this file.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
        /// Passed on to the benchmark (`cargo xtask bench -- --help` lists them).
        #[arg(value_name = "ARGS", last = true)]
        arguments: Vec<OsString>,
    },
}

#[derive(Subcommand)]
enum Elsewhere {
    /// Run end-to-end tests in Debian's kernels, emulated by qemu: the newest of 6.1, 6.12, 6.18 and 7, and one that is
    /// known to stall connections, where the daemon must refuse.
    ///
    /// Downloads are kept in target/vm. Installs qemu-system-x86 when it is missing and root runs this; nothing else.
    Vm {
        /// Only this series; may be given more than once.
        #[arg(long = "kernel", value_name = "SERIES", value_parser = clap::builder::PossibleValuesParser::new(vm::names()))]
        kernels: Vec<String>,
        /// Also write the results to this file, as docs/kernels.md has them.
        #[arg(long, value_name = "FILE", conflicts_with = "kernels")]
        markdown: Option<PathBuf>,
        /// Wall-clock limit of each guest, in seconds; a guest over it is ended.
        #[arg(long, value_name = "SECONDS", default_value_t = 1800, value_parser = clap::value_parser!(u64).range(1..))]
        guest_limit_s: u64,
        /// Ask no archive: take what was downloaded before.
        #[arg(long)]
        offline: bool,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli.task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<()> {
    let workspace = Workspace::locate()?;
    match task {
        Task::Setup { check } => setup::setup(&workspace, check),
        Task::Build { release, debug: _ } => {
            let toolchain = setup::ensure(&workspace)?;
            build::bpf_object(&workspace, &toolchain)?;
            build::host(&workspace, release)
        }
        Task::Check => check::check(&workspace, &setup::ensure(&workspace)?),
        Task::Test {
            elsewhere: Some(Elsewhere::Vm { kernels, markdown, guest_limit_s, offline }), ..
        } => {
            let guest_limit = Duration::from_secs(guest_limit_s);
            vm::test(&workspace, &vm::Options { kernels, markdown, guest_limit, offline })
        }
        Task::Test {
            elsewhere: None,
            quick,
            release,
            unprivileged,
            soak_minutes,
            kills,
            step_limit_s,
            filters,
        } => {
            let step_limit = Duration::from_secs(step_limit_s);
            let soak = soak_minutes.map(|minutes| Duration::from_secs(60 * minutes));
            let options = test::Options { quick, release, unprivileged, soak, kills, step_limit, filters };
            test::test(&workspace, &options)
        }
        Task::Fuzz { seconds, seed } => fuzz::fuzz(&workspace, &setup::ensure(&workspace)?, seconds, seed),
        Task::Demo { arguments } => show::show(&workspace, "enforcer-demo", &arguments),
        Task::Bench { quick, json, arguments } => {
            let mut all = Vec::new();
            if quick {
                all.push(OsString::from("--quick"));
            }
            if let Some(json) = json {
                all.extend([OsString::from("--json"), json.into_os_string()]);
            }
            all.extend(arguments);
            show::show(&workspace, "enforcer-bench", &all)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn vm_is_a_mode_and_other_words_are_filters() {
        let cli = Cli::parse_from(["xtask", "test", "vm", "--kernel", "6.12", "--guest-limit-s", "5"]);
        let Task::Test { elsewhere: Some(Elsewhere::Vm { kernels, guest_limit_s, .. }), .. } = cli.task
        else {
            panic!("not vm")
        };
        assert_eq!((kernels, guest_limit_s), (vec!["6.12".to_owned()], 5));
        let cli = Cli::parse_from(["xtask", "test", "--quick", "pipelining", "vm_like"]);
        let Task::Test { elsewhere: None, quick: true, filters, .. } = cli.task else { panic!("not a test") };
        assert_eq!(filters, ["pipelining", "vm_like"]);
    }

    #[test]
    fn benchmark_and_demo_arguments_are_passed_through() {
        let cli = Cli::parse_from(["xtask", "bench", "--quick", "--json", "o.json", "--", "--seconds", "3"]);
        let Task::Bench { quick, json, arguments } = cli.task else { panic!("not bench") };
        assert!(quick);
        assert_eq!(json, Some("o.json".into()));
        assert_eq!(arguments, ["--seconds", "3"]);
        let cli = Cli::parse_from(["xtask", "demo", "--pause"]);
        let Task::Demo { arguments } = cli.task else { panic!("not demo") };
        assert_eq!(arguments, ["--pause"]);
    }
}
