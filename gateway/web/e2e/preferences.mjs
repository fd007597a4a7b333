// Story: the web page follows the browser's language, and remembers the chosen language and theme.
import { accessible, check, setting, signIn, story, until, url } from "./browser.mjs";

const vm = setting("VMWATCH_PAGE_VM");

await story(async (page, { faults }) => {
  await signIn(page);
  await page.getByRole("heading", { name: "虚拟机", exact: true }).waitFor();
  check((await page.evaluate(() => document.documentElement.lang)) === "zh-CN", "the page's lang attribute names the browser's language");
  await accessible(page, "the list in Chinese", faults);
  await showsValuesOfNewerVersion(page, "未知");
  await page.goto(url);
  await page.locator(".account summary").click();
  await page.getByRole("button", { name: "English" }).click();
  await page.getByRole("heading", { name: "VMs" }).waitFor();
  await page.getByRole("button", { name: "Dark", exact: true }).click();
  await until("the page uses the dark theme", () => page.evaluate(() => document.documentElement.dataset.theme === "dark"));
  await showsValuesOfNewerVersion(page, "unknown");
  await page.goto(url);
  await page.getByRole("heading", { name: "VMs" }).waitFor();
  check(await page.evaluate(() => document.documentElement.dataset.theme === "dark"), "the page still uses the dark theme after it was reloaded");

  // Skip the navigation and open a VM with the keyboard alone.
  await page.keyboard.press("Tab");
  await page.keyboard.press("Enter");
  await until("the skip link moves to the content", () => page.url().endsWith("#main"));
  await page.locator(`tr[data-vm="${vm}"] a`).focus();
  await page.keyboard.press("Enter");
  await page.locator("h1", { hasText: vm }).waitFor();
  await page.getByRole("button", { name: "15 min" }).click();
  const scrubber = page.getByTestId("scrubber");
  await until("the slider below the charts has several moments", async () => Number(await scrubber.getAttribute("max")) >= 2);
  await scrubber.focus();
  await page.keyboard.press("ArrowLeft");
  await until("an arrow key selects a moment on the slider", () => page.url().includes("at="));
}, { locale: "zh-CN" });

/** Shows an operation, an audit record and a user whose values only a newer version knows. */
async function showsValuesOfNewerVersion(page, unknown) {
  for (const [address, row, count] of [
    // Texts to find: state and action of the operation, result of the audit record, role and scope of the user.
    ["/operations", "details.operation summary", 2],
    ["/audit?action=lifecycle.migrate", "table.records tbody tr", 1],
    ["/users", 'tr[data-user="Vera"]', 2],
  ]) {
    await page.goto(url + address);
    const shown = page.locator(row);
    await shown.waitFor();
    const found = (await shown.innerText()).split(unknown).length - 1;
    check(found === count, `${address} shows "${unknown}" ${found} times instead of ${count}`);
  }
}
