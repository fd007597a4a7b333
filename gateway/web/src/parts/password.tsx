import { api, ask, me } from "../api/client";
import { t } from "../i18n";
import { FormDialog } from "./dialog";

/** Sets a password. Users who change their own must enter the current one. */
export function PasswordDialog({ user, close }: { user: string; close: () => void }) {
  const texts = t().password;
  const own = me.value?.user_name === user;
  const act = async (form: FormData) => {
    const password = String(form.get("new"));
    if (password !== form.get("again")) throw new Error(texts.differ);
    const body = own ? { password, old_password: String(form.get("old")) } : { password };
    await ask(api.PUT("/api/v1/users/{user_name}/password", { params: { path: { user_name: user } }, body }));
  };
  return (
    <FormDialog title={texts.title(user)} submit={t().common.save} act={act} close={close}>
      {own && (
        <label>{texts.old}<input name="old" type="password" autocomplete="current-password" required /></label>
      )}
      <label>{texts.new}<input name="new" type="password" autocomplete="new-password" minLength={8} required /></label>
      <label>{texts.again}<input name="again" type="password" autocomplete="new-password" minLength={8} required /></label>
      <p class="faint">{texts.rule} {t().users.sessionsEnd}</p>
    </FormDialog>
  );
}
