// Answers of /v1/chat/completions, as they come.

/** An error that the server gave, with its HTTP status (0 inside a stream). */
export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** JSON of a GET, or the pieces of a stream: yields each event's object until [DONE]. */
export async function* chunks(body, key, signal) {
  const headers = { "Content-Type": "application/json", ...authorization(key) };
  const response = await fetch("/v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
  if (!response.ok) throw await failure(response);
  const decoder = new TextDecoder();
  const reader = response.body.getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ServerError("The answer broke off.", 0);
    text += decoder.decode(value, { stream: true });
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data === "[DONE]") return;
      if (!data) continue; // a comment against silence
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(chunk.error.message, 0);
      yield chunk;
    }
  }
}

/** Names of models that write text. */
export async function models(key) {
  const response = await fetch("/v1/models", { headers: authorization(key) });
  if (!response.ok) throw await failure(response);
  return (await response.json()).data.filter((model) => model.task === "generate").map((model) => model.id);
}

function authorization(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function failure(response) {
  let message = `The server answered ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // a proxy's page, say
  }
  return new ServerError(message, response.status);
}
