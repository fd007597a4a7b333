// Part of a story: the processes of a moment in groups, the CPU time that they explain, and the note about hidden
// processes.
import { check, until, url } from "./browser.mjs";

/** Checks the page of the VM of a web shop, which tests/e2e/page/shop.rs publishes. */
export async function showsGroups(page, vm) {
  await page.goto(`${url}/vms/${vm}`);
  const rows = page.locator("table.process tbody tr");
  await rows.first().waitFor();
  const text = (locator) => locator.innerText();
  check((await text(page.locator(".accounted"))).includes("86%"), "the page shows the share of the CPU time explained");
  check((await text(page.locator(".processes .banner"))).includes("CAP_SYS_PTRACE"), "the note names the remedy");
  check((await text(rows.first())).includes("shop/orders-7d9c/orders"), "a row shows the container of its process");
  const ended = rows.filter({ hasText: "logrotate" });
  await page.getByRole("searchbox", { name: "Filter by name or owner" }).fill("logrotate.service");
  await until("the filter finds a unit", async () => (await rows.count()) === 1);
  check((await text(ended)).includes("ended"), "an ended process is marked");
  await page.getByRole("searchbox", { name: "Filter by name or owner" }).fill("");

  // Cells of a group: the label, the number of processes, the sums of CPU and memory usage, and the disk rates.
  const cells = async (label) => (await rows.filter({ hasText: label }).first().locator("th, td").allInnerTexts()).slice(1, 4).join(" ");
  const choose = async (option, heading) => {
    await page.getByRole("button", { name: option, exact: true }).click();
    await until(`the table is grouped by ${option}`, async () =>
      (await page.locator("table.grouped thead th").first().innerText()).startsWith(heading));
  };
  await choose("Name", "Process");
  check((await cells("gunicorn")) === "4 126.0% 10.4%", `the sums of a name: ${await cells("gunicorn")}`);
  check((await text(rows.first())).includes("gunicorn"), "four workers together are busier than the busiest process");
  await choose("User", "User");
  check((await cells("10001")) === "5 244.0% 41.8%", `the sums of a user: ${await cells("10001")}`);
  await choose("Unit or container", "Unit or container");
  check(page.url().endsWith("?group=unit"), "the URL has the grouping");
  check((await cells("nginx.service")) === "5 11.0% 2.0%", `the sums of a unit: ${await cells("nginx.service")}`);
  check((await cells("neither unit nor container")).startsWith("24 "), "processes without owner make a group");
  check((await text(rows.filter({ hasText: "logrotate.service" }))).includes("ended"), "a group of ended processes is marked");

  const group = rows.filter({ hasText: "shop/cart-58f4/web" });
  check((await text(group)).includes("container"), "a container is marked");
  const before = await rows.count();
  await group.getByRole("button").click();
  await until("the group unfolds into its processes", async () => (await rows.count()) === before + 4);
  await page.getByRole("button", { name: "History of gunicorn, PID 438" }).waitFor();
  await page.goto(`${url}/vms/${vm}?group=unit`);
  await rows.first().waitFor();
  check((await page.locator("table.grouped").count()) === 1, "a shared URL shows the groups");
}
