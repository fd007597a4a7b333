//! Prints the space that rows take as text. On a terminal, headings are bold and problems red.

use std::fmt::Write as _;

use console::style;
use indicatif::{HumanBytes, HumanCount};

use super::Usage;

pub(super) fn of(usage: &Usage) -> String {
    let mut text = String::new();
    // Writing to a text cannot fail.
    let _ = write(&mut text, usage);
    text
}

fn write(text: &mut String, usage: &Usage) -> std::fmt::Result {
    let heading = |words: String| style(words).bold().to_string();
    let columns = format!(
        "{:<16}  {:>5}  {:>14}  {:>18}  {:>12}  {:>13}",
        "ROWS", "LEVEL", "DOCUMENTS", "ROWS", "SIZE", "BYTES PER ROW"
    );
    writeln!(text, "{}", heading(columns))?;
    for blocks in &usage.blocks {
        writeln!(
            text,
            "{:<16}  {:>5}  {:>14}  {:>18}  {:>12}  {:>13.2}",
            blocks.kind,
            blocks.level,
            count(blocks.documents),
            count(blocks.rows),
            size(blocks.bytes),
            blocks.bytes_per_row
        )?;
    }
    let line = |text: &mut String, name: &str, documents: u64, bytes: u64| {
        let (documents, bytes) = (count(documents), size(bytes));
        writeln!(
            text,
            "{name:<16}  {:>5}  {documents:>14}  {:>18}  {bytes:>12}",
            "", ""
        )
    };
    let names = usage.process_names;
    line(text, "process names", names.documents, names.bytes)?;
    let documents = usage.blocks.iter().map(|blocks| blocks.documents).sum::<u64>() + names.documents;
    line(text, "total", documents, usage.bytes)?;

    let columns = format!(
        "\n{:<64}  {:>18}  {:>12}",
        format!("LARGEST OF {} VMS", usage.vms),
        "ROWS",
        "SIZE"
    );
    writeln!(text, "{}", heading(columns))?;
    for vm in &usage.largest_vms {
        writeln!(
            text,
            "{:<64}  {:>18}  {:>12}",
            vm.instance_id,
            count(vm.rows),
            size(vm.bytes)
        )?;
    }
    writeln!(text)?;
    write_state(text, usage)
}

fn write_state(text: &mut String, usage: &Usage) -> std::fmt::Result {
    let flat = usage.flat_rows;
    if flat.vm + flat.process > 0 {
        writeln!(
            text,
            "flat rows left: {} of VMs, {} of processes; `compact-flat` moves them into blocks",
            count(flat.vm),
            count(flat.process)
        )?;
    }
    let undated = usage.undated_blocks;
    if undated.documents > 0 {
        writeln!(
            text,
            "blocks without a date: {} ({}), which never expire; `backfill-dates` dates them",
            count(undated.documents),
            size(undated.bytes)
        )?;
    }
    let unreadable = &usage.unreadable;
    if !unreadable.checked {
        writeln!(text, "unreadable blocks: not checked")?;
    } else if unreadable.blocks == 0 {
        writeln!(text, "unreadable blocks: none")?;
    } else {
        let reasons = unreadable.by_reason.iter();
        let reasons: Vec<_> = reasons
            .map(|(reason, blocks)| format!("{} {reason}", count(*blocks)))
            .collect();
        let words = format!("unreadable blocks: {}", reasons.join(", "));
        writeln!(text, "{}", style(words).red())?;
        for block in &unreadable.first {
            writeln!(text, "  {} of {}: {}", block.id, block.instance_id, block.reason)?;
        }
        let more = unreadable.blocks - unreadable.first.len() as u64;
        if more > 0 {
            writeln!(text, "  and {} more", count(more))?;
        }
    }
    let growth = usage.growth;
    write!(
        text,
        "growth: {} per day at the rate of the last 24 hours, until expired rows make room at {} in all",
        size(growth.bytes_per_day),
        size(growth.final_bytes)
    )?;
    if let Some(disk) = usage.disk {
        write!(text, "\ndisk of {}: ", size(disk.bytes))?;
        match disk.days_left {
            Some(days) => write!(text, "{} days until it is full", count(days))?,
            None => write!(text, "large enough at this rate")?,
        }
    }
    Ok(())
}

fn count(number: u64) -> String {
    HumanCount(number).to_string()
}

fn size(bytes: u64) -> String {
    HumanBytes(bytes).to_string()
}
