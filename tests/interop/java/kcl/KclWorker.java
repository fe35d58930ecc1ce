import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.node.ArrayNode;
import com.fasterxml.jackson.databind.node.ObjectNode;
import java.io.IOException;
import java.io.PrintStream;
import java.net.URI;
import java.nio.charset.StandardCharsets;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.TimeUnit;
import software.amazon.awssdk.http.Protocol;
import software.amazon.awssdk.http.nio.netty.NettyNioAsyncHttpClient;
import software.amazon.awssdk.services.cloudwatch.CloudWatchAsyncClient;
import software.amazon.awssdk.services.dynamodb.DynamoDbAsyncClient;
import software.amazon.awssdk.services.kinesis.KinesisAsyncClient;
import software.amazon.awssdk.utils.BinaryUtils;
import software.amazon.kinesis.common.ConfigsBuilder;
import software.amazon.kinesis.common.InitialPositionInStream;
import software.amazon.kinesis.common.InitialPositionInStreamExtended;
import software.amazon.kinesis.coordinator.CoordinatorConfig;
import software.amazon.kinesis.coordinator.CoordinatorConfig.ClientVersionConfig;
import software.amazon.kinesis.coordinator.Scheduler;
import software.amazon.kinesis.exceptions.InvalidStateException;
import software.amazon.kinesis.exceptions.ShutdownException;
import software.amazon.kinesis.leases.LeaseManagementConfig;
import software.amazon.kinesis.lifecycle.events.InitializationInput;
import software.amazon.kinesis.lifecycle.events.LeaseLostInput;
import software.amazon.kinesis.lifecycle.events.ProcessRecordsInput;
import software.amazon.kinesis.lifecycle.events.ShardEndedInput;
import software.amazon.kinesis.lifecycle.events.ShutdownRequestedInput;
import software.amazon.kinesis.metrics.NullMetricsFactory;
import software.amazon.kinesis.processor.RecordProcessorCheckpointer;
import software.amazon.kinesis.processor.ShardRecordProcessor;
import software.amazon.kinesis.processor.SingleStreamTracker;
import software.amazon.kinesis.retrieval.KinesisClientRecord;
import software.amazon.kinesis.retrieval.RetrievalSpecificConfig;
import software.amazon.kinesis.retrieval.fanout.FanOutConfig;
import software.amazon.kinesis.retrieval.polling.PollingConfig;

/**
 * A worker of the real Java KCL for tests/interop: the KCL as it is, set to be quick.
 *
 * <p>Writes one line of JSON to stdout for each record, checkpoints after each batch, and stops cleanly, with
 * exit code 0, on SIGTERM. Everything else goes to stderr.
 */
public final class KclWorker {
    private static final ObjectMapper JSON = new ObjectMapper();
    // Not System.out: a line must come out whole, and neither late nor in the platform's charset.
    private static final PrintStream OUT = new PrintStream(System.out, true, StandardCharsets.UTF_8);
    private static volatile boolean stopping = false;

    /** Arguments are pairs such as {@code --stream NAME}. */
    public static void main(String[] arguments) {
        Map<String, String> given = new HashMap<>();
        for (int i = 0; i + 1 < arguments.length; i += 2) {
            given.put(arguments[i], arguments[i + 1]);
        }
        Scheduler scheduler = scheduler(given);
        Runtime.getRuntime().addShutdownHook(new Thread(() -> stop(scheduler)));
        scheduler.run();
        if (!stopping) {
            System.err.println("the KCL gave up");
            Runtime.getRuntime().halt(1);
        }
    }

    private static void stop(Scheduler scheduler) {
        stopping = true;
        int code = 1;
        try {
            if (scheduler.startGracefulShutdown().get(40, TimeUnit.SECONDS)) {
                code = 0;
            }
        } catch (Exception e) {
            e.printStackTrace();
        }
        System.err.println("stopped " + (code == 0 ? "cleanly" : "with an error"));
        // A JVM that SIGTERM ends would say 143 whatever happened.
        Runtime.getRuntime().halt(code);
    }

    private static Scheduler scheduler(Map<String, String> given) {
        String stream = given.get("--stream");
        URI kinesisUrl = URI.create(given.get("--kinesis"));
        URI dynamodbUrl = URI.create(given.get("--dynamodb"));
        long failover = Long.parseLong(given.get("--failover-millis"));
        boolean fanOut = given.get("--retrieval").equals("fan-out");

        KinesisAsyncClient kinesis = KinesisAsyncClient.builder()
                .endpointOverride(kinesisUrl)
                .httpClientBuilder(NettyNioAsyncHttpClient.builder()
                        .maxConcurrency(100)
                        .protocol(fanOut ? Protocol.HTTP2 : Protocol.HTTP1_1))
                .build();
        DynamoDbAsyncClient dynamodb =
                DynamoDbAsyncClient.builder().endpointOverride(dynamodbUrl).build();
        // The KCL wants one, but with NullMetricsFactory it never calls it.
        CloudWatchAsyncClient cloudwatch =
                CloudWatchAsyncClient.builder().endpointOverride(dynamodbUrl).build();

        ConfigsBuilder configs = new ConfigsBuilder(
                new SingleStreamTracker(
                        stream, InitialPositionInStreamExtended.newInitialPosition(InitialPositionInStream.TRIM_HORIZON)),
                given.get("--app"),
                kinesis,
                dynamodb,
                cloudwatch,
                given.get("--worker"),
                Processor::new);

        // In 2.x-compatible mode leases are taken as KCL 2.x does; else one worker assigns them to all.
        CoordinatorConfig coordinator = configs.coordinatorConfig()
                .clientVersionConfig(ClientVersionConfig.valueOf("CLIENT_VERSION_CONFIG_" + given.get("--mode")))
                .skipShardSyncAtWorkerInitializationIfLeasesExist(true)
                .parentShardPollIntervalMillis(1000)
                .shardConsumerDispatchPollIntervalMillis(200);
        LeaseManagementConfig leases = configs.leaseManagementConfig()
                .failoverTimeMillis(failover)
                .shardSyncIntervalMillis(500)
                .dynamoDbLockBasedLeaderLeaseDurationInMillis(10_000)
                .dynamoDbLockBasedLeaderHeartbeatPeriodInMillis(2_500);
        leases.workerUtilizationAwareAssignmentConfig()
                .disableWorkerMetrics(true)
                .workerMetricsReporterFreqInMillis(3_000);
        RetrievalSpecificConfig retrieval = fanOut
                ? new FanOutConfig(kinesis).streamName(stream).applicationName(given.get("--app"))
                : new PollingConfig(stream, kinesis).idleTimeBetweenReadsInMillis(250);
        return new Scheduler(
                configs.checkpointConfig(),
                coordinator,
                leases,
                configs.lifecycleConfig(),
                configs.metricsConfig().metricsFactory(new NullMetricsFactory()),
                configs.processorConfig(),
                configs.retrievalConfig().retrievalSpecificConfig(retrieval));
    }

    private static final class Processor implements ShardRecordProcessor {
        private String shard;

        @Override
        public void initialize(InitializationInput input) {
            shard = input.shardId();
            System.err.println("shard started shard=" + shard + " at=" + input.extendedSequenceNumber());
        }

        @Override
        public void processRecords(ProcessRecordsInput input) {
            for (KinesisClientRecord record : input.records()) {
                OUT.println(line(record));
            }
            checkpoint(input.checkpointer());
        }

        private ObjectNode line(KinesisClientRecord record) {
            ObjectNode line = JSON.createObjectNode();
            line.put("shard", shard);
            line.put("sequence_number", record.sequenceNumber());
            line.put("partition_key", record.partitionKey());
            ArrayNode raw = line.putArray("raw");
            try {
                JsonNode data = JSON.readTree(BinaryUtils.copyBytesFrom(record.data()));
                // An array, or in an aggregate an event by itself.
                for (JsonNode event : data.isArray() ? data : List.of(data)) {
                    raw.add(event.path("data").path("raw"));
                }
            } catch (IOException e) {
                line.put("error", e.toString());
            }
            return line;
        }

        @Override
        public void leaseLost(LeaseLostInput input) {
            System.err.println("lease lost shard=" + shard);
        }

        @Override
        public void shardEnded(ShardEndedInput input) {
            System.err.println("shard ended shard=" + shard);
            checkpoint(input.checkpointer());
        }

        @Override
        public void shutdownRequested(ShutdownRequestedInput input) {
            System.err.println("shutdown requested shard=" + shard);
            checkpoint(input.checkpointer());
        }

        private void checkpoint(RecordProcessorCheckpointer checkpointer) {
            try {
                checkpointer.checkpoint();
            } catch (ShutdownException e) {
                System.err.println("checkpoint refused, another worker has the lease shard=" + shard);
            } catch (InvalidStateException e) {
                throw new IllegalStateException(e);
            } catch (RuntimeException e) {
                throw e;
            } catch (Exception e) {
                throw new IllegalStateException(e);
            }
        }
    }
}
