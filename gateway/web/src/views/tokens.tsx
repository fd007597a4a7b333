//! View of API tokens: users see, create and revoke their own; administrators also those of other users.
import { useState } from "preact/hooks";
import { api, ask, may, me, type Schemas } from "../api/client";
import { useEvery } from "../api/resource";
import { now } from "../clock";
import { ago, fullTime, ms, SECOND, shortTime } from "../format";
import { t, textOf } from "../i18n";
import { Badge } from "../parts/badge";
import { FormDialog } from "../parts/dialog";
import { usePages } from "../parts/pages";
import { Failed, Loading, Notice } from "../parts/states";
import { Choice } from "../parts/switches";
import { adjust, route } from "../router";
import { CreateToken } from "./new-token";
import { scopeText } from "./users";

type ApiToken = Schemas["ApiToken"];

/** Reload interval; the time of the last use is accurate to about a minute. */
const RELOAD_MS = 30 * SECOND;

export function Tokens() {
  const texts = t().tokens;
  const all = may("admin") && route.value.query.get("all") === "1";
  const [creating, setCreating] = useState(false);
  const [revoking, setRevoking] = useState<ApiToken | null>(null);
  const pages = usePages(async (after: string | undefined, signal) => {
    const query = { all, limit: 100, ...(after !== undefined && { after }) };
    const { tokens, next } = await ask(api.GET("/api/v1/tokens", { params: { query }, signal }));
    return { items: tokens, next: next ?? undefined };
  }, [all]);
  useEvery(RELOAD_MS, pages.reload);
  const close = () => {
    setCreating(false);
    setRevoking(null);
    pages.reload();
  };
  return (
    <>
      <div class="heading">
        <h1 tabIndex={-1}>{texts.title}</h1>
        {may("admin") && <Owners all={all} />}
        {pages.loaded && <button type="button" class="primary" onClick={() => setCreating(true)}>{texts.add}</button>}
      </div>
      <p class="lead faint">{texts.hint}</p>
      {!pages.loaded ? (
        pages.failure ? <Failed failure={pages.failure} retry={pages.reload} /> : <Loading rows={3} />
      ) : pages.items.length === 0 ? (
        <Notice title={texts.emptyTitle}><p>{texts.empty}</p></Notice>
      ) : (
        <TokenTable tokens={pages.items} all={all} revoke={setRevoking} />
      )}
      {pages.next !== undefined && (
        <button type="button" class="more" disabled={pages.loading} onClick={pages.more}>{t().common.more}</button>
      )}
      {creating && <CreateToken close={close} />}
      {revoking && <RevokeDialog token={revoking} close={close} />}
    </>
  );
}

/** Selects the own tokens or those of all users. */
function Owners({ all }: { all: boolean }) {
  const texts = t().tokens;
  const options = [["own", texts.own], ["all", texts.all]] as const;
  const choose = (value: "own" | "all") => adjust({ all: value === "all" ? "1" : null });
  return <Choice label={texts.whose} options={options} value={all ? "all" : "own"} choose={choose} />;
}

interface TableProps {
  tokens: ApiToken[];
  all: boolean;
  revoke: (token: ApiToken) => void;
}

function TokenTable({ tokens, all, revoke }: TableProps) {
  const texts = t().tokens;
  const { columns } = texts;
  const newest = [...tokens].sort((one, other) => ms(other.created_at) - ms(one.created_at));
  return (
    <table class="tokens">
      <thead>
        <tr>
          <th scope="col">{columns.name}</th>
          {all && <th scope="col">{columns.owner}</th>}
          <th scope="col">{columns.rights}</th>
          <th scope="col">{columns.used}</th>
          <th scope="col">{columns.expires}</th>
          <th scope="col"><span class="hidden">{columns.action}</span></th>
        </tr>
      </thead>
      <tbody>
        {newest.map((token) => (
          <tr key={token.id} data-token={token.id}>
            <th scope="row" title={token.id}>{token.name}</th>
            {all && <td data-label={columns.owner}>{token.owner}</td>}
            <td data-label={columns.rights}>
              {texts.rights(textOf(t().role, token.role), textOf(texts.access, token.access), scopeText(token.scope))}
            </td>
            <td data-label={columns.used}>{usedText(token)}</td>
            <td class="at" data-label={columns.expires} title={fullTime(ms(token.expires_at))}>
              {now.value >= ms(token.expires_at) ? <Badge tone="quiet">{texts.expired}</Badge> : shortTime(ms(token.expires_at))}
            </td>
            <td class="act">
              <button type="button" aria-label={texts.revokeOf(token.name)} onClick={() => revoke(token)}>{texts.revoke}</button>
            </td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}

function usedText({ last_used_at, last_source }: ApiToken): string {
  const texts = t().tokens;
  if (last_used_at === null) return texts.never;
  return texts.from(ago(ms(last_used_at), now.value), last_source ?? t().sessions.unknownSource);
}

function RevokeDialog({ token, close }: { token: ApiToken; close: () => void }) {
  const texts = t().tokens;
  const act = async () => {
    await ask(api.DELETE("/api/v1/tokens/{token_id}", { params: { path: { token_id: token.id } } }));
  };
  return (
    <FormDialog title={texts.revokeTitle(token.name)} submit={texts.revoke} dangerous act={act} close={close}>
      {token.owner !== me.value?.user_name && <p>{t().common.labelled(texts.columns.owner, token.owner)}</p>}
      <p>{texts.revokeText}</p>
    </FormDialog>
  );
}
