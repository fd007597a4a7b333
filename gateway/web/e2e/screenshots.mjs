// Takes screenshots of each view of a running stack, in both themes, and of the VM list in Chinese, into the given folder:
//
//   VMWATCH_PAGE_URL=http://127.0.0.1:8086 VMWATCH_PAGE_USER=admin VMWATCH_PAGE_PASSWORD=… VMWATCH_PAGE_VM=… \
//     VMWATCH_PAGE_CHROMIUM=/usr/bin/chromium node e2e/screenshots.mjs ../../docs/screenshots
import { join } from "node:path";
import { setting, signIn, story, url } from "./browser.mjs";

const folder = process.argv[2] ?? ".";
const vm = setting("VMWATCH_PAGE_VM");
const process_ = process.env.VMWATCH_PAGE_PROCESS;
const only = process.env.VMWATCH_PAGE_ONLY;

const VIEWS = {
  vms: ["/", "table.vms tbody tr"],
  vm: [`/vms/${vm}?range=1h`, "table.process tbody tr"],
  ...(process_ && { process: [`/vms/${vm}?range=1h&process=${process_}`, "section.history canvas"] }),
  alerts: ["/alerts", "main .cards, main .notice"],
  rules: ["/alerts/rules", "table.rules tbody tr"],
  operations: ["/operations", "main .cards, main .notice"],
  agents: ["/agents", "section.tokens p, section.tokens table"],
  audit: ["/audit", "table.records tbody tr"],
  users: ["/users", "table.users tbody tr"],
  sessions: ["/sessions", "table.sessions tbody tr"],
};

for (const [theme, locale, suffix] of [["light", "en-GB", "light"], ["dark", "en-GB", "dark"], ["light", "zh-CN", "zh"]]) {
  await story(async (page) => {
    const shot = async (name) => {
      await page.waitForTimeout(700);
      await page.screenshot({ path: join(folder, `${name}-${suffix}.png`) });
    };
    await page.goto(url);
    await page.locator('input[name="user"]').waitFor();
    if (!only && locale === "en-GB") await shot("sign-in");
    await signIn(page);
    for (const [name, [address, shown]] of Object.entries(VIEWS)) {
      if (only ? only !== name : locale !== "en-GB" && name !== "vms") continue;
      await page.setViewportSize({ width: 1280, height: 820 });
      await page.goto(url + address);
      await page.locator(shown).first().waitFor();
      if (name === "vm") await point(page);
      await shot(name);
      if (!["vms", "vm", "sessions"].includes(name)) continue;
      await page.setViewportSize({ width: 375, height: 720 });
      await page.goto(url + address);
      await page.locator(shown).first().waitFor();
      await shot(`${name}-narrow`);
    }
  }, { colorScheme: theme, locale, viewport: { width: 1280, height: 820 } });
}

/** Moves the pointer to the peak of the example data in the CPU chart. */
async function point(page) {
  const box = await page.locator('[data-chart="cpu"] .u-over').boundingBox();
  await page.mouse.move(box.x + box.width * 0.56, box.y + 60);
  await page.mouse.move(box.x + box.width * 0.56 + 1, box.y + 60);
}
