"""Measures the variants of servers.py side by side in one run and prints a table. See run.sh; asserts nothing.

One cell is a variant, a value size and a pipeline depth: a fresh server, on which in this order
  new     SET of each of KEYS keys once, in order: keys that no cache holds
  get     GET of keys chosen at random, after every key was read once: cached where the server has a cache
  set     SET of the same keys chosen at random: cached too
are measured. All variants of a cell run one after the other before the next cell begins, and all cells ROUNDS times, so
that a slow minute of the machine meets all of them. Ratios are taken within a round; then medians are told.
"""

import csv
import io
import json
import os
import statistics
import subprocess
import sys

import servers

OPERATIONS = {
    "new": "SET of new keys",
    "set": "SET of cached keys",
    "get": "GET of cached keys",
}
BASE = "redis"


def numbers(name, default):
    return [int(word) for word in os.environ.get(name, default).replace(",", " ").split()]


class Options:
    def __init__(self):
        quick = os.environ.get("QUICK", "0") not in ("", "0")
        self.keys = int(os.environ.get("KEYS", "50000" if quick else "1000000"))
        self.clients = int(os.environ.get("CLIENTS", "50"))
        self.pipelines = numbers("PIPELINES", "1 16" if quick else "1 16 64")
        self.sizes = numbers("SIZES", "64" if quick else "64 1024")
        self.rounds = int(os.environ.get("ROUNDS", "1" if quick else "3"))
        self.variants = os.environ.get("VARIANTS", " ".join(servers.VARIANTS)).replace(",", " ").split()
        self.generator = os.environ.get("LOADGEN", "vasto")
        self.output = os.environ.get("OUTPUT") or os.path.join(
            servers.REPOSITORY, "target", "bench", "side-by-side.jsonl"
        )
        requests = os.environ.get("REQUESTS")
        # Deep pipelines are five times as fast: a run shall last seconds in both cases.
        at_one, deep = (50_000, 200_000) if quick else (500_000, 2_500_000)
        self.requests = {
            pipeline: int(requests) if requests else (at_one if pipeline < 8 else deep) for pipeline in self.pipelines
        }
        unknown = [name for name in self.variants if name not in servers.VARIANTS]
        if unknown:
            raise servers.Failed(f"unknown variants {unknown}; there are {list(servers.VARIANTS)}")
        if self.generator not in ("vasto", "redis-benchmark"):
            raise servers.Failed("LOADGEN is vasto or redis-benchmark")


def run_json(command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise servers.Failed(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def run_bench(address, *arguments):
    """One run of `vasto bench`: the figures of its measured phase."""
    command = [servers.VASTO_BENCH, "bench", "--addr", address, "--json", *arguments]
    phase = json.loads(run_json(command))["phases"][-1]
    if phase["errors"] or phase["lost_connections"]:
        print(f"  errors: {phase['errors']} {phase['lost_connections']}", file=sys.stderr)
    return phase


def bench(options, address, size, pipeline, *arguments):
    load = ["--clients", str(options.clients), "--pipeline", str(pipeline), "--seed", "1"]
    return run_bench(address, *load, "--keys", str(options.keys), "--value-size", str(size), *arguments)


def measure_by_vasto(options, address, operation, size, pipeline):
    requests = str(options.keys if operation == "new" else options.requests[pipeline])
    arguments = ["--requests", requests, "--workload", "get" if operation == "get" else "set"]
    if operation == "new":
        arguments += ["--distribution", "sequential"]
    phase = bench(options, address, size, pipeline, *arguments)
    latency = phase.get("reads") or phase.get("writes") or {}
    return {
        "operations": phase["answers"],
        "errors": sum(error["count"] for error in phase["errors"].values()),
        "misses": phase["misses"],
        "ops_per_second": phase["ops_per_second"],
        "p50_ms": latency.get("p50_ms"),
        "p99_ms": latency.get("p99_ms"),
        "p999_ms": latency.get("p999_ms"),
        "max_ms": latency.get("max_ms"),
        "generator_cpu_seconds": phase.get("generator_cpu_seconds"),
    }


def measure_by_redis_benchmark(options, address, operation, size, pipeline):
    host, _, port = address.rpartition(":")
    requests = options.keys if operation == "new" else options.requests[pipeline]
    # Its keys are random always; out of a billion most are new.
    key_space = 1_000_000_000 if operation == "new" else options.keys
    command = ["redis-benchmark", "-h", host, "-p", port, "-t", "get" if operation == "get" else "set", "--csv"]
    command += ["-n", str(requests), "-r", str(key_space), "-d", str(size)]
    command += ["-c", str(options.clients), "-P", str(pipeline)]
    row = list(csv.reader(io.StringIO(run_json(command))))[-1]
    _, ops_per_second, _, _, p50_ms, _, p99_ms, max_ms = row
    return {
        "operations": requests,
        "ops_per_second": float(ops_per_second),
        "p50_ms": float(p50_ms),
        "p99_ms": float(p99_ms),
        "max_ms": float(max_ms),
    }


def measure_cell(options, variant, size, pipeline):
    """The three operations on a fresh server."""
    measure = measure_by_vasto if options.generator == "vasto" else measure_by_redis_benchmark
    results = {}
    with servers.start_variant(variant) as cluster:
        for operation in ("new", "get", "set"):
            if operation == "get":
                if options.generator != "vasto":
                    bench(options, cluster.address, size, pipeline, "--load", "--requests", "0")
                # Read once what shall be cached.
                read_all = ["--workload", "get", "--distribution", "sequential", "--requests", str(options.keys)]
                bench(options, cluster.address, size, 64, *read_all)
            cluster.wait_until_quiet()
            before = cluster.cpu_seconds()
            result = measure(options, cluster.address, operation, size, pipeline)
            # What a write leaves to be done in the background is part of its price.
            cluster.wait_until_quiet()
            cpu_seconds = cluster.cpu_seconds() - before
            result["server_cpu_seconds_per_million"] = cpu_seconds * 1e6 / max(1, result["operations"])
            result["server_rss_mib"] = sum(server.status_kib("VmRSS") for server in cluster.servers) // 1024
            results[operation] = result
    return results


def median(rows, field):
    known = [row[field] for row in rows if row.get(field) is not None]
    return statistics.median(known) if known else None


class Table:
    """All rows measured, and the medians of a cell."""

    def __init__(self):
        self.rows = []

    def add(self, row):
        self.rows.append(row)

    def cell(self, variant, operation, size, pipeline):
        wanted = (variant, operation, size, pipeline)
        return [row for row in self.rows if self.place(row) == wanted]

    @staticmethod
    def place(row):
        return row["variant"], row["operation"], row["value_bytes"], row["pipeline"]

    def ratio(self, variant, operation, size, pipeline, base=BASE, field="ops_per_second"):
        """The median of the ratios to another variant in the same round."""
        others = {row["round"]: row[field] for row in self.cell(base, operation, size, pipeline)}
        ratios = [
            row[field] / others[row["round"]]
            for row in self.cell(variant, operation, size, pipeline)
            if others.get(row["round"])
        ]
        return statistics.median(ratios) if ratios else None


def line(cells):
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def number(value, digits):
    return "–" if value is None else f"{value:.{digits}f}"


def print_report(options, table):
    for size in options.sizes:
        columns = [(operation, pipeline) for operation in OPERATIONS for pipeline in options.pipelines]
        print(f"\n### Values of {size} bytes: thousand operations per second (ratio to redis-server without persistence)\n")
        print(line(["", *[f"{operation} P={pipeline}" for operation, pipeline in columns]]))
        print(line(["---", *["---:"] * len(columns)]))
        for variant in options.variants:
            cells = [servers.VARIANTS[variant][0]]
            for operation, pipeline in columns:
                ops = median(table.cell(variant, operation, size, pipeline), "ops_per_second")
                ratio = table.ratio(variant, operation, size, pipeline)
                shown = "–" if ops is None else f"{ops / 1000:.0f}"
                cells.append(shown if ratio is None or variant == BASE else f"{shown} ({ratio:.2f}x)")
            print(line(cells))
        for operation, title in OPERATIONS.items():
            print(f"\n{title}, {size} bytes:\n")
            print(line(["", "P", "ops/s", "ratio", "p50 ms", "p99 ms", "server CPU s per million", "RSS MiB"]))
            print(line(["---", *["---:"] * 7]))
            for pipeline in options.pipelines:
                for variant in options.variants:
                    rows = table.cell(variant, operation, size, pipeline)
                    print(line([
                        servers.VARIANTS[variant][0],
                        pipeline,
                        number(median(rows, "ops_per_second"), 0),
                        number(table.ratio(variant, operation, size, pipeline), 2),
                        number(median(rows, "p50_ms"), 3),
                        number(median(rows, "p99_ms"), 3),
                        number(median(rows, "server_cpu_seconds_per_million"), 2),
                        number(median(rows, "server_rss_mib"), 0),
                    ]))


def print_against_baseline(options, table):
    """What changed from the binary BASELINE to this one, in the same rounds."""
    pairs = [(variant, base) for variant, base in servers.BASELINE_VARIANTS.items()]
    pairs = [pair for pair in pairs if all(name in options.variants for name in pair)]
    if not pairs:
        return
    print("\n### This binary against the baseline: operations per second / server CPU per operation\n")
    columns = [(operation, pipeline) for operation in OPERATIONS for pipeline in options.pipelines]
    print(line(["", "bytes", *[f"{operation} P={pipeline}" for operation, pipeline in columns]]))
    print(line(["---", *["---:"] * (len(columns) + 1)]))
    for variant, base in pairs:
        for size in options.sizes:
            cells = [servers.VARIANTS[variant][0], size]
            for operation, pipeline in columns:
                ratios = [
                    table.ratio(variant, operation, size, pipeline, base, field)
                    for field in ("ops_per_second", "server_cpu_seconds_per_million")
                ]
                cells.append(" / ".join(f"{number(ratio, 2)}x" for ratio in ratios))
            print(line(cells))


def main():
    options = Options()
    machine = servers.machine()
    os.makedirs(os.path.dirname(os.path.abspath(options.output)), exist_ok=True)
    table = Table()
    failed = set()
    with open(options.output, "w") as output:
        output.write(json.dumps({"machine": machine, "options": vars(options)}) + "\n")
        for round_number in range(1, options.rounds + 1):
            for size in options.sizes:
                for pipeline in options.pipelines:
                    for variant in options.variants:
                        print(f"round {round_number} · {size} B · P={pipeline} · {variant}", file=sys.stderr)
                        try:
                            results = measure_cell(options, variant, size, pipeline)
                        except servers.Failed as error:
                            # The other variants still have something to tell.
                            print(f"  {error}", file=sys.stderr)
                            failed.add(variant)
                            continue
                        for operation, result in results.items():
                            row = {"round": round_number, "variant": variant, "operation": operation}
                            row |= {"value_bytes": size, "pipeline": pipeline, **result}
                            table.add(row)
                            output.write(json.dumps(row) + "\n")
                        output.flush()
    print("## Side by side\n")
    print(f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['kernel']}, {machine['time']}")
    for name in ("redis", "nutcracker", "vasto", "baseline"):
        if machine[name]:
            print(f"- {machine[name]}" + (f" (baseline, {servers.BASELINE})" if name == "baseline" else ""))
    print(
        f"\n{options.keys} keys, {options.clients} clients, medians of {options.rounds} rounds, load by "
        f"{'vasto bench' if options.generator == 'vasto' else 'redis-benchmark'} on the same cores; "
        "server CPU is user and system time of all its processes until they are quiet again."
    )
    print_report(options, table)
    print_against_baseline(options, table)
    print(f"\nAll rows: {options.output}")
    if failed:
        print(f"Failed at least once: {', '.join(sorted(failed))} (see the error output)")


if __name__ == "__main__":
    try:
        main()
    except servers.Failed as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
