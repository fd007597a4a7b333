//! The settings of the auth callout.

use nkeys::{KeyPair, KeyPairType};
use vmwatch_service::config::{Environment, Invalid, Setting, Value};

use crate::callout::CalloutSettings;

const CALLOUT_NKEY_SEED_FILE: Setting = Setting {
    name: "VMWATCH_CALLOUT_NKEY_SEED_FILE",
    value: Value::File,
    default: "",
    help: "path of the file with the nkey seed (SU…) of auth-svc's user in the system account of NATS; together with VMWATCH_CALLOUT_ISSUER_SEED_FILE it enables the auth callout, which lets enrolled agents log in to NATS",
};
const CALLOUT_ISSUER_SEED_FILE: Setting = Setting {
    name: "VMWATCH_CALLOUT_ISSUER_SEED_FILE",
    value: Value::File,
    default: "",
    help: "path of the file with the nkey seed (SA…) that signs the answers of the auth callout; its public key is the `issuer` in the configuration of NATS",
};

pub(super) const SETTINGS: &[Setting] = &[CALLOUT_NKEY_SEED_FILE, CALLOUT_ISSUER_SEED_FILE];

pub(super) fn callout(env: &Environment) -> Result<Option<CalloutSettings>, Invalid> {
    let nkey_seed = seed(env, &CALLOUT_NKEY_SEED_FILE, &KeyPairType::User);
    let issuer = seed(env, &CALLOUT_ISSUER_SEED_FILE, &KeyPairType::Account);
    match (nkey_seed?, issuer?) {
        (None, None) => Ok(None),
        (Some((nkey_seed, _)), Some((_, issuer))) => Ok(Some(CalloutSettings { nkey_seed, issuer })),
        _ => Err(env.problem(format!(
            "give {} and {} together",
            CALLOUT_NKEY_SEED_FILE.name, CALLOUT_ISSUER_SEED_FILE.name
        ))),
    }
}

/// Reads a file with an nkey seed. The problem does not repeat the content of the file.
fn seed(
    env: &Environment,
    setting: &Setting,
    kind: &KeyPairType,
) -> Result<Option<(String, KeyPair)>, Invalid> {
    let Some(seed) = env.secret_file(setting)? else {
        return Ok(None);
    };
    match KeyPair::from_seed(&seed) {
        Ok(pair) if pair.key_pair_type() == *kind => Ok(Some((seed, pair))),
        _ => Err(env.problem(format!(
            "{}: the file does not contain an nkey seed of the type {kind:?}",
            setting.name
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_keys_of_the_callout_or_neither_must_be_given() {
        let file = |pair: &KeyPair| {
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), format!("{}\n", pair.seed().unwrap())).unwrap();
            file
        };
        let keys = [KeyPair::new_user(), KeyPair::new_account()];
        let seeds = keys.each_ref().map(|pair| pair.seed().unwrap());
        let [user, account] = keys.each_ref().map(file);
        let path = |file: &tempfile::NamedTempFile| file.path().display().to_string();
        let (user, account) = (path(&user), path(&account));
        let read = |nkey: &str, issuer: &str| {
            let env = Environment::from_variables([
                (CALLOUT_NKEY_SEED_FILE.name, nkey),
                (CALLOUT_ISSUER_SEED_FILE.name, issuer),
            ]);
            (
                callout(&env).map(|given| given.is_some()),
                env.problems().concat(),
            )
        };
        assert_eq!(read("", ""), (Ok(false), String::new()));
        assert_eq!(read(&user, &account), (Ok(true), String::new()));
        for (nkey, issuer) in [(user.as_str(), ""), ("", &account), (&account, &user)] {
            let (given, problems) = read(nkey, issuer);
            assert!(
                given.is_err() && problems.contains("VMWATCH_CALLOUT_"),
                "{problems}"
            );
            assert!(!seeds.iter().any(|seed| problems.contains(seed)), "{problems}");
        }
    }
}
