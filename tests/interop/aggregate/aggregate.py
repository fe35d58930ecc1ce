"""Packs user records with PyPI's aws_kinesis_agg: a JSON list of lists of them in, a list of records out."""

import base64
import json
import sys

from aws_kinesis_agg.aggregator import RecordAggregator


def packed(user_records):
    aggregator = RecordAggregator()
    for record in user_records:
        data = base64.b64decode(record["data"])
        if aggregator.add_user_record(record["key"], data, record.get("hash_key")) is not None:
            sys.exit("they do not fit in one record")
    _, _, data = aggregator.clear_and_get().get_contents()
    return base64.b64encode(data).decode()


json.dump([packed(user_records) for user_records in json.load(sys.stdin)], sys.stdout)
