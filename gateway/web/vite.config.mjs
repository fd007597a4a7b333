import { defineConfig } from "vite";

// `npm run dev` forwards requests for /api to the gateway that `./dev up` started.
const gateway = process.env.VMWATCH_GATEWAY ?? "http://127.0.0.1:8086";

export default defineConfig({
  build: {
    // Do not inline assets as data: URLs, which the Content-Security-Policy does not allow in style sheets.
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    target: "es2022",
  },
  server: { proxy: { "/api": { target: gateway } } },
  preview: { proxy: { "/api": { target: gateway } } },
});
