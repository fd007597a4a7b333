import { useEffect, useRef, useState } from "preact/hooks";
import { me, signOut } from "../api/client";
import { t, textOf } from "../i18n";
import { PasswordDialog } from "./password";
import { LanguageSwitch, ThemeSwitch } from "./switches";

/** Menu with language, appearance and the account of the signed-in user. */
export function AccountMenu() {
  const texts = t().settings;
  const [changing, setChanging] = useState(false);
  const menu = useRef<HTMLDetailsElement>(null);
  useEffect(() => {
    const close = (event: Event) => {
      const outside = event.target instanceof Node && !menu.current?.contains(event.target);
      const escaped = event instanceof KeyboardEvent && event.key === "Escape";
      if (menu.current && (outside || escaped)) menu.current.open = false;
    };
    addEventListener("click", close);
    addEventListener("keydown", close);
    return () => {
      removeEventListener("click", close);
      removeEventListener("keydown", close);
    };
  }, []);
  const user = me.value;
  if (!user) return null;
  const closeMenu = () => {
    if (menu.current) menu.current.open = false;
  };
  return (
    <details class="account" ref={menu}>
      <summary>
        <span class="hidden">{texts.open}: </span>
        <span class="avatar" aria-hidden="true">{user.user_name.slice(0, 1).toUpperCase()}</span>
        <span class="user">{user.user_name}</span>
      </summary>
      <div class="sheet">
        <p class="user">{texts.signedInAs(user.user_name, textOf(t().role, user.role))}</p>
        <LanguageSwitch />
        <ThemeSwitch />
        <a class="button" href="/sessions" onClick={closeMenu}>{texts.sessions}</a>
        <a class="button" href="/tokens" onClick={closeMenu}>{texts.tokens}</a>
        <a class="button" href="/api/docs" target="_blank" rel="noopener">{t().nav.api}</a>
        <button type="button" onClick={() => setChanging(true)}>{texts.password}</button>
        <button type="button" onClick={() => void signOut()}>{texts.signOut}</button>
      </div>
      {changing && <PasswordDialog user={user.user_name} close={() => setChanging(false)} />}
    </details>
  );
}
