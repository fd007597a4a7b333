//! Makes the text of a command line that the agent may report: short and without secrets.
//!
//! A secret is recognised by the word before it. In any argument but the first, everything after one of the words in
//! [`WORDS`] (in any case, also as part of a longer word) is replaced if an equals sign, a colon, a quotation mark or a
//! space follows the word; if the argument ends with the word, the next argument is replaced. User and password of a URL
//! are replaced as well. docs/agent.md documents this rule for users.

/// Maximum length of a reported command line in bytes.
const MAX_BYTES: usize = 512;
/// The words that announce a secret.
const WORDS: [&str; 6] = ["pass", "token", "secret", "key", "auth", "cred"];
const HIDDEN: &str = "***";

/// Converts the content of `/proc/<pid>/cmdline`; `None` if it is empty, as that of kernel threads.
pub(super) fn reported(cmdline: &[u8]) -> Option<String> {
    let cmdline = cmdline.strip_suffix(b"\0").unwrap_or(cmdline);
    if cmdline.is_empty() {
        return None;
    }
    let mut line = String::new();
    let mut hide_next = false;
    for (position, argument) in cmdline.split(|&byte| byte == 0).enumerate() {
        if line.len() > MAX_BYTES {
            break;
        }
        let argument = String::from_utf8_lossy(argument);
        if position > 0 {
            line.push(' ');
        }
        if hide_next {
            line.push_str(HIDDEN);
            hide_next = false;
            continue;
        }
        let public = without_credentials(&argument);
        if position == 0 {
            line.push_str(&public);
            continue;
        }
        let secrets = Secrets::of(&public);
        hide_next = secrets.next;
        line.push_str(public.get(..secrets.after).unwrap_or(&public));
        if secrets.after < public.len() {
            line.push_str(HIDDEN);
        }
    }
    line.truncate(line.floor_char_boundary(MAX_BYTES));
    Some(line)
}

/// The secrets that an argument announces.
struct Secrets {
    /// Everything from this byte of the argument on is secret; its length if nothing is.
    after: usize,
    /// Whether the next argument is secret.
    next: bool,
}

impl Secrets {
    fn of(argument: &str) -> Self {
        let lower = argument.to_ascii_lowercase();
        let mut secrets = Self {
            after: argument.len(),
            next: false,
        };
        for word in WORDS {
            for (start, _) in lower.match_indices(word) {
                let rest = lower.get(start + word.len()..).unwrap_or_default();
                let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
                let rest = rest.trim_start_matches(is_name);
                match rest.chars().next() {
                    None => secrets.next = true,
                    Some(c) if matches!(c, '=' | ':' | '"' | '\'') || c.is_ascii_whitespace() => {
                        secrets.after = secrets.after.min(argument.len() - rest.len() + 1);
                    }
                    Some(_) => {}
                }
            }
        }
        secrets
    }
}

/// Replaces user and password in URLs, such as `postgres://user:password@host/`.
fn without_credentials(argument: &str) -> String {
    let mut public = String::new();
    let mut rest = argument;
    while let Some((scheme, after)) = rest.split_once("://") {
        public.push_str(scheme);
        public.push_str("://");
        let end = after
            .find(|c: char| matches!(c, '/' | '?' | '#') || c.is_whitespace())
            .unwrap_or(after.len());
        let (authority, further) = after.split_at(end);
        if let Some((_, host)) = authority.rsplit_once('@') {
            public.push_str(HIDDEN);
            public.push('@');
            public.push_str(host);
        } else {
            public.push_str(authority);
        }
        rest = further;
    }
    public.push_str(rest);
    public
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn line(arguments: &[&str]) -> String {
        reported(format!("{}\0", arguments.join("\0")).as_bytes()).unwrap()
    }

    #[test]
    fn secrets_are_removed_from_command_lines() {
        for (arguments, expected) in [
            (&["nginx", "-g", "daemon off;"] as &[_], "nginx -g daemon off;"),
            (&["app", "--password=hunter2"], "app --password=***"),
            (
                &["app", "--db-password", "hunter2", "-v"],
                "app --db-password *** -v",
            ),
            (&["app", "--PASSWORD", "hunter2"], "app --PASSWORD ***"),
            (&["app", "DB_PASSWORD_FILE=/run/x"], "app DB_PASSWORD_FILE=***"),
            (&["app", "password:hunter2"], "app password:***"),
            (
                &["app", "--token", "abc", "--secret=d"],
                "app --token *** --secret=***",
            ),
            (&["sh", "-c", "a --key=b --token", "abc"], "sh -c a --key=*** ***"),
            (
                &["curl", "-H", "Authorization: Bearer abc", "https://x/"],
                "curl -H Authorization:*** https://x/",
            ),
            (
                &["curl", "https://x/?token=abc&user=me"],
                "curl https://x/?token=***",
            ),
            (
                &["psql", "postgres://me:hunter2@db/x?y=1"],
                "psql postgres://***@db/x?y=1",
            ),
            (
                &["git", "clone", "https://me:p@ss@host/x"],
                "git clone https://***@host/x",
            ),
            (
                &["sh", "-c", "mysql --password hunter2 --user me"],
                "sh -c mysql --password ***",
            ),
            (
                &["app", r#"{"password": "hunter2", "user": "me"}"#],
                r#"app {"password"***"#,
            ),
            // The name of a program is no announcement, and neither is the name of a file.
            (&["ssh-keygen", "-t", "rsa"], "ssh-keygen -t rsa"),
            (
                &["nginx", "/etc/keys/server.conf", "on"],
                "nginx /etc/keys/server.conf on",
            ),
        ] {
            assert_eq!(line(arguments), expected);
        }
        assert_eq!(reported(b""), None);
        assert_eq!(reported(b"kernel \xff\0"), Some("kernel \u{fffd}".to_owned()));
    }

    #[test]
    fn long_command_line_is_cut() {
        let long = "语".repeat(400);
        let cut = line(&["app", &long]);
        assert!(cut.len() > MAX_BYTES - 4 && cut.len() <= MAX_BYTES);
        assert!(cut.starts_with("app 语"));
    }

    proptest! {
        #[test]
        fn announced_secret_is_never_reported(
            before in "[a-z =:/@-]{0,20}", word in "(Password|token|SECRET|api_key)", separator in "[=: ]",
        ) {
            let reported = line(&["app", &format!("{before}{word}{separator}hunter2")]);
            prop_assert!(!reported.contains("hunter2"), "{}", reported);
            let reported = line(&["app", &format!("{before}{word}"), "hunter2"]);
            prop_assert!(!reported.contains("hunter2"), "{}", reported);
        }

        #[test]
        fn any_command_line_is_reported_within_the_limit(cmdline in proptest::collection::vec(any::<u8>(), 0..2000)) {
            prop_assert!(reported(&cmdline).unwrap_or_default().len() <= MAX_BYTES);
        }
    }
}
