"""What users of redis-py do, each answer checked. Call: redis_py.py PORT"""

import sys
import threading
import time

import redis


def raises(text, function, *arguments, **options):
    try:
        function(*arguments, **options)
    except redis.ResponseError as error:
        assert text in str(error), (text, str(error))
        return
    raise AssertionError(f"no error: {text}")


def strings(client):
    assert client.set("a", 1) is True
    assert client.get("a") == b"1"
    assert client.get("missing") is None
    assert client.set("a", 2, nx=True) is None
    assert client.set("a", 2, xx=True, get=True) == b"1"
    assert client.set("e", "v", ex=100) is True
    assert 98 <= client.ttl("e") <= 100
    assert client.set("e", "v", px=100000) is True
    assert 95000 <= client.pttl("e") <= 100000
    assert client.set("e", "w", keepttl=True) is True
    assert client.ttl("e") > 90
    assert client.getex("e", persist=True) == b"w"
    assert client.ttl("e") == -1
    assert client.getset("e", "x") == b"w"
    assert client.getdel("e") == b"x"
    assert client.setnx("nx", 1) is True
    assert client.setnx("nx", 1) is False
    assert client.setex("e", 100, "v") is True
    assert client.psetex("e", 100000, "v") is True
    binary = bytes(range(256))
    client.set(binary, binary)
    assert client.get(binary) == binary
    assert client.append("log", "ab") == 2
    assert client.append("log", "cd") == 4
    assert client.getrange("log", 1, 2) == b"bc"
    assert client.setrange("log", 6, "x") == 7
    assert client.get("log") == b"abcd\x00\x00x"
    assert client.strlen("log") == 7
    assert client.mset({"m1": 1, "m2": 2, "m3": 3}) is True
    assert client.mget("m1", "missing", "m3") == [b"1", None, b"3"]
    assert client.msetnx({"{t}1": 1, "{t}2": 2}) is True
    assert client.msetnx({"{t}2": 1, "{t}3": 2}) is False
    assert client.lcs("{t}1", "{t}2") == b""


def counters(client):
    assert client.incr("n") == 1
    assert client.incrby("n", 9) == 10
    assert client.decr("n") == 9
    assert client.decrby("n", 4) == 5
    assert client.incrbyfloat("n", 0.25) == 5.25
    raises("not an integer", client.incr, "n")


def keys(client):
    client.flushdb()
    client.mset({"k1": 1, "k2": 2, "k3": 3})
    assert client.exists("k1", "k2", "k1", "missing") == 3
    assert client.type("k1") == b"string"
    assert client.dbsize() == 3
    assert sorted(client.keys("k*")) == [b"k1", b"k2", b"k3"]
    assert client.randomkey() in (b"k1", b"k2", b"k3")
    assert client.expire("k1", 100) is True
    assert client.expire("k1", 200, nx=True) is False
    assert client.expireat("k1", int(time.time()) + 50) is True
    assert 45 <= client.ttl("k1") <= 50
    assert client.pexpireat("k1", 33177117420000) is True
    assert client.persist("k1") is True
    assert client.touch("k1", "k2") == 2
    assert client.unlink("k3") == 1
    assert client.delete("k1", "k2", "k3") == 2
    client.set("{t}a", 1)
    assert client.rename("{t}a", "{t}b") is True
    assert client.renamenx("{t}b", "{t}c") is True
    assert client.copy("{t}c", "{t}d") is True
    raises("no such key", client.rename, "{t}missing", "{t}x")
    assert client.object("encoding", "{t}c") == b"int"
    assert client.memory_usage("{t}c") > 0


def scans(client):
    client.flushall()
    with client.pipeline(transaction=False) as pipe:
        for number in range(3000):
            pipe.set(f"scan:{number}", number)
        assert pipe.execute() == [True] * 3000
    found = list(client.scan_iter(count=100))
    assert len(found) == 3000 and len(set(found)) == 3000
    some = list(client.scan_iter(match="scan:1*", count=500))
    assert sorted(some) == sorted(key for key in found if key.startswith(b"scan:1"))
    assert list(client.scan_iter(_type="list")) == []


def transactions(client):
    with client.pipeline(transaction=True) as pipe:
        pipe.set("{p}a", 1).incr("{p}a").get("{p}a").get("{p}missing")
        assert pipe.execute() == [True, 2, b"2", None]
    with client.pipeline() as pipe:
        pipe.set("{p}word", "x").incr("{p}word").set("{p}after", 1)
        results = pipe.execute(raise_on_error=False)
        assert results[0] is True and results[2] is True
        assert isinstance(results[1], redis.ResponseError)
    with client.pipeline() as pipe:
        pipe.watch("{p}a")
        client.set("{p}a", 100)
        pipe.multi()
        pipe.set("{p}a", 5)
        try:
            pipe.execute()
            raise AssertionError("the change was not noticed")
        except redis.WatchError:
            pass

    def add(pipe):
        value = int(pipe.get("{p}sum") or 0)
        pipe.multi()
        pipe.set("{p}sum", value + 1)

    def work():
        for _ in range(30):
            client.transaction(add, "{p}sum")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert client.get("{p}sum") == b"120"


def server(client, port):
    assert client.ping() is True
    assert client.echo("hello") == b"hello"
    info = client.info()
    assert info["redis_version"].startswith("7.0.")
    assert info["redis_mode"] == "standalone"
    assert info["role"] == "master"
    assert info["loading"] == 0
    assert info["cluster_enabled"] == 0
    assert info["arch_bits"] == 64
    assert info["connected_clients"] >= 1
    assert info["used_memory"] > 0
    assert "redis_version" in client.info("server")
    assert client.config_get("maxclients") == {"maxclients": "10000"}
    assert client.config_set("timeout", 0) is True
    seconds, microseconds = client.time()
    assert abs(seconds - time.time()) < 60 and 0 <= microseconds < 1000000
    assert client.client_setname("tester") is True
    assert client.client_getname() == "tester"
    assert any(entry["name"] == "tester" for entry in client.client_list())
    assert client.client_id() > 0
    assert client.command_count() > 70
    commands = client.command()
    assert commands["get"]["arity"] == 2
    assert client.command_getkeys("MSET", "a", 1, "b", 2) == ["a", "b"]
    assert client.slowlog_reset() is True
    assert client.slowlog_len() == 0
    assert client.wait(0, 10) == 0
    raises("unknown command", client.execute_command, "NOSUCHCOMMAND")
    other = redis.Redis(port=port, client_name="other", health_check_interval=1, decode_responses=True)
    other.set("text", "schl\u00fcssel")
    assert other.get("text") == "schl\u00fcssel"
    identifier = other.client_id()
    assert client.client_kill_filter(_id=identifier) == 1


def main():
    port = int(sys.argv[1])
    client = redis.Redis(port=port)
    client.flushall()
    strings(client)
    counters(client)
    keys(client)
    scans(client)
    transactions(client)
    server(client, port)
    print("all answers are right")


main()
