//! The crate redis, of both protocol versions.

use std::collections::BTreeSet;

use redis::{AsyncCommands, Commands, ErrorKind, RedisResult, Value};
use redis_tests::{Cluster, Server};

fn client(server: &Server, protocol: &str) -> redis::Client {
    redis::Client::open(format!("redis://{}/?protocol={protocol}", server.address())).unwrap()
}

async fn commands(mut connection: redis::aio::MultiplexedConnection) -> RedisResult<()> {
    redis::cmd("FLUSHALL").exec_async(&mut connection).await?;
    let () = connection.set("a", 42).await?;
    assert_eq!(connection.get::<_, i64>("a").await?, 42);
    assert_eq!(connection.get::<_, Option<String>>("missing").await?, None);
    let binary: Vec<u8> = (0..=255).collect();
    let () = connection.set(&binary, &binary).await?;
    assert_eq!(connection.get::<_, Vec<u8>>(&binary).await?, binary);
    assert_eq!(connection.incr::<_, _, i64>("a", 8).await?, 50);
    assert_eq!(connection.incr::<_, _, f64>("a", 0.5).await?, 50.5);
    assert!(connection.exists::<_, bool>("a").await?);
    let () = connection.set_ex("b", "text", 100).await?;
    let ttl: i64 = connection.ttl("b").await?;
    assert!((98..=100).contains(&ttl), "{ttl}");
    assert!(connection.persist::<_, bool>("b").await?);
    assert!(!connection.set_nx::<_, _, bool>("b", "other").await?);
    let () = connection.mset(&[("x", 1), ("y", 2), ("z", 3)]).await?;
    let values: Vec<Option<i64>> = connection.mget(&["x", "missing", "z"]).await?;
    assert_eq!(values, [Some(1), None, Some(3)]);
    assert_eq!(connection.append::<_, _, usize>("b", "!").await?, 5);
    assert_eq!(connection.getrange::<_, String>("b", 1, -2).await?, "ext");
    assert_eq!(connection.get_del::<_, String>("b").await?, "text!");
    assert_eq!(connection.del::<_, i64>(&["x", "y", "missing"]).await?, 2);
    assert_eq!(connection.key_type::<_, String>("z").await?, "string");

    // An error of the server is an error of the client, and the connection goes on.
    let () = connection.set("word", "no number").await?;
    let error = connection.incr::<_, _, i64>("word", 1).await.unwrap_err();
    assert!(error.to_string().contains("value is not an integer or out of range"), "{error}");
    assert_eq!(connection.ping::<String>().await?, "PONG");

    // A pipeline without and with a transaction.
    let (first, second): (i64, Option<String>) =
        redis::pipe().incr("n", 1).ignore().incr("n", 1).get("missing").query_async(&mut connection).await?;
    assert_eq!((first, second), (2, None));
    let (one, two): (i64, i64) = redis::pipe()
        .atomic()
        .set("{t}a", 10)
        .ignore()
        .incr("{t}a", 1)
        .incr("{t}b", 7)
        .query_async(&mut connection)
        .await?;
    assert_eq!((one, two), (11, 7));
    let mut large = redis::pipe();
    for number in 0..5_000 {
        large.set(format!("many:{number}"), number).ignore();
    }
    let () = large.query_async(&mut connection).await?;

    // Every key of a walk exactly once.
    let mut found = BTreeSet::new();
    let mut twice = 0;
    {
        let mut keys = connection.scan_match::<_, String>("many:*").await?;
        while let Some(key) = keys.next_item().await {
            if !found.insert(key?) {
                twice += 1;
            }
        }
    }
    assert_eq!((found.len(), twice), (5_000, 0));
    Ok(())
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

#[test]
fn asynchronous_commands_of_resp2() {
    let server = Server::start();
    runtime().block_on(async {
        let client = client(&server, "resp2");
        commands(client.get_multiplexed_async_connection().await.unwrap()).await.unwrap();
    });
}

#[test]
fn asynchronous_commands_of_resp3() {
    let server = Server::start();
    runtime().block_on(async {
        let client = client(&server, "resp3");
        commands(client.get_multiplexed_async_connection().await.unwrap()).await.unwrap();
    });
}

#[test]
fn asynchronous_commands_through_a_cluster() {
    let cluster = Cluster::builder().stores(2).shards(5).start();
    runtime().block_on(async {
        let url = format!("redis://{}/?protocol=resp3", cluster.address(0));
        let client = redis::Client::open(url).unwrap();
        commands(client.get_multiplexed_async_connection().await.unwrap()).await.unwrap();
    });
}

#[test]
fn many_tasks_share_a_multiplexed_connection() {
    let server = Server::start();
    runtime().block_on(async {
        let connection = client(&server, "resp3").get_multiplexed_async_connection().await.unwrap();
        let tasks: Vec<_> = (0..100)
            .map(|number| {
                let mut connection = connection.clone();
                async move {
                    let key = format!("task:{number}");
                    for round in 0..50 {
                        let () = connection.set(&key, round).await.unwrap();
                        let value: i64 = connection.get(&key).await.unwrap();
                        assert_eq!(value, round);
                        let _: i64 = connection.incr("shared", 1).await.unwrap();
                    }
                }
            })
            .collect();
        futures_util::future::join_all(tasks).await;
        let total: i64 = connection.clone().get("shared").await.unwrap();
        assert_eq!(total, 5_000);
    });
}

#[test]
fn blocking_transactions_with_watch() {
    let server = Server::start();
    let client = client(&server, "resp2");
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let client = client.clone();
            std::thread::spawn(move || {
                let mut connection = client.get_connection().unwrap();
                for _ in 0..50 {
                    // Watches, reads, writes, and does it again when another thread was faster.
                    let (_,): (Value,) = redis::transaction(&mut connection, &["contended"], |connection, pipe| {
                        let old: Option<i64> = connection.get("contended")?;
                        pipe.set("contended", old.unwrap_or(0) + 1).query(connection)
                    })
                    .unwrap();
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    let mut connection = client.get_connection().unwrap();
    assert_eq!(connection.get::<_, i64>("contended").unwrap(), 200);
    let error = redis::cmd("NOSUCHCOMMAND").exec(&mut connection).unwrap_err();
    assert_ne!(error.kind(), ErrorKind::Io, "{error}");
}
