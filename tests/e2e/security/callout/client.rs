//! Enrolled agents: their records in the KV bucket, and their logins.

use async_nats::jetstream::kv::Store;
use data_encoding::BASE64URL_NOPAD;
use nkeys::KeyPair;
use serde_json::{Value, json};
use testkit::{Stack, agent_record};
use vmwatch_api::{
    Service,
    enrollment::{AGENT_BUCKET, AgentRecord},
};
use vmwatch_bus::provision::{BucketConfig, ensure_stream};

use super::super::guest::raw::Raw;

/// An agent and its connection.
pub(in crate::security) struct Agent {
    pub(in crate::security) vm: String,
    pub(in crate::security) key: KeyPair,
    pub(in crate::security) raw: Raw,
}

impl Agent {
    /// Enrols an agent of this VM.
    pub(in crate::security) async fn enrolled(stack: &Stack, vm: &str) -> Self {
        Self {
            vm: vm.to_owned(),
            key: stack.enrol(vm).await,
            raw: Raw::open(stack.nats.url()).await,
        }
    }

    /// An agent of this VM that is enrolled and has logged in.
    pub(in crate::security) async fn logged_in(stack: &Stack, vm: &str) -> Self {
        let mut agent = Self::enrolled(stack, vm).await;
        agent.log_in(stack.nats.url()).await;
        agent
    }

    /// A second agent with the same key, as in a clone of the VM.
    pub(in crate::security) async fn cloned(&self, stack: &Stack) -> Self {
        Self {
            vm: self.vm.clone(),
            key: self.key.clone(),
            raw: Raw::open(stack.nats.url()).await,
        }
    }

    pub(in crate::security) async fn log_in(&mut self, url: &str) {
        let output = self.try_log_in(url).await;
        assert!(output.contains("PONG"), "{output}");
    }

    /// Connects and logs in; returns what the server sends.
    pub(super) async fn try_log_in(&mut self, url: &str) -> String {
        self.raw = Raw::open(url).await;
        let key = &self.key;
        let options = |nonce: &str| json!({ "nkey": key.public_key(), "sig": signature(key, nonce) });
        login(&mut self.raw, &options).await
    }

    /// A subject at which the agent may receive replies.
    pub(in crate::security) fn inbox(&self, name: &str) -> String {
        format!("_INBOX_{}.{name}", self.key.public_key())
    }
}

/// Logs in with the options that this function returns for the server's nonce. Returns what the server sends.
pub(super) async fn login(raw: &mut Raw, options: &dyn Fn(&str) -> Value) -> String {
    let nonce = nonce(raw).await;
    let mut all = json!({
        "verbose": false, "pedantic": false, "headers": true, "no_responders": true, "protocol": 1,
        "lang": "raw", "version": "0",
    });
    for (name, value) in options(&nonce).as_object().unwrap() {
        all[name] = value.clone();
    }
    raw.send(format!("CONNECT {all}\r\n").as_bytes()).await;
    raw.settle().await
}

/// Reads the text that a client must sign to log in.
pub(super) async fn nonce(raw: &mut Raw) -> String {
    let output = raw.settle_until("\r\n").await;
    let info = output.strip_prefix("INFO ").unwrap();
    let info: Value = serde_json::from_str(info.lines().next().unwrap()).unwrap();
    info["nonce"].as_str().unwrap().to_owned()
}

pub(super) fn signature(key: &KeyPair, nonce: &str) -> String {
    BASE64URL_NOPAD.encode(&key.sign(nonce.as_bytes()).unwrap())
}

/// Creates the KV bucket of agents, if auth-svc has not created it.
pub(super) async fn make_bucket(stack: &Stack) {
    let bucket = BucketConfig {
        name: AGENT_BUCKET,
        description: "enrolled agents",
        max_age: std::time::Duration::ZERO,
        max_bytes: 64 << 20,
        replicas: 1,
    };
    let made = ensure_stream(&stack.bus, Service::Auth, &bucket.into()).await;
    made.unwrap();
}

pub(super) async fn bucket(stack: &Stack) -> Store {
    let jetstream = stack.bus.jetstream_for_tests();
    jetstream.get_key_value(AGENT_BUCKET).await.unwrap()
}

/// Marks the key of an agent as revoked.
pub(super) async fn revoke(stack: &Stack, vm: &str, key: &KeyPair) {
    let record = AgentRecord {
        revoked_at_ms: Some(2),
        ..agent_record(key)
    };
    stack.put_agent(vm, &record).await;
}

/// Deletes the record of an agent.
pub(super) async fn remove(stack: &Stack, vm: &str) {
    bucket(stack).await.delete(vm).await.unwrap();
}
