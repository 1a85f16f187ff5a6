//! The crate fred, of both protocol versions.

use std::collections::BTreeSet;

use fred::prelude::*;
use fred::types::RespVersion;
use fred::types::scan::Scanner;
use futures_util::TryStreamExt;
use redis_tests::{Address, Cluster, Server};

async fn connect(address: &Address, version: RespVersion) -> Client {
    let mut config = Config::from_url(&format!("redis://{address}")).unwrap();
    config.version = version;
    let client = Builder::from_config(config).build().unwrap();
    client.init().await.unwrap();
    client
}

async fn commands(client: Client) -> Result<(), Error> {
    client.flushall::<()>(false).await?;
    let missing: Option<String> = client.get("missing").await?;
    assert_eq!(missing, None);
    client.set::<(), _, _>("a", "1", None, None, false).await?;
    assert_eq!(client.get::<i64, _>("a").await?, 1);
    let old: String = client.set("a", "2", Some(Expiration::EX(100)), Some(SetOptions::XX), true).await?;
    assert_eq!(old, "1");
    let ttl: i64 = client.ttl("a").await?;
    assert!((98..=100).contains(&ttl), "{ttl}");
    assert_eq!(client.incr_by::<i64, _>("a", 40).await?, 42);
    assert_eq!(client.incr_by_float::<f64, _>("a", 0.5).await?, 42.5);
    client.mset(vec![("x", 1), ("y", 2)]).await?;
    let values: Vec<Option<i64>> = client.mget(vec!["x", "missing", "y"]).await?;
    assert_eq!(values, [Some(1), None, Some(2)]);
    assert_eq!(client.del::<i64, _>(vec!["x", "missing"]).await?, 1);
    assert_eq!(client.append::<i64, _, _>("y", "00").await?, 3);
    assert_eq!(client.strlen::<i64, _>("y").await?, 3);
    assert_eq!(client.getdel::<String, _>("y").await?, "200");
    let error = client.incr_by::<i64, _>("a", 1).await.unwrap_err();
    assert!(error.details().contains("not an integer"), "{error}");

    let pipeline = client.pipeline();
    pipeline.incr::<(), _>("n").await?;
    pipeline.incr::<(), _>("n").await?;
    pipeline.get::<(), _>("missing").await?;
    let results: (i64, i64, Option<String>) = pipeline.all().await?;
    assert_eq!(results, (1, 2, None));

    let transaction = client.multi();
    transaction.set::<(), _, _>("{t}a", "1", None, None, false).await?;
    transaction.incr::<(), _>("{t}a").await?;
    transaction.get::<(), _>("{t}missing").await?;
    let results: ((), i64, Option<String>) = transaction.exec(true).await?;
    assert_eq!(results, ((), 2, None));

    for chunk in 0..10 {
        let pairs: Vec<(String, i64)> =
            (0..100).map(|number| (format!("many:{}", chunk * 100 + number), number)).collect();
        client.mset(pairs).await?;
    }
    let mut found = BTreeSet::new();
    let mut total = 0;
    let mut pages = Box::pin(client.scan("many:*", Some(50), None));
    while let Some(mut page) = pages.try_next().await? {
        for key in page.take_results().unwrap_or_default() {
            total += 1;
            found.insert(key.as_str_lossy().into_owned());
        }
        page.next();
    }
    assert_eq!((found.len(), total), (1_000, 1_000));

    let info: String = client.info(Some(fred::types::InfoKind::Server)).await?;
    assert!(info.contains("redis_version:7.0."), "{info}");
    assert_eq!(client.dbsize::<i64>().await?, 1_003);
    client.quit().await
}

fn run(address: &Address, version: RespVersion) {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(async { commands(connect(address, version).await).await })
        .unwrap();
}

#[test]
fn commands_of_resp2() {
    run(&Server::start().address(), RespVersion::RESP2);
}

#[test]
fn commands_of_resp3() {
    run(&Server::start().address(), RespVersion::RESP3);
}

#[test]
fn commands_through_a_cluster() {
    let cluster = Cluster::builder().stores(2).shards(5).start();
    run(&cluster.address(0), RespVersion::RESP3);
}
