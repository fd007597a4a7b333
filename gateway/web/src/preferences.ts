//! User preferences (language and theme), stored in the browser.
import { effect, signal } from "@preact/signals";

export type Theme = "system" | "light" | "dark";
export type Language = "en" | "zh-CN";

const THEME = "vmwatch-theme";
const LANGUAGE = "vmwatch-language";

/** Storage may be unavailable, for example in private windows; the page works without it. */
function load(key: string): string | null {
  try {
    return localStorage.getItem(key);
  } catch {
    return null;
  }
}

function save(key: string, value: string): void {
  try {
    localStorage.setItem(key, value);
  } catch {
    // The browser does not allow storage: the preference lasts until the page is closed.
  }
}

function initialTheme(): Theme {
  const theme = load(THEME);
  return theme === "light" || theme === "dark" ? theme : "system";
}

function initialLanguage(): Language {
  const language = load(LANGUAGE) ?? navigator.languages.find((tag) => /^(zh|en)\b/i.test(tag)) ?? "en";
  return language.toLowerCase().startsWith("zh") ? "zh-CN" : "en";
}

export const theme = signal<Theme>(initialTheme());
export const language = signal<Language>(initialLanguage());

const darkSystem = matchMedia("(prefers-color-scheme: dark)");

/** Whether the dark theme is active; for canvas drawing, which CSS cannot style. */
export const dark = signal(false);

export function chooseTheme(choice: Theme): void {
  theme.value = choice;
  save(THEME, choice);
}

export function chooseLanguage(choice: Language): void {
  language.value = choice;
  save(LANGUAGE, choice);
}

export function followPreferences(): void {
  const root = document.documentElement;
  const system = signal(darkSystem.matches);
  darkSystem.addEventListener("change", () => (system.value = darkSystem.matches));
  effect(() => {
    dark.value = theme.value === "system" ? system.value : theme.value === "dark";
    root.dataset["theme"] = dark.value ? "dark" : "light";
  });
  effect(() => {
    root.lang = language.value;
  });
}
