use std::{
    io::Read as _,
    net::{TcpListener, TcpStream},
    thread,
};

use crate::support::{run, tramline};

/// What `generate` sends over one connection.
fn sent(args: &[&str]) -> Vec<u8> {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let to = listener.local_addr().expect("an address").to_string();
    let reader = thread::spawn(move || {
        let (mut socket, _): (TcpStream, _) = listener.accept().expect("a connection");
        let mut bytes = Vec::new();
        socket.read_to_end(&mut bytes).expect("everything");
        bytes
    });
    run(tramline(&[&["generate", "--to", &to, "--rate", "0"], args].concat())).succeeded();
    reader.join().expect("a reader")
}

#[test]
fn the_same_seed_gives_the_same_bytes_and_another_seed_others() {
    let seven = sent(&["--messages", "300", "--seed", "7"]);
    assert_eq!(seven, sent(&["--messages", "300", "--seed", "7"]));
    assert_ne!(seven, sent(&["--messages", "300", "--seed", "8"]));
}

#[test]
fn messages_end_with_eot_and_heartbeats_come_between_them() {
    let bytes = sent(&["--messages", "300", "--profile", "morning"]);
    assert_eq!(bytes.last(), Some(&4));
    let frames: Vec<&[u8]> =
        bytes.split(|byte| *byte == 4).filter(|frame| !frame.is_empty()).collect();
    let heartbeats = frames.iter().filter(|frame| **frame == b"HEARTBEAT").count();
    assert!(heartbeats > 3);
    assert_eq!(frames.len() - heartbeats, 300);
}
