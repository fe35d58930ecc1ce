// Packs user records with npm's aws-kinesis-agg: a JSON list of lists of them in, a list of records out.
'use strict';

const fs = require('fs');

// Not beside this file: where the checks installed it.
const { RecordAggregator } = require(process.argv[2]);

function packed(userRecords) {
  const aggregator = new RecordAggregator();
  for (const { key, hash_key, data } of userRecords) {
    aggregator.addUserRecord({ partitionKey: key, explicitHashKey: hash_key, data: Buffer.from(data, 'base64') });
  }
  return aggregator.build().data.toString('base64');
}

process.stdout.write(JSON.stringify(JSON.parse(fs.readFileSync(0)).map(packed)));
