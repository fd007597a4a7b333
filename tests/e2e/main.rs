//! End-to-end tests, with one module per topic. They run real servers and the real programs, which the crate `testkit`
//! starts.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a panic fails the test"
)]

mod agent;
mod agent_faults;
mod alerts;
mod api;
mod api_tokens;
mod audit;
mod bad_input;
mod blocks;
mod bus;
mod cli;
mod clocks;
mod compaction;
mod dependencies;
mod documents;
mod enrolled_agent;
mod enrollment;
mod extension;
mod faults;
mod golden;
mod guest;
mod history;
mod history_support;
mod hung_start;
mod hypervisor_answers;
mod hypervisor_samples;
mod ingest;
mod ingest_agents;
mod ingest_database;
mod ingest_rates;
mod ingest_refusals;
mod ingest_retention;
mod ingest_retention_rules;
mod ingest_support;
mod large_reads;
mod latest;
mod live_events;
mod marks;
mod module_cycles;
mod newest;
mod old_rows;
mod page;
mod pages;
mod permissions;
mod process_changes;
mod process_names;
mod process_search;
mod process_top;
mod processes;
mod prometheus;
mod python_repr;
mod rest;
mod rows;
mod sample_forms;
mod security;
mod sessions;
mod setup;
mod startup;
mod traces;
mod versions;
mod vm_list;
