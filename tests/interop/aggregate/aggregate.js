// Packs user records with npm's aws-kinesis-agg: a JSON list of lists of them in, a list of records out.
// With `unpack` the other way round.
'use strict';

const fs = require('fs');

// Not beside this file: where the checks installed it.
const { RecordAggregator, deaggregateSync } = require(process.argv[2]);

function packed(userRecords) {
  const aggregator = new RecordAggregator();
  for (const { key, hash_key, data } of userRecords) {
    aggregator.addUserRecord({ partitionKey: key, explicitHashKey: hash_key, data: Buffer.from(data, 'base64') });
  }
  return aggregator.build().data.toString('base64');
}

function unpacked({ key, data }) {
  let found;
  deaggregateSync({ partitionKey: key, data, sequenceNumber: '1' }, true, (error, records) => {
    if (error) throw error;
    found = records.map(record => ({ key: record.partitionKey, data: Buffer.from(record.data, 'base64').toString('base64') }));
  });
  return found;
}

const work = process.argv[3] === 'unpack' ? unpacked : packed;
process.stdout.write(JSON.stringify(JSON.parse(fs.readFileSync(0)).map(work)));
