//! A minimal HTTP client for the one request of an enrolment. It follows no redirects, uses no proxies, and reads a bounded
//! answer within one deadline.

use std::{
    fmt,
    str::FromStr,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::{
    Request, Response, StatusCode, Uri,
    body::Incoming,
    client::conn::http1,
    header::{CONTENT_TYPE, DATE, HOST, HeaderMap, RETRY_AFTER, USER_AGENT},
};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::{Instant, timeout_at},
};
use tokio_util::task::AbortOnDropHandle;

use super::{
    EnrolError,
    tls::{self, CaFile},
};

/// Time limit of a request, from the resolution of the host name to the end of the answer.
pub(super) const DEADLINE: Duration = Duration::from_secs(30);
/// Time limit of the connection to one of the host's addresses, so that an unreachable one leaves time for the others.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// Maximum size of an answer.
const ANSWER_BYTES: usize = 64 * 1024;
/// Maximum size of the status line and the headers of an answer.
const HEADER_BYTES: usize = 16 * 1024;
/// The wait if the gateway limits enrolments and does not state how long to wait.
const DEFAULT_RETRY_AFTER: Duration = Duration::from_secs(10);

/// The URL of a gateway: `https://`, or `http://` to this machine only, because the request contains the join token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct GatewayUrl {
    encrypted: bool,
    host: String,
    port: u16,
    /// The path before `/api/v1`, without a final slash.
    path: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "must be a URL such as https://vmwatch.example.com; http:// only for this machine (127.0.0.1, ::1, localhost)"
)]
pub(crate) struct InvalidGatewayUrl;

impl FromStr for GatewayUrl {
    type Err = InvalidGatewayUrl;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let uri: Uri = text.parse().map_err(|_| InvalidGatewayUrl)?;
        let authority = uri.authority().ok_or(InvalidGatewayUrl)?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        let encrypted = match uri.scheme_str() {
            Some("https") => true,
            Some("http") if is_loopback(host) => false,
            _ => return Err(InvalidGatewayUrl),
        };
        if host.is_empty() || authority.as_str().contains('@') || uri.query().is_some() {
            return Err(InvalidGatewayUrl);
        }
        Ok(Self {
            encrypted,
            host: host.to_owned(),
            port: authority.port_u16().unwrap_or(if encrypted { 443 } else { 80 }),
            path: uri.path().trim_end_matches('/').to_owned(),
        })
    }
}

fn is_loopback(host: &str) -> bool {
    host == "localhost"
        || host
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

impl GatewayUrl {
    /// The value of the header `Host`.
    fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

impl fmt::Display for GatewayUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.encrypted { "https" } else { "http" };
        write!(f, "{scheme}://{}{}", self.authority(), self.path)
    }
}

/// An answer to the request.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) body: Bytes,
    /// How long to wait before the next request.
    pub(super) retry_after: Duration,
    /// By how much the VM's clock is ahead of the gateway's, at least; negative if it is behind. 0 if they may agree.
    pub(super) clock_ahead: i64,
}

/// Posts a JSON text to a path of the gateway.
pub(super) async fn post(
    gateway: &GatewayUrl,
    path: &str,
    json: Vec<u8>,
    ca_file: Option<&CaFile>,
) -> Result<Answer, EnrolError> {
    let until = Instant::now() + DEADLINE;
    let request = Request::post(format!("{}{path}", gateway.path))
        .header(HOST, gateway.authority())
        .header(CONTENT_TYPE, "application/json")
        .header(USER_AGENT, concat!("vmwatch-agent/", env!("CARGO_PKG_VERSION")))
        .body(Full::new(Bytes::from(json)))
        .map_err(|error| EnrolError::Usage(format!("{gateway} is invalid: {error}")))?;
    let connector = gateway.encrypted.then(|| tls::connector(ca_file)).transpose()?;
    let stream = connect(gateway, until).await?;
    let exchange = async {
        match connector {
            Some(connector) => {
                let stream = tls::handshake(&connector, &gateway.host, stream, until).await?;
                exchange(stream, request).await
            }
            None => exchange(stream, request).await,
        }
    };
    timeout_at(until, exchange)
        .await
        .map_err(|_| EnrolError::Timeout(DEADLINE))?
}

async fn connect(gateway: &GatewayUrl, until: Instant) -> Result<TcpStream, EnrolError> {
    let resolving = tokio::net::lookup_host((gateway.host.as_str(), gateway.port));
    let unresolved = |source| EnrolError::Dns {
        host: gateway.host.clone(),
        source,
    };
    let addresses = timeout_at(until, resolving).await;
    let addresses = addresses
        .map_err(|_| EnrolError::Timeout(DEADLINE))?
        .map_err(unresolved)?;
    let mut last = unresolved(std::io::Error::other("the name has no address"));
    // The name `localhost` could resolve to another machine.
    for address in addresses.filter(|address| gateway.encrypted || address.ip().is_loopback()) {
        let limit = until.min(Instant::now() + CONNECT_DEADLINE);
        let connected = timeout_at(limit, TcpStream::connect(address)).await;
        match connected.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into())) {
            Ok(stream) => return Ok(stream),
            Err(source) => {
                last = EnrolError::Connect {
                    address: address.to_string(),
                    source,
                }
            }
        }
    }
    Err(last)
}

async fn exchange<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    request: Request<Full<Bytes>>,
) -> Result<Answer, EnrolError> {
    let connection = http1::Builder::new()
        .max_buf_size(HEADER_BYTES)
        .handshake(TokioIo::new(stream));
    let (mut sender, connection) = connection.await.map_err(EnrolError::Interrupted)?;
    let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let sent = SystemTime::now();
    let response = sender.send_request(request).await.map_err(|error| {
        if error.is_parse() {
            EnrolError::Answer(format!("it is not HTTP ({error})"))
        } else {
            EnrolError::Interrupted(error)
        }
    })?;
    let clock_ahead = clock_ahead(response.headers(), sent, SystemTime::now());
    read(response, clock_ahead).await
}

async fn read(response: Response<Incoming>, clock_ahead: i64) -> Result<Answer, EnrolError> {
    let (head, body) = response.into_parts();
    let body = Limited::new(body, ANSWER_BYTES)
        .collect()
        .await
        .map_err(|error| {
            if error.is::<LengthLimitError>() {
                return EnrolError::Answer(format!("it has more than {ANSWER_BYTES} bytes"));
            }
            match error.downcast::<hyper::Error>() {
                Ok(error) => EnrolError::Interrupted(*error),
                Err(error) => EnrolError::Answer(error.to_string()),
            }
        })?;
    let seconds = head
        .headers
        .get(RETRY_AFTER)
        .and_then(|value| value.to_str().ok()?.parse().ok());
    Ok(Answer {
        status: head.status,
        body: body.to_bytes(),
        retry_after: seconds.map_or(DEFAULT_RETRY_AFTER, Duration::from_secs),
        clock_ahead,
    })
}

/// The header `Date` has whole seconds, and the gateway wrote it between the two given times.
fn clock_ahead(headers: &HeaderMap, sent: SystemTime, received: SystemTime) -> i64 {
    let date = headers.get(DATE).and_then(|value| value.to_str().ok());
    let Some(date) = date.and_then(|text| httpdate::parse_http_date(text).ok()) else {
        return 0;
    };
    let seconds = |duration: Duration| i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
    if let Ok(ahead) = sent.duration_since(date + Duration::from_secs(1)) {
        return seconds(ahead);
    }
    date.duration_since(received).map_or(0, |behind| -seconds(behind))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gateway_url_requires_tls_except_to_this_machine() {
        let url = |text: &str| text.parse::<GatewayUrl>().map(|url| url.to_string());
        for (text, whole) in [
            ("https://a.example", "https://a.example:443"),
            ("https://a.example:8443/x/", "https://a.example:8443/x"),
            ("https://[2001:db8::1]/", "https://[2001:db8::1]:443"),
            ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
            ("http://[::1]", "http://[::1]:80"),
            ("http://localhost", "http://localhost:80"),
        ] {
            assert_eq!(url(text).as_deref(), Ok(whole));
        }
        for bad in [
            "",
            "a.example",
            "http://a.example",
            "http://127.0.0.1.example",
            "http://localhost.example",
            "ftp://127.0.0.1",
            "https://user@a.example",
            "https://a.example/?x=1",
            "/api",
        ] {
            assert_eq!(url(bad), Err(InvalidGatewayUrl), "{bad}");
        }
    }

    #[test]
    fn clock_difference_allows_for_whole_seconds_and_the_way() {
        let at = |seconds: u64| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let mut headers = HeaderMap::new();
        assert_eq!(clock_ahead(&headers, at(0), at(0)), 0);
        headers.insert(DATE, "Thu, 01 Jan 1970 00:01:40 GMT".parse().unwrap());
        assert_eq!(clock_ahead(&headers, at(101), at(103)), 0);
        assert_eq!(clock_ahead(&headers, at(95), at(100)), 0);
        assert_eq!(clock_ahead(&headers, at(104), at(105)), 3);
        assert_eq!(clock_ahead(&headers, at(90), at(97)), -3);
    }
}
