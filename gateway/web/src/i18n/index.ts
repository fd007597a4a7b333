//! The page's texts. A key missing in one language is a compile error.
import { computed } from "@preact/signals";
import { language } from "../preferences";
import { en } from "./en";
import { zh } from "./zh";

/** English defines the keys of every language. */
export type Texts = typeof en;

const texts = computed<Texts>(() => (language.value === "zh-CN" ? zh : en));

export const t = (): Texts => texts.value;

/** The text of a value; "unknown" for a value of a newer version of the gateway. */
export const textOf = (values: Record<string, string>, value: string): string =>
  (Object.hasOwn(values, value) ? values[value] : undefined) ?? t().common.unknown;
