// The feature browser: a table that draws the rows in view, and a page for each feature.
// Tokens, explanations and names enter the page as text only.
"use strict";
(() => {
  const ROW_HEIGHT = 30; // px, as in the style sheet
  const PRINTED_ROWS = 60;
  const KEPT_SHARDS = 32;
  const pageTitle = document.title;
  const byId = (id) => document.getElementById(id);

  // An element of HTML, or one of a histogram; `given`: its class, or its attributes.
  const SVG = ["svg", "rect", "title"];
  const make = (tag, given = "", ...children) => {
    const element = document.createElementNS(`http://www.w3.org/${SVG.includes(tag) ? "2000/svg" : "1999/xhtml"}`, tag);
    const attributes = Object.entries(typeof given === "string" ? { class: given } : given);
    for (const [name, value] of attributes) if (value !== "") element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const prose = (sentence) => sentence.split("`").map((part, i) => (i % 2 ? make("code", "", part) : part));

  const complain = (error) => {
    byId("loading").hidden = false;
    byId("loading").textContent = error.message;
  };

  // Data files: each calls saeensFeatures(name, base64 of gzipped JSON).

  const waiting = new Map();
  window.saeensFeatures = (name, text) => waiting.get(name)?.(text);

  const unpacked = (text) => {
    const binary = atob(text);
    const bytes = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i); // `Uint8Array.from` takes seconds
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
  };

  const load = (name) =>
    new Promise((resolve, reject) => {
      const script = make("script", { src: `features/${name}.js` });
      waiting.set(name, resolve);
      script.onload = () => script.remove();
      script.onerror = () => reject(new Error(`features/${name}.js cannot be read: write the report again`));
      document.head.append(script);
    })
      .finally(() => waiting.delete(name))
      .then(unpacked);

  const shards = new Map(); // promises by number, the last used at the end
  const shard = (number) => {
    const found = shards.get(number) ?? load(String(number));
    shards.delete(number);
    shards.set(number, found);
    if (shards.size > KEPT_SHARDS) shards.delete(shards.keys().next().value);
    return found;
  };

  // Numbers and tokens as text.

  const number = (value, digits = 3) => (value === null ? "–" : String(Number(value.toPrecision(digits))));
  const percent = (value) => (value === 0 ? "0" : `${Number((value * 100).toPrecision(value < 1e-4 ? 2 : 3))}%`);
  const cosine = (value) => (value === null ? "–" : value.toFixed(3));
  const grouped = (value) => value.toLocaleString("en");

  // Whitespace is visible; invisible characters and those that turn the direction of writing are shown by their code. A token that is a part
  // of a character comes as its byte, <0xE2>.
  const INVISIBLE = /(<0x[89A-F][0-9A-F]>|[ \t\n\r]|[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff])/;
  const GLYPHS = { " ": "·", "\t": "⇥", "\n": "↵", "\r": "␍" };
  const EMPTY = "∅";
  const glyph = (found) => (found.length > 1 ? found : GLYPHS[found] ?? `U+${found.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`);
  const searched = (text) => (text.split(INVISIBLE).map((part, i) => (i % 2 ? glyph(part) : part)).join("") || EMPTY).toLowerCase();
  const token = (text, given = "token") => {
    const parts = text.split(INVISIBLE).map((part, i) => {
      if (i % 2 === 0) return part;
      const title = `the byte ${part.slice(3, 5)}, a part of a character that is more than one token`;
      return make("span", part.length > 1 ? { class: "byte", title } : "space", glyph(part));
    });
    return make("span", given, ...(text ? parts.filter(Boolean) : [make("span", "space", EMPTY)]));
  };

  const start = (data) => {
    // Rows come by method, member and index.
    const rows = [];
    const firsts = new Map(); // by method and member: the first row, how many
    for (const [method, member, count] of data.groups) {
      const ensemble = data.ensembles.find((each) => each.name === method);
      firsts.set(`${method}/${member}`, [rows.length, count]);
      for (let i = 0; i < count; i++) {
        const row = { at: rows.length, ensemble };
        for (const name in data.columns) row[name] = data.columns[name][row.at];
        rows.push(row);
      }
    }
    delete data.columns;
    const rowOf = (method, member, index) => {
      const [first, count] = firsts.get(`${method}/${member}`) ?? [0, 0];
      return index < count ? rows[first + index] : undefined;
    };
    const addressOf = (row) => `#${row.ensemble.name}/${row.member}/${row.index}`;
    const placeOf = (row) => `${row.ensemble.unit} ${row.member} · ${row.index}`;
    const linkTo = (row, text = placeOf(row), attributes = {}) => make("a", { href: addressOf(row), ...attributes }, text);
    const nearestTo = (row) => (row.nearMember ? rowOf(row.ensemble.name, row.nearMember, row.nearIndex) : undefined);
    const chips = (row) => row.tokens.map((id) => token(data.vocabulary[id]));
    const isShared = (value) => value !== null && value >= data.shared;
    const mark = ({ glyph, colour }) => make("span", { class: "mark", style: `color: ${colour}`, "aria-hidden": "true" }, glyph);

    // The table.

    const frame = byId("rows");
    const head = frame.querySelector("thead");
    const body = frame.querySelector("tbody");
    const form = byId("feature-filters");
    let kept = rows; // by the filters
    let order = rows; // those in the order shown
    let position = 0; // the keyboard's place in the order
    let scrolledTo = 0;
    let sorting = { name: "method", sign: 1 };

    const KEYS = {
      method: (row) => row.at,
      nearest: (row) => row.near,
      tokens: (row) => row.tokens[0] ?? null, // the vocabulary is in alphabetical order
      explanation: (row) => row.explanation || null,
    };
    const sorted = ({ name, sign }) => {
      const key = KEYS[name] ?? ((row) => row[name]);
      const keyed = kept.map((row) => ({ row, key: key(row) }));
      keyed.sort((one, other) => {
        if (one.key === null || other.key === null) return (one.key === null) - (other.key === null); // rows without a value come last
        return one.key < other.key ? -sign : one.key > other.key ? sign : 0;
      });
      return keyed.map((each) => each.row);
    };

    // The search goes through tokens and explanations as they are shown. Spaces part words; those at the beginning are looked for, as `·` is.
    let vocabulary = null;
    const finder = (text) => {
      const spaced = text.replace(/^ +/, (spaces) => "·".repeat(spaces.length));
      const words = spaced.toLowerCase().split(/\s+/).filter(Boolean);
      if (words.length) vocabulary ??= data.vocabulary.map(searched);
      const found = words.map((word) => vocabulary.map((each) => each.includes(word)));
      return (row) =>
        words.every((word, i) => row.tokens.some((id) => found[i][id]) || (row.explanation && searched(row.explanation).includes(word)));
    };

    const FILTERS = {
      method: (row, value) => row.ensemble.name === value,
      member: (row, value) => row.member === Number(value),
      near: (row, value) => (value === "alone" ? row.first !== null && !isShared(row.first) : isShared(row.near) === (value === "shared")),
      seeds: (row, value) => isShared(row.seed) === (value === "shared"),
      dead: (row, value) => (row.density === 0) === (value === "dead"),
      explained: (row, value) => (["yes", "no"].includes(value) ? Boolean(row.explanation) === (value === "yes") : row.status === value),
      from: (row, value) => Math.fround(row.density) >= Math.fround(value / 100),
      to: (row, value) => Math.fround(row.density) <= Math.fround(value / 100),
    };
    const filter = () => {
      const wanted = [...new FormData(form)].filter(([name, value]) => value && FILTERS[name]);
      const matches = finder(form.elements.find.value);
      kept = rows.filter((row) => wanted.every(([name, value]) => FILTERS[name](row, value)) && matches(row));
      arrange();
    };

    const inCell = { tabindex: -1 }; // the keyboard goes by rows
    const CELLS = {
      method: (row) => [mark(row.ensemble), linkTo(row, narrow.matches ? placeOf(row) : row.ensemble.label, inCell)],
      member: (row) => [String(row.member)],
      index: (row) => [String(row.index)],
      density: (row) => [percent(row.density)],
      mean: (row) => [number(row.mean)],
      near: (row) => [cosine(row.near)],
      nearest: (row) => [nearestTo(row) ? linkTo(nearestTo(row), placeOf(nearestTo(row)), inCell) : "–"],
      seed: (row) => [cosine(row.seed)],
      tokens: chips,
      score: (row) => [number(row.score)],
      explanation: (row) => [row.explanation || "–"],
    };

    // On a narrow screen the first column has the whole place of a feature and stays in view; tokens and explanation come next.
    const narrow = matchMedia("(max-width: 640px)"); // as in the style sheet
    const headings = [...head.querySelectorAll("button")];
    const firstHeading = headings[0].textContent;
    let shownColumns = headings;
    const layOut = () => {
      const leftOut = narrow.matches ? ["member", "index", "nearest"] : [];
      const early = narrow.matches ? ["method", "tokens", "explanation", "score"] : [];
      const rank = (button) => early.indexOf(button.dataset.sort) + 1 || early.length + 1;
      shownColumns = headings.filter((button) => !leftOut.includes(button.dataset.sort)).sort((a, b) => rank(a) - rank(b));
      headings[0].textContent = narrow.matches ? "feature" : firstHeading;
      head.rows[0].replaceChildren(...shownColumns.map((button) => button.closest("th")));
    };

    const line = (row, place) => {
      const cells = shownColumns.map((button) => {
        const name = button.dataset.sort;
        const title = ["explanation", "score"].includes(name) ? row.explanation || row.status || "" : "";
        return make("td", { class: button.closest("th").className, title }, ...CELLS[name](row));
      });
      const current = place === position ? "current" : "";
      return make("tr", { id: `row-${place}`, class: current, "data-row": row.at, "aria-rowindex": place + 2 }, ...cells);
    };
    const spacer = (count) => make("tr", { class: "spacer", style: `height: ${count * ROW_HEIGHT}px`, "aria-hidden": "true" }, make("td"));
    const drawRows = (first, last) => {
      const lines = order.slice(first, last).map((row, i) => line(row, first + i));
      body.replaceChildren(spacer(first), ...lines, spacer(order.length - last));
      frame.setAttribute("aria-activedescendant", byId(`row-${position}`)?.id ?? "");
    };
    const drawView = () => {
      const first = Math.min(order.length, Math.max(0, Math.floor(frame.scrollTop / ROW_HEIGHT) - 4));
      drawRows(first, Math.min(order.length, first + Math.ceil(frame.clientHeight / ROW_HEIGHT) + 8));
    };
    const arrange = () => {
      order = sorted(sorting);
      position = 0;
      frame.scrollTop = 0;
      frame.querySelector("table").setAttribute("aria-rowcount", order.length + 1);
      byId("features-shown").textContent = `${grouped(order.length)} of ${grouped(rows.length)} features`;
      byId("no-feature").hidden = order.length > 0;
      drawView();
    };

    let asked = 0;
    const soon = (work) => () => {
      cancelAnimationFrame(asked);
      asked = requestAnimationFrame(work);
    };
    frame.addEventListener("scroll", () => requestAnimationFrame(drawView), { passive: true });
    form.addEventListener("input", soon(filter));
    byId("no-feature").querySelector("button").addEventListener("click", () => {
      form.reset();
      filter();
      form.elements.find.focus();
    });
    narrow.addEventListener("change", () => {
      layOut();
      drawView();
    });
    for (const button of headings) {
      button.addEventListener("click", () => {
        const name = button.dataset.sort;
        const first = ["method", "member", "index", "tokens", "explanation"].includes(name) ? 1 : -1;
        sorting = { name, sign: sorting.name === name ? -sorting.sign : first };
        for (const each of headings) each.closest("th").removeAttribute("aria-sort");
        button.closest("th").setAttribute("aria-sort", sorting.sign > 0 ? "ascending" : "descending");
        arrange();
      });
    }
    body.addEventListener("click", (event) => {
      const found = event.target.closest("tr[data-row]");
      if (found && !event.target.closest("a") && !String(getSelection())) location.hash = addressOf(rows[found.dataset.row]);
    });
    const moveTo = (place) => {
      position = Math.max(0, Math.min(order.length - 1, place));
      const room = frame.clientHeight - head.offsetHeight - ROW_HEIGHT;
      frame.scrollTop = Math.min(position * ROW_HEIGHT, Math.max(frame.scrollTop, position * ROW_HEIGHT - room));
      drawView();
    };
    frame.addEventListener("keydown", (event) => {
      if (event.target !== frame || event.ctrlKey || event.altKey || event.metaKey) return;
      const page = Math.max(1, Math.floor(frame.clientHeight / ROW_HEIGHT) - 2);
      const last = order.length - 1;
      const places = { ArrowDown: position + 1, ArrowUp: position - 1, PageDown: position + page, PageUp: position - page, Home: 0, End: last };
      if (event.key === "Enter" && order.length) location.hash = addressOf(order[position]);
      else if (event.key in places) moveTo(places[event.key]);
      else return;
      event.preventDefault();
    });
    const most = Math.max(...data.groups.map(([, member]) => member));
    for (let member = 1; member <= most; member++) form.elements.member.append(make("option", "", String(member)));

    // The page of a feature.

    const one = byId("one");
    const histogram = (counts, width) => {
      const bins = counts.slice(0, counts.findLastIndex((count) => count > 0) + 1);
      const top = Math.max(...bins);
      const across = 100 / bins.length;
      const bars = bins.map((count, i) => {
        const height = count ? Math.max(1, (count / top) * 100) : 0;
        const title = make("title", "", `${number(i * width)} to ${number((i + 1) * width)}: ${grouped(count)} tokens`);
        return make("rect", { x: (i + 0.06) * across, y: 100 - height, width: across * 0.88, height }, title);
      });
      const label = `histogram of ${bins.length} bins of width ${width}, the fullest with ${grouped(top)} tokens`;
      const drawing = make("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", role: "img", "aria-label": label }, ...bars);
      const axis = (name, from, title, to) => make("div", name, make("span", "", from), make("span", "of-axis", title), make("span", "", to));
      const [left, below] = [axis("counts", grouped(top), "test tokens", "0"), axis("ends", "0", "activation", number(bins.length * width))];
      const caption = make("figcaption", "", "Test tokens by activation. Those on which the feature is silent are left out.");
      return make("figure", "histogram", make("h3", "", "Activations"), make("div", "axes", left, drawing, below), caption);
    };

    const logits = (title, of, tokens) => {
      const items = of.map(([id, logit]) => make("li", "", token(tokens[id]), " ", make("small", "", (logit > 0 ? "+" : "") + number(logit))));
      return make("div", "logits", make("h3", "", title), make("ol", "", ...items));
    };

    // A context with tokens shaded by activation; `around`: tokens on either side of the one in the middle.
    const context = (found, { tokens, max }, around = Infinity) => {
      const text = make("p", "context");
      found.tokens.forEach((id, i) => {
        if (Math.abs(i - found.centre) > around) return;
        const value = found.activations[i];
        const kind = i === found.centre ? "token peak" : value === null ? "token dropped" : "token";
        const title = value === null ? "dropped by the source: no activation" : number(value);
        const piece = token(tokens[id], { class: kind, title, style: value ? `--heat: ${Math.min(1, value / max).toFixed(3)}` : "" });
        for (const space of piece.querySelectorAll(".space")) space.after(make("wbr")); // lines break there, as at spaces
        text.append(piece);
      });
      return text;
    };

    const detailsOf = async (row) => {
      const { tokens, features } = await shard(Math.floor(row.at / data.shardFeatures));
      return { tokens, ...features[row.at % data.shardFeatures] };
    };

    const matchCard = (row, similarity) => {
      const tokens = make("p", "tokens", ...chips(row));
      const value = make("p", "value", `cosine ${cosine(similarity)}, fires on ${percent(row.density)}`);
      const given = { class: `match ${isShared(similarity) ? "shared" : "unique"}`, style: `border-top-color: ${row.ensemble.colour}` };
      detailsOf(row).then((details) => {
        const texts = (details.contexts ?? []).slice(0, 3).map((each) => context(each, details, 6));
        if (texts.length) tokens.replaceWith(...texts);
      }, complain);
      return make("div", given, make("h3", "", linkTo(row)), value, tokens);
    };

    const explained = ({ status, explanation, score, control }) => {
      if (!status) return [["explanation", "none: the feature is not among those that were drawn to be explained"]];
      return [
        ["explanation", explanation || "none"],
        score !== null && ["detection score", `${number(score)} balanced accuracy; 0.5 is chance`],
        control !== null && ["control score", `${number(control)} with the explanation of another feature`],
        ["status", data.why[status] ? `${status}: ${data.why[status]}` : status],
      ];
    };

    const factsOf = (row, { max }) => {
      const { unit } = row.ensemble;
      const nearest = nearestTo(row);
      const verdict = (value, yes, no) => `cosine ${cosine(value)}: ${isShared(value) ? yes : no}; nearest `;
      const comesBack = verdict(row.seed, "comes back under another seed", "does not come back under another seed");
      const title = `features have pages under seed ${data.seed} alone`;
      const where = make("span", { title }, `${unit} ${row.seedMember} · ${row.seedIndex} of seed ${row.otherSeed}`);
      const facts = [
        ["density", row.density ? `${percent(row.density)} of the test tokens` : "0: it never fires on the test tokens"],
        max && ["largest activation", number(max, 4)],
        row.density && ["mean activation", number(row.mean, 4)],
        nearest && [`in other ${unit}s`, verdict(row.near, "shared", "unique"), linkTo(nearest)],
        row.seed !== null && ["stability", comesBack, where],
        ...(data.why ? explained(row) : []),
        ["most active on", ...(row.density ? chips(row) : ["–"])],
      ];
      const lines = facts.filter(Boolean).map(([name, ...values]) => [make("dt", "", name), make("dd", "", ...values)]);
      return make("dl", "facts-of-one", ...lines.flat());
    };

    const contextsOf = (details) => {
      if (!details.contexts) return [make("p", "missing", ...prose(data.missingContexts || "The table contexts has no row of this feature."))];
      const none = "Output tokens: the language model has no unembedding to apply to this feature's direction.";
      const outputs = ["promoted", "suppressed"].map((name) => logits(`Output tokens ${name}`, details[name], details.tokens));
      const beside = make("div", "beside", ...(details.promoted.length ? outputs : [make("p", "note", none)]));
      if (details.contexts.length) beside.prepend(histogram(details.histogram, details.binWidth));
      const texts = details.contexts.map((each) => {
        const where = `document ${grouped(each.document)}, token ${grouped(each.position)}: ${number(each.activations[each.centre])}`;
        return make("li", "", context(each, details), make("small", "", where));
      });
      const list = texts.length ? make("ol", "contexts", ...texts) : make("p", "note", "It never fires on the test tokens.");
      return [beside, make("h2", "", "Largest activations"), list];
    };

    const matchesOf = (row, { matches }) => {
      const found = matches.map(([member, index, similarity]) => [rowOf(row.ensemble.name, member, index), similarity]).filter(([other]) => other);
      if (!found.length) return [];
      return [make("h2", "", `Best match in each other ${row.ensemble.unit}`), make("div", "matches", ...found.map((each) => matchCard(...each)))];
    };

    const step = (row, by, text) => {
      const place = order.indexOf(row);
      const other = place < 0 ? undefined : order[place + by];
      return other ? linkTo(other, text, { rel: by > 0 ? "next" : "prev" }) : make("span", "off", text);
    };

    const show = (isOne) => {
      if (isOne && !byId("all").hidden) scrolledTo = frame.scrollTop;
      byId("all").hidden = isOne;
      one.hidden = !isOne;
    };

    let opened = 0;
    const openFeature = async (row) => {
      const name = `${row.ensemble.label}, ${placeOf(row)}`;
      document.title = `${name} – ${data.experiment}, layer ${data.layer}`;
      const call = ++opened;
      const details = await detailsOf(row);
      if (call !== opened) return; // another was opened in the meantime
      const title = make("h1", { tabindex: -1 }, mark(row.ensemble), name);
      const steps = [make("a", { href: "#table" }, "‹ all features"), step(row, -1, "previous in the table"), step(row, 1, "next in the table")];
      const nav = make("nav", { class: "steps", "aria-label": "features" }, ...steps);
      one.replaceChildren(nav, title, factsOf(row, details), ...contextsOf(details), ...matchesOf(row, details));
      show(true);
      scrollTo({ top: 0, behavior: "instant" });
      title.focus({ preventScroll: true });
    };

    const showAll = () => {
      opened++;
      document.title = pageTitle;
      if (one.hidden) return;
      one.replaceChildren();
      show(false);
      frame.scrollTop = scrolledTo;
      drawView();
      byId("table").scrollIntoView({ behavior: "instant" });
      if (location.hash === "#table") frame.focus({ preventScroll: true });
    };

    const route = () => {
      const found = /^#([a-z0-9_]+)\/(\d+)\/(\d+)$/.exec(location.hash);
      byId("loading").hidden = true;
      if (!found) return showAll();
      const row = rowOf(found[1], Number(found[2]), Number(found[3]));
      if (row) return openFeature(row).catch(complain);
      complain(new Error(`There is no feature ${found.slice(1).join("/")} here.`));
      return showAll();
    };

    addEventListener("hashchange", route);
    addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !one.hidden) location.hash = "#table";
    });
    addEventListener("resize", soon(drawView));
    addEventListener("beforeprint", () => {
      const first = Math.floor(frame.scrollTop / ROW_HEIGHT);
      drawRows(first, Math.min(order.length, first + PRINTED_ROWS));
    });
    addEventListener("afterprint", drawView);

    byId("all").hidden = false;
    layOut();
    headings[0].closest("th").setAttribute("aria-sort", "ascending");
    filter();
    route();
  };

  if (window.DecompressionStream) load("list").then(start).catch(complain);
  else complain(new Error("This browser is too old: it has no DecompressionStream to unpack the features."));
})();
