// One answer on the page: its tokens as they come, its figures, and what went wrong.

// The document of an answer is there once its decode has ended, shortly after the client left.
const DOCUMENT_TRIES = 8;
const DOCUMENT_PAUSE_MS = 150;

class AnswerPanel {
  /** `details` gets the choices at a token. `onShow(panel, isKept)` is called when tokens of the panel
   * are pointed at, with null when they no longer are, and with `isKept` when one has the focus. */
  constructor(endpoint, settings, { details, onShow, onUse }) {
    this.endpoint = endpoint;
    this.settings = settings;
    this.id = null;
    this.text = "";
    this.isComplete = false;
    this.finish = null;
    this.summary = null;
    this.committed = 0;
    this.largeShown = 0;
    this.startMs = performance.now();
    this.readMs = null;
    this.title = element("h4", {}, settings.describe());
    this.state = element("span", { class: "state" }, "waiting");
    this.tokens = element("div");
    this.after = element("div", { class: "after" });
    this.use = element("input", { type: "radio" });
    this.use.addEventListener("change", () => onUse(this));
    this.useLabel = element("label", { hidden: "" }, this.use, " Go on from this one");
    this.body = element("div", {}, this.tokens);
    this.node = element(
      "article", { class: "answer", "aria-busy": "true" },
      element("header", {}, this.title, this.state), this.body, this.after,
    );
    this.detail = element("div", { hidden: "" });
    details.append(this.detail);
    this.view = new TokenView(this.tokens, this.detail);
    this.tokens.addEventListener("mouseover", () => onShow(this, false));
    this.tokens.addEventListener("mouseleave", () => onShow(null, false));
    this.tokens.addEventListener("focusin", () => onShow(this, true));
  }

  /** Write the answer to a conversation. Never raises; `problem` says what went wrong. */
  async run(messages, signal) {
    this.problem = null;
    try {
      const body = { messages, stream: true, logprobs: true, top_logprobs: 5, events: true };
      const { id, chunks } = await this.endpoint.start({ ...body, ...this.settings.fields() }, signal);
      this.id = id;
      for await (const chunk of chunks) this.#read(chunk);
      this.isComplete = true;
    } catch (error) {
      if (error instanceof EndpointError) this.problem = error;
      else if (error.name !== "AbortError") this.problem = new EndpointError(`The page failed: ${error.message}`);
    } finally {
      this.view.retract(this.committed);
      this.node.removeAttribute("aria-busy");
    }
    if (!this.isComplete) this.state.textContent = this.problem ? "failed" : "stopped";
    await this.#showResult();
  }

  remove() {
    this.node.remove();
    this.detail.remove();
  }

  #read(chunk) {
    const event = chunk.mlxroute ?? {};
    if (event.prompt) this.#showProgress(event.prompt);
    if (event.retracted) this.view.retract(Math.max(event.retracted.index, this.committed));
    if (event.provisional) {
      this.view.appendProvisional({ ...event.provisional, decision: "provisional", checked: true });
      this.#markCode(event.provisional.index);
    }
    const choice = chunk.choices?.[0];
    if (!choice) return;
    for (const entry of choice.logprobs?.content ?? []) this.#commit(entry);
    if (choice.finish_reason) {
      this.finish = choice.finish_reason;
      this.summary = event;
    }
  }

  #commit(entry) {
    this.readMs ??= performance.now();
    this.view.append({ ...entry, index: this.committed });
    this.#markCode(this.committed);
    this.committed += 1;
    this.largeShown += entry.source === "large";
    this.text += entry.text;
    const seconds = (performance.now() - this.readMs) / 1000;
    const rate = this.committed > 1 && seconds > 0 ? `, ${number((this.committed - 1) / seconds)} tokens/s` : "";
    this.state.textContent = `${this.committed} ${this.committed === 1 ? "token" : "tokens"}${rate}`;
  }

  /** Give a token in a fenced block of code a font of fixed width. */
  #markCode(index) {
    const fences = this.text.split("```").length - 1;
    this.view.nodes[index]?.classList.toggle("code", fences % 2 === 1);
  }

  #showProgress({ done, total }) {
    if (done < total) this.state.textContent = `reading the prompt: ${done} of ${total} tokens`;
    else this.readMs = performance.now();
  }

  async #showResult() {
    const answer = await this.#findDocument();
    if (answer) {
      this.title.textContent = this.settings.describe(answer);
      // A stream that was left has no summary of its own.
      this.summary ??= answer.summary;
      this.finish ??= answer.summary.finish_reason;
    }
    if (this.problem) this.#addProblem(this.problem.message);
    // A document has one entry for failed calls and one for calls not made.
    const positions = new Map();
    for (const { reason, positions: count, count: documented } of this.summary?.failures ?? []) {
      positions.set(reason, (positions.get(reason) ?? 0) + (count ?? documented));
    }
    for (const [reason, count] of positions) {
      this.#addProblem(`At ${count} positions the small model's token stays unchecked: ${reason}.`);
    }
    if (!this.summary) return;
    if (this.isComplete) this.state.textContent = this.#describeEnd();
    this.body.append(renderCounts(this.summary));
    const all = element("details", {}, element("summary", {}, "All figures"));
    all.append(renderFigures({ ...this.summary, finish_reason: this.finish }));
    const save = element("button", { type: "button", class: "link" }, "Save");
    save.title = "Save the answer as JSON, for `mlxroute show` and `mlxroute replay`";
    save.addEventListener("click", () => this.#save());
    this.after.append(this.useLabel, save, all);
  }

  /** Return what ended the answer, where its text does not show it. */
  #describeEnd() {
    if (this.finish === "length") return "ended by the token limit";
    // The token that ends an answer has no text, but is counted.
    return this.summary.large_tokens > this.largeShown ? "ended by the large model" : "";
  }

  /** Return the document where the reply lacks something that is in it; null if it is not there. */
  async #findDocument() {
    if (!this.id || (this.isComplete && !this.settings.isOpen)) return null;
    for (let tries = 0; tries < DOCUMENT_TRIES; tries += 1) {
      if (!this.isComplete) await new Promise((resolve) => setTimeout(resolve, DOCUMENT_PAUSE_MS));
      try {
        return await this.endpoint.document(this.id);
      } catch (error) {
        if (this.isComplete || error.isUnreachable) break;
      }
    }
    return null;
  }

  async #save() {
    try {
      const data = JSON.stringify(await this.endpoint.document(this.id));
      const url = URL.createObjectURL(new Blob([data], { type: "application/json" }));
      element("a", { href: url, download: `${this.id}.json` }).click();
      setTimeout(() => URL.revokeObjectURL(url), 10_000);
    } catch (error) {
      this.#addProblem(error.status === 404 ? "The server no longer keeps this answer." : error.message);
    }
  }

  #addProblem(message) {
    const text = /[.!?]$/.test(message) ? message : `${message}.`;
    const sentence = text[0].toUpperCase() + text.slice(1);
    this.body.append(element("div", { class: "problem" }, element("p", {}, clean(sentence))));
  }
}

/** Return the figures that two answers are compared by. */
function renderCounts(summary) {
  const count = (value) => Number(value).toLocaleString("en-US");
  const share = (part) => (summary.tokens ? ` (${percent(part / summary.tokens)})` : "");
  const terms = [
    ["tokens", count(summary.tokens)],
    ["large model", count(summary.large_tokens) + share(summary.large_tokens)],
    ["escalated", count(summary.escalated) + share(summary.escalated)],
    ["calls", count(summary.calls)],
    ["uploaded", `${count(summary.uploaded_tokens)} tokens`],
    ["tokens/s", number(summary.tokens_per_s)],
    ["time", `${number(summary.total_s)} s`],
    ["cost", summary.cost_estimate ? number(summary.cost_estimate) : summary.cost_estimate === 0 ? "0" : "no prices"],
  ];
  return element("dl", { class: "counts" },
    ...terms.map(([term, value]) => element("div", {}, element("dt", {}, term), element("dd", {}, clean(value)))));
}
