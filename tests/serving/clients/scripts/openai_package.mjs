// Uses an endpoint with OpenAI's package for Node; prints what it got as JSON.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const asked = {
  model: "mlxroute",
  messages: [{ role: "user", content: "Count to five." }],
  max_tokens: 8,
};

const models = [];
for await (const model of client.models.list()) models.push(model.id);
const whole = await client.chat.completions.create(asked);

let streamed = "";
let usage = null;
const options = { stream: true, stream_options: { include_usage: true } };
for await (const chunk of await client.chat.completions.create({ ...asked, ...options })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
const read = await client.chat.completions.stream(asked).finalContent();

const long = await client.chat.completions.create({ ...asked, max_tokens: 400, stream: true });
let id;
for await (const chunk of long) {
  id = chunk.id;
  if (chunk.choices[0]?.delta?.content) {
    long.controller.abort();
    break;
  }
}
let document;
for (let tries = 0; tries < 100 && !document; tries++) {
  document = await client.get(`/mlxroute/answers/${id}`).catch(() => null);
  if (!document) await new Promise((resolve) => setTimeout(resolve, 100));
}

const error = await client.chat.completions.create({ ...asked, n: 2 }).catch((error) => error);
console.log(
  JSON.stringify({
    models,
    text: whole.choices[0].message.content,
    streamed,
    completion_tokens: usage.completion_tokens,
    read,
    cancelled: document?.summary.finish_reason,
    refused: [error.constructor.name, error.param],
  }),
);
