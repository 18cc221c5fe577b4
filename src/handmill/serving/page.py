"""The page at /docs: what the OpenAPI description says, as one HTML file that loads nothing from anywhere."""

import json
from collections.abc import Sequence
from html import escape
from typing import Any

_STYLE = ("body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
          "table{border-collapse:collapse}td,th{border:1px solid #8886;padding:.2rem .6rem;text-align:left}"
          "pre{background:#8882;padding:.8rem;overflow:auto}code{font-size:.95em}")


def render(schema: dict[str, Any], models: Sequence[str], base: str) -> str:
    """The page for an OpenAPI description, the names of the models served, and the server's address."""
    parts = ["<!doctype html><html lang=en><meta charset=utf-8><title>Handmill</title>",
             f"<style>{_STYLE}</style>",
             f"<h1>Handmill {escape(schema['info']['version'])}</h1>",
             f"<p>Models: {', '.join(f'<code>{escape(name)}</code>' for name in models)}. ",
             "The description for programs is <a href=/openapi.json>/openapi.json</a>.</p>"]
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2>"
                         f"<p>{escape(operation['summary'])}.</p>")
            reference = _body(operation)
            if reference:
                parts.append(_example(base.rstrip("/") + path, models[0]))
                parts.append(_fields(schema["components"]["schemas"], reference))
    return "\n".join(parts)


def _body(operation: dict[str, Any]) -> str:
    """The name of the schema of an operation's JSON body, or nothing."""
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    reference: str = content.get("schema", {}).get("$ref", "")
    return reference.rpartition("/")[2]


def _example(address: str, model: str) -> str:
    body = json.dumps({"model": model, "prompt": "", "max_tokens": 100, "seed": 1})
    lines = f"curl -s {address} \\\n  -H 'Content-Type: application/json' \\\n  -d '{body}'"
    return f"<pre>{escape(lines)}</pre>"


def _fields(schemas: dict[str, Any], name: str) -> str:
    """A table of the fields of a schema."""
    required = schemas[name].get("required", [])
    rows = []
    for field, about in schemas[name]["properties"].items():
        default = "required" if field in required else json.dumps(about.get("default"))
        cells = (f"<code>{escape(field)}</code>", escape(_kind(about)), f"<code>{escape(default)}</code>",
                 escape(about.get("description", "")))
        rows.append("".join(f"<td>{cell}" for cell in cells))
    title = f"<p>{escape(schemas[name].get('description', ''))}</p>"
    return f"{title}<table><tr><th>field<th>type<th>default<th>{''.join(f'<tr>{row}' for row in rows)}</table>"


def _kind(about: dict[str, Any]) -> str:
    """The type of a field in words: "number or null"."""
    if "anyOf" in about:
        return " or ".join(_kind(option) for option in about["anyOf"])
    if about.get("type") == "array":
        return f"list of {_kind(about['items'])}"
    return str(about.get("type") or about.get("$ref", "").rpartition("/")[2])
