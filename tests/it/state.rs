//! Positions and handler state in S3 and in files: one suite over every kind of place, and, where the
//! notions are the same, over the lease table.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use aws_sdk_s3::{config::retry::RetryConfig, primitives::ByteStream};
use aws_types::{SdkConfig, region::Region};
use bytes::Bytes;
use futures_util::future::join_all;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::timeout,
};
use tramline::{
    AwsErrorKind, LeaseError, SequenceNumber, ShardId,
    checkpoint::{
        Checkpoint, Checkpoints, Position, Saved, ShardState, StateError, StateStore, Writer,
    },
    lease::{
        Change, HeldLease, InitialPosition, LeaseLoop, LeaseStore as _, Settings,
        dynamodb::LeaseTable,
    },
    local::{Local, LocalSettings},
    shard::Shard,
};

use crate::support::LIMIT;

const BUCKET: &str = "rtr-state";

/// A place for state, as a worker would be told it.
struct Bed {
    local: Arc<Local>,
    _folder: Arc<tempfile::TempDir>,
    place: Checkpoints,
}

impl Bed {
    fn store(&self, worker: &str) -> StateStore {
        self.store_for(worker, "rtr-green", "ocs")
    }

    fn store_for(&self, worker: &str, application: &str, stream: &str) -> StateStore {
        let writer = Writer {
            application: application.into(),
            stream: stream.into(),
            worker: worker.into(),
        };
        StateStore::new(&self.local.sdk_config(), &self.place, writer)
            .expect("a usable place")
            .expect("a place for state")
    }

    fn is_file(&self) -> bool {
        matches!(self.place, Checkpoints::File { .. })
    }

    /// The document of a shard, as it is.
    async fn document(&self, shard: &ShardId) -> Option<Bytes> {
        match self.address(shard) {
            Address::S3(s3, key) => {
                let got = s3.get_object().bucket(BUCKET).key(key).send().await.ok()?;
                Some(got.body.collect().await.expect("a body").into_bytes())
            }
            Address::File(path) => std::fs::read(path).ok().map(Bytes::from),
        }
    }

    /// Puts a document there as a person would, or takes it away.
    async fn put(&self, shard: &ShardId, document: Option<Bytes>) {
        match (self.address(shard), document) {
            (Address::S3(s3, key), Some(document)) => {
                let body = ByteStream::from(document);
                s3.put_object().bucket(BUCKET).key(key).body(body).send().await.expect("a put");
            }
            (Address::S3(s3, key), None) => {
                s3.delete_object().bucket(BUCKET).key(key).send().await.expect("a delete");
            }
            (Address::File(path), Some(document)) => {
                std::fs::write(path, document).expect("a file")
            }
            (Address::File(path), None) => std::fs::remove_file(path).expect("a file"),
        }
    }

    fn address(&self, shard: &ShardId) -> Address {
        let text = self.place.to_string().replace("{shard}", shard.as_str());
        match text.strip_prefix("file://") {
            Some(path) => Address::File(path.to_owned()),
            None => {
                let s3 = aws_sdk_s3::Client::new(&self.local.sdk_config());
                Address::S3(s3, text.rsplit('/').next().expect("a key").to_owned())
            }
        }
    }
}

enum Address {
    S3(aws_sdk_s3::Client, String),
    File(String),
}

/// Every kind of place.
async fn beds() -> Vec<Bed> {
    let local = Local::start(LocalSettings::default()).await.expect("embedded servers");
    let s3 = aws_sdk_s3::Client::new(&local.sdk_config());
    s3.create_bucket().bucket(BUCKET).send().await.expect("a bucket");
    let folder = Arc::new(tempfile::tempdir().expect("a folder"));
    let local = Arc::new(local);
    let files = folder.path().join("all.state");
    let file_per_shard = folder.path().join("{shard}.state");
    [
        Checkpoints::s3(BUCKET, "all.state"),
        Checkpoints::s3(BUCKET, "{shard}.state"),
        Checkpoints::file(files),
        Checkpoints::file(file_per_shard),
    ]
    .map(|place| Bed { local: local.clone(), _folder: folder.clone(), place })
    .into()
}

fn at(number: u64) -> Checkpoint {
    Checkpoint::At(Position {
        sequence_number: SequenceNumber::parse(format!("4959{number:052}")).expect("a number"),
        sub_sequence_number: number % 3,
    })
}

fn state(text: &str) -> Option<Bytes> {
    Some(Bytes::copy_from_slice(text.as_bytes()))
}

async fn save(kept: &ShardState, number: u64) -> Result<(), StateError> {
    kept.save(&at(number), None, state(&format!("state {number}\n\0"))).await
}

#[track_caller]
fn assert_saved(saved: &Saved, number: u64, bed: &Bed) {
    let expected = (Some(at(number)), state(&format!("state {number}\n\0")));
    assert_eq!((saved.checkpoint.clone(), saved.state.clone()), expected, "{}", bed.place);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_saved_is_found_again() {
    for bed in beds().await {
        let (a, b) = (ShardId::from("shardId-0"), ShardId::from("shardId-1"));
        let store = bed.store("w");
        let (kept_a, saved) = store.open(&a, 1).await.expect("open");
        assert_eq!(saved, Saved { lease_counter: 1, ..Saved::default() }, "{}", bed.place);
        let (kept_b, _) = store.open(&b, 5).await.expect("open");
        save(&kept_a, 7).await.expect("saved");
        let pinned = Some("2025-07-02T15:00:00.123Z".parse().expect("a time"));
        kept_b.save(&Checkpoint::Latest, pinned, None).await.expect("saved");
        drop((kept_a, kept_b, store));

        let store = bed.store("w");
        let loaded = store.load().await.expect("loaded");
        if bed.place.is_per_shard() {
            assert_eq!(loaded, BTreeMap::new());
        } else {
            assert_saved(&loaded[&a], 7, &bed);
            assert_eq!(loaded[&b].lease_counter, 5);
        }
        let (kept_a, saved) = store.open(&a, 2).await.expect("open");
        assert_saved(&saved, 7, &bed);
        let (_, saved) = store.open(&b, 6).await.expect("open");
        let latest = Some(Checkpoint::Latest);
        assert_eq!((saved.checkpoint, saved.start_at, saved.state), (latest, pinned, None));

        kept_a.save(&Checkpoint::ShardEnd, None, None).await.expect("saved");
        drop((kept_a, store));
        let (_, saved) = bed.store("w").open(&a, 3).await.expect("open");
        assert_eq!((saved.checkpoint, saved.state), (Some(Checkpoint::ShardEnd), None));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn p4_a_second_writer_is_told_who_writes_and_nothing_is_overwritten() {
    for bed in beds().await {
        let shard = ShardId::from("shardId-0");
        let (first, second) = (bed.store("first"), bed.store("second"));
        let (kept, _) = first.open(&shard, 1).await.expect("open");
        save(&kept, 7).await.expect("saved");

        if bed.is_file() {
            let told = second.open(&shard, 2).await.expect_err("locked");
            assert!(matches!(told, StateError::Locked { .. }) && told.is_transient(), "{told}");
            let holder = format!("worker first, process {}, since ", std::process::id());
            assert!(told.to_string().contains(&holder), "{told}");
            save(&kept, 8).await.expect("it is still ours");
            drop((kept, first));
            assert_saved(&second.open(&shard, 2).await.expect("open").1, 8, &bed);
        } else {
            let (theirs, saved) = second.open(&shard, 2).await.expect("open");
            assert_saved(&saved, 7, &bed);
            save(&theirs, 8).await.expect("saved");
            let before = bed.document(&shard).await;
            for number in [9, 10] {
                let told = save(&kept, number).await.expect_err("taken over");
                assert!(matches!(told, StateError::OtherWriter { .. }), "{told}");
                assert!(told.to_string().contains("by worker second at 2"), "{told}");
                assert!(!told.is_transient());
            }
            assert_eq!(bed.document(&shard).await, before, "nothing is overwritten");
            save(&theirs, 11).await.expect("saved");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn p4_an_earlier_owner_of_the_lease_is_refused() {
    for bed in beds().await {
        let shard = ShardId::from("shardId-0");
        let store = bed.store("later");
        let (kept, _) = store.open(&shard, 7).await.expect("open");
        save(&kept, 1).await.expect("saved");
        drop((kept, store));
        let before = bed.document(&shard).await;

        for fence in [6, 7] {
            let told = bed.store("earlier").open(&shard, fence).await.expect_err("refused");
            assert!(matches!(told, StateError::Fenced { stored: 7, .. }), "{}: {told}", bed.place);
            let text = told.to_string();
            let counters = format!("with lease counter 7, and this worker has {fence}");
            assert!(text.contains("worker later wrote") || !bed.place.is_per_shard(), "{text}");
            assert!(text.contains(&counters), "{text}");
        }
        if bed.place.is_per_shard() {
            assert_eq!(bed.document(&shard).await, before, "nothing is overwritten");
        }
        assert_saved(&bed.store("next").open(&shard, 8).await.expect("open").1, 1, &bed);
    }
}

/// Such as one on a stream where nothing came.
#[tokio::test(flavor = "multi_thread")]
async fn p1_a_worker_that_stored_nothing_yet_is_followed_by_another() {
    for bed in beds().await.into_iter().filter(|bed| !bed.place.is_per_shard()) {
        let shard = ShardId::from("shardId-0");
        for _ in 0..3 {
            // The leases of its only worker begin anew with each process.
            let store = bed.store("w");
            assert_eq!(store.load().await.expect("loaded"), BTreeMap::new(), "{}", bed.place);
            store.open(&shard, 1).await.expect("open");
        }
    }
}

/// Within one process too: a task that was slow to learn that its lease was lost.
#[tokio::test(flavor = "multi_thread")]
async fn p4_an_earlier_tenure_of_the_same_worker_is_refused() {
    for bed in beds().await.into_iter().filter(|bed| !bed.is_file() || !bed.place.is_per_shard()) {
        let shard = ShardId::from("shardId-0");
        let store = bed.store("w");
        let (earlier, _) = store.open(&shard, 1).await.expect("open");
        save(&earlier, 1).await.expect("saved");
        let (later, _) = store.open(&shard, 2).await.expect("open");
        save(&later, 2).await.expect("saved");
        let told = save(&earlier, 3).await.expect_err("refused");
        let expected = match bed.place.is_per_shard() {
            true => matches!(told, StateError::OtherWriter { .. }),
            false => matches!(told, StateError::Fenced { .. }),
        };
        assert!(expected, "{}: {told}", bed.place);
        save(&later, 4).await.expect("saved");
        drop((earlier, later, store));
        assert_saved(&bed.store("w").open(&shard, 3).await.expect("open").1, 4, &bed);
    }
}

/// Where checkpoints are kept, whether in a document or in the lease table.
enum Keeper {
    State(ShardState),
    Lease(Arc<HeldLease<LeaseTable>>),
}

impl Keeper {
    /// The error tells whether the shard is lost.
    async fn save(&self, checkpoint: Checkpoint) -> Result<(), bool> {
        match self {
            Self::State(kept) => match kept.save(&checkpoint, None, None).await {
                Ok(()) => Ok(()),
                Err(error) => Err(matches!(error, StateError::OtherWriter { .. })),
            },
            Self::Lease(held) => match held.write(&Change::Checkpoint { checkpoint }).await {
                Ok(()) => Ok(()),
                Err(error) => Err(matches!(error, LeaseError::Lost { .. })),
            },
        }
    }
}

/// The lease table keeps the same promise, so that a worker may be given either.
#[tokio::test(flavor = "multi_thread")]
async fn p3_p4_documents_and_the_lease_table_refuse_an_earlier_owner_alike() {
    let shard = ShardId::from("shardId-0");
    let beds = beds().await;
    let table = LeaseTable::new(&beds[0].local.sdk_config(), "rtr-green");
    table.ensure().await.expect("a table");
    let listed = Shard {
        id: shard.clone(),
        parents: vec![],
        hash_key_range: None,
        closed: false,
        begins: None,
    };
    let settings = Settings {
        worker: "first".into(),
        max_leases: 1,
        lease_duration: Duration::from_secs(60),
        hand_over_limit: Duration::from_secs(60),
        finished_kept_for: Duration::from_secs(360),
        seed: 1,
        wall_clock: jiff::Timestamp::now,
    };
    let mut leases = LeaseLoop::new(table.clone(), settings);
    let start = InitialPosition::TrimHorizon;
    let mut taken = leases.look(Some((&[listed], start))).await.expect("a lease").taken;
    let held = taken.pop().expect("the only worker takes it");

    let mut keepers = vec![("the lease table", None, Keeper::Lease(held))];
    for bed in beds.iter().filter(|bed| !bed.is_file()) {
        let (kept, _) = bed.store("first").open(&shard, 1).await.expect("open");
        keepers.push(("a document", Some(bed), Keeper::State(kept)));
    }
    for (what, bed, first) in keepers {
        assert_eq!(first.save(at(7)).await, Ok(()), "{what}");
        let found = match bed {
            None => {
                let mut seen = table.get(&shard).await.expect("a table").expect("a lease");
                let take = Change::Take { worker: "second".into(), at: jiff::Timestamp::now() };
                Some(table.update(&mut seen, &take).await.expect("taken").checkpoint)
            }
            Some(bed) => bed.store("second").open(&shard, 2).await.expect("open").1.checkpoint,
        };
        assert_eq!(found, Some(at(7)), "{what}: the next owner goes on from there");
        assert_eq!(first.save(at(8)).await, Err(true), "{what}: refused as lost");
        let left = match bed {
            None => table.get(&shard).await.expect("a table").map(|lease| lease.checkpoint),
            Some(bed) => bed.store("third").open(&shard, 3).await.expect("open").1.checkpoint,
        };
        assert_eq!(left, Some(at(7)), "{what}: and not written");
    }
}

/// Whoever takes a document over while its owner writes sees exactly what the owner was told is stored.
#[tokio::test(flavor = "multi_thread")]
async fn p3_p4_a_take_over_amid_writes_loses_none_that_was_acknowledged() {
    for bed in beds().await.into_iter().filter(|bed| !bed.is_file()) {
        let shard = ShardId::from("shardId-0");
        for round in 0..5 {
            let owner = bed.store("owner");
            let (kept, _) = owner.open(&shard, 2 * round + 1).await.expect("open");
            save(&kept, 1000 * round).await.expect("saved");
            let saves = tokio::spawn(async move {
                let mut number = 1000 * round;
                loop {
                    match save(&kept, number + 1).await {
                        Ok(()) => number += 1,
                        Err(StateError::OtherWriter { .. }) => return number,
                        Err(error) => panic!("{error}"),
                    }
                }
            });
            // Any moment will do.
            tokio::time::sleep(Duration::from_millis(20 + 3 * round)).await;
            let taker = bed.store("taker");
            let taken = timeout(LIMIT, taker.open(&shard, 2 * round + 2)).await;
            let (_, taken) = taken.expect("in time").expect("open");
            let acknowledged = timeout(LIMIT, saves).await.expect("in time").expect("no panic");
            assert_saved(&taken, acknowledged, &bed);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn p4_a_save_that_was_not_waited_for_is_not_taken_for_another_writer() {
    for bed in beds().await {
        let shard = ShardId::from("shardId-0");
        let store = bed.store("w");
        let (kept, _) = store.open(&shard, 1).await.expect("open");
        for number in 0..40 {
            let dropped = timeout(Duration::from_micros(150 * number), save(&kept, number));
            if let Ok(result) = dropped.await {
                result.expect("saved");
            }
        }
        save(&kept, 99).await.expect("saved");
        drop((kept, store));
        // A write of a file that was not waited for may still have the lock for a moment.
        let next = bed.store("next");
        let (_, saved) = loop {
            match next.open(&shard, 2).await {
                Err(StateError::Locked { .. }) => {
                    tokio::time::sleep(Duration::from_millis(1)).await
                }
                opened => break opened.expect("open"),
            }
        };
        assert_saved(&saved, 99, &bed);
    }
}

/// Something between us and S3 that loses answers, and counts puts.
#[derive(Default)]
struct Proxy {
    puts: AtomicUsize,
    /// How many of the next answers to a put get lost.
    lose: AtomicUsize,
}

impl Proxy {
    async fn start(local: &Local, servers: &mut JoinSet<()>) -> (Arc<Self>, SdkConfig) {
        let environment = BTreeMap::from(local.environment());
        let s3 = environment["AWS_ENDPOINT_URL_S3"].trim_start_matches("http://").to_owned();
        let proxy = Arc::new(Self::default());
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        servers.spawn({
            let proxy = proxy.clone();
            async move {
                let mut connections = JoinSet::new();
                while let Ok((client, _)) = listener.accept().await {
                    let (proxy, s3) = (proxy.clone(), s3.clone());
                    connections.spawn(async move { proxy.pass(client, &s3).await });
                }
            }
        });
        // By its name, as servers in a container are reached: the bucket has to go into the path.
        (proxy, sdk_config(local, &format!("http://localhost:{port}")))
    }

    fn loses(&self) -> bool {
        let one_less = |count: usize| count.checked_sub(1);
        self.lose.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less).is_ok()
    }

    async fn pass(&self, mut client: TcpStream, s3: &str) {
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
                        self.puts.fetch_add(1, Ordering::SeqCst);
                    } else if bytes.starts_with(b"GET ") {
                        is_put = false;
                    }
                    if server.write_all(bytes).await.is_err() { return }
                }
                read = server.read(&mut from_server) => {
                    let Ok(length @ 1..) = read else { return };
                    if is_put && self.loses() { return }
                    if client.write_all(&from_server[..length]).await.is_err() { return }
                }
            }
        }
    }
}

/// The configuration of the embedded servers, with S3 at another address.
fn sdk_config(local: &Local, endpoint: &str) -> SdkConfig {
    let config = local.sdk_config();
    SdkConfig::builder()
        .behavior_version(aws_sdk_s3::config::BehaviorVersion::latest())
        .region(Region::from_static("us-east-1"))
        .credentials_provider(config.credentials_provider().expect("credentials"))
        .endpoint_url(endpoint)
        .retry_config(RetryConfig::standard().with_initial_backoff(Duration::from_millis(5)))
        .build()
}

fn store_by(config: &SdkConfig, place: &Checkpoints, worker: &str) -> StateStore {
    let (application, stream) = ("rtr-green".into(), "ocs".into());
    let writer = Writer { application, stream, worker: worker.into() };
    StateStore::new(config, place, writer).expect("usable").expect("a place for state")
}

#[tokio::test(flavor = "multi_thread")]
async fn p4_a_write_whose_answer_got_lost_is_known_as_our_own() {
    let mut servers = JoinSet::new();
    for bed in beds().await.into_iter().filter(|bed| !bed.is_file()) {
        let (proxy, config) = Proxy::start(&bed.local, &mut servers).await;
        let shard = ShardId::from("shardId-0");
        let store = store_by(&config, &bed.place, "w");
        let lose = |answers| proxy.lose.store(answers, Ordering::SeqCst);
        let all_lost = || proxy.lose.load(Ordering::SeqCst) == 0;
        // The SDK makes three attempts. One that gets its answer is refused, because of those before it.
        for (number, answers) in [(1, 1), (2, 2)] {
            lose(answers);
            let (kept, _) = store.open(&shard, number).await.expect("known as our own");
            assert!(all_lost());
            lose(answers);
            save(&kept, number).await.expect("known as our own");
            assert!(all_lost());
        }
        // When all get lost, the caller tries again.
        lose(3);
        let told = store.open(&shard, 3).await.expect_err("no answer");
        assert!(all_lost() && told.is_transient(), "{told}");
        let (kept, saved) = store.open(&shard, 3).await.expect("the same again");
        assert_saved(&saved, 2, &bed);
        lose(3);
        let told = save(&kept, 4).await.expect_err("no answer");
        assert!(all_lost() && told.is_transient(), "{told}");
        assert!(told.to_string().contains("s3:PutObject got no answer"), "{told}");
        save(&kept, 5).await.expect("on top of our own");

        // And another's is still another's.
        let (_, saved) = bed.store("other").open(&shard, 6).await.expect("open");
        assert_saved(&saved, 5, &bed);
        lose(1);
        let told = save(&kept, 7).await.expect_err("taken over");
        assert!(all_lost() && matches!(told, StateError::OtherWriter { .. }), "{told}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn saves_of_several_shards_in_one_document_share_writes() {
    const ROUNDS: usize = 10;
    let mut servers = JoinSet::new();
    let shards: Vec<ShardId> = (0..8).map(|n| format!("shardId-{n}").into()).collect();
    for bed in beds().await {
        let (proxy, config) = Proxy::start(&bed.local, &mut servers).await;
        let store = store_by(&config, &bed.place, "w");
        let opened = join_all(shards.iter().map(|shard| store.open(shard, 1))).await;
        let kept: Vec<_> = opened.into_iter().map(|opened| opened.expect("open").0).collect();
        proxy.puts.store(0, Ordering::SeqCst);
        for round in 0..ROUNDS as u64 {
            let saves = kept.iter().zip(0..).map(|(kept, n)| save(kept, 10 * round + n));
            for saved in join_all(saves).await {
                saved.expect("saved");
            }
        }
        let puts = proxy.puts.load(Ordering::SeqCst);
        match (&bed.place, bed.place.is_per_shard()) {
            // At most the first save of a round goes alone; the others wait for it, and go together.
            (Checkpoints::S3 { .. }, false) => assert!(puts <= 2 * ROUNDS, "{puts} puts"),
            (Checkpoints::S3 { .. }, true) => assert_eq!(puts, 8 * ROUNDS),
            _ => {}
        }
        drop((kept, store));
        let store = bed.store("next");
        for (shard, n) in shards.iter().zip(0..) {
            let (_, saved) = store.open(shard, 2).await.expect("open");
            assert_saved(&saved, 10 * (ROUNDS as u64 - 1) + n, &bed);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_or_foreign_document_is_refused_with_advice_and_left_as_it_is() {
    for bed in beds().await {
        let shard = ShardId::from("shardId-0");
        let (kept, _) = bed.store("w").open(&shard, 1).await.expect("open");
        save(&kept, 7).await.expect("saved");
        drop(kept);
        let good = bed.document(&shard).await.expect("a document");

        let cut = good.slice(..good.len() - 1);
        let mut changed = good.to_vec();
        let digit = good.windows(4).position(|text| text == b"4959").expect("a checkpoint");
        changed[digit] = b'5';
        let newer = Bytes::from_static(b"{\"version\":2}\nwhatever comes then");
        for (document, texts) in [
            (
                cut,
                ["bytes where its header promises", "put an earlier version back, or move it away"],
            ),
            (changed.into(), ["its checksum does not match", "with new state"]),
            (
                Bytes::from_static(b"{\"green\":1}\n"),
                ["not the header of a state document", "move it away"],
            ),
            (Bytes::new(), ["not the header of a state document", "move it away"]),
            (newer, ["format 2", "this version of Tramline"]),
        ] {
            bed.put(&shard, Some(document.clone())).await;
            let told = bed.store("w").open(&shard, 2).await.expect_err("refused");
            for text in texts {
                assert!(told.to_string().contains(text), "{text:?} is missing: {told}");
            }
            assert!(!told.is_transient());
            assert_eq!(bed.document(&shard).await, Some(document), "{}", bed.place);
        }

        bed.put(&shard, Some(good.clone())).await;
        for (application, stream) in [("rtr-red", "ocs"), ("rtr-green", "other")] {
            let store = bed.store_for("w", application, stream);
            let told = store.open(&shard, 2).await.expect_err("refused");
            assert!(matches!(told, StateError::Foreign { .. }), "{told}");
            assert!(told.to_string().contains("application rtr-green and stream ocs"), "{told}");
        }
        assert_eq!(bed.document(&shard).await, Some(good));
        assert_saved(&bed.store("w").open(&shard, 2).await.expect("open").1, 7, &bed);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_person_puts_there_is_not_overwritten_and_what_is_deleted_is_written_again() {
    for bed in beds().await {
        let shard = ShardId::from("shardId-0");
        let (kept, _) = bed.store("w").open(&shard, 1).await.expect("open");
        save(&kept, 7).await.expect("saved");
        let earlier = bed.document(&shard).await;
        bed.put(&shard, None).await;
        save(&kept, 8).await.expect("written again");
        save(&kept, 9).await.expect("saved");

        bed.put(&shard, earlier.clone()).await;
        let told = save(&kept, 10).await.expect_err("refused");
        assert!(matches!(told, StateError::OtherWriter { .. }), "{}: {told}", bed.place);
        assert!(told.to_string().contains("somebody put another version there"), "{told}");
        assert_eq!(bed.document(&shard).await, earlier, "{}", bed.place);
        drop(kept);
        assert_saved(&bed.store("w").open(&shard, 2).await.expect("open").1, 7, &bed);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn state_that_does_not_fit_is_refused_and_costs_nothing_else() {
    for bed in beds().await {
        let (a, b) = (ShardId::from("shardId-0"), ShardId::from("shardId-1"));
        let store = bed.store("w");
        let (kept_a, _) = store.open(&a, 1).await.expect("open");
        let (kept_b, _) = store.open(&b, 1).await.expect("open");
        save(&kept_a, 7).await.expect("saved");
        let state = Bytes::from(vec![b'x'; 64 << 20]);
        let told = kept_a.save(&at(8), None, Some(state.clone())).await.expect_err("too large");
        assert!(matches!(told, StateError::TooLarge { .. }) && !told.is_transient(), "{told}");
        for text in ["64 MiB", "{shard}", "keep it in a database and store only its version"] {
            assert!(told.to_string().contains(text), "{told}");
        }
        save(&kept_b, 9).await.expect("the other shard is saved all the same");

        // Sums over many bytes take seconds in a debug build: not everywhere.
        let large = bed.is_file() && !bed.place.is_per_shard();
        let fits = state.slice(..if large { 33 << 20 } else { 2 << 20 });
        kept_a.save(&at(10), None, Some(fits.clone())).await.expect("it fits");
        if large {
            let told =
                kept_b.save(&at(11), None, Some(fits.clone())).await.expect_err("one too many");
            assert!(matches!(told, StateError::TooLarge { .. }), "{told}");
        }
        drop((kept_a, kept_b, store));
        if let Address::File(path) = bed.address(&a) {
            std::fs::File::create(path)
                .and_then(|file| file.set_len((64 << 20) + 1))
                .expect("a file");
            let told = bed.store("w").open(&a, 3).await.expect_err("refused");
            assert!(matches!(told, StateError::TooLarge { .. }), "{told}");
        } else {
            let (_, saved) = bed.store("w").open(&a, 2).await.expect("open");
            assert_eq!((saved.checkpoint, saved.state), (Some(at(10)), Some(fits)));
        }
    }
}

/// A server that answers each request of a method in S3's words; with an object that is too large, if
/// the status is 200.
async fn refusing(
    answers: &'static [(&'static str, &'static str, &'static str)],
    servers: &mut JoinSet<()>,
) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    servers.spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let (mut request, mut chunk) = (Vec::new(), [0; 4096]);
            while !request.windows(4).any(|end| end == b"\r\n\r\n") {
                match client.read(&mut chunk).await {
                    Ok(length @ 1..) => request.extend_from_slice(&chunk[..length]),
                    _ => break,
                }
            }
            let answer = answers.iter().find(|(method, ..)| request.starts_with(method.as_bytes()));
            let (_, status, code) = answer.expect("an answer");
            let body = format!(
                "<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>So it is</Message></Error>"
            );
            let length = if *status == "200" { (64 << 20) + 1 } else { body.len() };
            let head = format!("HTTP/1.1 {status} x\r\ncontent-length: {length}\r\n");
            let answer = format!("{head}content-type: application/xml\r\nconnection: close\r\n\r\n{body}");
            let _ = client.write_all(answer.as_bytes()).await;
        }
    });
    format!("http://{address}")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_or_object_that_cannot_be_used_is_told_with_what_to_do() {
    let mut servers = JoinSet::new();
    let local = Local::start(LocalSettings::default()).await.expect("embedded servers");
    let place = Checkpoints::s3("nowhere", "{shard}.state");
    let document = "state s3://nowhere/shardId-0.state: ";
    const NONE: (&str, &str, &str) = ("GET", "404", "NoSuchKey");
    for (answers, texts) in [
        (
            &[("GET", "404", "NoSuchBucket")][..],
            &["the bucket nowhere does not exist", "create it"][..],
        ),
        (&[NONE, ("PUT", "404", "NoSuchBucket")], &["the bucket nowhere does not exist"]),
        (&[("GET", "301", "PermanentRedirect")], &["the bucket nowhere is in another region"]),
        (
            &[("GET", "403", "AccessDenied")],
            &["grant the IAM actions s3:GetObject", "s3:ListBucket on the bucket"],
        ),
        (
            &[NONE, ("PUT", "403", "AccessDenied")],
            &["s3:PutObject is not allowed", "grant the IAM action s3:PutObject"],
        ),
        (&[("GET", "403", "InvalidAccessKeyId")], &["has no usable AWS credentials"]),
        (&[("GET", "200", "A large object")], &["67108865 bytes are more than the 64 MiB"]),
    ] {
        let config = sdk_config(&local, &refusing(answers, &mut servers).await);
        let told = store_by(&config, &place, "w").open(&"shardId-0".into(), 1).await;
        let told = told.expect_err("refused");
        assert!(!told.is_transient(), "{told}");
        for text in texts.iter().chain([&document]) {
            assert!(told.to_string().contains(text), "{told}");
        }
    }
    const BUSY: &[(&str, &str, &str)] = &[NONE, ("PUT", "503", "SlowDown")];
    let config = sdk_config(&local, &refusing(BUSY, &mut servers).await);
    let told = store_by(&config, &place, "w").open(&"shardId-0".into(), 1).await.expect_err("busy");
    assert!(told.is_transient(), "{told}");
    let StateError::S3 { source, .. } = told else { panic!("{told}") };
    assert_eq!(source.kind(), AwsErrorKind::Throttled);
}

#[tokio::test]
async fn a_file_that_cannot_be_used_is_told_with_what_to_do() {
    let local = Local::start(LocalSettings::default()).await.expect("embedded servers");
    let folder = tempfile::tempdir().expect("a folder");
    let open = async |path: &Path| {
        let place = Checkpoints::file(path);
        let store = store_by(&local.sdk_config(), &place, "w");
        store.open(&"shardId-0".into(), 1).await.expect_err("refused").to_string()
    };
    let told = open(&folder.path().join("no/such/folder/all.state")).await;
    assert!(
        told.contains("all.state: cannot lock it") && told.contains("make its folder"),
        "{told}"
    );
    std::fs::create_dir(folder.path().join("taken")).expect("a folder");
    let told = open(&folder.path().join("taken")).await;
    assert!(told.contains("cannot read it"), "{told}");
}

const FILE: &str = "TRAMLINE_TEST_STATE_FILE";
const FENCE: &str = "TRAMLINE_TEST_FENCE";

/// The number in a checkpoint made by [`at`].
fn number(checkpoint: &Checkpoint) -> u64 {
    checkpoint.as_str()[4..].parse().expect("a number")
}

/// The process that is killed below. Tells each number that it has saved.
#[tokio::test]
#[ignore = "is killed by another test"]
async fn saves_until_it_is_killed() {
    let file = std::env::var(FILE).expect("a file");
    let fence = std::env::var(FENCE).expect("a fence").parse().expect("a number");
    let config = SdkConfig::builder().build();
    let store = store_by(&config, &Checkpoints::file(file), "killed");
    let shard = ShardId::from("shardId-0");
    let (kept, saved) = store.open(&shard, fence).await.expect("open");
    for n in saved.checkpoint.as_ref().map_or(0, number) + 1.. {
        let state = vec![n as u8; 1 << 18];
        kept.save(&at(n), None, Some(state.into())).await.expect("saved");
        println!("\nsaved {n}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn p3_a_file_is_whole_after_kill_9_at_any_moment() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("all.state");
    let place = Checkpoints::file(&file);
    let config = SdkConfig::builder().build();
    let shard = ShardId::from("shardId-0");
    let mut files = BTreeSet::new();
    for round in 0..20 {
        let mut child = Command::new(std::env::current_exe().expect("this binary"))
            .args(["--exact", "state::saves_until_it_is_killed", "--ignored", "--nocapture"])
            .env(FILE, &file)
            .env(FENCE, (2 * round + 1).to_string())
            .stdout(Stdio::piped())
            .spawn()
            .expect("this binary starts");
        let lines =
            BufReader::new(child.stdout.take().expect("piped")).lines().map_while(Result::ok);
        let mut told = lines.filter_map(|line| line.strip_prefix("saved ")?.parse::<u64>().ok());
        told.next().expect("it saves");
        if round == 0 {
            let told = store_by(&config, &place, "w").open(&shard, 100).await.expect_err("locked");
            let holder = format!("locked by worker killed, process {}, since", child.id());
            assert!(told.to_string().contains(&holder), "{told}");
        }
        // Any moment will do: most of the time it is within a write.
        tokio::time::sleep(Duration::from_micros(700 * round)).await;
        child.kill().expect("killed");
        child.wait().expect("a status");
        let acknowledged = told.last().unwrap_or_default();

        let store = store_by(&config, &place, "w");
        let (_, saved) = store.open(&shard, 2 * round + 2).await.expect("whole");
        let stored = number(&saved.checkpoint.expect("a checkpoint"));
        assert!(stored >= acknowledged, "{acknowledged} was saved, {stored} is there");
        let state = saved.state.expect("a state");
        assert_eq!(state.len(), 1 << 18);
        assert!(
            state.iter().all(|byte| *byte == stored as u8),
            "position and state belong together"
        );
        drop(store);
        for entry in std::fs::read_dir(folder.path()).expect("a folder") {
            files.insert(entry.expect("an entry").file_name().into_string().expect("UTF-8"));
        }
    }
    files.remove("all.state.tmp"); // Of a killed write; the next one takes its place.
    assert_eq!(files, BTreeSet::from(["all.state".to_owned(), "all.state.lock".to_owned()]));
}
