"""Measures how far replicas are behind, what a write costs with copies, and how long a killed primary is missed. See replication.sh."""

import os
import re
import sys
import threading
import time

import servers
from side_by_side import run_bench

STORES = 3
# Databases that become keyspaces of their own: one for the load, one of a single shard for the kills.
LOADED = "1"
KILLED = "2"
WHOLE_TIMEOUT_SECONDS = 120
RETURN_TIMEOUT_SECONDS = 60
# Between two looks at a replica, so that looking is not what it does most.
LOOK_PAUSE_SECONDS = 0.0005
LOOK_TIMEOUT_SECONDS = 5
# INFO counts keys, up to 100,000 a shard: asked more often it would be the load.
TOLD_PAUSE_SECONDS = 1


class Options:
    def __init__(self):
        quick = os.environ.get("QUICK", "0") not in ("", "0")
        words = os.environ.get("VARIANTS", "1/0 2/0 3/0 3/1").replace(",", " ").split()
        self.variants = [tuple(map(int, word.split("/"))) for word in words]
        self.rate = float(os.environ.get("RATE", "20000"))
        self.seconds = float(os.environ.get("DURATION_SECONDS", "5" if quick else "15"))
        self.keys = int(os.environ.get("KEYS", "200000"))
        self.value_bytes = int(os.environ.get("VALUE_BYTES", "64"))
        self.clients = int(os.environ.get("CLIENTS", "50"))
        self.shards = int(os.environ.get("SHARDS", "3"))
        self.kills = int(os.environ.get("KILLS", "2" if quick else "5"))


class Connection(servers.Client):
    """A client that reads whole replies."""

    def ask(self, *words):
        self.socket.sendall(servers.encode(*words))
        return self.read()

    def read(self):
        line = self.input.readline()
        if not line:
            raise ConnectionError("closed by the server")
        kind, rest = line[:1], line[1:].rstrip().decode()
        if kind == b"-":
            raise servers.Failed(rest)
        if kind == b":":
            return int(rest)
        if kind == b"$":
            return None if rest == "-1" else self.input.read(int(rest) + 2)[:-2].decode()
        if kind == b"*":
            return None if rest == "-1" else [self.read() for _ in range(int(rest))]
        return rest


def as_map(reply):
    return dict(zip(reply[::2], reply[1::2]))


class Stores:
    """A cluster whose stores can be killed and started again on their data."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.master = cluster.start_master(STORES)
        self.commands = {}
        self.running = {}
        for number in range(STORES):
            name = f"store-{number}"
            listen = f"127.0.0.1:{servers.free_port()}"
            command = [cluster.vasto, "store", "--master", self.master, "--listen", listen]
            command += ["--data", cluster.data_folder(name)]
            self.commands[name] = command + servers.words_from_environment("VASTO_STORE_ARGS")
            self.start(name)
        cluster.start_gateway(self.master)
        cluster.wait_until_it_serves()
        self.names = {self.line(name, "store"): name for name in self.running}

    def start(self, name):
        self.running[name] = self.cluster.start(name, self.commands[name])
        self.running[name].address("grpc")

    def line(self, name, word):
        """What follows a word in the line that a store prints when it serves."""
        with open(self.running[name].output_path) as output:
            found = re.search(rf", {word} ([^,\s]+)", output.read())
        return found.group(1) if found else None

    def kill(self, name):
        process = self.running[name].process
        process.kill()
        process.wait()


def create(connection, keyspace, shards, copies, min_replicas):
    words = ["KEYSPACE", "CREATE", keyspace, "SHARDS", str(shards)]
    if copies > 1:
        words += ["COPIES", str(copies), "MIN-REPLICAS", str(min_replicas)]
    connection.ask(*words)
    wait_until_whole(connection, keyspace, copies)


def layout(connection, keyspace):
    shards = [as_map(shard) for shard in connection.ask("TOPOLOGY")]
    return [shard for shard in shards if shard["keyspace"] == keyspace]


def wait_until_whole(connection, keyspace, copies):
    deadline = time.monotonic() + WHOLE_TIMEOUT_SECONDS
    shards = []
    while time.monotonic() < deadline:
        try:
            shards = layout(connection, keyspace)
            if shards and all(shard["state"] == "up" and len(shard["replicas"]) == copies - 1 for shard in shards):
                connection.ask("SELECT", keyspace)
                return
        except servers.Failed as error:
            shards = error
        time.sleep(0.05)
    raise servers.Failed(f"keyspace {keyspace} is not whole: {shards}")


def quantile(values, share):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


class Probe:
    """Writes a key again and again and looks how long after its acknowledgement a replica shows it."""

    def __init__(self, address, from_replica):
        self.writer, self.reader = (Connection(address), Connection(address))
        for connection in (self.writer, self.reader):
            connection.ask("SELECT", LOADED)
        if from_replica:
            self.reader.ask("READONLY")
        self.seconds = []
        self.missed = 0
        self.error = None
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.run)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        self.thread.join()
        self.writer.__exit__()
        self.reader.__exit__()
        if self.error:
            raise self.error

    def run(self):
        try:
            number = 0
            while not self.stopped.wait(0.01):
                number += 1
                # Another shard each time.
                self.look(f"probe:{number % 64}", str(number))
        except (OSError, servers.Failed) as error:
            self.error = error

    def look(self, key, value):
        self.writer.ask("SET", key, value)
        acknowledged = time.monotonic()
        while time.monotonic() - acknowledged < LOOK_TIMEOUT_SECONDS:
            if self.reader.ask("GET", key) == value:
                # With the way of the answer: more than the lag, by what the table shows for one copy.
                self.seconds.append(time.monotonic() - acknowledged)
                return
            time.sleep(LOOK_PAUSE_SECONDS)
        self.missed += 1


def lag_told(connection):
    """The largest lag of a copy of the loaded keyspace as INFO tells it, in seconds; `None` if it does not."""
    found = re.search(rf"^vasto_keyspace_{LOADED}:.*\blag_ms=(\d+)", connection.ask("INFO", "vasto"), re.MULTILINE)
    return int(found.group(1)) / 1000 if found else None


def measure_load(options, cluster, copies, min_replicas):
    with Connection(cluster.address) as connection:
        create(connection, LOADED, options.shards, copies, min_replicas)
    common = ["--database", LOADED, "--keys", str(options.keys), "--value-size", str(options.value_bytes)]
    common += ["--clients", str(options.clients), "--workload", "set", "--seed", "1"]
    # Warm: memtables and connections are there.
    run_bench(cluster.address, *common, "--requests", str(options.keys), "--pipeline", "16")
    cluster.wait_until_quiet()
    told = []
    before = cluster.cpu_seconds()
    with Probe(cluster.address, from_replica=copies > 1) as probe:
        finished = threading.Event()

        def collect():
            with Connection(cluster.address) as connection:
                while not finished.wait(TOLD_PAUSE_SECONDS):
                    lag = lag_told(connection)
                    if lag is not None:
                        told.append(lag)

        collector = threading.Thread(target=collect)
        collector.start()
        try:
            phase = run_bench(cluster.address, *common, "--rate", str(options.rate), "--duration", str(options.seconds))
        finally:
            finished.set()
            collector.join()
    cpu = cluster.cpu_seconds() - before
    writes = phase.get("writes") or {}
    return {
        "rate": phase["ops_per_second"],
        "p50_ms": writes.get("p50_ms"),
        "p99_ms": writes.get("p99_ms"),
        "cpu_us": cpu / max(1, phase["answers"]) * 1e6,
        "lag_p50_ms": milliseconds(quantile(probe.seconds, 0.5)),
        "lag_p99_ms": milliseconds(quantile(probe.seconds, 0.99)),
        "looks": len(probe.seconds),
        "missed": probe.missed,
        "told_p50_ms": milliseconds(quantile(told, 0.5)),
        "told_p99_ms": milliseconds(quantile(told, 0.99)),
    }


def milliseconds(seconds):
    return None if seconds is None else seconds * 1000


class Writer:
    """One client that sends a write, and sends it again when it fails; notes when each succeeded."""

    def __init__(self, address):
        self.address = address
        self.succeeded = []
        self.errors = 0
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.run)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        self.thread.join()

    def run(self):
        connection = None
        while not self.stopped.is_set():
            try:
                if connection is None:
                    connection = Connection(self.address, timeout=RETURN_TIMEOUT_SECONDS)
                    connection.ask("SELECT", KILLED)
                sent = time.monotonic()
                connection.ask("SET", "key", "value")
                self.succeeded.append((sent, time.monotonic()))
            except servers.Failed:
                self.errors += 1
            except OSError:
                connection = None
            time.sleep(0.001)


def measure_kills(options, cluster, stores, copies, min_replicas):
    """Seconds from kill -9 of a primary to the first write that was sent after it and served."""
    times = []
    with Connection(cluster.address) as connection:
        create(connection, KILLED, 1, copies, min_replicas)
        for _ in range(options.kills):
            wait_until_whole(connection, KILLED, copies)
            name = stores.names[layout(connection, KILLED)[0]["primary"]]
            with Writer(cluster.address) as writer:
                time.sleep(1)
                stores.kill(name)
                killed = time.monotonic()
                if copies == 1:
                    stores.start(name)
                deadline = killed + RETURN_TIMEOUT_SECONDS
                while time.monotonic() < deadline:
                    # An answer that was on its way may still come: what counts was served by another.
                    served = [done for sent, done in list(writer.succeeded) if done > killed + 0.05]
                    if served:
                        times.append(served[0] - killed)
                        break
                    time.sleep(0.01)
                else:
                    raise servers.Failed(f"no write was served within {RETURN_TIMEOUT_SECONDS} s after {name} was killed")
            if copies > 1:
                stores.start(name)
    return times


def show(value, digits=2):
    return "-" if value is None else f"{value:.{digits}f}"


def main():
    options = Options()
    loads, kills = [], []
    for copies, min_replicas in options.variants:
        print(f"copies {copies}, min-replicas {min_replicas}", file=sys.stderr)
        with servers.Cluster() as cluster:
            stores = Stores(cluster)
            loads.append((copies, min_replicas, measure_load(options, cluster, copies, min_replicas)))
            kills.append((copies, min_replicas, measure_kills(options, cluster, stores, copies, min_replicas)))
    print(
        f"\n{options.rate:.0f} writes/s asked for, {options.value_bytes}-byte values, {STORES} stores, {options.shards} shards, "
        f"{options.seconds:.0f} s. Lag: from the acknowledgement to the answer of a replica that shows the write (with one copy: of the "
        "primary, what asking itself takes); in brackets as INFO tells it.\n"
    )
    print("| copies | min-replicas | writes/s | p50 ms | p99 ms | CPU µs per write, all servers | lag p50 ms | lag p99 ms | looks |")
    print("|---|---|---|---|---|---|---|---|---|")
    for copies, min_replicas, row in loads:
        lag50 = f"{show(row['lag_p50_ms'])} ({show(row['told_p50_ms'])})"
        lag99 = f"{show(row['lag_p99_ms'])} ({show(row['told_p99_ms'])})"
        looks = f"{row['looks']}, {row['missed']} in vain"
        print(
            f"| {copies} | {min_replicas} | {row['rate']:.0f} | {show(row['p50_ms'])} | {show(row['p99_ms'])} | {row['cpu_us']:.1f} "
            f"| {lag50} | {lag99} | {looks} |"
        )
    print(f"\nFrom kill -9 of a primary to the first write served, {options.kills} kills (with one copy it is started again at once):\n")
    print("| copies | min-replicas | least s | median s | most s |")
    print("|---|---|---|---|---|")
    for copies, min_replicas, times in kills:
        print(f"| {copies} | {min_replicas} | {show(min(times))} | {show(quantile(times, 0.5))} | {show(max(times))} |")


if __name__ == "__main__":
    try:
        main()
    except servers.Failed as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
