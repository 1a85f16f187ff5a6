"""Measures how fast keyspaces grow and shrink, what clients notice, and what is read and written for it. See resize.sh."""

import binascii
import os
import subprocess
import sys
import threading
import time

import servers
from replication import Connection, as_map, quantile, show, wait_until_whole
from side_by_side import run_bench

# A database that becomes a keyspace of its own.
KEYSPACE = "1"
MB = 1e6
END_TIMEOUT_SECONDS = 1800
# Between two looks at a status: short against any phase, long enough not to be a load.
LOOK_PAUSE_SECONDS = 0.02
# Of the load beside a resize: so short that some lie within one.
SLICE_SECONDS = 1
SLOTS = 16384
REDIS_NODES = 4


class Options:
    def __init__(self):
        self.quick = os.environ.get("QUICK", "0") not in ("", "0")

        def number(name, full, quick):
            return int(os.environ.get(name, quick if self.quick else full))

        def words(name, full, quick):
            return os.environ.get(name, quick if self.quick else full).replace(",", " ").split()

        self.parts = words("PARTS", "speed fences reshard cost", "speed fences reshard cost")
        self.values_mb = number("VALUES_MB", 5000, 200)
        self.value_bytes = number("VALUE_BYTES", 1024, 1024)
        self.tiny_keys = number("TINY_KEYS", 5_000_000, 500_000)
        self.tiny_bytes = number("TINY_BYTES", 8, 8)
        self.rates = words("RATES", "0 default", "0 default")
        self.clients = number("CLIENTS", 20, 20)
        self.read_ratio = os.environ.get("READ_RATIO", "0.5")
        self.resizes = number("RESIZES", 10, 4)
        self.reshard_mb = number("RESHARD_MB", 1000, 80)
        self.cost_mb = [int(word) for word in words("COST_MB", "1000 2000 4000", "25 50 100")]


def say(text):
    print(text, file=sys.stderr)


class Keyspace:
    """A cluster of so many stores with one keyspace that is resized."""

    def __init__(self, cluster, stores, shards, rate="default"):
        self.cluster = cluster
        master = cluster.start_master(1)
        options = [] if rate == "default" else ["--resize-rate", rate]
        self.stores = [self.start_store(f"store-{number}", master, options) for number in range(stores)]
        cluster.start_gateway(master)
        cluster.wait_until_it_serves()
        self.connection = Connection(cluster.address, timeout=60)
        deadline = time.monotonic() + servers.START_TIMEOUT_SECONDS
        while sum(as_map(store)["state"] == "up" for store in self.connection.ask("STORES")) < stores:
            if time.monotonic() > deadline:
                raise servers.Failed(f"of {stores} stores not all are up")
            time.sleep(0.05)
        self.connection.ask("KEYSPACE", "CREATE", KEYSPACE, "SHARDS", str(shards))
        wait_until_whole(self.connection, KEYSPACE, 1)

    def start_store(self, name, master, options):
        command = [self.cluster.vasto, "store", "--master", master, "--listen", "127.0.0.1:0"]
        command += ["--data", self.cluster.data_folder(name), *options]
        store = self.cluster.start(name, command + servers.words_from_environment("VASTO_STORE_ARGS"))
        store.address("grpc")
        return store

    def load(self, keys, value_bytes):
        arguments = ["--database", KEYSPACE, "--keys", str(keys), "--value-size", str(value_bytes), "--seed", "1"]
        run_bench(self.cluster.address, *arguments, "--clients", "8", "--pipeline", "64", "--load", "--requests", "0")
        self.settle()

    def settle(self):
        self.cluster.wait_until_quiet(limit_seconds=60)

    def begin(self, shards):
        return Resize(self, self.connection.ask("KEYSPACE", "RESIZE", KEYSPACE, "SHARDS", str(shards)))

    def resize(self, shards):
        resize = self.begin(shards)
        while not resize.look():
            time.sleep(LOOK_PAUSE_SECONDS)
        return resize

    def bytes_of_files(self):
        """What all stores have read and written: asked of the system, read from a disk, handed over to be written."""
        return [sum(store.io_bytes(field) for store in self.stores) for field in ("rchar", "read_bytes", "write_bytes")]


class Resize:
    """One that goes on: how long its phases last, and what it moves."""

    def __init__(self, keyspace, operation):
        self.keyspace = keyspace
        self.operation = operation
        self.begun = time.monotonic()
        self.phases = {}
        self.rows = 0
        self.bytes = 0
        self.ended = None

    def look(self):
        """Whether it has ended."""
        status = as_map(self.keyspace.connection.ask("KEYSPACE", "STATUS", KEYSPACE))
        now = time.monotonic()
        if str(status["operation"]) != str(self.operation):
            raise servers.Failed(f"operation {self.operation} is not the last: {status}")
        phase = status["phase"]
        self.phases.setdefault(phase, now)
        self.rows = max(self.rows, status.get("rows") or 0)
        self.bytes = max(self.bytes, status.get("bytes") or 0)
        if phase == "aborted":
            raise servers.Failed(f"it was aborted: {status['reason']}")
        if phase == "done":
            self.ended = now
        elif now - self.begun > END_TIMEOUT_SECONDS:
            raise servers.Failed(f"it does not end: {status}")
        return phase == "done"

    def copied_after(self):
        """Seconds until all rows were there."""
        later = [at for phase, at in self.phases.items() if phase != "copy"]
        return min(later) - self.begun

    def lasted(self):
        return self.ended - self.begun

    def rate(self):
        """MB/s and rows/s, over the time until all rows were there."""
        seconds = max(self.copied_after(), 1e-9)
        return self.bytes / MB / seconds, self.rows / seconds


class Load:
    """Slices of a closed loop, one after the other."""

    def __init__(self, options, address, keys, value_bytes):
        self.address = address
        self.arguments = ["--database", KEYSPACE, "--keys", str(keys), "--value-size", str(value_bytes)]
        self.arguments += ["--clients", str(options.clients), "--workload", "mixed", "--read-ratio", options.read_ratio]

    def slice(self, seconds=SLICE_SECONDS):
        begun = time.monotonic()
        phase = run_bench(self.address, *self.arguments, "--duration", str(seconds))
        p99 = max((phase.get(kind) or {}).get("p99_ms") or 0 for kind in ("reads", "writes"))
        return {"begun": begun, "ended": time.monotonic(), "rate": phase["ops_per_second"], "p99_ms": p99}


def average(slices, name):
    return sum(one[name] for one in slices) / len(slices) if slices else None


def measure_speed(options, keys, value_bytes, rate):
    with servers.Cluster() as cluster:
        keyspace = Keyspace(cluster, 2, 1, rate)
        keyspace.load(keys, value_bytes)
        quiet = keyspace.resize(2)
        keyspace.settle()
        back = keyspace.resize(1)
        keyspace.settle()
        load = Load(options, cluster.address, keys, value_bytes)
        load.slice()
        before = [load.slice() for _ in range(3 if options.quick else 8)]
        during = []
        resize = keyspace.begin(2)
        finished = threading.Event()

        def go_on():
            while not finished.is_set():
                during.append(load.slice())

        thread = threading.Thread(target=go_on)
        thread.start()
        try:
            while not resize.look():
                time.sleep(LOOK_PAUSE_SECONDS)
        finally:
            finished.set()
            thread.join()
        copied = resize.begun + resize.copied_after()
        # Those that lie within the copying, else those that have a part of it.
        within = [one for one in during if one["ended"] <= copied]
        within = within or [one for one in during if one["begun"] < copied]
        return {"quiet": quiet, "back": back, "loaded": resize, "before": before, "during": within}


def print_speed(options):
    sets = [(options.values_mb * 1_000_000 // options.value_bytes, options.value_bytes), (options.tiny_keys, options.tiny_bytes)]
    rows = []
    for keys, value_bytes in sets:
        for rate in options.rates:
            say(f"speed: {keys} keys of {value_bytes} bytes, rate {rate}")
            rows.append((keys, value_bytes, rate, measure_speed(options, keys, value_bytes, rate)))
    print("\nFrom one store to another: 1 to 2 shards and back with nothing else going on, then 1 to 2 beside a closed loop of "
          f"{options.clients} clients, {options.read_ratio} of it reads. MB/s and keys/s count until all rows are there.\n")
    print("| keys | bytes | rate | moved MB | moved keys | grow MB/s | keys/s | shrink MB/s | keys/s | under load MB/s | keys/s | s to the end |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for keys, value_bytes, rate, row in rows:
        cells = [str(keys), str(value_bytes), rate, show(row["quiet"].bytes / MB, 0), str(row["quiet"].rows)]
        for name in ("quiet", "back", "loaded"):
            megabytes, per_second = row[name].rate()
            cells += [show(megabytes, 1), show(per_second, 0)]
        cells.append(show(row["loaded"].lasted()))
        print(f"| {' | '.join(cells)} |")
    print("\n| keys | bytes | rate | ops/s before | during | kept | p99 ms before | during, mean of slices | worst slice |")
    print("|---|---|---|---|---|---|---|---|---|")
    for keys, value_bytes, rate, row in rows:
        before, during = average(row["before"], "rate"), average(row["during"], "rate")
        kept = f"{100 * during / before:.0f} %" if before and during else "-"
        worst = max((one["p99_ms"] for one in row["during"]), default=None)
        print(
            f"| {keys} | {value_bytes} | {rate} | {show(before, 0)} | {show(during, 0)} | {kept} "
            f"| {show(average(row['before'], 'p99_ms'))} | {show(average(row['during'], 'p99_ms'))} | {show(worst)} |"
        )


def slot_of(key):
    return binascii.crc_hqx(key.encode(), 0) % SLOTS


def shard_of(slot, shards):
    """SplitMix64 and the jump hash of Lamping and Veach, as the servers have it."""
    mask = (1 << 64) - 1
    mixed = (slot + 0x9E3779B97F4A7C15) & mask
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    state = mixed ^ (mixed >> 31)
    shard, following = -1, 0
    while following < shards:
        shard = following
        state = (state * 2862933555777941757 + 1) & mask
        following = int((shard + 1) * ((1 << 31) / ((state >> 33) + 1)))
    return shard


class Probe:
    """Writes keys of slots that move, one after the other, and notes how long each write takes."""

    def __init__(self, address, few, many):
        keys = (f"probe:{number}" for number in range(10_000))
        self.keys = [key for key in keys if shard_of(slot_of(key), few) != shard_of(slot_of(key), many)][:64]
        self.connection = Connection(address, timeout=60)
        self.connection.ask("SELECT", KEYSPACE)
        self.longest = 0
        self.error = None
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.run)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        self.thread.join()
        self.connection.__exit__()
        if self.error:
            raise self.error

    def run(self):
        number = 0
        try:
            while not self.stopped.is_set():
                number += 1
                sent = time.monotonic()
                self.connection.ask("SET", self.keys[number % len(self.keys)], str(number))
                self.longest = max(self.longest, time.monotonic() - sent)
        except (OSError, servers.Failed) as error:
            self.error = error

    def take_longest(self):
        longest, self.longest = self.longest, 0
        return longest


def print_fences(options):
    say("fences")
    keys, value_bytes = (50_000 if options.quick else 1_000_000), 256
    pauses = {"with nothing else going on": [], "beside the load": []}
    normal = []
    with servers.Cluster() as cluster:
        keyspace = Keyspace(cluster, 3, 2)
        keyspace.load(keys, value_bytes)
        with Probe(cluster.address, 2, 3) as probe:
            for what, times in pauses.items():
                generator = None
                if what == "beside the load":
                    load = Load(options, cluster.address, keys, value_bytes)
                    command = [servers.VASTO_BENCH, "bench", "--addr", cluster.address, "--quiet", *load.arguments]
                    command += ["--duration", str(END_TIMEOUT_SECONDS)]
                    generator = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                try:
                    for _ in range(options.resizes):
                        for shards in (3, 2):
                            time.sleep(0.5)
                            probe.take_longest()
                            time.sleep(0.5)
                            normal.append(probe.take_longest())
                            keyspace.resize(shards)
                            times.append(probe.take_longest())
                finally:
                    if generator:
                        generator.kill()
                        generator.wait()
    print(f"\nThe longest write of a key whose slot moves, for each of {options.resizes} times 2 to 3 shards and back, {keys} keys of "
          f"{value_bytes} bytes; without a resize {show(quantile(normal, 0.5) * 1000)} ms at the median, {show(max(normal) * 1000)} at most.\n")
    print("| | resizes | p50 ms | p99 ms | max ms |")
    print("|---|---|---|---|---|")
    for what, times in pauses.items():
        figures = " | ".join(show(value * 1000, 1) for value in (quantile(times, 0.5), quantile(times, 0.99), max(times)))
        print(f"| {what} | {len(times)} | {figures} |")


class RedisCluster:
    """Three redis-servers that have all slots, and a fourth without any."""

    def __init__(self, cluster):
        self.nodes = []
        for number in range(REDIS_NODES):
            bus = servers.free_port()
            options = ["--cluster-enabled", "yes", "--cluster-port", str(bus), "--appendonly", "no"]
            _, address = cluster.start_redis(f"redis-{number}", *options)
            self.nodes.append((address, bus))
        self.connections = [connect_patiently(address) for address, _ in self.nodes]
        for address, bus in self.nodes[1:]:
            host, _, port = address.rpartition(":")
            self.connections[0].ask("CLUSTER", "MEET", host, port, str(bus))
        self.edges = [SLOTS * number // (REDIS_NODES - 1) for number in range(REDIS_NODES)]
        for number, first in enumerate(self.edges[:-1]):
            self.connections[number].ask("CLUSTER", "ADDSLOTSRANGE", str(first), str(self.edges[number + 1] - 1))
        self.wait_until_it_serves()

    def wait_until_it_serves(self):
        deadline = time.monotonic() + servers.START_TIMEOUT_SECONDS
        wanted = ("cluster_state:ok", f"cluster_known_nodes:{REDIS_NODES}")
        while time.monotonic() < deadline:
            states = [connection.ask("CLUSTER", "INFO") for connection in self.connections]
            if all(word in state for state in states for word in wanted):
                return
            time.sleep(0.1)
        raise servers.Failed("redis-servers do not become a cluster")

    def load(self, keys, value_bytes):
        value = "v" * value_bytes
        packets = [[] for _ in self.connections]
        for number in range(keys):
            key = f"key:{number:012}"
            slot = slot_of(key)
            node = next(node for node in range(REDIS_NODES) if slot < self.edges[node + 1])
            packets[node].append(servers.encode("SET", key, value))
            if len(packets[node]) == 200:
                self.send(node, packets[node])
        for node, packet in enumerate(packets):
            self.send(node, packet)

    def send(self, node, packet):
        self.connections[node].socket.sendall(b"".join(packet))
        for _ in packet:
            self.connections[node].read()
        packet.clear()

    def keys_of_the_last(self):
        return self.connections[-1].ask("DBSIZE")

    def await_agreement(self):
        """Until every node knows who has which slot: redis-cli reshards nothing before."""
        deadline = time.monotonic() + servers.START_TIMEOUT_SECONDS
        command = ["redis-cli", "--cluster", "check", self.nodes[0][0]]
        while subprocess.run(command, capture_output=True, check=False).returncode != 0:
            if time.monotonic() > deadline:
                raise servers.Failed("the nodes do not agree who has which slot")
            time.sleep(0.2)

    def reshard(self, slots, pipeline):
        """Seconds for so many slots from the three to the fourth."""
        self.await_agreement()
        target = self.connections[-1].ask("CLUSTER", "MYID")
        command = ["redis-cli", "--cluster", "reshard", self.nodes[0][0], "--cluster-from", "all", "--cluster-to", target]
        command += ["--cluster-slots", str(slots), "--cluster-yes", "--cluster-pipeline", str(pipeline)]
        begun = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise servers.Failed(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr}")
        return time.monotonic() - begun


def connect_patiently(address):
    deadline = time.monotonic() + servers.START_TIMEOUT_SECONDS
    while True:
        try:
            connection = Connection(address, timeout=60)
            connection.ask("PING")
            return connection
        except (OSError, servers.Failed):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def print_reshard(options):
    value_bytes = options.value_bytes
    keys = options.reshard_mb * 1_000_000 // value_bytes
    rows = []
    say(f"reshard: redis, {keys} keys")
    with servers.Cluster() as cluster:
        redis = RedisCluster(cluster)
        redis.load(keys, value_bytes)
        for pipeline in (10, 100):
            before = redis.keys_of_the_last()
            seconds = redis.reshard(SLOTS // REDIS_NODES // 2, pipeline)
            rows.append((f"redis-cli --cluster reshard, pipeline {pipeline}", redis.keys_of_the_last() - before, seconds))
    for rate in options.rates:
        say(f"reshard: vasto, rate {rate}")
        with servers.Cluster() as cluster:
            keyspace = Keyspace(cluster, 4, 3, rate)
            keyspace.load(keys, value_bytes)
            resize = keyspace.resize(4)
            rows.append((f"vasto, rate {rate}, until all rows are there", resize.rows, resize.copied_after()))
            rows.append((f"vasto, rate {rate}, to the end", resize.rows, resize.lasted()))
    print(f"\n3 servers to 4, {keys} keys of {value_bytes} bytes, nothing else going on:\n")
    print("| | moved keys | s | keys/s | MB/s of values |")
    print("|---|---|---|---|---|")
    for what, moved, seconds in rows:
        print(f"| {what} | {moved} | {show(seconds)} | {show(moved / seconds, 0)} | {show(moved * value_bytes / MB / seconds, 1)} |")


def measure_cost(options, stores, few, many, megabytes):
    with servers.Cluster() as cluster:
        keyspace = Keyspace(cluster, stores, few, "0")
        keyspace.load(megabytes * 1_000_000 // options.value_bytes, options.value_bytes)
        before = keyspace.bytes_of_files()
        resize = keyspace.resize(many)
        at_end = keyspace.bytes_of_files()
        keyspace.settle()
        settled = keyspace.bytes_of_files()
        return resize, [after - first for first, after in zip(before, at_end)], [after - first for first, after in zip(before, settled)]


def print_cost(options):
    smallest = options.cost_mb[0]
    plans = [(4, 3, 4, megabytes) for megabytes in options.cost_mb] + [(2, 1, 2, smallest), (2, 10, 11, smallest)]
    print("\nBytes that all stores read and wrote, until the end and with what is compacted after it, MB:\n")
    print("| shards | data | moved | read | from a disk | written | after it: read | from a disk | written |")
    print("|---|---|---|---|---|---|---|---|---|")
    for stores, few, many, megabytes in plans:
        say(f"cost: {few} to {many} shards, {megabytes} MB")
        resize, at_end, settled = measure_cost(options, stores, few, many, megabytes)
        cells = [f"{few} to {many}", str(megabytes)] + [show(value / MB, 1) for value in (resize.bytes, *at_end, *settled)]
        print(f"| {' | '.join(cells)} |", flush=True)


PARTS = {"speed": print_speed, "fences": print_fences, "reshard": print_reshard, "cost": print_cost}


def main():
    options = Options()
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        raise servers.Failed(f"unknown parts {unknown}; there are {list(PARTS)}")
    figures = servers.machine()
    print(", ".join(f"{name} {value}" for name, value in figures.items() if value is not None))
    for part in options.parts:
        PARTS[part](options)


if __name__ == "__main__":
    try:
        main()
    except servers.Failed as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
