//! Live events: the format of server-sent events (HTML Living Standard, "Server-sent events"), and a reader that
//! connects again.

use std::{collections::VecDeque, time::Duration};

use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use tokio::time::{sleep, timeout};

use crate::{
    client::{Client, Query},
    error::CliError,
};

/// The gateway sends a comment every 15 seconds.
const SILENCE: Duration = Duration::from_secs(45);
/// Maximum size of an event.
const MAX_EVENT: usize = 4 << 20;
/// Wait before the next connection, unless the gateway has stated another one.
const USUAL_RETRY: Duration = Duration::from_secs(3);
const LONGEST_RETRY: Duration = Duration::from_secs(30);

#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) name: String,
    pub(crate) data: String,
}

/// Decodes the stream.
#[derive(Debug, Default)]
struct Parser {
    line: Vec<u8>,
    event: Event,
    id: Option<String>,
    retry: Option<Duration>,
    ready: VecDeque<Event>,
}

impl Parser {
    /// Reads the next bytes of the stream; false if an event is too large.
    fn feed(&mut self, bytes: &[u8]) -> bool {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.line.extend_from_slice(piece);
            if self.line.len() + self.event.data.len() > MAX_EVENT {
                return false;
            }
            if self.line.last() == Some(&b'\n') {
                let line = String::from_utf8_lossy(&self.line).into_owned();
                self.line.clear();
                self.take_line(line.trim_end_matches(['\r', '\n']));
            }
        }
        true
    }

    fn take_line(&mut self, line: &str) {
        if line.is_empty() {
            let event = std::mem::take(&mut self.event);
            if !event.data.is_empty() {
                self.ready.push_back(event);
            }
            return;
        }
        // A line that begins with a colon is a comment.
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => value.clone_into(&mut self.event.name),
            "data" => {
                if !self.event.data.is_empty() {
                    self.event.data.push('\n');
                }
                self.event.data += value;
            }
            "id" => self.id = Some(value.to_owned()),
            "retry" => self.retry = value.parse().ok().map(Duration::from_millis),
            _ => {}
        }
    }
}

/// What a reader of live events has received.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Received {
    /// The stream is connected, for the first time or again.
    Connected,
    /// Events were missed while the stream was not connected.
    Missed,
    /// The connection ended, for this reason; the reader connects again.
    Lost(String),
    Event(Event),
}

/// Reads live events and connects again when the connection ends.
#[derive(Debug)]
pub(crate) struct Follower<'a> {
    client: &'a Client,
    query: Vec<(&'static str, Option<String>)>,
    body: Option<Incoming>,
    parser: Parser,
    was_connected: bool,
    /// Number of connections in a row that failed.
    failures: u32,
}

impl<'a> Follower<'a> {
    pub(crate) fn new(client: &'a Client, query: Vec<(&'static str, Option<String>)>) -> Self {
        Self {
            client,
            query,
            body: None,
            parser: Parser::default(),
            was_connected: false,
            failures: 0,
        }
    }

    /// Waits for the next event or change of the connection. An error is final.
    pub(crate) async fn next(&mut self) -> Result<Received, CliError> {
        loop {
            if let Some(event) = self.parser.ready.pop_front() {
                match event.name.as_str() {
                    "ready" => return Ok(Received::Connected),
                    "gap" => return Ok(Received::Missed),
                    "end" => return Err(self.client.token_ended()),
                    _ => return Ok(Received::Event(event)),
                }
            }
            let Some(body) = &mut self.body else {
                if let Some(lost) = self.connect().await? {
                    return Ok(lost);
                }
                continue;
            };
            let reason = match timeout(SILENCE, body.frame()).await {
                Ok(Some(Ok(frame))) => {
                    let is_valid = frame.data_ref().is_none_or(|data| self.parser.feed(data));
                    if is_valid {
                        continue;
                    }
                    return Err(CliError::Answer("an event is too large".to_owned()));
                }
                Ok(Some(Err(error))) => error.to_string(),
                Ok(None) => "the gateway ended the connection".to_owned(),
                Err(_) => "the gateway was silent".to_owned(),
            };
            self.body = None;
            return Ok(Received::Lost(reason));
        }
    }

    async fn connect(&mut self) -> Result<Option<Received>, CliError> {
        let id = self.parser.id.take();
        let retry = self.parser.retry.unwrap_or(USUAL_RETRY);
        // An incomplete event of the last connection is sent again.
        self.parser = Parser {
            id: id.clone(),
            retry: Some(retry),
            ..Parser::default()
        };
        if self.was_connected {
            sleep((retry * self.failures.max(1)).min(LONGEST_RETRY)).await;
        }
        let query: &Query<'_> = &self.query;
        match self.client.open_stream(query, id.as_deref()).await {
            Ok(response) => {
                (self.was_connected, self.failures) = (true, 0);
                self.body = Some(response.into_body());
                Ok(None)
            }
            // The first connection must succeed, so that a wrong address is reported at once.
            Err(error) if error.is_temporary() && self.was_connected => {
                self.failures += 1;
                Ok(Some(Received::Lost(error.to_string())))
            }
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(name: &str, data: &str) -> Event {
        Event {
            name: name.to_owned(),
            data: data.to_owned(),
        }
    }

    #[test]
    fn events_are_decoded_from_pieces_of_any_size() {
        let stream = b"retry: 1500\nid: 7\nevent: ready\ndata: {}\n\n:\n\nid: 8\r\nevent: machine\r\ndata: {\"a\":\r\ndata: 1}\r\n\r\nevent: none\n\nevent: cut\ndata: x\n";
        for size in [1, 2, 7, stream.len()] {
            let mut parser = Parser::default();
            assert!(stream.chunks(size).all(|piece| parser.feed(piece)));
            let expected = [event("ready", "{}"), event("machine", "{\"a\":\n1}")];
            assert_eq!(Vec::from(parser.ready), expected, "pieces of {size} bytes");
            assert_eq!(parser.id.as_deref(), Some("8"));
            assert_eq!(parser.retry, Some(Duration::from_millis(1500)));
        }
    }

    #[test]
    fn event_without_end_is_bounded() {
        let mut parser = Parser::default();
        let piece = vec![b'x'; MAX_EVENT / 2];
        assert!(parser.feed(&piece));
        assert!(parser.feed(&piece));
        assert!(!parser.feed(b"x"));
    }
}
