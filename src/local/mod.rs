//! Kinesis, DynamoDB and S3 in this process, for the demo, for tests and for trying things out.
//!
//! Each is a well-kept emulator behind a loopback port (`ferrokinesis`, `dynoxide`, `s3s-fs`); nothing of
//! Tramline knows that it is not AWS. They check no signatures and no permissions, and have no limits of
//! throughput; Kinesis says 0 for how far a reader is behind, and has fan-out and resharding.

use std::{
    fs::{File, TryLockError},
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use aws_types::{SdkConfig, region::Region, service_config::LoadServiceConfig};
use axum::{
    body::{Body, to_bytes},
    extract::{DefaultBodyLimit, Request},
    http::StatusCode,
    middleware,
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use tokio::{net::TcpListener, task::JoinSet};

const REGION: &str = "us-east-1";
/// Any value will do: the embedded servers check no signatures.
const CREDENTIAL: &str = "local";
/// The largest body of a call to Kinesis.
const PUT_LIMIT_BYTES: usize = 7 * 1024 * 1024;

/// Embedded servers that run until this is dropped.
///
/// ```
/// # #[tokio::main]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use tramline::local::{Local, LocalSettings};
///
/// let local = Local::start(LocalSettings::default()).await?;
/// let kinesis = aws_sdk_kinesis::Client::new(&local.sdk_config());
/// assert!(kinesis.list_streams().send().await?.stream_names.is_empty());
/// # Ok(())
/// # }
/// ```
#[must_use = "the servers stop when this is dropped"]
pub struct Local {
    kinesis: String,
    dynamodb: String,
    s3: String,
    _servers: JoinSet<()>,
    /// Removed when the servers stop, unless the data is to be kept.
    _scratch: Option<Scratch>,
    /// Keeps a second process out of the directory.
    _lock: Option<File>,
}

/// Why the embedded servers cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("the embedded {server} {failed}: {reason}")]
pub struct LocalError {
    server: &'static str,
    failed: String,
    reason: String,
}

/// How the embedded servers behave.
#[derive(Debug, Clone)]
pub struct LocalSettings {
    /// Where data is kept, and found again at the next start. Without, it is gone when they stop.
    pub dir: Option<PathBuf>,
    /// How long a shard iterator is valid: 5 minutes on AWS. Whole seconds.
    pub iterator_lifetime: Duration,
    /// How long a fan-out subscription lasts: 5 minutes on AWS.
    pub subscription_lifetime: Duration,
}

impl Default for LocalSettings {
    fn default() -> Self {
        let as_on_aws = Duration::from_secs(300);
        Self { dir: None, iterator_lifetime: as_on_aws, subscription_lifetime: as_on_aws }
    }
}

impl Local {
    /// Starts the servers on ports of 127.0.0.1 that the system picks. An error if the directory cannot be
    /// used, or another process does.
    pub async fn start(settings: LocalSettings) -> Result<Self, LocalError> {
        let dir = settings.dir.as_deref();
        let lock = dir.map(lock).transpose()?;
        let scratch = match dir {
            Some(_) => None,
            None => Some(Scratch::new().map_err(|error| failed("S3", error))?),
        };
        let mut servers = JoinSet::new();
        let kinesis = start_kinesis(&settings, &mut servers).await?;
        let dynamodb = start_dynamodb(dir, &mut servers).await?;
        let s3_root = match (&scratch, dir) {
            (Some(scratch), _) => scratch.0.clone(),
            (None, dir) => dir.unwrap_or(Path::new(".")).join("s3"),
        };
        let s3 = start_s3(&s3_root, &mut servers).await?;
        Ok(Self { kinesis, dynamodb, s3, _servers: servers, _scratch: scratch, _lock: lock })
    }

    /// Makes a stream, and waits until it can be used. One of that name that is there is left as it is.
    pub async fn create_stream(&self, name: &str, shards: u32) -> Result<(), LocalError> {
        use aws_sdk_kinesis::{error::ProvideErrorMetadata as _, types::StreamStatus};

        let kinesis = aws_sdk_kinesis::Client::new(&self.sdk_config());
        let shards = i32::try_from(shards).unwrap_or(i32::MAX);
        match kinesis.create_stream().stream_name(name).shard_count(shards).send().await {
            Ok(_) => {}
            Err(error) if error.code() == Some("ResourceInUseException") => {}
            Err(error) => return Err(refused("Kinesis", name, &error)),
        }
        loop {
            let told = kinesis.describe_stream_summary().stream_name(name).send().await;
            let told = told.map_err(|error| refused("Kinesis", name, &error))?;
            let status = told.stream_description_summary.map(|stream| stream.stream_status);
            if status == Some(StreamStatus::Active) {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Makes a bucket. One of that name that is there is left as it is.
    pub async fn create_bucket(&self, name: &str) -> Result<(), LocalError> {
        use aws_sdk_s3::error::ProvideErrorMetadata as _;

        let s3 = aws_sdk_s3::Client::new(&self.sdk_config());
        match s3.create_bucket().bucket(name).send().await {
            Ok(_) => Ok(()),
            Err(error)
                if matches!(
                    error.code(),
                    Some("BucketAlreadyExists" | "BucketAlreadyOwnedByYou")
                ) =>
            {
                Ok(())
            }
            Err(error) => Err(refused("S3", name, &error)),
        }
    }

    /// The environment variables that point any AWS tool at these servers.
    pub fn environment(&self) -> [(&'static str, &str); 7] {
        [
            ("AWS_ENDPOINT_URL_KINESIS", &self.kinesis),
            ("AWS_ENDPOINT_URL_DYNAMODB", &self.dynamodb),
            ("AWS_ENDPOINT_URL_S3", &self.s3),
            ("AWS_ACCESS_KEY_ID", CREDENTIAL),
            ("AWS_SECRET_ACCESS_KEY", CREDENTIAL),
            ("AWS_REGION", REGION),
            ("AWS_DEFAULT_REGION", REGION),
        ]
    }

    /// The same for clients in this process, which leaves the environment alone.
    pub fn sdk_config(&self) -> SdkConfig {
        let credentials = aws_credential_types::Credentials::new(
            CREDENTIAL,
            CREDENTIAL,
            None,
            None,
            "tramline local",
        );
        SdkConfig::builder()
            .behavior_version(aws_sdk_kinesis::config::BehaviorVersion::latest())
            .region(Region::from_static(REGION))
            .credentials_provider(aws_credential_types::provider::SharedCredentialsProvider::new(
                credentials,
            ))
            .service_config(Endpoints(
                self.environment().map(|(name, value)| (name, value.to_owned())),
            ))
            .build()
    }
}

/// Answers the SDK's question for the endpoint of each service.
#[derive(Debug)]
struct Endpoints([(&'static str, String); 7]);

impl LoadServiceConfig for Endpoints {
    fn load_config(&self, key: aws_types::service_config::ServiceConfigKey<'_>) -> Option<String> {
        let service = key.service_id().to_uppercase().replace(' ', "_");
        let wanted = format!("{}_{service}", key.env());
        self.0.iter().find(|(name, _)| *name == wanted).map(|(_, value)| value.clone())
    }
}

async fn start_kinesis(
    settings: &LocalSettings,
    servers: &mut JoinSet<()>,
) -> Result<String, LocalError> {
    use ferrokinesis::store::{DurableStateOptions, StoreOptions};

    let options = StoreOptions {
        create_stream_ms: 0,
        delete_stream_ms: 0,
        update_stream_ms: 0,
        shard_limit: 500,
        iterator_ttl_seconds: settings.iterator_lifetime.as_secs(),
        subscribe_to_shard_session_ms: settings.subscription_lifetime.as_millis() as u64,
        durable: settings.dir.as_ref().map(|dir| DurableStateOptions {
            state_dir: dir.join("kinesis"),
            snapshot_interval_secs: 30,
            max_retained_bytes: None,
        }),
        aws_region: REGION.into(),
        ..StoreOptions::default()
    };
    let (app, store) = ferrokinesis::create_app(options);
    store.check_ready().map_err(|error| failed("Kinesis", format!("{error:?}")))?;

    // The server gives out a sequence number and stores the record in two steps. With two puts at once
    // a reader can see the later record first and never go back for the earlier one, which Kinesis
    // does not do: so one put at a time.
    let one_put = std::sync::Arc::new(tokio::sync::Mutex::new(()));
    let app = app.layer(middleware::from_fn(move |request: Request, next: Next| {
        let one_put = one_put.clone();
        async move {
            let target = request.headers().get("x-amz-target").and_then(|t| t.to_str().ok());
            let is_put = target.is_some_and(|target| target.contains(".PutRecord"));
            let _turn = if is_put { Some(one_put.lock().await) } else { None };
            next.run(request).await
        }
    }));

    // Kinesis takes 5 MiB a call, which are 7 MiB in Base64; axum would refuse more than 2 MB.
    let app = app.layer(DefaultBodyLimit::max(PUT_LIMIT_BYTES));

    let (listener, url) = listen("Kinesis").await?;
    servers.spawn(async move {
        if let Err(error) =
            ferrokinesis::serve_plain_http(listener, app, std::future::pending()).await
        {
            tracing::error!("the embedded Kinesis stopped: {error}");
        }
    });
    Ok(url)
}

async fn start_dynamodb(
    dir: Option<&Path>,
    servers: &mut JoinSet<()>,
) -> Result<String, LocalError> {
    let database = match dir {
        None => dynoxide::Database::memory(),
        Some(dir) => {
            std::fs::create_dir_all(dir).map_err(|error| failed("DynamoDB", error))?;
            dynoxide::Database::new(&dir.join("dynamodb.sqlite").to_string_lossy())
        }
    }
    .map_err(|error| failed("DynamoDB", format!("{error:?}")))?;
    let (listener, url) = listen("DynamoDB").await?;
    servers.spawn(dynoxide::server::serve_on(listener, database));
    Ok(url)
}

/// The most that the embedded S3 takes in one request: Tramline stores objects of up to 64 MiB.
const OBJECT_LIMIT_BYTES: usize = 128 * 1024 * 1024;

async fn start_s3(root: &Path, servers: &mut JoinSet<()>) -> Result<String, LocalError> {
    use hyper_util::{
        rt::{TokioExecutor, TokioIo},
        server::conn::auto::Builder,
        service::TowerToHyperService,
    };

    std::fs::create_dir_all(root).map_err(|error| failed("S3", error))?;
    let files =
        s3s_fs::FileSystem::new(root).map_err(|error| failed("S3", format!("{error:?}")))?;
    let service = {
        let mut builder = s3s::service::S3ServiceBuilder::new(files);
        builder.set_auth(s3s::auth::SimpleAuth::from_single(CREDENTIAL, CREDENTIAL));
        builder.build()
    };
    // The server compares an object's ETag, writes the object and writes its ETag in three steps. S3's
    // conditional writes are one: so one request at a time, to its end, also if who asked has gone, and
    // with its answer read before the next one writes.
    let one_request = std::sync::Arc::new(tokio::sync::Mutex::new(()));
    let app = axum::Router::new().fallback(move |request: Request| {
        let (service, one_request) = (service.clone(), one_request.clone());
        async move {
            let (head, body) = request.into_parts();
            let Ok(body) = to_bytes(body, OBJECT_LIMIT_BYTES).await else {
                return StatusCode::BAD_REQUEST.into_response();
            };
            let served = tokio::spawn(async move {
                let _turn = one_request.lock().await;
                let request = Request::from_parts(head, Body::from(body));
                let answer = service.call(request.map(s3s::Body::http_body_unsync)).await;
                let (head, body) = answer.map_err(|error| format!("{error:?}"))?.into_parts();
                let body = to_bytes(Body::new(body), OBJECT_LIMIT_BYTES).await;
                let body = body.map_err(|error| error.to_string())?;
                Ok::<_, String>(Response::from_parts(head, Body::from(body)))
            });
            let answer = served.await.map_err(|error| error.to_string()).flatten();
            answer.unwrap_or_else(|error| {
                tracing::warn!("the embedded S3 failed: {error}");
                StatusCode::INTERNAL_SERVER_ERROR.into_response()
            })
        }
    });
    let (listener, url) = listen("S3").await?;
    servers.spawn(async move {
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept() => {
                    let Ok((socket, _)) = accepted else { continue };
                    let service = TowerToHyperService::new(app.clone());
                    connections.spawn(async move {
                        let served = Builder::new(TokioExecutor::new())
                            .serve_connection(TokioIo::new(socket), service)
                            .await;
                        if let Err(error) = served {
                            tracing::debug!("a connection to the embedded S3 failed: {error}");
                        }
                    });
                }
                Some(_) = connections.join_next() => {}
            }
        }
    });
    Ok(url)
}

/// Two processes that kept their data in one directory would overwrite each other's.
fn lock(dir: &Path) -> Result<File, LocalError> {
    let failed = |error: String| failed("servers", format!("{}: {error}", dir.display()));
    std::fs::create_dir_all(dir).map_err(|error| failed(error.to_string()))?;
    let file = File::create(dir.join("lock")).map_err(|error| failed(error.to_string()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(failed("another process uses this directory".into())),
        Err(TryLockError::Error(error)) => Err(failed(error.to_string())),
    }
}

async fn listen(server: &'static str) -> Result<(TcpListener, String), LocalError> {
    let listener =
        TcpListener::bind(("127.0.0.1", 0)).await.map_err(|error| failed(server, error))?;
    let address = listener.local_addr().map_err(|error| failed(server, error))?;
    Ok((listener, format!("http://{address}")))
}

fn failed(server: &'static str, reason: impl ToString) -> LocalError {
    LocalError { server, failed: "cannot be started".into(), reason: reason.to_string() }
}

fn refused(server: &'static str, name: &str, error: &dyn std::error::Error) -> LocalError {
    let mut reason = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        reason = format!("{reason}: {error}");
        source = error.source();
    }
    LocalError { server, failed: format!("does not make {name}"), reason }
}

/// A directory of our own that goes when we go.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> io::Result<Self> {
        let name = format!("tramline-{}-{:016x}", std::process::id(), rand::random::<u64>());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!(path = %self.0.display(), "scratch directory not removed: {error}");
        }
    }
}
