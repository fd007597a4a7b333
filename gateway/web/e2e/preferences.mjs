// The browser's language, the switch, and that the choice is remembered.
import { accessible, check, setting, signIn, story, until } from "./browser.mjs";

const machine = setting("VMWATCH_PAGE_VM");

await story(async (page, { faults }) => {
  await signIn(page);
  await page.getByRole("heading", { name: "虚拟机", exact: true }).waitFor();
  check((await page.evaluate(() => document.documentElement.lang)) === "zh-CN", "the document says its language");
  await accessible(page, "the list in Chinese", faults);
  await page.locator(".account summary").click();
  await page.getByRole("button", { name: "English" }).click();
  await page.getByRole("heading", { name: "VMs" }).waitFor();
  await page.getByRole("button", { name: "Dark", exact: true }).click();
  await until("the theme is dark", () => page.evaluate(() => document.documentElement.dataset.theme === "dark"));
  await page.reload();
  await page.getByRole("heading", { name: "VMs" }).waitFor();
  check(await page.evaluate(() => document.documentElement.dataset.theme === "dark"), "the theme is remembered");

  // By the keyboard alone: past the navigation to the content, and into a VM.
  await page.keyboard.press("Tab");
  await page.keyboard.press("Enter");
  await until("the skip link leads to the content", () => page.url().endsWith("#main"));
  await page.locator(`tr[data-vm="${machine}"] a`).focus();
  await page.keyboard.press("Enter");
  await page.locator("h1", { hasText: machine }).waitFor();
  await page.getByRole("button", { name: "15 min" }).click();
  const scrubber = page.getByTestId("scrubber");
  await until("there are moments to choose from", async () => Number(await scrubber.getAttribute("max")) >= 2);
  await scrubber.focus();
  await page.keyboard.press("ArrowLeft");
  await until("an arrow key chooses a moment", () => page.url().includes("at="));
}, { locale: "zh-CN" });
