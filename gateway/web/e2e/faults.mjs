// Story: the list and the view of a VM show what is wrong with its agent, in both languages, on a wide and a narrow screen.
import { accessible, check, command, signIn, story, until, url } from "./browser.mjs";

const SIZES = [{ width: 1280, height: 900 }, { width: 375, height: 720 }];
const TEXTS = {
  "en-GB": {
    faulty: "wrong clock",
    others: "+1",
    old: "samples too old",
    version: "Agent 0.0.9, outdated",
    clock: /ahead by 1 h 3[01] min/,
    limit: /more messages per second than one VM may.*VMWATCH_VM_MESSAGES_PER_SECOND/s,
    outdated: "outdated",
  },
  "zh-CN": {
    faulty: "时钟不准",
    others: "+1",
    old: "采样过旧",
    version: "Agent 0.0.9，版本过旧",
    clock: /快了 1 小时 3[01] 分钟/,
    limit: /每秒发送的消息数超出.*VMWATCH_VM_MESSAGES_PER_SECOND/s,
    outdated: "版本过旧",
  },
};

for (const [locale, texts] of Object.entries(TEXTS)) {
  await story(async (page, { faults }) => {
    await signIn(page);
    // The programs know the faults when the second language is tested.
    if (locale === "en-GB") await command("report");
    for (const size of SIZES) {
      await page.setViewportSize(size);
      await showsFaults(page, texts, `${locale}, ${size.width} px`, faults);
    }
  }, { locale });
}

async function showsFaults(page, texts, what, faults) {
  const fits = async (view) => {
    const wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
    check(wide <= 0, `${view}, ${what}, is ${wide} px wider than the screen`);
    await accessible(page, `${view}, ${what}`, faults);
  };
  await page.goto(`${url}/?sort=name`);
  const shows = (vm, ...parts) =>
    until(`the row of ${vm} shows ${parts}, ${what}`, async () => {
      const text = await page.locator(`tr[data-vm="${vm}"] .report`).innerText().catch(() => "");
      if (parts.every((part) => text.includes(part))) return true;
      await page.reload();
      await page.locator("table.vms tbody tr[data-vm]").first().waitFor();
      return false;
    });
  await shows("faulty", texts.faulty, texts.others);
  await shows("expired", texts.old);
  await shows("outdated", texts.version);
  await fits("the list");
  await page.locator('tr[data-vm="faulty"] a').click();
  const notes = page.locator(".banner.warn");
  await notes.nth(1).waitFor();
  const [clock, limit] = await notes.allInnerTexts();
  check(texts.clock.test(clock), `expected the clock, found ${clock}`);
  check(texts.limit.test(limit), `expected the limit, found ${limit}`);
  await fits("a VM with faults");
  await page.goto(`${url}/vms/outdated`);
  await page.locator(".facts .badge", { hasText: texts.outdated }).waitFor();
  // A long name ends in an ellipsis, and the badge after it is not cut.
  const name = page.locator("table.process tbody .named", { hasText: "unattended" });
  await name.locator(".badge").waitFor();
  const [cell, badge] = [await name.boundingBox(), await name.locator(".badge").boundingBox()];
  check(badge.x + badge.width <= cell.x + cell.width + 1, `the badge is inside the column, ${what}`);
  const title = await name.locator("button").getAttribute("title");
  check(title.startsWith("unattended-upgrade-shutdown"), `expected the whole name as the title, found ${title}`);
  if (page.viewportSize().width > 900) {
    const isCut = await name.locator("button > span").evaluate((span) =>
      span.scrollWidth > span.clientWidth && getComputedStyle(span).textOverflow === "ellipsis");
    check(isCut, `the name ends in an ellipsis, ${what}`);
  }
  await fits("a VM with an outdated agent");
}
