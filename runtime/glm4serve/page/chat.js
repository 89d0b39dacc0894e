// The conversation: what was said, and what comes next.

import { ServerError, chunks, models } from "/page/stream.js";
import { AnswerTurn, resultTurn, userTurn } from "/page/view.js";

const find = (id) => document.getElementById(id);
const [log, prompt, send, stop, status, key, model] = ["log", "prompt", "send", "stop", "status", "key", "model"].map(find);
const main = document.querySelector("main");

/** {message, node}: a message as the server takes it, and where it is on the page. */
let turns = [];
let running = null; // the AbortController of an answer under way

function push(message, node) {
  turns.push({ message, node });
  log.append(node);
  main.scrollTop = main.scrollHeight;
}

/** Show more, and stay at the end where the reader is there. */
function keepLow(show) {
  const low = main.scrollHeight - main.scrollTop - main.clientHeight < 80;
  show();
  if (low) main.scrollTop = main.scrollHeight;
}

/** Forget the turns from the one at this index on. */
function cut(index) {
  running?.abort();
  for (const { node } of turns.splice(index)) node.remove();
}

function say(text) {
  const node = userTurn(text, (changed) => {
    cut(turns.findIndex((turn) => turn.node === node));
    say(changed);
    prompt.focus();
  });
  push({ role: "user", content: text }, node);
  answer();
}

function request() {
  const body = { model: model.value || undefined, stream: true, stream_options: { include_usage: true } };
  const instructions = find("system").value.trim();
  const system = instructions ? [{ role: "system", content: instructions }] : [];
  // Answers that failed, or were stopped before their first word, were none.
  const said = turns.map((turn) => turn.message).filter((message) => message.content || message.role !== "assistant" || message.tool_calls);
  body.messages = [...system, ...said];
  const [temperature, most, tools] = ["temperature", "most", "tools"].map((id) => find(id).value.trim());
  if (temperature) body.temperature = Number(temperature);
  if (most) body.max_tokens = Number(most);
  if (tools) body.tools = JSON.parse(tools);
  return body;
}

async function answer() {
  const controller = (running = new AbortController());
  const turn = new AnswerTurn(keepLow);
  let note = "";
  let first = 0;
  let last = 0;
  try {
    const body = request(); // without the turn to come
    push({ role: "assistant", content: "" }, turn.node);
    busy(true, "The model is answering.");
    for await (const chunk of chunks(body, key.value, controller.signal)) {
      const choice = chunk.choices[0];
      if (choice) {
        if (choice.delta.content || choice.delta.reasoning_content || choice.delta.tool_calls) {
          last = performance.now();
          first ||= last;
        }
        turn.add(choice.delta);
        if (choice.finish_reason === "length") note = "cut: no more tokens; ";
      }
      if (chunk.usage) {
        const tokens = chunk.usage.completion_tokens;
        const rate = last > first ? `, ${(((tokens - 1) * 1000) / (last - first)).toFixed(1)} tok/s` : "";
        note += `${tokens} ${tokens === 1 ? "token" : "tokens"}${rate}`;
      }
    }
  } catch (error) {
    if (!turn.node.isConnected && !controller.signal.aborted) push({ role: "assistant", content: "" }, turn.node);
    if (controller.signal.aborted) note = "stopped";
    else fail(turn, error);
  }
  turn.end(note);
  const entry = turns.find(({ node }) => node === turn.node);
  if (!entry) return; // it was cut off meanwhile
  entry.message.content = turn.content;
  if (turn.thought) entry.message.reasoning_content = turn.thought;
  if (turn.calls.length) entry.message.tool_calls = turn.calls;
  turn.offer("Regenerate", () => {
    cut(turns.indexOf(entry));
    answer();
    prompt.focus();
  });
  busy(false, turn.content || note || "No answer.");
  if (turn.calls.length && note !== "stopped") turn.askResults((texts) => give(entry, texts));
}

/** Results stand behind their calls: what was said since, without waiting for them, goes. */
function give(entry, texts) {
  cut(turns.indexOf(entry) + 1);
  entry.message.tool_calls.forEach((call, index) => {
    push({ role: "tool", tool_call_id: call.id, content: texts[index] }, resultTurn(call.function.name, texts[index]));
  });
  prompt.focus();
  answer();
}

function fail(turn, error) {
  const known = error instanceof ServerError || error instanceof SyntaxError;
  turn.fail(error instanceof SyntaxError ? `Tools: no JSON: ${error.message}` : known ? error.message : "The server can't be reached.");
  if (error.status === 401) askKey();
}

function askKey() {
  find("settings").open = true;
  key.focus();
}

function busy(now, told) {
  const lost = document.activeElement === (now ? send : stop); // what is hidden can't have the focus
  send.hidden = now;
  stop.hidden = !now;
  if (lost) (now ? stop : prompt).focus();
  if (!now) running = null;
  status.textContent = told;
}

async function listModels() {
  try {
    const names = await models(key.value);
    model.replaceChildren(...names.map((name) => new Option(name, name)));
    status.textContent = "";
  } catch (error) {
    status.textContent = error.message;
    if (error.status === 401 && document.activeElement !== key) askKey();
  }
}

function grow() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
}

find("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = prompt.value;
  if (running || !text.trim()) return;
  prompt.value = "";
  grow();
  say(text);
});
prompt.addEventListener("input", grow);
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    find("composer").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing) running?.abort();
});
stop.addEventListener("click", () => {
  running?.abort();
  prompt.focus();
});
find("new").addEventListener("click", () => {
  cut(0);
  busy(false, "A new conversation.");
  prompt.focus();
});
key.value = sessionStorage.getItem("key") ?? "";
key.addEventListener("change", () => {
  sessionStorage.setItem("key", key.value);
  listModels();
});
prompt.focus();
listModels();
