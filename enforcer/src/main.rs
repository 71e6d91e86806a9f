//! The enforcer binary.
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

#[derive(Parser)]
enum Cli {
    Run {
        #[arg(long)]
        policy: PathBuf,
        #[arg(long)]
        cgroup: Option<PathBuf>,
        #[arg(long, default_value = "enforcer")]
        pin_name: String,
        #[arg(long, default_value = "/sys/fs/bpf")]
        bpffs: PathBuf,
        #[arg(long)]
        keep: bool,
        #[arg(long, default_value_t = 2)]
        drain_timeout: u64,
    },
}

fn main() {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_max_level(tracing::Level::INFO).init();
    let Cli::Run { policy, cgroup, pin_name, bpffs, keep, drain_timeout } = Cli::parse();
    let options = enforcer::daemon::RunOptions {
        policy,
        cgroup,
        bpffs,
        pin_name,
        keep,
        drain_timeout: Duration::from_secs(drain_timeout),
    };
    if let Err(error) = enforcer::daemon::run(&options) {
        eprintln!("{error:#}");
        std::process::exit(1);
    }
}
