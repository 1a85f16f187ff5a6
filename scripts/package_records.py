"""The package records of `apt-cache dumpavail` as keys and values. Of several records of one name the last one counts.

package_records.py keys FILE               their keys, one a line
package_records.py load FILE [PART PARTS]  SET commands for redis-cli --pipe; all, or one of several parts
package_records.py compare FILE PORT       reads every value back and compares it byte for byte
"""

import sys
import zlib

# Values of 1 to 10 KB: a pipeline of so many stays small.
BATCH = 200


def records(path):
    with open(path, "rb") as file:
        texts = file.read().split(b"\n\n")
    for text in texts:
        for line in text.split(b"\n"):
            if line.startswith(b"Package: "):
                yield b"pkg:" + line[len(b"Package: ") :], text
                break


def load(path, part, parts):
    out = sys.stdout.buffer
    for key, value in records(path):
        # By name, so that records of one name stay in order.
        if zlib.crc32(key) % parts == part:
            out.write(b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(key), key, len(value), value))


def compare(path, port):
    import redis

    client = redis.Redis(port=port)
    expected = dict(records(path))
    keys = list(expected)
    different = []
    size = 0
    for start in range(0, len(keys), BATCH):
        batch = keys[start : start + BATCH]
        with client.pipeline(transaction=False) as pipe:
            for key in batch:
                pipe.get(key)
            values = pipe.execute()
        for key, value in zip(batch, values):
            size += len(value or b"")
            if value != expected[key]:
                different.append(key)
    if different:
        print(f"{len(different)} of {len(keys)} values differ, such as {different[:5]}")
        return 1
    print(f"{len(keys)} values ({size} bytes) read back through the second gateway, all equal byte for byte")
    return 0


def main():
    verb, path, *rest = sys.argv[1:]
    if verb == "keys":
        sys.stdout.buffer.writelines(key + b"\n" for key in dict(records(path)))
    elif verb == "load":
        part, parts = (int(rest[0]), int(rest[1])) if rest else (0, 1)
        load(path, part, parts)
    elif verb == "compare":
        return compare(path, int(rest[0]))
    else:
        raise SystemExit(__doc__)
    return 0


sys.exit(main())
