//! A minimal HTTP client for one POST request. It connects only to addresses that were checked, uses no proxies, follows no
//! redirects and reads only the beginning of the answer.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request, Response, Uri, header};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::timeout,
};
use tokio_util::task::AbortOnDropHandle;
use vmwatch_api::alerts::channels::MAX_ANSWER;

use super::{CONNECT_LIMIT, SendError, Sender, printable};
use crate::notify::addresses::{AddressError, Endpoint};

/// Maximum size of the status line and the headers of an answer.
const HEADER_BYTES: usize = 16 * 1024;
/// Time limit for the text of an answer, after its status has arrived.
const TEXT_LIMIT: Duration = Duration::from_secs(2);

/// Posts a JSON text to an `http` or `https` URL. Returns the receiver's status and the beginning of its answer.
pub(super) async fn post(
    sender: &Sender,
    url: &str,
    headers: Vec<(HeaderName, HeaderValue)>,
    json: Vec<u8>,
) -> Result<String, SendError> {
    let uri: Uri = url.parse().map_err(|_| AddressError::Url)?;
    let endpoint = Endpoint::of_uri(&uri).ok_or(AddressError::Url)?;
    let request = request(&uri, headers, json)?;
    let addresses = sender.addresses.check(&endpoint).await?;
    let stream = connect(&addresses).await?;

    if uri.scheme_str() == Some("https") {
        let stream = sender.trust.handshake(&endpoint.host, stream).await?;
        exchange(stream, request).await
    } else {
        exchange(stream, request).await
    }
}

fn request(
    uri: &Uri,
    headers: Vec<(HeaderName, HeaderValue)>,
    json: Vec<u8>,
) -> Result<Request<Full<Bytes>>, SendError> {
    let invalid = |error: http::Error| SendError::Invalid(error.to_string());
    let path = uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    let authority = uri.authority().map_or("", http::uri::Authority::as_str);
    let mut request = Request::post(path)
        .header(header::HOST, authority)
        .header(header::CONTENT_TYPE, "application/json")
        .header(
            header::USER_AGENT,
            concat!("vmwatch-alert/", env!("CARGO_PKG_VERSION")),
        )
        .body(Full::new(Bytes::from(json)))
        .map_err(invalid)?;
    request
        .headers_mut()
        .extend(headers.into_iter().map(|(name, value)| (Some(name), value)));
    Ok(request)
}

async fn connect(addresses: &[SocketAddr]) -> Result<TcpStream, SendError> {
    let mut last = SendError::Timeout;
    for address in addresses {
        let connected = timeout(CONNECT_LIMIT, TcpStream::connect(address)).await;
        match connected.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into())) {
            Ok(stream) => return Ok(stream),
            Err(error) => {
                last = SendError::Connect {
                    address: address.to_string(),
                    reason: error.to_string(),
                }
            }
        }
    }
    Err(last)
}

async fn exchange<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    request: Request<Full<Bytes>>,
) -> Result<String, SendError> {
    let interrupted = |error: hyper::Error| SendError::Interrupted(error.to_string());
    let handshake = http1::Builder::new()
        .max_buf_size(HEADER_BYTES)
        .handshake(TokioIo::new(stream));
    let (mut connection, driver) = handshake.await.map_err(interrupted)?;
    let _driver = AbortOnDropHandle::new(tokio::spawn(driver));
    let response = connection.send_request(request).await.map_err(interrupted)?;
    let status = response.status();
    let answer = printable(&format!("{status}: {}", beginning(response).await));
    if status.is_success() {
        Ok(answer)
    } else if status.is_redirection() {
        Err(SendError::Redirected(answer))
    } else {
        Err(SendError::Refused(answer))
    }
}

/// The beginning of the answer's text; less if it does not arrive in time.
async fn beginning(response: Response<Incoming>) -> String {
    let mut body = response.into_body();
    let mut text = Vec::new();
    let reading = async {
        while let Some(Ok(frame)) = body.frame().await {
            text.extend_from_slice(frame.data_ref().map_or(&[], |data| data.as_ref()));
            if text.len() >= MAX_ANSWER {
                break;
            }
        }
    };
    // What has arrived by then is enough; the status alone decides whether the message was delivered.
    let _ = timeout(TEXT_LIMIT, reading).await;
    text.truncate(MAX_ANSWER);
    String::from_utf8_lossy(&text).into_owned()
}
