"""The page /docs: the server's OpenAPI description as plain HTML without scripts, which needs no other host."""

import json
from html import escape
from typing import Any

POLICY = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse }} td, th {{ border: 1px solid #bbb; padding: .3rem .6rem; text-align: left }}
code {{ background: #8882 }} h3 {{ margin-bottom: .3rem }} section {{ margin-bottom: 2rem }}
@media (prefers-color-scheme: dark) {{ body {{ background: #111; color: #ddd }} a {{ color: #8bf }} }}
</style>
<h1>{title}</h1>
<p>{text} The same as JSON: <a href="openapi.json">openapi.json</a>.</p>
{body}
</html>
"""


def render(schema: dict[str, Any]) -> str:
    """The page of an OpenAPI schema: its routes, and the fields of all bodies."""
    parts = []
    for path, methods in schema["paths"].items():
        for method, route in methods.items():
            parts.append(f"<h3><code>{method.upper()} {escape(path)}</code></h3><p>{escape(route['description'])}</p>")
    for name, model in schema["components"]["schemas"].items():
        rows = "".join(_row(field, content, model) for field, content in model.get("properties", {}).items())
        head = "<tr><th>field<th>type<th>default<th>meaning</tr>"
        parts.append(f"<section><h3 id='{name}'>{name}</h3><p>{escape(model['description'])}</p>")
        parts.append(f"<table>{head}{rows}</table></section>")
    info = schema["info"]
    return _PAGE.format(title=escape(info["title"]), text=escape(info["description"]), body="\n".join(parts))


def _row(name: str, field: dict[str, Any], model: dict[str, Any]) -> str:
    default = "" if field.get("default") is None else f"<code>{escape(json.dumps(field['default']))}</code>"
    texts = [_type(field), "required" if name in model.get("required", ()) else default]
    return f"<tr><td><code>{name}</code><td>{'<td>'.join(texts)}<td>{escape(field.get('description', ''))}</tr>"


def _type(field: dict[str, Any]) -> str:
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"<a href='#{name}'>{name}</a>"
    if kinds := [kind for kind in field.get("anyOf", ()) if kind.get("type") != "null"]:
        return " or ".join(map(_type, kinds))
    if "enum" in field or "const" in field:
        return " or ".join(escape(repr(value)) for value in field.get("enum", [field.get("const")]))
    kind = f"array of {_type(field['items'])}" if "items" in field else field.get("type", "any")
    low, high = field.get("minimum"), field.get("maximum")
    return kind + (f", {low} to {high}" if high is not None else f", at least {low}" if low is not None else "")
