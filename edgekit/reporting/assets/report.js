// Draws every <canvas data-kind data-chart> with Chart.js, in the colours of the style sheet, and again when they change.
"use strict";
(() => {
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const SHAPES = ["circle", "rectRot", "triangle", "rect", "star", "crossRot"]; // colour never stands alone
  const SOLID = ["circle", "rectRot", "triangle", "rect"], hue = (i) => style(`--c${(i % 6) + 1}`);
  const drawn = [];

  const axis = (title, extra = {}) => ({
    type: "linear", title: { display: true, text: title, color: style("--soft") },
    grid: { color: style("--line"), drawTicks: false }, border: { display: false },
    ticks: { color: style("--soft"), padding: 6, maxTicksLimit: 7 }, ...extra,
  });
  const base = (scales, extra = {}) => ({
    responsive: true, maintainAspectRatio: false, animation: false, scales, layout: { padding: { top: 14, right: 10 } },
    plugins: { legend: { display: false }, tooltip: { displayColors: false }, ...extra },
  });
  // The margin around points must not lead to sizes below nothing or accuracies above all.
  const around = (points, key, share, most = Infinity) => {
    const values = points.map((point) => point[key]), low = Math.min(...values), high = Math.max(...values), margin = share * (high - low || high);
    return { suggestedMin: Math.max(0, low - margin), suggestedMax: Math.min(most, high + margin) };
  };
  const round = (value) => Number(Number(value).toPrecision(4)).toString();

  // Names beside the points, moved to a free side and left out where they would cover another; the last bundle's, which
  // is usually the one that ships, has the first choice.
  const names = {
    id: "names",
    afterDatasetsDraw(chart) {
      const { ctx, chartArea } = chart, points = chart.getDatasetMeta(0).data, steps = chart.options.plugins.names?.steps;
      const longest = steps ? 40 : 26;
      const taken = points.map((p) => ({ l: p.x - 7, r: p.x + 7, t: p.y - 7, b: p.y + 7 }));
      ctx.save();
      ctx.font = `12px ${Chart.defaults.font.family}`;
      ctx.fillStyle = style("--ink");
      ctx.textBaseline = "middle";
      points.map((point, i) => [point, chart.data.datasets[0].data[i].name]).reverse().forEach(([point, text]) => {
        if (text.length > longest) text = text.slice(0, longest - 1) + "…";
        const width = ctx.measureText(text).width;
        const sides = [-16, 16, -30, 30].flatMap((dy) => [[-width / 2, dy], [10, dy], [-10 - width, dy]]);
        sides.unshift(...(steps ? [[10, 14], [-10 - width, -14]] : [[10, 0], [-10 - width, 0]])); // a step goes to the right
        for (const [dx, dy] of sides) {
          const box = { l: point.x + dx, r: point.x + dx + width, t: point.y + dy - 8, b: point.y + dy + 8 };
          const inside = box.l >= chartArea.left && box.r <= chartArea.right + 8 && box.t >= 0;
          if (inside && !taken.some((o) => box.l < o.r && o.l < box.r && box.t < o.b && o.t < box.b)) {
            taken.push(box);
            ctx.fillText(text, box.l, point.y + dy);
            break;
          }
        }
      });
      ctx.restore();
    },
  };

  // Vertical percentile marks over a histogram; labels step down where they would touch.
  const marks = {
    id: "marks",
    afterDatasetsDraw(chart) {
      const { ctx, chartArea, scales, options } = chart;
      let lastRight = -1, row = 0;
      ctx.save();
      ctx.font = `11px ${Chart.defaults.font.family}`;
      Object.entries(options.plugins.marks.at).sort((a, b) => a[1] - b[1]).forEach(([name, value]) => {
        const x = scales.x.getPixelForValue(value);
        if (x > chartArea.right + 1) return;
        const width = ctx.measureText(name).width;
        row = x - width / 2 < lastRight + 6 ? row + 1 : 0;
        lastRight = Math.max(lastRight, x + width / 2 + 4);
        ctx.strokeStyle = ctx.fillStyle = style("--c2");
        ctx.setLineDash([4, 3]);
        ctx.beginPath();
        ctx.moveTo(x, chartArea.top);
        ctx.lineTo(x, chartArea.bottom);
        ctx.stroke();
        const left = row ? x + 4 : Math.max(x - width / 2, chartArea.left); // not cut at the right end
        ctx.fillText(name, row && left + width > chart.width ? x - 4 - width : Math.min(left, chart.width - width), chartArea.top - 4 + row * 13);
      });
      ctx.restore();
    },
  };

  // Air between a legend and the chart below it.
  const air = {
    id: "air",
    beforeInit(chart) {
      const fit = chart.legend?.fit;
      if (fit) chart.legend.fit = function () { fit.call(this); if (this.options.display) this.height += 10; };
    },
  };

  const KINDS = {
    scatter: (d) => ({
      type: "scatter",
      data: { datasets: [
        { data: d.points, backgroundColor: d.points.map((p) => (p.doubtful ? style("--paper") : hue(p.group))), borderColor: d.points.map((p) => (p.doubtful ? hue(p.group) : style("--paper"))), borderWidth: d.points.map((p) => (p.doubtful ? 2 : 1.5)), pointStyle: d.points.map((p) => SOLID[p.group % 4]), radius: 7, hoverRadius: 9 },
        ...d.fronts.map((data, i) => ({ data, showLine: true, radius: 0, hitRadius: 0, hoverRadius: 0, borderColor: d.groups.length > 1 ? hue(i) : style("--c2"), borderWidth: 1.5, borderDash: [5, 4] })),
      ] },
      options: base({ x: axis(d.x, around(d.points, "x", 0.12)), y: axis(d.y, around(d.points, "y", 0.15, 100)) }, {
        legend: { display: d.groups.length > 1, align: "start", onClick: () => {}, labels: { usePointStyle: true, boxHeight: 8,
          generateLabels: () => d.groups.map((text, i) => ({ text, fillStyle: hue(i), strokeStyle: hue(i), pointStyle: SOLID[i % 4], fontColor: style("--ink") })) } },
        tooltip: { displayColors: false, filter: (item) => item.datasetIndex === 0,
          callbacks: { label: (item) => [item.raw.name, `${d.x}: ${round(item.raw.x)}${item.raw.doubtful ? ", not trustworthy" : ""}`, `${d.y}: ${round(item.raw.y)}`] } },
      }),
      plugins: [names],
    }),
    front: (d) => ({
      type: "scatter",
      data: { datasets: [
        { data: d.front, backgroundColor: style("--c1"), borderColor: style("--paper"), borderWidth: 1.5, radius: 7, hoverRadius: 9 },
        { data: d.others, backgroundColor: style("--soft") + "88", borderWidth: 0, radius: 4, hoverRadius: 6 },
        { data: d.step, showLine: true, stepped: "before", radius: 0, hitRadius: 0, hoverRadius: 0, borderColor: style("--c2"), borderWidth: 1.5 },
      ] },
      options: base({ x: d.logarithmic ? logarithmic(d.x, ...d.logarithmic) : axis(d.x, around([...d.front, ...d.others], "x", 0.12)), y: axis(d.y, around([...d.front, ...d.others], "y", 0.15, 100)) }, {
        legend: { display: false }, names: { steps: true },
        tooltip: { displayColors: false, filter: (item) => item.datasetIndex < 2,
          callbacks: { label: (item) => [item.raw.name, `${d.x}: ${round(item.raw.x)}`, `${d.y}: ${round(item.raw.y)}`] } },
      }),
      plugins: [names],
    }),
    curves: (d) => ({
      type: "line",
      data: { datasets: Object.entries(d.lines).map(([label, values], i) => ({
        label: label.replaceAll("_", " "), data: values.map((y, j) => ({ x: d.x[j], y })), borderColor: style(`--c${(i % 6) + 1}`),
        backgroundColor: style(`--c${(i % 6) + 1}`), borderWidth: 2, radius: values.length > 40 ? 0 : 3, pointStyle: SHAPES[i % 6], spanGaps: true,
      })) },
      options: { ...base({ x: axis("Epoch", { grid: { display: false }, ticks: { color: style("--soft"), precision: 0, maxTicksLimit: 8 } }), y: axis(d.y) }, {
        legend: { display: true, align: "start", labels: { color: style("--ink"), usePointStyle: true, boxHeight: 6, padding: 14 } },
      }), interaction: { mode: "index", intersect: false } },
    }),
    lines: (d) => ({ // KL on an axis of its roots
      type: "line",
      data: { datasets: d.lines.map((line, i) => ({
        label: line.name, data: line.points.map(([x, y]) => ({ x, y: Math.sqrt(Math.max(y, 0)) })), borderColor: line.named ? style(`--c${(i % 6) + 1}`) : style("--soft") + "66",
        backgroundColor: style(`--c${(i % 6) + 1}`), borderWidth: line.named ? 2 : 1, radius: line.named ? 3 : 0, pointStyle: SHAPES[i % 6], order: line.named ? 0 : 1,
      })) },
      options: base({ x: axis(d.x, { reverse: true, max: 100 }), y: axis(d.y, {
        max: Math.sqrt(d.ticks.at(-1)), min: 0, afterBuildTicks: (scale) => (scale.ticks = d.ticks.map((kl) => ({ value: Math.sqrt(kl) }))),
        ticks: { color: style("--soft"), padding: 6, autoSkip: false, callback: (root) => round(root * root) } }) }, {
        legend: { display: true, align: "start", labels: { color: style("--ink"), usePointStyle: true, boxHeight: 6, padding: 10, filter: (item) => d.lines[item.datasetIndex].named } },
        tooltip: { displayColors: false, callbacks: { title: () => "", label: (item) => `${item.dataset.label}: ${round(item.parsed.x)}% left, KL ${round(item.parsed.y ** 2)}` } } }),
    }),
    histogram: (d) => ({
      type: "line",
      data: { datasets: [{
        data: [{ x: d.edges[0], y: 0 }, ...d.shares.map((y, i) => ({ x: d.edges[i], y })), { x: d.edges.at(-1), y: 0 }],
        stepped: "before", fill: "origin", borderColor: style("--c1"), backgroundColor: style("--c1") + "55", borderWidth: 1.5, radius: 0, hitRadius: 6,
      }] },
      options: base(
        { x: axis("Latency (ms)", { grid: { display: false }, min: d.edges[0], max: d.edges.at(-1), ticks: { color: style("--soft"), maxTicksLimit: 7, includeBounds: false, maxRotation: 0, callback: (v) => round(v) } }),
          y: axis("Runs (%)", { beginAtZero: true }) },
        { marks: { at: d.marks }, tooltip: { displayColors: false, intersect: false,
          callbacks: { title: () => "", label: (item) => `${round(item.parsed.y)}% of the runs from ${round(item.parsed.x)} ms` } } }),
      plugins: [marks],
    }),
    bars: (d) => ({
      type: "bar",
      data: { labels: d.names, datasets: [{ data: d.values, backgroundColor: d.float.map((f) => style(f ? "--c2" : "--c1")), barPercentage: 0.8, maxBarThickness: 18 }] },
      options: { ...base({ x: axis(d.x, { beginAtZero: true }), y: category() }, {
        tooltip: { displayColors: false, callbacks: { afterLabel: (item) => (d.float[item.dataIndex] ? "left in float" : "") } } }), indexAxis: "y" },
    }),
    ranges: (d) => ({
      type: "bar",
      data: { labels: d.names, datasets: [
        { label: "seen in calibration", data: d.inside, backgroundColor: style("--c3"), barPercentage: 0.35, grouped: false },
        { label: "clipped", data: d.values.map((v, i) => (d.clipped[i] ? v : null)), backgroundColor: style("--c2"), barPercentage: 0.35, grouped: false },
        { label: d.channels.some((n) => n > 1) ? "covered by int8, all channels" : "covered by int8", data: d.covered, backgroundColor: style("--c3") + "3a", barPercentage: 0.85, grouped: false },
      ] },
      options: { ...base({ x: axis(d.x), y: category() }, {
        tooltip: { displayColors: false, callbacks: { label: (item) => rangeWords(d, item.dataIndex) } },
        legend: { display: true, align: "start", labels: { color: style("--ink"), boxWidth: 14, boxHeight: 8, padding: 14 } } }), indexAxis: "y" },
    }),
  };

  function rangeWords(d, i) {
    const range = ([low, high]) => `${round(low)} to ${round(high)}`, lines = [`seen in calibration: ${range(d.values[i])}`];
    if (d.covered[i]) lines.push(`covered by int8: ${range(d.covered[i])}${d.channels[i] > 1 ? `, by ${d.channels[i]} channels in all` : ""}`);
    if (d.clipped[i]) lines.push(`clipped: ${round(d.clipped[i])}% of the seen range`);
    return lines;
  }

  function logarithmic(title, low, high) {
    const callback = (value) => (/^[125]$/.test(value.toExponential()[0]) && /^\de/.test(value.toExponential()) ? round(value) : "");
    return axis(title, { type: "logarithmic", min: low, max: high, ticks: { color: style("--soft"), padding: 6, callback, maxRotation: 0 } });
  }

  function category() {
    const cut = function (value) {
      const text = this.getLabelForValue(value);
      return text.length > 22 ? "…" + text.slice(-21) : text;
    };
    return { grid: { display: false }, border: { display: false }, ticks: { color: style("--soft"), font: { size: 11 }, autoSkip: false, callback: cut } };
  }

  // What is in sight comes first and at once; the others follow one by one, so that the page can be read and scrolled
  // meanwhile. Paper takes no "later": for it all are drawn at once.
  let turn = 0;
  function draw() {
    const mine = ++turn, waiting = [];
    const one = (canvas) => {
      try {
        drawn.push(new Chart(canvas, KINDS[canvas.dataset.kind](JSON.parse(canvas.dataset.chart))));
      } catch (error) { // one odd figure leaves the other charts alone
        Chart.getChart(canvas)?.destroy();
        canvas.parentElement.replaceWith(Object.assign(document.createElement("p"), { className: "missing", textContent: `This cannot be drawn: ${error.message}` }));
      }
      document.documentElement.dataset.drawn = drawn.length;
    };
    const next = () => {
      if (mine !== turn) return;
      if (!waiting.length) return void performance.mark("drawn");
      one(waiting.shift());
      setTimeout(next);
    };
    drawn.splice(0).forEach((chart) => chart.destroy());
    document.documentElement.dataset.drawn = 0;
    document.querySelectorAll("canvas[data-kind]").forEach((canvas) => {
      const { top, bottom } = canvas.parentElement.getBoundingClientRect();
      if ("print" in document.documentElement.dataset || (top < innerHeight && bottom > 0)) one(canvas);
      else waiting.push(canvas);
    });
    setTimeout(next);
  }

  // Samples of a cell of the confusion matrix; the most frequent mistake's are there from the start.
  function sample({ png, text, series, id, score }) {
    const figure = document.createElement("figure"), caption = document.createElement("figcaption");
    caption.textContent = score === null ? id : `${(100 * score).toFixed(0)} % sure`;
    figure.title = id;
    if (png) figure.append(Object.assign(new Image(), { src: `data:image/png;base64,${png}`, alt: id }));
    else if (series) figure.append(sparkline(series));
    else figure.append(Object.assign(document.createElement("blockquote"), { textContent: text }));
    figure.append(caption);
    return figure;
  }

  function sparkline(lines) {
    const make = (name, set) => {
      const element = document.createElementNS("http://www.w3.org/2000/svg", name);
      Object.entries(set).forEach(([key, value]) => element.setAttribute(key, value));
      return element;
    };
    const low = Math.min(...lines.flat()), high = Math.max(...lines.flat()), svg = make("svg", { viewBox: "0 0 100 60", preserveAspectRatio: "none" });
    lines.forEach((line, i) => svg.append(make("polyline", {
      class: `line${i + 1}`, points: line.map((v, j) => `${(100 * j) / Math.max(line.length - 1, 1)},${57 - (54 * (v - low)) / (high - low || 1)}`).join(" "),
    })));
    return svg;
  }

  document.querySelectorAll("[data-examples]").forEach((matrix) => {
    const known = JSON.parse(matrix.dataset.examples), cells = [...matrix.querySelectorAll("[data-cell]")];
    const choose = (cell) => {
      cells.forEach((other) => other.setAttribute("aria-pressed", other === cell));
      matrix.querySelector(".chosen").textContent = cell.dataset.title;
      matrix.querySelector(".samples").replaceChildren(...known[cell.dataset.key].map(sample));
    };
    cells.forEach((cell) => cell.addEventListener("click", () => choose(cell)));
    const first = cells.find((cell) => cell.dataset.key === matrix.dataset.first);
    if (first) choose(first);
  });

  Chart.defaults.font.family = getComputedStyle(document.body).fontFamily;
  Chart.defaults.font.size = 12;
  Chart.register(air);
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
  let closed = []; // on the screen; paper shows all but the figures of charts
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open]):not(.data)")];
    closed.forEach((element) => (element.open = true));
    document.documentElement.dataset.print = "";
    draw();
  });
  addEventListener("afterprint", () => {
    delete document.documentElement.dataset.print;
    closed.splice(0).forEach((element) => (element.open = false));
    draw();
  });
})();
