"""The original's way to read a plan: a model behind an endpoint of OpenAI's form turns the text into JSON.

It is off unless the settings name an endpoint, because its answers can differ from one time to the next, and because
the text of the plan leaves this machine. Its answer is read as JSON and validated, and nothing else is done with it.
"""

import http.client
import json
import os
import re
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired
from urllib.parse import urlsplit

from typing_extensions import TypedDict

from data.deepplanning.plan import Plan, read_plan
from opd.errors import InputError, RunError, first_line
from opd.files import check, parse_json

PROMPT = Path(__file__).with_name("convert.txt")
ANSWER = re.compile(r"<JSON>(.*?)</JSON>", re.S | re.I)
ATTEMPTS, PAUSE, TIMEOUT = 30, 1.0, 300.0  # as in the original; seconds
MAX_TOKENS = 10240
MOST_BYTES = 4 * 1024 * 1024


class Endpoint(TypedDict):
    url: str  # up to /v1, for example http://127.0.0.1:8000/v1
    model: str
    key_variable: NotRequired[str | None]  # the environment variable with the key; left out where there is none


def read_endpoint(settings: Any) -> Endpoint:
    """The settings of an endpoint. Raises InputError."""
    endpoint: Endpoint = check(settings, Endpoint, "converter", "url, model and, if it needs a key, key_variable")
    if unknown := sorted(set(settings) - set(Endpoint.__annotations__)):
        raise InputError(f"converter: unknown setting {unknown[0]!r}, expected {', '.join(Endpoint.__annotations__)}.")
    if urlsplit(endpoint["url"]).scheme not in ("http", "https"):
        raise InputError(
            f"converter: url is {endpoint['url'][:80]!r}, expected one that begins with http:// or https://."
        )
    variable = endpoint.get("key_variable")
    if variable and not os.environ.get(variable):
        raise InputError(f"converter: the environment variable {variable} is not set. Set it to the endpoint's key.")
    return endpoint


def convert(text: str, endpoint: Endpoint, attempts: int = ATTEMPTS, pause: float = PAUSE) -> Plan:
    """The plan that the endpoint's model reads in a text. Raises RunError where no attempt brings a valid one."""
    fault = ""
    for attempt in range(attempts):
        if attempt:
            time.sleep(pause)
        try:
            return read_plan(parse_json(_json_in(_ask(text, endpoint)), "the answer", "the JSON of a plan"))
        except (OSError, http.client.HTTPException, InputError, KeyError, IndexError, TypeError, ValueError) as error:
            fault = first_line(error)
    raise RunError(
        f"the converter at {endpoint['url']} gave no plan in {attempts} attempts (the last time: {fault}). Check the "
        "endpoint, or leave the setting out, so that plans are read by fixed rules."
    )


def _json_in(answer: str) -> str:
    blocks = ANSWER.findall(answer)
    return blocks[-1] if blocks else answer


def _ask(text: str, endpoint: Endpoint) -> str:
    """The endpoint's answer to the plan's text."""
    body = {
        "model": endpoint["model"],
        "max_tokens": MAX_TOKENS,
        "messages": [
            {"role": "system", "content": PROMPT.read_text(encoding="utf-8")},
            {"role": "user", "content": text},
        ],
    }
    headers = {"Content-Type": "application/json"}
    if variable := endpoint.get("key_variable"):
        headers["Authorization"] = f"Bearer {os.environ[variable]}"
    url = f"{endpoint['url'].rstrip('/')}/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        answer: Mapping[str, Any] = parse_json(response.read(MOST_BYTES).decode(), "the answer", "a chat completion")
    return answer["choices"][0]["message"]["content"]
