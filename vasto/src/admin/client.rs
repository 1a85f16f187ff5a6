//! A client that asks a gateway one command at a time and reads the whole answer.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, bail};

use crate::bench::connection::{self, Link};
use crate::bench::reply::{self, Malformed, Reply};
use crate::bench::{ServerSettings, Target, command};

const INPUT_BYTES: usize = 16 << 10;

/// Why there is no answer.
#[derive(Debug)]
pub enum Failure {
    /// The server's error, without its code word if that is ERR.
    Refused(String),
    /// The next question goes over another connection.
    Lost(anyhow::Error),
}

impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(text) => formatter.write_str(text),
            Self::Lost(error) => write!(formatter, "{error:#}"),
        }
    }
}

impl std::error::Error for Failure {}

/// A reply with all that is in it; what RESP2 does not know does not come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Text(String),
    Number(i64),
    Nothing,
    List(Vec<Answer>),
}

pub struct Client {
    server: ServerSettings,
    target: Target,
    link: Option<Link>,
}

impl Client {
    /// Connects with the first question.
    pub fn new(address: String, timeout: Duration) -> Self {
        let target = Target::Tcp(address);
        let targets = vec![target.clone()];
        let server = ServerSettings { targets, protocol: 2, database: 0, timeout, reconnect_for: Duration::ZERO };
        Self { server, target, link: None }
    }

    pub fn timeout(&self) -> Duration {
        self.server.timeout
    }

    pub async fn ask(&mut self, words: &[&str]) -> Result<Answer, Failure> {
        let bytes = self.exchange(words).await.map_err(Failure::Lost)?;
        match answer(&bytes) {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(refused)) => Err(Failure::Refused(refused)),
            Err(malformed) => Err(Failure::Lost(malformed.into())),
        }
    }

    /// The bytes of one whole reply. After an error the connection is not used again.
    async fn exchange(&mut self, words: &[&str]) -> anyhow::Result<Vec<u8>> {
        let mut link = match self.link.take() {
            Some(link) => link,
            None => connection::connect(&self.server, &self.target)
                .await
                .with_context(|| format!("cannot connect to {}", self.target))?,
        };
        let answer = tokio::time::timeout(self.server.timeout, exchange_untimed(&mut link, words)).await;
        let answer = answer.context("the server does not answer")??;
        self.link = Some(link);
        Ok(answer)
    }
}

async fn exchange_untimed(link: &mut Link, words: &[&str]) -> anyhow::Result<Vec<u8>> {
    let mut output = Vec::new();
    command::append_words(words, &mut output);
    link.write_all(&output).await.context("the connection is lost")?;
    let mut input = Vec::new();
    let mut chunk = [0; INPUT_BYTES];
    loop {
        if let Some((_, length)) = reply::parse(&input)? {
            input.truncate(length);
            return Ok(input);
        }
        match link.read(&mut chunk).await.context("the connection is lost")? {
            0 => bail!("the server closed the connection"),
            length => input.extend_from_slice(&chunk[..length]),
        }
    }
}

/// Reads the bytes of a whole reply; an error reply is its text.
fn answer(bytes: &[u8]) -> Result<Result<Answer, String>, Malformed> {
    if let Some((Reply::Error(text), _)) = reply::parse(bytes)? {
        let text = String::from_utf8_lossy(text).into_owned();
        return Ok(Err(text.strip_prefix("ERR ").map(str::to_owned).unwrap_or(text)));
    }
    Ok(Ok(read(bytes, &mut 0, DEPTH_MAX)?))
}

/// STATUS nests two deep.
const DEPTH_MAX: usize = 8;

fn read(bytes: &[u8], at: &mut usize, depth_left: usize) -> Result<Answer, Malformed> {
    let element = reply::element(&bytes[*at..])?.ok_or(Malformed("cut off"))?;
    *at += element.end;
    let text = |text: &[u8]| Answer::Text(String::from_utf8_lossy(text).into_owned());
    Ok(match element.reply {
        Reply::Simple(bytes) | Reply::Error(bytes) | Reply::Bulk(bytes) => text(bytes),
        Reply::Integer(number) => Answer::Number(number),
        Reply::Nil => Answer::Nothing,
        Reply::Push | Reply::Other if depth_left == 0 => return Err(Malformed("nested too deep")),
        Reply::Push | Reply::Other => {
            let elements = (0..element.children).map(|_| read(bytes, at, depth_left - 1));
            Answer::List(elements.collect::<Result<_, _>>()?)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_with_all_that_is_in_them() {
        let text = |text: &str| Answer::Text(text.to_owned());
        let list = Answer::List(vec![text("a"), Answer::List(vec![Answer::Number(-1), Answer::Nothing]), text("")]);
        for (bytes, expected) in [
            (&b"+OK\r\n"[..], Ok(text("OK"))),
            (b":17\r\n", Ok(Answer::Number(17))),
            (b"*3\r\n$1\r\na\r\n*2\r\n:-1\r\n$-1\r\n$0\r\n\r\n", Ok(list)),
            (b"*0\r\n", Ok(Answer::List(Vec::new()))),
            (b"-ERR no such keyspace 'a'\r\n", Err("no such keyspace 'a'".to_owned())),
            (b"-UNKNOWN it may have been\r\n", Err("UNKNOWN it may have been".to_owned())),
        ] {
            assert_eq!(answer(bytes), Ok(expected), "{}", bytes.escape_ascii());
        }
        assert!(answer(&[&b"*1\r\n".repeat(50)[..], b":1\r\n"].concat()).is_err());
        assert!(answer(b"*2\r\n:1\r\n").is_err());
    }
}
