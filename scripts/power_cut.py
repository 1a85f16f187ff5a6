#!/usr/bin/env python3
"""The client of scripts/power_cut.sh: writes and cuts the power, or checks what is left.

    power_cut.py cut PORT LEDGER MOUNTED WRITES    ends with 3 where the file system cannot be shut down
    power_cut.py check PORT LEDGER LIMIT_MS        ends with 1 if a write is lost that is older than that; 0: any write
"""

import fcntl
import json
import os
import random
import socket
import struct
import sys
import threading
import time

CONNECTIONS = 8
PIPELINE = 16
# From the kernel's ext4.h: _IOR('X', 125, __u32), and to go down without writing the journal.
FS_IOC_SHUTDOWN = 0x8004587D
NO_LOG_FLUSH = 2


def command(*words):
    parts = [b"*%d\r\n" % len(words)]
    for word in words:
        parts.append(b"$%d\r\n%s\r\n" % (len(word), word))
    return b"".join(parts)


def key(connection, number):
    # One hash tag for each connection: all it writes goes to one log.
    return b"{connection-%d}:%d" % (connection, number)


def value(connection, number):
    text = b"%d/%d;" % (connection, number)
    return text * (1 + number * 7 % 60)


class Client:
    def __init__(self, port):
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.socket.makefile("rb", buffering=1 << 16)

    def send(self, data):
        self.socket.sendall(data)

    def reply(self):
        """A status, an error, a bulk string or None; raises when the connection is gone."""
        line = self.file.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError("closed")
        if line[:1] != b"$":
            return line[:-2]
        length = int(line[1:])
        return None if length < 0 else self.file.read(length + 2)[:-2]


def write(port, connection, acknowledged):
    """Appends the time of each acknowledgement, in the order of the numbers; ends at the first that does not come."""
    client = Client(port)
    number = 0
    try:
        while True:
            numbers = range(number, number + PIPELINE)
            client.send(b"".join(command(b"SET", key(connection, n), value(connection, n)) for n in numbers))
            for _ in numbers:
                if client.reply() != b"+OK":
                    return
                acknowledged.append(time.time_ns())
            number += PIPELINE
    except OSError:
        return


def cut(port, ledger, mounted, writes):
    acknowledged = [[] for _ in range(CONNECTIONS)]
    threads = [
        threading.Thread(target=write, args=(port, number, times), daemon=True)
        for number, times in enumerate(acknowledged)
    ]
    for thread in threads:
        thread.start()
    # At any place between two syncs of every second.
    earliest = time.monotonic() + random.uniform(2.5, 4.5)
    while time.monotonic() < earliest or sum(map(len, acknowledged)) < writes:
        time.sleep(0.001)
    folder = os.open(mounted, os.O_RDONLY)
    cut_ns = time.time_ns()
    try:
        fcntl.ioctl(folder, FS_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
    except OSError as error:
        print(f"FS_IOC_SHUTDOWN: {error}", file=sys.stderr)
        return 3
    finally:
        os.close(folder)
    # Nothing that is answered from here on may be an acknowledgement of what is not on the disk: listen a little longer.
    time.sleep(0.5)
    with open(ledger, "w") as file:
        json.dump({"cut_ns": cut_ns, "acknowledged": [list(times) for times in acknowledged]}, file)
    return 0


def check(port, ledger, limit_ms):
    with open(ledger) as file:
        ledger = json.load(file)
    cut_ns = ledger["cut_ns"]
    client = Client(port)
    total = lost = after_the_cut = wrong = holes = 0
    oldest_ms = 0.0
    for connection, times in enumerate(ledger["acknowledged"]):
        total += len(times)
        after_the_cut += sum(1 for ns in times if ns > cut_ns)
        first_lost = None
        for start in range(0, len(times), 100):
            numbers = range(start, min(start + 100, len(times)))
            client.send(b"".join(command(b"GET", key(connection, n)) for n in numbers))
            for number in numbers:
                found = client.reply()
                if found is None:
                    lost += 1
                    if first_lost is None:
                        first_lost = number
                        oldest_ms = max(oldest_ms, (cut_ns - times[number]) / 1e6)
                elif found != value(connection, number):
                    wrong += 1
                    print(f"{key(connection, number)}: {found[:80]}", file=sys.stderr)
                elif first_lost is not None:
                    holes += 1
    print(
        f"{total} acknowledged ({after_the_cut} of them after the cut), {lost} lost, "
        f"the oldest of them {oldest_ms:.0f} ms before the cut; {holes} kept behind a lost one, {wrong} wrong"
    )
    is_within = lost == 0 if limit_ms == 0 else oldest_ms <= limit_ms
    return 0 if is_within and holes == 0 and wrong == 0 else 1


if __name__ == "__main__":
    if sys.argv[1] == "cut":
        sys.exit(cut(int(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5])))
    sys.exit(check(int(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
