import type { ComponentChildren } from "preact";
import { useEffect, useId, useRef, useState } from "preact/hooks";
import { Failure } from "../api/client";
import { t } from "../i18n";

interface DialogProps {
  title: string;
  close: () => void;
  children: ComponentChildren;
}

/** The browser's own dialog: it keeps the focus, ends with Esc, and gives the focus back. */
export function Dialog({ title, close, children }: DialogProps) {
  const element = useRef<HTMLDialogElement>(null);
  const label = useId();
  useEffect(() => element.current?.showModal(), []);
  return (
    <dialog ref={element} aria-labelledby={label} onClose={close}>
      <h2 id={label}>{title}</h2>
      {children}
    </dialog>
  );
}

interface FormProps {
  title: string;
  submit: string;
  dangerous?: boolean;
  /** Does it; what it throws is shown. */
  act: (form: FormData) => Promise<void>;
  close: () => void;
  children?: ComponentChildren;
}

/** A dialog that does something, or says why it could not. */
export function FormDialog({ title, submit, dangerous = false, act, close, children }: FormProps) {
  const [busy, setBusy] = useState(false);
  const [problem, setProblem] = useState("");
  const send = async (event: SubmitEvent) => {
    event.preventDefault();
    setBusy(true);
    setProblem("");
    try {
      await act(new FormData(event.target as HTMLFormElement));
      close();
    } catch (error) {
      setProblem(problemText(error));
      setBusy(false);
    }
  };
  return (
    <Dialog title={title} close={close}>
      <form onSubmit={(event) => void send(event)}>
        {children}
        {problem && <p class="problem" role="alert">{problem}</p>}
        <div class="buttons">
          <button type="button" onClick={close}>{t().common.cancel}</button>
          <button type="submit" class={dangerous ? "danger" : "primary"} disabled={busy}>{submit}</button>
        </div>
      </form>
    </Dialog>
  );
}

/** What is wrong, in words for a person. */
export function problemText(error: unknown): string {
  if (error instanceof Failure && error.status === 0) return t().common.unreachable;
  return error instanceof Error && error.message ? error.message : t().common.failed;
}
