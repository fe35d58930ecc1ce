//! `/healthz`, `/readyz`, `/metrics` and the status page, over HTTP.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, OnceLock},
    time::Duration,
};

use axum::{
    Json, Router,
    extract::State,
    http::{HeaderValue, StatusCode, header},
    response::{Html, IntoResponse, Response},
    routing::get,
};
use futures_util::future::join_all;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
    service::TowerToHyperService,
};
use jiff::Timestamp;
use serde_json::json;
use tokio::{
    net::TcpListener,
    sync::Semaphore,
    time::{Instant, MissedTickBehavior, interval, sleep, timeout},
};
use tokio_util::task::AbortOnDropHandle;

use super::{
    ObservedWorker, WorkerLook,
    history::{self, History},
    metrics::{self, Snapshot},
    page::{Fleet, Page, Parts},
    readiness::{self, Reason},
    recent::Recent,
};
use crate::{
    host,
    produce::{ProducerMonitor, ProducerStats},
};

const PAGE: &str = include_str!("page.html");
/// However many look at the page, the lease table is read this often.
const FLEET_INTERVAL: Duration = Duration::from_secs(2);
/// A page is not held up by a lease table that does not answer.
const FLEET_LIMIT: Duration = Duration::from_secs(2);
/// More at once wait.
const CONNECTIONS: usize = 64;
/// How long the head of a request may take.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);
/// A page that is looked at longer connects again.
const CONNECTION_LIMIT: Duration = Duration::from_secs(300);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const POLICY: &str = "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; \
                      style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; \
                      frame-ancestors 'none'";

/// Reads who reads which shard.
pub(crate) type LookAtFleet =
    Box<dyn Fn() -> Pin<Box<dyn Future<Output = Fleet> + Send>> + Send + Sync>;

/// What runs in the process; set when it does.
pub(crate) enum Subject {
    /// One for each application.
    Workers(Vec<WorkerSubject>),
    Producer(Arc<OnceLock<ProducerMonitor>>),
}

/// The worker of an application.
pub(crate) struct WorkerSubject {
    pub worker: ObservedWorker,
    /// Who reads what, if there is a lease table.
    pub fleet: Option<LookAtFleet>,
}

/// What is told of a process.
pub(crate) struct Served {
    /// The command that runs.
    pub command: &'static str,
    /// What it works on, for people.
    pub title: String,
    pub subject: Subject,
    pub recent: Recent,
}

struct Shared {
    served: Served,
    history: Mutex<History>,
    /// The last look at the table of each application.
    fleets: Vec<tokio::sync::Mutex<Option<(Instant, Fleet)>>>,
}

/// Binds the address, so that a port that is taken is an error at the start.
pub(crate) async fn bind(address: SocketAddr) -> Result<TcpListener, io::Error> {
    TcpListener::bind(address).await.map_err(|error| {
        io::Error::other(format!(
            "cannot listen on {address} for --http: {error}; choose another address, or stop what uses it"
        ))
    })
}

impl Subject {
    fn workers(&self) -> &[WorkerSubject] {
        match self {
            Self::Workers(workers) => workers,
            Self::Producer(_) => &[],
        }
    }
}

impl Served {
    /// Answers until the handle is dropped.
    pub(crate) fn serve(self, listener: TcpListener) -> AbortOnDropHandle<()> {
        let fleets = self.subject.workers().iter().map(|_| tokio::sync::Mutex::default()).collect();
        let shared = Arc::new(Shared { served: self, history: Mutex::default(), fleets });
        if let Ok(address) = listener.local_addr() {
            tracing::info!("status page at http://{address}/, with /healthz, /readyz and /metrics");
        }
        let router = Router::new()
            .route("/", get(async || with_headers(Html(PAGE))))
            .route("/healthz", get(async || with_headers(Json(json!({"alive": true})))))
            .route("/readyz", get(readyz))
            .route("/metrics", get(metrics))
            .route("/status.json", get(status))
            .with_state(shared.clone());
        AbortOnDropHandle::new(tokio::spawn(async move {
            tokio::join!(sample(&shared), accept(listener, router));
        }))
    }
}

/// Takes connections. Whoever is slow is so at their own cost, and not for ever.
async fn accept(listener: TcpListener, router: Router) {
    let connections = Arc::new(Semaphore::new(CONNECTIONS));
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(REQUEST_LIMIT);
    while let Ok(permit) = connections.clone().acquire_owned().await {
        let Ok((stream, _)) = listener.accept().await else {
            // Out of file descriptors, most likely.
            sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let (builder, router) = (builder.clone(), router.clone());
        tokio::spawn(async move {
            let _permit = permit;
            let serving =
                builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
            // How a connection ends is the peer's business.
            let _ = timeout(CONNECTION_LIMIT, serving).await;
        });
    }
}

async fn sample(shared: &Shared) {
    let mut ticks = interval(history::INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        shared.history().sample(&shared.workers());
    }
}

impl Shared {
    fn workers(&self) -> Vec<WorkerLook> {
        self.served.subject.workers().iter().map(|subject| subject.worker.look()).collect()
    }

    async fn producer(&self) -> Option<ProducerStats> {
        match &self.served.subject {
            Subject::Workers(_) => None,
            Subject::Producer(monitor) => monitor.get()?.stats().await.ok(),
        }
    }

    async fn look(&self) -> Look {
        let (workers, producer) = (self.workers(), self.producer().await);
        let reasons = match &self.served.subject {
            Subject::Workers(_) => readiness::workers(&workers),
            Subject::Producer(_) => readiness::producer(producer.as_ref()),
        };
        Look { workers, producer, reasons }
    }

    /// What the lease table of each application tells, as of not long ago.
    async fn fleets(&self) -> Vec<Option<Fleet>> {
        let subjects = self.served.subject.workers().iter();
        let looks = subjects.zip(&self.fleets).map(|(subject, last)| fleet(subject, last));
        join_all(looks).await
    }

    fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}

async fn fleet(
    subject: &WorkerSubject,
    last: &tokio::sync::Mutex<Option<(Instant, Fleet)>>,
) -> Option<Fleet> {
    let look = subject.fleet.as_ref()?;
    let mut last = last.lock().await;
    if let Some((at, fleet)) = &*last
        && at.elapsed() < FLEET_INTERVAL
    {
        return Some(fleet.clone());
    }
    let fleet = timeout(FLEET_LIMIT, look()).await.unwrap_or_else(|_| {
        let text = format!("the lease table does not answer within {} s", FLEET_LIMIT.as_secs());
        Err(text)
    });
    *last = Some((Instant::now(), fleet.clone()));
    Some(fleet)
}

/// How the process is at one moment.
struct Look {
    workers: Vec<WorkerLook>,
    producer: Option<ProducerStats>,
    reasons: Vec<Reason>,
}

async fn readyz(State(shared): State<Arc<Shared>>) -> Response {
    let Look { reasons, .. } = shared.look().await;
    let ready = reasons.is_empty();
    let code = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    with_headers((code, Json(json!({"ready": ready, "reasons": reasons}))))
}

async fn metrics(State(shared): State<Arc<Shared>>) -> Response {
    let Look { workers, producer, reasons } = shared.look().await;
    let snapshot = Snapshot {
        ready: reasons.is_empty(),
        resident_bytes: host::resident_bytes(),
        workers,
        producer,
        at: Timestamp::now(),
    };
    match snapshot.text() {
        Ok(text) => with_headers(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text)),
        Err(error) => with_headers((StatusCode::INTERNAL_SERVER_ERROR, error.to_string())),
    }
}

async fn status(State(shared): State<Arc<Shared>>) -> Response {
    let fleets = shared.fleets().await;
    let Look { workers, producer, reasons } = shared.look().await;
    let page = Page::new(Parts {
        at: Timestamp::now(),
        command: shared.served.command,
        title: shared.served.title.clone(),
        reasons,
        resident_bytes: host::resident_bytes(),
        workers: workers.into_iter().zip(fleets).collect(),
        producer,
        history: &shared.history(),
        errors: shared.served.recent.entries(),
    });
    with_headers(Json(page))
}

/// The page is whole in itself: nothing of it may come from elsewhere, and nothing of it is kept.
fn with_headers(answer: impl IntoResponse) -> Response {
    let mut answer = answer.into_response();
    for (name, value) in [
        (header::CACHE_CONTROL, "no-store"),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ] {
        answer.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    answer
}
