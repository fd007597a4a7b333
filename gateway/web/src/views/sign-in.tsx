import { useState } from "preact/hooks";
import { api, ask, Failure, me } from "../api/client";
import { t } from "../i18n";
import { problemText } from "../parts/dialog";
import { LanguageSwitch } from "../parts/switches";

export function SignIn() {
  const texts = t().signIn;
  const [busy, setBusy] = useState(false);
  const [problem, setProblem] = useState("");
  const send = async (event: SubmitEvent) => {
    event.preventDefault();
    const form = new FormData(event.target as HTMLFormElement);
    setBusy(true);
    setProblem("");
    try {
      const body = { user_name: String(form.get("user")), password: String(form.get("password")), cookie: true };
      me.value = await ask(api.POST("/api/v1/sessions", { body }));
    } catch (error) {
      const known: Record<number, string> = { 401: texts.wrong, 429: texts.throttled };
      setProblem((error instanceof Failure && known[error.status]) || problemText(error));
      setBusy(false);
    }
  };
  return (
    <main class="sign-in">
      <form onSubmit={(event) => void send(event)}>
        <div class="brand"><Logo /><span>{t().product}</span></div>
        <p class="tagline">{texts.tagline}</p>
        <h1 class="hidden">{texts.title}</h1>
        <label>
          {texts.user}
          <input name="user" autocomplete="username" autocapitalize="none" spellcheck={false} required autofocus />
        </label>
        <label>
          {texts.password}
          <input name="password" type="password" autocomplete="current-password" required />
        </label>
        {problem && <p class="problem" role="alert">{problem}</p>}
        <button type="submit" class="primary" disabled={busy}>{busy ? texts.busy : texts.submit}</button>
        <p class="faint">{texts.hint}</p>
      </form>
      <LanguageSwitch />
    </main>
  );
}

export function Logo() {
  return (
    <svg class="logo" viewBox="0 0 32 32" width="26" height="26" aria-hidden="true">
      <rect width="32" height="32" rx="7" />
      <path d="M5 18h5l3-8 5 14 4-9 2 3h3" />
    </svg>
  );
}
