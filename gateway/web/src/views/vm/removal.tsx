//! Removal of a decommissioned VM by an administrator, confirmed by its name.
import { useState } from "preact/hooks";
import { api, ask, may, type Vm } from "../../api/client";
import { t } from "../../i18n";
import { FormDialog } from "../../parts/dialog";
import { go } from "../../router";

export function Removal({ vm, name }: { vm: Vm; name: string }) {
  const texts = t().removal;
  const [open, setOpen] = useState(false);
  if (!may("admin")) return null;
  const act = async (form: FormData) => {
    const params = { path: { instance_id: vm.instance_id }, query: { name: String(form.get("name")) } };
    await ask(api.DELETE("/api/v1/vms/{instance_id}", { params }));
    go("/");
  };
  return (
    <>
      <button type="button" class="remove-vm" onClick={() => setOpen(true)}>{texts.open}</button>
      {open && (
        <FormDialog title={texts.title(name)} submit={texts.submit} dangerous act={act} close={() => setOpen(false)}>
          <p>{texts.text}</p>
          <p class="faint">{texts.again}</p>
          <label>
            {texts.confirm(name)}
            <input
              name="name" autocomplete="off" autocapitalize="none" spellcheck={false} required
              onInput={(event) => {
                const input = event.currentTarget;
                input.setCustomValidity(input.value === name ? "" : texts.wrong);
              }}
            />
          </label>
        </FormDialog>
      )}
    </>
  );
}
