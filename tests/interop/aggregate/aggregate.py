"""Packs user records with PyPI's aws_kinesis_agg: a JSON list of lists of them in, a list of records out.

With `unpack` the other way round.
"""

import base64
import json
import sys

from aws_kinesis_agg.aggregator import RecordAggregator
from aws_kinesis_agg.deaggregator import deaggregate_records


def packed(user_records):
    aggregator = RecordAggregator()
    for record in user_records:
        data = base64.b64decode(record["data"])
        if aggregator.add_user_record(record["key"], data, record.get("hash_key")) is not None:
            sys.exit("they do not fit in one record")
    _, _, data = aggregator.clear_and_get().get_contents()
    return base64.b64encode(data).decode()


def unpacked(record):
    # As a Lambda function gets it.
    event = {
        "data": record["data"], "partitionKey": record["key"], "sequenceNumber": "1",
        "kinesisSchemaVersion": "1.0", "approximateArrivalTimestamp": 0,
    }
    found = [record["kinesis"] for record in deaggregate_records([{"kinesis": event}])]
    return [{"key": record["partitionKey"], "data": text(record["data"])} for record in found]


def text(data):
    return data.decode() if isinstance(data, bytes) else data


work = unpacked if "unpack" in sys.argv else packed
json.dump([work(given) for given in json.load(sys.stdin)], sys.stdout)
