"""Starts the servers that the benchmarks compare, reads what they cost from /proc, and stops them again."""

import atexit
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Absolute, since servers run in folders of their own.
VASTO = os.path.abspath(os.environ.get("VASTO") or os.path.join(REPOSITORY, "target", "release", "vasto"))
# What generates the load: a binary that knows `bench`.
VASTO_BENCH = os.path.abspath(os.environ.get("VASTO_BENCH") or VASTO)
# Another binary, to be measured beside the first in the same run.
BASELINE = os.path.abspath(os.environ["BASELINE"]) if os.environ.get("BASELINE") else None

START_TIMEOUT_SECONDS = 60
STOP_TIMEOUT_SECONDS = 20
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class Failed(Exception):
    """What the user must hear in one line."""


def words_from_environment(name):
    return os.environ.get(name, "").split()


def free_port():
    """A port that was free a moment ago, for servers that cannot choose one themselves."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """One process with its log files, stopped by its own pid."""

    alive = []

    def __init__(self, name, command, folder):
        self.name = name
        self.output_path = os.path.join(folder, f"{name}.out")
        self.log_path = os.path.join(folder, f"{name}.log")
        try:
            with open(self.output_path, "wb") as output, open(self.log_path, "wb") as log:
                self.process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=log, cwd=folder
                )
        except OSError as error:
            raise Failed(f"cannot start {command[0]}: {error}") from error
        self.pid = self.process.pid
        Server.alive.append(self)

    def fail(self, what):
        lines = []
        for path in (self.output_path, self.log_path):
            with contextlib.suppress(OSError), open(path, errors="replace") as log:
                lines += log.read().splitlines()[-10:]
        raise Failed("\n  ".join([f"{self.name}: {what}", *lines]))

    def address(self, kind):
        """The address after `redis` or `grpc` in the line that the process prints when it serves."""
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            with open(self.output_path, errors="replace") as output:
                found = re.search(rf"\b{kind}\s+(\S+:\d+)", output.read())
            if found:
                return found.group(1).rstrip(",;.")
            if self.process.poll() is not None:
                self.fail(f"ended with status {self.process.returncode} before it served")
            time.sleep(0.02)
        self.fail(f"printed no {kind} address within {START_TIMEOUT_SECONDS} s")

    def cpu_seconds(self):
        """User and system time of all its threads, and of children that it has waited for."""
        with open(f"/proc/{self.pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
        return sum(int(field) for field in fields[11:15]) / TICKS_PER_SECOND

    def io_bytes(self, field):
        """A field of /proc/PID/io: `read_bytes` came from a disk, `rchar` was asked for and may come from the page cache."""
        with open(f"/proc/{self.pid}/io") as io:
            return int(re.search(rf"^{field}: (\d+)$", io.read(), re.MULTILINE).group(1))

    def status_kib(self, field):
        """A field of /proc/PID/status such as VmRSS or VmHWM, in KiB."""
        with open(f"/proc/{self.pid}/status") as status:
            for line in status:
                if line.startswith(field + ":"):
                    return int(line.split()[1])
        raise Failed(f"{self.name} has no {field}")

    def stop(self):
        if self in Server.alive:
            Server.alive.remove(self)
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_TIMEOUT_SECONDS)
            except subprocess.TimeoutExpired:
                print(f"{self.name} did not end on SIGTERM, killed", file=sys.stderr)
                self.process.kill()
                self.process.wait()


@atexit.register
def stop_all():
    for server in list(Server.alive):
        server.stop()


# So that atexit runs: the default action of SIGTERM would leave the servers behind.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


class Cluster:
    """The processes of one variant; `address` is where clients connect, `vasto` the binary that its own processes run."""

    def __init__(self):
        self.vasto = VASTO
        self.folder = tempfile.mkdtemp(prefix="vasto-bench-")
        self.servers = []
        self.address = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for server in reversed(self.servers):
            server.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self, name, command):
        server = Server(name, command, self.folder)
        self.servers.append(server)
        return server

    def data_folder(self, name):
        path = os.path.join(self.folder, name)
        os.mkdir(path)
        return path

    def start_redis(self, name, *options):
        port = free_port()
        command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--save", ""]
        server = self.start(name, [*command, "--dir", self.data_folder(name), *options])
        return server, f"127.0.0.1:{port}"

    def start_master(self, shards):
        command = [self.vasto, "master", "--listen", "127.0.0.1:0", "--bootstrap-shards", str(shards)]
        master = self.start("master", command + words_from_environment("VASTO_MASTER_ARGS"))
        return master.address("grpc")

    def start_store(self, name, master):
        command = [self.vasto, "store", "--master", master, "--listen", "127.0.0.1:0"]
        command += ["--data", self.data_folder(name)]
        return self.start(name, command + words_from_environment("VASTO_STORE_ARGS"))

    def start_gateway(self, master):
        command = [self.vasto, "gateway", "--master", master, "--listen", "127.0.0.1:0"]
        gateway = self.start("gateway", command + words_from_environment("VASTO_GATEWAY_ARGS"))
        self.address = gateway.address("redis")
        return gateway

    def wait_until_it_serves(self):
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        last = "no answer"
        while time.monotonic() < deadline:
            for server in self.servers:
                if server.process.poll() is not None:
                    server.fail(f"ended with status {server.process.returncode}")
            try:
                with Client(self.address) as client:
                    # Keys of many slots, so that every shard has answered.
                    replies = [client.call("GET", f"bench-probe-{number}") for number in range(64)]
                last = next((reply for reply in replies if reply.startswith(b"-")), None)
                if last is None:
                    return
            except OSError as error:
                last = error
            time.sleep(0.05)
        raise Failed(f"the server at {self.address} does not serve: {last}")

    def cpu_seconds(self):
        return sum(server.cpu_seconds() for server in self.servers)

    def wait_until_quiet(self, share_max=0.1, limit_seconds=20):
        """Waits for work in the background (compaction, log rewriting) to end, so that it counts for what caused it."""
        deadline = time.monotonic() + limit_seconds
        interval = 0.3
        before = self.cpu_seconds()
        while time.monotonic() < deadline:
            time.sleep(interval)
            after = self.cpu_seconds()
            if after - before <= share_max * interval:
                return
            before = after


class Client:
    """A connection for a few commands; not for measuring throughput."""

    def __init__(self, address, timeout=10):
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.input = self.socket.makefile("rb")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.input.close()
        self.socket.close()

    def call(self, *words):
        """The first line of the reply; the body of a bulk is read over."""
        self.socket.sendall(encode(*words))
        line = self.input.readline()
        if not line:
            raise ConnectionError("closed by the server")
        if line.startswith(b"$") and line != b"$-1\r\n":
            self.input.read(int(line[1:]) + 2)
        return line.rstrip()


def encode(*words):
    parts = [word.encode() for word in words]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)


def redis_alone(cluster):
    _, cluster.address = cluster.start_redis("redis", "--appendonly", "no")


def redis_everysec(cluster):
    _, cluster.address = cluster.start_redis("redis", "--appendonly", "yes", "--appendfsync", "everysec")


def nutcracker_of_three(cluster):
    lines = []
    for number in range(3):
        name = f"redis-{number}"
        _, address = cluster.start_redis(name, "--appendonly", "yes", "--appendfsync", "everysec")
        lines.append(f"   - {address}:1 {name}")
    cluster.address = f"127.0.0.1:{free_port()}"
    config = f"""bench:
  listen: {cluster.address}
  hash: fnv1a_64
  distribution: ketama
  auto_eject_hosts: false
  redis: true
  servers:
""" + "\n".join(lines) + "\n"
    path = os.path.join(cluster.folder, "nutcracker.yml")
    with open(path, "w") as file:
        file.write(config)
    statistics = ["--stats-addr=127.0.0.1", f"--stats-port={free_port()}"]
    cluster.start("nutcracker", ["nutcracker", f"--conf-file={path}", "--verbose=4", *statistics])


def vasto_in_one_process(cluster):
    command = [cluster.vasto, "server", "--listen", "127.0.0.1:0", "--data", cluster.data_folder("data")]
    server = cluster.start("server", command + words_from_environment("VASTO_SERVER_ARGS"))
    cluster.address = server.address("redis")


def vasto_with_stores(cluster, count):
    master = cluster.start_master(count)
    for number in range(count):
        cluster.start_store(f"store-{number}", master)
    cluster.start_gateway(master)


def by_baseline(start):
    def start_by_baseline(cluster):
        cluster.vasto = BASELINE
        start(cluster)

    return start_by_baseline


# Name -> (what it is, how to start it).
VARIANTS = {
    "redis": ("redis-server, no persistence", redis_alone),
    "redis-everysec": ("redis-server, appendfsync everysec", redis_everysec),
    "nutcracker-3": ("nutcracker + 3 redis-servers, everysec", nutcracker_of_three),
    "vasto": ("vasto, one process", vasto_in_one_process),
    "vasto-1": ("vasto gateway + 1 store", lambda cluster: vasto_with_stores(cluster, 1)),
    "vasto-3": ("vasto gateway + 3 stores", lambda cluster: vasto_with_stores(cluster, 3)),
}
# Variant -> the same variant by the binary BASELINE.
BASELINE_VARIANTS = {name: name.replace("vasto", "base") for name in VARIANTS if BASELINE and name.startswith("vasto")}
VARIANTS |= {
    base: (f"{VARIANTS[name][0]} (baseline)", by_baseline(VARIANTS[name][1])) for name, base in BASELINE_VARIANTS.items()
}


def start_variant(name):
    """A cluster that serves; the caller closes it."""
    with contextlib.ExitStack() as on_failure:
        cluster = on_failure.enter_context(Cluster())
        VARIANTS[name][1](cluster)
        cluster.wait_until_it_serves()
        on_failure.pop_all()
        return cluster


def version_of(program, *arguments):
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    # nutcracker tells its version on the error output.
    lines = (done.stdout + done.stderr).strip().splitlines()
    return lines[0] if lines and done.returncode == 0 else None


def machine():
    """What the figures depend on."""
    with open("/proc/cpuinfo") as cpuinfo:
        model = re.search(r"model name\s*:\s*(.*)", cpuinfo.read())
    with open("/proc/meminfo") as meminfo:
        memory_gib = int(meminfo.readline().split()[1]) / (1 << 20)
    system = os.uname()
    return {
        "cpu": model.group(1) if model else system.machine,
        "cores": os.cpu_count(),
        "memory_gib": round(memory_gib, 1),
        "kernel": f"{system.sysname} {system.release}",
        "load_average": round(os.getloadavg()[0], 2),
        "redis": version_of("redis-server", "--version"),
        "nutcracker": version_of("nutcracker", "--version"),
        "vasto": version_of(VASTO, "--version"),
        "baseline": BASELINE and version_of(BASELINE, "--version"),
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
