// Story: behind a reverse proxy over plain HTTP, a user can sign in, receives live updates and can sign out.
import { check, setting, signIn, story, until, url } from "./browser.mjs";

const vm = setting("VMWATCH_PAGE_VM");

await story(async (page) => {
  const sent = [];
  page.on("request", (request) => {
    if (request.method() === "POST") sent.push(request.allHeaders());
  });
  await signIn(page);
  const [headers] = await Promise.all(sent);
  check(headers.origin === url, `the browser sends the page's origin: ${headers.origin}`);
  check(!("sec-fetch-site" in headers), "the browser sends no Sec-Fetch-Site over plain HTTP");

  await page.goto(`${url}/vms/${vm}?range=15m`);
  await page.locator(".live.live").waitFor();
  const moment = () => page.locator(".processes .moment").getAttribute("data-at").then(Number);
  const first = await moment();
  await until("a new process table is shown", async () => (await moment()) > first);

  await page.locator(".account summary").click();
  await page.locator(".account .sheet button", { hasText: "Sign out" }).click();
  await page.locator('input[name="password"]').waitFor();
});
