//! View for user management, for administrators.
import { useState } from "preact/hooks";
import { api, ask, type Schemas } from "../api/client";
import { fullTime, ms } from "../format";
import { t, textOf } from "../i18n";
import { Badge } from "../parts/badge";
import { FormDialog } from "../parts/dialog";
import { usePages } from "../parts/pages";
import { PasswordDialog } from "../parts/password";
import { Failed, Loading, Notice } from "../parts/states";

type User = Schemas["User"];
type Role = Schemas["Role"];
type Scope = Schemas["Scope"];

type Open = { kind: "add" } | { kind: "edit" | "password" | "remove"; user: User };

export const ROLES: Role[] = ["viewer", "operator", "admin"];
/** A service account cannot be an administrator. */
const SERVICE_ROLES: Role[] = ["viewer", "operator"];

export function Users() {
  const texts = t().users;
  const [open, setOpen] = useState<Open | null>(null);
  const pages = usePages(async (after: string | undefined, signal) => {
    const query = { limit: 100, ...(after !== undefined && { after }) };
    const { users, next } = await ask(api.GET("/api/v1/users", { params: { query }, signal }));
    return { items: users, next: next ?? undefined };
  }, []);
  const close = () => {
    setOpen(null);
    pages.reload();
  };
  return (
    <>
      <div class="heading">
        <h1 tabIndex={-1}>{texts.title}</h1>
        {pages.loaded && (
          <button type="button" class="primary" onClick={() => setOpen({ kind: "add" })}>{texts.add}</button>
        )}
      </div>
      {!pages.loaded ? (
        pages.failure ? <Failed failure={pages.failure} retry={pages.reload} /> : <Loading />
      ) : pages.items.length === 0 ? (
        <Notice title={texts.emptyTitle}><p>{texts.empty}</p></Notice>
      ) : (
        <UserTable users={pages.items} open={setOpen} />
      )}
      {pages.next !== undefined && (
        <button type="button" class="more" disabled={pages.loading} onClick={pages.more}>{t().common.more}</button>
      )}
      {open?.kind === "add" && <AddDialog close={close} />}
      {open?.kind === "edit" && <EditDialog user={open.user} close={close} />}
      {open?.kind === "password" && <PasswordDialog user={open.user.name} close={close} />}
      {open?.kind === "remove" && <RemoveDialog user={open.user} close={close} />}
    </>
  );
}

function UserTable({ users, open }: { users: User[]; open: (open: Open) => void }) {
  const texts = t().users;
  const { columns } = texts;
  return (
    <table class="users">
      <thead>
        <tr>
          <th scope="col">{columns.name}</th>
          <th scope="col">{columns.role}</th>
          <th scope="col">{columns.scope}</th>
          <th scope="col" class="created">{columns.created}</th>
          <th scope="col"><span class="hidden">{columns.action}</span></th>
        </tr>
      </thead>
      <tbody>
        {users.map((user) => (
          <tr key={user.name} data-user={user.name}>
            <th scope="row">
              {user.name}
              {user.service_account && <Badge tone="quiet">{texts.service}</Badge>}
            </th>
            <td>{textOf(t().role, user.role)}</td>
            <td>{scopeText(user.scope)}</td>
            <td class="created">{fullTime(ms(user.created_at))}</td>
            <td class="act">
              <button type="button" onClick={() => open({ kind: "edit", user })}>{texts.edit}</button>
              {!user.service_account && (
                <button type="button" onClick={() => open({ kind: "password", user })}>{texts.setPassword}</button>
              )}
              <button type="button" onClick={() => open({ kind: "remove", user })}>{texts.remove}</button>
            </td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}

/** A newer version of the gateway may send a scope that is neither. */
export function scopeText(scope: Scope): string {
  const texts = t().users;
  if (scope === "all") return texts.allVms;
  return typeof scope === "object" && scope.only ? texts.someVms(scope.only.length) : t().common.unknown;
}

function AddDialog({ close }: { close: () => void }) {
  const texts = t().users;
  const [service, setService] = useState(false);
  const act = async (form: FormData) => {
    const account = service ? { service_account: true } : { password: String(form.get("password")) };
    const body = { name: String(form.get("name")), ...account, ...grantOf(form) };
    await ask(api.POST("/api/v1/users", { body }));
  };
  return (
    <FormDialog title={texts.addTitle} submit={texts.add} act={act} close={close}>
      <label>
        {texts.name}
        <input name="name" maxLength={128} autocomplete="off" autocapitalize="none" required />
        <span class="faint small">{texts.nameRule}</span>
      </label>
      <label class="option">
        <input type="checkbox" checked={service} onChange={(event) => setService(event.currentTarget.checked)} />
        <span>{texts.service} <span class="faint">– {texts.serviceHint}</span></span>
      </label>
      {!service && (
        <label>
          {t().password.new}
          <input name="password" type="password" autocomplete="new-password" minLength={8} required />
          <span class="faint small">{t().password.rule}</span>
        </label>
      )}
      <Grant role="viewer" scope="all" roles={service ? SERVICE_ROLES : ROLES} />
    </FormDialog>
  );
}

function EditDialog({ user, close }: { user: User; close: () => void }) {
  const act = async (form: FormData) => {
    await ask(api.PATCH("/api/v1/users/{user_name}", { params: { path: { user_name: user.name } }, body: grantOf(form) }));
  };
  return (
    <FormDialog title={t().users.editTitle(user.name)} submit={t().common.save} act={act} close={close}>
      <Grant role={user.role} scope={user.scope} roles={user.service_account ? SERVICE_ROLES : ROLES} />
      <p class="faint">{t().users.sessionsEnd}</p>
    </FormDialog>
  );
}

function RemoveDialog({ user, close }: { user: User; close: () => void }) {
  const texts = t().users;
  const act = async () => {
    await ask(api.DELETE("/api/v1/users/{user_name}", { params: { path: { user_name: user.name } } }));
  };
  return (
    <FormDialog title={texts.removeTitle(user.name)} submit={texts.remove} dangerous act={act} close={close}>
      <p>{texts.removeText}</p>
    </FormDialog>
  );
}

/** Form fields for a role out of `roles` and the VM scope of a user or an API token. */
export function Grant({ role, scope, roles }: { role: Role; scope: Scope; roles: Role[] }) {
  const texts = t().users;
  const [all, setAll] = useState(scope === "all");
  return (
    <>
      <fieldset>
        <legend>{texts.role}</legend>
        {roles.map((one) => (
          <label key={one} class="option">
            <input type="radio" name="role" value={one} defaultChecked={one === role} required />
            <span>{t().role[one]} <span class="faint">– {texts.roleHelp[one]}</span></span>
          </label>
        ))}
      </fieldset>
      <fieldset>
        <legend>{texts.scope}</legend>
        <label class="option">
          <input type="radio" name="scope" value="all" checked={all} onChange={() => setAll(true)} />
          {texts.scopeAll}
        </label>
        <label class="option">
          <input type="radio" name="scope" value="only" checked={!all} onChange={() => setAll(false)} />
          {texts.scopeOnly}
        </label>
        {!all && (
          <textarea
            name="ids" aria-label={texts.scopeIds} placeholder={texts.scopeIds} rows={4} spellcheck={false}
            defaultValue={typeof scope === "object" ? scope.only.join("\n") : ""}
          />
        )}
      </fieldset>
    </>
  );
}

export function grantOf(form: FormData): { role: Role; scope: Scope } {
  const role = ROLES.find((one) => one === form.get("role")) ?? "viewer";
  const ids = String(form.get("ids") ?? "").split(/[\s,;]+/).filter(Boolean);
  return { role, scope: form.get("scope") === "all" ? "all" : { only: ids } };
}
