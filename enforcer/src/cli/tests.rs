use std::path::Path;

use clap::CommandFactory as _;

use super::*;
use crate::lifecycle::lock::{DaemonLock, RUN_DIR};
use crate::lifecycle::testing::{TestCgroup, TestEnforcement, is_root};

fn code(arguments: &[&str]) -> u8 {
    run_from(std::iter::once("enforcer").chain(arguments.iter().copied()).map(OsString::from))
}

#[test]
fn the_command_line_is_well_formed() {
    Cli::command().debug_assert();
}

#[test]
fn every_command_has_help_and_the_top_one_lists_the_exit_codes() {
    let mut command = Cli::command();
    let help = command.render_long_help().to_string();
    for code in [OK, exit::FAILURE, USAGE, exit::NOT_LOADED, exit::REJECTED, exit::NOT_PERMITTED, exit::BUSY]
    {
        assert!(help.contains(&format!("\n  {code}  ")), "{code} is not in the help");
    }
    for sub in command.get_subcommands() {
        assert!(sub.get_about().is_some(), "{}", sub.get_name());
    }
}

#[test]
fn usage_errors_are_2_and_help_is_0() {
    assert_eq!(code(&["--help"]), OK);
    assert_eq!(code(&["flows", "--no-such-option"]), USAGE);
    assert_eq!(code(&["flows", "--pin-name", "../x"]), USAGE);
    assert_eq!(code(&["run"]), USAGE);
}

#[test]
fn nothing_loaded_is_3_for_those_who_read() {
    for command in ["status", "servers", "flows", "verdicts", "grants", "limits", "counters"] {
        assert_eq!(code(&[command, "--bpffs", "/no/such/place"]), exit::NOT_LOADED, "{command}");
    }
}

#[test]
fn check_says_4_for_defects() {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("policy.yaml");
    let check = |text: &str, output| {
        std::fs::write(&file, text).unwrap();
        code(&["check", &file.display().to_string(), "--output", output])
    };
    assert_eq!(check("version: 1\n", "text"), exit::REJECTED);
    assert_eq!(check("version: 1\n", "json"), exit::REJECTED);
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/policy.example.yaml");
    let example = std::fs::read_to_string(example).unwrap();
    assert_eq!(check(&example, "text"), OK);
    assert_eq!(check(&example, "json"), OK);
    assert_eq!(code(&["check", "/no/such/policy.yaml"]), exit::REJECTED);
}

#[test]
fn run_takes_its_options_and_the_global_ones() {
    let line = "enforcer --pin-name two run --policy p.yaml --cgroup /c --log-format json --log-level debug --keep \
                --drain-timeout 3 --bpffs /b --state-dir /s";
    let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
    let Command::Run(command) = cli.command else { panic!("not run") };
    let expected = run::RunArgs {
        options: crate::daemon::RunOptions {
            policy: "p.yaml".into(),
            cgroup: Some("/c".into()),
            bpffs: "/b".into(),
            pin_name: "two".into(),
            state: StateDir::new("/s".as_ref(), "two"),
            keep: true,
            replace_programs: false,
            drain_timeout: std::time::Duration::from_secs(3),
            watch: true,
        },
        log_format: run::LogFormat::Json,
        log_level: run::LogLevel::Debug,
    };
    assert_eq!(command.into_args(&cli.global), expected);
}

#[test]
fn the_reference_names_every_command_and_code() {
    let reference = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/cli.md");
    let reference = std::fs::read_to_string(reference).unwrap();
    for sub in Cli::command().get_subcommands().filter(|sub| !sub.is_hide_set()) {
        assert!(reference.contains(&format!("`enforcer {}", sub.get_name())), "{}", sub.get_name());
    }
    for code in 0..=exit::BUSY {
        assert!(reference.contains(&format!("| {code} |")), "{code}");
    }
}

#[test]
fn causes_are_said_once() {
    let error = anyhow::anyhow!("inner").context("outer says inner").context("top");
    assert_eq!(message(&error), "top: outer says inner");
}

#[test]
fn a_loaded_enforcement_is_read_and_unloaded() {
    if !is_root("a_loaded_enforcement_is_read_and_unloaded") {
        return;
    }
    let cgroup = TestCgroup::enter("cli");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut enforcement = TestEnforcement::start("cli", &cgroup, listener.local_addr().unwrap().port());
    let _client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let _server = listener.accept().unwrap();
    for slot in [3, enforcer_common::abi::MAX_GRANTS - 1] {
        let mut grant = enforcement.maps.live.grants.get(&slot, 0).unwrap();
        grant.serial = u64::from(slot);
        enforcement.maps.set_grant(slot, &grant).unwrap();
    }

    let name = enforcement.pins.path().file_name().unwrap().to_str().unwrap().to_owned();
    let on = |arguments: &[&str]| code(&[arguments, &["--pin-name", &name]].concat());
    for command in ["status", "servers", "flows", "verdicts", "grants", "limits", "counters"] {
        for output in ["table", "json"] {
            assert_eq!(on(&[command, "--output", output]), OK, "{command}");
        }
    }
    let live = &enforcement.maps.live;
    assert_eq!(live::flows(live).unwrap().len(), 1);
    let start = std::time::Instant::now();
    let grants = live::grants(live).unwrap();
    eprintln!("read the grants in {:?}", start.elapsed());
    assert_eq!(grants.into_keys().collect::<Vec<_>>(), [3, enforcer_common::abi::MAX_GRANTS - 1]);

    // A daemon is in the way.
    let lock = DaemonLock::acquire(&name).unwrap();
    assert_eq!(on(&["unload", "--drain-timeout", "0"]), exit::BUSY);
    assert!(enforcement.pins.exists());
    assert_eq!(on(&["unload", "--drain-timeout", "0", "--even-if-running"]), OK);
    assert!(!enforcement.pins.path().exists());
    drop(lock);
    assert_eq!(on(&["unload"]), OK);
    assert_eq!(on(&["flows"]), exit::NOT_LOADED);
    std::fs::remove_file(Path::new(RUN_DIR).join(format!("{name}.lock"))).unwrap();
}
