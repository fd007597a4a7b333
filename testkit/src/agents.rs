//! Agents that are enrolled: their records in the KV bucket of agents, and their identity folders.
//!
//! The records are stored as auth-svc stores them, but without a join token. `tests/e2e/enrolled_agent.rs` enrols an agent with
//! a join token at the gateway.

use std::{fs, path::PathBuf};

use nkeys::KeyPair;
use serde_json::json;
use vmwatch_api::enrollment::{AGENT_BUCKET, AgentRecord, Enrolled};
use vmwatch_service::config::UTC_OFFSET;

use crate::{Secrets, Stack};

/// The id of the join token in all records. There is no such token.
const JOIN_TOKEN: &str = "0123456789abcdef";

/// The record of an agent with this key.
pub fn agent_record(key: &KeyPair) -> AgentRecord {
    AgentRecord {
        public_key: key.public_key().parse().expect("the key is one of a user"),
        join_token: JOIN_TOKEN.parse().expect("the id is valid"),
        enrolled_at_ms: 1,
        source: None,
        platform: None,
        revoked_at_ms: None,
        former_keys: Vec::new(),
    }
}

impl Stack {
    /// Stores the record of a VM's agent in the KV bucket of agents.
    pub async fn put_agent(&self, vm: &str, record: &AgentRecord) {
        self.put(AGENT_BUCKET, vm.to_owned(), record).await;
    }

    /// Enrols an agent of this VM, and returns its key.
    pub async fn enrol(&self, vm: &str) -> KeyPair {
        let key = KeyPair::new_user();
        self.put_agent(vm, &agent_record(&key)).await;
        key
    }

    /// Enrols an agent of this VM, and returns the folder with its identity, as `vmwatch-agent enroll` writes it.
    pub async fn identity_of(&self, vm: &str) -> PathBuf {
        let (key, folder) = (self.enrol(vm).await, self.folder().join(format!("identity-{vm}")));
        let ca_file = self.nats.secrets().and_then(Secrets::ca_file);
        let answer = Enrolled {
            instance_id: vm.parse().expect("the instance id is valid"),
            nats_urls: vec![self.nats.url().to_owned()],
            ca_certificates: ca_file.map_or_else(String::new, |file| fs::read_to_string(file).unwrap()),
            utc_offset: UTC_OFFSET.default.parse().expect("the default is valid"),
            vm_interval_ms: 500,
            process_interval_ms: 500,
        };
        let record = json!({
            "instance_id": vm, "public_key": key.public_key(), "join_token": JOIN_TOKEN, "answer": answer,
        });
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("agent.seed"), key.seed().unwrap()).unwrap();
        fs::write(folder.join("enrollment.json"), record.to_string()).unwrap();
        folder
    }
}
