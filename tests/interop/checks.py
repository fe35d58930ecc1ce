"""The checks of tests/interop/run: what the program does, seen from outside, on servers of others.

Reading order: `SCENARIOS` at the end, then a scenario, then what it uses.
"""

import argparse
import base64
import datetime
import gzip
import hashlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from typing import NamedTuple

from browser import Browser

# No wait takes this many seconds unless something is wrong. Generous: machines differ.
LIMIT = 60
REGION = "us-east-1"
# More than one, so that nothing passes only because there is one of it. Fewer than Kinesalite's limit
# of 10 shards an account allows for all scenarios together.
SHARDS = 2
CONNECTIONS = 3
# With the Java KCL: shards for two workers on each side, and so many connections that each shard has some.
FLEET_SHARDS = 4
FLEET_CONNECTIONS = 24
# Messages a second.
FLEET_RATE = 100
# The lease duration of Tramline is what the KCL calls its failover time: one value for all workers.
LEASE_SECONDS = 3
# The KCL waits up to 30 s at random before it fills an empty lease table, and a cold JVM takes its time.
KCL_LIMIT = 120
# Quick to start, and small: several run at once on a small machine.
JAVA = ["java", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xmx256m"]
LOG_TIMES = [
    "-Dorg.slf4j.simpleLogger.showDateTime=true", "-Dorg.slf4j.simpleLogger.dateTimeFormat=HH:mm:ss.SSS",
]
# Neither someone's AWS profile or region nor a TRAMLINE_ setting may get in.
BARE_ENV = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}


class GaveUp(Exception):
    """Something did not happen; the rest of the scenario makes no sense."""


def wait_for(what, look, limit=LIMIT):
    """Looks until there is something, and gives that."""
    give_up = time.monotonic() + limit
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > give_up:
            raise GaveUp(f"waited {limit} s in vain for {what}")
        time.sleep(0.05)


class Process:
    """A running program whose output goes to files."""

    started = []

    def __init__(self, name, command, env, folder):
        self.name = name
        base = os.path.join(folder, f"{len(Process.started):02}-{name}")
        self.stdout_path, self.stderr_path = base + ".stdout", base + ".stderr"
        with open(self.stdout_path, "wb") as stdout, open(self.stderr_path, "wb") as stderr:
            # Its own session: Ctrl-C comes to us alone, and we end the others.
            self.child = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, cwd=folder,
                start_new_session=True,
            )
        Process.started.append(self)

    def stdout(self):
        with open(self.stdout_path, "rb") as file:
            return file.read()

    def stderr(self):
        with open(self.stderr_path, encoding="utf-8", errors="replace") as file:
            return file.read()

    def tail(self):
        lines = self.stderr().splitlines()[-15:] or ["nothing on stderr"]
        return "".join(f"\n      {self.name}: {line}" for line in lines)

    def is_running(self):
        return self.child.poll() is None

    def until_logged(self, pattern, times=1):
        """Waits until the pattern stands on stderr as often as that, and gives the last match."""

        def look():
            running = self.is_running()  # Before the look: what it wrote last counts.
            matches = list(re.finditer(pattern, self.stderr()))
            if len(matches) >= times:
                return matches[-1]
            if not running:
                raise GaveUp(f"{self.name} ended without saying {pattern!r}")
            return None

        return wait_for(f"{self.name} to say {pattern!r}", look)

    def exit_code(self):
        """Waits for the end; negative is the signal that ended it."""
        try:
            return self.child.wait(LIMIT)
        except subprocess.TimeoutExpired:
            raise GaveUp(f"{self.name} was still running after {LIMIT} s") from None

    def terminate(self):
        """Asks for a clean stop and gives the exit code."""
        self.child.send_signal(signal.SIGTERM)
        return self.exit_code()

    def kill(self):
        if self.is_running():
            self.child.kill()
        self.child.wait()


class Servers:
    """One Kinesis with one DynamoDB, and what the scenarios do with them."""

    def __init__(self, name, kinesis, dynamodb, tramline, folder, kcl=None, aggregators=None):
        self.name = name
        self.urls = {"kinesis": kinesis, "dynamodb": dynamodb}
        self.program = tramline
        self.kcl_folder = kcl
        self.aggregators = aggregators
        self.folder = folder
        self.passed = self.failed = 0
        self.env = BARE_ENV | {
            "AWS_ENDPOINT_URL_KINESIS": kinesis,
            "AWS_ENDPOINT_URL_DYNAMODB": dynamodb,
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_REGION": REGION,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def tramline(self, *arguments):
        return Process(arguments[0], [self.program, *arguments], self.env, self.folder)

    def kcl(self, worker, stream, app, mode, retrieval="polling"):
        """A worker of the Java KCL. Its mode is 3X, or COMPATIBLE_WITH_2X: leases are taken as in 2.x."""
        settings = {
            "stream": stream, "app": app, "worker": worker, "mode": mode, "retrieval": retrieval,
            "failover-millis": str(LEASE_SECONDS * 1000), **self.urls,
        }
        arguments = [word for name, value in settings.items() for word in (f"--{name}", value)]
        path = os.path.join(self.kcl_folder, "classes") + ":" + os.path.join(self.kcl_folder, "lib", "*")
        # The embedded Kinesis is used with JSON, not CBOR, as the others here.
        java = [*JAVA, *LOG_TIMES, "-Daws.cborEnabled=false", "-cp", path, "KclWorker"]
        return Process("kcl", [*java, *arguments], self.env, self.folder)

    def check(self, ok, what, process=None, detail=""):
        """Reports a check; of a process, if it is to blame, with the end of its stderr."""
        if ok:
            self.passed += 1
            print(f"ok   {self.name}  {what}", flush=True)
            return
        self.failed += 1
        if detail:
            detail = f": {detail}"
        print(f"FAIL {self.name}  {what}{detail}{process.tail() if process else ''}", flush=True)

    def check_exit(self, process, code, wanted, what):
        self.check(code == wanted, f"{what} (exit code {wanted})", process, f"exit code {code}")

    def call(self, service, operation, **body):
        return aws(self.urls[service], service, operation, body)

    def left_out(self, what, reason):
        print(f"left out: {self.name}  {what}, because {reason}", flush=True)

    def create_stream(self, name, shards=SHARDS):
        self.call("kinesis", "CreateStream", StreamName=name, ShardCount=shards)

        def is_active():
            answer = self.call("kinesis", "DescribeStreamSummary", StreamName=name)
            return answer["StreamDescriptionSummary"]["StreamStatus"] == "ACTIVE"

        wait_for(f"stream {name} to become active", is_active)
        return name

    def rows(self, table):
        if table not in self.call("dynamodb", "ListTables")["TableNames"]:
            return []
        return self.call("dynamodb", "Scan", TableName=table, ConsistentRead=True)["Items"]

    def leases(self, table):
        # The KCL keeps rows of other kinds in the same table; leases have a counter.
        return [row for row in self.rows(table) if "leaseCounter" in row]

    def owners(self, table):
        """The owner of each shard that has one."""
        return {
            lease["leaseKey"]["S"]: lease["leaseOwner"]["S"]
            for lease in self.leases(table) if "leaseOwner" in lease
        }


TARGETS = {"kinesis": "Kinesis_20131202", "dynamodb": "DynamoDB_20120810"}
# Whatever proxy the environment names is not for us.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def aws(url, service, operation, body):
    """One AWS call. The servers look at the shape of the signature only; moto finds the service by it."""
    now = datetime.datetime.now(datetime.timezone.utc)
    headers = {
        "Content-Type": "application/x-amz-json-" + ("1.1" if service == "kinesis" else "1.0"),
        "X-Amz-Target": f"{TARGETS[service]}.{operation}",
        "X-Amz-Date": now.strftime("%Y%m%dT%H%M%SZ"),
        "Authorization": f"AWS4-HMAC-SHA256 Credential=x/{now:%Y%m%d}/{REGION}/{service}/aws4_request, "
        f"SignedHeaders=host;x-amz-date, Signature={'0' * 64}",
    }
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with OPENER.open(request, timeout=10) as answer:
            return json.loads(answer.read() or "{}")
    except urllib.error.HTTPError as error:
        raise GaveUp(f"{operation}: {error}: {error.read().decode(errors='replace')[:300]}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise GaveUp(f"{operation}: {error!r}") from None


class Message(NamedTuple):
    """An OCS message, from `consume --format json` or out of a record that the Java KCL wrote."""

    shard: str
    sequence_number: str
    key: str
    # OCS numbers the messages of a connection one by one, and a connection has its own partition key.
    counter: int


LINE_KEYS = [
    "stream", "shard", "sequence_number", "sub_sequence_number", "partition_key", "arrived_at", "event",
]


def messages(consumer):
    """What a consumer wrote to stdout. A line without its end is not there yet."""
    lines = consumer.stdout().split(b"\n")[:-1]
    return [message for line in lines for message in messages_of_line(consumer, line)]


def messages_of_line(consumer, line):
    try:
        place = json.loads(line)
        if consumer.name == "kcl":
            texts = place["raw"]
        elif list(place) == LINE_KEYS:
            texts = [place["event"]["data"]["raw"]]
        else:
            raise ValueError(f"its keys are not {LINE_KEYS}")
        where = place["shard"], place["sequence_number"], place["partition_key"]
        return [Message(*where, int(text.split(",")[0])) for text in texts]
    except (ValueError, KeyError, TypeError) as error:
        raise GaveUp(f"{consumer.name} wrote a line that is no message: {line[:200]!r}: {error}") from None


def out_of_order(found):
    """Where the counter does not rise by one: after a gap, a repetition or a swap."""
    last = {}
    wrong = []
    for message in found:
        before = last.get(message.key)
        if before is not None and message.counter != before + 1:
            wrong.append(f"{message.counter} after {before} in partition {message.key}")
        last[message.key] = message.counter
    return wrong


def count_each(found):
    """How many messages there are, not counting repetitions."""
    return len({(message.key, message.counter) for message in found})


class Traffic:
    """OCS senders and the producer they are connected to."""

    def __init__(self, servers, stream, count, rate=0, connections=CONNECTIONS, encoding="array"):
        self.servers, self.count, self.connections = servers, count, connections
        spool = tempfile.mkdtemp(prefix="spool-", dir=servers.folder)
        self.producer = servers.tramline(
            "produce", "--listen", "127.0.0.1:0", "--stream", stream, "--spool", spool, "--encoding", encoding,
        )
        listening = self.producer.until_logged(r"listening for OCS connections address=(\S+)")
        self.generator = servers.tramline(
            "generate", "--to", listening[1], "--messages", str(count), "--rate", str(rate),
            "--connections", str(connections), "--seed", "5",
        )

    def finish(self):
        if code := self.generator.exit_code():
            raise GaveUp(f"generate ended with exit code {code}")
        # A stopping producer does not read on: what it has not read by then is not its own.
        self.producer.until_logged("connection done", self.connections)
        code = self.producer.terminate()
        self.servers.check_exit(self.producer, code, 0, f"produce takes {self.count} messages and stops")


def check_delivered(servers, consumer, count, what):
    """Every message once, in order: so many, with the counter rising by one."""
    found = messages(consumer)
    wrong = out_of_order(found)
    keys = len({message.key for message in found})
    # A line that is not ended is none of ours: stdout carries messages and nothing else.
    rest = consumer.stdout().split(b"\n")[-1]
    servers.check(
        len(found) == count and keys == CONNECTIONS and not wrong and not rest, what, consumer,
        f"{len(found)} messages of {keys} connections; out of order: {wrong[:3]}; rest: {rest[:200]!r}",
    )
    return found


def delivery(servers):
    """Everything comes out once, in order; after a clean stop the next consumer goes on there."""
    stream, app = servers.create_stream("delivery"), "delivery-app"
    consume = ["consume", "--stream", stream, "--app", app, "--exit-when-idle", "3s", "--format", "json"]

    Traffic(servers, stream, 500).finish()
    consumer = servers.tramline(*consume, "--retrieval", "auto")
    servers.check_exit(consumer, consumer.exit_code(), 0, "consume stops when idle")
    first = check_delivered(servers, consumer, 500, "all 500 messages come once and in order")
    told = consumer.stderr().count("falling back to polling")
    servers.check(told == 1, "auto falls back to polling and says so once", consumer, f"{told} times")
    check_leases(servers, app, first)

    Traffic(servers, stream, 200).finish()
    consumer = servers.tramline(*consume)
    servers.check_exit(consumer, consumer.exit_code(), 0, "the next consumer stops when idle")
    second = check_delivered(servers, consumer, 200, "it gets the 200 new messages and nothing else")
    check_leases(servers, app, first + second)


def check_leases(servers, app, delivered):
    """After a clean stop the table has the Java KCL's attributes, no owners, and what was delivered."""
    types = {
        "leaseKey": "S",
        "leaseCounter": "N",
        "checkpoint": "S",
        "checkpointSubSequenceNumber": "N",
        "ownerSwitchesSinceCheckpoint": "N",
    }
    leases = servers.leases(app)
    wrong = [
        f"{name} is not of type {kind} in {lease}"
        for lease in leases for name, kind in types.items() if list(lease.get(name, [])) != [kind]
    ]
    wrong += [f"an owner after a clean stop in {lease}" for lease in leases if "leaseOwner" in lease]
    if len(leases) != SHARDS:
        wrong.append(f"{len(leases)} leases for {SHARDS} shards")
    what = "every lease row is as the Java KCL writes it, without an owner"
    servers.check(not wrong, what, detail=str(wrong))
    if wrong:
        return
    last = {message.shard: message.sequence_number for message in delivered}
    # The hash of a partition key may leave a shard without a message.
    wanted = {lease["leaseKey"]["S"]: last.get(lease["leaseKey"]["S"], "TRIM_HORIZON") for lease in leases}
    stored = {lease["leaseKey"]["S"]: lease["checkpoint"]["S"] for lease in leases}
    servers.check(
        stored == wanted, "the checkpoints are the last records delivered",
        detail=f"stored {stored}, delivered {wanted}",
    )


def readers(servers):
    """The example readers get every message, in order, and the checkpoint waits for them."""
    stream, app = servers.create_stream("readers"), "readers-app"
    examples = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "examples")
    log = os.path.join(servers.folder, f"{servers.name}-reader.log")
    consumer = servers.tramline(
        "consume", "--stream", stream, "--app", app, "--acks",
        "--output", "python=tcp://127.0.0.1:0",
        "--output", f"shell=exec:exec sh '{examples}/reader.sh' '{log}'",
    )
    address = consumer.until_logged(r'listening for readers address="?([^"\s]+)')[1]
    python = [sys.executable, f"{examples}/reader.py", f"tcp:{address}"]
    reader = Process("reader", python, BARE_ENV, servers.folder)
    Traffic(servers, stream, 300).finish()

    def lines_of(path):
        with open(path, "rb") as file:
            return file.read().split(b"\n")[:-1]

    for path, name in ((reader.stdout_path, "Python"), (log, "shell")):
        wait_for(f"300 messages in {path}", lambda: os.path.exists(path) and len(lines_of(path)) >= 300)
        servers.check(len(lines_of(path)) == 300, f"the {name} reader gets every message once", consumer)
    servers.check_exit(consumer, consumer.terminate(), 0, "the feeds stop")
    for name in ("python", "shell"):
        rest = servers.tramline("consume", "--stream", stream, "--app", f"{app}-{name}", "--exit-when-idle", "3s")
        servers.check_exit(rest, rest.exit_code(), 0, f"what the {name} reader left is read")
        servers.check(not rest.stdout(), f"the {name} reader has acknowledged everything", consumer)


def fan_out_only(servers):
    """Who insists on fan-out is told which operation the server does not know."""
    stream = servers.create_stream("fan-out-only")
    consumer = servers.tramline(
        "consume", "--stream", stream, "--app", "fan-out-app", "--retrieval", "fan-out",
    )
    servers.check_exit(consumer, consumer.exit_code(), 1, "fan-out is refused where there is none")
    errors = [line for line in consumer.stderr().splitlines() if " ERROR " in line]
    # Kinesalite does not know consumers at all. moto registers one, but cannot subscribe it.
    operation = r"does not know kinesis:(DescribeStreamConsumer|SubscribeToShard)"
    servers.check(
        len(errors) == 1 and re.search(operation, errors[0]), "one error line names the operation",
        consumer, str(errors),
    )


def killed(servers):
    """After kill -9 another consumer takes over; messages may come again, but none is missing."""
    stream, app, count = servers.create_stream("killed"), "killed-app", 1000
    consume = [
        "consume", "--stream", stream, "--app", app, "--lease-duration", "2s", "--checkpoint-interval", "1s",
    ]
    first = servers.tramline(*consume)
    traffic = Traffic(servers, stream, count, rate=150)

    def is_half_way():
        # With a checkpoint behind it, so that the other one has to go on in the middle.
        return len(messages(first)) >= count // 2 and any(
            lease["checkpoint"]["S"].isdigit() for lease in servers.leases(app)
        )

    wait_for("a consumer to be half-way", is_half_way)
    first.kill()
    second = servers.tramline(*consume)
    traffic.finish()
    before = messages(first)
    try:
        wait_for("the rest of the messages", lambda: count_each(before + messages(second)) >= count)
    except GaveUp as error:
        print(f"     {servers.name}  {error}")
    servers.check_exit(second, second.terminate(), 0, "the consumer after a killed one stops on SIGTERM")
    after = messages(second)
    both = count_each(before + after)
    servers.check(both == count, f"all {count} messages come despite kill -9", second, f"{both} came")
    wrong = out_of_order(before) + out_of_order(after)
    servers.check(not wrong, "each of the two consumers has them in order", second, str(wrong[:3]))
    repeated = len(before) + len(after) - both
    servers.check(
        len(before) < count and len(after) < count,
        "the second goes on from a checkpoint of the first", second,
        f"{len(before)} before and {len(after)} after, {repeated} of them twice",
    )


def latest(servers):
    """`latest` means: what comes after the shard was opened."""
    # Not tested: the restart of a consumer that read nothing. It opens the shard at the time of its first
    # start, and Kinesalite never answers AT_TIMESTAMP while no record is later.
    stream = servers.create_stream("latest")
    Traffic(servers, stream, 20).finish()
    consumer = servers.tramline(
        "consume", "--stream", stream, "--app", "latest-app", "--start", "latest", "-v",
    )
    consumer.until_logged("shard iterator opened", SHARDS)
    Traffic(servers, stream, 50).finish()
    try:
        wait_for("50 messages", lambda: len(messages(consumer)) >= 50)
    except GaveUp as error:
        print(f"     {servers.name}  {error}")
    servers.check_exit(consumer, consumer.terminate(), 0, "a consumer at latest stops on SIGTERM")
    check_delivered(servers, consumer, 50, "latest gives the 50 later messages and no earlier one")


class Fleet:
    """What the scenarios with the Java KCL share: one stream, one lease table, workers of both kinds."""

    def __init__(self, servers, name):
        self.servers, self.app = servers, f"{name}-app"
        # The embedded Kinesis is behind both lease tables.
        self.stream = servers.create_stream(f"{name}-{servers.name.replace('+', '-')}", FLEET_SHARDS)
        self.workers = {}
        self.sent = self.repeated = 0

    def tramline(self, *names):
        for name in names:
            self.workers[name] = self.servers.tramline(
                "consume", "--stream", self.stream, "--app", self.app, "--worker-id", name,
                "--lease-duration", f"{LEASE_SECONDS}s", "--checkpoint-interval", "1s", "--format", "json",
            )

    def kcl(self, mode, *names, retrieval="polling"):
        for name in names:
            self.workers[name] = self.servers.kcl(name, self.stream, self.app, mode, retrieval)
            # Two that write the version they run as at the same moment are a race in the KCL: the one that
            # comes second never starts.
            wait_for(f"{name} to write its version", self.has_kcl_version, KCL_LIMIT)

    def has_kcl_version(self):
        return any(row["leaseKey"]["S"] == "Migration3.0" for row in self.servers.rows(self.app))

    def send(self, count, encoding="array"):
        self.sent += count
        return Traffic(self.servers, self.stream, count, FLEET_RATE, FLEET_CONNECTIONS, encoding)

    def found(self):
        return [message for worker in self.workers.values() for message in messages(worker)]

    def until_came(self, count):
        """Waits for so many of all the messages; says it if they do not come, and lets a check fail."""
        try:
            wait_for(f"{count} messages", lambda: count_each(self.found()) >= count, KCL_LIMIT)
        except GaveUp as error:
            print(f"     {self.servers.name}  {error}", flush=True)

    def until_shared(self, *names, apart=1):
        """Waits until these workers and no others hold all shards, for a lease duration on end.

        Their counts differ by no more than `apart`.
        """
        since = None

        def look():
            nonlocal since
            owners = list(self.servers.owners(self.app).values())
            counts = [owners.count(name) for name in names]
            if sum(counts) != FLEET_SHARDS or max(counts) - min(counts) > apart:
                since = None
                return False
            since = since or time.monotonic()
            return time.monotonic() - since > LEASE_SECONDS

        try:
            wait_for(f"{names} to share all shards", look, KCL_LIMIT)
        except GaveUp as error:
            raise GaveUp(f"{error}; the owners are {self.servers.owners(self.app)}") from None

    def stop(self, *names):
        """Stops workers cleanly, all at once."""
        for name in names:
            self.workers[name].child.send_signal(signal.SIGTERM)
        for name in names:
            code = self.workers[name].exit_code()
            if code:
                raise GaveUp(f"{name} ended with exit code {code} on SIGTERM")

    def stop_in_traffic(self, *names, encoding="array"):
        """Stops workers cleanly while messages come, and leaves some of them for others to read."""
        traffic = self.send(800, encoding)
        self.until_came(self.sent - 600)
        self.stop(*names)
        came = count_each(self.found())
        if came >= self.sent:
            raise GaveUp(f"{names} took so long to stop that they read all {self.sent} messages")
        return traffic

    def check_complete(self, what, repeats=0):
        """Every message sent so far came, and since the last check no more than so many came again."""
        self.until_came(self.sent)
        found = self.found()
        came = count_each(found)
        again = len(found) - came - self.repeated
        self.repeated += again
        wrong = [
            f"{name}: {shard} goes back" for name, worker in self.workers.items()
            for shard in goes_back(messages(worker))
        ]
        if repeats:
            what += f" ({again} came again)"
        self.servers.check(
            came == self.sent and again <= repeats and not wrong, what,
            detail=f"{came} of {self.sent} came, {again} of them again; {wrong}",
        )

    def check_calm(self):
        """Tramline has nothing to complain of: neither the KCL's other rows, nor a write that was refused.

        DynamoDB Local was seen to answer an UpdateItem with an InternalFailure, its own and for no reason
        that it gives. Tramline says so and writes again; that nothing came of it is checked by the messages.
        And the KCL takes leases without asking when it works as in 2.x.
        """
        expected = re.compile('InternalFailure|lease lost.* owner="java-')
        said = [
            line for worker in self.workers.values() if worker.name == "consume"
            for line in worker.stderr().splitlines()
            if re.search(" (WARN|ERROR) ", line) and not expected.search(line)
        ]
        self.servers.check(not said, "Tramline logs no warning and no error", detail=str(said[:5]))


def goes_back(found):
    """The shards in which one worker's records do not come in rising order."""
    last, wrong = {}, set()
    for message in found:
        number = int(message.sequence_number)
        if number < last.get(message.shard, 0):
            wrong.add(message.shard)
        last[message.shard] = number
    return sorted(wrong)


def relay(servers):
    """Fleets of the Java KCL 3.x and of Tramline follow one another on one lease table, in mid-traffic."""
    fleet = Fleet(servers, "relay")
    # The KCL creates the table: with its index, and in 3.5 with its rows that are no leases.
    fleet.kcl("3X", "java-1", "java-2")
    # How it divides the shards on its first round depends on which of its workers was up by then.
    fleet.until_shared("java-1", "java-2", apart=FLEET_SHARDS)
    traffic = fleet.stop_in_traffic("java-1", "java-2")
    fleet.tramline("rust-1", "rust-2")
    traffic.finish()
    fleet.check_complete("Tramline goes on where a Java KCL 3.x fleet stopped: no gap, nothing twice")

    traffic = fleet.stop_in_traffic("rust-1", "rust-2", encoding="kpl")
    fleet.kcl("3X", "java-3", "java-4", retrieval="fan-out")
    traffic.finish()
    fleet.check_complete(
        "a Java KCL 3.x fleet goes on where Tramline stopped, also in KPL aggregates: no gap, nothing twice"
    )
    fleet.stop("java-3", "java-4")
    fleet.check_calm()
    # Polling, it logs "Will retry the request" for ever; by fan-out, it subscribes anew several times a second.
    servers.left_out(
        "a split or merge read by the Java KCL",
        "the KCL ends a shard only if an answer has no successor and names the children, and the embedded "
        "Kinesis gives one without the other",
    )


def side_by_side(servers):
    """Workers of Tramline and of the Java KCL, in 2.x-compatible mode, share one table live."""
    fleet = Fleet(servers, "shared")
    # Here Tramline creates the table.
    fleet.tramline("rust-1", "rust-2")
    fleet.until_shared("rust-1", "rust-2")
    traffic = fleet.send(1200)
    fleet.kcl("COMPATIBLE_WITH_2X", "java-1", "java-2")
    fleet.until_shared("rust-1", "rust-2", "java-1", "java-2")
    traffic.finish()
    # Like 2.x, the KCL takes without asking, so what was not checkpointed comes again. Far more would come
    # again if two workers went on to read one shard.
    fleet.check_complete("Java KCL workers join Tramline's: nothing is missing", repeats=1200 // FLEET_SHARDS // 2)

    owners = servers.owners(fleet.app)
    before = {name: len(messages(worker)) for name, worker in fleet.workers.items()}
    fleet.send(600).finish()
    fleet.check_complete("side by side, every message comes once")
    delivered = {
        (message.shard, name) for name, worker in fleet.workers.items()
        for message in messages(worker)[before[name]:]
    }
    servers.check(
        delivered == set(owners.items()) and len(set(owners.values())) == 4,
        "each of the four workers delivers what is in its own shard, and nothing else",
        detail=f"owners {owners}, delivered {sorted(delivered)}",
    )

    traffic = fleet.stop_in_traffic("rust-1", "rust-2")
    traffic.finish()
    fleet.check_complete("Tramline's workers stop, the Java KCL's go on: no gap, nothing twice")
    fleet.until_shared("java-1", "java-2")

    traffic = fleet.send(1200)
    fleet.tramline("rust-3")
    fleet.until_shared("rust-3", "java-1", "java-2")
    traffic.finish()
    # Tramline asks for shards as a leader of KCL 3.x does, and the KCL hands them over.
    fleet.check_complete("a Tramline worker joins the Java KCL's: no gap, nothing twice")

    traffic = fleet.stop_in_traffic("java-1", "java-2")
    traffic.finish()
    fleet.check_complete("the Java KCL's workers stop, Tramline's goes on: no gap, nothing twice")
    fleet.stop("rust-3")
    fleet.check_calm()


def event(number, text):
    """A CloudEvent with one OCS message."""
    return {
        "data": {"raw": f"{number},DIAG,12:00:00,{text}"}, "id": f"id-{number}", "partitionkey": "k", "source": "s",
        "sourceip": "", "specversion": "1.0", "time": "2024-05-08T16:00:00Z", "type": "com.mbta.ocs.raw_message",
    }


def batch(*events):
    """The same messages in one event."""
    messages = [{"id": one["id"], "raw": one["data"]["raw"], "time": one["time"]} for one in events]
    return event(0, "") | {"data": {"messages": messages}, "type": "com.mbta.ocs.raw_message_batch"}


def encoded(value):
    return json.dumps(value, separators=(",", ":")).encode()


class UserRecord(NamedTuple):
    """A part of a KPL aggregate, and the events that must come out of it."""

    key: str
    data: bytes
    events: list
    hash_key: str | None = None


def aggregate(servers, library, aggregates):
    """Each list of user records as the data of one record, made by a library of AWS."""
    wanted = [
        [
            {"key": record.key, "data": base64.b64encode(record.data).decode()}
            | ({"hash_key": record.hash_key} if record.hash_key else {})
            for record in user_records
        ]
        for user_records in aggregates
    ]
    done = subprocess.run(
        servers.aggregators[library], input=encoded(wanted), capture_output=True, env=BARE_ENV, timeout=LIMIT,
    )
    if done.returncode:
        raise GaveUp(f"{library} did not aggregate: {done.stderr.decode(errors='replace')[-500:]}")
    return [base64.b64decode(data) for data in json.loads(done.stdout)]


def put(servers, stream, key, data):
    """Puts a record and gives its sequence number."""
    record = {"StreamName": stream, "PartitionKey": key, "Data": base64.b64encode(data).decode()}
    return servers.call("kinesis", "PutRecord", **record)["SequenceNumber"]


def consumed(servers, stream, app):
    """What one run of `consume` writes, and the run: each message with its place, key and event."""
    consumer = servers.tramline(
        "consume", "--stream", stream, "--app", app, "--exit-when-idle", "2s", "--format", "json",
    )
    servers.check_exit(consumer, consumer.exit_code(), 0, f"consume reads {stream}")
    lines = [json.loads(line) for line in consumer.stdout().splitlines()]
    places = ["sequence_number", "sub_sequence_number", "partition_key", "event"]
    return [tuple(line[name] for name in places) for line in lines], consumer


def numbered(sequence_number, user_records):
    """The messages that must come out of an aggregate, as `consumed` gives them."""
    found = []
    for record in user_records:
        for one in record.events:
            found.append((sequence_number, len(found), record.key, one))
    return found


def aggregates(servers):
    """KPL aggregates that AWS's own libraries make come out message by message."""
    for library in servers.aggregators:
        one, two, *three = [event(number, library) for number in range(1, 9)]
        first = [
            UserRecord("a", encoded(one), [one]),
            UserRecord("key {b}", encoded([two, three[0]]), [two, three[0]]),
            UserRecord("a", gzip.compress(encoded([three[1]])), [three[1]]),
            UserRecord("ü", encoded(batch(three[2], three[3])), [three[2], three[3]]),
        ]
        second = [
            UserRecord("c", encoded(three[4]), [three[4]], hash_key="17"),
            UserRecord("d", encoded(three[5]), [three[5]], hash_key="340282366920938463463374607431768211455"),
        ]
        plain = event(100, library)

        stream, app = servers.create_stream(f"aggregates-{library}", 1), f"aggregates-{library}-app"
        data = aggregate(servers, library, [first, second])
        numbers = [
            put(servers, stream, "a", data[0]),
            put(servers, stream, "plain", encoded([plain])),
            put(servers, stream, "c", data[1]),
        ]
        rest = [(numbers[1], 0, "plain", plain), *numbered(numbers[2], second)]
        check_consumed(servers, stream, app, numbered(numbers[0], first) + rest, f"{library}: all user records come")
        at = checkpoint(servers, app)
        servers.check(at == (numbers[2], "1"), f"{library}: the checkpoint is the last user record", detail=str(at))

        # Where the KCL would stop after its second user record.
        servers.call(
            "dynamodb", "UpdateItem", TableName=app, Key={"leaseKey": {"S": servers.leases(app)[0]["leaseKey"]["S"]}},
            UpdateExpression="SET checkpoint = :number, checkpointSubSequenceNumber = :sub",
            ExpressionAttributeValues={":number": {"S": numbers[0]}, ":sub": {"N": "1"}},
        )
        wanted = numbered(numbers[0], first)[3:] + rest
        check_consumed(servers, stream, app, wanted, f"{library}: a stop inside an aggregate is continued there")

        check_misplaced(servers, library)


def written_aggregates(servers):
    """The KPL aggregates that the producer writes, taken apart by AWS's libraries."""
    stream = servers.create_stream("written")
    Traffic(servers, stream, 600, encoding="kpl").finish()
    records = stored(servers, stream)
    magic = bytes.fromhex("f3899ac2")
    aggregated = [record for record in records if base64.b64decode(record["data"]).startswith(magic)]
    servers.check(len(aggregated) > 0, "the producer writes KPL aggregates", detail=f"{len(records)} records")
    found = {}
    for library, command in servers.aggregators.items():
        done = subprocess.run(
            [*command, "unpack"], input=encoded(records), capture_output=True, env=BARE_ENV, timeout=LIMIT,
        )
        if done.returncode:
            raise GaveUp(f"{library} did not unpack: {done.stderr.decode(errors='replace')[-500:]}")
        found[library] = {}
        for user_record in (one for record in json.loads(done.stdout) for one in record):
            event = json.loads(base64.b64decode(user_record["data"]))
            number = int(event["data"]["raw"].split(",")[0])
            found[library].setdefault(user_record["key"], []).append(number)
    for library, keys in found.items():
        in_order = all(numbers == list(range(numbers[0], numbers[0] + len(numbers))) for numbers in keys.values())
        servers.check(
            in_order and len(keys) == CONNECTIONS and sum(map(len, keys.values())) == 600,
            f"the {library} library finds every message in them, in order",
            detail=str({key: len(numbers) for key, numbers in keys.items()}),
        )


# What the first of the servers stored, and which that was.
FIRST_STORED = []


def stored_alike(servers):
    """The same traffic is stored the same by every server: each byte but for what is of one run."""
    stream = servers.create_stream("alike")
    Traffic(servers, stream, 300, encoding="single").finish()
    lanes = {}
    for record in stored(servers, stream):
        event = json.loads(base64.b64decode(record["data"]))
        ours = event["partitionkey"] == record["key"] and len(event.pop("id")) == 36 and event.pop("time")
        lanes.setdefault(record["key"], []).append(ours and encoded(event | {"partitionkey": ""}))
    # Kinesalite has no room for the streams of all scenarios.
    servers.call("kinesis", "DeleteStream", StreamName=stream)
    # The keys have a salt of their own in each spool.
    found = sorted(lanes.values(), key=str)
    if not FIRST_STORED:
        FIRST_STORED.extend([servers.name, found])
    first, wanted = FIRST_STORED
    servers.check(
        found == wanted and sum(map(len, found)) == 300, f"what is stored is the same as on {first}",
        detail=str([len(lane) for lane in found]),
    )


def stored(servers, stream):
    """Every record of a stream, shard after shard."""
    records = []
    for shard in servers.call("kinesis", "ListShards", StreamName=stream)["Shards"]:
        iterator = servers.call(
            "kinesis", "GetShardIterator", StreamName=stream, ShardId=shard["ShardId"],
            ShardIteratorType="TRIM_HORIZON",
        )["ShardIterator"]
        empty = 0
        # An answer without records may be followed by one with some.
        while iterator and empty < 2:
            answer = servers.call("kinesis", "GetRecords", ShardIterator=iterator)
            empty = 0 if answer["Records"] else empty + 1
            records += [{"key": one["PartitionKey"], "data": one["Data"]} for one in answer["Records"]]
            iterator = answer.get("NextShardIterator")
    return records


def check_consumed(servers, stream, app, wanted, what):
    found, consumer = consumed(servers, stream, app)
    servers.check(found == wanted, what, consumer, f"wanted {wanted}, came {found}")


def checkpoint(servers, app):
    [lease] = servers.leases(app)
    return lease["checkpoint"]["S"], lease["checkpointSubSequenceNumber"]["N"]


def check_misplaced(servers, library):
    """An aggregate with a user record of another shard is left out, as the KCL does, and that is said."""
    stream = servers.create_stream(f"misplaced-{library}", 2)
    # The keys of the two shards: of two, each has half of the hash keys.
    low, high = (
        next(key for key in map(str, range(100)) if (hashlib.md5(key.encode()).digest()[0] >= 128) == upper)
        for upper in (False, True)
    )
    kept, lost = event(1, library), event(2, library)
    whole = UserRecord(low, encoded(kept), [kept])
    foreign = UserRecord(high, encoded(lost), [lost])
    mixed, ours = aggregate(servers, library, [[whole, foreign], [whole, whole]])
    put(servers, stream, low, mixed)
    put(servers, stream, low, mixed)
    number = put(servers, stream, low, ours)
    found, consumer = consumed(servers, stream, f"misplaced-{library}-app")
    servers.check(
        found == numbered(number, [whole, whole]), f"{library}: an aggregate of two shards is left out", consumer,
        f"came {found}",
    )
    said = consumer.stderr()
    servers.check(
        said.count("user records of another shard") == 1 and "misplaced=2" in said,
        f"{library}: it is said once for the shard, and counted", consumer,
    )


def status_page(servers):
    """The status page in a real browser."""
    app = "watched-app"
    stream = servers.create_stream("watched", 2)
    page = f"http://127.0.0.1:{free_port()}/"

    def worker(name, *more):
        return servers.tramline(
            "consume", "--stream", stream, "--app", app, "--worker-id", name, "--lease-duration",
            f"{LEASE_SECONDS}s", *more,
        )

    watched = worker("one", "--http", page[len("http://"):-1])
    wait_for("the first worker's shards", lambda: len(servers.owners(app)) == 2)
    other = worker("two")
    wait_for("both workers to have a shard", lambda: set(servers.owners(app).values()) == {"one", "two"})
    Traffic(servers, stream, 300, FLEET_RATE, FLEET_CONNECTIONS).finish()
    browser = Browser(servers.chromedriver, servers.chromium, free_port())
    try:
        wait_for("ChromeDriver", browser.is_up)
        browser.open(page)
        text = lambda: browser.run("return document.body.innerText")
        owners = lambda: browser.run(
            "return [...document.querySelectorAll('#shards tr')].map(row => row.children[2].innerText)"
        )
        wait_for("two shards on the page", lambda: len(owners()) == 2)
        servers.check(
            sorted(owners()) == ["one (this worker)", "two"] and "● Ready" in text(),
            "the page shows both shards, who reads each, and that all is well", watched, text(),
        )
        plots = lambda: browser.run("return [...document.querySelectorAll('svg')].map(svg => svg.ariaLabel)")
        wait_for("a sample of the lag", lambda: plots()[0].startswith("Lag over the last"))
        servers.check(
            len(plots()) == 1, "the shard that is read here has a plot that a screen reader can tell",
            detail=str(plots()),
        )
        for width, dark in ((1200, False), (1200, True), (390, False)):
            browser.open(page, dark)
            browser.size(width, 900)
            wait_for("two shards on the page", lambda: len(owners()) == 2)
            wide = browser.run("return document.documentElement.scrollWidth")
            what = f"the page fits {width} pixels in {'dark' if dark else 'light'}"
            servers.check(wide <= width, what, detail=f"it is {wide} wide")
            if servers.screenshots:
                browser.screenshot(f"{servers.screenshots}/{width}-{'dark' if dark else 'light'}.png")
        browser.run("window.neverReloaded = true")
        other.kill()
        wait_for("the owner to change", lambda: owners() == ["one (this worker)"] * 2)
        servers.check(
            browser.run("return window.neverReloaded") is True,
            "a worker is killed, and the page shows the new owner of its shard without a reload",
        )
        watched.terminate()
        wait_for("the page to tell it", lambda: "does not answer" in text())
        complaints = [
            entry["message"] for entry in browser.complaints() if "ERR_CONNECTION_REFUSED" not in entry["message"]
        ]
        servers.check(not complaints, "the browser has nothing to complain of", detail=str(complaints))
    finally:
        browser.close()


SCENARIOS = [stored_alike, delivery, readers, fan_out_only, killed, latest]
PAGE_SCENARIOS = [status_page]
AGGREGATE_SCENARIOS = [stored_alike, aggregates, written_aggregates]
KCL_SCENARIOS = [relay, side_by_side]


def run(servers, processes, scenarios):
    """Runs the scenarios on one set of servers."""
    for scenario in scenarios:
        begin = len(Process.started)
        try:
            scenario(servers)
        except GaveUp as error:
            ended = [server for server in processes if not server.is_running()]
            # Those that ended well have nothing to do with it.
            to_blame = ended + [process for process in Process.started[begin:] if process.child.poll() != 0]
            servers.check(False, scenario.__name__, detail=f"{error}{''.join(p.tail() for p in to_blame)}")
        finally:
            for process in Process.started[begin:]:
                process.kill()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until_answers(process, url, service, operation):
    """Waits for the first answer of a server."""

    def answers():
        if not process.is_running():
            raise GaveUp(f"it ended at once{process.tail()}")
        try:
            return [aws(url, service, operation, {})]
        except GaveUp:
            return None

    wait_for(f"an answer of {process.name}", answers)


def start_server(name, command, port_flag, service, operation, folder):
    """Starts a server on a free port. Gives its URL and process."""
    port = free_port()
    process = Process(name, [*command, port_flag, str(port)], BARE_ENV, folder)
    url = f"http://127.0.0.1:{port}"
    until_answers(process, url, service, operation)
    return url, process


def start_local(tramline, folder):
    """Starts the embedded servers. Gives the URLs of Kinesis and DynamoDB, and the process."""
    process = Process("local", [tramline, "local"], BARE_ENV, folder)

    def look():
        if not process.is_running():
            raise GaveUp(f"it ended at once{process.tail()}")
        said = process.stdout().decode()
        return said if said.endswith("\nready\n") else None

    said = wait_for("`tramline local` to be ready", look)
    urls = dict(re.findall(r"export AWS_ENDPOINT_URL_(\w+)=(\S+)", said))
    return urls["KINESIS"], urls["DYNAMODB"], process


def start_all(arguments, tramline, folder):
    """Starts the servers that were installed. Gives their URLs and processes, and why others are missing."""
    here = ["--host", "127.0.0.1"]
    dynamodb_local = arguments.dynamodb_local and [
        *JAVA, f"-Dsqlite4java.library.path={arguments.dynamodb_local}/lib",
        "-cp", f"{arguments.dynamodb_local}/lib/*",
        "com.amazonaws.services.dynamodbv2.local.main.ServerRunner", "-inMemory", "-disableTelemetry",
    ]
    commands = {
        # It has no --host.
        "kinesalite": ("kinesis", "ListStreams", "--port", [arguments.kinesalite]),
        "dynalite": ("dynamodb", "ListTables", "--port", [arguments.dynalite, *here]),
        "moto": ("kinesis", "ListStreams", "--port", [arguments.moto, *here]),
        "dynamodb-local": ("dynamodb", "ListTables", "-port", dynamodb_local or [None]),
    }
    urls, processes, missing = {}, [], []
    for name, (service, operation, port_flag, command) in commands.items():
        if command[0] is None:
            missing.append(f"{name}: it could not be installed, see above")
            continue
        try:
            urls[name], process = start_server(name, command, port_flag, service, operation, folder)
            processes.append(process)
        except (GaveUp, OSError) as error:
            missing.append(f"{name}: {error}; delete tests/interop/.cache to install it anew")
    if arguments.chromium is None:
        missing.append("the status page in a browser: Chromium could not be installed, see above")
    if arguments.kcl is None:
        missing.append("the Java KCL: it could not be built, see above")
    try:
        urls["local"], urls["local-dynamodb"], process = start_local(tramline, folder)
        processes.append(process)
    except GaveUp as error:
        missing.append(f"tramline local: {error}")
    return urls, processes, missing


def find_aggregators(arguments):
    """The commands that aggregate, and why others are missing."""
    scripts = os.path.join(os.path.dirname(os.path.abspath(__file__)), "aggregate")
    modules = arguments.node_modules
    commands = {
        "python": arguments.python and [arguments.python, f"{scripts}/aggregate.py"],
        "node": modules and ["node", f"{scripts}/aggregate.js", os.path.join(modules, "aws-kinesis-agg")],
    }
    missing = [
        f"the {name} aggregator: it could not be installed, see above"
        for name, command in commands.items() if not command
    ]
    return {name: command for name, command in commands.items() if command}, missing


# Kinesis, DynamoDB, what they are called together, and what is checked there.
PAIRS = [
    ("kinesalite", "dynalite", "kinesalite+dynalite", SCENARIOS),
    ("moto", "moto", "moto", SCENARIOS),
    ("local", "local-dynamodb", "aggregates+local", AGGREGATE_SCENARIOS),
    ("local", "local-dynamodb", "page+local", PAGE_SCENARIOS),
    ("local", "local-dynamodb", "kcl+local", KCL_SCENARIOS),
    ("local", "dynamodb-local", "kcl+dynamodb-local", KCL_SCENARIOS),
]


def main():
    parser = argparse.ArgumentParser(description="Started by tests/interop/run.")
    parser.add_argument("--tramline", required=True)
    for server in ("kinesalite", "dynalite", "moto"):
        parser.add_argument(f"--{server}", help="the program")
    for java in ("kcl", "dynamodb-local"):
        parser.add_argument(f"--{java}", help="the folder of its classes")
    parser.add_argument("--python", help="the one that has aws_kinesis_agg")
    parser.add_argument("--node-modules", help="the folder that has aws-kinesis-agg")
    parser.add_argument("--chromium", help="the browser")
    parser.add_argument("--chromedriver", help="what drives it")
    parser.add_argument("--screenshots", help="the folder for pictures of the status page")
    parser.add_argument("--only", help="only the servers whose name has this in it")
    arguments = parser.parse_args()
    tramline = os.path.abspath(arguments.tramline)
    if not os.access(tramline, os.X_OK):
        sys.exit(f"{tramline} cannot be run; build it, or set TRAMLINE to one that can")

    folder = tempfile.mkdtemp(prefix="tramline-interop-")
    passed = failed = 0
    try:
        urls, processes, missing = start_all(arguments, tramline, folder)
        aggregators, without = find_aggregators(arguments)
        missing += without
        for kinesis, dynamodb, name, scenarios in PAIRS:
            if scenarios is KCL_SCENARIOS and arguments.kcl is None:
                continue
            if scenarios is PAGE_SCENARIOS and arguments.chromium is None:
                continue
            if kinesis in urls and dynamodb in urls and (arguments.only or "") in name:
                servers = Servers(
                    name, urls[kinesis], urls[dynamodb], tramline, folder, arguments.kcl, aggregators,
                )
                servers.chromium, servers.chromedriver = arguments.chromium, arguments.chromedriver
                servers.screenshots = arguments.screenshots
                run(servers, processes, scenarios)
                passed, failed = passed + servers.passed, failed + servers.failed
    finally:
        for process in Process.started:
            process.kill()
        if failed:
            print(f"the output of every process is in {folder}")
        else:
            shutil.rmtree(folder)
    for reason in missing:
        print(f"MISSING {reason}")
    print(f"{passed} passed, {failed} failed")
    # A run that checked nothing has not passed; in CI neither has one that left a server out.
    incomplete = passed == 0 or (missing and os.environ.get("CI") == "true")
    return 1 if failed or incomplete else 0


if __name__ == "__main__":
    # An exit instead of death, so that the processes are ended.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
