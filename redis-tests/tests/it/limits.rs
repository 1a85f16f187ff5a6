//! Large values and keys, many clients, clients that do not read: each within its limit, at nobody else's cost.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use redis_tests::seed::number_from_environment;
use redis_tests::{Address, Cluster, Connection, Node, RedisServer, Server, Value, eventually, heavy, resp};

/// The largest value that is tried, in megabytes: `VASTO_VALUE_MB=512` tries the largest that there may be.
fn largest_value_megabytes() -> usize {
    number_from_environment("VASTO_VALUE_MB").unwrap_or(64)
}

/// Bytes that no compression makes small and no mistake in order leaves alike.
fn bytes(length: usize, seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; length];
    random.fill(&mut bytes);
    bytes
}

fn large_values(address: &Address) {
    let mut connection = Connection::open(address);
    connection.set_reply_timeout(Duration::from_secs(120)).unwrap();
    for megabytes in [1, 20, largest_value_megabytes()] {
        // One byte more than a round number.
        let value = bytes(megabytes << 20, megabytes as u64);
        let key = format!("large:{megabytes}");
        assert_eq!(connection.call(&[&b"SET"[..], key.as_bytes(), &value]), Value::ok(), "{key}");
        assert_eq!(connection.call(&["STRLEN", &key]), Value::Integer(value.len() as i64));
        let read = connection.call(&["GET", &key]);
        assert!(read.bytes() == Some(value.as_slice()), "{key} is read back differently");
        let end = value.len() as i64 - 100;
        let part = connection.call(&["GETRANGE", &key, &end.to_string(), "-1"]);
        assert_eq!(part.bytes(), Some(&value[end as usize..]));
        drop(read);
        // Two of them in one answer, unless that is the largest there may be.
        if megabytes <= 64 {
            let both = connection.call(&["MGET", &key, "missing", &key]).elements().unwrap();
            assert!(both[0].bytes() == Some(value.as_slice()) && both[0] == both[2], "MGET {key}");
        }
        assert_eq!(connection.call(&["DEL", &key]), Value::Integer(1));
    }
    // Grown, not set.
    let value = bytes(3 << 20, 7);
    connection.done(&[&b"SET"[..], b"grown", &value]);
    let length = connection.done(&[&b"APPEND"[..], b"grown", &value]);
    assert_eq!(length, Value::Integer(2 * value.len() as i64));
    assert!(connection.call(&["GET", "grown"]).bytes() == Some([&value[..], &value[..]].concat().as_slice()));
    assert_eq!(connection.call(&["SETRANGE", "far", "8388607", "x"]), Value::Integer(8_388_608));
    assert_eq!(connection.call(&["STRLEN", "far"]), Value::Integer(8_388_608));
}

#[test]
fn large_values_in_one_process() {
    let _turn = heavy();
    large_values(&Server::start().address());
}

#[test]
fn large_values_through_a_cluster() {
    let _turn = heavy();
    let cluster = Cluster::builder().stores(2).gateways(1).shards(2).start();
    large_values(&cluster.address(0));
}

/// While large values come and go, small commands of others are answered.
#[test]
fn large_values_hold_up_nobody_else() {
    let _turn = heavy();
    let server = Server::start();
    let address = server.address();
    let value = bytes(20 << 20, 1);
    let threads: Vec<_> = (0..4)
        .map(|number| {
            let (address, value) = (address.clone(), value.clone());
            std::thread::spawn(move || {
                let mut connection = Connection::open(&address);
                let key = format!("large:{number}");
                for _ in 0..2 {
                    assert_eq!(connection.call(&[&b"SET"[..], key.as_bytes(), &value]), Value::ok());
                    assert!(connection.call(&["GET", &key]).bytes() == Some(value.as_slice()));
                }
            })
        })
        .collect();
    let mut connection = server.connect();
    let mut slowest = Duration::ZERO;
    while threads.iter().any(|thread| !thread.is_finished()) {
        let start = Instant::now();
        connection.done(&["SET", "small", "1"]);
        connection.done(&["GET", "small"]);
        slowest = slowest.max(start.elapsed());
    }
    for thread in threads {
        thread.join().unwrap();
    }
    assert!(slowest < Duration::from_secs(5), "a small command took {slowest:?}");
}

/// Values over the limit are refused as redis-server does, and the connection is kept where it is kept there.
fn values_over_a_limit_of_1_megabyte(mut connection: Connection) {
    let largest = vec![b'x'; 1 << 20];
    connection.done(&[&b"SET"[..], b"k", &largest]);
    let too_long = "ERR string exceeds maximum allowed size (proto-max-bulk-len)";
    assert_eq!(connection.call(&["APPEND", "k", "y"]).text(), too_long);
    assert_eq!(connection.call(&["SETRANGE", "k", "1048576", "y"]).text(), too_long);
    assert_eq!(connection.call(&["SETRANGE", "k", "1048575", "y"]), Value::Integer(1 << 20));
    assert_eq!(connection.call(&["STRLEN", "k"]), Value::Integer(1 << 20));
}

#[test]
fn values_over_the_limit_are_refused_and_the_connection_is_kept() {
    let option = ["--proto-max-bulk-len", "1048576"];
    values_over_a_limit_of_1_megabyte(RedisServer::start_with(&option).connect());
    values_over_a_limit_of_1_megabyte(Server::start_with(&option).connect());
}

#[test]
fn keys_of_64_kilobytes_are_keys_like_others() {
    let server = Server::start_with(&["--stores", "2", "--shards", "3"]);
    let mut connection = server.connect();
    let mut keys: Vec<Vec<u8>> = (0..20).map(|seed| bytes(64 * 1024, seed)).collect();
    // Alike but for the last byte.
    let mut twin = keys[0].clone();
    *twin.last_mut().unwrap() ^= 1;
    keys.push(twin);
    for (number, key) in keys.iter().enumerate() {
        assert_eq!(connection.call(&[&b"SET"[..], key, number.to_string().as_bytes()]), Value::ok());
    }
    for (number, key) in keys.iter().enumerate() {
        assert_eq!(connection.call(&[&b"GET"[..], key]), Value::bulk(number.to_string()));
    }
    let listed = connection.done(&["KEYS", "*"]).elements().unwrap();
    let mut listed: Vec<Vec<u8>> = listed.iter().map(|key| key.bytes().unwrap().to_vec()).collect();
    listed.sort();
    keys.sort();
    assert!(listed == keys, "KEYS lists other keys");
    let mut command = vec![b"DEL".to_vec()];
    command.extend(keys.iter().cloned());
    assert_eq!(connection.call(&command), Value::Integer(keys.len() as i64));
    assert_eq!(connection.call(&["DBSIZE"]), Value::Integer(0));
}

/// A key too long to be stored is refused, and the connection serves on.
#[test]
fn keys_without_measure_are_refused_or_kept_whole() {
    let server = Server::start();
    let mut connection = server.connect();
    let key = bytes(20 << 20, 3);
    let answer = connection.call(&[&b"SET"[..], &key, b"v"]);
    if answer == Value::ok() {
        assert_eq!(connection.call(&[&b"GET"[..], &key]), Value::bulk("v"));
    } else {
        assert!(answer.is_error(), "{}", answer.text());
    }
    assert_eq!(connection.call(&["PING"]).text(), "PONG");
}

fn clients_over_the_limit(address: &Address) {
    let mut admin = Connection::open(address);
    // Whoever asked whether the server serves has left, but may still be counted.
    eventually!("only this client is left", admin.call(&["CLIENT", "LIST"]).text().lines().count() == 1);
    admin.done(&["CONFIG", "SET", "maxclients", "5"]);
    let mut others: Vec<Connection> = (0..4).map(|_| Connection::open(address)).collect();
    for other in &mut others {
        assert_eq!(other.call(&["PING"]).text(), "PONG");
    }
    let mut one_too_many = Connection::open(address);
    let (answer, closed) = one_too_many.read_until_quiet(Duration::from_secs(5));
    assert_eq!(answer.escape_ascii().to_string(), "-ERR max number of clients reached\\r\\n");
    assert!(closed || one_too_many.is_closed_within(Duration::from_secs(5)));
    // Its place is free again when another leaves.
    drop(others.pop());
    eventually!("a new client is let in", {
        let mut connection = Connection::open(address);
        connection.try_call(&["PING"]).is_ok_and(|answer| answer.text() == "PONG")
    });
    admin.done(&["CONFIG", "SET", "maxclients", "10000"]);
    let mut many: Vec<Connection> = (0..50).map(|_| Connection::open(address)).collect();
    for connection in &mut many {
        assert_eq!(connection.call(&["PING"]).text(), "PONG");
    }
}

#[test]
fn clients_over_the_limit_are_told_so() {
    clients_over_the_limit(&RedisServer::start().address());
    clients_over_the_limit(&Server::start().address());
}

#[test]
fn idle_clients_are_closed_after_the_timeout() {
    for (whose, address, _owner) in [
        {
            let redis = RedisServer::start();
            ("redis-server", redis.address(), Owner::Redis(redis))
        },
        {
            let server = Server::start();
            ("ours", server.address(), Owner::Vasto(server))
        },
    ] {
        let mut admin = Connection::open(&address);
        let mut idle = Connection::open(&address);
        idle.done(&["PING"]);
        let mut half = Connection::open(&address);
        half.send(b"*2\r\n$3\r\nGET\r\n$10\r\nhal").unwrap();
        admin.done(&["CONFIG", "SET", "timeout", "1"]);
        let start = Instant::now();
        let (mut idle_closed, mut half_closed) = (false, false);
        while !(idle_closed && half_closed) {
            // Who speaks is not idle.
            admin.done(&["PING"]);
            idle_closed = idle_closed || idle.is_closed_within(Duration::from_millis(100));
            half_closed = half_closed || half.is_closed_within(Duration::from_millis(100));
            assert!(
                start.elapsed() < Duration::from_secs(20),
                "{whose}: closed: idle {idle_closed}, with half a request {half_closed}"
            );
        }
        admin.done(&["CONFIG", "SET", "timeout", "0"]);
    }
}

/// Keeps the process alive as long as its address is used.
#[expect(dead_code, reason = "held for their end alone")]
enum Owner {
    Redis(RedisServer),
    Vasto(Server),
}

/// Asks for far more than it reads: its requests stop being read, or it is disconnected; memory stays bounded
/// and everybody else is served.
fn never_reads(node: &Node, address: &Address) {
    let mut admin = Connection::open(address);
    // 64 MB at once, or 16 MB for five seconds, as redis-server counts.
    admin.done(&["CONFIG", "SET", "client-output-buffer-limit", "normal 67108864 16777216 5"]);
    // A setting of ours: seconds without taking anything. redis-server counts bytes alone.
    admin.call(&["CONFIG", "SET", "output-stall-timeout", "5"]);
    let value = bytes(100 * 1024, 5);
    admin.done(&[&b"SET"[..], b"value", &value]);
    admin.done(&["GET", "value"]);
    let before = node.resident_bytes();
    let mut greedy = Connection::open(address);
    greedy.set_nonblocking(true).unwrap();
    // Each asks for 10 MB; the whole would be 4 GB.
    let packet = resp::command(&["GET", "value"]).repeat(100);
    let (mut sent, mut position) = (0_usize, 0);
    let (mut highest, mut slowest) = (before, Duration::ZERO);
    let start = Instant::now();
    let mut disconnected = false;
    while !disconnected && start.elapsed() < Duration::from_secs(60) {
        while sent < packet.len() * 400 {
            match greedy.send_some(&packet[position..]) {
                Ok(count) => {
                    sent += count;
                    position = (position + count) % packet.len();
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => {
                    disconnected = true;
                    break;
                }
            }
        }
        let begin = Instant::now();
        admin.done(&["SET", "small", "1"]);
        assert_eq!(admin.call(&["GET", "small"]), Value::bulk("1"));
        slowest = slowest.max(begin.elapsed());
        highest = highest.max(node.resident_bytes());
        if sent >= packet.len() * 400 {
            // Nothing more to ask: the end shows in an error of a send, too.
            disconnected |= greedy.send_some(b"\r\n").is_err_and(|error| error.kind() != ErrorKind::WouldBlock);
        }
        redis_tests::eventually::pause(Duration::from_millis(5));
    }
    let grown = (highest - before) >> 20;
    assert!(grown < 400, "a client that never reads cost {grown} MB");
    assert!(slowest < Duration::from_secs(5), "others waited {slowest:?}");
    assert!(disconnected, "it was not disconnected within a minute ({sent} bytes sent, {grown} MB more)");
    assert_eq!(admin.call(&["PING"]).text(), "PONG");
}

#[test]
fn a_client_that_never_reads_is_bounded_and_disconnected() {
    let _turn = heavy();
    let server = Server::start();
    never_reads(&server.node, &server.address());
}

#[test]
fn a_client_that_never_reads_is_bounded_in_a_gateway_of_its_own() {
    let _turn = heavy();
    let cluster = Cluster::builder().stores(1).gateways(1).shards(1).start();
    let before = cluster.stores[0].resident_bytes();
    never_reads(&cluster.gateways[0], &cluster.address(0));
    let grown = cluster.stores[0].resident_bytes().saturating_sub(before) >> 20;
    assert!(grown < 400, "it cost the store {grown} MB");
}

#[test]
fn a_thousand_idle_clients_cost_little() {
    let _turn = heavy();
    let cluster = Cluster::builder().stores(1).gateways(1).shards(1).start();
    let address = cluster.address(0);
    // What the first connections bring along is not counted.
    let mut first: Vec<Connection> = (0..50).map(|_| Connection::open(&address)).collect();
    for connection in &mut first {
        connection.done(&["GET", "k"]);
    }
    let before = cluster.gateways[0].resident_bytes();
    let mut clients: Vec<Connection> = (0..1_000).map(|_| Connection::open(&address)).collect();
    for client in &mut clients {
        client.done(&["SET", "k", "v"]);
    }
    for client in &mut clients {
        assert_eq!(client.call(&["GET", "k"]), Value::bulk("v"));
    }
    let each = cluster.gateways[0].resident_bytes().saturating_sub(before) / 1_000;
    assert!(each <= 32 * 1024, "an idle connection costs {each} bytes");
}

/// A pipeline longer than any buffer is answered whole and in order, by a client that reads while it writes.
#[test]
fn a_long_pipeline_is_answered_in_order() {
    let server = Server::start_with(&["--stores", "2", "--shards", "5"]);
    let address = server.address();
    let mut reader = Connection::open(&address);
    const COMMANDS: usize = 100_000;
    let mut packet = Vec::new();
    for number in 0..COMMANDS {
        let key = format!("key:{}", number % 1_000);
        match number % 4 {
            0 => packet.extend(resp::command(&["SET", &key, &number.to_string()])),
            1 => packet.extend(resp::command(&["GET", &format!("key:{}", (number - 1) % 1_000)])),
            2 => packet.extend(resp::command(&["ECHO", &number.to_string()])),
            _ => packet.extend(resp::command(&["INCR", "counter"])),
        }
    }
    let sent = packet.len();
    let mut answers = Vec::with_capacity(COMMANDS);
    let mut position = 0;
    // Written in steps that the sockets can hold together with their answers.
    while position < sent {
        let end = (position + 32 * 1024).min(sent);
        reader.send(&packet[position..end]).unwrap();
        position = end;
        let complete = if position == sent { COMMANDS } else { count_commands(&packet[..position]) };
        while answers.len() < complete {
            answers.push(reader.read_value().unwrap());
        }
    }
    assert_eq!(answers.len(), COMMANDS);
    for (number, answer) in answers.iter().enumerate() {
        let expected = match number % 4 {
            0 => Value::ok(),
            1 => Value::bulk((number - 1).to_string()),
            2 => Value::bulk(number.to_string()),
            _ => Value::Integer(number as i64 / 4 + 1),
        };
        assert_eq!(*answer, expected, "command {number}");
    }
}

/// How many commands begin before the last one of the bytes, which may be cut: those are whole.
fn count_commands(bytes: &[u8]) -> usize {
    bytes.iter().filter(|byte| **byte == b'*').count().saturating_sub(1)
}
