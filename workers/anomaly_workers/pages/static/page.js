// Draws a project's charts with uPlot, moves the threshold, and asks how the project is doing.
(() => {
  "use strict";
  const source = document.getElementById("data");
  if (!source || typeof uPlot === "undefined") return;
  const data = JSON.parse(source.textContent);
  const byId = (id) => document.getElementById(id);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  const LEFT = 46, RIGHT = 14;
  const BINS = 50;
  let threshold = data.threshold;

  // -- numbers for people, as the server writes them

  const count = (value) => value.toLocaleString("en-US");
  const percent = (value) => {
    if (value === null) return "–";
    const whole = value >= 0.1 && value < 0.995;
    return (100 * value).toFixed(whole ? 0 : 1).replace(/\.0$/, "") + " %";
  };
  const score = (value) => (value === null ? "–" : value.toFixed(3));

  // -- what a threshold implies

  function atLeast(sorted, limit) {
    let low = 0, high = sorted.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (sorted[middle] < limit) low = middle + 1; else high = middle;
    }
    return sorted.length - low;
  }

  function implied(limit) {
    const { normals, defects, negatives, open } = data.scores;
    const share = (group) => (group.length ? atLeast(group, limit) / group.length : null);
    const hits = atLeast(defects, limit), alarms = atLeast(negatives, limit);
    const known = defects.length && negatives.length;
    return {
      false_positive_rate: share(normals),
      recall: share(defects),
      f1: known ? (2 * hits) / (hits + alarms + defects.length) : null,
      alarm_rate: share(negatives),
      precision: known && hits + alarms ? hits / (hits + alarms) : null,
      flagged: atLeast(open, limit),
    };
  }

  function tell() {
    const now = implied(threshold);
    const shown = {
      threshold: score(threshold),
      false_positive_rate: percent(now.false_positive_rate),
      recall: percent(now.recall),
      f1: score(now.f1),
      flagged: count(now.flagged),
      flagged_of: `${count(now.flagged)} of ${count(data.scores.open.length)}`,
    };
    for (const place of document.querySelectorAll("[data-now]")) place.textContent = shown[place.dataset.now];
    const range = byId("threshold");
    if (range) {
      range.setAttribute("aria-valuetext",
        `${shown.threshold}: ${shown.flagged_of} open tasks flagged, ${shown.recall} of defects caught, ` +
        `${shown.false_positive_rate} of normal images raise an alarm`);
    }
  }

  // -- charts

  /** uPlot leaves a tick without a label by a null. */
  const labels = (say) => (_, ticks) => ticks.map((tick) => (tick === null ? "" : say(tick)));
  const charts = [];
  const font = () => "12px " + getComputedStyle(document.body).fontFamily;

  function axis(more) {
    return Object.assign({
      stroke: colour("soft"), font: font(), labelFont: font(), labelSize: 22, labelGap: 0,
      grid: { stroke: colour("grid"), width: 1 }, ticks: { show: false }, border: { show: false }, gap: 6,
    }, more);
  }

  /** Keep a chart in its place: drawn again when the place's width or the colours change. */
  function chart(id, build) {
    const place = typeof id === "string" ? byId(id) : id;
    if (!place) return;
    const one = { place, width: 0, plot: null, draw() {
      if (this.plot) this.plot.destroy();
      this.width = place.clientWidth;
      if (this.width) this.plot = build(place, { width: this.width, height: place.clientHeight });
    } };
    charts.push(one);
    one.draw();
    new ResizeObserver(() => { if (place.clientWidth !== one.width) { one.draw(); mark(); } }).observe(place);
  }

  /** A box in the corner of a plot that says what lies under the cursor. */
  function readout(say) {
    return {
      hooks: {
        ready: [(plot) => {
          plot.said = document.createElement("div");
          plot.said.className = "readout";
          plot.said.hidden = true;
          plot.root.parentNode.append(plot.said);
        }],
        setCursor: [(plot) => {
          if (!plot.said) return;
          const index = plot.cursor.idx;
          const missing = index === null || index === undefined || plot.cursor.left < 0;
          plot.said.hidden = missing;
          if (!missing) plot.said.textContent = say(index);
        }],
        destroy: [(plot) => plot.said && plot.said.remove()],
      },
    };
  }

  const plain = { legend: { show: false }, cursor: { y: false, drag: { x: false, y: false }, points: { show: false } } };

  function lane(place, group, isLast) {
    const counts = data.histogram[group];
    const middles = counts.map((_, place) => (place + 0.5) / BINS);
    const most = Math.max(1, ...counts);
    const splits = most < 4 ? [0, most] : [0, Math.round(most / 4), most];
    chart(place, (element, size) => new uPlot({
      ...plain, ...size, padding: [8, RIGHT, isLast ? 0 : 8, 0],
      scales: {
        x: { time: false, range: [0, 1] },
        y: { distr: 100, fwd: Math.sqrt, bwd: (value) => value * value, range: [0, most * 1.04] },
      },
      axes: [
        axis(isLast ? { size: 26, values: labels((tick) => tick.toFixed(1)), space: 50 }
          : { size: 1, values: () => [] }),
        axis({ size: LEFT, splits: () => splits, values: labels(count), filter: (_, ticks) => ticks }),
      ],
      series: [{}, {
        stroke: colour(group), fill: colour(group), width: 0, points: { show: false },
        paths: uPlot.paths.bars({ size: [1, 100], gap: 1 }),
      }],
      plugins: [readout((bin) => `${(bin / BINS).toFixed(2)} to ${((bin + 1) / BINS).toFixed(2)}: ${count(counts[bin])}`)],
    }, [middles, counts], element));
  }

  const rate = labels((tick) => `${Math.round(tick * 100)} %`);
  const unit = { time: false, range: [0, 1.0] };

  /** A curve of two rates with a dot at the threshold. */
  function curve(id, given, names, dot) {
    if (!given) return;
    const say = (index) => {
      const at = given.thresholds[index] > 1 ? "none flagged" : "threshold " + score(given.thresholds[index]);
      return `${at}: ${names[0]} ${percent(given.x[index])}, ${names[1]} ${percent(given.y[index])}`;
    };
    chart(id, (element, size) => new uPlot({
      ...plain, ...size, padding: [12, RIGHT + 6, 0, 0],
      scales: { x: unit, y: { range: [0, 1.02] } },
      axes: [axis({ values: rate, label: names[0], size: 32, space: 60 }), axis({ values: rate, size: 58, label: names[1] })],
      series: [{}, { stroke: colour("accent"), width: 2.5, points: { show: given.x.length < 3 } }],
      plugins: [readout(say)],
      hooks: { draw: [(plot) => {
        const { ctx } = plot, [x, y] = dot(implied(threshold));
        if (id === "roc") {
          ctx.save();
          ctx.strokeStyle = colour("soft");
          ctx.setLineDash([6, 6]);
          ctx.beginPath();
          ctx.moveTo(plot.valToPos(0, "x", true), plot.valToPos(0, "y", true));
          ctx.lineTo(plot.valToPos(1, "x", true), plot.valToPos(1, "y", true));
          ctx.stroke();
          ctx.restore();
        }
        if (x === null || y === null) return;
        ctx.save();
        ctx.beginPath();
        ctx.arc(plot.valToPos(x, "x", true), plot.valToPos(y, "y", true), 7 * devicePixelRatio, 0, 7);
        ctx.fillStyle = colour("alarm");
        ctx.strokeStyle = colour("card");
        ctx.lineWidth = 3 * devicePixelRatio;
        ctx.stroke();
        ctx.fill();
        ctx.restore();
      }] },
    }, [given.x, given.y], element));
  }

  function found() {
    const known = [0, ...data.found.defects], steps = known.map((_, place) => place);
    const random = steps.map((step) => step * data.found.rate);
    chart("found", (element, size) => new uPlot({
      ...plain, ...size, padding: [10, RIGHT, 0, 0],
      scales: { x: { time: false, range: [0, Math.max(1, steps.length - 1)] }, y: { range: (_, __, most) => [0, Math.max(1, most) * 1.05] } },
      axes: [
        axis({ label: "reviews", size: 32, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000], values: labels(count) }),
        axis({ size: LEFT, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000], values: labels(count) }),
      ],
      series: [{},
        { stroke: colour("defects"), width: 2.5, paths: uPlot.paths.stepped({ align: 1 }), points: { show: false } },
        { stroke: colour("soft"), width: 2, dash: [6, 5], points: { show: false } }],
      plugins: [readout((step) => `${count(step)} reviews: ${count(known[step])} defects, random ${random[step].toFixed(1)}`)],
    }, [steps, known, random], element));
  }

  function drift() {
    const { days, share, images, high, unusual, expected } = data.drift;
    if (!days.length) return;
    const steps = days.map((_, place) => place);
    const pick = (wanted) => share.map((value, place) => (unusual[place] === wanted ? value : null));
    const short = (day) => new Date(day + "T12:00:00Z").toLocaleDateString("en-GB", { day: "numeric", month: "short", timeZone: "UTC" });
    const bars = uPlot.paths.bars({ size: [0.8, 46] });
    chart("drift", (element, size) => new uPlot({
      ...plain, ...size, padding: [22, RIGHT, 0, 0],
      scales: {
        x: { time: false, range: [-0.6, days.length - 0.4] },
        y: { range: (_, __, most) => [0, Math.max(most, expected * 2.5, 0.02) * 1.1] },
      },
      axes: [
        axis({ grid: { show: false }, size: 28, incrs: [1, 2, 5, 7, 14, 28, 56, 112], space: 62,
          values: labels((tick) => (days[tick] ? short(days[tick]) : "")) }),
        axis({ size: 52, values: labels((tick) => `${+(tick * 100).toFixed(1)} %`) }),
      ],
      series: [{},
        { fill: colour("open"), width: 0, paths: bars, points: { show: false } },
        { fill: colour("defects"), width: 0, paths: bars, points: { show: false } }],
      plugins: [readout((day) => `${short(days[day])}: ${high[day]} of ${count(images[day])} new images, ${percent(share[day])}`)],
      hooks: { draw: [(plot) => {
        const { ctx, bbox } = plot, y = plot.valToPos(expected, "y", true);
        ctx.save();
        ctx.strokeStyle = colour("soft");
        ctx.lineWidth = 2 * devicePixelRatio;
        ctx.setLineDash([6 * devicePixelRatio, 5 * devicePixelRatio]);
        ctx.beginPath();
        ctx.moveTo(bbox.left, y);
        ctx.lineTo(bbox.left + bbox.width, y);
        ctx.stroke();
        ctx.fillStyle = colour("alarm");
        ctx.textAlign = "center";
        ctx.font = `${12 * devicePixelRatio}px sans-serif`;
        steps.filter((day) => unusual[day]).forEach((day) =>
          ctx.fillText("▲", plot.valToPos(day, "x", true), plot.valToPos(share[day], "y", true) - 6 * devicePixelRatio));
        ctx.restore();
      }] },
    }, [steps, pick(false), pick(true)], element));
  }

  // -- the threshold

  const lanes = byId("histogram"), range = byId("threshold");

  /** Place the line, the shaded side and the slider over the plots. */
  function mark() {
    if (!lanes) return;
    const width = lanes.clientWidth - LEFT - RIGHT, x = LEFT + threshold * width;
    const plots = lanes.querySelectorAll(".lane");
    const bottom = plots[plots.length - 1].getBoundingClientRect().bottom - lanes.getBoundingClientRect().top;
    lanes.style.setProperty("--lanes", `${bottom - 26 - 26}px`);
    const cut = lanes.querySelector(".cut"), zone = lanes.querySelector(".alarm-zone");
    cut.style.left = `${x}px`;
    cut.firstElementChild.textContent = score(threshold);
    zone.style.left = `${x}px`;
    zone.style.width = `${LEFT + width - x}px`;
    range.style.marginLeft = `${LEFT - 12}px`;
    range.style.width = `${width + 24}px`;
    lanes.classList.add("drawn");
  }

  function move(to) {
    threshold = Math.min(0.999, Math.max(0.001, to));
    range.value = threshold;
    mark();
    tell();
    for (const one of charts) if (one.plot && (one.place.id === "roc" || one.place.id === "precision-recall")) one.plot.redraw(false, false);
  }

  function drag() {
    const at = (event) => {
      const box = lanes.getBoundingClientRect();
      move(Math.round(1000 * (event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT)) / 1000);
    };
    for (const one of lanes.querySelectorAll(".lane")) {
      one.addEventListener("pointerdown", (event) => {
        if (event.button) return;
        one.setPointerCapture(event.pointerId);
        at(event);
      });
      one.addEventListener("pointermove", (event) => { if (one.hasPointerCapture(event.pointerId)) at(event); });
    }
    range.addEventListener("input", () => move(Number(range.value)));
  }

  // -- the server

  const told = byId("told");
  const SAME = 1e-6;  // thresholds that are no farther apart are the same, to the server as well
  const WORD = `told-${data.project}`;
  let asking = false;
  const say = (text, kind) => { told.textContent = text; told.className = kind || ""; };
  const pause = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));

  async function ask(path, body) {
    const options = body ? { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) } : {};
    const answer = await fetch(`${data.project}/${path}`, { credentials: "same-origin", ...options });
    const said = await answer.json().catch(() => ({}));
    if (!answer.ok) throw new Error(said.error || `The front end answered ${answer.status}.`);
    return said;
  }

  /** Wait until the threshold is moved, or its job is over; the version was read before the job. */
  async function watch(job, inForce) {
    for (let round = 0; round < 600; round += 1) {
      await pause(round < 10 ? 0.4 : 2);
      const status = await ask("status.json");
      show(status);
      if (inForce(status)) return status;
      const state = status.work && status.work.jobs.find((one) => one.id === job);
      if (!state || state.state === "finished") return ask("status.json");
      if (state.state === "failed" || state.state === "cancelled") throw new Error(state.message || `The job ${state.state}.`);
      say(state.state === "running"
        ? `Judging the stored maps again: ${state.percent} %`
        : status.work.workers ? "Waiting for a worker" : "Waiting: no worker runs. Start one with ls-anomaly worker.");
    }
    throw new Error("Still not done; see ls-anomaly jobs.");
  }

  /** The rate in the field as a share; null, and a word about it, where it makes no sense. */
  function rateGiven() {
    const field = byId("fpr"), given = field.value.trim() === "" ? NaN : Number(field.value);
    if (given > 0 && given < 50) return given / 100;
    say("Give a rate above 0 % and below 50 %.", "bad");
    field.focus();
    return null;
  }

  async function use(rule) {
    const value = rule === "number" ? threshold : rule === "fpr" ? rateGiven() : 0;
    if (value === null || asking) return;
    const buttons = [...document.querySelectorAll("#set-threshold button")], off = buttons.filter((one) => one.disabled);
    for (const one of buttons) one.disabled = true;
    asking = true;
    try {
      say("Asking");
      const { version } = await ask("status.json");
      const { job } = await ask("threshold", { rule, value });
      const isWanted = (status) => Math.abs(status.threshold - value) < SAME;
      const inForce = rule === "number" ? isWanted : (status) => status.version !== version;
      const status = await watch(job, inForce);
      if (!inForce(status) && status.rollout) {
        say(`Noted. It takes effect when ${status.rollout} is deployed.`);
      } else if (rule === "number" && !isWanted(status)) {
        say(`Noted, but ${score(status.threshold)} is still in force; see ls-anomaly jobs.`, "bad");
      } else {
        reload(`Done: ${score(status.threshold)} is in force, and Label Studio has the new verdicts.`);
      }
    } catch (error) {
      say(error.message, "bad");
    } finally {
      for (const one of buttons) one.disabled = off.includes(one);
      asking = false;
    }
  }

  /** Show the page of the version in force, with a word that outlives the old page. */
  function reload(word) {
    sessionStorage.setItem(WORD, word);
    location.reload();
  }

  function show(status) {
    const newer = byId("newer");
    if (newer) newer.hidden = asking || status.version === data.version;
    const shown = { open: status.open };
    if (status.work) {
      shown.waiting = status.work.waiting;
      shown.workers = status.work.workers;
      for (const [queue, waiting] of Object.entries(status.work.depth)) shown["depth-" + queue] = waiting;
    }
    for (const place of document.querySelectorAll("[data-live]")) {
      const value = shown[place.dataset.live];
      if (value !== undefined) place.textContent = count(value);
    }
  }

  async function follow() {
    for (;;) {
      await pause(15);
      if (!document.hidden) await ask("status.json").then(show).catch(() => {});
    }
  }

  // -- begin

  if (lanes) {
    ["normals", "defects", "open"].forEach((group, place) =>
      lane(lanes.querySelector(`[data-group=${group}] .plot`), group, place === 2));
    drag();
    mark();
    tell();
  }
  curve("roc", data.roc, ["false alarms", "defects caught"], (now) => [now.alarm_rate, now.recall]);
  curve("precision-recall", data.precisionRecall, ["defects caught", "alarms that are right"], (now) => [now.recall, now.precision]);
  if (byId("found")) found();
  drift();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { for (const one of charts) one.draw(); mark(); });

  const form = byId("set-threshold");
  if (form) {
    const byRate = form.querySelector("[value=fpr]");
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      use(event.submitter ? event.submitter.value : "number");
    });
    byId("fpr").addEventListener("keydown", (event) => {
      if (event.key !== "Enter") return;
      event.preventDefault();  // it would press the form's first button, which takes the line's number
      if (!byRate.disabled) form.requestSubmit(byRate);
    });
    byId("reset").addEventListener("click", () => move(data.threshold));
  }
  if (!data.report) follow();
  if (form) {
    const word = sessionStorage.getItem(WORD);
    sessionStorage.removeItem(WORD);
    if (word) say(word, "good");
  }
})();
