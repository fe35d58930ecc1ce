//! A proxy in front of the embedded Kinesis, DynamoDB and S3 that does to calls what networks and services
//! do to them now and then.
//!
//! ```ignore
//! let proxy = Proxy::start(&servers);
//! let running = Running::start(proxy.tramline(&servers, &["consume", …]));
//! let rule = proxy.add(Rule::on("GetRecords", Fault::Throttle).times(3));
//! wait_for("three refused reads", || (rule.hits() == 3).then_some(()));
//! ```

use std::{
    collections::{BTreeMap, HashMap},
    convert::identity,
    error::Error,
    io,
    process::Command,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use aws_credential_types::{Credentials, provider::SharedCredentialsProvider};
use aws_smithy_eventstream::frame::{DecodedFrame, MessageFrameDecoder, write_message_to};
use aws_smithy_types::event_stream::Message;
use aws_types::{SdkConfig, region::Region};
use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::BoxBody};
use hyper::{
    Request, Response, StatusCode,
    body::{Frame, Incoming},
    client, header,
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use tramline::local::Local;

use crate::support::Servers;

/// Changes what is on its way.
pub type Edit = Box<dyn Fn(&mut Value) + Send + Sync>;

/// What happens to a call.
pub enum Fault {
    /// Refused with the error that the service has for too many calls.
    Throttle,
    /// Refused with this error code, as a mistake of the caller.
    Refuse(&'static str),
    /// Answered as if it were this time, as HTTP writes it.
    At(&'static str),
    /// Answered with HTTP status 500.
    Fail,
    /// Answered with something that is no JSON.
    Garble,
    /// The connection ends without an answer, and nothing was done.
    Reset,
    /// Reaches the service when the rule is lifted, also if the caller has given up by then; never if
    /// it is not lifted.
    Hold,
    /// Reaches the service after this time.
    Delay(Duration),
    /// Done, but the connection ends without an answer.
    LoseAnswer,
    /// Done, but the answer never comes.
    HoldAnswer,
    /// The request is changed on its way there.
    EditRequest(Edit),
    /// Of a PutRecords call, the records for which this gives an error code are not put.
    Partly(Box<dyn Fn() -> Option<&'static str> + Send + Sync>),
    /// The answer is changed on its way back; of a subscription, each of its events.
    EditAnswer(Edit),
    /// A subscription ends, as it does after five minutes, after this many events.
    EndAfter(usize),
    /// The connection ends in the middle of the next event of a subscription, after this many.
    CutAfter(usize),
    /// Nothing more comes of a subscription, after this many events.
    SilentAfter(usize),
}

/// Which calls a fault happens to.
pub struct Rule {
    operation: &'static str,
    fault: Fault,
    when: Box<dyn Fn(&Value) -> bool + Send + Sync>,
    times: usize,
}

impl Rule {
    /// Every call of `operation`, such as `GetRecords`, or of any operation: `*`.
    pub fn on(operation: &'static str, fault: Fault) -> Self {
        Self { operation, fault, when: Box::new(|_| true), times: usize::MAX }
    }

    /// Only those whose request is like this.
    pub fn when(self, when: impl Fn(&Value) -> bool + Send + Sync + 'static) -> Self {
        Self { when: Box::new(when), ..self }
    }

    /// Only the next `times`.
    pub fn times(self, times: usize) -> Self {
        Self { times, ..self }
    }
}

/// A rule that is in force until it is lifted.
#[derive(Clone)]
pub struct Active(Arc<ActiveRule>);

struct ActiveRule {
    rule: Rule,
    hits: AtomicUsize,
    lifted: CancellationToken,
}

impl Active {
    /// How many calls it happened to.
    pub fn hits(&self) -> usize {
        self.0.hits.load(Ordering::SeqCst)
    }

    /// From now on nothing happens any more, and what was held goes on.
    pub fn lift(&self) {
        self.0.lifted.cancel();
    }

    /// Whether it applies to a call, which then counts.
    fn hit(&self, operation: &str, request: &Value) -> bool {
        let Rule { operation: wanted, when, times, .. } = &self.0.rule;
        let applies = !self.0.lifted.is_cancelled()
            && (*wanted == "*" || *wanted == operation)
            && when(request);
        let left = |hits: usize| (hits < *times).then_some(hits + 1);
        applies && self.0.hits.fetch_update(Ordering::SeqCst, Ordering::SeqCst, left).is_ok()
    }
}

/// A call as it reached the proxy.
#[derive(Debug, Clone)]
pub struct Call {
    pub operation: String,
    pub request: Value,
    pub at: Instant,
    /// The number of the connection that it came on.
    pub connection: usize,
}

/// The proxy; it runs as long as the servers do.
pub struct Proxy {
    url: String,
    state: Arc<State>,
}

struct State {
    /// Host and port of the service, by the beginning of the call's target.
    upstream: HashMap<&'static str, String>,
    rules: Mutex<Vec<Active>>,
    calls: Mutex<Vec<Call>>,
}

type Body = BoxBody<Bytes, io::Error>;
type Failed = Box<dyn Error + Send + Sync>;

impl Proxy {
    pub fn start(servers: &Servers) -> Self {
        servers.wait(Self::start_on(&servers.local))
    }

    /// The same within a runtime.
    pub async fn start_on(local: &Local) -> Self {
        let upstream = |(name, url): (&str, &str)| {
            let service = match name {
                "AWS_ENDPOINT_URL_KINESIS" => "Kinesis",
                "AWS_ENDPOINT_URL_DYNAMODB" => "DynamoDB",
                "AWS_ENDPOINT_URL_S3" => "S3",
                _ => return None,
            };
            Some((service, url.trim_start_matches("http://").to_owned()))
        };
        let state = Arc::new(State {
            upstream: local.environment().into_iter().filter_map(upstream).collect(),
            rules: Mutex::default(),
            calls: Mutex::default(),
        });
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        tokio::spawn(serve(listener, state.clone()));
        Self { url, state }
    }

    /// The binary, pointed at the servers through this proxy.
    pub fn tramline(&self, servers: &Servers, args: &[&str]) -> Command {
        let mut command = servers.tramline(args);
        command
            .env("AWS_ENDPOINT_URL_KINESIS", &self.url)
            .env("AWS_ENDPOINT_URL_DYNAMODB", &self.url);
        command
    }

    /// A configuration for the servers through this proxy.
    pub fn sdk_config(&self) -> SdkConfig {
        let credentials = Credentials::new("x", "x", None, None, "test");
        SdkConfig::builder()
            .behavior_version(aws_sdk_kinesis::config::BehaviorVersion::latest())
            .region(Region::from_static("us-east-1"))
            .credentials_provider(SharedCredentialsProvider::new(credentials))
            .endpoint_url(&self.url)
            .build()
    }

    /// Where it listens, for S3 too.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Puts a rule in force. Of several that apply to a call, the oldest is taken.
    pub fn add(&self, rule: Rule) -> Active {
        let rule = ActiveRule { rule, hits: AtomicUsize::new(0), lifted: CancellationToken::new() };
        let active = Active(Arc::new(rule));
        lock(&self.state.rules).push(active.clone());
        active
    }

    /// The calls of an operation so far.
    pub fn calls(&self, operation: &str) -> Vec<Call> {
        let calls = lock(&self.state.calls);
        calls.iter().filter(|call| call.operation == operation).cloned().collect()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("a lock")
}

async fn serve(listener: TcpListener, state: Arc<State>) {
    let mut connections = 0..;
    while let Ok((socket, _)) = listener.accept().await {
        let connection = connections.next().unwrap_or_default();
        let state = state.clone();
        let service = service_fn(move |request| {
            // A task of its own: a call goes its way also if the caller hangs up.
            let answer = tokio::spawn(answer(request, connection, state.clone()));
            async { answer.await.map_err(Failed::from).and_then(identity) }
        });
        tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(socket), service));
    }
}

/// An error ends the connection without an answer.
async fn answer(
    request: Request<Incoming>,
    connection: usize,
    state: Arc<State>,
) -> Result<Response<Body>, Failed> {
    let (head, body) = request.into_parts();
    let body = body.collect().await?.to_bytes();
    let target =
        head.headers.get("x-amz-target").map_or("", |target| target.to_str().unwrap_or(""));
    let (service, operation) = target.split_once('.').unwrap_or(("S3", s3_operation(&head)));
    let service = service.split('_').next().unwrap_or_default();
    let mut request: Value = serde_json::from_slice(&body).unwrap_or_default();
    lock(&state.calls).push(Call {
        operation: operation.to_owned(),
        request: request.clone(),
        at: Instant::now(),
        connection,
    });
    let rules = lock(&state.rules).clone();
    let active = rules.into_iter().find(|rule| rule.hit(operation, &request));
    let fault = active.as_ref().map(|active| &active.0.rule.fault);
    let mut body = body;
    let mut not_put = BTreeMap::new();
    match fault {
        Some(Fault::Throttle) => return Ok(throttled(service)),
        Some(Fault::Refuse(code)) if service == "S3" => return Ok(refused_by_s3(code)),
        Some(Fault::Refuse(code)) => return Ok(refused(code, "as the test wants it")),
        Some(Fault::Fail) => {
            let error = json!({"__type": "InternalFailure", "message": "as the test wants it"});
            return Ok(response(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()));
        }
        Some(Fault::Garble) => return Ok(response(StatusCode::OK, "{\"Records\": [".to_owned())),
        Some(Fault::Reset) => return Err("the connection ends".into()),
        Some(Fault::Hold) => {
            if let Some(active) = &active {
                active.0.lifted.cancelled().await;
            }
        }
        Some(Fault::Delay(delay)) => tokio::time::sleep(*delay).await,
        Some(Fault::EditRequest(edit)) => {
            edit(&mut request);
            body = serde_json::to_vec(&request)?.into();
        }
        Some(Fault::Partly(fails)) => {
            let failed = take_out(&mut request, fails);
            if request["Records"].as_array().is_some_and(Vec::is_empty) {
                let answer = json!({"FailedRecordCount": failed.len(), "Records": failed.values().collect::<Vec<_>>()});
                return Ok(response(StatusCode::OK, answer.to_string()));
            }
            body = serde_json::to_vec(&request)?.into();
            not_put = failed;
        }
        _ => {}
    }
    let upstream = state.upstream.get(service).ok_or("a call of an unknown service")?;
    let answer = forward(upstream, head, body).await?;
    match fault {
        Some(Fault::LoseAnswer) => {
            answer.into_body().collect().await?;
            Err("the answer is lost".into())
        }
        Some(Fault::HoldAnswer) => {
            answer.into_body().collect().await?;
            std::future::pending().await
        }
        Some(Fault::Partly(_)) => {
            let (mut head, body) = answer.into_parts();
            head.headers.remove(header::CONTENT_LENGTH);
            let mut answer: Value = serde_json::from_slice(&body.collect().await?.to_bytes())?;
            put_back(&mut answer, not_put);
            Ok(Response::from_parts(head, full(answer.to_string())))
        }
        Some(
            Fault::EditAnswer(_) | Fault::EndAfter(_) | Fault::CutAfter(_) | Fault::SilentAfter(_),
        ) => edited(answer, active).await,
        Some(Fault::At(date)) => {
            let mut answer = answer.map(|body| body.map_err(io::Error::other).boxed());
            answer.headers_mut().insert(header::DATE, header::HeaderValue::from_static(date));
            Ok(answer)
        }
        _ => Ok(answer.map(|body| body.map_err(io::Error::other).boxed())),
    }
}

/// Takes the records out of a PutRecords call that fail, and gives what is answered in their places.
fn take_out(
    request: &mut Value,
    fails: &(dyn Fn() -> Option<&'static str> + Send + Sync),
) -> BTreeMap<usize, Value> {
    let mut failed = BTreeMap::new();
    let records = request["Records"].as_array_mut().map(std::mem::take).unwrap_or_default();
    let mut put = Vec::new();
    for (place, record) in records.into_iter().enumerate() {
        match fails() {
            Some(code) => {
                let answer = json!({"ErrorCode": code, "ErrorMessage": "as the test wants it"});
                failed.insert(place, answer);
            }
            None => put.push(record),
        }
    }
    request["Records"] = put.into();
    failed
}

/// Puts the answers for records that were taken out back in their places.
fn put_back(answer: &mut Value, failed: BTreeMap<usize, Value>) {
    let before = answer["FailedRecordCount"].as_u64().unwrap_or_default();
    answer["FailedRecordCount"] = json!(before + failed.len() as u64);
    if let Some(answers) = answer["Records"].as_array_mut() {
        for (place, failed) in failed {
            answers.insert(place, failed);
        }
    }
}

async fn forward(
    upstream: &str,
    mut head: hyper::http::request::Parts,
    body: Bytes,
) -> Result<Response<Incoming>, Failed> {
    let socket = TcpStream::connect(upstream).await?;
    let (mut sender, connection) = client::conn::http1::handshake(TokioIo::new(socket)).await?;
    tokio::spawn(connection);
    head.headers.remove(header::CONTENT_LENGTH);
    Ok(sender.send_request(Request::from_parts(head, Full::new(body))).await?)
}

async fn edited(
    answer: Response<Incoming>,
    active: Option<Active>,
) -> Result<Response<Body>, Failed> {
    let (mut head, mut body) = answer.into_parts();
    head.headers.remove(header::CONTENT_LENGTH);
    let is_json = head.headers.get(header::CONTENT_TYPE).is_some_and(|kind| {
        kind.to_str().is_ok_and(|kind| kind.starts_with("application/x-amz-json"))
    });
    if is_json {
        let mut answer: Value = serde_json::from_slice(&body.collect().await?.to_bytes())?;
        if let Some(Fault::EditAnswer(edit)) = active.as_ref().map(|active| &active.0.rule.fault) {
            edit(&mut answer);
        }
        return Ok(Response::from_parts(head, full(answer.to_string())));
    }
    // The sender of the events waits until the caller has taken them, or hangs up.
    let (sender, events) = mpsc::channel(1);
    tokio::spawn(async move {
        let mut decoder = MessageFrameDecoder::new();
        let mut received = BytesMut::new();
        let mut count = 0;
        while let Some(Ok(frame)) = body.frame().await {
            received.extend(frame.into_data().unwrap_or_default());
            while let Ok(DecodedFrame::Complete(message)) = decoder.decode_frame(&mut received) {
                let fault = active.as_ref().map(|active| &active.0.rule.fault);
                let lifted = active.as_ref().is_some_and(|active| active.0.lifted.is_cancelled());
                let is_event = is_event(&message);
                let mut bytes = match fault {
                    Some(Fault::EditAnswer(edit)) if is_event && !lifted => {
                        encode(&edit_event(&message, edit))
                    }
                    _ => encode(&message),
                };
                let mut cut = None;
                match fault {
                    Some(Fault::CutAfter(after)) if is_event && count >= *after => {
                        bytes.truncate(bytes.len() / 2);
                        cut = Some(io::Error::other("the connection ends"));
                    }
                    Some(Fault::EndAfter(after)) if is_event && count >= *after => return,
                    Some(Fault::SilentAfter(after)) if is_event && count >= *after => {
                        return sender.closed().await;
                    }
                    _ => {}
                }
                count += usize::from(is_event);
                let sent = sender.send(Ok(Frame::data(bytes))).await;
                if sent.is_err() {
                    return;
                }
                if let Some(cut) = cut {
                    let _ = sender.send(Err(cut)).await;
                    return;
                }
            }
        }
    });
    Ok(Response::from_parts(head, StreamBody::new(ReceiverStream::new(events)).boxed()))
}

fn is_event(message: &Message) -> bool {
    message.headers().iter().any(|header| {
        header.name().as_str() == ":event-type"
            && header.value().as_string().is_ok_and(|kind| kind.as_str() == "SubscribeToShardEvent")
    })
}

fn edit_event(message: &Message, edit: &Edit) -> Message {
    let mut event: Value = serde_json::from_slice(message.payload()).expect("an event in JSON");
    edit(&mut event);
    Message::new_from_parts(message.headers().to_vec(), event.to_string())
}

fn encode(message: &Message) -> Bytes {
    let mut bytes = BytesMut::new();
    write_message_to(message, &mut bytes).expect("a message");
    bytes.freeze()
}

/// S3 tells operations apart by method and path.
fn s3_operation(head: &hyper::http::request::Parts) -> &'static str {
    match head.method.as_str() {
        "GET" if head.uri.query().is_some_and(|q| q.contains("list-type=2")) => "ListObjectsV2",
        "GET" => "GetObject",
        "HEAD" => "HeadObject",
        "PUT" => "PutObject",
        _ => "",
    }
}

fn refused_by_s3(code: &str) -> Response<Body> {
    let error =
        format!("<Error><Code>{code}</Code><Message>as the test wants it</Message></Error>");
    let mut response = response(StatusCode::FORBIDDEN, error);
    let xml = header::HeaderValue::from_static("application/xml");
    response.headers_mut().insert(header::CONTENT_TYPE, xml);
    response
}

/// What each service says when it is asked too often.
fn throttled(service: &str) -> Response<Body> {
    match service {
        "DynamoDB" => refused(
            "com.amazonaws.dynamodb.v20120810#ProvisionedThroughputExceededException",
            "The level of configured provisioned throughput for the table was exceeded. Consider \
             increasing your provisioning level with the UpdateTable API.",
        ),
        _ => refused(
            "ProvisionedThroughputExceededException",
            "Rate exceeded for shard shardId-000000000000 in stream.",
        ),
    }
}

fn refused(code: &str, message: &str) -> Response<Body> {
    let error = json!({"__type": code, "message": message});
    response(StatusCode::BAD_REQUEST, error.to_string())
}

fn response(status: StatusCode, body: String) -> Response<Body> {
    let mut response = Response::new(full(body));
    *response.status_mut() = status;
    let json = header::HeaderValue::from_static("application/x-amz-json-1.1");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}

fn full(body: String) -> Body {
    Full::new(Bytes::from(body)).map_err(io::Error::other).boxed()
}
