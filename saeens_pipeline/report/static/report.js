// Draws the plots when they come into view, in the colours of the theme; switches themes and methods; sorts and filters tables.
"use strict";
(() => {
  const root = document.documentElement;
  const figures = JSON.parse(document.getElementById("figure-data").textContent);
  const plots = [...document.querySelectorAll(".plot")];
  const hidden = new Set(); // methods

  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  // The layout's keys that follow the theme, for a figure's own axes.
  const themed = () => {
    const axis = { color: colour("--muted"), gridcolor: colour("--grid"), linecolor: colour("--line") };
    const keys = {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      "font.color": colour("--text"),
      "font.family": getComputedStyle(document.body).fontFamily,
      "font.size": 12,
      "hoverlabel.bgcolor": colour("--surface"),
      "hoverlabel.bordercolor": colour("--line"),
      "hoverlabel.font.color": colour("--text"),
      "modebar.bgcolor": "rgba(0,0,0,0)",
      "modebar.color": colour("--muted"),
      "modebar.activecolor": colour("--text"),
    };
    for (const name of ["xaxis", "yaxis"]) {
      for (const [key, value] of Object.entries(axis)) keys[`${name}.${key}`] = value;
    }
    return keys;
  };

  const config = (name) => ({
    responsive: true,
    displaylogo: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    toImageButtonOptions: { format: "png", filename: name, scale: 2 },
  });

  const nested = (layout, path, value) => {
    const keys = path.split(".");
    const last = keys.pop();
    let place = layout;
    for (const key of keys) place = place[key] ??= {};
    place[last] = value;
  };

  const isShown = (trace) => !(trace.meta && hidden.has(trace.meta.method));

  const draw = (plot) => {
    if (plot.dataset.drawn || !window.Plotly) return;
    const name = plot.dataset.figure;
    const figure = figures[name];
    for (const [path, value] of Object.entries(themed())) nested(figure.layout, path, value);
    for (const trace of figure.data) trace.visible = isShown(trace);
    plot.dataset.drawn = "yes";
    Plotly.newPlot(plot, figure.data, figure.layout, config(name));
  };

  const drawn = () => plots.filter((plot) => plot.dataset.drawn);

  const setTheme = (theme) => {
    root.dataset.theme = theme;
    for (const plot of drawn()) Plotly.relayout(plot, themed());
  };

  const watch = () => {
    const seen = new IntersectionObserver(
      (entries) => {
        for (const entry of entries) {
          if (entry.isIntersecting) {
            seen.unobserve(entry.target);
            draw(entry.target);
          }
        }
      },
      { rootMargin: "600px" },
    );
    for (const plot of plots) seen.observe(plot);
  };

  document.getElementById("theme").addEventListener("click", () => {
    const theme = root.dataset.theme === "dark" ? "light" : "dark";
    setTheme(theme);
    try {
      localStorage.setItem("saeens-theme", theme);
    } catch {
      // a browser that keeps nothing for files
    }
  });

  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const method = button.dataset.method;
      const show = hidden.delete(method);
      if (!show) hidden.add(method);
      button.setAttribute("aria-pressed", String(show));
      for (const plot of drawn()) {
        const traces = plot.data.map((trace, i) => (trace.meta?.method === method ? i : -1)).filter((i) => i >= 0);
        if (traces.length) Plotly.restyle(plot, { visible: show }, traces);
      }
    });
  }

  // On paper: every plot, in light colours, two beside each other.
  const onPaper = { width: 325, height: 230, autosize: false, "xaxis.tickfont.size": 9, "yaxis.tickfont.size": 9 };
  let before = null;
  addEventListener("beforeprint", () => {
    before = root.dataset.theme;
    setTheme("light");
    plots.forEach(draw);
    for (const plot of drawn()) Plotly.relayout(plot, onPaper);
  });
  addEventListener("afterprint", () => {
    setTheme(before);
    for (const plot of drawn()) Plotly.relayout(plot, { width: null, height: null, autosize: true, "xaxis.tickfont.size": null, "yaxis.tickfont.size": null });
  });

  // Tables that are sorted by pressing a heading.
  const compare = (one, other) => {
    if (one === "" || other === "") return (one === "") - (other === ""); // what is missing stays last
    const [a, b] = [Number(one), Number(other)];
    return Number.isNaN(a) || Number.isNaN(b) ? one.localeCompare(other) : a - b;
  };

  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    const buttons = [...table.querySelectorAll("thead button")];
    const valueOf = (row, key) => row.querySelector(`[data-key="${key}"]`).dataset.value;
    for (const button of buttons) {
      button.addEventListener("click", () => {
        const isNumber = button.closest("th").classList.contains("number");
        const first = button.dataset.first ?? (isNumber ? "descending" : "ascending"); // the best, where one end is better
        const second = first === "ascending" ? "descending" : "ascending";
        const order = button.dataset.order === first ? second : first;
        for (const each of buttons) {
          delete each.dataset.order;
          each.closest("th").removeAttribute("aria-sort");
        }
        button.dataset.order = order;
        button.closest("th").setAttribute("aria-sort", order);
        const sign = order === "ascending" ? 1 : -1;
        const rows = [...body.rows].sort((a, b) => {
          const [one, other] = [valueOf(a, button.dataset.sort), valueOf(b, button.dataset.sort)];
          return one === "" || other === "" ? compare(one, other) : sign * compare(one, other);
        });
        body.append(...rows);
      });
    }
  }

  // Where the Dagster UI answers: another address, once typed, is kept for all pages until the field is emptied.
  const ui = document.getElementById("ui-address");
  if (ui) {
    const key = "saeens-ui";
    const standard = ui.ui.defaultValue;
    const links = [...document.querySelectorAll("a[href]")].filter((link) => link.getAttribute("href").startsWith(`${standard}/`));
    const paths = links.map((link) => link.getAttribute("href").slice(standard.length));
    ui.ui.placeholder = standard;
    const isAddress = (text) => URL.canParse(text) && ["http:", "https:"].includes(new URL(text).protocol);
    const leadTo = (text) => {
      const address = text.trim().replace(/\/+$/, "") || standard;
      const isGood = isAddress(address);
      ui.querySelector("output").textContent = isGood ? "" : "This is no address that begins with http:// or https://.";
      if (isGood) links.forEach((link, i) => link.setAttribute("href", address + paths[i]));
      return isGood ? address : null;
    };
    try {
      const kept = localStorage.getItem(key);
      if (kept && leadTo(kept)) ui.ui.value = kept;
    } catch {
      // a browser that keeps nothing for files
    }
    ui.addEventListener("input", () => {
      const address = leadTo(ui.ui.value);
      if (!address) return;
      try {
        if (address === standard) localStorage.removeItem(key);
        else localStorage.setItem(key, address);
      } catch {
        // a browser that keeps nothing for files
      }
    });
    ui.addEventListener("change", () => {
      if (!ui.ui.value) ui.ui.value = standard;
    });
    ui.addEventListener("submit", (event) => event.preventDefault());
  }

  const form = document.getElementById("filters");
  if (form) {
    const rows = [...document.querySelectorAll("#leaderboard tbody tr")];
    const filter = () => {
      const words = form.querySelector("[data-find]").value.toLowerCase().split(/\s+/).filter(Boolean);
      const wanted = [...form.querySelectorAll("[data-filter]")].filter((select) => select.value);
      let shown = 0;
      for (const row of rows) {
        const text = `${row.textContent} ${row.dataset.method}`.toLowerCase(); // the method by either name
        const matches =
          words.every((word) => text.includes(word)) &&
          wanted.every((select) => row.getAttribute(`data-${select.dataset.filter}`) === select.value);
        row.hidden = !matches;
        shown += matches;
      }
      document.getElementById("shown").textContent = `${shown} of ${rows.length} rows`;
      document.getElementById("no-row").hidden = shown > 0;
    };
    form.addEventListener("input", filter);
    form.addEventListener("submit", (event) => event.preventDefault());
    document.querySelector("#no-row button").addEventListener("click", () => {
      form.reset();
      filter();
      form.querySelector("[data-find]").focus();
    });
    filter();
  }

  watch();
})();
