// Checks each view in one theme, on a wide and a narrow screen: no axe violations, no horizontal overflow.
import { accessible, check, setting, signIn, story, url } from "./browser.mjs";

const colorScheme = setting("VMWATCH_PAGE_THEME");
const vm = setting("VMWATCH_PAGE_VM");

const VIEWS = {
  "the list": ["/", "table.vms tbody tr"],
  "an empty search": ["/?q=there-is-none", ".notice"],
  "a VM": [`/vms/${vm}?range=15m`, "table.process tbody tr"],
  "a process": [`/vms/${vm}?range=15m&process=vmwatch-agent`, "section.history canvas"],
  "no such VM": ["/vms/none-such", ".notice"],
  operations: ["/operations", "h1"],
  audit: ["/audit", "table.records tbody tr"],
  users: ["/users", "table.users tbody tr"],
  "no such view": ["/none/such", ".notice"],
};
const SIZES = [{ width: 1280, height: 900 }, { width: 375, height: 720 }];

await story(async (page, { faults }) => {
  await page.goto(url);
  await page.locator('input[name="user"]').waitFor();
  await accessible(page, `the sign-in, ${colorScheme}`, faults);
  await signIn(page);
  for (const size of SIZES) {
    await page.setViewportSize(size);
    for (const [name, [address, shown]] of Object.entries(VIEWS)) {
      const what = `${name}, ${colorScheme}, ${size.width} px`;
      await page.goto(url + address);
      await page.locator(shown).first().waitFor();
      const theme = await page.evaluate(() => document.documentElement.dataset.theme);
      check(theme === colorScheme, `${what} uses the system theme`);
      const wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
      check(wide <= 0, `${what} is ${wide} px wider than the screen`);
      await accessible(page, what, faults);
    }
    await page.goto(`${url}/users`);
    await page.locator(".heading button.primary").click();
    await page.locator("dialog[open]").waitFor();
    await accessible(page, `the dialog to add a user, ${colorScheme}, ${size.width} px`, faults);
    await page.keyboard.press("Escape");
    await page.locator(".account summary").click();
    await accessible(page, `the settings, ${colorScheme}, ${size.width} px`, faults);
  }
}, { colorScheme });
