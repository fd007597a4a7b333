//! E-mail through an SMTP server. The connection goes to an address that was checked, and is verified for the server's name.

use std::net::SocketAddr;

use lettre::{
    Address, Message,
    message::{
        Mailbox, SinglePart,
        header::{HeaderName, HeaderValue},
    },
    transport::smtp::{
        Error,
        authentication::{Credentials, DEFAULT_MECHANISMS},
        client::AsyncSmtpConnection,
        extension::ClientId,
    },
};
use vmwatch_api::alerts::channels::{EmailAddress, MailTls, SmtpServer};

use super::{CONNECT_LIMIT, SendError, Sender, printable};
use crate::notify::content::Content;

/// Maximum length of a subject in characters.
const MAX_SUBJECT: usize = 200;

/// The settings of an e-mail channel.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mail<'a> {
    pub(crate) server: &'a SmtpServer,
    pub(crate) tls: MailTls,
    pub(crate) from: &'a EmailAddress,
    pub(crate) to: &'a [EmailAddress],
    pub(crate) user: Option<&'a str>,
    pub(crate) password: Option<&'a str>,
}

/// Sends a message with this text. Returns the server's answer.
pub(crate) async fn send(
    sender: &Sender,
    mail: Mail<'_>,
    content: &Content,
    text: String,
) -> Result<String, SendError> {
    let credentials = credentials(mail)?;
    let message = message(mail, content, text)?;
    let addresses = sender.addresses.check(&mail.server.clone().into()).await?;
    let hello = ClientId::Domain(domain(mail.from).to_owned());
    let mut connection = connect(sender, mail, &addresses, &hello).await?;
    if mail.tls == MailTls::Starttls {
        let parameters = sender.trust.for_mail(&mail.server.host)?;
        connection
            .starttls(parameters, &hello)
            .await
            .map_err(|error| failed(&error))?;
    }
    if let Some(credentials) = credentials {
        let login = connection.auth(DEFAULT_MECHANISMS, &credentials).await;
        login.map_err(|error| failed(&error))?;
    }
    let sent = connection.send(message.envelope(), &message.formatted()).await;
    let answer = sent.map_err(|error| failed(&error))?;
    // The server has taken the message; how the connection ends does not matter.
    let _ = connection.quit().await;
    let lines: Vec<_> = answer.message().collect();
    Ok(printable(&format!("{} {}", answer.code(), lines.join(" "))))
}

fn credentials(mail: Mail<'_>) -> Result<Option<Credentials>, SendError> {
    let invalid = |text: &str| Err(SendError::Invalid(text.to_owned()));
    match (mail.user, mail.password) {
        (None, _) => Ok(None),
        (Some(_), _) if mail.tls == MailTls::None => {
            invalid("a user name is refused without TLS, because the password would be sent in clear text")
        }
        (Some(_), None) => invalid("the channel has a user name and no password"),
        (Some(user), Some(password)) => Ok(Some(Credentials::new(user.to_owned(), password.to_owned()))),
    }
}

async fn connect(
    sender: &Sender,
    mail: Mail<'_>,
    addresses: &[SocketAddr],
    hello: &ClientId,
) -> Result<AsyncSmtpConnection, SendError> {
    let tls = match mail.tls {
        MailTls::Tls => Some(sender.trust.for_mail(&mail.server.host)?),
        MailTls::Starttls | MailTls::None => None,
    };
    let mut last = SendError::Timeout;
    for &address in addresses {
        let connection =
            AsyncSmtpConnection::connect_tokio1(address, Some(CONNECT_LIMIT), hello, tls.clone(), None);
        match connection.await {
            Ok(connection) => return Ok(connection),
            Err(error) => {
                last = SendError::Connect {
                    address: address.to_string(),
                    reason: describe(&error),
                }
            }
        }
    }
    Err(last)
}

fn message(mail: Mail<'_>, content: &Content, text: String) -> Result<Message, SendError> {
    let id = format!("<{}@{}>", content.message.id, domain(mail.from));
    let subject: String = content
        .subject()
        .chars()
        .filter(|letter| !letter.is_control())
        .take(MAX_SUBJECT)
        .collect();
    let mut message = Message::builder()
        .from(mailbox(mail.from)?)
        .message_id(Some(id))
        .subject(subject)
        .date_now()
        .raw_header(header("Auto-Submitted", "auto-generated"))
        .raw_header(header("X-Vmwatch-Message-Id", content.message.id.as_str()));
    if let [alert] = content.alerts.as_slice() {
        // Programs for e-mail show all messages about an alert as one thread.
        message = message.references(format!("<alert.{}@{}>", alert.id, domain(mail.from)));
    }
    for to in mail.to {
        message = message.to(mailbox(to)?);
    }
    let message = message.singlepart(SinglePart::plain(text));
    message.map_err(|error| SendError::Invalid(error.to_string()))
}

fn header(name: &'static str, value: &str) -> HeaderValue {
    HeaderValue::new(HeaderName::new_from_ascii_str(name), value.to_owned())
}

fn mailbox(address: &EmailAddress) -> Result<Mailbox, SendError> {
    let text = address.as_str();
    let parsed: Result<Address, _> = text.parse();
    let parsed = parsed.map_err(|error| SendError::Invalid(format!("the address {text}: {error}")))?;
    Ok(Mailbox::new(None, parsed))
}

/// The domain of an address, which is also the name that the service gives itself at the SMTP server.
fn domain(address: &EmailAddress) -> &str {
    address
        .as_str()
        .rsplit_once('@')
        .map_or("localhost", |(_, domain)| domain)
}

fn failed(error: &Error) -> SendError {
    if error.status().is_some() {
        SendError::Refused(describe(error))
    } else {
        SendError::Interrupted(describe(error))
    }
}

/// The error with the server's answer, on one line.
fn describe(error: &Error) -> String {
    printable(&error.to_string())
}
