import type { ComponentChildren } from "preact";
import { useEffect, useId, useRef, useState } from "preact/hooks";
import { Failure } from "../api/client";
import { t } from "../i18n";

interface DialogProps {
  title: string;
  close: () => void;
  /** The dialog contains a long line. */
  wide?: boolean;
  children: ComponentChildren;
}

/** A native modal dialog: the browser traps the focus, closes it on Esc and restores the focus. */
export function Dialog({ title, close, wide = false, children }: DialogProps) {
  const element = useRef<HTMLDialogElement>(null);
  const label = useId();
  useEffect(() => element.current?.showModal(), []);
  return (
    <dialog ref={element} class={wide ? "wide" : undefined} aria-labelledby={label} onClose={close}>
      <h2 id={label}>{title}</h2>
      {children}
    </dialog>
  );
}

interface FormProps {
  title: string;
  submit: string;
  dangerous?: boolean;
  wide?: boolean;
  /** Submits the form; errors it throws are shown in the dialog. */
  act: (form: FormData) => Promise<void>;
  close: () => void;
  children?: ComponentChildren;
}

/** A dialog with a form. It closes on success and shows the error on failure. */
export function FormDialog({ title, submit, dangerous = false, wide = false, act, close, children }: FormProps) {
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
    <Dialog title={title} close={close} wide={wide}>
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

/** The text to show the user for an error. */
export function problemText(error: unknown): string {
  if (error instanceof Failure && error.status === 0) return t().common.unreachable;
  return error instanceof Error && error.message ? error.message : t().common.failed;
}
