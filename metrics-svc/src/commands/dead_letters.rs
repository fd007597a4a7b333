//! `vmwatch-metrics dead-letters` lists, replays or discards dead letters, which are samples that were refused.

use std::{io::Write as _, time::Duration};

use async_nats::{HeaderMap, jetstream::message::StreamMessage};
use serde::Serialize;
use vmwatch_api::{
    Service,
    hypervisor_samples::HYPERVISOR_SAMPLE_SUBJECT_PREFIX,
    metrics::{CONTENT_TYPE, DEAD_LETTER_STREAM, DEAD_LETTER_SUBJECT_PREFIX},
};
use vmwatch_bus::{Bus, audit::Audit, jetstream::JetStreamError};

use super::{DeadLettersCommand, Selection, announce::announced};
use crate::{MetricsError, config::MetricsSettings, ingest::dead_letter};

/// Deadline of a JetStream request. JetStream normally answers within milliseconds.
const DEADLINE: Duration = Duration::from_secs(5);

pub(super) async fn run(command: DeadLettersCommand, settings: &MetricsSettings) -> Result<(), MetricsError> {
    let bus = Bus::connect(
        &format!("{}-dead-letters", Service::Metrics.name()),
        &settings.bus,
    )
    .await?;
    let audit = Audit::new(&bus, settings.audit_required);
    let audit = Some(&audit);
    let detail = |selection: &Selection| format!("dead letters {selection}");
    let done = match command {
        DeadLettersCommand::List { json } => return list(&bus, json).await,
        DeadLettersCommand::Replay(selection) => {
            let replay = replay(&bus, &selection);
            announced(audit, "metrics.dead_letters.replay", detail(&selection), replay).await?
        }
        DeadLettersCommand::Discard(selection) => {
            let discard = discard(&bus, &selection);
            announced(audit, "metrics.dead_letters.discard", detail(&selection), discard).await?
        }
    };
    println!("{done}");
    Ok(())
}

async fn replay(bus: &Bus, selection: &Selection) -> Result<String, MetricsError> {
    let mut done = 0;
    for letter in select(bus, selection).await? {
        let Some(subject) = header(&letter, dead_letter::SUBJECT) else {
            eprintln!("dead letter {} has no original subject; skipped", letter.sequence);
            continue;
        };
        if subject.starts_with(HYPERVISOR_SAMPLE_SUBJECT_PREFIX) {
            eprintln!(
                "dead letter {} was measured by a hypervisor, and only lifecycle-svc may publish such samples; \
                 skipped, discard it",
                letter.sequence
            );
            continue;
        }
        let mut headers = HeaderMap::new();
        if let Some(content_type) = header(&letter, CONTENT_TYPE) {
            headers.insert(CONTENT_TYPE, content_type);
        }
        let payload = letter.payload.clone();
        let stored = bus.publish_stored(subject.to_owned(), headers, payload, DEADLINE);
        stored.await.map_err(failed)?;
        delete(bus, &letter).await?;
        done += 1;
    }
    Ok(format!("replayed {done} samples"))
}

async fn discard(bus: &Bus, selection: &Selection) -> Result<String, MetricsError> {
    let letters = select(bus, selection).await?;
    for letter in &letters {
        delete(bus, letter).await?;
    }
    Ok(format!("discarded {} samples", letters.len()))
}

async fn delete(bus: &Bus, letter: &StreamMessage) -> Result<(), MetricsError> {
    let deleting = bus.delete_message(DEAD_LETTER_STREAM, letter.sequence, DEADLINE);
    deleting.await.map_err(failed)
}

fn failed(error: JetStreamError) -> MetricsError {
    match error {
        JetStreamError::Timeout => {
            MetricsError::Refused("the NATS server does not answer; check VMWATCH_NATS_URL".to_owned())
        }
        error => MetricsError::jetstream(error),
    }
}

fn header<'a>(letter: &'a StreamMessage, name: &str) -> Option<&'a str> {
    letter.headers.get(name).map(async_nats::HeaderValue::as_str)
}

/// Reads the first dead letter whose sequence number is `from` or greater.
async fn next(bus: &Bus, from: u64) -> Result<Option<StreamMessage>, MetricsError> {
    let all = format!("{DEAD_LETTER_SUBJECT_PREFIX}>");
    let found = bus.next_message(DEAD_LETTER_STREAM, from, &all, DEADLINE).await;
    found.map_err(failed)
}

async fn select(bus: &Bus, selection: &Selection) -> Result<Vec<StreamMessage>, MetricsError> {
    let mut letters = Vec::new();
    if selection.all {
        let mut from = 1;
        while let Some(letter) = next(bus, from).await? {
            from = letter.sequence + 1;
            letters.push(letter);
        }
        return Ok(letters);
    }
    for &number in &selection.numbers {
        match next(bus, number).await? {
            Some(letter) if letter.sequence == number => letters.push(letter),
            _ => {
                return Err(MetricsError::Refused(format!(
                    "there is no dead letter with the number {number}; nothing was done"
                )));
            }
        }
    }
    Ok(letters)
}

#[derive(Serialize)]
struct Listed<'a> {
    number: u64,
    refused: String,
    subject: &'a str,
    bytes: usize,
    reason: &'a str,
}

async fn list(bus: &Bus, json: bool) -> Result<(), MetricsError> {
    let mut out = std::io::stdout().lock();
    let mut from = 1;
    while let Some(letter) = next(bus, from).await? {
        let listed = Listed {
            number: letter.sequence,
            refused: letter.time.to_string(),
            subject: header(&letter, dead_letter::SUBJECT).unwrap_or("-"),
            bytes: letter.payload.len(),
            reason: header(&letter, dead_letter::REASON).unwrap_or("-"),
        };
        if json {
            serde_json::to_writer(&mut out, &listed)?;
            writeln!(out)?;
        } else {
            if from == 1 {
                writeln!(
                    out,
                    "{:>8}  {:24}  {:>8}  {:44}  REASON",
                    "NUMBER", "REFUSED", "BYTES", "SUBJECT"
                )?;
            }
            let Listed {
                number,
                refused,
                subject,
                bytes,
                reason,
            } = &listed;
            writeln!(
                out,
                "{number:>8}  {refused:24.24}  {bytes:>8}  {subject:44}  {reason}"
            )?;
        }
        from = letter.sequence + 1;
    }
    if from == 1 && !json {
        writeln!(out, "there are no dead letters")?;
    }
    Ok(())
}
