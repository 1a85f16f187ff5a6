//! Watches an operation until it has ended: a bar that is drawn over in a terminal, else a line for each step.

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::client::{Client, Failure};
use super::status::{Status, time};

/// Between two looks: a bar that moves, and no load.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Where it is shown.
pub struct Screen<W> {
    output: W,
    is_terminal: bool,
    /// What the last line told.
    step: Option<(String, Option<i64>, String)>,
    /// A bar stands in the line.
    is_drawn: bool,
}

impl<W: Write> Screen<W> {
    pub fn new(output: W, is_terminal: bool) -> Self {
        Self { output, is_terminal, step: None, is_drawn: false }
    }

    fn show(&mut self, status: &Status) -> anyhow::Result<()> {
        if self.is_terminal {
            write!(self.output, "\r\x1b[K{}", status.bar()).context("draw the bar")?;
            self.is_drawn = true;
        } else if self.step.replace(status.step()).as_ref() != Some(&status.step()) {
            writeln!(self.output, "{}", status.line()).context("print a line")?;
        }
        self.output.flush().context("print a line")
    }

    /// Ends a line that would else be written on.
    fn end_line(&mut self) -> anyhow::Result<()> {
        if std::mem::take(&mut self.is_drawn) {
            writeln!(self.output).context("end the line")?;
        }
        Ok(())
    }
}

pub struct Watch {
    name: String,
    /// `None`: whichever goes on.
    operation: Option<i64>,
    pause: Duration,
}

impl Watch {
    pub fn new(name: String, operation: Option<i64>) -> Self {
        Self { name, operation, pause: LOOK_AGAIN }
    }

    /// An error if the operation was aborted, or if how it ended cannot be learned.
    pub async fn until_the_end<W: Write>(mut self, client: &mut Client, screen: &mut Screen<W>) -> anyhow::Result<()> {
        let ended = self.follow(client, screen).await;
        screen.end_line()?;
        let text = ended?;
        writeln!(screen.output, "{text}").context("print the end")
    }

    async fn follow<W: Write>(&mut self, client: &mut Client, screen: &mut Screen<W>) -> anyhow::Result<String> {
        let mut lost_at: Option<Instant> = None;
        loop {
            let answer = match client.ask(&["KEYSPACE", "STATUS", &self.name]).await {
                Ok(answer) => answer,
                Err(Failure::Refused(text)) => bail!("{text}"),
                // The operation goes on without this gateway, which may come back.
                Err(Failure::Lost(error)) => {
                    let since = *lost_at.get_or_insert_with(Instant::now);
                    if since.elapsed() >= client.timeout() {
                        return Err(error.context("how far the operation is cannot be learned"));
                    }
                    tokio::time::sleep(self.pause).await;
                    continue;
                }
            };
            lost_at = None;
            let status = Status::read(&answer).with_context(|| format!("this is no status: {answer:?}"))?;
            let end = self.end(&status)?;
            // One before it is not shown, nor that there is none.
            if status.operation.is_some() && status.operation == self.operation {
                screen.show(&status)?;
            }
            if let Some(text) = end {
                return Ok(text);
            }
            tokio::time::sleep(self.pause).await;
        }
    }

    /// What there is to say if it has ended well; `None` while it goes on.
    fn end(&mut self, status: &Status) -> anyhow::Result<Option<String>> {
        let Some(id) = status.operation else {
            return match self.operation {
                // The gateway's topology, or a master that leads again, is older than the operation.
                Some(_) => Ok(None),
                None => Ok(Some(format!("keyspace {} has had no operation", self.name))),
            };
        };
        let watched = *self.operation.get_or_insert(id);
        if id > watched {
            bail!("operation {watched} has ended, and operation {id} has begun since");
        }
        if id < watched {
            return Ok(None);
        }
        match status.phase.as_str() {
            "done" => {
                let after = status.elapsed_seconds.map(|elapsed| format!(" after {}", time(elapsed)));
                Ok(Some(format!("operation {id} is done{}", after.unwrap_or_default())))
            }
            "aborted" => bail!("operation {id} was aborted: {}", status.reason),
            _ => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    fn status(operation: i64, phase: &str, percent: &str) -> String {
        let text = |text: &str| format!("${}\r\n{text}\r\n", text.len());
        let fields = [
            format!("{}:{operation}\r\n", text("operation")),
            format!("{}{}", text("kind"), text("resize")),
            format!("{}:3\r\n", text("from")),
            format!("{}:4\r\n", text("to")),
            format!("{}{}", text("phase"), text(phase)),
            format!("{}{}", text("percent"), text(percent)),
            format!("{}{}", text("reason"), text("the disk is full")),
            format!("{}:9\r\n", text("elapsed")),
        ];
        format!("*{}\r\n{}", 2 * fields.len(), fields.concat())
    }

    /// Watches what a gateway says that gives these answers, one to a question; an empty one ends the connection.
    async fn watched(operation: Option<i64>, is_terminal: bool, answers: &[String]) -> (anyhow::Result<()>, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let serve = async {
            let mut answers = answers.iter();
            'connections: loop {
                let (mut socket, _) = listener.accept().await.unwrap();
                let mut input = [0; 1024];
                while socket.read(&mut input).await.unwrap() > 0 {
                    match answers.next() {
                        Some(answer) if !answer.is_empty() => socket.write_all(answer.as_bytes()).await.unwrap(),
                        Some(_) => continue 'connections,
                        None => panic!("asked more often than it takes"),
                    }
                }
                break answers.len();
            }
        };
        let watch = async {
            let mut client = Client::new(address, Duration::from_secs(60));
            let mut screen = Screen::new(Vec::new(), is_terminal);
            let watch = Watch { pause: Duration::from_millis(1), ..Watch::new("users".to_owned(), operation) };
            let ended = watch.until_the_end(&mut client, &mut screen).await;
            (ended, String::from_utf8(screen.output).unwrap())
        };
        let (left, watched) = tokio::join!(serve, watch);
        assert_eq!(left, 0, "answers that were not asked for");
        watched
    }

    #[tokio::test]
    async fn each_step_is_a_line_where_there_is_no_terminal() {
        let answers = [
            status(16, "done", "100"),
            status(17, "copy", "0"),
            status(17, "copy", "0.4"),
            // The gateway goes away and comes back.
            String::new(),
            status(17, "copy", "50"),
            status(17, "fence", "100"),
            status(17, "done", "100"),
        ];
        let (ended, output) = watched(Some(17), false, &answers).await;
        ended.unwrap();
        let lines = "resize from 3 to 4: copy, 0.0 %\nresize from 3 to 4: copy, 50.0 %\n\
                     resize from 3 to 4: fence, 100.0 %\nresize from 3 to 4: done, 100.0 %\noperation 17 is done after 9 s\n";
        assert_eq!(output, lines);
    }

    #[tokio::test]
    async fn a_bar_is_drawn_over_in_a_terminal() {
        let (ended, output) = watched(None, true, &[status(17, "copy", "50"), status(17, "done", "100")]).await;
        ended.unwrap();
        let (half, whole) = ("#".repeat(8), "#".repeat(16));
        let bars = format!("\r\x1b[Kcopy      [{half}--------]  50.0 %\r\x1b[Kdone      [{whole}] 100.0 %\n");
        assert_eq!(output, format!("{bars}operation 17 is done after 9 s\n"));
    }

    #[tokio::test]
    async fn what_did_not_end_well_is_an_error() {
        let refused = "-ERR no such keyspace 'users'\r\n".to_owned();
        for (operation, answers, expected) in [
            (Some(17), vec![status(17, "aborted", "7")], "operation 17 was aborted: the disk is full"),
            (
                None,
                vec![status(17, "copy", "7"), status(17, "aborted", "7")],
                "operation 17 was aborted: the disk is full",
            ),
            (Some(17), vec![status(19, "copy", "7")], "operation 17 has ended, and operation 19 has begun since"),
            (None, vec![refused], "no such keyspace 'users'"),
            (None, vec!["+OK\r\n".to_owned()], "this is no status: Text(\"OK\")"),
        ] {
            let (ended, _) = watched(operation, false, &answers).await;
            assert_eq!(ended.unwrap_err().to_string(), expected);
        }
        let none = "*2\r\n$5\r\nphase\r\n$4\r\nnone\r\n".to_owned();
        let (ended, output) = watched(None, false, &[none]).await;
        ended.unwrap();
        assert_eq!(output, "keyspace users has had no operation\n");
    }
}
