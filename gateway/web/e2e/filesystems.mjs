// Part of a story: the filesystems of a VM.
import { check, until, url } from "./browser.mjs";

/** Checks the page of the VM of a web shop, which tests/e2e/page/shop.rs publishes, now and at a moment without samples. */
export async function showsFilesystems(page, vm) {
  await page.goto(`${url}/vms/${vm}`);
  const mounts = page.locator(".mounts li");
  await mounts.first().waitFor();
  const texts = async () => (await mounts.allInnerTexts()).map((text) => text.replace(/\s+/g, " ").trim());
  const fullest = (await texts())[0];
  check(fullest === "/var/lib/postgresql xfs 94.0% 94.0 GiB of 100 GiB used", `the fullest filesystem is first: ${fullest}`);
  check((await mounts.count()) === 4, "the four fullest filesystems are shown at first");
  check((await mounts.first().locator(".meter.hot").count()) === 1, "a filesystem that is nearly full is highlighted");
  await page.getByRole("button", { name: "Show all 6" }).click();
  await until("all filesystems are shown", async () => (await mounts.count()) === 6);
  check((await texts()).at(-1) === "/backup nfs4 0.0% 0 KiB of 8.0 TiB used", `the emptiest is last: ${(await texts()).at(-1)}`);
  await page.goto(`${url}/vms/${vm}?at=2020-01-01T00:00:00.000Z`);
  await page.locator(".filesystems .none").waitFor();
}
