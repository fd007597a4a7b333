//! The page's texts. What one language has and another lacks does not compile.
import { computed } from "@preact/signals";
import { language } from "../preferences";
import { en } from "./en";
import { zh } from "./zh";

/** English is the measure: every other language has its keys. */
export type Texts = typeof en;

const texts = computed<Texts>(() => (language.value === "zh-CN" ? zh : en));

export const t = (): Texts => texts.value;
