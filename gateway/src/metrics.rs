//! Publishes the gateway's figures through the `metrics` crate, and takes the samples that INFO's rates need.

use crate::shared::Shared;
use crate::statistics::{Figures, LATENCY_BUCKETS, spec_of_row};
use metrics::{Unit, counter, describe_counter, describe_gauge, gauge};
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use vasto_proto::topology::{KeyspaceRecord, Phase};

/// Between two samples.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(250);
/// Samples between two publications.
const SAMPLES_PER_PUBLICATION: u32 = 4;

/// Names what is published; once per process.
pub fn describe() {
    describe_counter!("vasto_gateway_commands_total", "Commands executed, by command");
    describe_counter!("vasto_gateway_commands_failed_total", "Commands that answered an error, by command");
    describe_counter!(
        "vasto_gateway_commands_rejected_total",
        "Commands refused before they were executed, by command"
    );
    describe_counter!(
        "vasto_gateway_command_microseconds_total",
        Unit::Microseconds,
        "Time from a command's arrival to its answer, by command"
    );
    describe_counter!(
        "vasto_gateway_command_latency_microseconds_bucket",
        Unit::Microseconds,
        "Commands that took up to `le` microseconds, by command; cumulative"
    );
    describe_counter!("vasto_gateway_errors_total", "Error replies, by code word");
    describe_counter!("vasto_gateway_connections_received_total", "Client connections accepted");
    describe_counter!(
        "vasto_gateway_connections_rejected_total",
        "Client connections closed because there were too many"
    );
    describe_counter!("vasto_gateway_input_bytes_total", Unit::Bytes, "Bytes read from clients");
    describe_counter!("vasto_gateway_output_bytes_total", Unit::Bytes, "Bytes written to clients");
    describe_gauge!("vasto_gateway_operations", "Keyspaces that are being resized or have a store replaced, by phase");
    describe_gauge!("vasto_gateway_connections", "Client connections now");
    describe_gauge!("vasto_gateway_commands_per_second", "Commands executed per second at present");
}

/// Samples and publishes until the gateway stops.
pub async fn run(shared: &Shared, shutdown: CancellationToken) {
    describe();
    let mut ticks = tokio::time::interval(SAMPLE_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    for tick in 0u32.. {
        // Both are cancel safe.
        tokio::select! {
            _ = ticks.tick() => {}
            () = shutdown.cancelled() => break,
        }
        shared.statistics.sample();
        if tick % SAMPLES_PER_PUBLICATION == 0 {
            publish(shared);
        }
    }
    publish(shared);
}

/// Hands the present figures to the recorder.
pub fn publish(shared: &Shared) {
    let figures = shared.statistics.figures_since_start();
    gauge!("vasto_gateway_connections").set(shared.clients.count() as f64);
    gauge!("vasto_gateway_commands_per_second").set(shared.statistics.rates().commands);
    counter!("vasto_gateway_connections_received_total").absolute(figures.connections_received);
    counter!("vasto_gateway_connections_rejected_total").absolute(figures.connections_rejected);
    counter!("vasto_gateway_input_bytes_total").absolute(figures.input_bytes);
    counter!("vasto_gateway_output_bytes_total").absolute(figures.output_bytes);
    let snapshot = shared.masters.latest();
    for phase in [Phase::Copy, Phase::Fence, Phase::Committed, Phase::Clean] {
        let operations = snapshot.keyspaces.iter().filter_map(KeyspaceRecord::active_operation);
        let count = operations.filter(|operation| operation.phase == phase).count();
        gauge!("vasto_gateway_operations", "phase" => phase.word()).set(count as f64);
    }
    for (word, count) in crate::statistics::ERROR_WORDS.iter().zip(figures.errors) {
        if count > 0 {
            counter!("vasto_gateway_errors_total", "code" => *word).absolute(count);
        }
    }
    publish_commands(&figures);
}

fn publish_commands(figures: &Figures) {
    for (row, command) in figures.commands.iter().enumerate() {
        // A command that nobody has called is left out: most rows never are.
        if command.calls == 0 && command.rejected == 0 {
            continue;
        }
        let name = spec_of_row(row).name;
        counter!("vasto_gateway_commands_total", "command" => name).absolute(command.calls);
        counter!("vasto_gateway_commands_failed_total", "command" => name).absolute(command.failed);
        counter!("vasto_gateway_commands_rejected_total", "command" => name).absolute(command.rejected);
        counter!("vasto_gateway_command_microseconds_total", "command" => name).absolute(command.micros);
        let mut sum = 0;
        for (bucket, count) in command.latency.iter().enumerate() {
            sum += count;
            let end = if bucket == LATENCY_BUCKETS - 1 { "+Inf".to_owned() } else { (1u64 << bucket).to_string() };
            counter!("vasto_gateway_command_latency_microseconds_bucket", "command" => name, "le" => end).absolute(sum);
        }
    }
}
