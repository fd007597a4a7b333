import { render } from "preact";
import { App } from "./app";
import { followPreferences } from "./preferences";
import { followLinks } from "./router";

followPreferences();
followLinks();
const root = document.getElementById("page");
if (root) render(<App />, root);
