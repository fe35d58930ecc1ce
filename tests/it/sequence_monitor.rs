//! The example of that name, against embedded servers.

use std::sync::{Arc, Mutex};

use tramline::{
    Retrieval, ShardId, Worker,
    local::{Local, LocalSettings},
};

use crate::support::{create_stream, event};

#[allow(dead_code)] // Its `main` brings its own servers.
#[path = "../../examples/sequence_monitor.rs"]
mod example;

const STREAM: &str = "ctd-ocs-raw-messages";

#[tokio::test(flavor = "multi_thread")]
async fn the_sequence_monitor_says_what_is_missing_repeated_and_new() {
    let local = Local::start(LocalSettings::default()).await.expect("servers");
    let kinesis = aws_sdk_kinesis::Client::new(&local.sdk_config());
    create_stream(&kinesis, STREAM, 1).await;

    let day = "2025-07-02T16:00:00.000000Z";
    let midnight = "2025-07-03T04:00:00.000000Z";
    let events = [
        ("10.0.0.2", day, "41"),
        ("10.0.0.3", day, "7000"),
        ("10.0.0.2", day, "42"),
        ("10.0.0.2", day, "45"),
        ("", day, "1"),
        ("10.0.0.3", day, "7001"),
        ("10.0.0.2", day, "45"),
        ("10.0.0.2", day, "garbage"),
        ("10.0.0.2", day, "30"),
        ("", day, "3"),
        ("10.0.0.3", midnight, "1"),
        ("10.0.0.2", midnight, "31"),
        ("10.0.0.3", midnight, "2"),
    ];
    let events = events.map(|(ip, time, number)| {
        event(&format!("{number},DIAG,12:00:00,x"))
            .replace("2025-07-02T15:00:00.000000Z", time)
            .replace(r#""source":"test""#, &format!(r#""source":"test","sourceip":"{ip}""#))
    });
    let array = aws_sdk_kinesis::primitives::Blob::new(format!("[{}]", events.join(",")));
    let put = kinesis.put_record().stream_name(STREAM).partition_key("some key").data(array);
    let sequence_number = put.send().await.expect("a put").sequence_number;

    let said = Arc::<Mutex<Vec<String>>>::default();
    let lines = said.clone();
    Worker::builder(&local.sdk_config(), STREAM, "sequence-monitor")
        .retrieval(Retrieval::Polling)
        .stop_when_idle(std::time::Duration::from_millis(500))
        .handler(move |_: &ShardId| {
            let lines = lines.clone();
            example::Watch::new(move |line| lines.lock().expect("a lock").push(line))
        })
        .build()
        .await
        .expect("a worker")
        .run(std::future::pending())
        .await
        .expect("a clean stop");

    let said = std::mem::take(&mut *said.lock().expect("a lock"));
    let (garbage, said): (Vec<_>, Vec<_>) =
        said.into_iter().partition(|line| line.contains("without a counter"));
    assert_eq!(garbage.len(), 1, "{garbage:?}");
    assert!(garbage[0].starts_with("10.0.0.2:") && garbage[0].contains(&sequence_number));
    assert_eq!(
        said,
        [
            "10.0.0.2 at 2025-07-02T16:00:00Z: 2 missing after 42",
            "10.0.0.2 at 2025-07-02T16:00:00Z: 45 came again",
            "10.0.0.2 at 2025-07-02T16:00:00Z: back from 45 to 30",
            "some key at 2025-07-02T16:00:00Z: 1 missing after 1",
            "10.0.0.3 at 2025-07-03T04:00:00Z: a new day: 7001 was followed by 1",
        ]
    );
}
