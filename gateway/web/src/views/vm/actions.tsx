//! Actions on the VM. The server says which ones its state allows, and why it does not allow the others.
import { useState } from "preact/hooks";
import { may, type Schemas, type Vm } from "../../api/client";
import { t, textOf } from "../../i18n";
import { act, type Action, latest } from "../../operations";
import { isOver } from "../../parts/badge";
import { FormDialog, problemText } from "../../parts/dialog";

const MORE: Exclude<Action, "start">[] = ["stop", "reboot", "reset", "force-stop"];

type Refused = Schemas["RefusedAction"];

/** The reason in the language of the page; the server's text for a reason that only a newer gateway knows. */
export const reasonText = ({ code, detail }: Refused): string => {
  const texts: Record<string, string> = t().vmActions.reasons;
  return Object.hasOwn(texts, code) ? textOf(texts, code) : detail;
};

/** Why the VM cannot be started, if that is not evident from its state; undefined if it can be. */
export function startProblem({ refused_actions }: Pick<Vm, "refused_actions">): string | undefined {
  const refused = refused_actions.find(({ action }) => action === "start");
  return refused && refused.code !== "already_running" ? reasonText(refused) : undefined;
}

/** One line per hypervisor that has the VM, with its state there. */
export const copyTexts = (copies: Vm["copies"]): string[] =>
  copies.map(({ hypervisor, state }) => t().vm.copy(hypervisor, textOf(t().state, state)));

/** Warns that several hypervisors have the VM. */
export function ConflictNote({ copies }: { copies: Vm["copies"] }) {
  if (copies.length === 0) return null;
  const { title, remedy } = t().vm.conflict;
  return (
    <p class="banner warn" role="status">
      <span><b>{title(copyTexts(copies).join(", "))}</b> {remedy}</span>
    </p>
  );
}

export function Actions({ vm, name }: { vm: Vm; name: string }) {
  const texts = t().action;
  const more = t().vmActions;
  const [problem, setProblem] = useState("");
  const [confirming, setConfirming] = useState<Exclude<Action, "start"> | null>(null);
  const [chosen, setChosen] = useState<string | undefined>(undefined);
  if (!may("operator")) return <p class="faint small">{texts.mayNot}</p>;
  const operation = latest.value.get(vm.instance_id);
  const busy = operation !== undefined && !isOver(operation.state);
  const copy = vm.copies.find(({ hypervisor }) => hypervisor === chosen) ?? vm.copies[0];
  const { allowed_actions: allowed, refused_actions: refused } = copy ?? vm;
  const cannotStart = startProblem(copy ?? vm);
  const reason = (action: Action) => refused.find((entry) => entry.action === action);
  const start = async () => {
    setProblem("");
    try {
      await act(vm.instance_id, "start", copy?.hypervisor);
    } catch (error) {
      setProblem(problemText(error));
    }
  };
  const entry = (action: Exclude<Action, "start">) => {
    const why = reason(action);
    const text = why ? more.refused(texts[action], reasonText(why)) : `${texts[action]}…`;
    return <option key={action} value={action} disabled={!allowed.includes(action)}>{text}</option>;
  };
  return (
    <div class="actions">
      {problem && <span class="problem" role="alert">{problem}</span>}
      {copy && (
        <select
          class="copies" aria-label={more.on} value={copy.hypervisor} disabled={busy}
          onChange={(event) => setChosen(event.currentTarget.value)}
        >
          {vm.copies.map(({ hypervisor }, index) => (
            <option key={hypervisor} value={hypervisor}>{copyTexts(vm.copies)[index]}</option>
          ))}
        </select>
      )}
      {cannotStart && <span class="faint small reason">{cannotStart}</span>}
      {(allowed.includes("start") || cannotStart) && (
        <button
          type="button" class="primary" disabled={busy || !allowed.includes("start")} title={cannotStart}
          onClick={() => void start()}
        >
          {texts.start}
        </button>
      )}
      <select
        class="more" aria-label={texts.menu} value="" disabled={busy}
        onChange={(event) => {
          setConfirming(MORE.find((action) => action === event.currentTarget.value) ?? null);
          event.currentTarget.value = "";
        }}
      >
        <option value="" disabled>{texts.menu}</option>
        {MORE.map(entry)}
      </select>
      {confirming && (
        <FormDialog
          title={texts.confirmTitle(texts[confirming], name)} submit={texts[confirming]} dangerous
          act={() => act(vm.instance_id, confirming, copy?.hypervisor)} close={() => setConfirming(null)}
        >
          <p>{texts.confirm[confirming]}</p>
          {copy && <p>{more.onHypervisor(copy.hypervisor)}</p>}
        </FormDialog>
      )}
    </div>
  );
}
