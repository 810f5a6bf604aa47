// The page: settings, turns of a conversation, and what the server says of itself.
//
// It stands in one module with token_view.js, endpoint_client.js and answer_panel.js, in this order.

const RETRY_MS = 2500;
const AGAIN = "This page tries again by itself.";
const MODES = {
  "": "What the small model does during a call.",
  auto: "Chooses one of the others by measurement.",
  wait: "Waits for each reply.",
  overlap: "Goes on with its own token during a call.",
  hedge: "Goes on with its likeliest tokens at the same time.",
};

const byId = (id) => document.getElementById(id);

/** The settings of one answer, as they were when it began. */
class AnswerSettings {
  constructor({ budget, mode, isLocal, hasLarge }) {
    Object.assign(this, { budget, mode, isLocal, hasLarge });
  }

  /** Whether the reply alone does not say which budget applied. */
  get isOpen() {
    return this.hasLarge && !this.isLocal && this.budget === null;
  }

  /** Return the fields of the request. */
  fields() {
    if (this.isLocal) return { local_only: true };
    const budget = this.budget === null ? {} : { budget: this.budget / 100 };
    return { ...budget, ...(this.mode ? { mode: this.mode } : {}) };
  }

  /** Return the settings in words; `answer` is the document, which says what the server chose. */
  describe(answer = null) {
    if (this.isLocal || !this.hasLarge) return "Small model only";
    const parts = [];
    const router = answer?.router;
    if (this.budget !== null) parts.push(`Budget ${this.budget} %`);
    else if (!router) parts.push("Server's budget");
    else if (router.budget === null) parts.push(`Above ${router.name} ${number(router.threshold)}`);
    else parts.push(`Budget ${number(100 * router.budget)} %`);
    if (this.mode) parts.push(`mode ${this.mode}`);
    return parts.join(", ");
  }
}

class ChatPage {
  #endpoint = new Endpoint();
  #turns = [];
  #kept = null;
  #controller = null;
  #hasLarge = true;
  #isBudgetSet = false;
  #isReady = false;
  #retry = null;

  constructor() {
    byId("settings").open = !matchMedia("(max-width: 50rem)").matches;
    byId("ask").addEventListener("submit", (event) => this.#onAsk(event));
    byId("stop").addEventListener("click", () => this.#controller?.abort());
    byId("clear").addEventListener("click", () => this.#clear());
    byId("key-form").addEventListener("submit", (event) => this.#onKey(event));
    byId("question").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      byId("ask").requestSubmit();
    });
    // Browsers that know field-sizing let the field grow with its text.
    if (!CSS.supports("field-sizing", "content")) byId("question").rows = 3;
    byId("budget").addEventListener("input", () => this.#setBudget(true));
    byId("budget-reset").addEventListener("click", () => {
      this.#setBudget(false);
      byId("budget").focus();
    });
    for (const id of ["mode", "local-only"]) byId(id).addEventListener("change", () => this.#showSettings());
    byId("heat").addEventListener("change", () => this.#showHeat());
    this.#showSettings();
    this.#connect();
  }

  /** Ask the server for its models; where that fails, say why, and ask again. */
  async #connect() {
    clearTimeout(this.#retry);
    try {
      const models = await this.#endpoint.models();
      this.#hasLarge = models.some((model) => model.id.endsWith(":large"));
      byId("models").textContent = clean(models[0].id.replace("+", " + "));
      this.#isReady = true;
      this.#say("");
      if (byId("key-form").contains(document.activeElement)) byId("question").focus();
      byId("key-form").hidden = true;
      this.#showSettings();
    } catch (error) {
      this.#isReady = false;
      if (error.status === 401) this.#askForKey();
      else this.#waitForServer(error);
    }
    this.#showRunning();
  }

  #waitForServer(error) {
    const reason = error.isUnreachable ? "No connection to the server." : error.message;
    this.#say(error.status === 503 ? "The models are being loaded." : `${reason} ${AGAIN}`);
    this.#retry = setTimeout(() => this.#connect(), RETRY_MS);
  }

  #askForKey() {
    this.#say(this.#endpoint.key ? "The server does not accept this key." : "");
    byId("key-form").hidden = false;
    byId("key").focus();
  }

  #onKey(event) {
    event.preventDefault();
    const key = byId("key").value.trim();
    if (!/^[\x21-\x7e]+$/.test(key)) {
      this.#say("A key has letters, digits and signs of ASCII, and no blanks.");
      return;
    }
    byId("key").value = "";
    this.#endpoint.key = key;
    this.#connect();
  }

  async #onAsk(event) {
    event.preventDefault();
    const question = byId("question").value;
    if (!question.trim() || this.#controller || !this.#isReady) return;
    byId("question").value = "";
    byId("intro").hidden = true;
    const turn = this.#addTurn(question);
    await this.#answer(turn);
  }

  #addTurn(question) {
    const number = this.#turns.length + 1;
    const turn = { question, panels: [], used: null };
    turn.answers = element("div", { class: "answers" });
    turn.again = element("button", { type: "button", class: "quiet again", hidden: "" });
    turn.again.addEventListener("click", () => this.#answer(turn));
    turn.node = element(
      "section", { class: "turn", "aria-label": `Turn ${number}` },
      element("h3", {}, element("span", { class: "hidden" }, "You: "), clean(question)), turn.answers, turn.again,
    );
    this.#turns.push(turn);
    byId("turns").append(turn.node);
    return turn;
  }

  /** Write an answer to a turn, beside those that it has. */
  async #answer(turn) {
    const panel = new AnswerPanel(this.#endpoint, this.#settings(), {
      details: byId("details"),
      onShow: (chosen, isKept) => this.#show(chosen, isKept),
      onUse: (chosen) => this.#use(turn, chosen),
    });
    // An answer that failed before its first token gives way to the next one.
    for (const empty of turn.panels.filter((other) => !other.text)) this.#remove(turn, empty);
    turn.panels.push(panel);
    turn.answers.append(panel.node);
    turn.node.classList.toggle("several", turn.panels.length > 1);
    this.#showHeat();
    this.#controller = new AbortController();
    this.#showRunning();
    const following = this.#followEnd();
    await panel.run(this.#messagesFor(turn), this.#controller.signal);
    following.disconnect();
    this.#controller = null;
    if (panel.text) this.#use(turn, panel);
    this.#announce(panel);
    this.#showRunning();
    if (panel.problem?.isUnreachable || panel.problem?.status === 401) this.#connect();
  }

  /** Return the conversation that a turn's answer follows. */
  #messagesFor(turn) {
    const earlier = this.#turns.slice(0, this.#turns.indexOf(turn)).filter((other) => other.used);
    return [
      ...earlier.flatMap((other) => [
        { role: "user", content: other.question },
        { role: "assistant", content: other.used.text },
      ]),
      { role: "user", content: turn.question },
    ];
  }

  /** Keep the end of the conversation in sight, unless the reader has scrolled away from it. */
  #followEnd() {
    const box = byId("turns");
    let isAtEnd = true;
    const onScroll = () => {
      isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
    };
    box.addEventListener("scroll", onScroll);
    const observer = new ResizeObserver(() => {
      if (isAtEnd) box.scrollTop = box.scrollHeight;
    });
    for (const turn of this.#turns) observer.observe(turn.node);
    return {
      disconnect() {
        // The figures come after the last token.
        setTimeout(() => {
          observer.disconnect();
          box.removeEventListener("scroll", onScroll);
        }, 100);
      },
    };
  }

  /** Go on from one of the answers of a turn. */
  #use(turn, panel) {
    turn.used = panel;
    for (const other of turn.panels) {
      other.use.checked = other === panel;
      other.node.toggleAttribute("data-used", other === panel);
    }
    this.#showRunning();
  }

  #remove(turn, panel) {
    turn.panels = turn.panels.filter((other) => other !== panel);
    if (this.#kept === panel) this.#kept = null;
    panel.remove();
    this.#show(null, false);
  }

  /** Show the choices at the tokens of one answer; null for the one that has the chosen token. */
  #show(panel, isKept) {
    if (isKept) {
      if (this.#kept !== panel) this.#kept?.view.select(null);
      this.#kept = panel;
    }
    const shown = panel ?? this.#kept;
    for (const other of this.#turns.flatMap((turn) => turn.panels)) other.detail.hidden = other !== shown;
    byId("no-token").hidden = Boolean(shown);
  }

  #clear() {
    for (const turn of this.#turns) {
      for (const panel of turn.panels) this.#remove(turn, panel);
      turn.node.remove();
    }
    this.#turns = [];
    byId("intro").hidden = false;
    this.#showRunning();
    byId("question").focus();
  }

  #settings() {
    return new AnswerSettings({
      budget: this.#isBudgetSet ? Number(byId("budget").value) : null,
      mode: byId("mode").value,
      isLocal: byId("local-only").checked,
      hasLarge: this.#hasLarge,
    });
  }

  #setBudget(on) {
    this.#isBudgetSet = on;
    this.#showSettings();
  }

  #showSettings() {
    const settings = this.#settings();
    const isRouted = this.#hasLarge && !settings.isLocal;
    const text = settings.budget === null ? "server's setting" : `${settings.budget} %`;
    byId("budget-text").textContent = text;
    byId("budget").setAttribute("aria-valuetext", text);
    byId("budget-field").toggleAttribute("data-unset", settings.budget === null || !isRouted);
    byId("budget-reset").hidden = settings.budget === null;
    byId("mode-hint").textContent = MODES[settings.mode];
    byId("settings-line").textContent = settings.describe();
    byId("budget").disabled = byId("mode").disabled = !isRouted;
    byId("local-only").disabled = !this.#hasLarge;
    for (const { again, panels } of this.#turns) {
      const verb = panels.some((panel) => panel.text) ? "Answer" : "Try";
      again.textContent = `${verb} again: ${settings.describe().replace(/^[A-Z]/, (letter) => letter.toLowerCase())}`;
    }
  }

  #showHeat() {
    for (const { panels } of this.#turns) {
      for (const panel of panels) panel.view.setHeat(byId("heat").checked);
    }
  }

  /** Show what can be done now. */
  #showRunning() {
    const isRunning = this.#controller !== null;
    const focused = document.activeElement;
    byId("send").hidden = isRunning;
    byId("stop").hidden = !isRunning;
    byId("send").disabled = !this.#isReady;
    byId("clear").disabled = isRunning || !this.#turns.length;
    for (const turn of this.#turns) {
      const isLast = turn === this.#turns.at(-1);
      turn.again.hidden = isRunning || !isLast;
      turn.again.disabled = !this.#isReady;
      for (const panel of turn.panels) {
        panel.useLabel.hidden = !(turn.panels.length > 1 && panel.text);
        panel.use.disabled = isRunning || !isLast;
      }
    }
    // What is hidden loses the focus.
    if (focused?.closest("[hidden]")) byId(isRunning ? "stop" : "question").focus();
    this.#showSettings();
  }

  #announce(panel) {
    const end = panel.problem ? `The answer failed: ${panel.problem.message}` : panel.isComplete ? "Answer" : "Stopped";
    byId("status").textContent = clean(`${end}. ${panel.text}`);
  }

  #say(text) {
    if (byId("notice").textContent !== text) byId("notice").textContent = text;
    byId("notice").hidden = !text;
  }
}

installStyle();
new ChatPage();
