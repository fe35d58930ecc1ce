//! The producer behind a proxy that does to its calls whatever networks and services do.
//!
//! `TRAMLINE_SEED=17 cargo test --test it produce_faults` runs one schedule again.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use aws_sdk_kinesis::{Client, types::ShardIteratorType};
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;
use tokio::{io::AsyncWriteExt as _, net::TcpStream, sync::oneshot};
use tramline::{
    BatchPolicy, ListenerSettings, OcsListener, PartitionKey, ProducerReport, ProducerSettings,
    Spool,
};

use crate::{
    proxy::{Fault, Proxy, Rule},
    support::{Servers, create_stream, lines},
};

const SCHEDULES: u64 = 24;
const CONNECTIONS: usize = 4;

#[derive(Clone)]
struct Dice(Arc<Mutex<ChaCha8Rng>>);

impl Dice {
    fn throw(&self, percent: u32) -> bool {
        self.0.lock().expect("a lock").random_range(0..100) < percent
    }
}

/// The proxy's rules, each with its chance in a hundred.
fn rules(seed: u64) -> Vec<Rule> {
    let dice = Dice(Arc::new(Mutex::new(ChaCha8Rng::seed_from_u64(seed))));
    let partly = {
        let dice = dice.clone();
        Box::new(move || match (dice.throw(50), dice.throw(50)) {
            (true, true) => Some("ProvisionedThroughputExceededException"),
            (true, false) => Some("InternalFailure"),
            (false, _) => None,
        })
    };
    let faults = [
        (5, Fault::Throttle),
        (5, Fault::Fail),
        (5, Fault::Refuse("ExpiredTokenException")),
        (5, Fault::Reset),
        (10, Fault::LoseAnswer),
        (10, Fault::Garble),
        (10, Fault::Delay(Duration::from_millis(30))),
        (30, Fault::Partly(partly)),
    ];
    let rule = |(percent, fault)| {
        let dice = dice.clone();
        Rule::on("PutRecords", fault).when(move |_| dice.throw(percent))
    };
    faults.into_iter().map(rule).collect()
}

/// The data of all records of the stream, by partition key, in order.
async fn records(kinesis: &Client, stream: &str) -> BTreeMap<String, Vec<Vec<u8>>> {
    let mut by_key: BTreeMap<String, Vec<Vec<u8>>> = BTreeMap::new();
    let shards = kinesis.list_shards().stream_name(stream).send().await.expect("shards");
    for shard in shards.shards() {
        let iterator = kinesis
            .get_shard_iterator()
            .stream_name(stream)
            .shard_id(shard.shard_id())
            .shard_iterator_type(ShardIteratorType::TrimHorizon);
        let mut next = iterator.send().await.expect("an iterator").shard_iterator;
        while let Some(iterator) = next {
            let read = kinesis.get_records().shard_iterator(iterator).send().await.expect("a read");
            if read.records().is_empty() {
                break;
            }
            for record in read.records() {
                let key = record.partition_key().expect("a key").to_owned();
                let data = record.data().as_ref().to_vec();
                by_key.entry(key).or_default().push(data);
            }
            next = read.next_shard_iterator;
        }
    }
    by_key
}

/// The id and the OCS line of each event.
fn events(record: &[u8]) -> Vec<(String, String)> {
    let events: Vec<Value> = serde_json::from_slice(record).expect("a JSON array");
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    events.iter().map(|event| (text(&event["id"]), text(&event["data"]["raw"]))).collect()
}

async fn send(address: SocketAddr, lines: Vec<String>, seed: u64) -> String {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut socket = TcpStream::connect(address).await.expect("a connection");
    let name = format!("{{{address} -> {}}}", socket.local_addr().expect("an address"));
    let bytes: Vec<u8> =
        lines.iter().flat_map(|line| line.bytes().chain([4]).collect::<Vec<_>>()).collect();
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(rng.random_range(1..=rest.len().min(300)));
        socket.write_all(piece).await.expect("a write");
        rest = after;
        if rng.random_bool(0.3) {
            tokio::time::sleep(Duration::from_millis(rng.random_range(0..20))).await;
        }
    }
    socket.shutdown().await.expect("a close");
    // The producer closes when it has read all.
    let _ = tokio::io::AsyncReadExt::read(&mut socket, &mut [0]).await;
    name
}

/// One schedule: connections through the proxy into a stream of their own.
async fn schedule(seed: u64, servers: Arc<Servers>) -> ProducerReport {
    let stream = format!("stream-{seed}");
    create_stream(&servers.kinesis, &stream, 2).await;
    let proxy = Proxy::start_on(&servers.local).await;
    rules(seed).into_iter().for_each(|rule| drop(proxy.add(rule)));
    let directory = tempfile::tempdir().expect("a directory");
    let settings = ListenerSettings {
        partition_key: PartitionKey::Connection,
        producer: ProducerSettings {
            spool: match seed % 2 {
                0 => Spool::Memory,
                _ => Spool::Directory(directory.path().to_owned()),
            },
            batch: BatchPolicy { delay: Duration::from_millis(5), ..Default::default() },
            shutdown_limit: Duration::from_secs(300),
            ..Default::default()
        },
        ..Default::default()
    };
    let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
    let config = proxy.sdk_config();
    let listener = OcsListener::bind(&config, &stream, any_port, settings).await;
    let listener = listener.expect("a listener");
    let address = listener.local_addr().expect("an address");
    let (stop, stopped) = oneshot::channel::<()>();
    let running = tokio::spawn(listener.run(async { drop(stopped.await) }));
    let sent = |n: usize| lines(n * 1000, n * 1000 + 200);
    let senders: Vec<_> =
        (0..CONNECTIONS).map(|n| tokio::spawn(send(address, sent(n), seed + n as u64))).collect();
    let mut expected = BTreeMap::new();
    for (n, sender) in senders.into_iter().enumerate() {
        expected.insert(sender.await.expect("a sender"), sent(n));
    }
    drop(stop);
    let report = running.await.expect("no panic").expect("everything is put");

    let mut found = BTreeMap::new();
    for (key, mut records) in records(&servers.kinesis, &stream).await {
        // What was put again is a copy, and follows directly.
        records.dedup();
        let events: Vec<_> = records.iter().flat_map(|record| events(record)).collect();
        let ids: std::collections::BTreeSet<_> = events.iter().map(|(id, _)| id).collect();
        assert_eq!(ids.len(), events.len(), "seed {seed}, {key}: a repeat that is no copy");
        found.insert(key, events.into_iter().map(|(_, line)| line).collect::<Vec<_>>());
    }
    assert!(found == expected, "seed {seed}: {found:?}");
    report
}

#[test]
fn p7_p8_whatever_happens_on_the_way_the_stream_holds_every_connection_in_order() {
    let given = std::env::var("TRAMLINE_SEED").ok().and_then(|seed| seed.parse().ok());
    let first: u64 = given.unwrap_or_else(|| u64::from(rand::random::<u32>()));
    let count = if given.is_some() { 1 } else { SCHEDULES };
    println!("TRAMLINE_SEED={first} and the {} that follow", count - 1);
    let servers = Arc::new(Servers::start());
    let schedules: Vec<_> =
        (first..first + count).map(|seed| servers.spawn(schedule(seed, servers.clone()))).collect();
    for (seed, running) in (first..).zip(schedules) {
        let report = servers.wait(running).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        assert_eq!(report.put, CONNECTIONS as u64 * 200);
    }
}
