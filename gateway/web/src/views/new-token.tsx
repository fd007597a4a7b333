//! Dialog that creates an API token and shows it once.
import { useState } from "preact/hooks";
import { api, ask, may, me, type Schemas } from "../api/client";
import { useResource } from "../api/resource";
import { HOUR } from "../format";
import { t } from "../i18n";
import { CopyLine } from "../parts/copy-line";
import { Dialog, problemText } from "../parts/dialog";
import { Grant, grantOf, ROLES } from "./users";

type Access = Schemas["ApiTokenAccess"];

/** For how many days a token may be valid. */
const PERIODS = [1, 7, 30, 90, 365] as const;
const DEFAULT_PERIOD = 30;
const ACCESSES: Access[] = ["full", "read_only", "metrics_only"];

export function CreateToken({ close }: { close: () => void }) {
  const texts = t().tokens;
  const [token, setToken] = useState<string | null>(null);
  if (token === null) {
    return <Dialog title={texts.createTitle} close={close}><Options close={close} done={setToken} /></Dialog>;
  }
  return (
    <Dialog key="created" title={texts.createdTitle} close={close} wide>
      <div class="command">
        <p>{texts.created}</p>
        <CopyLine label={texts.token} text={token} />
        <p class="faint small">{texts.sendAs}</p>
        <div class="buttons"><button type="button" onClick={close}>{t().common.close}</button></div>
      </div>
    </Dialog>
  );
}

function Options({ close, done }: { close: () => void; done: (token: string) => void }) {
  const texts = t().tokens;
  const [busy, setBusy] = useState(false);
  const [problem, setProblem] = useState("");
  const create = async (event: SubmitEvent) => {
    event.preventDefault();
    setBusy(true);
    setProblem("");
    try {
      const body = bodyOf(new FormData(event.target as HTMLFormElement));
      done((await ask(api.POST("/api/v1/tokens", { body }))).token);
    } catch (error) {
      setProblem(problemText(error));
      setBusy(false);
    }
  };
  return (
    <form onSubmit={(event) => void create(event)}>
      <label>
        {texts.name}
        <input name="name" maxLength={128} autocomplete="off" required />
        <span class="faint small">{texts.nameHint}</span>
      </label>
      <label>
        {texts.valid}
        <select name="days">
          {PERIODS.map((days) => (
            <option key={days} value={days} selected={days === DEFAULT_PERIOD}>{texts.periods[days]}</option>
          ))}
        </select>
      </label>
      {may("admin") && <Owner />}
      <fieldset>
        <legend>{texts.accessTitle}</legend>
        {ACCESSES.map((access) => (
          <label key={access} class="option">
            <input type="radio" name="access" value={access} defaultChecked={access === "read_only"} required />
            <span>{texts.access[access]} <span class="faint">– {texts.accessHelp[access]}</span></span>
          </label>
        ))}
      </fieldset>
      <Grant role="viewer" scope="all" roles={ROLES.filter((role) => may(role))} />
      {problem && <p class="problem" role="alert">{problem}</p>}
      <div class="buttons">
        <button type="button" onClick={close}>{t().common.cancel}</button>
        <button type="submit" class="primary" disabled={busy}>{texts.add}</button>
      </div>
    </form>
  );
}

/** Selects the own user or a service account. */
function Owner() {
  const texts = t().tokens;
  const accounts = useResource(async (signal) => {
    const { users } = await ask(api.GET("/api/v1/users", { params: { query: { limit: 1000 } }, signal }));
    return users.filter((user) => user.service_account).map((user) => user.name);
  }, []);
  return (
    <label>
      {texts.owner}
      <select name="owner">
        <option value="">{texts.ownerSelf(me.value?.user_name ?? "")}</option>
        {accounts.data?.map((name) => <option key={name} value={name}>{name}</option>)}
      </select>
    </label>
  );
}

function bodyOf(form: FormData): Schemas["NewApiToken"] {
  const owner = String(form.get("owner") ?? "");
  return {
    name: String(form.get("name")).trim(),
    valid_seconds: (Number(form.get("days")) * 24 * HOUR) / 1000,
    access: ACCESSES.find((access) => access === form.get("access")) ?? "read_only",
    ...grantOf(form),
    ...(owner && { service_account: owner }),
  };
}
