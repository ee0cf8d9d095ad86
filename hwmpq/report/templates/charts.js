"use strict";
// Charts of a page, from the JSON in #charts: points, lines and bars, with hover, keys and zoom.
(() => {
  const NS = "http://www.w3.org/2000/svg";
  const ROOM = {left: 58, right: 14, top: 10, bottom: 44};
  const MARKS = {
    circle: r => `M${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0`,
    square: r => `M${-r} ${-r}H${r}V${r}H${-r}Z`,
    diamond: r => `M0 ${-1.3 * r}L${1.3 * r} 0L0 ${1.3 * r}L${-1.3 * r} 0Z`,
    triangle: r => `M0 ${-1.2 * r}L${1.2 * r} ${r}H${-1.2 * r}Z`,
    tick: r => `M${-r} 0H${r}`,
  };
  let count = 0;

  function svg(name, attributes, parent) {
    const node = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (parent) parent.append(node);
    return node;
  }

  function html(name, className, parent, text = "") {
    const node = document.createElement(name);
    node.className = className;
    node.textContent = text;
    parent.append(node);
    return node;
  }

  function number(value) {
    const short = Number(value.toPrecision(3));
    return short && Math.abs(short) < 1e-3 ? short.toExponential() : String(short);
  }

  function ticks(lo, hi, log, wanted) {
    const found = [];
    if (log && hi / lo > 5) {
      const steps = hi / lo > 300 ? [1] : [1, 2, 5];
      for (let e = Math.floor(Math.log10(lo)); e <= Math.log10(hi); e++)
        for (const step of steps) found.push(step * 10 ** e);
    } else {
      const rough = (hi - lo) / wanted, base = 10 ** Math.floor(Math.log10(rough));
      const step = base * [1, 2, 5, 10].find(factor => factor * base >= rough);
      for (let i = Math.ceil(lo / step); i * step <= hi; i++) found.push(i * step);
    }
    return found.filter(value => value >= lo && value <= hi);
  }

  class Axis {
    constructor(spec, values) {
      Object.assign(this, spec);
      let lo = Math.min(...values), hi = Math.max(...values);
      if (spec.names) [lo, hi] = [-0.6, spec.names.length - 0.4];
      else if (spec.log) {
        // What is not above zero lies on the edge.
        this.least = lo > 0 ? 0 : Math.min(hi, ...values.filter(value => value > 0)) / 3;
        [lo, hi] = [lo > 0 ? lo / 1.15 : this.least, hi * 1.3];
      }
      else {
        if (spec.zero) lo = Math.min(0, lo);
        const room = 0.06 * (hi - lo || Math.abs(hi) || 1);
        [lo, hi] = [spec.zero && lo === 0 ? 0 : lo - room, hi + room];
      }
      this.whole = [lo, hi];
      this.shown = [lo, hi];
    }
    flat(value) { return this.log ? Math.log10(Math.max(value, this.least)) : value; }
    share(value) {
      const [lo, hi] = this.shown.map(end => this.flat(end));
      return (this.flat(value) - lo) / (hi - lo);
    }
    value(share) {
      const [lo, hi] = this.shown.map(end => this.flat(end));
      const found = lo + share * (hi - lo);
      return this.log ? 10 ** found : found;
    }
    zoom(from, to) { this.shown = [this.value(from), this.value(to)]; }
    ticks(wanted) {
      if (!this.names) {
        const edge = this.least && this.shown[0] <= this.least ? [0] : [];
        return [...edge, ...ticks(...this.shown, this.log, wanted)];
      }
      return this.names.map((_, i) => i).filter(i => i >= this.shown[0] && i <= this.shown[1]);
    }
    text(tick) { return this.names ? this.names[tick] : number(tick); }
  }

  class Chart {
    constructor(figure, spec) {
      this.figure = figure;
      this.spec = spec;
      const points = spec.series.flatMap(series => series.points);
      const ends = (name, low, high) => points.flatMap(p =>
        [p[name], p[low] ?? p[name], p[high] ?? p[name]]).filter(v => v !== null);
      const marked = kind => spec.rules.filter(rule => rule.kind === kind).map(rule => rule.at);
      this.x = new Axis(spec.x, [...ends("x", "xl", "xh"), ...marked("x")]);
      this.y = new Axis(spec.y, [...ends("y", "yl", "yh"), ...marked("y")]);
      this.clip = `clip${count++}`;
      this.legend();
      this.buttons();
      this.frame = html("div", "frame", figure);
      this.tip = html("div", "tip", this.frame);
      this.tip.setAttribute("role", "status");
      this.tip.hidden = true;
      new ResizeObserver(() => this.draw()).observe(this.frame);
    }

    legend() {
      if (this.spec.series.length < 2) return;
      const list = html("ul", "legend", this.figure);
      for (const series of this.spec.series) {
        const item = html("li", "", list);
        const icon = svg("svg", {width: 18, height: 12, viewBox: "-9 -6 18 12"}, item);
        const mark = svg("g", {class: `tone ${series.tone}`}, icon);
        if (series.kind === "bars") svg("path", {d: "M-7 -5H7V5H-7Z", class: series.fill}, mark);
        else if (series.kind === "line" && !series.mark) svg("path", {d: "M-9 0H9", class: "line"}, mark);
        else svg("path", {d: MARKS[series.mark](4), class: `mark ${series.mark} ${series.fill}`}, mark);
        item.append(series.name);
      }
    }

    buttons() {
      const bar = html("div", "zoom", this.figure);
      const add = (text, label, act) => {
        const button = html("button", "", bar, text);
        button.type = "button";
        button.title = button.ariaLabel = label;
        button.addEventListener("click", () => { act(); this.draw(); });
      };
      add("+", "zoom in", () => this.zoom([0.25, 0.75], [0.25, 0.75]));
      add("−", "zoom out", () => this.zoom([-0.5, 1.5], [-0.5, 1.5]));
      add("↺", "show all", () => this.reset());
    }

    zoom(across, up) {
      this.x.zoom(...across);
      if (!this.x.names) this.y.zoom(...up);
    }

    reset() { for (const axis of [this.x, this.y]) axis.shown = axis.whole; }

    px(value) { return ROOM.left + this.x.share(value) * this.width; }
    py(value) { return ROOM.top + (1 - this.y.share(value)) * this.height; }

    draw() {
      const wide = this.frame.clientWidth, high = this.frame.clientHeight;
      if (!wide) return;
      this.tip.hidden = true;
      this.width = wide - ROOM.left - ROOM.right;
      this.bottom = ROOM.bottom;
      if (this.x.names) {
        const longest = Math.max(...this.x.names.map(name => name.length));
        this.bottom = 22 + 5 * Math.min(14, longest);
      }
      this.height = high - ROOM.top - this.bottom;
      this.svg?.remove();
      this.svg = svg("svg", {
        viewBox: `0 0 ${wide} ${high}`, role: "img", tabindex: 0, "aria-label": this.spec.label,
      }, this.frame);
      this.axes();
      const clip = svg("clipPath", {id: this.clip}, this.svg);
      svg("rect", {x: ROOM.left, y: ROOM.top, width: this.width, height: this.height}, clip);
      this.plot = svg("g", {"clip-path": `url(#${this.clip})`}, this.svg);
      this.hits = [];
      this.labels = [];
      for (const rule of this.spec.rules) this.rule(rule);
      for (const series of this.spec.series) this.series(series);
      this.hits.sort((a, b) => a.x - b.x);
      this.listen();
    }

    axes() {
      const base = ROOM.top + this.height, end = ROOM.left + this.width;
      const text = (string, attributes) => {
        svg("text", attributes, this.svg).textContent = string;
      };
      for (const tick of this.y.ticks(Math.max(3, this.height / 50))) {
        svg("path", {class: "grid", d: `M${ROOM.left} ${this.py(tick)}H${end}`}, this.svg);
        text(this.y.text(tick), {x: ROOM.left - 6, y: this.py(tick) + 4, "text-anchor": "end"});
      }
      const across = this.x.ticks(Math.max(3, this.width / 80));
      const every = Math.ceil(across.length * 15 / this.width);
      for (const tick of across) {
        const x = this.px(tick);
        if (!this.x.names) {
          svg("path", {class: "grid", d: `M${x} ${ROOM.top}V${base}`}, this.svg);
          text(this.x.text(tick), {x, y: base + 16, "text-anchor": "middle"});
        } else if (tick % every === 0) {
          const name = this.x.text(tick);
          text(name.length > 14 ? `…${name.slice(-13)}` : name, {
            x: x + 4, y: base + 10, "text-anchor": "end", transform: `rotate(-50 ${x + 4} ${base + 10})`,
          });
        }
      }
      svg("path", {class: "edge", d: `M${ROOM.left} ${ROOM.top}V${base}H${end}`}, this.svg);
      text(this.x.title, {x: ROOM.left + this.width / 2, y: base + this.bottom - 6,
        "text-anchor": "middle", class: "title"});
      const middle = ROOM.top + this.height / 2;
      text(this.y.title, {x: 12, y: middle, "text-anchor": "middle", class: "title",
        transform: `rotate(-90 12 ${middle})`});
    }

    rule(rule) {
      const [x0, x1] = this.x.shown, [y0, y1] = this.y.shown;
      const ends = {
        x: [[rule.at, y0], [rule.at, y1]],
        y: [[x0, rule.at], [x1, rule.at]],
        ratio: [[x0, rule.at * x0], [x1, rule.at * x1]],
        }[rule.kind];
      const d = ends.map(([x, y], i) => `${i ? "L" : "M"}${this.px(x)} ${this.py(y)}`).join("");
      svg("path", {d, class: `rule ${rule.tone}`}, this.plot);
      if (rule.text) {
        const [x, y] = ends[rule.kind === "x" ? 1 : 0];
        const at = {x: this.px(x) + 5, y: this.py(y) + (rule.kind === "x" ? 12 : -5), class: "note"};
        svg("text", at, this.plot).textContent = rule.text;
      }
    }

    series(series) {
      const group = svg("g", {class: `tone ${series.tone}`}, this.plot);
      if (series.kind === "line") this.line(series, group);
      for (const point of series.points) {
        if (point.y === null) continue;
        const x = this.px(point.x), y = this.py(point.y);
        if (series.kind === "bars") this.bar(series, point, group);
        else if (series.mark) {
          if (point.xl != null)
            svg("path", {class: "error", d: `M${this.px(point.xl)} ${y}H${this.px(point.xh)}`}, group);
          if (point.yl != null)
            svg("path", {class: "error", d: `M${x} ${this.py(point.yl)}V${this.py(point.yh)}`}, group);
          const half = series.mark === "tick" ? Math.max(2, 0.4 * this.step()) : point.r ?? 5;
          svg("path", {d: MARKS[series.mark](half), transform: `translate(${x} ${y})`,
            class: `mark ${series.mark} ${series.fill}`}, group);
          this.hits.push({x, y, point});
        }
        if (point.label) this.label(point.label, x, y, point.r ?? 5, group);
      }
    }

    label(text, x, y, r, group) {
      const wide = 7 * text.length, right = ROOM.left + this.width;
      const places = [[r + 3, -7], [-r - 3 - wide, -7], [r + 3, 17], [-r - 3 - wide, 17]]
        .map(([dx, dy]) => ({x: x + dx, y: y + dy, wide}));
      const free = place => place.x > ROOM.left && place.x + wide < right && this.labels.every(
        other => Math.abs(other.y - place.y) > 13
          || other.x > place.x + wide || place.x > other.x + other.wide);
      const place = places.find(free);
      if (!place) return;
      this.labels.push(place);
      svg("text", {x: place.x, y: place.y, class: "note"}, group).textContent = text;
    }

    step() { return this.width / (this.x.shown[1] - this.x.shown[0]); }

    line(series, group) {
      let d = "", last = null;
      for (const point of series.points) {
        if (point.y === null) continue;
        const x = this.px(point.x), y = this.py(point.y);
        d += last === null ? `M${x} ${y}` : series.steps ? `H${x}V${y}` : `L${x} ${y}`;
        last = point;
        if (!series.mark) this.hits.push({x, y, point});
      }
      svg("path", {d, class: "line"}, group);
    }

    bar(series, point, group) {
      const half = Math.max(1, 0.36 * this.step()), x = this.px(point.x);
      const base = this.py(this.y.log ? this.y.shown[0] : Math.max(0, this.y.shown[0]));
      const y = Math.min(this.py(point.y), base - 1);
      svg("path", {d: `M${x - half} ${base}V${y}H${x + half}V${base}Z`, class: series.fill}, group);
      this.hits.push({x, y, point, half: Math.max(half, 0.5 * this.step())});
    }

    listen() {
      const place = event => {
        const box = this.svg.getBoundingClientRect();
        return [event.clientX - box.left, event.clientY - box.top];
      };
      let from = null, area = null;
      this.svg.addEventListener("pointerdown", event => {
        if (event.pointerType !== "mouse" || event.button) return;
        from = place(event);
        this.svg.setPointerCapture(event.pointerId);
      });
      this.svg.addEventListener("pointermove", event => {
        const at = place(event);
        if (!from) return this.hover(...at);
        area ??= svg("path", {class: "area"}, this.svg);
        const [top, base] = this.x.names ? [ROOM.top, ROOM.top + this.height] : [from[1], at[1]];
        area.setAttribute("d", `M${from[0]} ${top}H${at[0]}V${base}H${from[0]}Z`);
      });
      this.svg.addEventListener("pointerup", event => {
        const at = place(event), began = from;
        from = null;
        area?.remove();
        area = null;
        if (!began || Math.hypot(at[0] - began[0], at[1] - began[1]) < 8) return this.hover(...at);
        const sorted = pair => pair.sort((a, b) => a - b);
        this.zoom(
          sorted([began[0], at[0]].map(x => (x - ROOM.left) / this.width)),
          sorted([began[1], at[1]].map(y => 1 - (y - ROOM.top) / this.height)),
        );
        this.draw();
      });
      this.svg.addEventListener("dblclick", () => { this.reset(); this.draw(); });
      this.svg.addEventListener("pointerleave", () => { this.tip.hidden = true; });
      this.svg.addEventListener("keydown", event => {
        const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
        if (!step || !this.hits.length) return;
        event.preventDefault();
        const next = this.hits.indexOf(this.told) + step;
        this.tell(this.hits[(next + this.hits.length) % this.hits.length]);
      });
    }

    hover(x, y) {
      let best = null, least = 26;
      for (const hit of this.hits) {
        const gap = hit.half ? (Math.abs(hit.x - x) <= hit.half ? 1 + Math.abs(hit.x - x) / hit.half : 99)
          : Math.hypot(hit.x - x, hit.y - y);
        if (gap < least) [best, least] = [hit, gap];
      }
      if (best) this.tell(best);
      else this.tip.hidden = true;
    }

    tell(hit) {
      this.told = hit;
      this.tip.replaceChildren(...hit.point.text.map(line => {
        const row = document.createElement("div");
        row.textContent = line;
        return row;
      }));
      this.tip.hidden = false;
      const wide = this.tip.offsetWidth, room = this.frame.clientWidth;
      this.tip.style.left = `${Math.max(0, Math.min(hit.x + 12, room - wide))}px`;
      this.tip.style.top = `${Math.max(0, hit.y - this.tip.offsetHeight - 10)}px`;
    }
  }

  for (const spec of JSON.parse(document.getElementById("charts").textContent))
    new Chart(document.getElementById(spec.id), spec);
})();
