//! What AWS asks for a month: the calculation behind `docs/costs.md`. `UPDATE=1` writes its tables anew.

use std::{fmt::Write as _, fs, path::Path};

/// USD in us-east-1, without free tiers. The pages stand in docs/costs.md.
mod price {
    pub const SHARD_HOUR: f64 = 0.015;
    pub const PUT_MILLION: f64 = 0.014;
    pub const CONSUMER_SHARD_HOUR: f64 = 0.015;
    pub const FAN_OUT_GB: f64 = 0.013;
    /// Each shard and hour that records are kept for more than 24 h, up to 7 days.
    pub const KEPT_SHARD_HOUR: f64 = 0.020;
    pub const ON_DEMAND_STREAM_HOUR: f64 = 0.040;
    pub const ON_DEMAND_IN_GB: f64 = 0.080;
    pub const ON_DEMAND_OUT_GB: f64 = 0.040;
    pub const ON_DEMAND_FAN_OUT_GB: f64 = 0.050;
    pub const TABLE_WRITE_MILLION: f64 = 0.625;
    pub const TABLE_READ_MILLION: f64 = 0.125;
    pub const BUCKET_PUT_THOUSAND: f64 = 0.005;
    pub const BUCKET_GB: f64 = 0.023;
    pub const KEY: f64 = 1.00;
    pub const KEY_10_000: f64 = 0.03;
    pub const FIREHOSE_GB: f64 = 0.029;
    pub const ALARM_METRIC: f64 = 0.10;
    pub const CUSTOM_METRIC: f64 = 0.30;
    pub const DASHBOARD: f64 = 3.00;
}

const HOURS: f64 = 730.0;
const DAYS: f64 = HOURS / 24.0;
const MINUTES: f64 = HOURS * 60.0;

/// The RFC's day, and how much more.
#[derive(Clone, Copy)]
struct Traffic {
    records_a_day: f64,
    gb_a_day: f64,
    /// In the busiest second, when the schedule is loaded.
    peak_records: f64,
    peak_mb: f64,
}

impl Traffic {
    /// One message a record, as the RFC counts.
    fn rfc(times: f64) -> Self {
        Self {
            records_a_day: 500_000.0 * times,
            gb_a_day: 0.2 * times,
            peak_records: 400.0 * times,
            // 0.2 GB / 500 000 records.
            peak_mb: 400.0 * 400e-6 * times,
        }
    }

    /// As Tramline packs them at the least: all but TMOV share a record for a second.
    fn packed(times: f64) -> Self {
        let rfc = Self::rfc(times);
        Self {
            records_a_day: 0.75 * rfc.records_a_day,
            gb_a_day: 0.94 * rfc.gb_a_day,
            peak_records: 25.0 * times,
            peak_mb: 0.94 * rfc.peak_mb,
        }
    }

    /// A shard takes 1000 records and 1 MB a second.
    fn shards(self) -> f64 {
        (self.peak_records / 1000.0).max(self.peak_mb).ceil()
    }

    /// On demand, AWS has 4 shards at least, and twice what the peak needs.
    fn on_demand_shards(self) -> f64 {
        (2.0 * self.shards()).max(4.0)
    }
}

/// Lines with a name and USD a month.
type Lines = Vec<(&'static str, f64)>;

fn provisioned(traffic: Traffic, fan_out: f64) -> Lines {
    let shards = traffic.shards();
    let mut lines = vec![
        ("shards", shards * HOURS * price::SHARD_HOUR),
        ("PUT payload units", traffic.records_a_day * DAYS / 1e6 * price::PUT_MILLION),
    ];
    if fan_out > 0.0 {
        lines.push((
            "fan-out, consumers × shards",
            fan_out * shards * HOURS * price::CONSUMER_SHARD_HOUR,
        ));
        lines.push(("fan-out, GB read", fan_out * traffic.gb_a_day * DAYS * price::FAN_OUT_GB));
    }
    lines
}

fn on_demand(traffic: Traffic, consumers: f64, gb_out: f64) -> Lines {
    // A record counts as a whole number of KiB, and is smaller than one.
    let gb_in = traffic.records_a_day * DAYS / (1024.0 * 1024.0);
    vec![
        ("stream", HOURS * price::ON_DEMAND_STREAM_HOUR),
        ("GB written", gb_in * price::ON_DEMAND_IN_GB),
        ("GB read", consumers * traffic.gb_a_day * DAYS * gb_out),
    ]
}

/// Calls of the key that encrypts the stream: one each 5 minutes for the producer and each reader.
fn key_calls(readers: f64) -> f64 {
    (1.0 + readers) * MINUTES / 5.0 / 10_000.0 * price::KEY_10_000
}

/// A lease table under load, as docs/figures.md measures it: 24 writes a minute and shard. A lone worker scans
/// it 6 times a minute; in a fleet two workers do so 150 times, and the others read a row 75 times.
fn lease_table(shards: f64, workers: f64) -> f64 {
    leases(24.0, shards, workers)
}

fn leases(writes_a_minute: f64, shards: f64, workers: f64) -> f64 {
    let writes = writes_a_minute * shards * MINUTES;
    // Rows are below 400 bytes, and a consistent read is of 4 KiB.
    let scan = (shards * 400.0 / 4096.0).ceil();
    let reads = if workers < 2.0 { 6.0 * scan } else { 150.0 * scan + 75.0 * (workers - 2.0) };
    writes / 1e6 * price::TABLE_WRITE_MILLION + reads * MINUTES / 1e6 * price::TABLE_READ_MILLION
}

/// Writes of state objects, as if messages came day and night, and what the versions of the last day take.
fn state_objects(objects: f64, interval_seconds: f64, gb: f64) -> f64 {
    let puts = objects * MINUTES * 60.0 / interval_seconds;
    let kept_gb = objects * gb * 86_400.0 / interval_seconds;
    puts / 1000.0 * price::BUCKET_PUT_THOUSAND + kept_gb * price::BUCKET_GB
}

fn total(lines: &Lines) -> f64 {
    lines.iter().map(|(_, usd)| usd).sum()
}

/// A Markdown table. The first column is text.
fn table(head: &[&str], rows: impl IntoIterator<Item = (String, Vec<String>)>) -> String {
    let mut text = format!("| {} |\n|---|{}\n", head.join(" | "), "--:|".repeat(head.len() - 1));
    for (name, cells) in rows {
        writeln!(text, "| {name} | {} |", cells.join(" | ")).expect("a string");
    }
    text
}

fn usd(amounts: &[f64]) -> Vec<String> {
    amounts.iter().map(|usd| format!("{usd:.2}")).collect()
}

const TIMES: [f64; 3] = [1.0, 10.0, 100.0];

/// The RFC's lines beside the same from the prices and the shards that the traffic needs.
fn rfc_table() -> String {
    let lines = TIMES.map(|times| {
        let traffic = Traffic::rfc(times);
        let mut lines = provisioned(traffic, 4.0);
        let stream = total(&lines);
        lines.push(("**what the RFC counts**", stream));
        let tables = 4.0 * lease_table(traffic.shards(), 1.0);
        let state = 4.0 * state_objects(1.0, 5.0, 0.001);
        lines.push(("4 lease tables, a lone worker each", tables));
        lines.push(("calls of the key", key_calls(4.0)));
        lines.push(("**with positions in DynamoDB**", stream + tables + key_calls(4.0)));
        lines.push(("instead: 4 state objects of 1 MB, written each 5 s", state));
        lines.push(("**with positions and state in S3**", stream + state + key_calls(4.0)));
        lines
    });
    let rfc = ["10.95", "0.18", "43.80", "0.65", "55.58"];
    let shards = TIMES.map(|times| Traffic::rfc(times).shards().to_string());
    let rows = (0..lines[0].len()).map(|n| {
        let mut cells = vec![rfc.get(n).copied().unwrap_or_default().to_owned()];
        cells.extend(usd(&lines.each_ref().map(|lines| lines[n].1)));
        (lines[0][n].0.to_owned(), cells)
    });
    let mut all = vec![("shards needed".to_owned(), [&["1".to_owned()], &shards[..]].concat())];
    all.extend(rows);
    table(&["USD a month", "RFC", "1 ×", "10 ×", "100 ×"], all)
}

/// The same readers in other ways, lease tables and key included.
fn choices_table() -> String {
    type Way = (&'static str, fn(Traffic) -> (Lines, f64), fn(f64) -> Traffic);
    let ways: [Way; 6] = [
        (
            "provisioned, fan-out, a record a message",
            |t| (provisioned(t, 4.0), t.shards()),
            Traffic::rfc,
        ),
        ("provisioned, fan-out, packed", |t| (provisioned(t, 4.0), t.shards()), Traffic::packed),
        ("provisioned, polling, packed", |t| (provisioned(t, 0.0), t.shards()), Traffic::packed),
        (
            "on demand, fan-out, a record a message",
            |t| (on_demand(t, 4.0, price::ON_DEMAND_FAN_OUT_GB), t.on_demand_shards()),
            Traffic::rfc,
        ),
        (
            "on demand, fan-out, packed",
            |t| (on_demand(t, 4.0, price::ON_DEMAND_FAN_OUT_GB), t.on_demand_shards()),
            Traffic::packed,
        ),
        (
            "on demand, polling, packed",
            |t| (on_demand(t, 4.0, price::ON_DEMAND_OUT_GB), t.on_demand_shards()),
            Traffic::packed,
        ),
    ];
    let rows = ways.map(|(name, way, traffic)| {
        let cells = TIMES.map(|times| {
            let (lines, shards) = way(traffic(times));
            let usd = total(&lines) + 4.0 * lease_table(shards, 1.0) + key_calls(4.0);
            format!("{usd:.2} ({shards})")
        });
        (name.to_owned(), cells.to_vec())
    });
    table(&["USD a month (shards)", "1 ×", "10 ×", "100 ×"], rows)
}

/// Where an application keeps how far it is.
fn state_table() -> String {
    let shards = [1.0, 4.0, 40.0];
    let of = |cost: fn(f64) -> f64| usd(&shards.map(cost));
    let rows = [
        ("nothing stored: latest only, or the service day again", of(|_| 0.0)),
        ("lease table, a lone worker, no messages", of(|shards| leases(15.0, shards, 1.0))),
        ("lease table, a lone worker", of(|shards| lease_table(shards, 1.0))),
        ("lease table, two workers", of(|shards| lease_table(shards, 2.0))),
        ("lease table, ten workers", of(|shards| lease_table(shards, 10.0))),
        ("one state object of 1 MB, each 5 s", of(|_| state_objects(1.0, 5.0, 0.001))),
        ("one state object of 1 MB, each 30 s", of(|_| state_objects(1.0, 30.0, 0.001))),
        ("one state object of 10 MB, each 5 s", of(|_| state_objects(1.0, 5.0, 0.01))),
        (
            "an object of 1 MB a shard, each 5 s, and leases for two workers",
            of(|shards| state_objects(shards, 5.0, 0.001) + lease_table(shards, 2.0)),
        ),
        (
            "an object of 1 MB a shard, each 30 s, and leases for two workers",
            of(|shards| state_objects(shards, 30.0, 0.001) + lease_table(shards, 2.0)),
        ),
    ];
    table(
        &["USD a month and application", "1 shard", "4 shards", "40 shards"],
        rows.map(|(name, cells)| (name.to_owned(), cells)),
    )
}

/// What the Terraform module can add.
fn extras_table() -> String {
    let traffic = [Traffic::rfc(1.0), Traffic::packed(1.0)];
    // Each record counts as a whole number of 5 KiB.
    let firehose = traffic.map(|traffic| {
        let gb = traffic.records_a_day * DAYS * 5.0 / (1024.0 * 1024.0);
        gb * price::FIREHOSE_GB
    });
    let letters = HOURS * (price::SHARD_HOUR + price::KEPT_SHARD_HOUR);
    let rows = [
        ("records kept for 2 to 7 days, each shard", HOURS * price::KEPT_SHARD_HOUR),
        ("stream of dead letters, kept for 7 days", letters),
        ("one more fan-out consumer, each shard", HOURS * price::CONSUMER_SHARD_HOUR),
        ("Firehose archive of the RFC's day, a record a message", firehose[0]),
        ("Firehose archive of the RFC's day, packed", firehose[1]),
        ("a key of one's own", price::KEY),
        ("alarms on the stream", 4.0 * price::ALARM_METRIC),
        ("alarms on a fan-out application", 2.0 * price::ALARM_METRIC),
        ("alarm on a lease table, of 7 metrics", 7.0 * price::ALARM_METRIC),
        ("alarm on the stream of dead letters", price::ALARM_METRIC),
        (
            "alarm on dead letters in the bucket, with the 16 request metrics it needs",
            16.0 * price::CUSTOM_METRIC + price::ALARM_METRIC,
        ),
        ("dashboard", price::DASHBOARD),
    ];
    let rows = rows.map(|(name, amount)| (name.to_owned(), usd(&[amount])));
    table(&["what", "USD a month"], rows)
}

fn prices_table() -> String {
    let kinesis = "[Kinesis Data Streams](https://aws.amazon.com/kinesis/data-streams/pricing/)";
    let dynamodb = "[DynamoDB, on demand](https://aws.amazon.com/dynamodb/pricing/on-demand/)";
    let s3 = "[S3](https://aws.amazon.com/s3/pricing/)";
    let kms = "[KMS](https://aws.amazon.com/kms/pricing/)";
    let cloudwatch = "[CloudWatch](https://aws.amazon.com/cloudwatch/pricing/)";
    let rows = [
        (kinesis, "shard-hour", price::SHARD_HOUR),
        (kinesis, "million PUT payload units, of 25 KB", price::PUT_MILLION),
        (kinesis, "consumer-shard-hour of fan-out", price::CONSUMER_SHARD_HOUR),
        (kinesis, "GB read by fan-out", price::FAN_OUT_GB),
        (kinesis, "shard-hour of records kept for 2 to 7 days", price::KEPT_SHARD_HOUR),
        (kinesis, "on-demand stream, hour", price::ON_DEMAND_STREAM_HOUR),
        (kinesis, "on-demand, GB written, records rounded up to 1 KB", price::ON_DEMAND_IN_GB),
        (kinesis, "on-demand, GB read", price::ON_DEMAND_OUT_GB),
        (kinesis, "on-demand, GB read by fan-out", price::ON_DEMAND_FAN_OUT_GB),
        (dynamodb, "million writes of 1 KB", price::TABLE_WRITE_MILLION),
        (dynamodb, "million consistent reads of 4 KB", price::TABLE_READ_MILLION),
        (s3, "1000 PUTs", price::BUCKET_PUT_THOUSAND),
        (s3, "GB kept for a month", price::BUCKET_GB),
        (kms, "10 000 calls", price::KEY_10_000),
        (kms, "key, month", price::KEY),
        (cloudwatch, "metric of an alarm, month", price::ALARM_METRIC),
        (cloudwatch, "custom metric, month", price::CUSTOM_METRIC),
        (cloudwatch, "dashboard, month", price::DASHBOARD),
        (
            "[Data Firehose](https://aws.amazon.com/firehose/pricing/)",
            "GB of a stream, records rounded up to 5 KB",
            price::FIREHOSE_GB,
        ),
    ];
    let rows = rows.map(|(page, what, usd)| (format!("{page}: {what}"), vec![format!("{usd:.3}")]));
    table(&["what", "USD"], rows)
}

#[test]
fn the_costs_in_the_docs_are_those_of_the_calculation() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/costs.md");
    let docs = fs::read_to_string(&path).expect("docs/costs.md");
    let mut expected = docs.clone();
    for (name, table) in [
        ("rfc", rfc_table()),
        ("choices", choices_table()),
        ("state", state_table()),
        ("extras", extras_table()),
        ("prices", prices_table()),
    ] {
        let mark = format!("<!-- {name} -->\n");
        let (before, after) =
            expected.split_once(&mark).unwrap_or_else(|| panic!("no place for {name}"));
        let (_, after) = after.split_once("\n\n").expect("an empty line after the table");
        expected = format!("{before}{mark}{table}\n{after}");
    }
    if std::env::var_os("UPDATE").is_some() {
        fs::write(&path, &expected).expect("a write");
    } else {
        assert!(docs == expected, "docs/costs.md is not up to date: run with UPDATE=1\n{expected}");
    }
}

/// The figures above come from these: a slip in the calculation would move both table and docs.
#[test]
fn one_shard_and_four_consumers_cost_what_the_rfc_says_where_its_products_are_right() {
    let lines = provisioned(Traffic::rfc(1.0), 4.0);
    let cents = |usd: f64| (usd * 100.0).round();
    assert_eq!(
        lines.iter().map(|(_, usd)| cents(*usd)).collect::<Vec<_>>(),
        [1095.0, 21.0, 4380.0, 32.0]
    );
    // 500 000 writes of 500 000 × 0.000000014 over 31 days, and 0.2 GB × 4 × 31 × 0.013, by hand.
    assert_eq!(cents(500_000.0 * 31.0 / 1e6 * price::PUT_MILLION), 22.0);
    assert_eq!(cents(0.2 * 4.0 * 31.0 * price::FAN_OUT_GB), 32.0);
    // 24 writes a minute for a month are 1 051 200, and 6 reads 262 800.
    assert_eq!(cents(lease_table(1.0, 1.0)), cents(1.0512 * 0.625 + 0.2628 * 0.125));
}

#[test]
fn the_advice_in_the_docs_follows_from_the_calculation() {
    // One object is cheaper than a lease table from five shards on, and at 30 s from the first.
    assert!(state_objects(1.0, 5.0, 0.001) > lease_table(4.0, 1.0));
    assert!(state_objects(1.0, 5.0, 0.001) < lease_table(5.0, 1.0));
    assert!(state_objects(1.0, 30.0, 0.001) < lease_table(1.0, 1.0));
    // On-demand is cheaper with four fan-out consumers, and dearer with four readers by polling.
    for times in TIMES {
        let (traffic, tables) = (Traffic::packed(times), |shards| 4.0 * lease_table(shards, 1.0));
        let by_shards = total(&provisioned(traffic, 4.0)) + tables(traffic.shards());
        let by_traffic = total(&on_demand(traffic, 4.0, price::ON_DEMAND_FAN_OUT_GB));
        assert!(by_traffic + tables(traffic.on_demand_shards()) < by_shards, "{times} times");
        let by_shards = total(&provisioned(traffic, 0.0)) + tables(traffic.shards());
        let by_traffic = total(&on_demand(traffic, 4.0, price::ON_DEMAND_OUT_GB));
        assert!(by_traffic + tables(traffic.on_demand_shards()) > by_shards, "{times} times");
    }
    let cents = |usd: f64| (usd * 100.0).round();
    assert_eq!(cents(lease_table(1.0, 2.0) - lease_table(1.0, 1.0)), 79.0);
    assert_eq!(cents(lease_table(1.0, 3.0) - lease_table(1.0, 2.0)), 41.0);
}
