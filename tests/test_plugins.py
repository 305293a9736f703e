"""Names from cotune's own tables and from other packages."""

from pathlib import Path

import pytest

from cotune.errors import UsageError
from cotune.plugins import _installed, names, resolve

TABLE = {"ours": "pathlib:Path"}


def test_a_package_adds_a_name_by_an_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[cotune.things]\ntheirs = theirs_things:Thing\n")
    (tmp_path / "theirs_things.py").write_text("class Thing: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    _installed.cache_clear()
    try:
        assert names("things", TABLE) == TABLE | {"theirs": "theirs_things:Thing"}
        assert resolve("things", TABLE, "theirs").__name__ == "Thing"
        assert resolve("things", TABLE, "ours") is Path
    finally:
        _installed.cache_clear()


def test_an_unknown_name_is_an_error_with_the_nearest_one() -> None:
    with pytest.raises(UsageError, match=r"There is no thing 'our'\. Did you mean 'ours'\?"):
        resolve("things", TABLE, "our")
