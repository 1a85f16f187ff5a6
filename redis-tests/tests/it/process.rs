//! What a person sees of the processes: their one line, their ends, their refusals, their metrics.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Output};

use redis_tests::cluster::temporary_directory;
use redis_tests::node::{binary, free_address};
use redis_tests::{Cluster, Connection, Node, Server, Value, eventually};

/// Runs it to its end, which is not far: what serves instead is stopped after half a minute.
fn vasto(arguments: &[&str]) -> Output {
    Command::new("timeout").arg("30").arg(binary()).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_server_takes_port_0_and_says_what_it_got() {
    let directory = temporary_directory();
    let data = directory.path().join("data");
    let mut node = Node::start(
        "server",
        directory.path(),
        &["server", "--listen", "127.0.0.1:0", "--data", data.to_str().unwrap()],
    );
    assert!(node.ready_line().starts_with("vasto server ready: "), "{}", node.ready_line());
    let mut connection = Connection::open(&node.redis_address());
    assert_eq!(connection.call(&["PING"]).text(), "PONG");
    assert_eq!(node.printed_lines().len(), 1, "{:?}", node.printed_lines());
}

#[test]
fn every_role_prints_one_line_with_its_address() {
    let mut cluster = Cluster::builder().stores(1).gateways(1).shards(1).start();
    for (node, beginning) in [
        (&mut cluster.master, "vasto master ready: grpc 127.0.0.1:"),
        (&mut cluster.stores[0], "vasto store ready: grpc 127.0.0.1:"),
        (&mut cluster.gateways[0], "vasto gateway ready: redis 127.0.0.1:"),
    ] {
        let lines = node.printed_lines();
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert!(lines[0].starts_with(beginning), "{}", lines[0]);
    }
    cluster.terminate();
}

#[test]
fn sigterm_and_sigint_stop_gracefully_and_say_so() {
    let mut server = Server::start();
    let mut client = server.connect();
    client.done(&["SET", "a", "1"]);
    let before = server.node.log().len();
    let status = server.node.terminate();
    assert!(status.success(), "{status}");
    assert!(server.node.log().len() > before, "nothing was said on SIGTERM");
    server.node.start_again();
    let before = server.node.log().len();
    let status = server.node.interrupt();
    assert!(status.success(), "{status}");
    assert!(server.node.log().len() > before, "nothing was said on SIGINT");
}

#[test]
fn shutdown_ends_the_server_and_keeps_the_data() {
    let mut server = Server::start();
    let mut client = server.connect();
    client.done(&["SET", "a", "kept"]);
    client.send(b"SHUTDOWN\r\n").unwrap();
    let status = server.node.wait_for_end();
    assert!(status.success(), "{status}");
    server.node.start_again();
    assert_eq!(server.connect().call(&["GET", "a"]), Value::bulk("kept"));
}

#[test]
fn help_tells_every_option() {
    let help = vasto(&["--help"]);
    assert!(help.status.success());
    let help = text(&help.stdout);
    for role in ["server", "master", "store", "gateway", "bench"] {
        assert!(help.contains(role), "{role} is missing:\n{help}");
    }
    for (role, options) in [
        ("server", &["--listen", "--data", "--stores", "--shards", "--unixsocket", "--metrics-addr", "--config"][..]),
        ("master", &["--listen", "--bootstrap-shards", "--bootstrap-stores"][..]),
        ("store", &["--master", "--listen", "--data"][..]),
        ("gateway", &["--master", "--listen", "--unixsocket"][..]),
    ] {
        let output = vasto(&[role, "--help"]);
        assert!(output.status.success(), "{role} --help");
        let help = text(&output.stdout);
        for option in options {
            assert!(help.contains(option), "{role}: {option} is missing:\n{help}");
        }
    }
}

#[test]
fn what_cannot_be_done_is_refused_clearly() {
    let directory = temporary_directory();
    let data = directory.path().join("data");
    let data = data.to_str().unwrap();
    let broken = directory.path().join("broken.toml");
    std::fs::write(&broken, "listen = [not toml").unwrap();
    let running = Server::start();
    let taken = running.address().to_string();
    let its_data = running.data().to_str().unwrap().to_owned();
    let free = free_address();
    for (what, arguments, word) in [
        ("an option that is none", vec!["server", "--no-such-option"], "--no-such-option"),
        ("an address that is none", vec!["server", "--listen", "nowhere", "--data", data], "nowhere"),
        ("a file that is missing", vec!["server", "--config", "/no/such/file.toml"], "/no/such/file.toml"),
        ("a file that is broken", vec!["server", "--config", broken.to_str().unwrap()], "broken.toml"),
        ("an address that is taken", vec!["server", "--listen", &taken, "--data", data], &taken),
        ("a folder that another process has open", vec!["server", "--listen", &free, "--data", &its_data], &its_data),
    ] {
        let output = vasto(&arguments);
        assert!(!output.status.success(), "{what} was accepted");
        let message = text(&output.stderr);
        assert!(message.contains(word), "{what}: {word} is not named:\n{message}");
        assert!(!message.contains("panicked"), "{what}:\n{message}");
        assert!(output.stdout.is_empty(), "{what}: {}", text(&output.stdout));
    }
    // The one that runs has taken no harm.
    assert_eq!(running.connect().call(&["PING"]).text(), "PONG");
}

#[test]
fn a_configuration_file_is_read_and_options_win() {
    let directory = temporary_directory();
    let data = directory.path().join("from-file");
    let file = directory.path().join("vasto.toml");
    let address = free_address();
    std::fs::write(&file, format!("listen = \"127.0.0.1:1\"\ndata = \"{}\"\n", data.display())).unwrap();
    let node =
        Node::start("server", directory.path(), &["server", "--config", file.to_str().unwrap(), "--listen", &address]);
    assert_eq!(node.redis_address().to_string(), address);
    assert!(data.exists(), "the data are not where the file says");
}

#[test]
fn metrics_are_served_in_the_text_format_of_prometheus() {
    let metrics = free_address();
    let server = Server::start_with(&["--metrics-addr", &metrics]);
    let mut client = server.connect();
    for number in 0..100 {
        client.done(&["SET", &format!("k{number}"), "1"]);
    }
    let mut page = String::new();
    eventually!("the metrics tell of the commands", {
        page.clear();
        if let Ok(mut stream) = TcpStream::connect(&metrics) {
            let request = format!("GET /metrics HTTP/1.1\r\nHost: {metrics}\r\nConnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).unwrap();
            let _ = stream.read_to_string(&mut page);
        }
        // The first sync is told of when it is made, the figures by a thread that looks once a second.
        let of_syncs = ["sync_seconds", "syncs_total", "sync_lag_seconds", "held_batches"];
        page.contains("# TYPE")
            && page.to_ascii_lowercase().contains("set")
            && of_syncs.iter().all(|name| page.contains(&format!("vasto_store_{name}")))
    });
    assert!(page.starts_with("HTTP/1.1 200"), "{page}");
}

#[test]
fn a_unix_socket_serves_and_is_taken_over_after_a_kill() {
    let directory = temporary_directory();
    let socket = directory.path().join("vasto.sock");
    let address = redis_tests::Address::Unix(socket.clone());
    let mut server = Server::start_with(&["--unixsocket", socket.to_str().unwrap()]);
    let mut client = Connection::open(&address);
    client.done(&["SET", "a", "1"]);
    assert_eq!(server.connect().call(&["GET", "a"]), Value::bulk("1"));
    server.node.kill_9();
    server.node.start_again();
    assert_eq!(Connection::open(&address).call(&["GET", "a"]), Value::bulk("1"));
}
