"""Measures reads and writes of more data than the caches hold, and counts what comes from the disk. See larger_than_memory.sh."""

import contextlib
import os
import re
import sys
import threading
import time
import urllib.request

import servers
from side_by_side import line, number, numbers, run_bench

MIB = 1 << 20
# Name, and what it asks `vasto bench` for.
MEASUREMENTS = [
    ("GET uniform", ["--workload", "get", "--distribution", "uniform"]),
    ("GET zipfian", ["--workload", "get", "--distribution", "zipfian"]),
    ("SET uniform", ["--workload", "set", "--distribution", "uniform"]),
    ("SET zipfian", ["--workload", "set", "--distribution", "zipfian"]),
]


class Options:
    def __init__(self):
        quick = os.environ.get("QUICK", "0") not in ("", "0")
        self.data_mib = int(os.environ.get("DATA_MIB", "64" if quick else "640"))
        self.value_bytes = int(os.environ.get("VALUE_BYTES", "256"))
        self.keys = self.data_mib * MIB // self.value_bytes
        self.cache_mib = int(os.environ.get("CACHE_MIB", str(max(1, self.data_mib // 10))))
        self.write_buffer_mib = int(os.environ.get("WRITE_BUFFER_MIB", "32"))
        self.clients = int(os.environ.get("CLIENTS", "50"))
        self.pipelines = numbers("PIPELINES", "1 16")
        self.seconds = float(os.environ.get("DURATION_SECONDS", "3" if quick else "10"))
        self.evict_seconds = float(os.environ.get("EVICT_MILLISECONDS", "250")) / 1000
        self.variants = os.environ.get("VARIANTS", "redis vasto-1").replace(",", " ").split()
        unknown = [name for name in self.variants if name not in servers.VARIANTS]
        if unknown:
            raise servers.Failed(f"unknown variants {unknown}; there are {list(servers.VARIANTS)}")

    def bench(self, address, *arguments):
        common = ["--clients", str(self.clients), "--keys", str(self.keys), "--value-size", str(self.value_bytes)]
        return run_bench(address, *common, *arguments)


def limit_memory(options):
    """Adds the small caches to what the roles with data are told."""
    half = f"{options.cache_mib * MIB // 2}"
    storage = f"--row-cache {half} --block-cache {half} --write-buffer {options.write_buffer_mib}mb --metrics-addr 127.0.0.1:0"
    for role in ("STORE", "SERVER"):
        name = f"VASTO_{role}_ARGS"
        os.environ[name] = f"{storage} {os.environ.get(name, '')}"


class Evictor:
    """Has the kernel forget the pages of all files of a cluster: the caches under test are ours, not its own."""

    def __init__(self, cluster, seconds):
        self.folder = cluster.folder
        self.seconds = seconds
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.run)

    def __enter__(self):
        os.sync()
        self.evict()
        if self.seconds > 0:
            self.thread.start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        if self.seconds > 0:
            self.thread.join()

    def run(self):
        while not self.stopped.wait(self.seconds):
            self.evict()

    def evict(self):
        # Needs no rights, unlike /proc/sys/vm/drop_caches; pages that are not written yet stay, and are in the memtables anyway.
        for folder, _, names in os.walk(self.folder):
            for name in names:
                # Compaction may have deleted it.
                with contextlib.suppress(OSError):
                    file = os.open(os.path.join(folder, name), os.O_RDONLY)
                    try:
                        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                    finally:
                        os.close(file)


def row_cache_counts(cluster):
    """Hits and misses of the row caches of all stores, by their metrics; they are brought up to date once a second."""
    hits = misses = 0
    for server in cluster.servers:
        with open(server.output_path, errors="replace") as output:
            address = re.search(r"\bmetrics\s+(\S+:\d+)", output.read())
        if address:
            with urllib.request.urlopen(f"http://{address.group(1)}/metrics", timeout=10) as answer:
                text = answer.read().decode()
            hits += int(sum(map(float, re.findall(r"^vasto_store_row_cache_hits_total (\S+)$", text, re.MULTILINE))))
            misses += int(sum(map(float, re.findall(r"^vasto_store_row_cache_misses_total (\S+)$", text, re.MULTILINE))))
    return hits, misses


def counts(cluster):
    hits, misses = row_cache_counts(cluster)
    return {
        "disk": sum(server.io_bytes("read_bytes") for server in cluster.servers),
        "asked": sum(server.io_bytes("rchar") for server in cluster.servers),
        "written": sum(server.io_bytes("write_bytes") for server in cluster.servers),
        "hits": hits,
        "misses": misses,
        "cpu": cluster.cpu_seconds(),
    }


def data_bytes(cluster):
    """Bytes of all files of a cluster."""
    total = 0
    for folder, _, names in os.walk(cluster.folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(folder, name)).st_blocks * 512
    return total


def measure(options, cluster, arguments, pipeline):
    """One run: what the clients saw, and what it cost per operation."""
    cluster.wait_until_quiet()
    with Evictor(cluster, options.evict_seconds):
        time.sleep(1.1)
        before = counts(cluster)
        run = ["--pipeline", str(pipeline), "--duration", str(options.seconds), "--seed", "1"]
        phase = options.bench(cluster.address, *arguments, *run)
        time.sleep(1.1)
        after = counts(cluster)
    spent = {name: after[name] - before[name] for name in after}
    answers = max(1, phase["answers"])
    # A plain SET looks at what is cached and reads nothing, so that nothing of it counts as a miss.
    looked_up = spent["hits"] + spent["misses"] if phase.get("reads") else 0
    latency = phase.get("reads") or phase.get("writes") or {}
    return {
        "ops_per_second": phase["ops_per_second"],
        "p50_ms": latency.get("p50_ms"),
        "p99_ms": latency.get("p99_ms"),
        "row_cache_hits": spent["hits"] / looked_up if looked_up else None,
        "disk_kib": spent["disk"] / 1024 / answers,
        "asked_kib": spent["asked"] / 1024 / answers,
        "written_kib": spent["written"] / 1024 / answers,
        "cpu_seconds_per_million": spent["cpu"] * 1e6 / answers,
        "errors": sum(error["count"] for error in phase["errors"].values()),
    }


def measure_variant(options, variant):
    with servers.start_variant(variant) as cluster:
        options.bench(cluster.address, "--load", "--requests", "0", "--seed", "1")
        cluster.wait_until_quiet()
        results = {
            (name, pipeline): measure(options, cluster, arguments, pipeline)
            for name, arguments in MEASUREMENTS
            for pipeline in options.pipelines
        }
        rss_mib = sum(server.status_kib("VmRSS") for server in cluster.servers) / 1024
        return results, rss_mib, data_bytes(cluster) / MIB


def main():
    options = Options()
    limit_memory(options)
    machine = servers.machine()
    print("## More data than memory\n")
    print(f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['kernel']}, {machine['time']}")
    eviction = f"every {options.evict_seconds * 1000:.0f} ms" if options.evict_seconds > 0 else "before each measurement only"
    print(
        f"\n{options.keys} keys, values of {options.value_bytes} bytes ({options.data_mib} MiB), {options.clients} clients, "
        f"{options.seconds:.0f} s each. Vasto has {options.cache_mib} MiB of row and block cache and {options.write_buffer_mib} MiB "
        f"of memtables per store; the kernel is told to forget the pages of the files {eviction}. redis-server has all "
        "data in memory and no persistence."
    )
    everything = {}
    for variant in options.variants:
        print(variant, file=sys.stderr)
        everything[variant] = measure_variant(options, variant)
    print()
    for variant, (_, rss_mib, files_mib) in everything.items():
        print(f"- {servers.VARIANTS[variant][0]}: RSS {rss_mib:.0f} MiB at the end, files {files_mib:.0f} MiB")
    head = ["", "", "P", "ops/s", "p50 ms", "p99 ms", "row cache hits", "KiB per op from disk", "asked of the kernel", "written", "server CPU s per million"]
    print("\n" + line(head))
    print(line(["---", "---", *["---:"] * (len(head) - 2)]))
    for name, _ in MEASUREMENTS:
        for pipeline in options.pipelines:
            for variant, (results, _, _) in everything.items():
                row = results[name, pipeline]
                hits = row["row_cache_hits"]
                # A redis-server without persistence has no files.
                has_files = not variant.startswith("redis")
                print(line([
                    name,
                    servers.VARIANTS[variant][0],
                    pipeline,
                    number(row["ops_per_second"], 0),
                    number(row["p50_ms"], 3),
                    number(row["p99_ms"], 3),
                    "–" if hits is None else f"{hits:.0%}",
                    *[number(row[field] if has_files else None, 2) for field in ("disk_kib", "asked_kib", "written_kib")],
                    number(row["cpu_seconds_per_million"], 2),
                ]))
                if row["errors"]:
                    print(f"  errors of {variant}, {name}, P={pipeline}: {row['errors']}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except servers.Failed as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
