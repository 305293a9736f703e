"""The cache of generations: what is a hit, what is a miss, what it costs, and what a bad file or two processes do."""

from __future__ import annotations

import json
import logging
import sqlite3
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from cotune import experiment
from cotune.bench import Bench, MemoryStore
from cotune.config import resolve
from cotune.engines.base import Engine, Request, Sampling
from cotune.engines.cache import GenerationCache, completion_keys
from cotune.engines.fake import FakeEngine
from cotune.engines.transformers_engine import TransformersEngine
from cotune.errors import BudgetExhausted, UsageError
from cotune.ledger import Ledger
from cotune.models.base import BaseModel
from cotune.models.lora import PendingLora
from cotune.record import read_rows

GREEDY = Sampling(6)
ASKED = [Request(f"question {i}") for i in range(5)]


def said(prompt: str, adapter: str | None, sample: int) -> str:
    return f"{prompt} under {adapter} {sample}"


def a_bench(base: BaseModel, engine: Engine, cache: GenerationCache | None, tokens: int | None = None) -> Bench:
    return Bench(base, engine, lambda _: engine, Ledger(tokens), MemoryStore(), 0, cache=cache)


@pytest.fixture
def cache(tmp_path: Path) -> GenerationCache:
    return GenerationCache(tmp_path / "cache.sqlite")


def keys(engine: Engine, request: Request = ASKED[0], sampling: Sampling = GREEDY, **changed: Any) -> list[str]:
    weights = changed.get("weights", ["w"])
    return completion_keys(engine, weights, changed.get("tokens", [[1, 2]]), [request], sampling)[0]


def test_everything_a_completion_depends_on_is_in_its_key(random_base: BaseModel) -> None:
    engine, other = FakeEngine(said), FakeEngine(said)
    engine.rows_apart = other.rows_apart = True
    other.name = "other"
    sampled = Sampling(6, temperature=1.0, n=2, seed=1)
    adapter = PendingLora("a" * 16, lambda: pytest.fail("not needed"))
    different = [
        keys(engine),
        keys(other),
        keys(engine, weights=["v"]),
        keys(engine, weights=["w", "version 2"]),
        keys(engine, tokens=[[1, 3]]),
        keys(engine, replace(ASKED[0], adapter=adapter)),
        keys(engine, sampling=replace(GREEDY, max_new_tokens=7)),
        keys(engine, sampling=replace(GREEDY, logprobs=True)),
        keys(engine, sampling=sampled),
        keys(engine, sampling=replace(sampled, seed=2)),
        keys(engine, sampling=replace(sampled, top_p=0.9)),
        keys(TransformersEngine(random_base)),
    ]
    flat = [key for row in different for key in row]
    assert len(set(flat)) == len(flat)  # the two samples of one request differ too
    assert keys(engine, sampling=replace(GREEDY, seed=9, top_p=0.5)) == keys(engine)  # greedy does not draw
    assert keys(engine, sampling=replace(GREEDY, n=2)) == keys(engine) * 2
    assert keys(engine, sampling=replace(sampled, n=1)) == keys(engine, sampling=sampled)[:1]
    assert keys(engine, replace(ASKED[0], first=1), replace(sampled, n=1)) == keys(engine, sampling=sampled)[1:]


def test_rows_that_move_each_other_are_found_with_their_batch_alone(random_base: BaseModel) -> None:
    engine = TransformersEngine(random_base)
    pair = completion_keys(engine, ["w"], [[1], [2]], ASKED[:2], GREEDY)
    assert completion_keys(engine, ["w"], [[1], [2]], ASKED[:2], GREEDY) == pair
    alone = completion_keys(engine, ["w"], [[1]], ASKED[:1], GREEDY)
    twice = completion_keys(engine, ["w"], [[1], [1]], [ASKED[0], ASKED[0]], GREEDY)
    later = completion_keys(engine, ["w"], [[1]], [replace(ASKED[0], first=1)], GREEDY)
    assert len({row[0] for row in [*pair, *alone, *twice, *later]}) == 6


def test_a_second_bench_generates_nothing_and_books_the_same(random_base: BaseModel, cache: GenerationCache) -> None:
    sampling = Sampling(8, temperature=1.0, n=3, seed=4)
    plain = a_bench(random_base, TransformersEngine(random_base, batch_size=6), None)
    expected = plain.generate(ASKED, sampling)
    first = a_bench(random_base, TransformersEngine(random_base, batch_size=6), cache)
    assert first.generate(ASKED, sampling) == expected
    assert first.ledger.tuning.cached_calls == 0
    engine = TransformersEngine(random_base, batch_size=6)
    engine.generate = lambda *_: pytest.fail("generated again")  # type: ignore[method-assign,misc,assignment]
    second = a_bench(random_base, engine, cache)
    assert second.generate(ASKED, sampling) == expected
    spent = second.ledger.tuning
    assert (spent.cached_calls, spent.cached_tokens) == (15, spent.tokens)
    assert spent.seconds == pytest.approx(first.ledger.tuning.seconds)
    same = {"cached_calls": 0, "cached_tokens": 0, "seconds": 0.0}
    assert asdict(spent) | same == asdict(plain.ledger.tuning) | same
    with pytest.raises(BudgetExhausted):  # what is found counts as spent
        a_bench(random_base, engine, cache, tokens=spent.tokens - 1).generate(ASKED, sampling)


def test_an_engine_whose_rows_stand_apart_generates_the_missing_ones(
    random_base: BaseModel, cache: GenerationCache
) -> None:
    first, engine = FakeEngine(said), FakeEngine(said)
    first.rows_apart = engine.rows_apart = True
    a_bench(random_base, first, cache).generate(ASKED[:3], GREEDY)
    bench = a_bench(random_base, engine, cache)
    assert [row[0].text for row in bench.generate(ASKED, GREEDY)] == [said(r.prompt, None, 0) for r in ASKED]
    assert engine.calls == ASKED[3:]
    assert bench.ledger.tuning.cached_calls == 3
    whole = TransformersEngine(random_base)
    a_bench(random_base, whole, cache).generate(ASKED[:3], GREEDY)
    again = a_bench(random_base, whole, cache)
    again.generate(ASKED, GREEDY)
    assert again.ledger.tuning.cached_calls == 0


def test_a_pending_adapter_of_a_hit_is_not_made(random_base: BaseModel, cache: GenerationCache) -> None:
    made: list[str] = []

    def make() -> Any:
        made.append("x")

    requests = [Request("x", PendingLora("0" * 16, make))]
    a_bench(random_base, FakeEngine(said), cache).generate(requests, GREEDY)
    a_bench(random_base, FakeEngine(said), cache).generate(requests, GREEDY)
    assert made == ["x"]


def test_a_row_that_cannot_be_read_is_a_miss_and_is_made_again(random_base: BaseModel, tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    expected = a_bench(random_base, FakeEngine(said), GenerationCache(path)).generate(ASKED, GREEDY)
    with sqlite3.connect(path) as file:
        file.execute("UPDATE completions SET row = substr(row, 1, 20) WHERE rowid = 1")
        file.execute("UPDATE completions SET row = '[]' WHERE rowid = 2")
    engine = FakeEngine(said)
    assert a_bench(random_base, engine, GenerationCache(path)).generate(ASKED, GREEDY) == expected
    assert engine.calls == ASKED  # the whole batch
    engine = FakeEngine(said)
    a_bench(random_base, engine, GenerationCache(path)).generate(ASKED, GREEDY)
    assert engine.calls == []


def test_what_is_no_cache_is_refused_with_the_file_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a database, " * 100)
    other = sqlite3.connect(tmp_path / "other.sqlite")
    other.execute("CREATE TABLE completions (name TEXT)")
    other.close()
    for path in (tmp_path / "notes.txt", tmp_path / "other.sqlite", tmp_path, tmp_path / "notes.txt" / "inside"):
        with pytest.raises(UsageError, match=rf"{path} cannot be used as a cache \(.+\)\. Give --cache another file"):
            GenerationCache(path)
    assert (tmp_path / "notes.txt").read_text().startswith("not a database")


def test_a_full_disk_costs_the_cache_and_not_the_run(
    random_base: BaseModel, cache: GenerationCache, caplog: pytest.LogCaptureFixture
) -> None:
    pages = cache._file.execute("PRAGMA page_count").fetchone()[0]
    cache._file.execute(f"PRAGMA max_page_count = {pages}")
    requests = [Request(f"{i} " * 400) for i in range(20)]
    with caplog.at_level(logging.WARNING):
        bench = a_bench(random_base, FakeEngine(said), cache)
        assert len(bench.generate(requests, Sampling(500))) == 20
        assert len(bench.generate(requests[:1], Sampling(501))) == 1
    told = [r.getMessage() for r in caplog.records if r.name.startswith("cotune")]
    assert [message.count("database or disk is full") for message in told] == [1]  # said once


_WRITER = """
import sys
from pathlib import Path
from cotune.engines.cache import GenerationCache
cache, me = GenerationCache(Path(sys.argv[1])), sys.argv[2]
for i in range(300):
    cache.put({f"shared {i}": {"completion": me}, f"{me} {i}": {"completion": me}})
    assert set(cache.get([f"shared {i}", f"{me} {i}", "nothing"])) == {f"shared {i}", f"{me} {i}"}
"""


def test_processes_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "cache.sqlite"
    working = [subprocess.Popen([sys.executable, "-c", _WRITER, path, str(i)]) for i in range(3)]
    assert [process.wait() for process in working] == [0, 0, 0]
    cache = GenerationCache(path)
    for i in range(3):
        assert len(cache.get([f"{i} {j}" for j in range(300)])) == 300
    assert len(cache.get([f"shared {j}" for j in range(300)])) == 300


def test_a_run_under_another_name_has_the_same_bytes_from_the_cache(random_model_dir: Path, tmp_path: Path) -> None:
    small = {"limit_train": 6, "limit_val": 4, "limit_test": 6, "decoding": {"max_new_tokens": 6}}
    names = {"strategy": "joint", "model": str(random_model_dir), "task": "micro-cosmosqa"}
    joint = {"epochs": 1, "rollouts": 2, "max_prompt_tokens": 8, "rank": 2, "generator_rank": 2, "share": 0.5}
    config = resolve(small, names, {"joint": joint})
    path = tmp_path / "cache.sqlite"
    runs = [
        experiment.run(config, tmp_path, "without").folder,
        experiment.run(config, tmp_path, "first", cache=GenerationCache(path)).folder,
        experiment.run(config, tmp_path, "second", cache=GenerationCache(path)).folder,
    ]
    for name in ("predictions.jsonl", "crossed.jsonl"):
        rows = [read_rows(run / name) for run in runs]
        assert rows[0] == rows[1] == rows[2]
    costs = [json.loads((run / "summary.json").read_text())["cost"] for run in runs]
    for account in ("tuning", "measuring"):
        assert len({cost[account]["tokens"] for cost in costs}) == 1
        assert costs[0][account]["cached_calls"] == 0
        assert costs[2][account]["cached_calls"] == costs[2][account]["calls"]
        trained = costs[2][account]["trained_tokens"]
        assert costs[2][account]["cached_tokens"] + trained == costs[2][account]["tokens"]
