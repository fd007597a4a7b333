//! Calls methods of services over NATS.

use async_nats::{PublishErrorKind, StatusCode};
use bytes::Bytes;
use tracing::{Instrument, info_span};
use vmwatch_api::{
    Method, MethodInfo,
    wire::{Envelope, Fault, FaultKind},
};
use vmwatch_service::telemetry::TRACES_ONLY;

use super::{Bus, Context, replies::NoReply};

impl Bus {
    /// Calls a method of a service and decodes the reply.
    pub async fn call<M: Method>(&self, context: &Context, params: &M::Params) -> Result<M::Reply, Fault> {
        let body = serde_json::to_vec(params).map_err(|error| {
            Fault::new(FaultKind::Internal, "the request could not be encoded").caused_by(error)
        })?;
        let reply = self.forward(&M::INFO, context, body.into()).await?;
        let envelope: Envelope<M::Reply> = serde_json::from_slice(&reply).map_err(|error| {
            Fault::new(
                FaultKind::Internal,
                "the service sent a reply that cannot be decoded",
            )
            .caused_by(error)
        })?;
        envelope.into_result()
    }

    /// Sends already encoded parameters to a method and returns the encoded [`Envelope`].
    ///
    /// The deadline in the context limits the wait in every state of the connection. The NATS client's own time-out
    /// would start only once the request is queued.
    pub async fn forward(
        &self,
        method: &MethodInfo,
        context: &Context,
        params: Bytes,
    ) -> Result<Bytes, Fault> {
        // While the bus is disconnected, requests fail immediately: a queued request would be delivered after the
        // reconnection, when its caller has given up.
        if !self.is_connected() {
            return Err(Fault::new(
                FaultKind::Unavailable,
                "the message bus is unreachable; try again shortly",
            ));
        }
        let span = info_span!(
            target: TRACES_ONLY,
            "call",
            otel.name = method.subject,
            otel.kind = "client",
            rpc.system = "nats",
            rpc.service = method.service.name(),
            rpc.method = method.subject,
        );
        let headers = context.to_headers(&span);
        let sent = self
            .replies
            .request(&self.client, method.full_subject().into(), headers, params)
            .instrument(span);
        match tokio::time::timeout(context.remaining(), sent).await {
            Ok(Ok(message)) if message.status == Some(StatusCode::NO_RESPONDERS) => Err(Fault::new(
                FaultKind::Unavailable,
                format!(
                    "no {} answers at the moment; try again shortly",
                    method.service.name()
                ),
            )),
            Ok(Ok(message)) => Ok(message.payload),
            Ok(Err(NoReply::NotSent(error))) if error.kind() == PublishErrorKind::MaxPayloadExceeded => {
                Err(Fault::new(FaultKind::Invalid, "the request is too large").caused_by(error))
            }
            Ok(Err(error)) => Err(Fault::new(
                FaultKind::Unavailable,
                "the message bus failed; try again shortly",
            )
            .caused_by(error)),
            Err(_) => Err(late()),
        }
    }
}

/// The fault for a request whose deadline has passed.
pub(super) fn late() -> Fault {
    Fault::new(
        FaultKind::Timeout,
        "the deadline passed before the service answered",
    )
}
