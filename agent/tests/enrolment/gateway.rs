//! An HTTP server that answers enrolments like a gateway, in plain text or with TLS.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair, date_time_ymd,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    },
};
use tokio_util::task::AbortOnDropHandle;

/// An answer to one request.
#[derive(Debug, Clone)]
pub(crate) enum Answer {
    /// Status, headers and body.
    Http(u16, Vec<(&'static str, String)>, String),
    /// Enrols the agent; it gets these URLs of NATS servers.
    Enrols(Vec<String>),
    /// Enrols the agent; it gets this URL of a NATS server, and these certificate authorities.
    EnrolsWith(String, String),
    /// Never answers.
    Nothing,
}

impl Answer {
    pub(crate) fn problem(status: u16, detail: &str) -> Self {
        Self::Http(
            status,
            Vec::new(),
            json!({ "status": status, "detail": detail }).to_string(),
        )
    }

    pub(crate) fn enrols() -> Self {
        Self::Enrols(vec!["tls://bus.example:4222".to_owned()])
    }
}

/// The server. It answers each request with the next answer, and repeats the last one.
pub(crate) struct FakeGateway {
    pub(crate) url: String,
    state: Arc<State>,
    _serving: AbortOnDropHandle<()>,
}

struct State {
    answers: Mutex<Vec<Answer>>,
    requests: Mutex<Vec<Value>>,
}

impl FakeGateway {
    pub(crate) async fn start(answers: &[Answer]) -> Self {
        Self::start_with(answers, None).await
    }

    pub(crate) async fn start_with(answers: &[Answer], tls: Option<TlsAcceptor>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let scheme = if tls.is_some() { "https" } else { "http" };
        let url = format!("{scheme}://{}", listener.local_addr().unwrap());
        let state = Arc::new(State {
            answers: Mutex::new(answers.to_vec()),
            requests: Mutex::default(),
        });
        let serving = tokio::spawn(serve(listener, tls, Arc::clone(&state)));
        Self {
            url,
            state,
            _serving: AbortOnDropHandle::new(serving),
        }
    }

    pub(crate) fn answer(&self, answers: &[Answer]) {
        *self.state.answers.lock().unwrap() = answers.to_vec();
    }

    /// The bodies of the requests so far.
    pub(crate) fn requests(&self) -> Vec<Value> {
        self.state.requests.lock().unwrap().clone()
    }
}

async fn serve(listener: TcpListener, tls: Option<TlsAcceptor>, state: Arc<State>) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let (tls, state) = (tls.clone(), Arc::clone(&state));
        tokio::spawn(async move {
            match tls {
                None => serve_connection(stream, state).await,
                Some(tls) => {
                    if let Ok(stream) = tls.accept(stream).await {
                        serve_connection(stream, state).await;
                    }
                }
            }
        });
    }
}

async fn serve_connection(stream: impl AsyncRead + AsyncWrite + Unpin, state: Arc<State>) {
    let service = service_fn(|request| respond(request, &state));
    // A client that is killed causes an error.
    let _ = http1::Builder::new()
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

async fn respond(request: Request<Incoming>, state: &State) -> Result<Response<Full<Bytes>>, hyper::Error> {
    assert_eq!(request.method(), "POST");
    assert_eq!(request.uri().path(), "/api/v1/agents");
    assert_eq!(request.headers()["content-type"], "application/json");
    let body = request.into_body().collect().await?.to_bytes();
    let body: Value = serde_json::from_slice(&body).unwrap();
    state.requests.lock().unwrap().push(body.clone());
    let answer = {
        let mut answers = state.answers.lock().unwrap();
        if answers.len() > 1 {
            answers.remove(0)
        } else {
            answers[0].clone()
        }
    };
    let (status, headers, text) = match answer {
        Answer::Http(status, headers, text) => (status, headers, text),
        Answer::Enrols(urls) => (201, Vec::new(), enrolled(&body, &urls, "")),
        Answer::EnrolsWith(url, ca) => (201, Vec::new(), enrolled(&body, &[url], &ca)),
        Answer::Nothing => std::future::pending().await,
    };
    let mut response = Response::builder().status(status);
    for (name, value) in headers {
        response = response.header(name, value);
    }
    Ok(response.body(Full::new(text.into())).unwrap())
}

fn enrolled(request: &Value, urls: &[String], ca: &str) -> String {
    json!({
        "instance_id": request["instance_id"],
        "nats_urls": urls,
        "ca_certificates": ca,
        "utc_offset": "+08:00",
        "vm_interval_ms": 200,
        "process_interval_ms": 400,
    })
    .to_string()
}

/// A certificate authority, and a certificate of it for 127.0.0.1 with its key; all in PEM.
pub(crate) struct Certificates {
    pub(crate) ca: String,
    pub(crate) certificate: String,
    pub(crate) key: String,
}

impl Certificates {
    pub(crate) fn new(expired: bool) -> Self {
        let authority_key = KeyPair::generate().unwrap();
        let mut authority = CertificateParams::new(Vec::new()).unwrap();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.distinguished_name = DistinguishedName::new();
        authority
            .distinguished_name
            .push(DnType::CommonName, "a test's authority");
        let ca = authority.self_signed(&authority_key).unwrap().pem();
        let issuer = Issuer::new(authority, authority_key);
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        if expired {
            params.not_after = date_time_ymd(2020, 1, 1);
        }
        Self {
            ca,
            certificate: params.signed_by(&key, &issuer).unwrap().pem(),
            key: key.serialize_pem(),
        }
    }

    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        let certificate = CertificateDer::from_pem_slice(self.certificate.as_bytes()).unwrap();
        let key = PrivateKeyDer::from_pem_slice(self.key.as_bytes()).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)
            .unwrap();
        TlsAcceptor::from(Arc::new(config))
    }
}
