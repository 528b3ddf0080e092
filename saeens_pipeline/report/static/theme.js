// Before anything is drawn: the theme that was chosen, or the system's.
"use strict";
(() => {
  let chosen = null;
  try {
    chosen = localStorage.getItem("saeens-theme");
  } catch {
    // a browser that keeps nothing for files
  }
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = chosen || (dark ? "dark" : "light");
})();
