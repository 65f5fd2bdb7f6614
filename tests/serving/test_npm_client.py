"""OpenAI's client for JavaScript, in Node. It is fetched from the registry, so this needs the network."""

import json
import shutil
import subprocess

import pytest

from conditional_detr import Detector
from helpers.browser import detection, png
from helpers.serving import drawn

SCRIPT = """
import { readFileSync } from "node:fs";
import OpenAI from "openai";
const baseURL = process.argv[2];
const url = "data:image/png;base64," + readFileSync("image.png").toString("base64");
const client = new OpenAI({ baseURL, apiKey: "-", maxRetries: 0 });
const messages = [{ role: "user", content: [{ type: "image_url", image_url: { url } }] }];
const body = { model: "shapes", messages, threshold: 0.1 };
const whole = await client.chat.completions.create(body);
const parts = [];
for await (const chunk of await client.chat.completions.create({ ...body, stream: true }))
  parts.push([chunk.choices[0].delta.content ?? null, chunk.choices[0].finish_reason]);
const input = [{ role: "user", content: [{ type: "input_image", image_url: url, detail: "auto" }] }];
const response = await client.responses.create({ model: "shapes", input, threshold: 0.1 });
const model = await client.models.retrieve("shapes");
const errors = [];
for (const wrong of [{ ...body, threshold: 2 }, { ...body, model: "a/b" }]) {
  try {
    await client.chat.completions.create(wrong);
  } catch (error) {
    errors.push([error.constructor.name, error.status, error.code, error.type, typeof error.requestID]);
  }
}
const text = whole.choices[0].message.content;
console.log(JSON.stringify({ text, parts, output: response.output_text, names: model.class_names, errors }));
"""


@pytest.mark.slow
def test_openais_client_for_javascript(service, tmp_path):
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    (tmp_path / "ask.mjs").write_text(SCRIPT)
    command = ["npm", "install", "--no-audit", "--no-fund", "--fetch-retries=0", "--prefix", str(tmp_path), "openai@6"]
    try:
        installed = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        pytest.skip("npm could not install openai within a minute")
    if installed.returncode:
        pytest.skip(f"npm could not install openai: {installed.stderr.strip()[:200]}")
    image = drawn(1)
    (tmp_path / "image.png").write_bytes(png(image))
    asked = ["node", "ask.mjs", f"{service.url}/v1"]
    got = json.loads(subprocess.check_output(asked, cwd=tmp_path, text=True, timeout=60))
    found = Detector.from_pretrained("shapes")(image, threshold=0.1)
    expected = [
        {"image": 0, "label_id": label, **detection(name, score, *box)}
        for (box, score, name), label in zip(found, found.labels.tolist(), strict=True)
    ]
    (part, going_on), stop = got["parts"]
    for text in (got["text"], part, got["output"]):
        assert json.loads(text)["detections"] == expected
    assert (going_on, stop) == (None, [None, "stop"])
    assert got["names"] == ["disc", "square", "triangle", "star", "ring", "cross"]
    assert got["errors"] == [
        ["BadRequestError", 400, "bad_option", "invalid_request_error", "string"],
        ["NotFoundError", 404, "model_not_found", "not_found_error", "string"],
    ]
