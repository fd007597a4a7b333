//! Embeds the web page's files from `web/dist` (written by `./dev`) into the gateway, plain and gzipped. If the web
//! page was not built, the table is empty and the gateway answers `/` with a text that explains how to build it.

use std::{
    env,
    fmt::Write as _,
    fs, io,
    path::{Path, PathBuf},
};

fn main() -> io::Result<()> {
    let web = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default()).join("web");
    let dist = web.join("dist");
    // Watch `dist` only if it exists: cargo reruns a build script every time if a watched path is missing.
    let watched = if dist.is_dir() { &dist } else { &web };
    println!("cargo::rerun-if-changed={}", watched.display());
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    let mut table = String::from("&[\n");
    for (index, path) in files(&dist)?.iter().enumerate() {
        // Embed copies of the files, because the page may be rebuilt while the gateway is compiled.
        fs::copy(path, out.join(format!("page_{index}")))?;
        fs::copy(packed(path), out.join(format!("page_{index}.gz")))?;
        let name = path.strip_prefix(&dist).map_err(io::Error::other)?.display();
        let include =
            |suffix| format!("include_bytes!(concat!(env!(\"OUT_DIR\"), \"/page_{index}{suffix}\"))");
        let (plain, gzip) = (include(""), include(".gz"));
        let _ = writeln!(
            table,
            "File {{ path: \"/{name}\", plain: {plain}, gzip: {gzip} }},"
        );
    }
    table.push(']');
    fs::write(out.join("page_files.rs"), table)
}

fn packed(path: &Path) -> PathBuf {
    PathBuf::from(format!("{}.gz", path.display()))
}

/// All files in the folder that have a `.gz` next to them. The web page's build writes the `.gz` files last, so a file
/// without one belongs to an unfinished build.
fn files(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    if !folder.is_dir() {
        return Ok(found);
    }
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(files(&path)?);
        } else if packed(&path).is_file() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}
