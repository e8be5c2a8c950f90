"use strict";
/* The sample browser. Every text of a run reaches the page as a text node, never as markup. */

const GROUPS_AT_ONCE = 8;
const KINDS = { train: "Training", eval: "Held-out" };
const WHITESPACE = { " ": "·", "\t": "→\t", "\n": "↵\n", "\r": "␍" };

function visible(text, node) {
  for (const part of text.split(/([ \t\n\r]+)/)) {
    if (/^[ \t\n\r]+$/.test(part)) {
      const shown = [...part].map((character) => WHITESPACE[character]).join("");
      node.append(element("span", { className: "ws" }, shown));
    } else if (part) node.append(part);
  }
  return node;
}

function textOf(value) {
  const node = element("div", { className: "textual" });
  if (typeof value === "string") return value ? visible(value, node) : (node.append(element("span", { className: "ws" }, "(empty)")), node);
  const chat = Array.isArray(value) && value.length && value.every((one) => one && typeof one === "object" && "role" in one);
  if (!chat) return visible(value === undefined ? "" : JSON.stringify(value), node);
  value.forEach((message, i) => {
    if (i) node.append("\n");
    node.append(element("span", { className: "role" }, String(message.role)), "\n");
    visible(typeof message.content === "string" ? message.content : JSON.stringify(message.content ?? null), node);
  });
  return node;
}

/* What is counted of a conversation with tools or an agent. */
const COUNTED = [["turns", "turn"], ["tool_calls", "tool call"], ["malformed_tool_calls", "malformed tool call"], ["tool_timeouts", "tool timed out", "tools timed out"],
  ["turn_timeouts", "turn timed out", "turns timed out"], ["observation_tokens", "observed token"]];

function conversation(metadata) {
  return COUNTED.filter(([name]) => typeof metadata?.[name] === "number" && metadata[name] > 0)
    .map(([name, one, several]) => `${metadata[name].toLocaleString("en-US")} ${metadata[name] === 1 ? one : several ?? `${one}s`}`).join(" · ");
}

/* Metadata stays folded: its names say whether it is worth opening. */
function metadataOf(metadata) {
  const entries = Object.entries(metadata ?? {}).filter(([name]) => !COUNTED.some(([counted]) => counted === name));
  if (!entries.length) return null;
  const names = element("summary", {}, element("span", { className: "name" }, "metadata "), entries.map(([name]) => name).join(", "));
  const rows = entries.flatMap(([name, value]) => [element("span", { className: "name" }, name), textOf(value)]);
  return element("details", { className: "metadata" }, names, element("div", { className: "entries" }, ...rows));
}

/* A reward that is a table counts by its first number. */
function scalar(reward) {
  if (typeof reward === "number") return reward;
  if (reward && typeof reward === "object") return Object.values(reward).find((one) => typeof one === "number") ?? null;
  return null;
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

class Browser {
  constructor(place, data) {
    this.place = place;
    this.data = data;
    this.kind = data.train.rollouts.length ? "train" : "eval";
    this.at = this.entries().length - 1;
    this.only = "all";
    const rewards = ["train", "eval"].flatMap((kind) => data[kind].rollouts).flatMap((entry) => entry.groups)
      .flatMap((group) => group.samples).map((sample) => scalar(sample.reward)).filter((reward) => reward !== null);
    this.low = rewards.reduce((a, b) => Math.min(a, b), Infinity);
    this.high = rewards.reduce((a, b) => Math.max(a, b), -Infinity);
    this.build();
    this.show();
  }

  entries() { return this.data[this.kind].rollouts; }

  build() {
    const kinds = Object.keys(KINDS).filter((kind) => this.data[kind].rollouts.length);
    this.kinds = kinds.map((kind) => element("button", { type: "button", onclick: () => { this.kind = kind; this.at = this.closest(); this.show(); } }, KINDS[kind]));
    this.kindNames = kinds;
    this.slider = element("input", { type: "range", min: 0, step: 1, ariaLabel: "rollout", oninput: () => { this.at = Number(this.slider.value); this.show(); } });
    this.label = element("span", { className: "at" });
    const step = (by, text, name) => element("button", { type: "button", ariaLabel: name, onclick: () => { this.at += by; this.show(); } }, text);
    const options = [["all", "all groups"], ["mixed", "groups with mixed rewards"], ["low", "groups with a lowest reward"], ["unfinished", "groups with a response not completed"]]
      .map(([value, text]) => element("option", { value }, text));
    this.filter = element("select", { ariaLabel: "which groups", onchange: () => { this.only = this.filter.value; this.show(); } }, ...options);
    this.about = element("p", { className: "about" });
    this.list = element("div");
    this.place.append(element("div", { className: "controls" }, element("span", { className: "segmented" }, ...this.kinds), this.label,
      step(-1, "‹", "earlier"), this.slider, step(1, "›", "later"), this.filter), this.about, this.list);
  }

  /* Switching between training and held-out stays near the same rollout. */
  closest() {
    const ids = this.entries().map((entry) => entry.rollout_id);
    return ids.reduce((best, id, i) => (Math.abs(id - this.rollout) < Math.abs(ids[best] - this.rollout) ? i : best), 0);
  }

  show() {
    const entries = this.entries();
    this.at = Math.min(Math.max(0, this.at), entries.length - 1);
    const entry = entries[this.at];
    this.rollout = entry.rollout_id;
    this.kinds.forEach((button, i) => button.setAttribute("aria-pressed", this.kindNames[i] === this.kind));
    this.slider.max = entries.length - 1;
    this.slider.value = this.at;
    this.label.textContent = rolloutName(entry.rollout_id);
    const groups = entry.groups.filter((group) => this.wanted(group));
    this.about.textContent = this.describe(entry, groups);
    this.list.replaceChildren();
    this.more(groups, 0);
  }

  wanted(group) {
    const rewards = group.samples.map((sample) => scalar(sample.reward));
    if (this.only === "mixed") return new Set(rewards).size > 1;
    if (this.only === "low") return rewards.includes(this.low);
    return this.only === "all" || group.samples.some((sample) => sample.status && sample.status !== "completed");
  }

  describe(entry, groups) {
    const samples = entry.groups.flatMap((group) => group.samples);
    const rewards = samples.map((sample) => scalar(sample.reward)).filter((reward) => reward !== null);
    const { of, rollouts } = this.data[this.kind];
    const parts = [`${samples.length} sample${samples.length === 1 ? "" : "s"} in ${entry.groups.length} group${entry.groups.length === 1 ? "" : "s"}`];
    if (rewards.length) parts.push(`mean reward ${number(mean(rewards))}`);
    if (groups.length !== entry.groups.length) parts.push(`${groups.length} group${groups.length === 1 ? "" : "s"} shown`);
    if (entry.left_out) parts.push(`${entry.left_out} more samples are not in this page`);
    if (of > rollouts.length) parts.push(`this page holds ${rollouts.length} of ${of} recorded rollouts`);
    return parts.join(" · ");
  }

  more(groups, from) {
    const to = from + GROUPS_AT_ONCE;
    groups.slice(from, to).forEach((group) => this.list.append(this.group(group)));
    if (groups.length > to) {
      const rest = element("button", { type: "button", style: { marginTop: "10px" }, onclick: () => { rest.remove(); this.more(groups, to); } },
        `Show ${Math.min(GROUPS_AT_ONCE, groups.length - to)} more of ${groups.length - to}`);
      this.list.append(rest);
    }
    if (!groups.length) this.list.append(element("p", { className: "empty" }, "No such group in this rollout."));
  }

  tint(reward) {
    if (reward === null) return { background: "var(--grid)" };
    const share = this.high > this.low ? Math.round((100 * (reward - this.low)) / (this.high - this.low)) : 50;
    const mix = `color-mix(in oklab, var(--good) ${share}%, var(--bad))`;
    return { background: `color-mix(in oklab, ${mix} 20%, var(--card))`, color: mix };
  }

  chip(reward) {
    const text = typeof reward === "number" ? number(reward)
      : reward && typeof reward === "object" ? Object.entries(reward).map(([key, one]) => `${key} ${typeof one === "number" ? number(one) : JSON.stringify(one)}`).join(", ")
        : "no reward";
    return element("span", { className: "reward", style: this.tint(scalar(reward)) }, text);
  }

  group(group) {
    const rewards = group.samples.map((sample) => scalar(sample.reward)).filter((reward) => reward !== null);
    const facts = element("div", { className: "facts" });
    if (group.index !== null && group.index !== undefined) facts.append(element("span", {}, `group ${group.index}`));
    const dataset = group.samples[0]?.dataset;
    if (dataset) facts.append(element("span", {}, String(dataset)));
    if (rewards.length > 1) {
      const cells = rewards.map((reward) => element("i", { style: { background: this.tint(reward).color } }));
      facts.append(element("span", {}, "mean reward ", element("b", {}, number(mean(rewards)))), element("span", { className: "strip" }, ...cells));
      if (new Set(rewards).size === 1) facts.append(element("span", {}, "all equal"));
    }
    const prompt = element("div", { className: "prompt" }, facts, element("span", { className: "name" }, "prompt"), textOf(group.prompt));
    if (group.label !== null && group.label !== undefined) prompt.append(element("span", { className: "name" }, "label"), textOf(group.label));
    const shared = metadataOf(group.metadata);
    if (shared) prompt.append(shared);
    return element("div", { className: "group" }, prompt, ...group.samples.map((sample) => this.sample(sample)));
  }

  sample(sample) {
    const state = element("span", { className: "state" });
    if (sample.status && sample.status !== "completed") state.append(element("span", { className: "warned" }, String(sample.status)), " · ");
    if (typeof sample.response_length === "number") state.append(`${sample.response_length.toLocaleString("en-US")} tokens`);
    const row = element("div", { className: "sample" }, this.chip(sample.reward), textOf(sample.response ?? ""), state);
    const told = conversation(sample.metadata), metadata = metadataOf(sample.metadata);
    if (told || metadata) row.append(element("div", { className: "told" }, ...(told ? [element("span", {}, told)] : []), ...(metadata ? [metadata] : [])));
    return row;
  }
}

function browseSamples() {
  const place = document.getElementById("samples"), data = pageData("sample-data");
  if (place) new Browser(place, data);
}

browseSamples();
