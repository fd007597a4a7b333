// Story: the page shows what the hypervisor measures of a VM without an agent, and both lines where an agent reports too.
import { accessible, check, command, setting, signIn, story, until, url } from "./browser.mjs";

const vm = setting("VMWATCH_PAGE_VM");
const folder = process.env.VMWATCH_PAGE_SHOTS;

/** Takes a screenshot if a folder for them is set. */
async function shot(page, name) {
  if (!folder) return;
  for (const [width, height, suffix] of [[1280, 900, ""], [375, 740, "-narrow"]]) {
    await page.setViewportSize({ width, height });
    // Charts are resized in the frame after the page.
    await page.evaluate(() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))));
    await page.screenshot({ path: `${folder}/${name}${suffix}.png` });
  }
  await page.setViewportSize({ width: 1280, height: 900 });
}

const texts = async (locator) => (await locator.allInnerTexts()).map((text) => text.replace(/\s+/g, " ").trim());
const charts = (page) => page.locator("[data-chart]").evaluateAll((all) => all.map((chart) => chart.dataset.chart));

await story(async (page, { faults }) => {
  await signIn(page);
  const row = page.locator(`tr[data-vm="${vm}"]`);
  await row.waitFor();
  check((await row.locator("td.cpu").innerText()) === "—", "a VM that nobody measures has no values");

  // The list shows the values of the hypervisor, says so, and follows them live.
  await command("measure 12.5");
  await until("the list shows the CPU usage", async () => (await row.locator("td.cpu").innerText()).includes("12.5%"));
  const report = (await row.locator("td.report").innerText()).replace(/\s+/g, " ");
  check(report === "never reported by hypervisor", `the row names the source: ${report}`);
  check((await row.locator("td.mem").innerText()) === "—", "the hypervisor does not know the memory usage");
  check((await row.locator("td.net").innerText()) === "100 KiB/s", "the network rate is shown");
  await until("the sparkline is drawn", async () => (await row.locator(".sparkline").count()) === 1);
  await command("measure 37.5");
  await until("the list follows live values", async () => (await row.locator("td.cpu").innerText()).includes("37.5%"));
  check((await row.getAttribute("class")) === null, "the values are not dimmed");
  await accessible(page, "the list", faults);
  await shot(page, "list");

  // The view of the VM has the charts that the hypervisor knows, and says where they come from.
  await row.locator("a").click();
  await page.locator('[data-chart="cpu"] canvas').waitFor();
  await page.getByText("measured by the hypervisor", { exact: true }).waitFor();
  check((await page.locator(".sources").innerText()).startsWith("Measured by the hypervisor. Install vmwatch-agent"), "a note names the source");
  check((await charts(page)).join() === "cpu,net,disk", `only known measures have charts: ${await charts(page)}`);
  const values = (chart) => texts(page.locator(`[data-chart="${chart}"] .value`));
  await until("the last value is shown", async () => (await values("cpu")).join().includes("37.5%"));
  check((await values("cpu")).length === 2, "the CPU chart has CPU usage and stolen time");
  await command("measure 62.5");
  await until("the chart follows live values", async () => (await values("cpu"))[0].includes("62.5%"));
  await page.getByRole("button", { name: "Download…" }).click();
  await page.locator('select[name="what"]').selectOption("hypervisor");
  const download = page.waitForEvent("download");
  await page.locator('dialog button[type="submit"]').click();
  const name = (await download).suggestedFilename();
  check(name.includes("-hypervisor-") && name.endsWith(".csv"), `the file is named after its content: ${name}`);
  await until("the dialog is closed", async () => (await page.locator("dialog[open]").count()) === 0);
  await accessible(page, "the VM without an agent", faults);
  await shot(page, "alone");

  // Where the agent reports too, the charts have a line of each source.
  await command("report");
  await page.locator("details.sources").waitFor();
  await until("both sources have a line", async () => (await values("net")).length === 4);
  const cpu = await values("cpu");
  check(cpu.some((text) => text.startsWith("CPU, hypervisor ")) && cpu.some((text) => /^CPU 20\.0%/.test(text)), `both values are shown: ${cpu}`);
  check((await page.locator("header.vm .badge", { hasText: "hypervisor" }).count()) === 0, "the values of the agent come first");
  await page.locator("details.sources summary").click();
  const differences = await texts(page.locator("details.sources li"));
  for (const word of ["CPU:", "Stolen:", "Memory:"]) check(differences.some((text) => text.startsWith(word)), `the difference is named: ${word}`);
  await accessible(page, "the VM with both sources", faults);
  await shot(page, "both");
  await page.goto(url);
  await until("the list shows the values of the agent", async () => (await row.locator("td.cpu").innerText()).includes("20.0%"));
  check(!(await row.locator("td.report").innerText()).includes("hypervisor"), "the row no longer names the hypervisor");

  // Another language and theme.
  await page.locator(".account summary").click();
  await page.getByRole("button", { name: "中文" }).click();
  await page.getByRole("button", { name: "深色", exact: true }).click();
  await page.keyboard.press("Escape");
  await page.goto(`${url}/vms/${vm}`);
  await page.getByText("虚线为虚拟化平台测量的数值，两者有何差异？").waitFor();
  await page.locator("details.sources summary").click();
  await accessible(page, "the VM with both sources in Chinese", faults);
  await shot(page, "both-zh-dark");
  const other = setting("VMWATCH_PAGE_OTHER");
  await page.goto(`${url}/vms/${other}`);
  await page.locator('[data-chart="cpu"] canvas').waitFor();
  await page.getByText("由虚拟化平台测量", { exact: true }).waitFor();
  await shot(page, "alone-zh-dark");
  await page.goto(url);
  await page.locator(`tr[data-vm="${other}"]`).getByText("平台测量").waitFor();
  await shot(page, "list-zh-dark");
});
