// Story: a link from another tool opens the processes of a VM at a past moment, also if the user must sign in first.
import { admin, check, setting, story, until, url } from "./browser.mjs";

const vm = setting("VMWATCH_PAGE_VM");
const at = Number(setting("VMWATCH_PAGE_AT"));
const [then, today] = setting("VMWATCH_PAGE_PROCESSES").split(",");

await story(async (page) => {
  const names = page.locator("table.process tbody th");
  const shows = (name) => until(`the process table has only ${name}`, async () => {
    const shown = await names.allInnerTexts();
    return shown.length === 1 && shown[0].startsWith(name);
  });
  const note = page.locator(".banner", { hasText: "not a valid time" });

  // The address stays the same while the user signs in.
  const link = `${url}/vms/${vm}?at=${at}`;
  await page.goto(link);
  await page.locator('input[name="user"]').fill(admin.user);
  await page.locator('input[name="password"]').fill(admin.password);
  await page.locator('button[type="submit"]').click();
  await shows(then);
  check(page.url() === link, `signing in leads to ${page.url()}`);
  await page.locator('[data-chart="cpu"] canvas').waitFor();
  check((await note.count()) === 0, "a valid moment has no note");

  await page.goto(`${url}/vms/${vm}?at=${new Date(at).toISOString()}&range=15m`);
  await shows(then);
  await page.keyboard.press("Escape");
  await until("the Esc key returns to the current values", () => !page.url().includes("at="));
  await shows(today);

  // A moment that is no time shows the current values, and says so.
  for (const bad of ["yesterday", "99999999999999999999", ""]) {
    await page.goto(`${url}/vms/${vm}?at=${bad}`);
    await note.waitFor();
    await shows(today);
  }
});
