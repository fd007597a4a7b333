//! The size of the database's files.

use std::{fs, path::Path};

use testkit::{Database, PATIENCE, Server};

/// Returns the size of the database's tables on disk, without its log and its list of operations. Restarts the database,
/// because that writes everything to the tables.
pub(crate) async fn table_bytes(database: &Database, folder: &Path) -> anyhow::Result<u64> {
    let Server::Process(process) = &database.server else {
        anyhow::bail!("the files of a database in a container cannot be measured");
    };
    process.terminate(PATIENCE).await;
    let mut bytes = 0;
    for file in fs::read_dir(folder.join("database"))? {
        let file = file?;
        let path = file.path();
        let name = file.file_name().to_string_lossy().into_owned();
        if path.extension().is_some_and(|extension| extension == "wt") && !name.contains("oplog") {
            bytes += file.metadata()?.len();
        }
    }
    database.restart().await;
    Ok(bytes)
}
