// Shows the tokens of an answer by the model that wrote them, and what both models chose at each.
//
// A plain module without dependencies. Tokens have the form of `tokens` in docs/answers.md, and
// figures that of `summary`. Text is only ever set as text, never read as HTML.

const STYLE = `
:root {
  color-scheme: light dark;
  --page: #ffffff; --panel: #f6f8fa; --line: #d0d7de; --text: #1f2328; --dim: #59636e;
  --large: #a5117f; --large-tint: #a5117f1f; --unchecked: #8a5a00; --bar: #a5117f40;
  --small-bar: #0969da40; --focus: #0969da; --heat: 255 120 30;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0d1117; --panel: #161b22; --line: #3d444d; --text: #e6edf3; --dim: #9198a1;
    --large: #ff7bd5; --large-tint: #ff7bd526; --unchecked: #e3b341; --bar: #ff7bd54d;
    --small-bar: #58a6ff4d; --focus: #58a6ff; --heat: 190 75 10;
  }
}
.tv-page {
  margin: 0; background: var(--page); color: var(--text);
  font: 1rem/1.6 system-ui, sans-serif; overflow-wrap: anywhere;
}
.tv-page main {
  max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 2rem;
  display: grid; gap: 1rem 2rem; grid-template-columns: minmax(0, 1fr) 22rem;
  grid-template-areas: "head head" "text detail" "more detail"; align-items: start;
}
.tv-page header { grid-area: head; }
.tv-page h1 { font-size: 1.25rem; line-height: 1.4; margin: 0 0 .25rem; white-space: pre-wrap;
  max-height: 12rem; overflow: auto; }
.tv-page h2 { font-size: 1rem; margin: 0 0 .5rem; }
.tv-page p { margin: 0; }
.tv-dim { color: var(--dim); font-size: .875rem; }
.tv-earlier pre { white-space: pre-wrap; font: inherit; margin: .25rem 0 .75rem; }
.tv-page h1, .tv-earlier pre, .tv-tokens, .tv-detail code, .tv-asked code { unicode-bidi: plaintext; }
.tv-bar { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; align-items: center; margin-top: .75rem; }
.tv-bar label { cursor: pointer; }
.tv-legend { display: inline-flex; flex-wrap: wrap; gap: 0 1rem; }
.tv-answer { grid-area: text; }
.tv-more { grid-area: more; }
.tv-tokens { white-space: pre-wrap; border-radius: .25rem; }
.tv-token { border-radius: .2rem; cursor: default; text-underline-offset: .2em; }
.tv-token[data-source="large"] .tv-word {
  color: var(--large); text-decoration: underline solid var(--large) 1px;
}
.tv-token[data-decision="replaced"] .tv-word, .tv-token[data-decision="continued"] .tv-word {
  text-decoration-thickness: 2px; background: var(--large-tint); font-weight: 600;
}
.tv-token[data-decision="accepted"] .tv-word { text-decoration: underline dotted var(--large) 2px; }
.tv-token[data-decision="unchecked"] .tv-word {
  color: var(--unchecked); text-decoration: underline dashed var(--unchecked) 2px;
}
.tv-token[data-provisional] { opacity: .5; font-style: italic; }
.tv-tokens .tv-token:hover { background: var(--line); }
.tv-token[aria-current="true"] { outline: 2px solid var(--focus); outline-offset: 1px; }
.tv-token:focus-visible, .tv-page :focus-visible { outline: 2px solid var(--focus); outline-offset: 1px; }
.tv-heat .tv-token[data-decision] .tv-word {
  color: var(--text); background: rgb(var(--heat) / calc(var(--entropy, 0) * .8)); border-radius: .2rem;
}
.tv-detail {
  grid-area: detail; position: sticky; top: 1rem; max-height: calc(100vh - 2rem); overflow: auto;
  box-sizing: border-box; padding: .75rem 1rem 1rem; border: 1px solid var(--line);
  border-radius: .5rem; background: var(--panel);
}
.tv-detail code, .tv-asked code { font: .875rem ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  white-space: pre-wrap; }
.tv-close { float: right; font: inherit; color: inherit; background: none; border: 0; cursor: pointer;
  padding: 0 .35rem; line-height: 1.5; }
.tv-lists { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: .75rem;
  margin-top: .75rem; }
.tv-lists h3 { font-size: .875rem; margin: 0 0 .25rem; }
.tv-lists ol, .tv-asked { list-style: none; margin: 0; padding: 0; }
.tv-lists li {
  display: flex; justify-content: space-between; align-items: center; gap: .35rem; padding: .1rem .3rem; margin-bottom: 2px;
  border-radius: .2rem; font-size: .8125rem; line-height: 1.55;
  background: linear-gradient(to right, var(--small-bar) var(--share), transparent var(--share));
}
.tv-lists .tv-by-large li {
  background: linear-gradient(to right, var(--bar) var(--share), transparent var(--share));
}
.tv-lists li code { font-size: .8125rem; }
.tv-lists li span { flex: none; font-variant-numeric: tabular-nums; }
.tv-lists li.tv-chosen { font-weight: 700; }
.tv-figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr));
  gap: .5rem 1rem; margin: 0 0 1.5rem; }
.tv-figures div { border-top: 1px solid var(--line); padding-top: .25rem; }
.tv-figures dt { color: var(--dim); font-size: .8125rem; }
.tv-figures dd { margin: 0; font-variant-numeric: tabular-nums; }
.tv-asked button {
  font: inherit; color: inherit; background: none; border: 0; border-top: 1px solid var(--line);
  padding: .35rem 0; width: 100%; text-align: left; cursor: pointer;
}
.tv-asked button:hover { background: var(--panel); }
.tv-new { color: var(--large); text-decoration: underline; }
@media (max-width: 50rem) {
  .tv-page main { grid-template-columns: minmax(0, 1fr); grid-template-areas: "head" "text" "more";
    padding-bottom: 50vh; }
  .tv-detail { position: fixed; inset: auto 0 0 0; top: auto; max-height: 45vh; border-width: 1px 0 0;
    border-radius: 0; box-shadow: 0 -4px 16px #0003; }
  .tv-detail:not([data-index]) { padding: .5rem 1rem; }
}
`;

const ENDS = {
  eos: "end token", stop: "its own end", stop_string: "stop string", length: "token limit", cancelled: "cancelled",
};
const FULL_HEAT_NATS = 4;
// Control characters, and those that change the direction of the text around them.
const CONTROLS = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g;

/** Add the style to a page, once. */
export function installStyle() {
  if (document.body.classList.contains("tv-page")) return;
  const sheet = new CSSStyleSheet();
  sheet.replaceSync(STYLE);
  document.adoptedStyleSheets = [...document.adoptedStyleSheets, sheet];
  document.body.classList.add("tv-page");
}

function clean(text) {
  return String(text).replace(CONTROLS, "");
}

/** Return an element with attributes, and with children that are elements or text. */
function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** Return the blanks at the start of a token's text, and the rest, which alone is underlined. */
function splitWord(text) {
  const word = clean(text).trimStart();
  return [clean(text).slice(0, clean(text).length - word.length), element("span", { class: "tv-word" }, word)];
}

/** Return the text of a token with its blanks and control characters visible. */
function visible(text) {
  const code = (control) => `\\u${control.charCodeAt(0).toString(16).padStart(4, "0")}`;
  const line = String(text).replace(CONTROLS, code).replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣");
  return line || "(nothing)";
}

/** Return a number of the format, where infinities are texts, as a person reads it. */
function number(value, digits = 3) {
  if (typeof value !== "number") return String(value).replace("inf", "∞");
  return String(Number(value.toPrecision(digits)));
}

function percent(share) {
  return `${(100 * share).toFixed(share < 0.1 || (share > 0.99 && share < 1) ? 1 : 0)} %`;
}

/** Return in words how a token was decided. */
export function describeDecision(token) {
  const reason = token.unchecked_reason ? `: ${clean(token.unchecked_reason)}` : "";
  const words = {
    kept: "The small model's token was kept; the large one was not asked.",
    "over budget": "Above the threshold, but the budget was used up: the small model's token was kept.",
    agreed: "The large model was asked, and chose the same token.",
    replaced: "The large model was asked, and its token replaced the small model's.",
    accepted: "The large model was asked; the small model's token is nearly as likely, and was kept.",
    unchecked: `To be asked, but unchecked${reason}. The small model's token was kept.`,
    provisional: "Not committed yet: a call to the large model may change it.",
    continued: "A further part of the large model's token before it.",
  };
  return words[token.decision] ?? clean(token.decision);
}

/** Tokens of one answer in `text`, and the choices of the current one in `detail`.
 *
 * Hovering shows a token, a click or the focus keeps it. In the text, the arrow keys move from token
 * to token, N and P to the next and previous one that the large model was asked for.
 */
export class TokenView {
  constructor(text, detail) {
    this.text = text;
    this.detail = detail;
    this.tokens = [];
    this.nodes = [];
    this.current = null;
    // Whether the focus was on a token and none is left to have it.
    this.isFocusDue = false;
    text.classList.add("tv-tokens");
    detail.classList.add("tv-detail");
    detail.setAttribute("aria-live", "polite");
    text.setAttribute("role", "group");
    text.setAttribute(
      "aria-label",
      "Answer. Arrow keys move between tokens, N and P between those the large model was asked for.",
    );
    text.addEventListener("mouseover", (event) => this.#show(this.#indexOf(event)));
    text.addEventListener("mouseleave", () => this.#show(this.current));
    text.addEventListener("click", (event) => this.select(this.#indexOf(event)));
    text.addEventListener("focusin", (event) => this.#mark(this.#indexOf(event)));
    text.addEventListener("keydown", (event) => this.#onKey(event));
    this.#show(null);
  }

  /** Add a committed token, in place of a provisional one with its index. */
  append(token) {
    this.#put(token, false);
  }

  /** Add a token that may be retracted. */
  appendProvisional(token) {
    this.#put(token, true);
  }

  /** Remove all tokens from number `index` on. */
  retract(index) {
    const isCurrent = this.current !== null && this.current >= index;
    const hasFocus = (node) => node.contains(document.activeElement);
    const removed = this.nodes.splice(index);
    const hadFocus = removed.some(hasFocus) || (isCurrent && hasFocus(this.detail));
    const hadStop = removed.some((node) => node.tabIndex === 0);
    for (const node of removed) node.remove();
    this.tokens.length = Math.min(this.tokens.length, index);
    if (isCurrent) this.#mark(null);
    const last = this.nodes.at(-1);
    if (last && hadStop) last.tabIndex = 0;
    if (hadFocus) last?.focus({ preventScroll: true });
    this.isFocusDue ||= hadFocus && !last;
  }

  /** Shade tokens by the small model's entropy, or not. */
  setHeat(on) {
    this.text.classList.toggle("tv-heat", on);
  }

  /** Keep a token in the detail and move the focus to it; null shows none. */
  select(index) {
    this.#mark(index);
    if (index !== null) this.nodes[index].focus();
  }

  #put(token, provisional) {
    const { index } = token;
    // The node of a provisional token stays, and with it the focus and the way to it.
    const node = this.nodes[index] ?? this.#addNode(index);
    this.tokens[index] = token;
    node.dataset.source = token.source;
    node.dataset.decision = token.decision;
    node.toggleAttribute("data-provisional", provisional);
    node.replaceChildren(...splitWord(token.text));
    const entropy = token.small?.entropy_nats;
    const heat = typeof entropy === "number" ? Math.min(1, entropy / FULL_HEAT_NATS) : Number(entropy !== undefined);
    node.style.setProperty("--entropy", heat.toFixed(3));
    if (this.detail.dataset.index === String(index)) this.#show(index);
    if (!this.isFocusDue) return;
    this.isFocusDue = false;
    if (document.activeElement === document.body) node.focus({ preventScroll: true });
  }

  #addNode(index) {
    const node = element("span", { class: "tv-token", "data-index": index, tabindex: index === 0 ? 0 : -1 });
    this.text.append(node);
    this.nodes.push(node);
    return node;
  }

  #indexOf(event) {
    const node = event.target.closest?.(".tv-token");
    return node ? Number(node.dataset.index) : null;
  }

  #mark(index) {
    if (this.current !== null) this.nodes[this.current]?.removeAttribute("aria-current");
    this.current = index;
    if (index !== null) {
      for (const node of this.text.querySelectorAll('[tabindex="0"]')) node.tabIndex = -1;
      this.nodes[index].tabIndex = 0;
      this.nodes[index].setAttribute("aria-current", "true");
    }
    this.#show(index);
  }

  #onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const at = this.#indexOf(event) ?? -1;
    const last = this.nodes.length - 1;
    const isAsked = (index) => this.tokens[index].large || !this.tokens[index].checked;
    const after = [...this.tokens.keys()].filter(isAsked);
    const targets = {
      ArrowRight: Math.min(at + 1, last),
      ArrowLeft: Math.max(at - 1, 0),
      Home: 0,
      End: last,
      n: after.find((index) => index > at),
      p: after.reverse().find((index) => index < at),
      Escape: null,
    };
    const target = targets[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (target === undefined) return;
    event.preventDefault();
    this.select(target);
  }

  #show(index) {
    const token = index === null ? null : this.tokens[index];
    const hadFocus = this.detail.contains(document.activeElement);
    if (!token) {
      delete this.detail.dataset.index;
      this.detail.replaceChildren(
        element("p", { class: "tv-dim" }, "Point at a token, tap it, or move to it with the arrow keys."),
      );
      return;
    }
    this.detail.dataset.index = index;
    const close = element("button", { type: "button", class: "tv-close", "aria-label": "Close" }, "×");
    close.addEventListener("click", () => this.#close());
    this.detail.replaceChildren(
      close,
      element("h2", {}, `Token ${index + 1}: `, element("code", {}, visible(token.text))),
      element("p", {}, describeDecision(token)),
      element("p", { class: "tv-dim" }, this.#describeScore(token)),
      element(
        "div",
        { class: "tv-lists" },
        this.#list("Small model", "tv-by-small", token.small, token.source === "small"),
        this.#list("Large model", "tv-by-large", token.large, token.source === "large"),
      ),
    );
    if (hadFocus) close.focus({ preventScroll: true });
  }

  /** Show no token; the focus goes from the button back to the text, as it is there after Escape. */
  #close() {
    this.nodes.find((node) => node.tabIndex === 0)?.focus({ preventScroll: true });
    this.select(null);
  }

  #describeScore(token) {
    const parts = [];
    if (token.score !== undefined && token.score !== null) {
      parts.push(`score ${number(token.score)}, threshold ${number(token.threshold)}`);
    }
    if (token.small) parts.push(`entropy ${number(token.small.entropy_nats)} nats`);
    if (token.prefetched) parts.push("came with an earlier call");
    else if (token.large) parts.push(`call of ${number(token.large.latency_s)} s`);
    return parts.join(" · ");
  }

  #list(title, name, choice, isUsed) {
    const box = element("div", { class: name }, element("h3", {}, title));
    if (!choice) {
      box.append(element("p", { class: "tv-dim" }, name === "tv-by-large" ? "not asked" : "–"));
      return box;
    }
    const rows = [...(choice.top ?? [])];
    if (!rows.some((row) => row.text === choice.text)) rows.unshift(choice);
    const items = rows.slice(0, 5).map((row) => {
      const isChosen = row.text === choice.text;
      const share = typeof row.logprob === "number" ? Math.min(1, Math.exp(row.logprob)) : null;
      const item = element(
        "li",
        { class: isChosen ? "tv-chosen" : null },
        element("code", {}, visible(row.text)),
        element("span", {}, share === null ? "" : percent(share) + (isChosen && isUsed ? " ✓" : "")),
      );
      item.style.setProperty("--share", `${100 * (share ?? 0)}%`);
      return item;
    });
    box.append(element("ol", {}, ...items));
    return box;
  }
}

/** Return the figures of an answer as a list of terms. */
export function renderFigures(summary) {
  const count = (value) => Number(value).toLocaleString("en-US");
  const seconds = (value) => `${number(value)} s`;
  const terms = [
    ["tokens", count(summary.tokens)],
    ["by the large model", `${summary.large_tokens} (${percent(summary.large_tokens / (summary.tokens || 1))})`],
    ["positions asked", `${summary.escalated} (${percent(summary.escalation_rate)})`],
    ["agreement", summary.agreement === null ? "–" : percent(summary.agreement)],
    ["unchecked", summary.unchecked],
    ["tokens per second", number(summary.tokens_per_s)],
    ["first token after", seconds(summary.ttft_s)],
    ["total", seconds(summary.total_s)],
    ["waited for calls", seconds(summary.stall_s)],
    ["calls", summary.calls],
    ["uploaded", `${count(summary.uploaded_tokens)} tokens, ${count(summary.uploaded_bytes)} bytes`],
    ["mode", summary.mode],
    ["ended by", ENDS[summary.finish_reason] ?? summary.finish_reason],
  ];
  const items = terms.map(([term, value]) =>
    element("div", {}, element("dt", {}, term), element("dd", {}, clean(value))),
  );
  return element("dl", { class: "tv-figures" }, ...items);
}

/** Return buttons for the positions that the large model was asked for. */
function renderAsked(tokens, view) {
  const asked = tokens.filter((token) => token.large || !token.checked);
  const rows = asked.map((token) => {
    const small = element("code", {}, visible(token.small?.text ?? ""));
    const outcomes = {
      replaced: () => [" → ", element("code", { class: "tv-new" }, visible(token.large.text))],
      agreed: () => [" by both"],
      accepted: () => [" kept over ", element("code", {}, visible(token.large.text))],
      unchecked: () => [" unchecked"],
    };
    const button = element("button", { type: "button" }, `Token ${token.index + 1}: `, small,
      ...(outcomes[token.decision]?.() ?? []));
    button.addEventListener("click", () => view.select(token.index));
    return element("li", {}, button);
  });
  return element("section", {}, element("h2", {}, "Where the large model was asked"),
    rows.length ? element("ul", { class: "tv-asked" }, ...rows) : element("p", { class: "tv-dim" }, "Nowhere."));
}

/** Return an example of each way of showing a token that occurs in the answer. */
function renderLegend(tokens) {
  const decisions = new Set(tokens.map((token) => token.decision));
  const examples = [
    ["replaced", "large", "replaced", " by the large model"],
    ["agreed", "large", "confirmed", " by it"],
    ["accepted", "small", "kept", ", nearly as likely to it"],
    ["unchecked", "small", "unchecked", ", no reply"],
  ].filter(([decision]) => decisions.has(decision));
  const items = examples.map(([decision, source, word, rest]) => element("span", {},
    element("span", { class: "tv-token", "data-source": source, "data-decision": decision }, ...splitWord(word)), rest));
  return element("span", { class: "tv-dim tv-legend" }, ...items);
}

/** Show a whole answer document in `main`. */
export function showDocument(answer, main) {
  installStyle();
  const { models, router, messages } = answer;
  const rule = router.budget === null
    ? `above ${router.name} ${number(router.threshold)}`
    : `for at most ${number(100 * router.budget)} % of the tokens, by ${router.name}`;
  const pair = models.large === null ? `${models.small} alone` : `${models.small}, asking ${models.large} ${rule}`;
  const last = messages.findLastIndex((message) => message.role === "user");
  const earlier = messages.filter((_, index) => index !== last);
  const text = element("div");
  const detail = element("aside", { "aria-label": "Choices of both models" });
  const view = new TokenView(text, detail);
  const heat = element("input", { type: "checkbox", role: "switch" });
  heat.addEventListener("change", () => view.setHeat(heat.checked));
  const header = element(
    "header",
    {},
    element("h1", {}, clean(messages[last]?.content ?? "")),
    element("p", { class: "tv-dim" }, clean(`${pair} · ${answer.created}`)),
    earlier.length
      ? element("details", { class: "tv-earlier" }, element("summary", {}, `${earlier.length} other messages`),
          ...earlier.flatMap((message) => [
            element("strong", {}, clean(message.role)),
            element("pre", {}, clean(message.content)),
          ]))
      : null,
    element(
      "div",
      { class: "tv-bar" },
      element("label", {}, heat, " Heat: shade by uncertainty"),
      renderLegend(answer.tokens),
    ),
  );
  main.replaceChildren(
    header,
    element("section", { class: "tv-answer", "aria-label": "Answer" }, text),
    detail,
    element("section", { class: "tv-more" }, renderFigures(answer.summary), renderAsked(answer.tokens, view)),
  );
  for (const token of answer.tokens) view.append(token);
  return view;
}
