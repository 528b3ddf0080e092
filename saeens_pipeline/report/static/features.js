// The feature browser: a table of which the rows in view are drawn, two maps, and a page for each feature.
// All text of tokens, explanations and names enters the page as text.
"use strict";
(() => {
  const ROW_HEIGHT = 30; // px, as in the style sheet
  const PRINTED_ROWS = 60;
  const KEPT_SHARDS = 32;
  const MOST_ZOOM = 64;
  const DOUBLE_CLICK = 250; // ms: a click opens a feature when no second one has come until then
  const STRIDE = 7919; // a prime: dots are drawn in an order that mixes members, so that none covers the others
  const SVG = "http://www.w3.org/2000/svg";
  const root = document.documentElement;
  const byId = (id) => document.getElementById(id);

  const make = (tag, className = "", ...children) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    element.append(...children);
    return element;
  };

  const prose = (sentence) => sentence.split("`").map((part, i) => (i % 2 ? make("code", "", part) : part));

  // Data files: each calls saeensFeatures(name, base64 of gzipped bytes).

  const waiting = new Map();
  window.saeensFeatures = (name, text) => waiting.get(name)?.(text);

  const unpacked = (text) => {
    const binary = atob(text);
    const bytes = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
  };

  const load = (name) =>
    new Promise((resolve, reject) => {
      const script = make("script");
      waiting.set(name, resolve);
      script.src = `features/${name}.js`;
      script.onload = () => script.remove();
      script.onerror = () => reject(new Error(`features/${name}.js cannot be read: write the report again`));
      document.head.append(script);
    })
      .finally(() => waiting.delete(name))
      .then(unpacked);

  const shards = new Map(); // promises by number, those used last at the end
  const shard = (number) => {
    const found = shards.get(number) ?? load(String(number)).then((bytes) => JSON.parse(new TextDecoder().decode(bytes)));
    shards.delete(number);
    shards.set(number, found);
    if (shards.size > KEPT_SHARDS) shards.delete(shards.keys().next().value);
    return found;
  };

  const list = (bytes) => {
    const length = new DataView(bytes).getUint32(0, true);
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(bytes, 4, length)));
    const types = { Float32Array, Int16Array, Uint16Array, Uint32Array };
    for (const [name, [type, offset, size]] of Object.entries(header.columns)) {
      header.columns[name] = new types[type](bytes, 4 + length + offset, size);
    }
    return header;
  };

  const start = (data) => {
    const columns = data.columns;
    const n = columns.index.length;
    const perFeature = columns.tokens.length / n;
    const ensembles = new Map(data.ensembles.map((each) => [each.name, each]));
    const most = Math.max(...data.groups.map(([, member]) => member));

    // Rows come by method, member and index.
    const methodOf = new Uint8Array(n);
    const starts = new Map();
    const spans = []; // by method: first row, row after the last
    let next = 0;
    for (const [method, member, count] of data.groups) {
      const place = data.ensembles.findIndex((each) => each.name === method);
      starts.set(`${method}/${member}`, [next, count]);
      methodOf.fill(place, next, next + count);
      spans[place] = [spans[place]?.[0] ?? next, next + count];
      next += count;
    }
    const rowOf = (method, member, index) => {
      const [first, count] = starts.get(`${method}/${member}`) ?? [0, 0];
      return index < count ? first + index : -1;
    };
    const ensembleOf = (row) => data.ensembles[methodOf[row]];
    const addressOf = (row) => `#${ensembleOf(row).name}/${columns.member[row]}/${columns.index[row]}`;
    const placeOf = (row) => `${ensembleOf(row).unit} ${columns.member[row]} · ${columns.index[row]}`;
    const nearestRow = (row) => (columns.nearMember[row] ? rowOf(ensembleOf(row).name, columns.nearMember[row], columns.nearIndex[row]) : -1);
    const tokensOf = (row) => {
      const tokens = [];
      for (let i = row * perFeature; i < (row + 1) * perFeature && columns.tokens[i]; i++) tokens.push(data.vocabulary[columns.tokens[i] - 1]);
      return tokens;
    };
    const explanationOf = (row) => data.explanations?.[row] ?? "";
    const statusOf = (row) => (data.explanations ? data.statuses[columns.status[row]] : ""); // of asking about it; empty: it was not drawn
    const linkTo = (row, text) => {
      const link = make("a", "", text);
      link.href = addressOf(row);
      return link;
    };
    const mark = (ensemble) => {
      const glyph = make("span", "mark", ensemble.glyph);
      glyph.style.color = ensemble.colour;
      glyph.setAttribute("aria-hidden", "true");
      return glyph;
    };

    // How numbers and tokens are written.

    const number = (value, digits = 3) => (Number.isNaN(value) || value === null ? "–" : Number(value.toPrecision(digits)).toString());
    const percent = (value) => (value === 0 ? "0" : `${Number((value * 100).toPrecision(value < 1e-4 ? 2 : 3))}%`);
    const cosine = (value) => (Number.isNaN(value) ? "–" : value.toFixed(3));
    const grouped = (value) => value.toLocaleString("en");

    // Whitespace is seen, and what would be invisible, or turn the direction of writing, is written out. Bytes of tokens that are a part of
    // a character come as <0xE2>.
    const INVISIBLE = /<0x[89A-F][0-9A-F]>|[ \t\n\r]|[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;
    const GLYPHS = { " ": "·", "\t": "⇥", "\n": "↵", "\r": "␍" };
    const EMPTY = "∅";
    const glyph = (character) => GLYPHS[character] ?? `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
    const written = (text) => text.replace(INVISIBLE, (found) => (found.length > 1 ? found : glyph(found))) || EMPTY; // as `shown` shows it
    const shown = (token) => {
      if (!token) return [make("span", "space", EMPTY)];
      const parts = [];
      let last = 0;
      for (const found of token.matchAll(INVISIBLE)) {
        if (found.index > last) parts.push(token.slice(last, found.index));
        if (found[0].length > 1) {
          const byte = make("span", "byte", found[0]);
          byte.title = `the byte ${found[0].slice(3, 5)}, a part of a character that is more than one token`;
          parts.push(byte);
        } else {
          parts.push(make("span", "space", glyph(found[0])));
        }
        last = found.index + found[0].length;
      }
      if (last < token.length) parts.push(token.slice(last));
      return parts;
    };
    const chips = (tokens) => tokens.map((token) => make("span", "token", ...shown(token)));

    // The table: which rows there are, in which order, and those in view.

    const rows = byId("rows");
    const head = rows.querySelector("thead");
    const body = rows.querySelector("tbody");
    const form = byId("feature-filters");
    let order = new Uint32Array(0); // rows that are shown, in order
    const kept = new Uint8Array(n); // whether filters leave a row in
    let position = 0; // the place in it that the keyboard is at
    let scrolledTo = 0;

    const isUnder = (row, column, wanted) =>
      !wanted || (wanted === "shared" ? columns[column][row] >= data.shared : !(columns[column][row] >= data.shared));

    // What is looked through is what is read, in lower case: tokens with their glyphs, explanations with theirs or their spaces. Spaces part
    // words, but for those at the beginning: they are looked for, as `·` is anywhere.
    const searched = (text) => written(text).toLowerCase();
    let vocabulary = null; // made when first looked through, as explanations are
    let explanations = null;
    const finder = (text) => {
      const words = text
        .replace(/^ +/, (spaces) => "·".repeat(spaces.length))
        .toLowerCase()
        .split(/\s+/)
        .filter(Boolean);
      if (!words.length) return () => true;
      vocabulary ??= data.vocabulary.map(searched);
      const flags = words.map((word) => Uint8Array.from([0, ...vocabulary.map((token) => token.includes(word))]));
      if (data.explanations) explanations ??= data.explanations.map((each) => (each ? searched(each) : ""));
      return (row) =>
        words.every((word, i) => {
          const flag = flags[i];
          for (let place = row * perFeature; place < (row + 1) * perFeature; place++) if (flag[columns.tokens[place]]) return true;
          return explanations?.[row].includes(word) ?? false;
        });
    };

    const applyFilters = () => {
      const value = (name) => form.elements[name]?.value ?? "";
      const method = data.ensembles.findIndex((each) => each.name === value("method"));
      const member = Number(value("member"));
      // as densities are kept, in single precision
      const [from, to] = [Number(value("from")), value("to") === "" ? Infinity : Number(value("to"))].map((limit) => Math.fround(limit / 100));
      const [near, seeds, dead, explained] = ["near", "seeds", "dead", "explained"].map(value);
      const matches = finder(value("find"));
      for (let row = 0; row < n; row++) {
        const density = columns.density[row];
        kept[row] =
          (method < 0 || methodOf[row] === method) &&
          (!member || columns.member[row] === member) &&
          isUnder(row, "nearCosine", near) &&
          isUnder(row, "seedCosine", seeds) &&
          (!dead || (density > 0) === (dead === "alive")) &&
          (!explained || (explained === "yes" || explained === "no" ? (explanationOf(row) !== "") === (explained === "yes") : statusOf(row) === explained)) &&
          density >= from &&
          density <= to &&
          matches(row);
      }
    };

    const keys = {
      method: null, // the order that rows come in
      tokens: () => Float64Array.from({ length: n }, (_, row) => columns.tokens[row * perFeature] || NaN),
      explanation: () => {
        const sorted = [...new Set(data.explanations.filter(Boolean))].sort();
        const places = new Map(sorted.map((text, i) => [text, i]));
        return Float64Array.from(data.explanations, (text) => places.get(text) ?? NaN);
      },
      seed: () => columns.seedCosine,
      near: () => columns.nearCosine,
    };

    // Largest or smallest first, equal ones as rows come; what has no value comes last. Each row becomes one number, its key's bits in an
    // order that integers have too, then the row, since numbers are sorted many times faster than rows are compared.
    const ROWS = 2 ** 21;
    const sorted = (name, sign) => {
      if (keys[name] === null) {
        const all = Uint32Array.from({ length: n }, (_, row) => row);
        return sign > 0 ? all : all.reverse();
      }
      const key = Float32Array.from(keys[name]?.() ?? columns[name]);
      const bits = new Uint32Array(key.buffer);
      const packed = new Float64Array(n);
      for (let row = 0; row < n; row++) {
        const ascending = (bits[row] & 0x80000000 ? ~bits[row] : bits[row] | 0x80000000) >>> 0;
        const place = Number.isNaN(key[row]) ? 0xffffffff : sign > 0 ? ascending : ~ascending >>> 0;
        packed[row] = place * ROWS + row;
      }
      return Uint32Array.from(packed.sort(), (each) => each % ROWS);
    };
    let sorting = { name: "method", sign: 1, rows: sorted("method", 1) };

    const CELLS = {
      method: (row) => [mark(ensembleOf(row)), linkTo(row, narrow.matches ? placeOf(row) : ensembleOf(row).label)],
      member: (row) => [String(columns.member[row])],
      index: (row) => [String(columns.index[row])],
      density: (row) => [percent(columns.density[row])],
      mean: (row) => [number(columns.mean[row])],
      near: (row) => [cosine(columns.nearCosine[row])],
      nearest: (row) => {
        const other = nearestRow(row);
        return other < 0 ? ["–"] : [linkTo(other, placeOf(other))];
      },
      seed: (row) => [cosine(columns.seedCosine[row])],
      tokens: (row) => chips(tokensOf(row)),
      score: (row) => [number(columns.score[row])],
      explanation: (row) => [explanationOf(row) || "–"],
    };
    const headings = [...head.querySelectorAll("button")];
    let shownColumns = headings;

    // On a narrow screen a feature's place is one column, which stays in view, and what it is about comes next.
    const narrow = matchMedia("(max-width: 640px)"); // as in the style sheet
    const WHAT = headings[0].textContent;
    const layOut = () => {
      const leftOut = narrow.matches ? ["member", "index", "nearest"] : [];
      const early = narrow.matches ? ["method", "tokens", "explanation", "score"] : [];
      const rank = (button) => (early.indexOf(button.dataset.sort) + 1 || early.length + 1);
      shownColumns = headings.filter((button) => !leftOut.includes(button.dataset.sort)).sort((a, b) => rank(a) - rank(b));
      headings[0].textContent = narrow.matches ? "feature" : WHAT;
      head.rows[0].replaceChildren(...shownColumns.map((button) => button.closest("th")));
    };

    const drawn = (place) => {
      const row = order[place];
      const line = make("tr", place === position ? "current" : "");
      line.id = `row-${place}`;
      line.dataset.row = row;
      line.setAttribute("aria-rowindex", place + 2);
      for (const button of shownColumns) {
        const name = button.dataset.sort;
        const cell = make("td", button.closest("th").className, ...CELLS[name](row));
        if (name === "explanation" || name === "score") cell.title = explanationOf(row) || statusOf(row);
        for (const link of cell.querySelectorAll("a")) link.tabIndex = -1; // the keyboard goes by rows
        line.append(cell);
      }
      return line;
    };
    const spacer = (count) => {
      const line = make("tr", "spacer");
      line.style.height = `${count * ROW_HEIGHT}px`;
      line.setAttribute("aria-hidden", "true");
      line.append(make("td"));
      return line;
    };
    const drawRows = (first, last) => {
      const lines = [];
      for (let place = first; place < last; place++) lines.push(drawn(place));
      body.replaceChildren(spacer(first), ...lines, spacer(order.length - last));
      const current = byId(`row-${position}`);
      if (current) rows.setAttribute("aria-activedescendant", current.id);
      else rows.removeAttribute("aria-activedescendant");
    };
    const drawView = () => {
      const first = Math.max(0, Math.floor(rows.scrollTop / ROW_HEIGHT) - 4);
      drawRows(Math.min(first, order.length), Math.min(order.length, first + Math.ceil(rows.clientHeight / ROW_HEIGHT) + 8));
    };

    const arrange = () => {
      order = sorting.rows.filter((row) => kept[row]);
      position = 0;
      rows.scrollTop = 0;
      rows.querySelector("table").setAttribute("aria-rowcount", order.length + 1);
      byId("features-shown").textContent = `${grouped(order.length)} of ${grouped(n)} features`;
      byId("no-feature").hidden = order.length > 0;
      drawView();
    };
    const filter = () => {
      applyFilters();
      arrange();
      drawMaps();
    };

    let asked = 0;
    const soon = (work) => {
      cancelAnimationFrame(asked);
      asked = requestAnimationFrame(work);
    };
    rows.addEventListener("scroll", () => requestAnimationFrame(drawView), { passive: true });
    form.addEventListener("input", () => soon(filter));
    form.addEventListener("submit", (event) => event.preventDefault());
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
        const sign = sorting.name === name ? -sorting.sign : first;
        for (const each of headings) each.closest("th").removeAttribute("aria-sort");
        button.closest("th").setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
        sorting = { name, sign, rows: sorted(name === "nearest" ? "near" : name, sign) };
        arrange();
      });
    }
    body.addEventListener("click", (event) => {
      const line = event.target.closest("tr[data-row]");
      if (line && !event.target.closest("a") && !String(getSelection())) location.hash = addressOf(Number(line.dataset.row));
    });
    const moveTo = (place) => {
      position = Math.max(0, Math.min(order.length - 1, place));
      const room = rows.clientHeight - head.offsetHeight - ROW_HEIGHT;
      if (position * ROW_HEIGHT < rows.scrollTop) rows.scrollTop = position * ROW_HEIGHT;
      if (position * ROW_HEIGHT > rows.scrollTop + room) rows.scrollTop = position * ROW_HEIGHT - room;
      drawView();
    };
    rows.addEventListener("keydown", (event) => {
      if (event.target !== rows || event.ctrlKey || event.altKey || event.metaKey) return;
      const page = Math.max(1, Math.floor(rows.clientHeight / ROW_HEIGHT) - 2);
      const places = {
        ArrowDown: position + 1,
        ArrowUp: position - 1,
        PageDown: position + page,
        PageUp: position - page,
        Home: 0,
        End: order.length - 1,
      };
      if (event.key === "Enter" && order.length) location.hash = addressOf(order[position]);
      else if (event.key in places) moveTo(places[event.key]);
      else return;
      event.preventDefault();
    });

    for (let member = 1; member <= most; member++) {
      const option = make("option", "", String(member));
      option.value = member;
      form.elements.member.append(option);
    }

    // Maps: one for each ensemble, on the same axes.

    // Members have no order: up to eight have colours that are far apart for readers of all kinds of colour vision (at least 0.18 in OKLab,
    // 0.1 as Machado et al. 2009 simulate protanopia, deuteranopia and tritanopia). Rounds have one, and more members than eight cannot be
    // told apart: theirs are Viridis' (van der Walt & Smith), without its ends in the colour of the background.
    const APART = {
      light: ["#0000d8", "#ff899d", "#00b100", "#9d4e00", "#89b1ff", "#621462", "#d8279d", "#6262ff"],
      dark: ["#ffc414", "#9d14ff", "#9dffc4", "#c476d8", "#00b14e", "#c4c4ff", "#896200", "#62629d"],
    };
    const SEQUENCE = [[68, 1, 84], [72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142], [31, 158, 137], [53, 183, 121], [110, 206, 88], [181, 222, 43], [253, 231, 37]];
    const FEW = APART.light.length;
    const isDark = () => root.dataset.theme === "dark";
    const alongSequence = (share) => {
      const [low, high] = isDark() ? [0.3, 1] : [0, 0.88];
      const along = (low + (high - low) * share) * (SEQUENCE.length - 1);
      const [one, other] = [SEQUENCE[Math.floor(along)], SEQUENCE[Math.ceil(along)]];
      const mixed = one.map((value, i) => Math.round(value + (other[i] - value) * (along - Math.floor(along))));
      return `#${mixed.map((value) => value.toString(16).padStart(2, "0")).join("")}`;
    };
    const colourOf = (ensemble, member) =>
      ensemble.unit === "member" && most <= FEW ? APART[isDark() ? "dark" : "light"][member - 1] : alongSequence(most > 1 ? (member - 1) / (most - 1) : 0.5);
    const style = (name) => getComputedStyle(root).getPropertyValue(name).trim();
    // `#rrggbb` as canvases hold it, in the order of bytes of every processor that browsers run on.
    const pixel = (colour) => {
      const value = parseInt(colour.slice(1), 16);
      return (0xff000000 | ((value & 0xff) << 16) | (value & 0xff00) | (value >> 16)) >>> 0;
    };

    const bounds = { x: [Infinity, -Infinity], y: [Infinity, -Infinity] };
    for (const axis of data.axes ? ["x", "y"] : []) {
      for (const value of columns[axis]) {
        if (value < bounds[axis][0]) bounds[axis][0] = value;
        if (value > bounds[axis][1]) bounds[axis][1] = value;
      }
    }

    // Of a disc of so many pixels across: in each row, how many are left out on either side.
    const discOf = (size) => Array.from({ length: size }, (_, row) => Math.round(size / 2 - Math.sqrt(size ** 2 / 4 - (row + 0.5 - size / 2) ** 2)));

    // A map is fitted into its frame, then magnified by `zoom` and moved by `moved`, in CSS pixels.
    class FeatureMap {
      constructor(ensemble, [first, end]) {
        Object.assign(this, { ensemble, first, end, pointed: -1, zoom: 1, moved: [0, 0], fingers: new Map(), isDragged: false });
        this.canvas = make("canvas");
        this.canvas.tabIndex = 0;
        this.canvas.setAttribute("role", "img");
        this.canvas.setAttribute("aria-label", `map of the features of ${ensemble.label}: the table below lists them; plus, minus and arrow keys move it, 0 shows all`);
        this.tip = make("div", "tip");
        this.tip.hidden = true;
        this.ring = make("div", "ring");
        this.ring.hidden = true;
        this.legend = make("div", "members");
        const frame = make("div", "canvas", this.canvas, this.ring, this.tip, this.zoomButtons());
        const title = make("h3", "", mark(ensemble), ensemble.label);
        this.figure = make("figure", "", title, frame, make("figcaption", "", `${ensemble.unit} `, this.legend));
        this.listen();
        if (most > FEW) {
          this.legend.append("1", make("span", "gradient"), String(most));
          return;
        }
        for (let member = 1; member <= most; member++) {
          if (!starts.has(`${ensemble.name}/${member}`)) continue;
          const button = make("button", "", make("span", "swatch"), String(member));
          button.type = "button";
          button.dataset.member = member;
          button.title = `only ${ensemble.unit} ${member}, here and in the table`;
          button.addEventListener("click", () => {
            const chosen = form.elements.member;
            chosen.value = chosen.value === String(member) ? "" : String(member);
            filter();
          });
          this.legend.append(button);
        }
      }

      zoomButtons() {
        const middle = () => [this.canvas.clientWidth / 2, this.canvas.clientHeight / 2];
        const button = (text, label, act) => {
          const made = make("button", "", text);
          made.type = "button";
          made.title = label;
          made.setAttribute("aria-label", `${label}, ${this.ensemble.label}`);
          made.addEventListener("click", act);
          return made;
        };
        this.resetButton = button("reset", "show all", () => this.reset());
        this.nearer = () => this.magnify(2, ...middle());
        this.farther = () => this.magnify(0.5, ...middle());
        return make("div", "zoom", button("+", "zoom in", this.nearer), button("−", "zoom out", this.farther), this.resetButton);
      }

      listen() {
        const { canvas, fingers } = this;
        const at = (event) => {
          const box = canvas.getBoundingClientRect();
          return [event.clientX - box.left, event.clientY - box.top];
        };
        const lift = (event) => fingers.delete(event.pointerId);
        canvas.addEventListener("pointerdown", (event) => {
          if (!fingers.size) this.isDragged = false;
          fingers.set(event.pointerId, at(event));
          this.point(event);
        });
        canvas.addEventListener("pointermove", (event) => {
          const before = fingers.get(event.pointerId);
          if (!before) return this.point(event);
          const now = at(event);
          if (!this.isDragged && Math.hypot(now[0] - before[0], now[1] - before[1]) < 4 && fingers.size === 1) return;
          this.isDragged = true;
          if (!canvas.hasPointerCapture(event.pointerId)) canvas.setPointerCapture(event.pointerId);
          const other = [...fingers].find(([id]) => id !== event.pointerId)?.[1];
          fingers.set(event.pointerId, now);
          this.shift(...now.map((value, i) => (value - before[i]) / (other ? 2 : 1)));
          if (other) {
            const apart = ([x, y]) => Math.max(1, Math.hypot(x - other[0], y - other[1]));
            this.magnify(apart(now) / apart(before), ...now.map((value, i) => (value + other[i]) / 2));
          }
        });
        canvas.addEventListener("pointerup", lift);
        canvas.addEventListener("pointercancel", lift);
        canvas.addEventListener("pointerleave", (event) => {
          if (!canvas.hasPointerCapture(event.pointerId)) lift(event);
          this.point(null);
        });
        canvas.addEventListener(
          "wheel",
          (event) => {
            const factor = 2 ** (-event.deltaY * (event.deltaMode === 1 ? 0.05 : 0.002));
            if (factor <= 1 && this.zoom === 1) return; // the page scrolls
            event.preventDefault();
            this.magnify(factor, ...at(event));
            this.point(event);
          },
          { passive: false },
        );
        let opening = 0;
        canvas.addEventListener("click", () => {
          clearTimeout(opening);
          const row = this.pointed;
          if (row >= 0 && !this.isDragged) opening = setTimeout(() => (location.hash = addressOf(row)), DOUBLE_CLICK);
        });
        canvas.addEventListener("dblclick", () => {
          clearTimeout(opening);
          this.reset();
        });
        canvas.addEventListener("keydown", (event) => {
          if (event.ctrlKey || event.altKey || event.metaKey) return;
          const far = 60;
          const keys = {
            "+": this.nearer,
            "=": this.nearer,
            "-": this.farther,
            0: () => this.reset(),
            ArrowLeft: () => this.shift(far, 0),
            ArrowRight: () => this.shift(-far, 0),
            ArrowUp: () => this.shift(0, far),
            ArrowDown: () => this.shift(0, -far),
          };
          if (!keys[event.key] || (event.key.startsWith("Arrow") && this.zoom === 1)) return;
          event.preventDefault();
          keys[event.key]();
        });
      }

      // Magnify by a factor around a place of the canvas, which stays where it is.
      magnify(factor, x, y) {
        const zoom = Math.max(1, Math.min(MOST_ZOOM, this.zoom * factor));
        const [left, top] = this.moved.map((value, i) => [x, y][i] - (([x, y][i] - value) * zoom) / this.zoom);
        this.zoom = zoom;
        this.moved = [left, top];
        this.shift(0, 0);
      }

      // Move by CSS pixels, as far as the fitted map still fills the frame.
      shift(right, down) {
        const sizes = [this.canvas.clientWidth, this.canvas.clientHeight];
        this.moved = this.moved.map((value, i) => Math.min(0, Math.max(sizes[i] * (1 - this.zoom), value + [right, down][i])));
        this.point(null);
        cancelAnimationFrame(this.asked);
        this.asked = requestAnimationFrame(() => this.draw());
      }

      reset() {
        this.zoom = 1;
        this.moved = [0, 0];
        this.shift(0, 0);
      }

      // Where a row is, in CSS pixels.
      place(row) {
        return [
          (this.left + (columns.x[row] - bounds.x[0]) * this.scale) * this.zoom + this.moved[0],
          (this.top + (bounds.y[1] - columns.y[row]) * this.scale) * this.zoom + this.moved[1],
        ];
      }

      draw() {
        const [width, height, ratio] = [this.canvas.clientWidth, this.canvas.clientHeight, devicePixelRatio || 1];
        if (!width) return;
        this.canvas.width = Math.round(width * ratio);
        this.canvas.height = Math.round(height * ratio);
        const margin = 10;
        const [across, up] = [bounds.x[1] - bounds.x[0] || 1, bounds.y[1] - bounds.y[0] || 1];
        this.scale = Math.min((width - 2 * margin) / across, (height - 2 * margin) / up);
        this.left = (width - across * this.scale) / 2;
        this.top = (height - up * this.scale) / 2;
        const count = this.end - this.first;
        const size = Math.max(1, Math.round(Math.min(14, (count > 20000 ? 3 : count > 4000 ? 4.5 : 6) * Math.sqrt(this.zoom)) * ratio));
        const pen = this.canvas.getContext("2d");
        const image = pen.createImageData(this.canvas.width, this.canvas.height);
        const pixels = new Uint32Array(image.data.buffer);
        const [stride, lines] = [image.width, image.height];
        // A disc whose top left corner is there, as far as it is inside. Loops are faster here than filling so few pixels at a time.
        const disc = (rows, left, top, colour) => {
          const across = rows.length;
          const last = Math.min(across, lines - top);
          for (let down = Math.max(0, -top); down < last; down++) {
            const start = (top + down) * stride;
            const end = start + Math.min(stride, left + across - rows[down]);
            for (let at = start + Math.max(0, left + rows[down]); at < end; at++) pixels[at] = colour;
          }
        };
        const [inner, outer] = [size, size + 2].map(discOf);
        const [x, y, scale] = [columns.x, columns.y, this.scale * this.zoom * ratio];
        const [originX, originY] = [this.left, this.top].map((value, i) => (value * this.zoom + this.moved[i]) * ratio - size / 2);
        const dot = (row, colour) => {
          const left = Math.round(originX + (x[row] - bounds.x[0]) * scale);
          const top = Math.round(originY + (bounds.y[1] - y[row]) * scale);
          if (left < -size || top < -size || left > stride || top > lines) return;
          if (size > 3) disc(outer, left - 1, top - 1, 0); // a rim, where dots lie on each other
          disc(inner, left, top, colour);
        };
        const ofMembers = Array.from({ length: most + 1 }, (_, member) => colourOf(this.ensemble, Math.max(1, member)));
        const [leftOut, ...colours] = [style("--line"), ...ofMembers].map(pixel);
        for (let row = this.first; row < this.end; row++) if (!kept[row]) dot(row, leftOut);
        for (let i = 0, step = 0; i < count; i++, step = (step + STRIDE) % count) {
          if (kept[this.first + step]) dot(this.first + step, colours[columns.member[this.first + step]]);
        }
        pen.putImageData(image, 0, 0);
        this.resetButton.disabled = this.zoom === 1;
        this.canvas.classList.toggle("zoomed", this.zoom > 1);
        this.canvas.dataset.zoom = this.zoom;
        for (const gradient of this.legend.querySelectorAll(".gradient")) {
          const [, ...stops] = ofMembers;
          gradient.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
        }
        for (const button of this.legend.querySelectorAll("button")) {
          const member = Number(button.dataset.member);
          button.querySelector(".swatch").style.background = ofMembers[member];
          button.setAttribute("aria-pressed", String(form.elements.member.value === String(member)));
        }
      }

      // The nearest kept feature within a few pixels of the pointer.
      point(event) {
        const before = this.pointed;
        this.pointed = -1;
        if (event) {
          const box = this.canvas.getBoundingClientRect();
          const [x, y] = [event.clientX - box.left, event.clientY - box.top];
          let nearest = 12 ** 2;
          for (let row = this.first; row < this.end; row++) {
            if (!kept[row]) continue;
            const [left, top] = this.place(row);
            const distance = (left - x) ** 2 + (top - y) ** 2;
            if (distance < nearest) [nearest, this.pointed] = [distance, row];
          }
        }
        if (this.pointed === before) return;
        this.tip.hidden = this.ring.hidden = this.pointed < 0;
        this.canvas.classList.toggle("on-feature", this.pointed >= 0);
        if (this.pointed >= 0) {
          const row = this.pointed;
          const [x, y] = this.place(row);
          const lines = [make("b", "", placeOf(row)), `density ${percent(columns.density[row])}`, make("span", "tokens", ...chips(tokensOf(row).slice(0, 5)))];
          this.tip.replaceChildren(...lines.map((line) => make("div", "", line)));
          const isRight = x > this.canvas.clientWidth / 2;
          this.tip.style.left = isRight ? "" : `${x + 12}px`;
          this.tip.style.right = isRight ? `${this.canvas.clientWidth - x + 12}px` : "";
          this.tip.style.top = `${Math.min(y, this.canvas.clientHeight - 80)}px`;
          this.ring.style.left = `${x}px`;
          this.ring.style.top = `${y}px`;
        }
      }
    }

    const maps = data.axes ? data.ensembles.map((each, i) => new FeatureMap(each, spans[i])) : [];
    byId("maps").append(...maps.map((map) => map.figure));
    byId("map-about").replaceChildren(
      ...(data.axes
        ? [
            `Directions of the decoder rows, of both ensembles together, along their two principal axes, which have ${percent(data.axes[0])} and ` +
              `${percent(data.axes[1])} of the variance: features that are far apart here differ, those that are close may. ` +
              "Point at a feature to see it, click to open it. The wheel or two fingers zoom, dragging moves, a double click shows all. " +
              "What the table's filters leave out is grey.",
          ]
        : ["The SAEs that these features are of are no longer on disk: there is no map."]),
    );
    const drawMaps = () => maps.forEach((map) => map.draw());

    // The page of a feature.

    const one = byId("one");

    const fact = (name, ...values) => [make("dt", "", name), make("dd", "", ...values)];

    const histogram = (counts, width) => {
      const bins = counts.slice(0, counts.findLastIndex((count) => count > 0) + 1);
      const top = Math.max(...bins);
      const [across, high] = [100 / bins.length, 100];
      const drawing = document.createElementNS(SVG, "svg");
      drawing.setAttribute("viewBox", "0 0 100 100");
      drawing.setAttribute("preserveAspectRatio", "none");
      drawing.setAttribute("role", "img");
      drawing.setAttribute("aria-label", `histogram of ${bins.length} bins of width ${width}, the fullest with ${grouped(top)} tokens`);
      bins.forEach((count, i) => {
        const bar = document.createElementNS(SVG, "rect");
        const height = count ? Math.max(1, (count / top) * high) : 0;
        for (const [name, value] of Object.entries({ x: i * across + across * 0.06, y: high - height, width: across * 0.88, height })) bar.setAttribute(name, value);
        const title = document.createElementNS(SVG, "title");
        title.textContent = `${number(i * width)} to ${number((i + 1) * width)}: ${grouped(count)} tokens`;
        bar.append(title);
        drawing.append(bar);
      });
      const counted = make("div", "counts", make("span", "", grouped(top)), make("span", "of-axis", "test tokens"), make("span", "", "0"));
      const ends = make("div", "ends", make("span", "", "0"), make("span", "of-axis", "activation"), make("span", "", number(bins.length * width)));
      const caption = make("figcaption", "", "How many test tokens have which activation. Those on which the feature is silent are left out.");
      return make("figure", "histogram", make("h3", "", "Activations"), make("div", "axes", counted, drawing, ends), caption);
    };

    const logits = (title, of, tokens) => {
      const items = of.map(([token, logit]) => make("li", "", make("span", "token", ...shown(tokens[token])), " ", make("small", "", (logit > 0 ? "+" : "") + number(logit))));
      return make("div", "logits", make("h3", "", title), make("ol", "", ...items));
    };

    // A context with tokens shaded by activation; `around`: tokens to either side of the one in the middle.
    const context = (found, tokens, most, around = Infinity) => {
      const text = make("p", "context");
      found.tokens.forEach((token, i) => {
        if (Math.abs(i - found.centre) > around) return;
        const value = found.activations[i];
        const piece = make("span", i === found.centre ? "token peak" : value === null ? "token dropped" : "token", ...shown(tokens[token]));
        piece.title = value === null ? "left out by the source: no activation" : number(value);
        if (value) piece.style.setProperty("--heat", Math.min(1, value / most).toFixed(3));
        text.append(piece);
        for (const space of piece.querySelectorAll(".space")) space.after(make("wbr")); // lines break there, as at spaces
      });
      return text;
    };

    const detailsOf = async (row) => {
      const { tokens, features } = await shard(Math.floor(row / data.shardFeatures));
      return { tokens, ...features[row % data.shardFeatures], vocabulary: tokens };
    };

    const matchCard = (row, similarity) => {
      const card = make("div", `match ${similarity >= data.shared ? "shared" : "unique"}`);
      card.style.borderTopColor = colourOf(ensembleOf(row), columns.member[row]);
      card.append(
        make("h3", "", linkTo(row, placeOf(row))),
        make("p", "value", `cosine ${cosine(similarity)}, fires on ${percent(columns.density[row])}`),
      );
      const tokens = make("p", "tokens", ...chips(tokensOf(row)));
      card.append(tokens);
      detailsOf(row).then((details) => {
        const texts = (details.contexts ?? []).slice(0, 3).map((each) => context(each, details.vocabulary, details.max, 6));
        if (texts.length) tokens.replaceWith(...texts);
      }, complain);
      return card;
    };

    const explained = (row) => {
      const status = statusOf(row);
      if (!status) return fact("explanation", "none: the feature is not among those that were drawn to be explained");
      const found = fact("explanation", explanationOf(row) || "none");
      if (!Number.isNaN(columns.score[row])) found.push(...fact("detection score", `${number(columns.score[row])} balanced accuracy; 0.5 is chance`));
      if (!Number.isNaN(columns.control[row])) found.push(...fact("control score", `${number(columns.control[row])} with the explanation of another feature`));
      return [...found, ...fact("status", data.why[status] ? `${status}: ${data.why[status]}` : status)];
    };

    const step = (row, by, text) => {
      const place = order.indexOf(row);
      const other = place < 0 ? undefined : order[place + by];
      if (other === undefined) return make("span", "off", text);
      const link = linkTo(other, text);
      link.rel = by > 0 ? "next" : "prev";
      return link;
    };

    const complain = (error) => {
      byId("loading").hidden = false;
      byId("loading").textContent = error.message;
    };

    let opened = 0;
    const openFeature = async (row) => {
      const ensemble = ensembleOf(row);
      const title = make("h1", "", mark(ensemble), `${ensemble.label}, ${placeOf(row)}`);
      title.tabIndex = -1;
      const back = make("a", "", "‹ all features");
      back.href = "#table";
      const steps = make("nav", "steps", back, step(row, -1, "previous in the table"), step(row, 1, "next in the table"));
      steps.setAttribute("aria-label", "features");
      document.title = `${ensemble.label}, ${placeOf(row)} – ${data.experiment}, layer ${data.layer}`;

      const facts = make("dl", "facts-of-one");
      const isDead = columns.density[row] === 0;
      facts.append(...fact("density", isDead ? "0: it never fires on the test tokens" : `${percent(columns.density[row])} of the test tokens`));
      if (!isDead) facts.append(...fact("mean activation", number(columns.mean[row], 4)));
      const nearest = nearestRow(row);
      const verdict = (value, yes, no) => `cosine ${cosine(value)}: ${value >= data.shared ? yes : no}`;
      if (nearest >= 0) {
        facts.append(...fact(`in other ${ensemble.unit}s`, `${verdict(columns.nearCosine[row], "shared", "unique")}; nearest `, linkTo(nearest, placeOf(nearest))));
      }
      if (!Number.isNaN(columns.seedCosine[row])) {
        const where = make("span", "", `${ensemble.unit} ${columns.seedMember[row]} · ${columns.seedIndex[row]} of seed ${data.otherSeeds[columns.seed[row]]}`);
        where.title = `features have pages under seed ${data.seed} alone`;
        facts.append(...fact("stability", `${verdict(columns.seedCosine[row], "comes back under another seed", "does not come back under another seed")}; nearest `, where));
      }
      if (data.explanations) facts.append(...explained(row));
      facts.append(...fact("most active on", ...(isDead ? ["–"] : chips(tokensOf(row)))));

      const call = ++opened;
      const details = await detailsOf(row);
      if (call !== opened) return; // another was opened in the meantime
      if (details.max) facts.firstChild.nextSibling.after(...fact("largest activation", number(details.max, 4)));

      const parts = [steps, title, facts];
      if (details.contexts) {
        const beside = make("div", "beside");
        if (details.contexts.length) beside.append(histogram(details.histogram, details.binWidth));
        if (details.promoted.length) {
          beside.append(logits("Output tokens promoted", details.promoted, details.vocabulary), logits("Output tokens suppressed", details.suppressed, details.vocabulary));
        } else {
          beside.append(make("p", "note", "Output tokens: the language model has no unembedding that this feature's direction could be applied to."));
        }
        const texts = details.contexts.map((each) => {
          const item = make("li", "", context(each, details.vocabulary, details.max));
          item.append(make("small", "", `document ${grouped(each.document)}, token ${grouped(each.position)}: ${number(each.activations[each.centre])}`));
          return item;
        });
        parts.push(beside, make("h2", "", "Where it is most active"));
        parts.push(texts.length ? make("ol", "contexts", ...texts) : make("p", "note", "It never fires on the test tokens."));
      } else {
        parts.push(make("p", "missing", ...prose(data.missingContexts || "The table contexts has no row of this feature.")));
      }
      if (details.matches.length) {
        const cards = details.matches.map(([member, index, similarity]) => [rowOf(ensemble.name, member, index), similarity]);
        parts.push(
          make("h2", "", `Its best match in each other ${ensemble.unit}`),
          make("div", "matches", ...cards.filter(([other]) => other >= 0).map(([other, similarity]) => matchCard(other, similarity))),
        );
      }
      one.replaceChildren(...parts);
      showOne(true);
      scrollTo({ top: 0, behavior: "instant" });
      title.focus({ preventScroll: true });
    };

    const showOne = (isOne) => {
      if (isOne && !byId("all").hidden) scrolledTo = rows.scrollTop;
      byId("all").hidden = isOne;
      one.hidden = !isOne;
    };

    const showAll = () => {
      const wasOne = !one.hidden;
      opened++;
      document.title = pageTitle;
      one.replaceChildren();
      showOne(false);
      if (wasOne) {
        rows.scrollTop = scrolledTo;
        drawView();
        drawMaps();
        byId(location.hash === "#map" ? "map" : "table").scrollIntoView({ behavior: "instant" });
        if (location.hash === "#table") rows.focus({ preventScroll: true });
      }
    };

    const pageTitle = document.title;
    const route = () => {
      const found = /^#([a-z0-9_]+)\/(\d+)\/(\d+)$/.exec(location.hash);
      if (!found) return showAll();
      const row = ensembles.has(found[1]) ? rowOf(found[1], Number(found[2]), Number(found[3])) : -1;
      byId("loading").hidden = row >= 0;
      if (row < 0) {
        byId("loading").textContent = `There is no feature ${found.slice(1).join("/")} here.`;
        return showAll();
      }
      return openFeature(row).catch(complain);
    };

    addEventListener("hashchange", route);
    addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !one.hidden) location.hash = "#table";
    });
    addEventListener("resize", () =>
      soon(() => {
        drawView();
        drawMaps();
      }),
    );
    new MutationObserver(() => drawMaps()).observe(root, { attributeFilter: ["data-theme"] });
    addEventListener("beforeprint", () => {
      drawMaps();
      if (!byId("all").hidden) {
        const first = Math.floor(rows.scrollTop / ROW_HEIGHT);
        drawRows(first, Math.min(order.length, first + PRINTED_ROWS));
      }
    });
    addEventListener("afterprint", drawView);

    byId("loading").hidden = true;
    byId("all").hidden = false;
    layOut();
    headings[0].closest("th").setAttribute("aria-sort", "ascending");
    filter();
    route();
  };

  const fail = (error) => {
    byId("loading").hidden = false;
    byId("loading").textContent = error.message;
  };
  if (window.DecompressionStream) load("list").then(list).then(start).catch(fail);
  else fail(new Error("This browser cannot unpack the features: it has no DecompressionStream, which all have had since 2023."));
})();
