//! Texts of the web page in all languages. A text missing in one language is a compile error.
import { computed } from "@preact/signals";
import { language } from "../preferences";
import { en } from "./en";
import { zh } from "./zh";

/** English defines the keys of every language. */
export type Texts = typeof en;

const texts = computed<Texts>(() => (language.value === "zh-CN" ? zh : en));

export const t = (): Texts => texts.value;

/** The text for an API value; "unknown" for a value that only a newer version of the gateway knows. */
export const textOf = (values: Record<string, string>, value: string): string =>
  (Object.hasOwn(values, value) ? values[value] : undefined) ?? t().common.unknown;
