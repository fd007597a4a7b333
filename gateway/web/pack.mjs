// Compresses the Vite build for the gateway: writes a .gz next to each file, and fails when the scripts and styles together
// exceed the size limit.
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { constants, gzipSync } from "node:zlib";

const LIMIT = 120 * 1024;
const dist = join(import.meta.dirname, "dist");
let total = 0;
for (const entry of readdirSync(dist, { recursive: true, withFileTypes: true })) {
  if (!entry.isFile() || entry.name.endsWith(".gz")) continue;
  const path = join(entry.parentPath, entry.name);
  const compressed = gzipSync(readFileSync(path), { level: constants.Z_BEST_COMPRESSION });
  writeFileSync(`${path}.gz`, compressed);
  if (/\.(js|css)$/.test(entry.name)) total += compressed.length;
}
const kib = (bytes) => `${(bytes / 1024).toFixed(1)} KiB`;
console.log(`scripts and styles: ${kib(total)} gzipped, limit ${kib(LIMIT)}`);
if (total > LIMIT) process.exit(1);
