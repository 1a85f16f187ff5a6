"""Measures the memory of gateway and store under load, idle connections, and a client that never reads. See memory.sh."""

import contextlib
import json
import os
import resource
import selectors
import socket
import subprocess
import sys
import threading
import time

import servers

MIB = 1 << 20


class Options:
    def __init__(self):
        quick = os.environ.get("QUICK", "0") not in ("", "0")
        self.requests = int(os.environ.get("REQUESTS", "2000000" if quick else "100000000"))
        self.keys = int(os.environ.get("KEYS", "100000" if quick else "1000000"))
        self.samples = int(os.environ.get("SAMPLES", "5" if quick else "20"))
        self.value_bytes = int(os.environ.get("VALUE_BYTES", "64"))
        self.clients = int(os.environ.get("CLIENTS", "50"))
        self.pipeline = int(os.environ.get("PIPELINE", "64"))
        self.idle_connections = int(os.environ.get("IDLE_CONNECTIONS", "1000" if quick else "5000"))
        self.flood_bytes = int(os.environ.get("FLOOD_BYTES", str(100 * MIB if quick else 1 << 30)))
        self.flood_value_bytes = int(os.environ.get("FLOOD_VALUE_BYTES", "1024"))
        self.flood_seconds = float(os.environ.get("FLOOD_SECONDS", "20" if quick else "120"))
        self.variant = os.environ.get("VARIANT", "vasto-1")
        self.parts = os.environ.get("PARTS", "requests idle flood").replace(",", " ").split()


def bench(address, *arguments):
    command = [servers.VASTO_BENCH, "bench", "--addr", address, "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise servers.Failed(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout)["phases"][-1]


def start(options):
    """The cluster, its gateway (the process that clients speak to) and its stores."""
    cluster = servers.start_variant(options.variant)
    if options.variant == "redis":
        # Without this limit redis keeps all answers that nobody reads: 30 GB here.
        with servers.Client(cluster.address) as client:
            client.call("CONFIG", "SET", "client-output-buffer-limit", "normal 67108864 0 0")
    return cluster, cluster.servers[-1]


def rss_mib(server):
    return server.status_kib("VmRSS") / 1024


def measure_requests(options):
    """RSS of every process while REQUESTS commands pass, half GET, half SET."""
    cluster, _ = start(options)
    with cluster:
        common = ["--clients", str(options.clients), "--keys", str(options.keys), "--seed", "1"]
        common += ["--value-size", str(options.value_bytes)]
        bench(cluster.address, *common, "--load", "--requests", "0")
        names = [server.name for server in cluster.servers]
        print(f"\n### RSS in MiB over {options.requests} requests (half GET, half SET, pipeline {options.pipeline})\n")
        print("| million requests | ops/s | " + " | ".join(names) + " |")
        print("| ---: | ---: |" + " ---: |" * len(names))
        history = []
        for sample in range(options.samples + 1):
            ops = ""
            if sample > 0:
                requests = options.requests * sample // options.samples - options.requests * (sample - 1) // options.samples
                load = ["--pipeline", str(options.pipeline), "--requests", str(requests), "--read-ratio", "0.5"]
                ops = f"{bench(cluster.address, *common, *load)['ops_per_second']:.0f}"
            sizes = [rss_mib(server) for server in cluster.servers]
            history.append(sizes)
            done = options.requests * sample / options.samples / 1e6
            print(f"| {done:.1f} | {ops} | " + " | ".join(f"{size:.1f}" for size in sizes) + " |", flush=True)
        # The first half fills caches and buffers; what grows after it would grow for ever.
        later = history[len(history) // 2 :]
        print()
        for name, sizes in zip(names, zip(*later)):
            print(f"- {name}: {min(sizes):.1f} to {max(sizes):.1f} MiB in the second half, {sizes[-1] - sizes[0]:+.1f} from its start to its end")


def measure_idle(options):
    """What an idle connection costs the gateway: that only was opened, and that has been used."""
    cluster, gateway = start(options)
    with cluster:
        # The first connections pay for what all share.
        warm = [servers.Client(cluster.address) for _ in range(50)]
        for client in warm:
            client.call("GET", "warm")
        for client in warm:
            client.__exit__()
        time.sleep(1)
        before = gateway.status_kib("VmRSS")
        print(f"\n### {options.idle_connections} idle connections, RSS of {gateway.name}\n")
        print("| | RSS MiB | KiB per connection |")
        print("| --- | ---: | ---: |")
        print(f"| before | {before / 1024:.1f} | |")

        def tell(what, count):
            time.sleep(2)
            now = gateway.status_kib("VmRSS")
            print(f"| {what} | {now / 1024:.1f} | {(now - before) / count:.1f} |", flush=True)

        with contextlib.ExitStack() as stack:
            clients = []
            for _ in range(options.idle_connections):
                clients.append(stack.enter_context(servers.Client(cluster.address)))
                if len(clients) % 100 == 0:
                    # So that the listening queue never overflows.
                    clients[-1].call("PING")
            tell("connected", len(clients))
            for client in clients:
                client.call("PING")
            tell("after a PING each", len(clients))
            for number, client in enumerate(clients):
                client.call("SET", f"idle:{number}", "x" * 64)
                client.call("GET", f"idle:{number}")
            tell("after a SET and a GET each", len(clients))
            batch = b"".join(servers.encode("GET", f"idle:{number}") for number in range(64))
            for client in clients:
                client.socket.sendall(batch)
                for _ in range(64):
                    client.input.readline(), client.input.readline()
            tell("after a pipeline of 64 GETs each", len(clients))
        tell("all closed", options.idle_connections)


class Flood(threading.Thread):
    """Pipelines GETs and never reads an answer."""

    def __init__(self, address, key, options):
        super().__init__(daemon=True)
        self.address = address
        self.batch = servers.encode("GET", key) * 1000
        self.bytes_max = options.flood_bytes
        self.deadline = options.flood_seconds
        self.sent = 0
        self.ending = None
        self.seconds = None

    def run(self):
        host, _, port = self.address.rpartition(":")
        start = time.monotonic()
        with socket.create_connection((host, int(port))) as stream, selectors.DefaultSelector() as selector:
            stream.setblocking(False)
            selector.register(stream, selectors.EVENT_WRITE)
            rest = memoryview(b"")
            while self.ending is None:
                if self.sent >= self.bytes_max:
                    self.ending = "sent all"
                    # Stays connected without reading, as long as the measurement lasts.
                    self.wait_for_end(stream, start)
                elif time.monotonic() - start > self.deadline:
                    self.ending = "neither disconnected nor able to send more"
                elif selector.select(0.1):
                    rest = rest or memoryview(self.batch)
                    try:
                        length = stream.send(rest)
                    except BlockingIOError:
                        continue
                    except OSError as error:
                        self.ending = f"disconnected by the server ({error.strerror})"
                        continue
                    self.sent += length
                    rest = rest[length:]
                elif is_hung_up(stream):
                    self.ending = "disconnected by the server"
            self.seconds = time.monotonic() - start

    def wait_for_end(self, stream, start):
        while time.monotonic() - start < self.deadline:
            if is_hung_up(stream):
                self.ending = "sent all, then disconnected by the server"
                return
            time.sleep(0.1)
        self.ending = "sent all, never disconnected"


def is_hung_up(stream):
    """Whether the peer reset the connection; found without reading an answer."""
    return stream.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0 or is_closed(stream)


def is_closed(stream):
    # Byte 0 of tcp_info is the state; 1 is ESTABLISHED.
    return stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != 1


def measure_flood(options):
    """A client that never reads: what it costs in memory, and what another client notices of it."""
    cluster, gateway = start(options)
    with cluster:
        key = "flood"
        with servers.Client(cluster.address) as client:
            client.call("SET", key, "x" * options.flood_value_bytes)
        load = ["--clients", "5", "--rate", "2000", "--keys", "10000", "--workload", "mixed", "--seed", "1"]
        bench(cluster.address, "--load", "--requests", "0", "--keys", "10000")
        quiet = bench(cluster.address, *load, "--duration", "3")
        before = {server.name: rss_mib(server) for server in cluster.servers}
        peak = dict(before)
        flood = Flood(cluster.address, key, options)
        other = {}
        other_ended = threading.Event()

        def measure_other():
            try:
                # One run after the other while the flood lasts; the worst of them is told.
                while True:
                    phase = bench(cluster.address, *load, "--duration", "3")
                    for field in ("reads", "writes"):
                        other[field] = worst(other.get(field), phase.get(field))
                    other["errors"] = other.get("errors", 0) + sum(error["count"] for error in phase["errors"].values())
                    other["lost"] = other.get("lost", 0) + phase["lost_requests"]
                    if not flood.is_alive():
                        return
            except servers.Failed as error:
                other["failed"] = str(error)
            finally:
                other_ended.set()

        flood.start()
        observer = threading.Thread(target=measure_other)
        observer.start()
        while not other_ended.is_set():
            for server in cluster.servers:
                peak[server.name] = max(peak[server.name], rss_mib(server))
            time.sleep(0.05)
        observer.join()
        flood.join()
        time.sleep(2)
        after = {server.name: rss_mib(server) for server in cluster.servers}
        print(f"\n### A client that pipelines {options.flood_bytes / MIB:.0f} MiB of GETs ({options.flood_value_bytes} B values) and never reads\n")
        print(f"It sent {flood.sent / MIB:.1f} MiB, then: {flood.ending}, after {flood.seconds:.1f} s.\n")
        print("| RSS MiB | before | peak | after |")
        print("| --- | ---: | ---: | ---: |")
        for name in before:
            marked = f"{name} (clients speak to it)" if name == gateway.name else name
            print(f"| {marked} | {before[name]:.1f} | {peak[name]:.1f} | {after[name]:.1f} |")
        print("\n| others: 5 clients, 2000 ops/s by timetable | p50 ms | p99 ms | max ms |")
        print("| --- | ---: | ---: | ---: |")
        for what, phase in (("before", quiet), ("during (worst 3 s)", other)):
            for field in ("reads", "writes"):
                latency = phase.get(field)
                if latency:
                    print(f"| {what}, {field} | {latency['p50_ms']:.3f} | {latency['p99_ms']:.3f} | {latency['max_ms']:.3f} |")
        print(f"\nErrors of the others during it: {other.get('errors', 0)}, commands lost: {other.get('lost', 0)}.")
        if "failed" in other:
            print(f"The others failed: {other['failed']}")


def worst(known, latency):
    if not known or not latency:
        return known or latency
    return {field: max(known[field], latency[field]) for field in latency}


def main():
    options = Options()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Servers inherit it: a gateway needs a file for each connection.
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < options.idle_connections + 100:
        raise servers.Failed(f"the limit of open files is {hard}: too low for {options.idle_connections} connections")
    machine = servers.machine()
    print(f"## Memory of {servers.VARIANTS[options.variant][0]}\n")
    print(f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['kernel']}, {machine['time']}")
    parts = {"requests": measure_requests, "idle": measure_idle, "flood": measure_flood}
    for part in options.parts:
        if part not in parts:
            raise servers.Failed(f"unknown part {part}; there are {list(parts)}")
        parts[part](options)


if __name__ == "__main__":
    try:
        main()
    except servers.Failed as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
