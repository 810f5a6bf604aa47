// The endpoint as the page uses it: models, streamed answers, and documents of answers.

/** What went wrong, in words for the reader of the page. */
class EndpointError extends Error {
  constructor(message, { status = 0, isUnreachable = false } = {}) {
    super(message);
    this.status = status;
    this.isUnreachable = isUnreachable;
  }
}

const UNREACHABLE = "The server does not answer. It may have been stopped, or the connection is lost.";
const BROKEN_OFF = "The connection ended before the answer was complete.";

class Endpoint {
  constructor() {
    // The key is kept here only: not in storage, not in the address.
    this.key = "";
  }

  /** Return the entries of the models. */
  async models() {
    return (await (await this.#request("v1/models")).json()).data;
  }

  /** Return the document of an answer. */
  async document(id) {
    return (await this.#request(`v1/mlxroute/answers/${encodeURIComponent(id)}`)).json();
  }

  /** Begin an answer; return its id and its chunks. */
  async start(body, signal) {
    const response = await this.#request("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal,
    });
    return { id: response.headers.get("x-mlxroute-id"), chunks: readChunks(response.body) };
  }

  async #request(path, { headers = {}, ...options } = {}) {
    const authorization = this.key ? { Authorization: `Bearer ${this.key}` } : {};
    let response;
    try {
      response = await fetch(path, { ...options, headers: { ...headers, ...authorization }, cache: "no-store" });
    } catch (error) {
      throw error.name === "AbortError" ? error : new EndpointError(UNREACHABLE, { isUnreachable: true });
    }
    if (!response.ok) throw await describeRefusal(response);
    return response;
  }
}

/** Return the error of a reply in words. */
async function describeRefusal(response) {
  const { status } = response;
  const body = await response.json().catch(() => null);
  const reason = body?.error?.message ?? `The server replied with status ${status}.`;
  const wait = response.headers.get("Retry-After");
  const messages = {
    401: "The key is missing or wrong.",
    429: `The server is busy with other answers. Try again${wait ? ` in ${wait} s` : " soon"}.`,
  };
  return new EndpointError(messages[status] ?? reason, { status });
}

/** Yield the JSON values of a stream of events. Raises EndpointError if it ends before its end. */
async function* readChunks(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        if (!block.startsWith("data: ")) continue;
        if (block === "data: [DONE]") return;
        const chunk = JSON.parse(block.slice("data: ".length));
        if (chunk.error) throw new EndpointError(chunk.error.message);
        yield chunk;
      }
    }
  } catch (error) {
    if (error instanceof EndpointError || error.name === "AbortError") throw error;
    throw new EndpointError(BROKEN_OFF, { isUnreachable: true });
  } finally {
    reader.cancel().catch(() => {});
  }
  throw new EndpointError(BROKEN_OFF, { isUnreachable: true });
}
