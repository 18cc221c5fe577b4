"""The page at /docs: what the OpenAPI description says, as one HTML file that loads nothing from anywhere."""

import json
from collections.abc import Mapping
from html import escape
from typing import Any

_STYLE = ("body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
          "table{border-collapse:collapse}td,th{border:1px solid #8886;padding:.2rem .6rem;text-align:left}"
          "pre{background:#8882;padding:.8rem;overflow:auto}code{font-size:.95em}")


# endpoint -> the medium it is for, and a request of it
_EXAMPLES: dict[str, tuple[str, dict[str, Any]]] = {
    "/v1/completions": ("text", {"prompt": "", "max_tokens": 100, "seed": 1}),
    "/v1/images/generations": ("image", {"prompt": "", "n": 1, "seed": 1}),
    "/v1/music/generations": ("music", {"prompt": "", "n": 1, "seed": 1, "response_format": "mid"})}


def render(schema: dict[str, Any], models: Mapping[str, str], base: str, takes: Mapping[str, str]) -> str:
    """The page for an OpenAPI description, the models served with what each makes, and the server's address.

    `takes` says of some models what they can be asked for.
    """
    parts = ["<!doctype html><html lang=en><meta charset=utf-8><title>Handmill</title>",
             f"<style>{_STYLE}</style>",
             f"<h1>Handmill {escape(schema['info']['version'])}</h1>",
             f"<p>Models: {', '.join(f'<code>{escape(n)}</code> ({medium})' for n, medium in models.items())}. ",
             "The description for programs is <a href=/openapi.json>/openapi.json</a>.</p>"]
    for path, methods in schema["paths"].items():
        medium, request = _EXAMPLES.get(path, ("", {}))
        asked = next((name for name, makes in models.items() if makes == medium), None)
        if medium and asked is None:
            continue  # no model here could answer
        for method, operation in methods.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2>"
                         f"<p>{escape(operation['summary'])}.</p>")
            reference = _body(operation)
            if reference:
                parts.append(_example(base.rstrip("/") + path, {"model": asked} | request))
                parts += [f"<p><code>{escape(name)}</code> {escape(said)}." for name, said in takes.items()
                          if models[name] == medium]
                parts.append(_fields(schema["components"]["schemas"], reference))
    return "\n".join(parts)


def _body(operation: dict[str, Any]) -> str:
    """The name of the schema of an operation's JSON body, or nothing."""
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    reference: str = content.get("schema", {}).get("$ref", "")
    return reference.rpartition("/")[2]


def _example(address: str, request: dict[str, Any]) -> str:
    lines = f"curl -s {address} \\\n  -H 'Content-Type: application/json' \\\n  -d '{json.dumps(request)}'"
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
