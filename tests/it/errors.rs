//! What goes wrong at the start is one clear line and an exit code, never a panic or a hang.

use std::process::Command;

use crate::support::{Servers, run, tramline};

/// Runs `command`, which must fail with `code` and one line on stderr that contains `texts`.
fn fails(command: Command, code: i32, texts: &[&str]) {
    let shown = format!("{command:?}");
    let finished = run(command);
    let stderr = finished.stderr;
    assert_eq!(finished.status.code(), Some(code), "{shown}\n{stderr}");
    assert!(finished.stdout.is_empty(), "{shown}: stdout is for messages");
    for text in texts {
        assert!(stderr.contains(text), "{shown}: {text:?} is missing in\n{stderr}");
    }
    assert!(
        !stderr.contains("panicked") && !stderr.contains("RUST_BACKTRACE"),
        "{shown}\n{stderr}"
    );
    let errors = stderr.lines().filter(|line| line.contains("ERROR") || line.starts_with("error:"));
    assert_eq!(errors.count(), 1, "{shown}: one line\n{stderr}");
}

fn consume(servers: &Servers, more: &[&str]) -> Command {
    servers.tramline(&[&["consume", "--app", "rtr"], more].concat())
}

#[test]
fn wrong_usage_is_exit_code_2() {
    for (args, texts) in [
        (&["consume", "--app", "rtr"][..], &["--stream <NAME>"][..]),
        (&["consume", "--stream", "s", "--app", "a", "--formt", "raw"], &["--formt", "--format"]),
        (
            &["consume", "--stream", "s", "--app", "a", "--format", "xml"],
            &["xml", "json, event, raw"],
        ),
        (&["consume", "--stream", "s", "--app", "a", "--start", "noon"], &["noon", "service-day"]),
        (&["consume", "--stream", "s", "--app", "a", "--exit-when-idle", "5"], &["10s"]),
        (&["consum"], &["consum", "consume"]),
        (&["produce", "--listen", "nowhere", "--stream", "s"], &["nowhere"]),
        (&["produce", "--stream", "s", "--max-message-size", "1MiB"], &["128KiB"]),
        (&["generate", "--to", "x", "--connections", "0"], &["--connections"]),
        (
            &["consume", "--config", "/no/such/file", "--stream", "s", "--app", "rtr"],
            &["/no/such/file"],
        ),
        (&["--log-format", "xml", "demo"], &["xml", "text, json"]),
    ] {
        fails(tramline(args), 2, texts);
    }
}

#[test]
fn a_missing_stream_is_named_with_its_region() {
    let servers = Servers::start();
    fails(
        consume(&servers, &["--stream", "nowhere"]),
        1,
        &["stream nowhere does not exist", "us-east-1"],
    );
    fails(
        consume(
            &servers,
            &["--stream", "nowhere", "--retrieval", "polling", "--region", "eu-west-1"],
        ),
        1,
        &["stream nowhere does not exist in region eu-west-1"],
    );
    let future = ["--stream", "nowhere", "--start", "2999-01-01T00:00:00Z"];
    fails(consume(&servers, &future), 1, &["2999-01-01T00:00:00Z is in the future"]);
    let short = ["consume", "--stream", "nowhere", "--app", "zz"];
    fails(servers.tramline(&short), 1, &["\"zz\" cannot name a lease table"]);
    let produce = ["produce", "--listen", "127.0.0.1:0", "--stream", "nowhere"];
    fails(servers.tramline(&produce), 1, &["stream nowhere does not exist"]);
}

#[test]
fn a_missing_region_or_credential_says_what_to_set() {
    let args = ["consume", "--stream", "s", "--app", "rtr"];
    fails(tramline(&args), 1, &["no AWS region is set", "--region"]);
    let mut command = tramline(&args);
    command.env("AWS_REGION", "us-east-1").env("AWS_ENDPOINT_URL", "http://127.0.0.1:1");
    fails(command, 1, &["has no usable AWS credentials", "AWS_ACCESS_KEY_ID"]);
}

#[test]
fn a_refused_connection_says_which_call_got_no_answer() {
    let mut command = tramline(&["consume", "--stream", "s", "--app", "rtr"]);
    command
        .env("AWS_REGION", "us-east-1")
        .env("AWS_ACCESS_KEY_ID", "x")
        .env("AWS_SECRET_ACCESS_KEY", "x")
        .env("AWS_ENDPOINT_URL", "http://127.0.0.1:1");
    fails(command, 1, &["kinesis:DescribeStreamSummary got no answer", "refused"]);
    fails(
        tramline(&["generate", "--to", "127.0.0.1:1"]),
        1,
        &["cannot send to 127.0.0.1:1", "refused", "tramline produce"],
    );
}

#[test]
fn an_address_in_use_is_named() {
    let servers = Servers::with_stream("s", 1);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address").to_string();
    let produce = ["produce", "--stream", "s", "--listen", &address];
    fails(servers.tramline(&produce), 1, &["cannot listen on", &address, "in use"]);
}

#[test]
fn settings_from_environment_and_file_are_checked_like_flags_and_say_where_they_come_from() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).expect("a file");
        path.to_str().expect("UTF-8").to_owned()
    };
    let args = ["consume", "--app", "rtr"];

    let mut command = tramline(&args);
    command.env("TRAMLINE_STREAM", "s").env("TRAMLINE_FORMAT", "xml");
    fails(command, 2, &["xml", "the environment variable TRAMLINE_FORMAT"]);

    let wrong_value = file("a.toml", "[consume]\nstream = \"s\"\nformat = \"xml\"\n");
    fails(
        tramline(&[&args[..], &["--config", &wrong_value]].concat()),
        2,
        &["xml", "`consume.format`"],
    );

    let wrong_key = file("b.toml", "[consume]\nstraem = \"s\"\n");
    fails(
        tramline(&[&args[..], &["--config", &wrong_key]].concat()),
        2,
        &["unknown key `consume.straem`", "did you mean `stream`?"],
    );

    let json = file("c.json", "{\"stream\": \"s\", \"lease_tabel\": \"t\"}");
    fails(
        tramline(&[&args[..], &["--config", &json]].concat()),
        2,
        &["unknown key `lease_tabel`", "did you mean `lease-table`?"],
    );

    let broken = file("d.toml", "stream = ");
    fails(tramline(&[&args[..], &["--config", &broken]].concat()), 2, &["d.toml cannot be read"]);
}
