// Turns of the conversation on the page.

import { element, markdown } from "/page/markdown.js";

/** What the user says. onEdit(text): said otherwise; what follows is to be answered anew. */
export function userTurn(text, onEdit) {
  const words = element("div", { class: "words" }, text);
  const edit = button("Edit");
  const turn = element("li", { class: "user" }, who("You"), words, element("div", { class: "actions" }, edit));
  edit.addEventListener("click", () => {
    const id = `edit-${crypto.getRandomValues(new Uint32Array(1))[0]}`;
    const field = element("textarea", { id, rows: String(Math.min(12, text.split("\n").length + 1)) });
    field.value = text;
    const form = element("form", {}, element("label", { for: id, class: "hidden" }, "Your message"), field);
    const cancel = button("Cancel");
    const save = element("button", { type: "submit" }, "Send again");
    form.append(element("div", { class: "actions" }, save, cancel));
    const before = [...turn.childNodes];
    const back = () => {
      turn.replaceChildren(...before);
      edit.focus();
    };
    cancel.addEventListener("click", back);
    form.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || event.isComposing) return;
      event.stopPropagation(); // an answer under way goes on
      back();
    });
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (field.value.trim()) onEdit(field.value);
    });
    turn.replaceChildren(who("You"), form);
    field.focus();
  });
  return turn;
}

/** What a tool gave. */
export function resultTurn(name, text) {
  const code = element("pre", { tabindex: "0" }, element("code", {}, text));
  return element("li", { class: "user" }, who(`Result of ${name}`), code);
}

/** The model's turn, shown while it grows: at most once a frame, and in a fifth of the time however long it is. */
export class AnswerTurn {
  /** around(show): calls show, and does what belongs to it. */
  constructor(around) {
    this.around = around;
    this.rest = 0; // when it may be shown again
    this.thought = this.content = "";
    this.calls = [];
    this.words = element("div", { class: "words busy" });
    this.actions = element("div", { class: "actions" });
    this.node = element("li", { class: "assistant" }, who("Assistant"), this.words, this.actions);
    this.timer = 0;
  }

  /** Add a chunk's delta. */
  add(delta) {
    this.thought += delta.reasoning_content ?? "";
    this.content += delta.content ?? "";
    for (const call of delta.tool_calls ?? []) {
      this.calls.push({ id: call.id, type: "function", function: call.function });
      this.words.before(callNode(call.function));
    }
    const draw = () => requestAnimationFrame(() => this.timer && this.around(() => this.show()));
    this.timer ||= setTimeout(draw, Math.max(0, this.rest - performance.now()));
  }

  show() {
    clearTimeout(this.timer);
    this.timer = 0;
    const began = performance.now();
    if (this.thought) {
      if (!this.thoughtNode) {
        this.summary = element("summary", {}, "Thinking…");
        this.thoughtWords = element("div", { class: "words" });
        this.thoughtNode = element("details", { class: "thought" }, this.summary, this.thoughtWords);
        this.words.before(this.thoughtNode);
      }
      this.thoughtWords.textContent = this.thought;
      if (this.content || this.calls.length) this.summary.textContent = "Thought";
    }
    this.words.replaceChildren(markdown(this.content));
    const now = performance.now();
    this.rest = now + 4 * (now - began);
  }

  /** It is whole, or as whole as it will be. note: a line about it. */
  end(note) {
    this.around(() => this.show());
    if (this.summary) this.summary.textContent = "Thought";
    this.words.classList.remove("busy");
    this.actions.replaceChildren(element("span", { class: "note" }, note));
    if (!navigator.clipboard) return; // browsers have it over https and on this machine alone
    const copy = button("Copy");
    const told = (text) => () => (copy.textContent = text);
    copy.addEventListener("click", () => navigator.clipboard.writeText(this.content).then(told("Copied"), told("Not copied")));
    this.actions.prepend(copy);
  }

  fail(message) {
    this.actions.before(element("p", { class: "error", role: "alert" }, message));
  }

  offer(name, action) {
    const offered = button(name);
    offered.addEventListener("click", action);
    this.actions.prepend(offered);
  }

  /** Ask for what its calls give; onResults(texts), in their order. */
  askResults(onResults) {
    const fields = this.calls.map((call, index) => {
      const id = `result-${call.id ?? index}`;
      const field = element("textarea", { id, rows: "2" });
      return { field, label: element("label", { for: id }, `What ${call.function.name} gave`) };
    });
    const form = element("form", {}, ...fields.flatMap(({ label, field }) => [label, field]));
    form.append(element("button", { type: "submit" }, "Send results"));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      form.remove();
      onResults(fields.map(({ field }) => field.value));
    });
    this.actions.before(form);
    fields[0].field.focus();
  }
}

function callNode(call) {
  let shown = call.arguments;
  try {
    shown = JSON.stringify(JSON.parse(call.arguments), null, 2);
  } catch {
    // as it is
  }
  const code = element("pre", { tabindex: "0" }, element("code", {}, shown));
  return element("details", { class: "call", open: "" }, element("summary", {}, `Calls ${call.name}`), code);
}

function who(name) {
  return element("h2", { class: "who" }, name);
}

function button(name) {
  return element("button", { type: "button" }, name);
}
