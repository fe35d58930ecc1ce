//! The archive: the day's log in S3, each message once.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use crate::support::{Running, Servers, Traffic, event, lines, run, tramline, wait_for};

const STREAM: &str = "ctd-ocs-raw-messages";
const BUCKET: &str = "ocs-logs";
const KILLS: usize = 25;

fn servers(shards: i32) -> Arc<Servers> {
    let servers = Servers::with_stream(STREAM, shards);
    servers.wait(s3(&servers).create_bucket().bucket(BUCKET).send()).expect("a bucket");
    Arc::new(servers)
}

fn s3(servers: &Servers) -> aws_sdk_s3::Client {
    let config = aws_sdk_s3::config::Builder::from(&servers.local.sdk_config());
    aws_sdk_s3::Client::from_conf(config.force_path_style(true).build())
}

fn args<'a>(more: &[&'a str]) -> Vec<&'a str> {
    let output = "s3-archive://ocs-logs/raw";
    let args = ["consume", "--stream", STREAM, "--app", "archive", "--output", output];
    [&args, more].concat()
}

/// Short times, so that objects and checkpoints are many.
const OFTEN: [&str; 6] =
    ["--archive-interval", "30ms", "--checkpoint-interval", "20ms", "--lease-duration", "1s"];

/// The log of each day and shard: its objects in the order of their names, by `DATE/STREAM/SHARD`.
fn archived(servers: &Servers) -> BTreeMap<String, Vec<String>> {
    let client = s3(servers);
    servers.wait(async {
        let list = client.list_objects_v2().bucket(BUCKET).prefix("raw/");
        let mut pages = list.into_paginator().send();
        let mut keys = Vec::new();
        while let Some(page) = pages.next().await {
            let contents = page.expect("a list").contents.unwrap_or_default();
            keys.extend(contents.into_iter().filter_map(|object| object.key));
        }
        keys.sort();
        let mut logs: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for key in keys {
            let object = client.get_object().bucket(BUCKET).key(&key).send().await;
            let body = object.expect("an object").body.collect().await.expect("bytes").to_vec();
            let text = String::from_utf8(body).expect("text");
            assert!(text.ends_with('\n'), "{key}");
            let (folder, _) = key.rsplit_once('/').expect("a folder");
            let folder = folder.strip_prefix("raw/").expect("the prefix").to_owned();
            logs.entry(folder).or_default().extend(text.lines().map(str::to_owned));
        }
        logs
    })
}

/// The numbers of the messages of each shard, after checking what stands before them.
fn numbers(servers: &Servers) -> Vec<Vec<usize>> {
    let number = |line: &String| {
        let raw = line.strip_prefix("07/02/25,11:00:00,").expect("the time of the event");
        raw.split(',').next().expect("a number").parse().expect("a number")
    };
    archived(servers).values().map(|log| log.iter().map(number).collect()).collect()
}

/// Every message once, and those of each shard in their order.
#[track_caller]
fn check_once_and_in_order(servers: &Servers, count: usize) {
    let shards = numbers(servers);
    for numbers in &shards {
        assert!(numbers.is_sorted(), "{numbers:?}");
    }
    let mut all = shards.concat();
    all.sort_unstable();
    assert_eq!(all, (0..count).collect::<Vec<usize>>());
}

fn wait_for_everything(servers: &Servers, workers: &[&Running], count: usize) {
    wait_for("everything to be archived", || {
        let archived = numbers(servers).iter().map(Vec::len).sum::<usize>();
        for worker in workers {
            assert!(!worker.stderr().contains("ERROR"), "{}", worker.stderr());
        }
        (archived >= count).then_some(())
    });
}

#[test]
fn p1_each_message_is_archived_once_however_often_the_worker_is_killed() {
    let seed = std::env::var("TRAMLINE_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(rand::random::<u64>);
    println!("TRAMLINE_SEED={seed}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let servers = servers(2);
    let traffic = Traffic::start(&servers, STREAM);
    // The same name: it takes its own leases back at once.
    let args = args(&[&OFTEN[..], &["--worker-id", "only"]].concat());
    for _ in 0..KILLS {
        let mut worker = Running::start(servers.tramline(&args));
        worker.wait_for_log("lease taken");
        thread::sleep(Duration::from_millis(rng.random_range(0..600)));
        worker.kill();
    }
    let count = traffic.finish().len();
    let worker = Running::start(servers.tramline(&args));
    wait_for_everything(&servers, &[&worker], count);
    worker.stop().succeeded();
    check_once_and_in_order(&servers, count);
}

#[test]
fn p4_workers_that_hand_over_and_freeze_leave_each_message_once() {
    let servers = servers(2);
    let traffic = Traffic::start(&servers, STREAM);
    let first = Running::start(servers.tramline(&args(&OFTEN)));
    first.wait_for_log("lease taken");
    let second = Running::start(servers.tramline(&args(&OFTEN)));
    second.wait_for_log("lease taken");
    for _ in 0..3 {
        // It does not know that it lost its leases, and what it has read it writes when it wakes up.
        first.signal("STOP");
        let taken = second.stderr().matches("lease taken").count();
        wait_for("the other worker to take over", || {
            (second.stderr().matches("lease taken").count() > taken).then_some(())
        });
        first.signal("CONT");
        let taken = first.stderr().matches("lease taken").count();
        wait_for("a hand-over back", || {
            (first.stderr().matches("lease taken").count() > taken).then_some(())
        });
    }
    let count = traffic.finish().len();
    wait_for("everything to be archived", || {
        (numbers(&servers).iter().map(Vec::len).sum::<usize>() >= count).then_some(())
    });
    first.stop();
    second.stop();
    check_once_and_in_order(&servers, count);
}

#[test]
fn p6_what_waits_is_archived_at_a_clean_stop_and_starting_over_adds_nothing() {
    let servers = servers(1);
    servers.put_lines(STREAM, "key", &lines(0, 300));
    let long = ["--archive-interval", "1h", "--exit-when-idle", "500ms"];
    run(servers.tramline(&args(&long))).succeeded();
    check_once_and_in_order(&servers, 300);
    servers.put_lines(STREAM, "key", &lines(300, 400));
    // From the beginning, whatever was archived.
    run(servers.tramline(&args(&[&long[..], &["--no-checkpoint"]].concat()))).succeeded();
    check_once_and_in_order(&servers, 400);
}

#[test]
fn an_object_is_written_before_reading_would_wait_for_it() {
    let servers = servers(1);
    for n in 0..30 {
        servers.put_lines(STREAM, "key", &lines(n * 1000, (n + 1) * 1000));
    }
    let worker = Running::start(servers.tramline(&args(&["--archive-interval", "1h"])));
    wait_for_everything(&servers, &[&worker], 24_000);
    worker.stop().succeeded();
    check_once_and_in_order(&servers, 30_000);
}

#[test]
fn a_batch_of_two_service_days_goes_to_both() {
    let servers = servers(1);
    let at = |n: usize, time: &str| {
        event(&format!("{n},DIAG,x")).replace("2025-07-02T15:00:00.000000Z", time)
    };
    // 02:00 in New York divides them; senders' clocks differ.
    let times = ["05:59:59.9", "06:00:00.1", "05:59:59.95", "06:00:01.0"];
    let events: Vec<String> =
        (0..).zip(times).map(|(n, time)| at(n, &format!("2025-07-02T{time}Z"))).collect();
    servers.put(STREAM, "key", format!("[{}]", events.join(",")));
    run(servers.tramline(&args(&["--exit-when-idle", "500ms"]))).succeeded();
    let logs = archived(&servers);
    let day = |date: &str| logs[&format!("{date}/{STREAM}/shardId-000000000000")].clone();
    assert_eq!(day("2025-07-01"), ["07/02/25,01:59:59,0,DIAG,x", "07/02/25,01:59:59,2,DIAG,x"]);
    assert_eq!(day("2025-07-02"), ["07/02/25,02:00:00,1,DIAG,x", "07/02/25,02:00:01,3,DIAG,x"]);
}

/// Something between the worker and S3 that is away now and then.
#[derive(Default)]
struct Front {
    /// How many of the next puts do not reach S3.
    refuse: AtomicUsize,
    /// Of how many of the next puts the answer gets lost.
    lose: AtomicUsize,
    /// How many of the next puts are not allowed.
    deny: AtomicUsize,
}

impl Front {
    /// Gives its address too.
    fn start(servers: &Servers) -> (Arc<Self>, String) {
        let environment: BTreeMap<&str, &str> = servers.local.environment().into_iter().collect();
        let s3 = environment["AWS_ENDPOINT_URL_S3"].trim_start_matches("http://").to_owned();
        let listener = servers.wait(TcpListener::bind("127.0.0.1:0")).expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let front = Arc::new(Self::default());
        let accepting = front.clone();
        servers.spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (front, s3) = (accepting.clone(), s3.clone());
                tokio::spawn(async move { front.pass(client, &s3).await });
            }
        });
        (front, url)
    }

    async fn pass(&self, mut client: TcpStream, s3: &str) {
        let one = |count: &AtomicUsize| {
            let less = |count: usize| count.checked_sub(1);
            count.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).is_ok()
        };
        let mut server = TcpStream::connect(s3).await.expect("the embedded S3");
        let (mut from_client, mut from_server) = (vec![0; 1 << 16], vec![0; 1 << 16]);
        let mut is_put = false;
        loop {
            tokio::select! {
                read = client.read(&mut from_client) => {
                    let Ok(length @ 1..) = read else { return };
                    let bytes = &from_client[..length];
                    // A request begins with its method; the next comes after the answer.
                    if bytes.starts_with(b"PUT ") {
                        is_put = true;
                        if one(&self.refuse) { return }
                        if one(&self.deny) {
                            let answer = "<Error><Code>AccessDenied</Code><Message>no</Message></Error>";
                            let head = "HTTP/1.1 403 Forbidden\r\nconnection: close\r\ncontent-type: \
                                        application/xml\r\ncontent-length: ";
                            let answer = format!("{head}{}\r\n\r\n{answer}", answer.len());
                            let _ = client.write_all(answer.as_bytes()).await;
                            while matches!(client.read(&mut from_client).await, Ok(1..)) {}
                            return;
                        }
                    } else if bytes.starts_with(b"GET ") || bytes.starts_with(b"HEAD ") {
                        is_put = false;
                    }
                    if server.write_all(bytes).await.is_err() { return }
                }
                read = server.read(&mut from_server) => {
                    let Ok(length @ 1..) = read else { return };
                    if is_put && one(&self.lose) { return }
                    if client.write_all(&from_server[..length]).await.is_err() { return }
                }
            }
        }
    }
}

#[test]
fn p1_nothing_is_lost_or_doubled_while_s3_is_away() {
    let servers = servers(1);
    let (front, url) = Front::start(&servers);
    let mut command = servers.tramline(&args(&OFTEN));
    command.env("AWS_ENDPOINT_URL_S3", url);
    let worker = Running::start(command);
    for (n, away) in [&front.refuse, &front.lose].into_iter().cycle().take(4).enumerate() {
        // The SDK makes three attempts: each of its calls fails a few times.
        away.store(8, Ordering::SeqCst);
        for part in 0..4 {
            let from = n * 40 + part * 10;
            servers.put_lines(STREAM, "key", &lines(from, from + 10));
        }
        wait_for("the calls to fail", || (away.load(Ordering::SeqCst) == 0).then_some(()));
        wait_for_everything(&servers, &[&worker], (n + 1) * 40);
    }
    let finished = worker.stop().succeeded();
    assert!(finished.stderr.contains("trying again until it works"), "{}", finished.stderr);
    check_once_and_in_order(&servers, 160);
}

#[test]
fn a_missing_permission_stops_it_at_first_and_is_waited_for_later() {
    let servers = servers(1);
    let (front, url) = Front::start(&servers);
    let worker = || {
        let mut command = servers.tramline(&args(&OFTEN));
        command.env("AWS_ENDPOINT_URL_S3", &url);
        Running::start(command)
    };
    servers.put_lines(STREAM, "key", &lines(0, 10));
    front.deny.store(usize::MAX, Ordering::SeqCst);
    let finished = worker().finish();
    assert_eq!(finished.status.code(), Some(1));
    let told = "s3:PutObject is not allowed";
    assert!(finished.stderr.contains(told), "{}", finished.stderr);

    front.deny.store(0, Ordering::SeqCst);
    let worker = worker();
    wait_for_everything(&servers, &[&worker], 10);
    front.deny.store(3, Ordering::SeqCst);
    servers.put_lines(STREAM, "key", &lines(10, 20));
    worker.wait_for_log(told);
    wait_for_everything(&servers, &[&worker], 20);
    worker.stop().succeeded();
    check_once_and_in_order(&servers, 20);
}

#[test]
fn a_bucket_that_is_not_there_and_a_wrong_output_are_told_at_once() {
    let servers = Servers::with_stream(STREAM, 1);
    let finished = run(servers.tramline(&args(&[])));
    assert_eq!(finished.status.code(), Some(1));
    assert!(finished.stderr.contains("s3://ocs-logs/raw"), "{}", finished.stderr);
    let wrong = ["consume", "--stream", STREAM, "--app", "a", "--output", "s3-archive://"];
    assert_eq!(run(tramline(&wrong)).status.code(), Some(2));
}

#[test]
fn what_was_archived_is_replayed_as_it_was_sent() {
    let servers = servers(1);
    let raws: Vec<String> = (0..500)
        .map(|n| format!("{n},TMOV,11:00:00,R,54{n:06X},42.1,-71.2,0,0, 98,S{n},, é \"q\" \\ "))
        .collect();
    for part in raws.chunks(50) {
        servers.put_lines(STREAM, "key", part);
    }
    let often = ["--archive-interval", "5ms", "--exit-when-idle", "500ms"];
    run(servers.tramline(&args(&often))).succeeded();
    let logs = archived(&servers);
    let log: String = logs.values().flatten().flat_map(|line| [line, "\n"]).collect();
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("day.txt");
    std::fs::write(&path, log).expect("a file");

    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let to = listener.local_addr().expect("an address").to_string();
    let path = path.to_str().expect("a name");
    let replay = Running::start(tramline(&["replay", path, "--to", &to]));
    let (mut socket, _) = listener.accept().expect("a connection");
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut socket, &mut bytes).expect("everything");
    replay.finish().succeeded();
    let sent: String = raws.iter().flat_map(|raw| [raw, "\x04"]).collect();
    assert_eq!(String::from_utf8(bytes).expect("text"), sent);
}
