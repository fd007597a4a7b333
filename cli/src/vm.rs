//! Finds the VM that a user has named by id or name.

use vmwatch_api::InstanceId;

use crate::{answers::Vm, client::Client, error::CliError, output::typed};

/// Maximum number of VMs with a similar name that are compared.
const MAX_SIMILAR: usize = 1000;

/// Returns the VM with this id or, if there is none, the only one with exactly this name.
pub(crate) async fn find_vm(client: &Client, given: &str) -> Result<Vm, CliError> {
    if let Ok(id) = given.parse::<InstanceId>() {
        match client.get(&format!("/vms/{id}"), &[]).await {
            Err(CliError::Problem { status: 404, .. }) => {}
            found => return found,
        }
    }
    if given.is_empty() || given.chars().count() > vmwatch_api::vms::MAX_SEARCH {
        return Err(CliError::NoSuchVm(given.to_owned()));
    }
    let query = [("q", Some(given.to_owned()))];
    let similar = client.list("/vms", &query, "vms", MAX_SIMILAR).await?;
    let mut named = typed::<Vm>(similar.items)?;
    named.retain(|vm| vm.name.as_deref() == Some(given));
    match (named.pop(), named.as_slice()) {
        (None, _) => Err(CliError::NoSuchVm(given.to_owned())),
        (Some(vm), []) => Ok(vm),
        (Some(last), others) => {
            let ids = others.iter().chain([&last]).map(|vm| vm.instance_id.as_str());
            let ids = ids.collect::<Vec<_>>().join(", ");
            Err(CliError::Usage(format!(
                "several VMs have the name \"{given}\"; give one of their ids: {ids}"
            )))
        }
    }
}

/// Like [`find_vm`], for filters: returns only the id.
pub(crate) async fn find_id(client: &Client, given: Option<&str>) -> Result<Option<String>, CliError> {
    match given {
        Some(given) => Ok(Some(find_vm(client, given).await?.instance_id.to_string())),
        None => Ok(None),
    }
}
