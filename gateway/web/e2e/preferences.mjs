// The page follows the browser's language, and remembers the chosen language and theme.
import { accessible, check, setting, signIn, story, until } from "./browser.mjs";

const vm = setting("VMWATCH_PAGE_VM");

await story(async (page, { faults }) => {
  await signIn(page);
  await page.getByRole("heading", { name: "虚拟机", exact: true }).waitFor();
  check((await page.evaluate(() => document.documentElement.lang)) === "zh-CN", "the lang attribute is set");
  await accessible(page, "the list in Chinese", faults);
  await page.locator(".account summary").click();
  await page.getByRole("button", { name: "English" }).click();
  await page.getByRole("heading", { name: "VMs" }).waitFor();
  await page.getByRole("button", { name: "Dark", exact: true }).click();
  await until("the theme is dark", () => page.evaluate(() => document.documentElement.dataset.theme === "dark"));
  await page.reload();
  await page.getByRole("heading", { name: "VMs" }).waitFor();
  check(await page.evaluate(() => document.documentElement.dataset.theme === "dark"), "the theme is remembered");

  // Keyboard only: skips the navigation and opens a VM.
  await page.keyboard.press("Tab");
  await page.keyboard.press("Enter");
  await until("the skip link moves to the content", () => page.url().endsWith("#main"));
  await page.locator(`tr[data-vm="${vm}"] a`).focus();
  await page.keyboard.press("Enter");
  await page.locator("h1", { hasText: vm }).waitFor();
  await page.getByRole("button", { name: "15 min" }).click();
  const scrubber = page.getByTestId("scrubber");
  await until("the slider has several moments", async () => Number(await scrubber.getAttribute("max")) >= 2);
  await scrubber.focus();
  await page.keyboard.press("ArrowLeft");
  await until("an arrow key selects a moment", () => page.url().includes("at="));
}, { locale: "zh-CN" });
