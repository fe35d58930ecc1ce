//! A worker that dies, at every point at which its death could make a difference.
//!
//! Whatever a process was doing when it died, what is left of it is what it did to the world outside: its
//! writes to AWS and to files, and the work of its handler. A life is therefore counted in steps: a write
//! to AWS is one before it gets there and one after, with the answer still on its way, and so is each
//! message before and after its handler is done with it. Between two steps nothing outside changes, so that
//! it makes no difference at which `await` between them a worker dies. One worker dies at each step, a
//! second one goes on from what is there, and both together must have kept the promises.
//!
//! The worker is the real one, with the AWS SDK and its own runtime, which has one thread and a clock that
//! moves only while there is nothing to do. Its calls reach the embedded servers through [`Wire`].

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    time::Duration,
};

use aws_sdk_dynamodb::types::AttributeValue;
use aws_sdk_kinesis::primitives::Blob;
use aws_smithy_runtime_api::client::{
    http::{
        HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpConnector,
    },
    orchestrator::{HttpRequest, HttpResponse},
    result::ConnectorError,
    runtime_components::RuntimeComponents,
};
use aws_smithy_types::{body::SdkBody, byte_stream::ByteStream};
use aws_types::SdkConfig;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Request, Response, client, header, http::request};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;
use tramline::{
    Batch, Checkpoints, DeadLetters, Handler, Message, Report, Retrieval, SequenceNumber, ShardId,
    StopReason, Tenure, Worker, WorkerError,
    checkpoint::{Checkpoint, Position},
    record::write_aggregate,
};

use crate::support::{Servers, event, lines};

const STREAM: &str = "ctd-ocs-raw-messages";
const BUCKET: &str = "rtr";
/// So that a shard is read in several batches.
const RECORDS_PER_READ: u32 = 2;

/// What is there before, between and after the lives.
struct World {
    servers: Servers,
    dynamodb: aws_sdk_dynamodb::Client,
    s3: aws_sdk_s3::Client,
    folder: tempfile::TempDir,
    /// The messages of each shard.
    messages: BTreeMap<ShardId, Vec<(Position, String)>>,
    /// A record that cannot be decoded.
    undecodable: (ShardId, SequenceNumber),
}

/// Where checkpoints are kept, and how a handler says that it is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kept {
    LeaseTable,
    /// Each message is acknowledged by itself, later, and every other one before the one that it follows.
    LeaseTableByAcks,
    /// One for all shards, with the handler's state.
    File,
    /// One for each shard, with the handler's state.
    Objects,
}

/// What a worker left behind.
#[derive(Debug, Default)]
struct Left {
    checkpoint: Option<Checkpoint>,
    /// The handler's state: the messages that it has handled.
    state: Option<Vec<String>>,
}

impl World {
    /// A shard with a message, an aggregate of three, bytes that are no event, an array of two messages and
    /// three messages more; and the two that it was split into, with two messages each.
    fn new() -> Self {
        let servers = Servers::with_stream(STREAM, 1);
        let dynamodb = servers.dynamodb();
        let s3 = aws_sdk_s3::Client::new(&servers.local.sdk_config());
        servers.wait(s3.create_bucket().bucket(BUCKET).send()).expect("a bucket");
        let mut world = Self {
            servers,
            dynamodb,
            s3,
            folder: tempfile::tempdir().expect("a folder"),
            messages: BTreeMap::new(),
            undecodable: ("none".into(), SequenceNumber::parse("0").expect("a number")),
        };
        let lines = lines(0, 13);
        let events: Vec<String> = lines.iter().map(|line| event(line)).collect();
        world.put(0, &events[0], &[(0, &lines[0])]);
        let user_records = events[1..4].iter().map(|event| ("k", event.as_bytes()));
        let places = [(0, &*lines[1]), (1, &*lines[2]), (2, &*lines[3])];
        world.put(0, write_aggregate(user_records), &places);
        let (shard, number) = world.put(0, "no event", &[]);
        world.undecodable = (shard, number);
        let array = format!("[{},{}]", events[4], events[5]);
        world.put(0, array, &[(0, &lines[4]), (0, &lines[5])]);
        for n in 6..9 {
            world.put(0, &events[n], &[(0, &lines[n])]);
        }
        let half = u128::MAX / 2 + 1;
        let split = world.servers.kinesis.split_shard().stream_name(STREAM);
        let split = split.shard_to_split("shardId-000000000000");
        let split = split.new_starting_hash_key(half.to_string()).send();
        world.servers.wait(split).expect("a split");
        for n in 9..13 {
            let hash_key = if n % 2 == 0 { 0 } else { half };
            world.put(hash_key, &events[n], &[(0, &lines[n])]);
        }
        assert_eq!(world.messages.len(), 3);
        world
    }

    /// Puts a record with messages, each with the number of its user record.
    fn put(
        &mut self,
        hash_key: u128,
        data: impl AsRef<[u8]>,
        messages: &[(u64, &str)],
    ) -> (ShardId, SequenceNumber) {
        let put = self.servers.kinesis.put_record().stream_name(STREAM).partition_key("k");
        let put = put.explicit_hash_key(hash_key.to_string()).data(Blob::new(data.as_ref()));
        let put = self.servers.wait(put.send()).expect("a put");
        let shard = ShardId::from(put.shard_id.as_str());
        let sequence_number = SequenceNumber::parse(put.sequence_number).expect("a number");
        let of_shard = self.messages.entry(shard.clone()).or_default();
        of_shard.extend(messages.iter().map(|(sub_sequence_number, line)| {
            let (sequence_number, sub_sequence_number) =
                (sequence_number.clone(), *sub_sequence_number);
            (Position { sequence_number, sub_sequence_number }, (*line).to_owned())
        }));
        (shard, sequence_number)
    }

    /// The lines of a shard's messages.
    fn lines(&self, shard: &ShardId) -> Vec<String> {
        self.messages[shard].iter().map(|(_, line)| line.clone()).collect()
    }

    /// How many messages of a shard a checkpoint is past.
    fn finished(&self, shard: &ShardId, checkpoint: &Checkpoint) -> usize {
        let messages = &self.messages[shard];
        match checkpoint {
            Checkpoint::At(stored) => {
                messages.iter().filter(|(position, _)| position <= stored).count()
            }
            Checkpoint::ShardEnd => messages.len(),
            _ => 0,
        }
    }

    fn place(&self, application: &str, kept: Kept) -> Checkpoints {
        match kept {
            Kept::LeaseTable | Kept::LeaseTableByAcks => Checkpoints::lease_table(),
            Kept::File => Checkpoints::file(self.folder.path().join(application)),
            Kept::Objects => Checkpoints::s3(BUCKET, format!("{application}/{{shard}}.state")),
        }
    }

    /// What the workers of an application have stored.
    fn left(&self, application: &str, kept: Kept) -> BTreeMap<ShardId, Left> {
        match kept {
            Kept::LeaseTable | Kept::LeaseTableByAcks => {
                let scan = self.dynamodb.scan().table_name(application).consistent_read(true);
                let rows = self.servers.wait(scan.send()).map(|rows| rows.items().to_vec());
                rows.unwrap_or_default().iter().map(row).collect()
            }
            Kept::File => {
                let document = fs::read(self.folder.path().join(application));
                document.map(|bytes| shards(&bytes)).unwrap_or_default()
            }
            Kept::Objects => {
                let object = |shard: &ShardId| {
                    let key = format!("{application}/{shard}.state");
                    let get = self.s3.get_object().bucket(BUCKET).key(key);
                    self.servers.wait(async {
                        let bytes = get.send().await.ok()?.body.collect().await;
                        Some(shards(&bytes.expect("an object").into_bytes()))
                    })
                };
                self.messages.keys().filter_map(object).flatten().collect()
            }
        }
    }

    /// How many objects with dead letters an application has.
    fn letters(&self, application: &str) -> usize {
        let list = self.s3.list_objects_v2().bucket(BUCKET);
        let list = list.prefix(format!("letters/{application}/"));
        self.servers.wait(list.send()).expect("a list").contents().len()
    }

    /// One call, which is done when this returns: nothing else of the worker goes on meanwhile.
    fn call(&self, mut head: request::Parts, body: Bytes) -> Response<SdkBody> {
        let (answered, answer) = mpsc::channel();
        self.servers.spawn(async move {
            let host = head.uri.authority().expect("a host").to_string();
            head.headers.remove(header::CONTENT_LENGTH);
            head.headers.insert(header::HOST, host.parse().expect("a host"));
            head.uri = head.uri.path_and_query().expect("a path").as_str().parse().expect("a URI");
            let socket = TcpStream::connect(host).await.expect("a server");
            let handshake = client::conn::http1::handshake(TokioIo::new(socket));
            let (mut sender, connection) = handshake.await.expect("a connection");
            tokio::spawn(connection);
            let request = Request::from_parts(head, Full::new(body));
            let (head, body) = sender.send_request(request).await.expect("an answer").into_parts();
            let body = body.collect().await.expect("an answer").to_bytes();
            answered.send(Response::from_parts(head, SdkBody::from(body))).expect("a caller");
        });
        answer.recv().expect("an answer")
    }
}

/// A row of a lease table.
fn row(row: &HashMap<String, AttributeValue>) -> (ShardId, Left) {
    let text = |name: &str| row[name].as_s().expect("a text").as_str();
    let number = row["checkpointSubSequenceNumber"].as_n().expect("a number");
    let number = number.parse().expect("a number");
    let checkpoint = Checkpoint::parse(text("checkpoint"), number);
    (text("leaseKey").into(), Left { checkpoint, state: None })
}

/// The shards of a state document, whose format `src/checkpoint/document.rs` tells.
fn shards(document: &[u8]) -> BTreeMap<ShardId, Left> {
    let mut lines = document.splitn(2, |byte| *byte == b'\n');
    let header: Value = serde_json::from_slice(lines.next().expect("a header")).expect("JSON");
    let mut states = lines.next().expect("states");
    let shards = header["shards"].as_object().expect("shards");
    let left = |(shard, row): (&String, &Value)| {
        let number = row["sub_sequence_number"].as_u64().unwrap_or(0);
        let checkpoint =
            row["checkpoint"].as_str().and_then(|text| Checkpoint::parse(text, number));
        let state = row["state_bytes"].as_u64().map(|length| {
            let (state, rest) = states.split_at(length as usize);
            states = &rest[1..];
            serde_json::from_slice(state).expect("a state")
        });
        (shard.as_str().into(), Left { checkpoint, state })
    };
    shards.iter().map(left).collect()
}

/// One life of a worker.
struct Life {
    world: Arc<World>,
    /// The number of the step at which it ends.
    dies_at: usize,
    steps: AtomicUsize,
    died_at: Mutex<Option<String>>,
    dead: CancellationToken,
    messages: Mutex<Seen>,
}

/// The messages of a life: those that the handler was given, and those that it was done with.
#[derive(Debug, Default)]
struct Seen {
    given: Vec<(ShardId, String)>,
    done: Vec<(ShardId, String)>,
}

impl Life {
    /// Takes a step, or dies at it: what calls this does nothing more at its next `await`.
    fn note_step(&self, what: impl FnOnce() -> String) {
        if self.steps.fetch_add(1, Ordering::SeqCst) == self.dies_at {
            *lock(&self.died_at) = Some(what());
            self.dead.cancel();
        }
    }

    /// Takes a step, or dies at it. Nothing is done after death.
    async fn step(&self, what: impl FnOnce() -> String) {
        self.note_step(what);
        if self.dead.is_cancelled() {
            std::future::pending().await
        }
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        lock(&self.messages)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("a lock")
}

/// How the SDK reaches the servers.
#[derive(Clone)]
struct Wire(Arc<Life>);

impl std::fmt::Debug for Wire {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Wire")
    }
}

impl HttpClient for Wire {
    fn http_connector(
        &self,
        _: &HttpConnectorSettings,
        _: &RuntimeComponents,
    ) -> SharedHttpConnector {
        SharedHttpConnector::new(self.clone())
    }
}

impl HttpConnector for Wire {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let life = self.0.clone();
        HttpConnectorFuture::new(async move {
            let failed = |error| ConnectorError::other(error, None);
            let request = request.try_into_http1x().map_err(|error| failed(error.into()))?;
            let (head, body) = request.into_parts();
            let body =
                ByteStream::new(body).collect().await.map_err(|error| failed(error.into()))?;
            let mut body = body.into_bytes();
            let target = head.headers.get("x-amz-target").and_then(|target| target.to_str().ok());
            let operation = match target.and_then(|target| target.split_once('.')) {
                Some((_, operation)) => operation.to_owned(),
                None => format!("{} {}", head.method, head.uri.path()),
            };
            if operation == "GetRecords" {
                let mut request: Value = serde_json::from_slice(&body).expect("JSON");
                request["Limit"] = RECORDS_PER_READ.into();
                body = request.to_string().into();
            }
            let reads = ["Get", "GET", "HEAD", "List", "Describe", "Scan", "Query"];
            let writes = !reads.iter().any(|reads| operation.starts_with(reads));
            if writes {
                life.step(|| format!("before {operation}")).await;
            }
            let answer = life.world.call(head, body);
            if writes {
                life.step(|| format!("after {operation}")).await;
            }
            HttpResponse::try_from(answer).map_err(|error| failed(error.into()))
        })
    }
}

/// Handles messages one after the other, which takes its time.
struct Slow {
    life: Arc<Life>,
    shard: ShardId,
    kept: Kept,
    handled: Vec<String>,
}

impl Slow {
    async fn handle_one(life: &Life, shard: &ShardId, line: &str) {
        tokio::time::sleep(Duration::from_millis(40)).await;
        life.step(|| format!("before {line} of {shard} is handled")).await;
        life.seen().done.push((shard.clone(), line.to_owned()));
        life.step(|| format!("after {line} of {shard} was handled")).await;
        tokio::time::sleep(Duration::from_millis(40)).await;
    }
}

impl Handler for Slow {
    type Error = serde_json::Error;

    async fn handle(&mut self, batch: &Batch) -> Result<(), Self::Error> {
        let raw = |message: &Message| message.raw().to_owned();
        let mut lines: Vec<String> = batch.iter().map(raw).collect();
        self.life.seen().given.extend(lines.iter().map(|line| (self.shard.clone(), line.clone())));
        if self.kept == Kept::LeaseTableByAcks {
            let (life, shard) = (self.life.clone(), self.shard.clone());
            let mut acks: Vec<_> = lines.drain(..).zip(batch.ack_later()).collect();
            acks.chunks_mut(2).for_each(<[_]>::reverse);
            tokio::spawn(async move {
                for (line, ack) in acks {
                    Self::handle_one(&life, &shard, &line).await;
                    ack.ack();
                }
            });
        }
        for line in lines {
            Self::handle_one(&self.life, &self.shard, &line).await;
            self.handled.push(line);
        }
        Ok(())
    }

    async fn started(&mut self, _: &Tenure) {
        self.life.step(|| format!("{} is opened", self.shard)).await;
    }

    async fn ended(&mut self) {
        self.life.step(|| format!("{} is finished", self.shard)).await;
    }

    async fn stopping(&mut self, _: StopReason) {
        self.life.step(|| format!("{} stops", self.shard)).await;
    }

    /// Comes before each checkpoint. Written to a file, that is no step that [`Wire`] sees.
    fn snapshot(&mut self) -> Result<Option<Vec<u8>>, Self::Error> {
        self.life.note_step(|| format!("before a checkpoint of {}", self.shard));
        match self.kept {
            Kept::LeaseTable | Kept::LeaseTableByAcks => Ok(None),
            _ => serde_json::to_vec(&self.handled).map(Some),
        }
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), Self::Error> {
        self.handled = serde_json::from_slice(state)?;
        Ok(())
    }
}

/// Lets a worker live until it dies, or until there is nothing more to do.
fn live(world: &Arc<World>, application: &str, id: &str, kept: Kept, dies_at: usize) -> Arc<Life> {
    let life = Arc::new(Life {
        world: world.clone(),
        dies_at,
        steps: AtomicUsize::new(0),
        died_at: Mutex::default(),
        dead: CancellationToken::new(),
        messages: Mutex::default(),
    });
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().start_paused(true).build().expect("a runtime");
    let config = world.servers.local.sdk_config().into_builder();
    let config: SdkConfig = config.http_client(Wire(life.clone())).build();
    let of_handler = life.clone();
    let worker = Worker::builder(&config, STREAM, application)
        .worker_id(id)
        .retrieval(Retrieval::Polling)
        .checkpoints(world.place(application, kept))
        .checkpoint_interval(match kept {
            // After each acknowledgement; or after more than one batch.
            Kept::LeaseTableByAcks => Duration::from_millis(50),
            _ => Duration::from_millis(400),
        })
        .dead_letters(DeadLetters::s3(BUCKET, "letters"))
        .stop_when_idle(Duration::from_secs(2))
        .handler(move |shard: &ShardId| Slow {
            life: of_handler.clone(),
            shard: shard.clone(),
            kept,
            handled: Vec::new(),
        });
    let lived = runtime.block_on(async {
        tokio::select! {
            biased;
            () = life.dead.cancelled() => None,
            report = async { worker.build().await?.run(std::future::pending()).await } => {
                Some(report)
            }
        }
    });
    // All of it is gone at once, wherever it was.
    drop(runtime);
    let lived: Option<Result<Report, WorkerError>> = lived;
    if let Some(lived) = lived {
        lived.expect("a clean stop");
    }
    life
}

fn of_shard(messages: &[(ShardId, String)], shard: &ShardId) -> Vec<String> {
    let of_shard = messages.iter().filter(|(of, _)| of == shard);
    of_shard.map(|(_, line)| line.clone()).collect()
}

/// What must hold of a life that ended early and of the one after it.
fn check(world: &Arc<World>, application: &str, kept: Kept, first: &Life) {
    let mut left = world.left(application, kept);
    let letters = world.letters(application);
    let second = live(world, application, "second", kept, usize::MAX);
    let (first, second) = (first.seen(), second.seen());
    for shard in world.messages.keys() {
        let all = world.lines(shard);
        let Left { checkpoint, state } = left.remove(shard).unwrap_or_default();
        let stored = checkpoint.as_ref().map_or(0, |checkpoint| world.finished(shard, checkpoint));
        let (given, done) = (of_shard(&first.given, shard), of_shard(&first.done, shard));
        assert!(all.starts_with(&given), "P2: {given:?}");
        let finished = all.iter().take_while(|line| done.contains(line)).count();
        assert!(stored <= finished, "P3: {checkpoint:?}, but done is only {done:?}");
        if let Some(state) = state {
            assert_eq!(state, all[..stored], "the state is that of the checkpoint");
        }
        assert_eq!(
            of_shard(&second.given, shard),
            all[stored..],
            "P1: the second worker goes on after {checkpoint:?}, with nothing missing and nothing again"
        );
        if *shard == world.undecodable.0 {
            let passed = match &checkpoint {
                Some(Checkpoint::At(at)) => at.sequence_number >= world.undecodable.1,
                Some(Checkpoint::ShardEnd) => true,
                _ => false,
            };
            assert!(letters == 1 || !passed, "P9: {checkpoint:?}, and no dead letter");
        }
    }
    let given: Vec<&(ShardId, String)> = first.given.iter().chain(&second.given).collect();
    let parent = &world.undecodable.0;
    let before_children = given.iter().take_while(|(shard, _)| shard == parent);
    let done: Vec<&str> = before_children.map(|(_, line)| line.as_str()).collect();
    let missing: Vec<_> =
        world.lines(parent).into_iter().filter(|line| !done.contains(&line.as_str())).collect();
    assert!(missing.is_empty(), "P5: {missing:?} of the parent came after its children");

    assert_eq!(world.letters(application), 1, "P9");
    for (shard, Left { checkpoint, state }) in world.left(application, kept) {
        let all = world.lines(&shard);
        let checkpoint = checkpoint.expect("a checkpoint");
        assert_eq!(world.finished(&shard, &checkpoint), all.len(), "all of {shard} is finished");
        assert!(state.is_none_or(|state| state == all), "{shard}: each message counts once");
    }
}

fn dies_at_every_step(kept: Kept) {
    let world = Arc::new(World::new());
    let mut partly = 0;
    for dies_at in 0.. {
        let application = format!("rtr-{dies_at}");
        let first = live(&world, &application, "first", kept, dies_at);
        let died_at = lock(&first.died_at).clone();
        println!("step {dies_at}: {}", died_at.as_deref().unwrap_or("none"));
        let left = world.left(&application, kept);
        partly += usize::from(left.iter().any(|(shard, left)| {
            let stored = left.checkpoint.as_ref().map_or(0, |c| world.finished(shard, c));
            (1..world.messages[shard].len()).contains(&stored)
        }));
        check(&world, &application, kept, &first);
        if died_at.is_none() {
            break;
        }
    }
    assert!(partly >= 5, "only {partly} deaths came between two checkpoints of a shard");
}

#[test]
fn p1_p3_a_death_at_any_step_with_checkpoints_in_the_lease_table() {
    dies_at_every_step(Kept::LeaseTable);
}

#[test]
fn p1_p3_a_death_at_any_step_with_messages_that_are_acknowledged_out_of_order() {
    dies_at_every_step(Kept::LeaseTableByAcks);
}

#[test]
fn p1_p3_a_death_at_any_step_with_checkpoints_and_state_in_a_file() {
    dies_at_every_step(Kept::File);
}

#[test]
fn p1_p3_a_death_at_any_step_with_checkpoints_and_state_in_s3() {
    dies_at_every_step(Kept::Objects);
}
