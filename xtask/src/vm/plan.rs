//! What a guest runs, and what its output says of it.

use crate::summary::{Tally, tally_step};

/// Test programs and which of their tests run in each kernel: what the kernel decides, once each. Starting a daemon takes an
/// emulated machine ten seconds and more, so it is not all of them.
pub(super) const TESTS: &[(&str, &[&str])] = &[
    (
        "e2e_fastpath",
        &[
            "the_second_time_the_kernel_refuses_and_answers_in_http",
            "a_blocking_server_never_notices_what_is_refused",
        ],
    ),
    (
        "e2e_streams",
        &[
            "a_body_that_follows_its_head_later_arrives_in_order",
            "random_segments_of_a_long_keep_alive_connection_arrive_in_order",
        ],
    ),
    ("e2e_pipelining", &[""]),
    (
        "e2e_fenced",
        &[
            "mptcp_on_both_ends_reads_nothing_uninspected",
            "data_in_the_syn_is_judged",
            "a_server_in_another_network_namespace_is_guarded",
            "lost_reordered_and_repeated_segments_change_nothing",
        ],
    ),
    (
        "e2e_bypass",
        &["segments::", "reading::a_server_that_turns_kernel_tls_on_gets_nothing_unjudged", "past::"],
    ),
    ("e2e_families", &["ipv6", "ipv4_clients_of_a_dual_stack_listener"]),
    ("e2e_callers", &["by_cgroup_process_and_user_over_ipv4", "with_data_in_the_syn"]),
    (
        "e2e_binding",
        &[
            "a_bound_token_is_refused_from_another_workload_over_ipv4",
            "only_callers_of_the_server_may_connect",
            "an_mptcp_caller_is_itself_or_nobody",
        ],
    ),
    (
        "e2e_limits",
        &[
            "over_a_rate_the_kernel_answers_429_and_the_connection_lives_on",
            "where_the_kernel_cannot_answer_the_daemon_does",
            "as_many_streams_as_the_limit_has_places",
        ],
    ),
    ("e2e_limits_flood", &["a_workload_is_one_source_whatever_cgroups_it_makes"]),
    ("e2e_crash", &["after_kill_9_known_heads_go_on_and_unknown_ones_get_503"]),
    (
        "e2e_adopt",
        &[
            "a_restart_keeps_connections_grants_verdicts_and_counters",
            "other_programs_take_their_place_without_a_gap",
        ],
    ),
    ("e2e_lifecycle", &["sigterm_removes_programs_and_pins"]),
    ("e2e_observe", &["every_request_passes_as_it_was_sent_and_is_counted"]),
    ("e2e_privileges", &["no_thread_of_a_guarding_daemon_can_more_than_it_needs"]),
    (
        "e2e_shield_frames",
        &[
            "whatever_is_around_it_a_packet_is_found_by_its_port",
            "mptcps_option_becomes_nops_and_the_checksum_stays_right",
            "each_source_has_its_own_limits",
        ],
    ),
    (
        "e2e_shield",
        &[
            "limits::a_source_that_keeps_failing_is_quarantined_for_its_time",
            "life::it_stays_when_the_daemon_dies_and_goes_with_the_enforcement",
            "traffic::mptcp_clients_fall_back_at_once",
            "traffic::datagrams_to_protected_ports_are_dropped_in_generic_mode_too",
            "traffic::a_vlan_on_the_interface_is_no_way_around",
        ],
    ),
    ("e2e_cli", &["the_views_work_while_no_daemon_runs"]),
];

/// One command in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Step {
    /// Its name in the output.
    pub(super) name: &'static str,
    /// The shell command.
    pub(super) command: String,
    /// Exit code that it must have.
    pub(super) exit: u8,
    /// What its output must hold.
    pub(super) says: Option<&'static str>,
    /// How many tests must pass, at least.
    pub(super) tests: u64,
}

/// Exit codes of the enforcer.
const FAILURE: u8 = 1;
const NOT_LOADED: u8 = 3;
const REJECTED: u8 = 4;

/// What the refusal must name.
pub(super) const STALL: &str = "this kernel stalls a connection after injected bytes";

impl Step {
    /// As `/init` runs it.
    pub(super) fn script(&self) -> String {
        format!("step {} {}\n", self.name, self.command)
    }
}

/// In a kernel that works: the doctor finds it fit, and the tests hold, each of them.
pub(super) fn working() -> Vec<Step> {
    let doctor = Step { name: "doctor", command: "enforcer doctor".into(), exit: 0, says: None, tests: 0 };
    let tests = TESTS.iter().map(|(name, tests)| Step {
        name,
        command: format!("{name} --test-threads=1 {}", tests.join(" ")),
        exit: 0,
        says: Some("test result: ok."),
        tests: tests.len() as u64,
    });
    let none_skipped = Step {
        name: "none-skipped",
        command: "sh -c '! grep . /tmp/skipped'".into(),
        exit: 0,
        says: None,
        tests: 0,
    };
    std::iter::once(doctor).chain(tests).chain([none_skipped]).collect()
}

/// In a kernel that stalls: doctor and daemon refuse with the reason, and nothing is attached.
pub(super) fn refused() -> Vec<Step> {
    let step = |name, command: &str, exit, says| Step { name, command: command.into(), exit, says, tests: 0 };
    vec![
        step("doctor", "enforcer doctor", REJECTED, Some(STALL)),
        step("run", "timeout 120 enforcer run --policy /policy.yaml", FAILURE, Some(STALL)),
        step("status", "enforcer status", NOT_LOADED, None),
        step("no-pins", "sh -c '[ -z \"$(ls /sys/fs/bpf)\" ]'", 0, None),
    ]
}

/// What a step did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Done {
    /// Its name.
    pub(super) name: &'static str,
    /// Tests that ran; none for other commands.
    pub(super) tally: Tally,
    /// What is wrong; empty when it went as it must.
    pub(super) defects: Vec<String>,
    /// The line that holds what it must say.
    pub(super) said: Option<String>,
}

/// What a guest's output says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Reading {
    /// `uname -r`.
    pub(super) release: Option<String>,
    /// The steps, as far as they began.
    pub(super) steps: Vec<Done>,
    /// What is wrong besides.
    pub(super) defects: Vec<String>,
}

impl Reading {
    /// Everything that is wrong.
    pub(super) fn all_defects(&self) -> Vec<String> {
        let of_steps = self
            .steps
            .iter()
            .flat_map(|done| done.defects.iter().map(move |defect| format!("{}: {defect}", done.name)));
        self.defects.iter().cloned().chain(of_steps).collect()
    }

    /// Tests of all steps.
    pub(super) fn tally(&self) -> Tally {
        let mut sum = Tally::default();
        for done in &self.steps {
            sum += done.tally;
        }
        sum
    }
}

/// Reads the guest's output against what was planned.
pub(super) fn read(lines: &[String], steps: &[Step]) -> Reading {
    let lines: Vec<&str> = lines.iter().map(|line| line.trim_end()).collect();
    let release = lines.iter().find_map(|line| line.strip_prefix("@@ booted ")).map(str::to_owned);
    let mut reading = Reading { release, ..Reading::default() };
    if reading.release.is_none() {
        reading.defects.push("it did not come up".into());
    }
    if !lines.contains(&"@@ done") {
        reading.defects.push("its last marker is missing: it died or was ended before it was done".into());
    }
    for step in steps {
        reading.steps.push(read_step(&lines, step));
    }
    reading
}

fn read_step(lines: &[&str], step: &Step) -> Done {
    let begin = format!("@@ begin {}", step.name);
    let end = format!("@@ end {} ", step.name);
    let mut done = Done { name: step.name, tally: Tally::default(), defects: Vec::new(), said: None };
    let Some(from) = lines.iter().position(|line| *line == begin) else {
        done.defects.push("was not reached".into());
        return done;
    };
    let output = &lines[from + 1..];
    let to = output.iter().position(|line| line.starts_with(&end));
    let exit = to.and_then(|to| output[to].strip_prefix(&end)?.parse::<u8>().ok());
    let output = &output[..to.unwrap_or(output.len())];
    match exit {
        Some(exit) if exit == step.exit => {}
        Some(exit) => done.defects.push(format!("exit code {exit} instead of {}", step.exit)),
        None => done.defects.push("did not end".into()),
    }
    if let Some(says) = step.says {
        done.said = output.iter().find(|line| line.contains(says)).map(|line| (*line).to_owned());
        if done.said.is_none() {
            done.defects.push(format!("does not say {says:?}"));
        }
    }
    if step.tests > 0 {
        done.tally = tally_step(output.iter().copied(), done.defects.is_empty());
        let failed = output.iter().filter_map(|line| line.strip_prefix("test ")?.strip_suffix(" ... FAILED"));
        done.defects.extend(failed.map(|name| format!("{name} failed")));
        if done.tally.passed + done.tally.failed < step.tests {
            done.defects.push(format!("{} of at least {} tests ran", done.tally.passed, step.tests));
        }
    }
    done
}

/// Lines of the kernel's log that no run may have.
pub(super) fn complaints(log: &str) -> Vec<String> {
    const BAD: &[&str] = &["recvmsg seq", "WARNING", "BUG:", "Oops", "Kernel panic"];
    log.lines()
        .map(str::trim)
        .filter(|line| BAD.iter().any(|bad| line.contains(bad)))
        .map(|line| format!("kernel: {line}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Vec<String> {
        text.lines().map(|line| format!("{line}\r")).collect()
    }

    fn steps() -> Vec<Step> {
        vec![
            Step { name: "doctor", command: String::new(), exit: 4, says: Some("because"), tests: 0 },
            Step { name: "e2e_x", command: String::new(), exit: 0, says: None, tests: 1 },
        ]
    }

    const GOOD: &str = "\
@@ booted 6.1.0-56
@@ begin doctor
no, because
@@ end doctor 4
@@ begin e2e_x
test a ... ok
test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 1 filtered out; finished in 1.00s
@@ end e2e_x 0
@@ done";

    #[test]
    fn a_good_run_has_no_defects() {
        let reading = read(&lines(GOOD), &steps());
        assert_eq!(reading.all_defects(), Vec::<String>::new());
        assert_eq!(reading.release.as_deref(), Some("6.1.0-56"));
        assert_eq!(reading.tally().passed, 1);
        assert_eq!(reading.steps[0].said.as_deref(), Some("no, because"));
    }

    #[test]
    fn every_marker_is_required() {
        for line in GOOD.lines().filter(|line| line.starts_with("@@") || line.contains("because")) {
            let without: String =
                GOOD.lines().filter(|other| *other != line).map(|other| format!("{other}\n")).collect();
            assert_ne!(read(&lines(&without), &steps()).all_defects(), Vec::<String>::new(), "{line}");
        }
    }

    #[test]
    fn a_wrong_exit_code_and_a_failed_test_are_named() {
        let bad = GOOD
            .replace("test a ... ok", "test a ... FAILED")
            .replace("ok. 1 passed; 0 failed", "FAILED. 0 passed; 1 failed")
            .replace("end e2e_x 0", "end e2e_x 101");
        let reading = read(&lines(&bad), &steps());
        assert_eq!(reading.all_defects(), ["e2e_x: exit code 101 instead of 0", "e2e_x: a failed"]);
        assert_eq!(reading.tally().failed, 1);
    }

    #[test]
    fn a_test_that_is_gone_is_missed() {
        let reading = read(&lines(&GOOD.replace("ok. 1 passed", "ok. 0 passed")), &steps());
        assert_eq!(reading.all_defects(), ["e2e_x: 0 of at least 1 tests ran"]);
    }

    #[test]
    fn kernel_complaints_are_found() {
        let log = "[ 1.0] all is well\n[ 2.0] WARNING: CPU: 0 PID: 1 at net/ipv4/tcp.c:2345\n[ 3.0] BUG: kernel NULL";
        assert_eq!(complaints(log).len(), 2);
        assert_eq!(complaints("warning: lower case\n"), Vec::<String>::new());
    }

    #[test]
    fn names_of_steps_are_one_word() {
        for step in working().iter().chain(&refused()) {
            assert!(!step.name.contains(' ') && !step.command.is_empty());
        }
    }
}
