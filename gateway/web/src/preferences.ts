//! What a person prefers, kept in the browser.
import { effect, signal } from "@preact/signals";

export type Theme = "system" | "light" | "dark";
export type Language = "en" | "zh-CN";

const THEME = "vmwatch-theme";
const LANGUAGE = "vmwatch-language";

/** Browsers that keep nothing, as some do in private windows, still show the page. */
function kept(key: string): string | null {
  try {
    return localStorage.getItem(key);
  } catch {
    return null;
  }
}

function keep(key: string, value: string): void {
  try {
    localStorage.setItem(key, value);
  } catch {
    // It holds until the page is closed.
  }
}

function firstTheme(): Theme {
  const theme = kept(THEME);
  return theme === "light" || theme === "dark" ? theme : "system";
}

function firstLanguage(): Language {
  const language = kept(LANGUAGE) ?? navigator.languages.find((tag) => /^(zh|en)\b/i.test(tag)) ?? "en";
  return language.toLowerCase().startsWith("zh") ? "zh-CN" : "en";
}

export const theme = signal<Theme>(firstTheme());
export const language = signal<Language>(firstLanguage());

const darkSystem = matchMedia("(prefers-color-scheme: dark)");

/** Whether what is shown is dark: for what is drawn rather than styled. */
export const dark = signal(false);

export function chooseTheme(choice: Theme): void {
  theme.value = choice;
  keep(THEME, choice);
}

export function chooseLanguage(choice: Language): void {
  language.value = choice;
  keep(LANGUAGE, choice);
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
