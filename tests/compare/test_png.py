"""PNG plots: light colours, each strategy's own, letters without a font of the machine, the fix where it cannot be."""

from __future__ import annotations

import io
import re
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from reference.run_folders import write_run
from typer.testing import CliRunner

from cotune.cli import app
from cotune.compare import plots
from cotune.compare.png import light, png
from cotune.compare.stats import Estimate, Finding


@pytest.fixture(scope="module")
def svg() -> str:
    found = Finding(Estimate(0.5, 0.4, 0.6, 0.05, 10), "t", 0.5, None, None, None, "g")
    items = [(plots.Series("lora-only", "lora-only"), found)]
    return plots.forest("t", "zero-shot", items).alone()


def colours(picture: bytes) -> tuple[tuple[int, int], set[str]]:
    """Size and colours of a PNG of 8-bit RGBA, read by the format's own rules (PNG, filters 0 to 4)."""
    file, data = io.BytesIO(picture), b""
    assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    while True:
        length, kind = struct.unpack(">I4s", file.read(8))
        body = file.read(length)
        file.read(4)
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack(">IIBB", body[:10])
            assert (depth, colour) == (8, 6)
        data += body if kind == b"IDAT" else b""
        if kind == b"IEND":
            break
    raw, step, before, found = zlib.decompress(data), 4 * width, bytes(4 * width), set()
    for y in range(height):
        how, line = raw[y * (step + 1)], bytearray(raw[y * (step + 1) + 1 : (y + 1) * (step + 1)])
        for x in range(step):
            a, b, c = (line[x - 4] if x > 3 else 0), before[x], (before[x - 4] if x > 3 else 0)
            nearest = min((a, b, c), key=lambda v: abs(a + b - c - v))
            line[x] = (line[x] + (0, a, b, (a + b) // 2, nearest)[how]) % 256
        before = bytes(line)
        found |= {before[x : x + 4].hex() for x in range(0, step, 4)}
    return (width, height), found


def test_the_style_sheet_has_no_variable_left_and_is_the_light_one() -> None:
    flat, paper = light(plots.style())
    assert paper == "#ffffff"
    assert "var(" not in flat
    assert "--" not in flat
    assert "@media" not in flat
    assert set(re.findall(r"#\w+", flat)) <= set(re.findall(r"#\w+", plots.style().partition("@media")[0]))
    for strategy in ("zero-shot", "prompt-only", "lora-only", "sequential", "joint", "other"):
        assert f".{strategy}.bar, .{strategy} .bar {{ stroke: #" in flat


def test_a_plot_is_drawn_in_light_colours_with_our_font(svg: str, monkeypatch: pytest.MonkeyPatch) -> None:
    resvg = pytest.importorskip("resvg_py", reason="pip install 'cotune[png]'")
    picture = png(svg)
    height = int(float(re.findall(r'height="([\d.]+)"', svg)[0]))
    assert struct.unpack(">II", picture[16:24]) == (2 * plots.WIDE, 2 * height)
    monkeypatch.setattr("cotune.compare.png.SCALE", 0.5)  # fewer bytes for the reader above
    size, found = colours(picture := png(svg))
    assert size == (plots.WIDE // 2, height // 2)
    (own,) = re.findall(r"--lora-only: #(\w+)", plots.style().partition("@media")[0])
    assert f"{own}ff" in found
    assert "ffffffff" in found  # paper, and nothing of it is see-through
    assert all(colour.endswith("ff") for colour in found)
    # A machine without fonts draws the same; without ours there are no letters there.
    draw = resvg.svg_to_bytes
    monkeypatch.setattr(resvg, "svg_to_bytes", lambda **how: draw(**how, skip_system_fonts=True))
    assert png(svg) == picture

    def bare(**how: Any) -> bytes:
        return bytes(draw(**{**how, "font_dirs": []}, skip_system_fonts=True))

    monkeypatch.setattr(resvg, "svg_to_bytes", bare)
    assert png(svg) != picture


def test_pngs_are_files_and_what_is_missing_is_said_before_any_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "runs"
    write_run(out, "zero-shot", {"a": 0.0, "b": 1.0})
    write_run(out, "joint", {"a": 1.0, "b": 1.0})
    command = ["compare", str(out), "--plots", str(tmp_path / "plots"), "--plots-format", "png"]
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "resvg_py", None)
        missing = CliRunner().invoke(app, command)
    assert missing.exit_code == 2
    assert "pip install 'cotune[png]'" in missing.stderr
    assert not (tmp_path / "plots").exists()
    pytest.importorskip("resvg_py", reason="pip install 'cotune[png]'")
    assert CliRunner().invoke(app, command).exit_code == 0
    names = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert names == ["1-micro-gsm8k-cost.png", "1-micro-gsm8k-differences.png"]
