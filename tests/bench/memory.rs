//! How much memory a worker takes for each shard that is at rest. Prints Markdown.
//!
//! `cargo bench --bench memory`, or `cargo bench --bench memory -- polling` for one way of reading. The
//! program reads streams of more and more shards from embedded servers in another process, and once it has
//! nothing to do the system is asked how much of its memory is resident. Linux only.

#[path = "../it/support.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod support;

use std::{fs, thread::sleep, time::Duration};

use aws_sdk_kinesis::{
    Client,
    config::{BehaviorVersion, Credentials, Region},
};

use support::{Running, create_stream, tramline, wait_for};

const SHARDS: [i32; 4] = [1, 8, 64, 256];
/// From the last lease until the worker is at rest: each shard has been read several times by then.
const REST: Duration = Duration::from_secs(20);

fn main() {
    // Cargo adds `--bench`.
    let wanted: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let servers = Running::start(tramline(&["local"]));
    let environment = environment(&servers);
    let kinesis = kinesis(&environment);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    for shards in SHARDS {
        runtime.block_on(create_stream(&kinesis, &stream(shards), shards));
    }
    println!("| | {} | KiB a shard |", SHARDS.map(|shards| format!("{shards} shards")).join(" | "));
    println!("|--{}|--:|", "|--:".repeat(SHARDS.len()));
    for retrieval in ["polling", "fan-out"] {
        if !wanted.is_empty() && !wanted.iter().any(|wanted| wanted == retrieval) {
            continue;
        }
        let resident = SHARDS.map(|shards| resident_kib(&environment, retrieval, shards));
        let (first, last) = (resident[0], resident[SHARDS.len() - 1]);
        let more = f64::from(SHARDS[SHARDS.len() - 1] - SHARDS[0]);
        let mib = resident.map(|kib| format!("{:.1} MiB", kib / 1024.0)).join(" | ");
        println!("| {retrieval} | {mib} | {:.0} |", (last - first) / more);
    }
}

fn stream(shards: i32) -> String {
    format!("ocs-{shards}")
}

/// The resident memory of a worker with this many shards at rest.
fn resident_kib(environment: &[(String, String)], retrieval: &str, shards: i32) -> f64 {
    let (stream, app) = (stream(shards), format!("{retrieval}-{shards}"));
    let args = ["consume", "--stream", &stream, "--app", &app, "--retrieval", retrieval];
    let mut command = tramline(&args);
    command.envs(environment.iter().cloned());
    let worker = Running::start(command);
    wait_for("the leases", || {
        (worker.stderr().matches("lease taken").count() == shards as usize).then_some(())
    });
    sleep(REST);
    let status = fs::read_to_string(format!("/proc/{}/status", worker.id())).expect("a status");
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a size");
    let kib = resident.trim().trim_end_matches(" kB").parse().expect("a number");
    worker.stop().succeeded();
    kib
}

/// What `tramline local` says to set.
fn environment(servers: &Running) -> Vec<(String, String)> {
    wait_for("the servers", || servers.stdout().iter().any(|line| line == "ready").then_some(()));
    let lines = servers.stdout();
    let variables = lines.iter().filter_map(|line| line.strip_prefix("export ")?.split_once('='));
    variables.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

fn kinesis(environment: &[(String, String)]) -> Client {
    let variable = |wanted| environment.iter().find(|(name, _)| name == wanted).expect("it is set");
    let url = &variable("AWS_ENDPOINT_URL_KINESIS").1;
    let config = aws_sdk_kinesis::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new("us-east-1"))
        .credentials_provider(Credentials::new("local", "local", None, None, "tramline local"))
        .endpoint_url(url)
        .build();
    Client::from_conf(config)
}
