#!/usr/bin/env python3
"""The client of scripts/power_cut.sh: writes and cuts the power, or checks what is left.

    power_cut.py cut PORT LEDGER MOUNTED WRITES    ends with 3 where the file system cannot be shut down
    power_cut.py check PORT LEDGER LIMIT_MS        ends with 1 if a write is lost that is older than that; 0: any write

What is answered once the cut has begun is no acknowledgement: a real cut lets no answer out, and a sync that meets the shutdown may
return 0 although nothing came to the disk. That is the kernel's doing, as a program of nothing but write and fdatasync shows:

    power_cut.py cut-files LEDGER MOUNTED
    power_cut.py check-files LEDGER MOUNTED
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


def shut_down(mounted):
    """Returns when it began, in ns of the clock."""
    folder = os.open(mounted, os.O_RDONLY)
    cut_ns = time.time_ns()
    try:
        fcntl.ioctl(folder, FS_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
    except OSError as error:
        print(f"FS_IOC_SHUTDOWN: {error}", file=sys.stderr)
        sys.exit(3)
    finally:
        os.close(folder)
    return cut_ns


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
    cut_ns = shut_down(mounted)
    # What is answered from here on is counted, not trusted.
    time.sleep(0.5)
    with open(ledger, "w") as file:
        json.dump({"cut_ns": cut_ns, "acknowledged": [list(times) for times in acknowledged]}, file)


def check(port, ledger, limit_ms):
    with open(ledger) as file:
        ledger = json.load(file)
    cut_ns = ledger["cut_ns"]
    client = Client(port)
    before = lost = wrong = holes = during = lost_during = 0
    oldest_ms = 0.0
    for connection, times in enumerate(ledger["acknowledged"]):
        is_lost = False
        for start in range(0, len(times), 100):
            numbers = range(start, min(start + 100, len(times)))
            client.send(b"".join(command(b"GET", key(connection, n)) for n in numbers))
            for number in numbers:
                found = client.reply()
                was_before = times[number] <= cut_ns
                before += was_before
                during += not was_before
                if found is None:
                    is_lost = True
                    lost += was_before
                    lost_during += not was_before
                    oldest_ms = max(oldest_ms, (cut_ns - times[number]) / 1e6)
                elif found != value(connection, number):
                    wrong += 1
                    if wrong <= 3:
                        print(f"{key(connection, number)}: {found[:160]}", file=sys.stderr)
                elif is_lost:
                    holes += 1
    print(
        f"{before} acknowledged before the cut, {lost} of them lost, the oldest {oldest_ms:.3f} ms before it; "
        f"{during} answered once it had begun, {lost_during} of them lost; {holes} kept behind a lost one, {wrong} wrong"
    )
    is_within = lost == 0 if limit_ms == 0 else oldest_ms <= limit_ms
    return 0 if is_within and holes == 0 and wrong == 0 else 1


def append(path, synced):
    """Appends and syncs until it fails; notes when each sync ended and how long the file was."""
    try:
        file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        length = 0
        while True:
            length += os.write(file, b"x" * random.randint(1, 4000))
            os.fdatasync(file)
            synced.append((time.time_ns(), length))
    except OSError:
        return


def cut_files(ledger, mounted):
    synced = {f"file-{number}": [] for number in range(4)}
    for name, lengths in synced.items():
        threading.Thread(target=append, args=(os.path.join(mounted, name), lengths), daemon=True).start()
    time.sleep(random.uniform(0.5, 1.2))
    cut_ns = shut_down(mounted)
    time.sleep(0.3)
    with open(ledger, "w") as file:
        json.dump({"cut_ns": cut_ns, "synced": {name: list(lengths) for name, lengths in synced.items()}}, file)


def check_files(ledger, mounted):
    with open(ledger) as file:
        ledger = json.load(file)
    # By whether the sync ended before the cut began.
    lost = {True: 0, False: 0}
    total = {True: 0, False: 0}
    for name, syncs in ledger["synced"].items():
        with open(os.path.join(mounted, name), "rb") as file:
            kept = len(file.read().rstrip(b"\0"))
        for ns, length in syncs:
            was_before = ns <= ledger["cut_ns"]
            total[was_before] += 1
            lost[was_before] += length > kept
    print(
        f"{total[True]} syncs returned 0 before the cut, {lost[True]} of them without effect; "
        f"{total[False]} once it had begun, {lost[False]} of them without effect"
    )
    return 0 if lost[True] == 0 else 1


def main(verb, *words):
    if verb == "cut":
        return cut(int(words[0]), words[1], words[2], int(words[3]))
    if verb == "check":
        return check(int(words[0]), words[1], int(words[2]))
    if verb == "cut-files":
        return cut_files(words[0], words[1])
    return check_files(words[0], words[1])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
