"""Ask `pascalvl serve` with the `openai` package: ``python examples/openai_client.py PICTURE [QUESTION]``.

The server is at ``OPENAI_BASE_URL`` (http://127.0.0.1:8000/v1), its key in ``OPENAI_API_KEY``, if it has one.
"""

from __future__ import annotations

import base64
import json
import mimetypes
import os
import sys
from pathlib import Path
from typing import Any

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)
model = client.models.list().data[0].id
SHAPES = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green", "blue", "other"]}, "count": {"type": "integer", "maximum": 99}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}
CLOCK = {
    "type": "function",
    "function": {
        "name": "time_in",
        "description": "Tells the time in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Berlin", "Tokyo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def asked_about(picture: str, question: str) -> list[Any]:
    """Messages; a server of this machine alone takes pictures as they are, in ``data:`` URLs."""
    kind = mimetypes.guess_type(picture)[0] or "image/jpeg"
    url = f"data:{kind};base64,{base64.b64encode(Path(picture).read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def stream(messages: list[Any]) -> None:
    """Print an answer as it is written."""
    for chunk in client.chat.completions.create(model=model, messages=messages, temperature=0, stream=True):
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


def fill_in(messages: list[Any]) -> dict[str, Any]:
    """An answer that is JSON, valid by a schema."""
    form: Any = {"type": "json_schema", "json_schema": {"name": "shapes", "schema": SHAPES, "strict": True}}
    answer = client.chat.completions.create(model=model, messages=messages, response_format=form)
    return json.loads(answer.choices[0].message.content or "")


def use_a_tool(question: str) -> str | None:
    """An answer to which a function's result is given, that the model asked for."""
    messages: list[Any] = [{"role": "user", "content": question}]
    options: Any = {"model": model, "tools": [CLOCK]}
    message = client.chat.completions.create(messages=messages, tool_choice="required", **options).choices[0].message
    messages.append(message.model_dump(exclude_none=True))
    for call in message.tool_calls or ():
        print(call.function.name, call.function.arguments)
        messages.append({"role": "tool", "tool_call_id": call.id, "content": "12:30"})
    return client.chat.completions.create(messages=messages, max_tokens=100, **options).choices[0].message.content


def main(picture: str, question: str = "Describe the picture.") -> None:
    """One of each."""
    stream(asked_about(picture, question))
    print(fill_in(asked_about(picture, "Which colour is there most, and how often?")))
    print(use_a_tool("What time is it in Tokyo?"))


if __name__ == "__main__":
    main(*sys.argv[1:])
