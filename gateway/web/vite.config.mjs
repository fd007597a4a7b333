import { defineConfig } from "vite";

// `npm run dev` proxies /api to the gateway started by `./dev up`.
const gateway = process.env.VMWATCH_GATEWAY ?? "http://127.0.0.1:8086";

export default defineConfig({
  build: {
    // The Content-Security-Policy does not allow data: URLs in style sheets.
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    target: "es2022",
  },
  server: { proxy: { "/api": { target: gateway } } },
  preview: { proxy: { "/api": { target: gateway } } },
});
