//! Dialog that creates a join token and shows the command that installs the agent in a VM, until the VM reports.
import { useState } from "preact/hooks";
import { api, ask, may, type Schemas } from "../api/client";
import { fullTime, HOUR, ms } from "../format";
import { t } from "../i18n";
import { CopyLine } from "../parts/copy-line";
import { Dialog, problemText } from "../parts/dialog";
import { Enrolments } from "./enrolments";

type Created = Schemas["CreatedJoinToken"];

/** For how many hours a token may be valid. */
const PERIODS = [1, 24, 168, 720] as const;
const MAX_USES = 10_000;
/** The gateway accepts these ids of VMs. */
const ID_PATTERN = "[0-9A-Za-z_\\-]{1,64}";

/** A button for administrators that opens the dialog. */
export function AddVm({ closed }: { closed?: () => void }) {
  const [open, setOpen] = useState(false);
  if (!may("admin")) return null;
  const close = () => {
    setOpen(false);
    closed?.();
  };
  return (
    <>
      <button type="button" class="primary add-vm" onClick={() => setOpen(true)}>{t().addVm.open}</button>
      {open && <AddDialog close={close} />}
    </>
  );
}

function AddDialog({ close }: { close: () => void }) {
  const [created, setCreated] = useState<Created | null>(null);
  const [id, setId] = useState("");
  return (
    <Dialog title={t().addVm.title} close={close} wide>
      {created ? (
        <Command created={created} id={id} again={() => setCreated(null)} close={close} />
      ) : (
        <Options
          close={close}
          done={(created, id) => {
            setId(id);
            setCreated(created);
          }}
        />
      )}
    </Dialog>
  );
}

function Options({ done, close }: { done: (created: Created, id: string) => void; close: () => void }) {
  const texts = t().addVm;
  const [busy, setBusy] = useState(false);
  const [problem, setProblem] = useState("");
  const create = async (event: SubmitEvent) => {
    event.preventDefault();
    const form = new FormData(event.target as HTMLFormElement);
    const id = String(form.get("id")).trim();
    setBusy(true);
    setProblem("");
    try {
      const body: Schemas["NewJoinToken"] = {
        valid_seconds: (Number(form.get("hours")) * HOUR) / 1000,
        uses: id ? 1 : Number(form.get("uses")),
        vms: id ? { only: [id] } : "any",
        replace: form.get("replace") !== null,
      };
      done(await ask(api.POST("/api/v1/join-tokens", { body })), id);
    } catch (error) {
      setProblem(problemText(error));
      setBusy(false);
    }
  };
  const [hasId, setHasId] = useState(false);
  return (
    <form onSubmit={(event) => void create(event)}>
      <p>{texts.intro}</p>
      <details class="options">
        <summary>{texts.options}</summary>
        <div class="fields">
          <label class="whole">
            {texts.id}
            <input
              name="id" autocomplete="off" autocapitalize="none" spellcheck={false} pattern={ID_PATTERN} title={texts.idRule}
              onInput={(event) => setHasId(event.currentTarget.value.trim() !== "")}
            />
            <span class="faint small">{texts.idHint}</span>
          </label>
          <label>
            {texts.valid}
            <select name="hours">
              {PERIODS.map((hours) => <option key={hours} value={hours}>{texts.periods[hours]}</option>)}
            </select>
          </label>
          <label>
            {texts.uses}
            <input name="uses" type="number" min={1} max={MAX_USES} defaultValue="1" required disabled={hasId} />
          </label>
          <label class="option whole">
            <input name="replace" type="checkbox" />
            <span>{texts.replace} <span class="faint">– {texts.replaceHint}</span></span>
          </label>
        </div>
      </details>
      {problem && <p class="problem" role="alert">{problem}</p>}
      <div class="buttons">
        <button type="button" onClick={close}>{t().common.cancel}</button>
        <button type="submit" class="primary" disabled={busy}>{texts.create}</button>
      </div>
    </form>
  );
}

interface CommandProps {
  created: Created;
  /** The id of the VM, if the user entered one. */
  id: string;
  again: () => void;
  close: () => void;
}

function Command({ created, id, again, close }: CommandProps) {
  const texts = t().addVm;
  const { token, install_url, join_token } = created;
  const line = install_url && `curl -fsSL ${install_url} | sudo VMWATCH_JOIN_TOKEN=${token} sh${id && ` -s -- --instance-id ${id}`}`;
  return (
    <div class="command">
      {line ? <p>{texts.run}</p> : <div class="banner warn" role="status">{texts.noUrl}</div>}
      {line ? <CopyLine label={texts.command} text={line} /> : <CopyLine label={texts.token} text={token} />}
      <p class="faint small">{texts.validUntil(fullTime(ms(join_token.expires_at)), join_token.uses)}</p>
      <Enrolments token={join_token} again={again} />
      <div class="buttons"><button type="button" onClick={close}>{t().common.close}</button></div>
    </div>
  );
}
