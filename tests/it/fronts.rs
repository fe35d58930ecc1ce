//! The worker as a stream of messages, and as something to poll.

use std::time::Duration;

use tokio_stream::StreamExt as _;
use tramline::{Retrieval, Worker, WorkerBuilder};

use crate::support::{LIMIT, Servers, lines};

const STREAM: &str = "ctd-ocs-raw-messages";

fn builder(servers: &Servers) -> WorkerBuilder<()> {
    Worker::builder(&servers.local.sdk_config(), STREAM, "rtr").retrieval(Retrieval::Polling)
}

async fn within_limit<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, what).await.expect("in time")
}

#[test]
fn p1_p6_what_a_stream_acknowledges_does_not_come_again_and_the_rest_does() {
    let servers = Servers::with_stream(STREAM, 1);
    for line in lines(0, 10) {
        servers.put_lines(STREAM, "k", &[line]);
    }
    servers.wait(async {
        let mut messages = builder(&servers).messages().await.expect("a worker");
        for expected in lines(0, 4) {
            let message = within_limit(messages.next()).await.expect("a message");
            assert_eq!(message.raw(), expected);
            message.ack();
        }
        let kept = within_limit(messages.next()).await.expect("a message");
        assert_eq!(kept.raw(), lines(4, 5)[0]);
        let finished = tokio::spawn(messages.finish());
        // The stop waits for it.
        tokio::time::sleep(Duration::from_millis(200)).await;
        kept.ack();
        within_limit(finished).await.expect("no panic").expect("a clean stop");

        let mut messages = builder(&servers).messages().await.expect("a worker");
        for expected in lines(5, 10) {
            let message = within_limit(messages.next()).await.expect("a message");
            assert_eq!(message.raw(), expected);
            message.ack();
        }
        within_limit(messages.finish()).await.expect("a clean stop");
    });
}

#[test]
fn p1_a_message_that_a_stream_refuses_or_drops_comes_again() {
    let servers = Servers::with_stream(STREAM, 1);
    servers.put_lines(STREAM, "k", &lines(0, 3));
    servers.wait(async {
        let mut messages = builder(&servers).messages().await.expect("a worker");
        let mut seen = Vec::new();
        for n in 0.. {
            let message = within_limit(messages.next()).await.expect("a message");
            seen.push(message.raw().to_owned());
            match n {
                0 => message.nack("not now"),
                1 => drop(message),
                _ => message.ack(),
            }
            if seen.len() == 5 {
                break;
            }
        }
        let mut again = seen[3..].to_vec();
        again.sort();
        assert_eq!((&seen[..3], &again[..]), (&lines(0, 3)[..], &lines(0, 2)[..]));
        within_limit(messages.finish()).await.expect("a clean stop");
    });
}

#[test]
fn a_stream_that_nobody_takes_from_holds_up_reading_and_not_the_stop() {
    let servers = Servers::with_stream(STREAM, 1);
    for chunk in lines(0, 3000).chunks(500) {
        servers.put_lines(STREAM, "k", chunk);
    }
    servers.wait(async {
        let messages = builder(&servers).max_unacked(1000).messages().await.expect("a worker");
        tokio::time::sleep(Duration::from_millis(500)).await;
        let report = within_limit(messages.finish()).await.expect("a clean stop");
        assert!(report.messages < 3000, "{report:?}");
    });
}

#[test]
fn p1_polling_gives_what_has_come_and_acknowledges_it_at_the_next_poll() {
    let servers = Servers::with_stream(STREAM, 1);
    servers.put_lines(STREAM, "k", &lines(0, 3));
    servers.wait(async {
        let mut poller = builder(&servers).poller().await.expect("a worker");
        let mut seen = Vec::new();
        while seen.len() < 3 {
            let polled = within_limit(poller.poll(None)).await.expect("it runs");
            seen.extend(polled.iter().map(|message| message.raw().to_owned()));
        }
        assert_eq!(seen, lines(0, 3));
        let nothing = poller.poll(Some(Duration::from_millis(50))).await.expect("it runs");
        assert!(nothing.is_empty());
        within_limit(poller.finish()).await.expect("a clean stop");
    });
    servers.put_lines(STREAM, "k", &lines(3, 5));
    servers.wait(async {
        let mut poller = builder(&servers).poller().await.expect("a worker");
        let polled = within_limit(poller.poll(None)).await.expect("it runs");
        assert_eq!(polled.first().map(|message| message.raw()), Some(lines(3, 4)[0].as_str()));
        // Not acknowledged.
        within_limit(poller.finish()).await.expect("a clean stop");
        let mut poller = builder(&servers).poller().await.expect("a worker");
        let polled = within_limit(poller.poll(None)).await.expect("it runs");
        assert_eq!(polled.first().map(|message| message.raw()), Some(lines(3, 4)[0].as_str()));
        within_limit(poller.finish()).await.expect("a clean stop");
    });
}

#[test]
fn a_poll_tells_why_the_worker_ended() {
    let servers = Servers::with_stream(STREAM, 1);
    servers.put_lines(STREAM, "k", &lines(0, 1));
    servers.wait(async {
        let retries = tramline::Retries { attempts: 1, ..Default::default() };
        let mut poller = builder(&servers).retries(retries).poller().await.expect("a worker");
        within_limit(poller.poll(None)).await.expect("it runs");
        poller.refuse("the database is away");
        let error = within_limit(poller.poll(None)).await.expect_err("the shard stopped");
        assert!(error.to_string().contains("the database is away"), "{error}");
    });
}
