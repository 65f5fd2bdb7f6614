// Code that repeats what the page does, for users to copy. It names the key's variable, never the key.

import { address, hasKey } from "./service.js";

const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;
const python = (text) => JSON.stringify(text); // a JSON string is a Python string

/** Return the text of one form: "curl", "python" or "json". */
export function snippet(form, { model, threshold, fileName, type, detections }) {
  if (form === "json") return JSON.stringify(detections, null, 2);
  if (form === "curl") {
    return [
      `curl ${shell(address("detect", { model, threshold }))}`,
      ...(hasKey() ? [`-H "Authorization: Bearer $API_KEY"`] : []),
      `-H ${shell(`Content-Type: ${type}`)}`,
      `--data-binary ${shell(`@${fileName}`)}`,
    ].join(" \\\n  ");
  }
  return `import base64
import os
from pathlib import Path

from openai import OpenAI

client = OpenAI(base_url=${python(address(""))}, api_key=os.environ.get("API_KEY", "none"))
image = base64.b64encode(Path(${python(fileName)}).read_bytes()).decode()
content = [{"type": "image_url", "image_url": {"url": ${python(`data:${type};base64,`)} + image}}]
answer = client.chat.completions.create(model=${python(model)}, messages=[{"role": "user", "content": content}])
print(answer.choices[0].message.content)
`;
}

/** Copy an element's text, or select it where the browser gives no access to the clipboard; the button says which. */
export async function copy(element, button) {
  try {
    await navigator.clipboard.writeText(element.textContent);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(element); // browsers give the clipboard only over https or on localhost
    button.textContent = "Selected: press Ctrl+C";
  }
  setTimeout(() => (button.textContent = "Copy"), 2000);
}
