//! A socket that readers connect to.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::FileTypeExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    task::JoinSet,
    time::timeout,
};
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument as _;

use super::{
    Connections, FeedError,
    hub::{Hub, WINDOW},
    protocol::{self, Lines},
    session::{self, Encoding, Hearing, Input, Output},
};

/// How many connections there may be at a time.
const CONNECTIONS: usize = 256;
/// How long a reader may take to say its first line.
const HELLO_LIMIT: Duration = Duration::from_secs(30);
/// A peer that is silent for so long is asked whether it is still there.
const KEEPALIVE: Duration = Duration::from_secs(60);

/// The feeds of one socket.
pub(crate) enum Doors {
    /// One for all readers.
    One(Arc<Hub>),
    /// One for each reader, by its name: with acknowledgements only.
    ByName(BTreeMap<String, Arc<Hub>>),
}

/// A socket that listens. Made before the worker is: what is wrong with it shows at once.
pub(crate) struct Server {
    listener: Listener,
    place: String,
    file: Option<SocketFile>,
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// The file of a socket, removed when it is not needed any more.
pub(super) struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

impl Server {
    pub(crate) async fn tcp(address: &str) -> Result<Self, FeedError> {
        let place = format!("tcp://{address}");
        match TcpListener::bind(address).await {
            Ok(listener) => Ok(Self { listener: Listener::Tcp(listener), place, file: None }),
            Err(source) => Err(FeedError::Listen { place, source }),
        }
    }

    /// Listens at a path. A socket that a process left there when it was killed is replaced.
    pub(crate) fn unix(path: &Path) -> Result<Self, FeedError> {
        let place = format!("unix://{}", path.display());
        let failed = |source| FeedError::Listen { place: place.clone(), source };
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                let is_socket = fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
                if !is_socket {
                    return Err(FeedError::NoSocket { path: path.to_owned() });
                }
                if std::os::unix::net::UnixStream::connect(path).is_ok() {
                    return Err(FeedError::InUse { path: path.to_owned() });
                }
                tracing::info!("the socket {} was left over: it is replaced", path.display());
                fs::remove_file(path).map_err(failed)?;
                UnixListener::bind(path).map_err(failed)?
            }
            bound => bound.map_err(failed)?,
        };
        let file = Some(SocketFile(path.to_owned()));
        Ok(Self { listener: Listener::Unix(listener), place, file })
    }

    /// Serves readers for as long as what this gives is held.
    pub(crate) fn serve(self, doors: Doors, encoding: Encoding) -> Connections {
        let address = match &self.listener {
            Listener::Tcp(listener) => listener.local_addr().map(|address| address.to_string()),
            Listener::Unix(_) => Ok(self.place.clone()),
        };
        tracing::info!(address = address.unwrap_or_default(), "listening for readers");
        let span = tracing::info_span!("feed", place = self.place);
        let accepting = accept(self.listener, Arc::new(doors), encoding).instrument(span);
        let task = AbortOnDropHandle::new(tokio::spawn(accepting));
        Connections { _task: task, _file: self.file }
    }
}

async fn accept(listener: Listener, doors: Arc<Doors>, encoding: Encoding) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept(), if connections.len() < CONNECTIONS => accepted,
            Some(_) = connections.join_next() => continue,
        };
        match accepted {
            Ok((input, output, peer)) => {
                let span = tracing::info_span!("reader", peer);
                let doors = doors.clone();
                connections.spawn(welcome(input, output, doors, encoding).instrument(span));
            }
            Err(error) => {
                tracing::error!("cannot accept a reader: {error}; trying again in a second");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

impl Listener {
    async fn accept(&self) -> io::Result<(Input, Output, String)> {
        match self {
            Self::Tcp(listener) => {
                let (socket, peer) = listener.accept().await?;
                let (input, output) = tcp_halves(socket)?;
                Ok((input, output, peer.to_string()))
            }
            Self::Unix(listener) => {
                let (socket, _) = listener.accept().await?;
                let process = socket.peer_cred().ok().and_then(|peer| peer.pid());
                let peer = process.map_or(String::new(), |process| format!("process {process}"));
                let (input, output) = UnixStream::into_split(socket);
                Ok((Box::new(input), Box::new(output), peer))
            }
        }
    }
}

/// Both directions of a TCP connection, with the options that a feed wants.
pub(super) fn tcp_halves(socket: TcpStream) -> io::Result<(Input, Output)> {
    socket.set_nodelay(true)?;
    SockRef::from(&socket).set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE))?;
    let (input, output) = socket.into_split();
    Ok((Box::new(input), Box::new(output)))
}

/// Serves one connection: finds the feed that it is for, and its place there.
async fn welcome(input: Input, mut output: Output, doors: Arc<Doors>, encoding: Encoding) {
    let (hub, name, mut hearing) = match &*doors {
        Doors::One(hub) if !hub.has_acks() => (hub, String::new(), Hearing::End(input)),
        doors => match greet(input, &mut output).await {
            Ok((name, lines)) => match doors.behind(&name) {
                Ok(hub) => (hub, name, Hearing::Acks(lines)),
                Err(why) => return refused(&mut output, &why).await,
            },
            Err(why) => return refused(&mut output, &why).await,
        },
    };
    let mut joined = match hub.join(&name).await {
        Ok(joined) => joined,
        Err(there) => {
            let there = there.0;
            let why = format!(
                "this feed has its reader, {there:?}: with --readers each name has a feed of its own, with \
                 --share they share one"
            );
            return refused(&mut output, &why).await;
        }
    };
    tracing::info!(name, "reader connected");
    let end = session::serve(&mut joined, &mut hearing, &mut output, encoding).await;
    session::end(end, joined, &mut output).await;
}

async fn refused(output: &mut Output, why: &str) {
    tracing::warn!("a reader is refused: {why}");
    session::refuse(output, why).await;
}

/// Says the first line and hears that of the reader: its name, and what it says from then on.
pub(super) async fn greet(
    input: Input,
    output: &mut Output,
) -> Result<(String, Lines<Input>), String> {
    let mut lines = Lines::new(input);
    let failed = |error: std::io::Error| format!("no first line came from it: {error}");
    let greeting = async {
        let hello = protocol::hello(WINDOW);
        output.write_all(hello.as_bytes()).await.map_err(failed)?;
        output.flush().await.map_err(failed)?;
        match lines.next().await {
            Ok(Some(line)) => protocol::reader_name(&line),
            Ok(None) => Err("it closed the connection before its first line".to_owned()),
            Err(error) => Err(failed(error)),
        }
    };
    let name = timeout(HELLO_LIMIT, greeting).await;
    let name = name.unwrap_or_else(|_| Err(format!("it said nothing for {HELLO_LIMIT:?}")))?;
    Ok((name, lines))
}

impl Doors {
    /// The feed for a reader, or why there is none.
    fn behind(&self, name: &str) -> Result<&Arc<Hub>, String> {
        match self {
            Self::One(hub) => Ok(hub),
            Self::ByName(hubs) => hubs.get(name).ok_or_else(|| {
                let names: Vec<&str> = hubs.keys().map(String::as_str).collect();
                format!("no reader is named {name:?} here, by --readers: {}", names.join(", "))
            }),
        }
    }
}
