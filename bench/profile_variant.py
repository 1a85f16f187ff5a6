"""Profiles the servers of one variant under one load. See profile.sh; asserts nothing."""

import collections
import json
import os
import re
import subprocess
import sys
import tempfile

import servers

# The first that matches names the part. Names of the load generator are not measured at all.
PARTS = [
    ("kernel: network", r"tcp|sock|skb|inet|ip_|__ip|loopback|napi|net_rx|dev_|netif|sk_|lock_sock|release_sock|csum|rep_movs|copy_(to|from)_iter|_copy_"),
    ("kernel: waking and switching", r"sched|switch|wake|futex|epoll|ep_|idle|pick_|enqueue|dequeue|update_|select_task|ttwu|try_to_wake"),
    ("HTTP/2, gRPC", r"^(<)?(h2|hyper|tonic|http|tower|prost)|h2::|hyper::|tonic::|prost::"),
    ("runtime", r"tokio|mio::|futures|parking_lot"),
    ("RocksDB", r"rocksdb|ZSTD|LZ4|InlineSkipList|MemTable|crc32c|XXH|std::__|BlockIter"),
    ("allocator", r"mi_|malloc|free$|cfree|operator new"),
    ("memcpy, memcmp", r"memcpy|memmove|memcmp|memset"),
    ("our code", r"vasto"),
]


def part_of(symbol, is_kernel):
    for name, pattern in PARTS:
        if name.startswith("kernel") == is_kernel and re.search(pattern, symbol):
            return name
    return "kernel: other" if is_kernel else "other"


def bench(address, options, *arguments):
    command = [servers.VASTO_BENCH, "bench", "--addr", address, "--json", "--seed", "1", "--keys", options["KEYS"]]
    command += ["--value-size", options["SIZE"], "--clients", options["CLIENTS"], *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise servers.Failed(done.stdout + done.stderr)
    return json.loads(done.stdout)["phases"][-1]


def switches(server):
    """Voluntary and forced context switches of all threads so far."""
    total = 0
    folder = f"/proc/{server.pid}/task"
    for thread in os.listdir(folder):
        with open(f"{folder}/{thread}/status") as status:
            total += sum(int(line.split()[1]) for line in status if "ctxt_switches" in line)
    return total


def measure(cluster, options):
    operation = options["OPERATION"]
    read_all = ["--workload", "get", "--distribution", "sequential", "--requests", options["KEYS"], "--pipeline", "64"]
    if operation != "new":
        bench(cluster.address, options, "--load", "--requests", "0")
        bench(cluster.address, options, *read_all)
        cluster.wait_until_quiet()
    load = ["--workload", "get" if operation == "get" else "set", "--pipeline", options["PIPELINE"]]
    if operation == "new":
        load += ["--distribution", "sequential", "--requests", options["KEYS"]]
    else:
        load += ["--duration", options["SECONDS_MEASURED"]]
    before = [(server.cpu_seconds(), switches(server)) for server in cluster.servers]
    with tempfile.NamedTemporaryFile(prefix="vasto-perf-") as data:
        pids = ",".join(str(server.pid) for server in cluster.servers)
        record = subprocess.Popen(["perf", "record", "-q", "-F", "499", "-p", pids, "-o", data.name])
        try:
            phase = bench(cluster.address, options, *load)
            cluster.wait_until_quiet()
        finally:
            record.send_signal(2)
            record.wait()
        script = subprocess.run(
            ["perf", "script", "-i", data.name, "-F", "pid,ip,sym,dso"], capture_output=True, text=True, check=True
        ).stdout
    after = [(server.cpu_seconds(), switches(server)) for server in cluster.servers]
    costs = [(now[0] - then[0], now[1] - then[1]) for then, now in zip(before, after)]
    return phase, costs, script


def main():
    defaults = {"VARIANT": "vasto-1", "OPERATION": "get", "PIPELINE": "16", "SIZE": "64", "KEYS": "200000"}
    defaults |= {"CLIENTS": "50", "SECONDS_MEASURED": "8", "TOP": "25"}
    options = {name: os.environ.get(name, value) for name, value in defaults.items()}
    with servers.start_variant(options["VARIANT"]) as cluster:
        phase, costs, script = measure(cluster, options)
        names = {server.pid: server.name for server in cluster.servers}
        listed = list(zip(cluster.servers, costs))
    answers = phase["answers"]
    print(f"{options['VARIANT']}, {options['OPERATION']}, {options['SIZE']} B, P={options['PIPELINE']}: ", end="")
    print(f"{phase['ops_per_second'] / 1000:.0f} thousand operations per second\n")
    for server, (seconds, switched) in listed:
        print(f"  {server.name}: {seconds * 1e6 / answers:.2f} us and {switched / answers:.3f} context switches per operation")
    by_part, by_symbol, samples = collections.Counter(), collections.Counter(), 0
    for line in script.splitlines():
        found = re.match(r"\s*(\d+)\s+[0-9a-f]+\s+(.*)\s+\(([^()]*)\)$", line)
        if not found:
            continue
        pid, symbol, binary = int(found[1]), found[2].strip(), found[3]
        role = re.sub(r"-\d+$", "", names.get(pid, "other"))
        by_part[role, part_of(symbol, "kernel" in binary)] += 1
        by_symbol[role, symbol] += 1
        samples += 1
    seconds = sum(seconds for _, (seconds, _) in listed)
    per_sample = seconds * 1e6 / answers / max(1, samples)
    print("\n  us per operation, by role and part:")
    for (role, part), count in sorted(by_part.items(), key=lambda item: (item[0][0], -item[1])):
        print(f"  {count * per_sample:7.3f}  {role:8}  {part}")
    print("\n  by function:")
    for (role, symbol), count in by_symbol.most_common(int(options["TOP"])):
        print(f"  {count * per_sample:7.3f}  {role:8}  {symbol[:110]}")


if __name__ == "__main__":
    try:
        main()
    except servers.Failed as error:
        sys.exit(f"error: {error}")
