// The calls of the service. The key is sent in a header only, never in a URL.

const STORED = "conditional-detr-key";
let key = sessionStorage.getItem(STORED) ?? "";

/** An answer that is not a success; `status` is 0 where no answer came. */
export class ServiceError extends Error {
  constructor(message, status, retryAfter = 0) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter; // in seconds; 0: the service named no time
  }
}

/** Use a key from now on, and keep it for this tab where the user chose so. */
export function setKey(value, keep) {
  key = value;
  if (keep) sessionStorage.setItem(STORED, value);
  else sessionStorage.removeItem(STORED);
}

export const hasKey = () => key !== "";

/** Return the address of a call, also where the service is behind a path prefix. */
export function address(path, query = {}) {
  const url = new URL(`v1/${path}`, document.baseURI);
  for (const [name, value] of Object.entries(query)) url.searchParams.set(name, value);
  return url.href;
}

async function call(url, options) {
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(url, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError("The service did not answer. Check the connection and whether it runs.", 0);
  }
  if (!response.ok) throw await toError(response);
  return response;
}

async function toError(response) {
  const retryAfter = Number(response.headers.get("retry-after")) || 0;
  const answer = await response.json().catch(() => null);
  const text = answer?.error?.message ?? response.statusText;
  const advice = retryAfter ? ` Try again in ${retryAfter} s.` : "";
  return new ServiceError(`${text || "The request failed."} (HTTP ${response.status})${advice}`, response.status, retryAfter);
}

function post(path, query, blob, signal) {
  const headers = { "Content-Type": blob.type || "application/octet-stream" };
  return call(address(path, query), { method: "POST", body: blob, headers, signal });
}

export async function listModels() {
  return (await (await call(address("models"), {})).json()).data;
}

export async function detect(query, blob, signal) {
  return (await post("detect", query, blob, signal)).json();
}

export async function drawAttention(query, blob, signal) {
  return (await post("attention", query, blob, signal)).blob();
}
