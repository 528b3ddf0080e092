// Draws the plots when they come into view, in the colours of the theme, and saves them; switches themes and methods; sorts and filters tables.
"use strict";
(() => {
  const root = document.documentElement;
  const figures = JSON.parse(document.getElementById("figure-data").textContent);
  const plots = [...document.querySelectorAll(".plot")];
  const hidden = new Set(); // methods

  // The part of a plot's layout that follows the theme.
  const themed = () => {
    const style = getComputedStyle(root);
    const [text, muted, line, grid, surface] = ["text", "muted", "line", "grid", "surface"].map((name) => style.getPropertyValue(`--${name}`).trim());
    const axis = { color: muted, gridcolor: grid, linecolor: line, title: { font: { size: 13 } } };
    const layout = {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: text, family: getComputedStyle(document.body).fontFamily, size: 12 },
      hoverlabel: { bgcolor: surface, bordercolor: line, font: { color: text } },
      modebar: { bgcolor: surface, color: muted, activecolor: text },
      xaxis: axis,
      yaxis: axis,
    };
    return { template: { layout } };
  };

  // A saved picture: what the plot shows, with a legend below, in dark text on white in either theme, always of the same size.
  const saved = (plot) => {
    const axis = { color: "#444444", gridcolor: "#e6e9ed", linecolor: "#444444", title: { font: { size: 14 } } };
    const layout = {
      paper_bgcolor: "#ffffff",
      plot_bgcolor: "#ffffff",
      font: { color: "#1c2126", family: "Arial, Helvetica, sans-serif", size: 12 },
      xaxis: axis,
      yaxis: axis,
    };
    const legend = { orientation: "h", x: 0, xanchor: "left", y: -0.2, yanchor: "top" };
    const shown = structuredClone({ data: plot.data, layout: plot.layout });
    return { data: shown.data, layout: { ...shown.layout, template: { layout }, showlegend: true, legend } };
  };
  const save = (plot, format) => {
    const size = { width: 800, height: 520, scale: format === "png" ? 3 : 1 };
    Plotly.downloadImage(saved(plot), { format, filename: plot.dataset.file, ...size });
  };

  // Buttons show the format's name, in letters of 3 to 5 by 5 squares: a picture of a camera would not tell one from the other.
  const letters = {
    S: ["###", "#..", "###", "..#", "###"],
    V: ["#.#", "#.#", "#.#", "#.#", ".#."],
    G: ["###", "#..", "#.#", "#.#", "###"],
    P: ["###", "#.#", "###", "#..", "#.."],
    N: ["#..#", "##.#", "#.##", "#..#", "#..#"],
  };
  const icon = (word) => {
    const rows = [0, 1, 2, 3, 4].map((row) => [...word].map((letter) => letters[letter][row]).join("."));
    const squares = rows.flatMap((row, y) => [...row].map((dot, x) => (dot === "#" ? `M${x},${y + 1}h1v1h-1z` : "")));
    return { width: rows[0].length, height: 7, path: squares.join("") };
  };
  const saveButton = (format) => {
    const word = format.toUpperCase();
    return { name: `save-${format}`, title: `Save as ${word}`, icon: icon(word), click: (plot) => save(plot, format) };
  };

  const draw = (plot) => {
    if (plot.dataset.drawn || !window.Plotly) return;
    plot.dataset.drawn = "yes";
    const { data, layout } = figures[plot.dataset.figure];
    for (const trace of data) trace.visible = !hidden.has(trace.meta.method);
    const config = {
      responsive: true,
      displaylogo: false,
      showSendToCloud: false,
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "toImage"],
      modeBarButtonsToAdd: [saveButton("svg"), saveButton("png")],
    };
    Plotly.newPlot(plot, data, { ...layout, ...themed() }, config);
  };
  const drawn = () => plots.filter((plot) => plot.dataset.drawn);
  const relayout = (keys) => drawn().forEach((plot) => Plotly.relayout(plot, keys));

  const setTheme = (theme) => {
    root.dataset.theme = theme;
    relayout(themed());
  };
  document.getElementById("theme").addEventListener("click", () => {
    setTheme(root.dataset.theme === "dark" ? "light" : "dark");
    kept("saeens-theme", root.dataset.theme);
  });

  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const method = button.dataset.method;
      const show = hidden.delete(method);
      if (!show) hidden.add(method);
      button.setAttribute("aria-pressed", String(show));
      for (const plot of drawn()) {
        const traces = plot.data.map((trace, i) => (trace.meta.method === method ? i : -1)).filter((i) => i >= 0);
        if (traces.length) Plotly.restyle(plot, { visible: show }, traces);
      }
    });
  }

  const drawSeen = (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => draw(entry.target));
  const seen = new IntersectionObserver(drawSeen, { rootMargin: "600px" });
  for (const plot of plots) seen.observe(plot);

  // On paper: every plot, in light colours, two in a row.
  let before = null;
  addEventListener("beforeprint", () => {
    before = root.dataset.theme;
    plots.forEach(draw);
    setTheme("light");
    relayout({ width: 325, height: 230, autosize: false, "margin.t": 8, "xaxis.tickfont.size": 9, "yaxis.tickfont.size": 9 });
  });
  addEventListener("afterprint", () => {
    setTheme(before);
    relayout({ width: null, height: null, autosize: true, "margin.t": 28, "xaxis.tickfont.size": null, "yaxis.tickfont.size": null });
  });

  // The leaderboard: a press on a heading sorts it, fields above it filter it.

  const table = document.getElementById("leaderboard");
  if (table) {
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const buttons = [...table.querySelectorAll("thead button")];
    const compare = (one, other) => (isNaN(one) || isNaN(other) ? one.localeCompare(other) : one - other);
    const sort = (button) => {
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
      const valueOf = (row) => row.querySelector(`[data-key="${button.dataset.sort}"]`).dataset.value;
      const sorted = [...body.rows].sort((a, b) => {
        const [one, other] = [valueOf(a), valueOf(b)];
        if (one === "" || other === "") return (one === "") - (other === ""); // rows without a value stay last
        return order === "ascending" ? compare(one, other) : compare(other, one);
      });
      body.append(...sorted);
    };
    for (const button of buttons) button.addEventListener("click", () => sort(button));

    const filters = document.getElementById("filters");
    const find = filters.querySelector("[data-find]");
    const filter = () => {
      const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
      const wanted = [...filters.querySelectorAll("[data-filter]")].filter((select) => select.value);
      for (const row of rows) {
        const text = `${row.textContent} ${row.dataset.method}`.toLowerCase(); // the method by either name
        const matches = wanted.every((select) => row.getAttribute(`data-${select.dataset.filter}`) === select.value);
        row.hidden = !(matches && words.every((word) => text.includes(word)));
      }
      const shown = rows.filter((row) => !row.hidden).length;
      document.getElementById("shown").textContent = `${shown} of ${rows.length} rows`;
      document.getElementById("no-row").hidden = shown > 0;
    };
    filters.addEventListener("input", filter);
    document.querySelector("#no-row button").addEventListener("click", () => {
      filters.reset();
      filter();
      find.focus();
    });
    filter();
  }

  // The address of the Dagster UI: that of this page if the UI serves it. Another one, once typed, is kept for all pages until the field is emptied.

  const form = document.getElementById("ui-address");
  if (form) {
    const field = form.ui;
    const written = field.defaultValue;
    const standard = location.protocol.startsWith("http") && location.pathname.startsWith("/reports/") ? location.origin : written;
    const links = [...document.querySelectorAll(`a[href^="${written}/"]`)].map((link) => [link, link.getAttribute("href").slice(written.length)]);
    const isAddress = (text) => URL.canParse(text) && ["http:", "https:"].includes(new URL(text).protocol);
    const lead = () => {
      const address = field.value.trim().replace(/\/+$/, "") || standard;
      const isGood = isAddress(address);
      form.querySelector("output").textContent = isGood ? "" : "This is no address that begins with http:// or https://.";
      if (!isGood) return;
      for (const [link, path] of links) link.setAttribute("href", address + path);
      kept("saeens-ui", address === standard ? null : address);
    };
    field.placeholder = standard;
    field.value = kept("saeens-ui") ?? standard;
    lead();
    field.addEventListener("input", lead);
    field.addEventListener("change", () => {
      if (!field.value) field.value = standard;
    });
  }
})();
