//! `vmwatch context`.

use serde_json::json;

use crate::{
    args::ContextCommand,
    config::{Config, ConfigFile},
    connection::find_context,
    error::CliError,
    output::{Output, note},
    table::{Cell, Column, Table},
};

pub(crate) fn run(command: &ContextCommand, output: &Output) -> Result<(), CliError> {
    let mut file = ConfigFile::load()?;
    match command {
        ContextCommand::List => list(&file, output),
        ContextCommand::Use { name } => {
            find_context(&file.config, Some(name.as_str()))?;
            file.config.current = Some(name.clone());
            file.save()
        }
        ContextCommand::Remove { name } => {
            find_context(&file.config, Some(name.as_str()))?;
            remove(&mut file.config, name);
            file.save()
        }
    }
}

fn remove(config: &mut Config, name: &str) {
    config.contexts.remove(name);
    if config.current.as_deref() == Some(name) {
        config.current = None;
        note("the current context was removed; choose another one with `vmwatch context use NAME`");
    }
}

fn list(file: &ConfigFile, output: &Output) -> Result<(), CliError> {
    let current = file.config.current.as_deref();
    if output.json {
        // Tokens are not printed.
        let contexts = file.config.contexts.iter().map(|(name, context)| {
            json!({ "name": name, "url": context.url, "current": current == Some(name.as_str()) })
        });
        return output.print_json(&contexts.collect::<Vec<_>>());
    }
    let mut table = Table::new([
        Column::Left(""),
        Column::Left("NAME"),
        Column::Left("URL"),
        Column::Left("TOKEN"),
    ]);
    for (name, context) in &file.config.contexts {
        let token = match (&context.token_file, &context.token) {
            (Some(path), _) => path.display().to_string(),
            (None, Some(_)) => "session".to_owned(),
            (None, None) => "none".to_owned(),
        };
        let mark = if current == Some(name.as_str()) { "*" } else { "" };
        table.row([
            Cell::from(mark),
            Cell::from(name),
            Cell::from(context.url.to_string()),
            Cell::from(token),
        ]);
    }
    let if_empty = format!(
        "{} has no contexts; run `vmwatch login URL`",
        file.path().display()
    );
    output.print_table(&table, &if_empty)
}
