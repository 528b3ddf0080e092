// Before anything is drawn: the chosen theme, or the system's.
"use strict";
// Values kept in the browser for all pages; null where the browser keeps nothing for files.
const kept = (key, value) => {
  try {
    if (value === null) localStorage.removeItem(key);
    else if (value !== undefined) localStorage.setItem(key, value);
    return localStorage.getItem(key);
  } catch {
    return null;
  }
};
document.documentElement.dataset.theme = kept("saeens-theme") || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
