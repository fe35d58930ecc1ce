//! Whom the producer lets in, and for how long.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Shutdown, TcpStream},
    path::Path,
    sync::Arc,
    time::Duration,
};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        ClientConfig, RootCertStore,
        crypto::aws_lc_rs,
        pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName},
    },
};

use crate::support::{Running, Servers, lines, listening, raws, run, wait_for};

const STREAM: &str = "ctd-ocs-raw-messages";

fn start(servers: &Servers, more: &[&str]) -> (Running, String) {
    let args = ["produce", "--listen", "127.0.0.1:0", "--stream", STREAM, "--spool", "none"];
    listening(servers.tramline(&[&args, more].concat()))
}

fn connect(address: &str) -> TcpStream {
    let socket = TcpStream::connect(address).expect("a connection");
    socket.set_read_timeout(Some(Duration::from_secs(60))).expect("an option");
    socket
}

/// Waits until the producer closes the connection, with RST: so the read fails or ends.
fn is_closed(mut socket: TcpStream) {
    match socket.read(&mut [0]) {
        Ok(0) => {}
        Ok(_) => panic!("the producer never sends anything"),
        Err(error) => assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "still open"),
    }
}

fn stored(servers: &Servers) -> Vec<String> {
    let args = ["consume", "--stream", STREAM, "--app", "check", "--exit-when-idle", "1s"];
    let stdout = run(servers.tramline(&[&args[..], &["--retrieval", "polling"]].concat()));
    raws(&stdout.succeeded().stdout)
}

#[test]
fn only_allowed_addresses_get_in() {
    let servers = Servers::with_stream(STREAM, 1);
    let (producer, address) = start(&servers, &["--allow", "10.0.0.0/8,192.0.2.1"]);
    let mut socket = connect(&address);
    // It may be closed by now.
    let _ = socket.write_all(b"1,DIAG,12:00:00,forged\x04");
    is_closed(socket);
    producer.wait_for_log("its address is not allowed");
    let finished = producer.stop().succeeded();
    assert!(finished.stderr.contains("connections=0 refused_connections=1"), "{}", finished.stderr);
    assert!(stored(&servers).is_empty());

    let (producer, address) = start(&servers, &["--allow", "10.0.0.0/8", "--allow", "127.0.0.1"]);
    let mut socket = connect(&address);
    socket.write_all(b"1,DIAG,12:00:00,true\x04").expect("a write");
    socket.shutdown(Shutdown::Write).expect("a close");
    producer.wait_for_log("connection done");
    producer.stop().succeeded();
    assert_eq!(stored(&servers), ["1,DIAG,12:00:00,true"]);
}

#[test]
fn no_more_connections_than_wanted_are_open_and_a_closed_one_gives_its_place_away() {
    let servers = Servers::with_stream(STREAM, 1);
    let (producer, address) = start(&servers, &["--max-connections", "2"]);
    let accepted = |count| move |log: &str| log.matches("connection accepted").count() == count;
    let wait_for_accepted = |count| {
        wait_for("connections", || accepted(count)(&producer.stderr()).then_some(()));
    };
    let (first, _second) = (connect(&address), connect(&address));
    wait_for_accepted(2);
    is_closed(connect(&address));
    producer.wait_for_log("there are 2 connections, as many as there may be");
    first.shutdown(Shutdown::Both).expect("a close");
    producer.wait_for_log("connection done");
    let mut third = connect(&address);
    wait_for_accepted(3);
    third.write_all(b"1,DIAG,12:00:00,third\x04").expect("a write");
    third.shutdown(Shutdown::Write).expect("a close");
    is_closed(third);
    producer.stop().succeeded();
    assert_eq!(stored(&servers), ["1,DIAG,12:00:00,third"]);
}

#[test]
fn a_peer_that_never_ends_its_message_is_closed_however_often_it_sends_a_byte() {
    let servers = Servers::with_stream(STREAM, 1);
    let (producer, address) = start(&servers, &["--stale-after", "1s"]);
    let mut slow = connect(&address);
    slow.set_read_timeout(Some(Duration::from_millis(100))).expect("an option");
    let mut sound = connect(&address);
    wait_for("the slow connection to be closed", || {
        // This one is as slow, but ends its messages.
        sound.write_all(b"HEARTBEAT\x04").expect("it stays open");
        let _ = slow.write_all(b"x");
        match slow.read(&mut [0]) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => None,
            _ => Some(()),
        }
    });
    producer.wait_for_log("a message did not end for 1s");
    assert!(!producer.stderr().contains("no byte"), "{}", producer.stderr());
    producer.stop().succeeded();
}

#[test]
fn ocs_numbers_that_are_missing_are_told_and_counted() {
    let servers = Servers::with_stream(STREAM, 1);
    let (producer, address) = start(&servers, &[]);
    let mut socket = connect(&address);
    for line in [lines(0, 3), lines(7, 9)].concat() {
        socket.write_all(&[line.as_bytes(), &[4]].concat()).expect("a write");
    }
    // The next connection of the host goes on.
    socket.shutdown(Shutdown::Write).expect("a close");
    is_closed(socket);
    let mut socket = connect(&address);
    socket.write_all(b"10,DIAG,12:00:00,x\x04").expect("a write");
    socket.shutdown(Shutdown::Write).expect("a close");
    is_closed(socket);
    let finished = producer.stop().succeeded();
    assert!(
        finished.stderr.contains("4 messages are missing or out of place"),
        "{}",
        finished.stderr
    );
    assert!(finished.stderr.contains("missing=5"), "{}", finished.stderr);
}

/// A root, and a certificate that it vouches for, with its key.
struct Certificates {
    root: CertifiedIssuer<'static, KeyPair>,
}

impl Certificates {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        Self { root: CertifiedIssuer::self_signed(params, key).expect("a root") }
    }

    /// A certificate in DER and PEM, and its key.
    fn issue(&self) -> (rcgen::Certificate, KeyPair) {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::IpAddress(IpAddr::V4(Ipv4Addr::LOCALHOST))];
        (params.signed_by(&key, &self.root).expect("a certificate"), key)
    }
}

/// What a peer connects with: it trusts `server`, and shows a certificate of `client`.
fn connector(server: &Certificates, client: Option<&Certificates>) -> TlsConnector {
    let mut roots = RootCertStore::empty();
    roots.add(server.root.der().clone()).expect("a root");
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots);
    let config = match client {
        None => config.with_no_client_auth(),
        Some(client) => {
            let (certificate, key) = client.issue();
            let chain: Vec<CertificateDer<'static>> = vec![certificate.der().clone()];
            let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
            config.with_client_auth_cert(chain, key).expect("a certificate")
        }
    };
    TlsConnector::from(Arc::new(config))
}

/// Sends a line, and waits until the producer closes the connection.
async fn send(connector: TlsConnector, address: &str, line: &str) -> std::io::Result<()> {
    let socket = net::TcpStream::connect(address).await?;
    let name = ServerName::from(IpAddr::V4(Ipv4Addr::LOCALHOST));
    let mut socket = connector.connect(name, socket).await?;
    socket.write_all(&[line.as_bytes(), &[4]].concat()).await?;
    socket.shutdown().await?;
    socket.read(&mut [0]).await.map(drop)
}

#[test]
fn over_tls_only_peers_with_a_certificate_get_in_if_that_is_wanted() {
    let servers = Servers::with_stream(STREAM, 1);
    let directory = tempfile::tempdir().expect("a directory");
    let write = |name: &str, pem: String| {
        let path = directory.path().join(name);
        fs::write(&path, pem).expect("a write");
        path.to_str().expect("a path").to_owned()
    };
    let (ours, clients, strangers) =
        (Certificates::new(), Certificates::new(), Certificates::new());
    let (certificate, key) = ours.issue();
    let cert = write("cert.pem", certificate.pem());
    let key = write("key.pem", key.serialize_pem());
    let roots = write("roots.pem", clients.root.pem());
    let args = ["--tls-cert", &cert, "--tls-key", &key, "--tls-client-ca", &roots];
    let (producer, address) = start(&servers, &args);
    let try_sending = |client: Option<&Certificates>, line: &str| {
        let sent = servers.wait(send(connector(&ours, client), &address, line));
        // A producer closes with RST.
        sent.is_ok()
    };
    try_sending(Some(&clients), "1,DIAG,12:00:00,known");
    producer.wait_for_log("connection done");
    try_sending(None, "2,DIAG,12:00:00,without");
    try_sending(Some(&strangers), "3,DIAG,12:00:00,stranger");
    let mut plain = connect(&address);
    plain.write_all(b"4,DIAG,12:00:00,plain\x04").expect("a write");
    // What TLS says to it, and the end.
    let _ = plain.read_to_end(&mut Vec::new());
    let finished = producer.stop().succeeded();
    assert_eq!(finished.stderr.matches("TLS could not be agreed on").count(), 3);
    assert_eq!(stored(&servers), ["1,DIAG,12:00:00,known"]);
}

#[test]
fn tls_files_that_cannot_be_used_are_named() {
    let servers = Servers::with_stream(STREAM, 1);
    let directory = tempfile::tempdir().expect("a directory");
    let path = |name: &str| Path::join(directory.path(), name).to_str().expect("a path").to_owned();
    let (cert, key) = (path("cert.pem"), path("key.pem"));
    let args = ["produce", "--stream", STREAM, "--spool", "none", "--listen", "127.0.0.1:0"];
    let try_it = || {
        let args = [&args[..], &["--tls-cert", &cert, "--tls-key", &key]].concat();
        let finished = run(servers.tramline(&args));
        assert_eq!(finished.status.code(), Some(1));
        finished.stderr
    };
    let missing = try_it();
    assert!(missing.contains(&format!("the TLS file {cert} cannot be read")), "{missing}");
    fs::write(&cert, "nothing").expect("a write");
    let empty = try_it();
    assert!(empty.contains(&format!("{cert} holds no usable certificate")), "{empty}");
    let (certificate, other) = (Certificates::new().issue().0, KeyPair::generate().expect("a key"));
    fs::write(&cert, certificate.pem()).expect("a write");
    fs::write(&key, other.serialize_pem()).expect("a write");
    let mixed = try_it();
    assert!(mixed.contains("holds no usable certificate"), "a key of another one: {mixed}");
}
