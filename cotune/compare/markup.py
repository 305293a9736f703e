"""HTML and SVG as nested calls, safe by construction: a plain string is always text, never markup.

Only `tag` makes markup, and it cleans and escapes every string it is given, content and attribute alike. Knows nothing
of what is drawn or told with it.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from typing import Any

from cotune.compare.escape import clean

_EMPTY = ("meta", "br", "input", "hr")


class Html(str):
    """Markup that `tag` made, or that stands in cotune's own source. Never wrap anything else in it."""

    __slots__ = ()


Child = str | None | Iterable["Child"]


def tag(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Html:
    """One element. `class_` and `for_` lose the underscore, `aria_label` becomes `aria-label`.

    An attribute that is None or False is left out; True stands without a value. Newlines in text stay newlines.
    """
    parts = []
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            parts.append(f" {key}")
        elif value is not None and value is not False:
            text = f"{value:.6g}" if isinstance(value, float) else str(value)
            parts.append(f' {key}="{html.escape(clean(text, newlines=True))}"')
    head = f"<{name}{''.join(parts)}>"
    return Html(head if name in _EMPTY else f"{head}{join(children)}</{name}>")


def join(children: Iterable[Child]) -> Html:
    """Children one after the other, those that are not `Html` escaped."""
    return Html("".join(_inner(child) for child in children))


def _inner(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return child
    if isinstance(child, str):
        return html.escape(clean(child, newlines=True))
    return join(child)


def data(value: Any, **attributes: str) -> Html:
    """A block of JSON for a script to read. Its strings are the caller's to clean; nothing in it can end the block."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for char in "<>&":  # U+2028, U+2029 and everything else beyond ASCII are escapes already
        text = text.replace(char, f"\\u{ord(char):04x}")
    return tag("script", Html(text), type="application/json", **attributes)
