//! Signals, what systemd is told, completions and manual pages.

use std::{
    fs,
    io::Write as _,
    net::TcpStream,
    os::unix::{net::UnixDatagram, process::ExitStatusExt as _},
    path::Path,
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    thread,
};

use tramline::lease::{LeaseStore as _, dynamodb::LeaseTable};

use crate::support::{Running, Servers, lines, listening, run, tramline, wait_for};

const STREAM: &str = "ctd-ocs-raw-messages";
const CONSUME: [&str; 5] = ["consume", "--stream", STREAM, "--app", "signals"];

/// A socket as systemd has it, and what was sent to it.
struct Systemd {
    folder: tempfile::TempDir,
    sent: Arc<Mutex<String>>,
}

impl Systemd {
    fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = UnixDatagram::bind(folder.path().join("notify")).expect("a socket");
        let sent = Arc::<Mutex<String>>::default();
        let noted = sent.clone();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length) = socket.recv(&mut buffer) {
                let text = String::from_utf8_lossy(&buffer[..length]);
                noted.lock().expect("a lock").push_str(&text);
            }
        });
        Self { folder, sent }
    }

    fn watches(&self, mut command: Command) -> Command {
        command
            .env("NOTIFY_SOCKET", self.folder.path().join("notify"))
            .env("WATCHDOG_USEC", "600000");
        command
    }

    fn sent(&self) -> String {
        self.sent.lock().expect("a lock").clone()
    }

    fn wait_for(&self, line: &str) {
        let all = || self.sent();
        let told = || all().lines().any(|told| told == line).then_some(());
        wait_for(format!("{line:?} from tramline"), told);
    }
}

#[test]
fn systemd_is_told_when_a_worker_is_ready_that_it_lives_and_when_it_stops() {
    let servers = Servers::with_stream(STREAM, 2);
    let systemd = Systemd::start();
    let running = Running::start(systemd.watches(servers.tramline(&CONSUME)));
    systemd.wait_for("READY=1");
    // A worker that is told to be ready holds its leases.
    let table = LeaseTable::new(&servers.local.sdk_config(), "signals");
    let leases = servers.wait(table.scan()).expect("leases");
    assert!(leases.iter().any(|lease| lease.owner.is_some()), "{leases:?}");
    systemd.wait_for("WATCHDOG=1");
    running.stop().succeeded();
    systemd.wait_for("STOPPING=1");
    let sent = systemd.sent();
    assert_eq!(sent.matches("READY=1").count(), 1, "{sent}");
    let place = |text: &str| sent.find(text).expect("told");
    assert!(
        place("STATUS=") < place("READY=1") && place("READY=1") < place("STOPPING=1"),
        "{sent}"
    );
}

#[test]
fn systemd_is_told_when_a_producer_listens() {
    let servers = Servers::with_stream(STREAM, 1);
    let systemd = Systemd::start();
    let produce = ["produce", "--listen", "127.0.0.1:0", "--stream", STREAM];
    let running = Running::start(systemd.watches(servers.tramline(&produce)));
    systemd.wait_for("READY=1");
    systemd.wait_for("WATCHDOG=1");
    running.stop().succeeded();
    systemd.wait_for("STOPPING=1");
}

#[test]
fn p8_systemd_is_told_that_the_spool_takes_nothing() {
    let servers = Servers::with_stream(STREAM, 1);
    let systemd = Systemd::start();
    let spool = tempfile::tempdir().expect("a folder");
    // Kinesis is away, and no file may get larger than some MiB.
    let mut limited = systemd.watches(Command::new("sh"));
    limited
        .args(["-c", "trap '' XFSZ; ulimit -f 16384; exec \"$@\"", "sh"])
        .arg(env!("CARGO_BIN_EXE_tramline"))
        .args(["produce", "--listen", "127.0.0.1:0", "--stream", STREAM, "--spool"])
        .arg(spool.path())
        .envs(servers.local.environment())
        .env("AWS_ENDPOINT_URL_KINESIS", "http://127.0.0.1:1");
    let (running, address) = listening(limited);
    systemd.wait_for("READY=1");
    thread::spawn(move || {
        let mut socket = TcpStream::connect(address).expect("a connection");
        let message = format!("1,TMOV,12:00:00,{}\x04", "x".repeat(10_000));
        // Until the producer does not read any more.
        while socket.write_all(message.as_bytes()).is_ok() {}
    });
    let told = || systemd.sent().contains("STATUS=the spool takes nothing since").then_some(());
    wait_for("the state of the spool", told);
    assert_eq!(systemd.sent().matches("READY=1").count(), 1);
    drop(running);
}

/// A worker that cannot stop cleanly: nobody reads its output.
fn stuck(servers: &Servers) -> Running {
    let all = lines(0, 20_000);
    for lines in all.chunks(2000) {
        servers.put_lines(STREAM, "k", lines);
    }
    let (mut running, out, err) = Running::start_unread(servers.tramline(&CONSUME));
    running.read_stderr(err);
    // Open, and never read.
    std::mem::forget(out);
    running.wait_for_log("lease taken");
    running
}

#[test]
fn p6_a_second_signal_ends_the_process_at_once_with_its_exit_code() {
    for (first, second, code) in [("TERM", "TERM", 143), ("TERM", "INT", 130), ("INT", "TERM", 143)]
    {
        let servers = Servers::with_stream(STREAM, 1);
        let running = stuck(&servers);
        running.signal(first);
        running.wait_for_log("stopping cleanly; send it again to end at once");
        running.signal(second);
        let finished = running.finish();
        assert_eq!(finished.status.code(), Some(code), "{finished:?}");
        assert_eq!(finished.status.signal(), None);
    }
}

#[test]
fn a_hangup_reads_the_level_of_the_log_again_and_stops_nothing() {
    let servers = Servers::with_stream(STREAM, 1);
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("tramline.toml");
    fs::write(&file, "").expect("a file");
    let produce = ["produce", "--listen", "127.0.0.1:0", "--stream", STREAM, "--config"];
    let config = [file.to_str().expect("a path")];
    let running = Running::start(servers.tramline(&[&produce[..], &config].concat()));
    running.wait_for_log("listening for OCS connections");
    let log = running.stderr();
    let (_, rest) = log.split_once("address=").expect("an address");
    let address = rest.split_whitespace().next().expect("an address").to_owned();
    let send = || {
        let mut socket = TcpStream::connect(&address).expect("a connection");
        socket.write_all(b"1,DIAG,12:00:00,line\x04").expect("a write");
    };
    send();
    running.wait_for_log("connection closed by the peer");
    assert!(!running.stderr().contains("DEBUG"));
    fs::write(&file, "verbose = 1\n").expect("a file");
    running.signal("HUP");
    running.wait_for_log("the level of the log was read again");
    send();
    running.wait_for_log("DEBUG");
    // A slip in the file changes nothing, and is told.
    fs::write(&file, "vrbose = 1\n").expect("a file");
    running.signal("HUP");
    running.wait_for_log("did you mean `verbose`?");
    running.stop().succeeded();
}

#[test]
fn the_units_are_valid() {
    for unit in ["tramline-consume.service", "tramline-produce.service"] {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd").join(unit);
        let text = fs::read_to_string(&source).expect("a unit");
        for line in ["Type=notify", "WatchdogSec=60", "ExecReload=/bin/kill -HUP $MAINPID"] {
            assert!(text.lines().any(|has| has == line), "{unit}: {line}");
        }
        // The program stands somewhere else here.
        let text = text.replace("/usr/local/bin/tramline", env!("CARGO_BIN_EXE_tramline"));
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join(unit), text).expect("a unit");
        let verify = Command::new("systemd-analyze")
            .args(["verify", "--man=no"])
            .arg(folder.path().join(unit))
            .output();
        let Ok(verified) = verify else {
            eprintln!("systemd-analyze is not there: {unit} is not verified");
            continue;
        };
        // It also tells of other units of this machine.
        let said = String::from_utf8_lossy(&verified.stderr).into_owned();
        let of_ours: Vec<&str> = said.lines().filter(|line| line.contains(unit)).collect();
        assert!(of_ours.is_empty(), "{said}");
    }
}

#[test]
fn completions_and_manual_pages_have_every_command() {
    let help = run(tramline(&["--help"])).succeeded().stdout;
    let commands = help.iter().skip_while(|line| *line != "Commands:").skip(1);
    let commands: Vec<&str> = commands
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != "help")
        .collect();
    assert!(commands.contains(&"consume") && commands.contains(&"check"), "{commands:?}");
    for shell in ["bash", "zsh", "fish"] {
        let script = run(tramline(&["completions", shell])).succeeded().stdout.join("\n");
        for word in commands.iter().chain(&["lease-table", "max-checkpoint-age"]) {
            assert!(script.contains(word), "{shell} does not complete {word}");
        }
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("script");
        fs::write(&file, script).expect("a file");
        let checked = Command::new(shell).arg("-n").arg(&file).stderr(Stdio::inherit()).status();
        assert!(checked.map_or(true, |status| status.success()), "{shell} cannot read its script");
    }
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().to_str().expect("a path");
    run(tramline(&["man", path])).succeeded();
    for command in commands {
        let page = fs::read_to_string(folder.path().join(format!("tramline-{command}.1")));
        let page = page.expect("a page");
        assert!(page.contains(".TH") && page.contains("tramline "), "{page}");
    }
    let page = run(tramline(&["man"])).succeeded().stdout.join("\n");
    assert_eq!(page + "\n", fs::read_to_string(folder.path().join("tramline.1")).expect("a page"));
    let failed = run(tramline(&["man", "/no/such/folder"]));
    assert!(failed.stderr.contains("/no/such/folder"), "{failed:?}");
}
