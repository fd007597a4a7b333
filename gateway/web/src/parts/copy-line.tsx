import { useRef, useState } from "preact/hooks";
import { t } from "../i18n";

/** A line of text with a button that copies it. */
export function CopyLine({ label, text }: { label: string; text: string }) {
  const texts = t().copy;
  const line = useRef<HTMLElement>(null);
  const [result, setResult] = useState("");
  const copy = async () => setResult((await copied(text, line.current)) ? texts.done : texts.failed);
  return (
    <div class="copy-line">
      <code ref={line} tabIndex={0} role="textbox" aria-readonly aria-label={label}>{text}</code>
      <button type="button" class="primary" onClick={() => void copy()}>{texts.copy}</button>
      <span class="faint small" role="status">{result}</span>
    </div>
  );
}

/** Copies the text. Over plain HTTP browsers have no clipboard API, so the element is selected and copied. */
async function copied(text: string, element: HTMLElement | null): Promise<boolean> {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    if (element) getSelection()?.selectAllChildren(element);
    return document.execCommand("copy");
  }
}
