"""A plot's SVG as PNG, for where SVG cannot be shown. In light colours and with a font of its own, so that a machine
without any font draws the same. Knows the plots' style sheet and nothing of what is drawn.
"""

from __future__ import annotations

import re
from importlib.resources import as_file, files

from cotune.compare.plots import style
from cotune.errors import UsageError

SCALE = 2  # pixels for each of the SVG's
_RULE = re.compile(r"([^{}]+)\{([^{}]*)\}")
_OWN = "var(--own)"


def png(svg: str) -> bytes:
    """Of one `Plot.alone()`. Raises UsageError when the library is not installed."""
    try:
        import resvg_py
    except ImportError:
        raise UsageError(
            "PNG plots need resvg-py: pip install 'cotune[png]'. Or take SVG, which needs nothing: --plots-format svg."
        ) from None
    sheet, paper = light(style())
    plain = re.sub(r"<style>.*?</style>", lambda _: f"<style>{sheet}</style>", svg, count=1, flags=re.DOTALL)
    with as_file(files("cotune.compare").joinpath("fonts")) as fonts:
        return bytes(
            resvg_py.svg_to_bytes(
                svg_string=plain, background=paper, zoom=SCALE, font_dirs=[str(fonts)], sans_serif_family="DejaVu Sans"
            )
        )


def light(sheet: str) -> tuple[str, str]:
    """The style sheet for a renderer that knows neither variables nor media queries, and the colour of the paper.

    A strategy's colour is a variable that its class sets and everything inside inherits: such a rule becomes one for
    each strategy.
    """
    sheet = re.sub(r"/\*.*?\*/", "", sheet, flags=re.DOTALL)
    rules = _RULE.findall(re.sub(r"@media[^{]*\{([^{}]*\{[^{}]*\})*[^{}]*\}", "", sheet))
    colours = dict(re.findall(r"(--[\w-]+):\s*([^;]+)", rules[0][1]))
    owners = {selector.strip(): name for selector, body in rules for name in re.findall(r"--own: var\((.+?)\)", body)}
    out = []
    for selector, body in rules[1:]:
        parts = [part.strip() for part in body.split(";") if part.strip() and not part.strip().startswith("--")]
        parts = ["font: 13px sans-serif" if part.startswith("font:") else part for part in parts]
        shared = "; ".join(part for part in parts if _OWN not in part)
        out.append(f"{selector.strip()} {{ {shared} }}")
        owned = "; ".join(part for part in parts if _OWN in part)
        last = selector.split()[-1]
        for owner, name in owners.items() if owned else ():
            out.append(f"{owner}{last}, {owner} {last} {{ {owned.replace(_OWN, colours[name])} }}")
    flat = re.sub(r"var\((.+?)\)", lambda found: colours[found[1]], "\n".join(out))
    return flat, colours["--paper"]
