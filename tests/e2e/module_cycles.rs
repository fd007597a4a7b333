//! Checks that the top-level modules of metrics-svc do not import each other in cycles.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

type Imports = BTreeMap<String, BTreeSet<String>>;

/// The modules that the source text imports outside of its tests: the names after `crate::`.
fn imported(text: &str) -> BTreeSet<String> {
    let text = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
    let code: String = text
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default())
        .collect();
    let mut found = BTreeSet::new();
    for rest in code.split("crate::").skip(1) {
        let Some(group) = rest.strip_prefix('{') else {
            found.insert(name(rest));
            continue;
        };
        // The names of a group that are not inside an inner group.
        let (mut depth, mut item) = (0, String::new());
        for char in group.chars() {
            match char {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => {
                    found.insert(name(item.trim()));
                    item.clear();
                }
                _ if depth == 0 => item.push(char),
                _ => {}
            }
        }
        found.insert(name(item.trim()));
    }
    found.remove("");
    found
}

/// The identifier at the beginning of a text.
fn name(text: &str) -> String {
    text.chars()
        .take_while(|char| char.is_ascii_alphanumeric() || *char == '_')
        .collect()
}

/// Adds the imports of the files in a folder, to its module or, at the top, to those of the files.
fn read(folder: &Path, module: Option<&str>, imports: &mut Imports) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let stem = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let of = module.unwrap_or(&stem);
        if path.is_dir() {
            read(&path, Some(of), imports);
        } else if !matches!(of, "lib" | "main") && stem != "tests" {
            let text = fs::read_to_string(&path).unwrap();
            imports.entry(of.to_owned()).or_default().extend(imported(&text));
        }
    }
}

/// Removes modules that import no other module, until only those in cycles, and those that import them, are left.
fn in_cycles(mut imports: Imports) -> Imports {
    loop {
        let names: BTreeSet<_> = imports.keys().cloned().collect();
        for (module, others) in &mut imports {
            others.retain(|other| other != module && names.contains(other));
        }
        imports.retain(|_, others| !others.is_empty());
        if imports.len() == names.len() {
            return imports;
        }
    }
}

#[test]
fn modules_of_metrics_svc_do_not_import_each_other_in_cycles() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../metrics-svc/src");
    let mut imports = Imports::new();
    read(&source, None, &mut imports);
    assert!(
        imports.len() > 20 && imports["store"].contains("blocks"),
        "{imports:?}"
    );
    let cycles = in_cycles(imports);
    assert!(
        cycles.is_empty(),
        "these modules are in a cycle, or import one that is: {cycles:#?}"
    );
}

#[test]
fn cycle_of_imports_is_found() {
    let imports = |text| imported(text).into_iter().collect::<Vec<_>>();
    let group = "use crate::{\n    MetricsError,\n    blocks::{self, x::{y, z}},\n    store::RowStore, // crate::comment\n};";
    assert_eq!(imports(group), ["MetricsError", "blocks", "store"]);
    assert_eq!(imports("fn a() { crate::reads::b() }"), ["reads"]);
    let of = |pairs: &[(&str, &str)]| {
        let mut imports = Imports::new();
        for (from, to) in pairs {
            imports
                .entry((*from).to_owned())
                .or_default()
                .insert((*to).to_owned());
            imports.entry((*to).to_owned()).or_default();
        }
        in_cycles(imports).into_keys().collect::<Vec<_>>()
    };
    assert!(of(&[("a", "b"), ("b", "c"), ("a", "c")]).is_empty());
    assert_eq!(
        of(&[("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")]),
        ["a", "b", "c"]
    );
}
