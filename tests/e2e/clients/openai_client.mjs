// The openai client for Node: chat, streams, tools, structured output, responses. Run with the server's address.
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const common = { model: "demo", messages, temperature: 0, max_tokens: 80 };
const expected = "The capital of France is Paris.";

const whole = await client.chat.completions.create(common);
assert.equal(whole.choices[0].message.content, expected);

let text = "";
for await (const chunk of await client.chat.completions.create({ ...common, stream: true })) {
  text += chunk.choices[0]?.delta?.content ?? "";
}
assert.equal(text, expected);

const parameters = {
  type: "object",
  properties: { city: { type: "string", maxLength: 12 } },
  required: ["city"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "weather", parameters, strict: true } }];
const stream = client.chat.completions.stream({ ...common, tools, tool_choice: "required" });
const final = await stream.finalChatCompletion();
assert.equal(final.choices[0].finish_reason, "tool_calls");
assert.deepEqual(Object.keys(JSON.parse(final.choices[0].message.tool_calls[0].function.arguments)), ["city"]);

const structured = await client.chat.completions.create({
  ...common,
  response_format: { type: "json_schema", json_schema: { name: "city", schema: parameters, strict: true } },
});
assert.deepEqual(Object.keys(JSON.parse(structured.choices[0].message.content)), ["city"]);

const response = await client.responses.create({ model: "demo", input: messages[0].content, temperature: 0 });
assert.equal(response.output_text, expected);
const types = [];
for await (const event of await client.responses.create({ model: "demo", input: messages[0].content, stream: true, temperature: 0 })) {
  types.push(event.type);
}
assert.equal(types[0], "response.created");
assert.equal(types.at(-1), "response.completed");

await assert.rejects(client.chat.completions.create({ ...common, model: "gpt-4" }), { status: 404 });
console.log("ok");
