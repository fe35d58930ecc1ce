use std::collections::HashMap;

use crate::support::{Running, lines, raws, run, tramline};

/// The variables that `tramline local` printed.
fn environment(local: &Running) -> HashMap<String, String> {
    let stdout = local.wait_for_lines(8);
    assert_eq!(stdout.last().map(String::as_str), Some("ready"));
    stdout
        .iter()
        .filter_map(|line| line.strip_prefix("export "))
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

fn client(environment: &HashMap<String, String>) -> aws_sdk_kinesis::Client {
    let config = aws_sdk_kinesis::Config::builder()
        .behavior_version(aws_sdk_kinesis::config::BehaviorVersion::latest())
        .endpoint_url(&environment["AWS_ENDPOINT_URL_KINESIS"])
        .region(aws_sdk_kinesis::config::Region::new(environment["AWS_REGION"].clone()))
        .credentials_provider(aws_sdk_kinesis::config::Credentials::new(
            "x", "x", None, None, "test",
        ))
        .build();
    aws_sdk_kinesis::Client::from_conf(config)
}

#[tokio::test(flavor = "multi_thread")]
async fn local_servers_can_be_used_by_the_printed_variables_and_keep_their_data() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().to_str().expect("UTF-8");
    let consume = ["consume", "--stream", "kept", "--app", "kept", "--exit-when-idle", "1s"];

    let with_stream = ["local", "--dir", path, "--stream", "kept", "--bucket", "state"];
    let local = Running::start(tramline(&with_stream));
    let variables = environment(&local);
    let kinesis = client(&variables);
    let put = |kinesis: aws_sdk_kinesis::Client, line: String| async move {
        kinesis
            .put_record()
            .stream_name("kept")
            .partition_key("k")
            .data(aws_sdk_kinesis::primitives::Blob::new(crate::support::event(&line)))
            .send()
            .await
            .expect("a put");
    };
    put(kinesis.clone(), lines(0, 1)[0].clone()).await;
    let mut first = tramline(&consume);
    first.envs(&variables);
    assert_eq!(raws(&run(first).succeeded().stdout), lines(0, 1));
    put(kinesis, lines(1, 2)[0].clone()).await;
    let second = run(tramline(&["local", "--dir", path]));
    assert_eq!(second.status.code(), Some(1));
    assert!(second.stderr.contains("another process uses this directory"), "{}", second.stderr);
    local.stop().succeeded();

    // Both the stream and the lease table were kept: only what is new comes out.
    let local = Running::start(tramline(&with_stream));
    let mut second = tramline(&consume);
    second.envs(environment(&local));
    assert_eq!(raws(&run(second).succeeded().stdout), lines(1, 2));
    local.stop().succeeded();
    assert!(dir.path().join("s3/state").is_dir());
}
