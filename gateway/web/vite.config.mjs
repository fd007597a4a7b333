import { defineConfig } from "vite";

// `npm run dev` serves the page with the API of the gateway that `./dev up` started.
const gateway = process.env.VMWATCH_GATEWAY ?? "http://127.0.0.1:8086";

export default defineConfig({
  build: {
    // A data: URL in the style sheet would need an exception of the Content-Security-Policy.
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    target: "es2022",
  },
  server: { proxy: { "/api": { target: gateway } } },
  preview: { proxy: { "/api": { target: gateway } } },
});
