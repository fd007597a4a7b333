// Runs browser tests ("stories") in a real Chromium against a running vmwatch stack. A story also fails on any console
// error, Content-Security-Policy violation or request to another host.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { createInterface } from "node:readline";
import { chromium } from "playwright-core";

const require = createRequire(import.meta.url);
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

/** Generous time limit for each wait, so that only a defect exceeds it. */
export const PATIENCE_MS = 30_000;

export const url = setting("VMWATCH_PAGE_URL");
export const admin = { user: setting("VMWATCH_PAGE_USER"), password: setting("VMWATCH_PAGE_PASSWORD") };

export function setting(name) {
  const value = process.env[name];
  if (!value) throw new Error(`${name} is not set`);
  return value;
}

const ARGUMENTS = [
  "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync",
  // A host name of this machine that browsers do not regard as secure, as they do `localhost` and 127.0.0.1.
  "--host-resolver-rules=MAP vmwatch.test 127.0.0.1",
];

/** Runs a story in a browser with a fresh profile. An error in the story or on the page sets exit code 1. */
export async function story(run, options = {}) {
  const browser = await chromium.launch({ executablePath: setting("VMWATCH_PAGE_CHROMIUM"), args: ARGUMENTS });
  const faults = [];
  let page;
  try {
    const context = await browser.newContext({ locale: "en-GB", viewport: { width: 1280, height: 900 }, ...options });
    context.setDefaultTimeout(PATIENCE_MS);
    page = await context.newPage();
    watch(page, faults);
    await run(page, { context, faults });
    if (faults.length > 0) throw new Error(`the browser reported faults of the page:\n${faults.join("\n")}`);
  } catch (error) {
    console.log(error.stack ?? error);
    if (faults.length > 0) console.log(`faults:\n${faults.join("\n")}`);
    const text = await page?.locator("body").innerText({ timeout: 1000 }).catch(() => "");
    console.log(`text shown by the page at ${page?.url()}:\n${text}`);
    process.exitCode = 1;
  } finally {
    await browser.close();
    harness.close();
  }
}

function watch(page, faults) {
  page.on("pageerror", (error) => faults.push(`error: ${error.stack ?? error}`));
  page.on("console", (message) => {
    // Chromium logs every failed request to the console. Ignore these: a story checks an expected failure by what the
    // page shows.
    // It also logs the header Cross-Origin-Opener-Policy of pages over plain HTTP, for which it does not apply.
    const expected = /^(Failed to load resource|The Cross-Origin-Opener-Policy header has been ignored)/.test(message.text());
    if (message.type() === "error" && !expected) faults.push(`console: ${message.text()}`);
  });
  page.on("request", (request) => {
    const address = new URL(request.url());
    const own = address.origin === new URL(url).origin || address.protocol === "data:";
    if (!own) faults.push(`request to another host: ${request.url()}`);
  });
}

export async function signIn(page, { user, password } = admin, path = "/") {
  await page.goto(url + path);
  await page.locator('input[name="user"]').fill(user);
  await page.locator('input[name="password"]').fill(password);
  await page.locator('button[type="submit"]').click();
  await page.locator("header.top").waitFor();
}

/** Adds the violations that axe finds to the faults (WCAG 2.2 A and AA, and best practices). */
export async function accessible(page, what, faults) {
  if (!(await page.evaluate(() => "axe" in globalThis))) await page.evaluate(axe);
  const { violations } = await page.evaluate(() => globalThis.axe.run(document, { resultTypes: ["violations"] }));
  const found = violations.map(({ id, help, nodes }) => `${id}: ${help}\n  ${nodes.map((node) => node.html).join("\n  ")}`);
  if (found.length > 0) faults.push(`axe on ${what}:\n${found.join("\n")}`);
}

export function check(holds, what) {
  if (!holds) throw new Error(what);
}

/** Waits until the probe returns a truthy value, and returns it. A probe that times out is repeated. */
export async function until(what, probe) {
  const end = Date.now() + PATIENCE_MS;
  for (;;) {
    try {
      const result = await probe();
      if (result) return result;
    } catch (error) {
      if (error.name !== "TimeoutError") throw error;
    }
    if (Date.now() > end) throw new Error(`timed out after ${PATIENCE_MS} ms: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

/** Reports a measured figure to the harness. */
export const figure = (name, value) => console.log(`figure ${name} ${value}`);

const harness = createInterface({ input: process.stdin });
const answers = harness[Symbol.asyncIterator]();

/** Sends a command to the harness, such as stopping a service, and returns its reply. */
export async function command(what) {
  console.log(`@${what}`);
  const { value } = await answers.next();
  if (value === undefined) throw new Error(`the harness did not reply to ${what}`);
  return value;
}
