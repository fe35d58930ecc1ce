use crate::support::{raws, run, tramline};

fn demo(shards: &str, retrieval: &str) {
    let finished = run(tramline(&[
        "demo",
        "--messages",
        "600",
        "--rate",
        "0",
        "--connections",
        "3",
        "--shards",
        shards,
        "--retrieval",
        retrieval,
        "--profile",
        "morning",
    ]))
    .succeeded();
    assert_eq!(raws(&finished.stdout).len(), 600);
    for fact in [
        "messages      600 of 600",
        "duplicates    0",
        "out of order  0",
        &format!("shards        {shards}"),
        "latency       p50 ",
        "every message came out, in order",
    ] {
        assert!(finished.stderr.contains(fact), "{fact:?} in\n{}", finished.stderr);
    }
}

#[test]
fn p1_p2_the_demo_delivers_every_message_in_order_with_one_shard_by_fan_out() {
    demo("1", "fan-out");
}

#[test]
fn p1_p2_the_demo_delivers_every_message_in_order_with_four_shards_by_fan_out() {
    demo("4", "fan-out");
}

#[test]
fn p1_p2_the_demo_delivers_every_message_in_order_with_one_shard_by_polling() {
    demo("1", "polling");
}

#[test]
fn p1_p2_the_demo_delivers_every_message_in_order_with_four_shards_by_polling() {
    demo("4", "polling");
}
