#!/usr/bin/env python3
"""Ask a text generation server from the command line: `python tools/text_generation_cli.py HOST:PORT`."""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

#: Stands for a body that cannot be read.
NOT_JSON = {"message": "the answer is not JSON"}


def put(url: str, request: dict[str, Any]) -> tuple[int, Any]:
    """Status and decoded body of the answer to a request; OSError if there is none."""
    return send(url, request, "PUT")


def send(url: str, request: dict[str, Any], method: str) -> tuple[int, Any]:
    """The same with any method."""
    message = urllib.request.Request(
        url,
        data=json.dumps(request).encode(),
        headers={"Content-Type": "application/json; charset=UTF-8"},
        method=method,
    )
    try:
        with urllib.request.urlopen(message) as answer:
            status, body = answer.status, answer.read()
    except urllib.error.HTTPError as refusal:
        status, body = refusal.code, refusal.read()
    try:
        return status, json.loads(body)
    except ValueError:
        return status, NOT_JSON


def ask_number() -> int:
    """A whole number, asked for until one is given."""
    while True:
        typed = input("Enter number of tokens to generate: ")
        try:
            return int(typed)
        except ValueError:
            print(f"{typed!r} is not a number")


def show(status: int, body: Any) -> None:
    """Print an answer, or what was said instead of one, which may be a bare string."""
    if status == 200 and isinstance(body, dict) and "text" in body:
        print(f"Megatron Response: \n{body['text'][0]}")
    else:
        reason = body.get("message", body) if isinstance(body, dict) else body
        print(f"Error {status}: {reason}")


def main(argv: Sequence[str]) -> None:
    """Ask and print until the input ends."""
    if len(argv) != 1:
        sys.exit("usage: python tools/text_generation_cli.py HOST:PORT")
    url = f"http://{argv[0]}/api"
    try:
        while True:
            prompt = input("Enter prompt: ")
            number = ask_number()
            try:
                show(*put(url, {"prompts": [prompt], "tokens_to_generate": number}))
            except OSError as error:
                print(f"Error: {url} does not answer: {error}")
    except (EOFError, KeyboardInterrupt):
        print()


if __name__ == "__main__":
    main(sys.argv[1:])
