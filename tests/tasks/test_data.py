from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cotune.errors import DataError
from cotune.tasks import task
from cotune.tasks.base import HubSource
from cotune.tasks.data import _key, check, content_digest, grade_rows, load
from cotune.tasks.rows import read_hub

Row = dict[str, Any]


def word_problem(n: int) -> Row:
    return {"question": f"What is {n} + 1?", "answer": f"{n}+1=<<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"}


def story(n: int, label: str = "1") -> Row:
    row = {"id": f"row-{n}", "context": f"Story {n}.", "question": "Why?", "label": label}
    return row | {f"answer{i}": f"because {i}" for i in range(4)}


def hop(n: int) -> Row:
    return {
        "_id": f"hop-{n}", "question": f"Where is {n}?", "answer": "Paris", "type": "bridge", "level": "easy",
        "context": [[f"Place {n}", ["First.", " It is in Paris."]], ["Other", ["Nothing."]]],
        "supporting_facts": [[f"Place {n}", 1], ["Other", 7]],
    }  # fmt: skip


def write(path: Path, rows: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            cells = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows]
            writer.writerows(cells)
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(text)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "gsm8k" / "train.jsonl", [word_problem(n) for n in range(100)])
    write(tmp_path / "gsm8k" / "test.jsonl", [word_problem(n) for n in range(200, 230)])
    return tmp_path


def test_splits_are_disjoint_and_all_there(folder: Path) -> None:
    data = load(task("gsm8k"), folder, seed=3)
    test = data.test()
    assert (len(data.train), len(data.val), len(test)) == (80, 20, 30)
    keys = [{_key(e) for e in part} for part in (data.train, data.val, test)]
    assert sum(map(len, keys)) == len(set.union(*keys)) == 130
    assert [report.split for report in data.report.splits] == ["train", "test"]
    assert data.report.warnings == () and data.report.overlap == {}


def test_a_seed_decides_val_and_limits_do_not(folder: Path) -> None:
    full = load(task("gsm8k"), folder, seed=0)
    small = load(task("gsm8k"), folder, seed=0, limit_train=10, limit_val=5, limit_test=7)
    more = load(task("gsm8k"), folder, seed=0, limit_train=20, limit_val=10, limit_test=14)
    assert small.train == more.train[:10] == full.train[:10]
    assert small.val == more.val[:5] == full.val[:5]
    assert small.test() == more.test()[:7] == full.test()[:7]
    other = load(task("gsm8k"), folder, seed=1, limit_test=7)
    assert {e.id for e in other.val} != {e.id for e in full.val}
    assert other.test() == small.test()  # every seed is measured on the same examples
    assert [e.id for e in small.train] != [f"train-{n}" for n in range(10)]  # not the first rows


def test_the_choice_depends_on_content_not_on_order_or_format(folder: Path, tmp_path: Path) -> None:
    expected = [e.question for e in load(task("gsm8k"), folder, seed=0, limit_train=10).train]
    rows = [word_problem(n) for n in range(100)]
    for name in ("train.jsonl.gz", "train.csv", "train.parquet", "train.jsonl"):
        other = tmp_path / name.replace(".", "-")
        write(other / name, rows[::-1])  # here the files lie in the folder itself
        write(other / "test.jsonl", [word_problem(n) for n in range(200, 230)])
        assert [e.question for e in load(task("gsm8k"), other, seed=0, limit_train=10).train] == expected


def test_rows_that_are_in_test_or_val_leave_train(tmp_path: Path) -> None:
    same = word_problem(5) | {"question": "  WHAT is 5 +   1?"}
    write(tmp_path / "train.jsonl", [word_problem(n) for n in range(10)])
    write(tmp_path / "val.jsonl", [word_problem(n) for n in range(9, 12)])
    write(tmp_path / "test.jsonl", [same, word_problem(11)])
    data = load(task("gsm8k"), tmp_path)
    assert data.report.overlap == {"train in test": 1, "val in test": 1, "train in val": 1}
    assert {e.reference for e in data.train} == {str(n + 1) for n in range(9) if n != 5}
    assert {e.reference for e in data.val} == {"10", "11"}
    assert check(task("gsm8k"), tmp_path)["overlap"] == {"train/val": 1, "train/test": 1, "val/test": 1}


def test_a_question_asked_again_with_other_choices_stays_on_one_side(tmp_path: Path) -> None:
    rows = [story(n) for n in range(50)]
    again = [story(n) | {"id": f"again-{n}", "answer0": "another reason"} for n in range(50)]
    write(tmp_path / "train.jsonl", rows + again)
    write(tmp_path / "test.jsonl", [story(99)])
    for seed in range(5):
        data = load(task("cosmosqa"), tmp_path, seed=seed)
        assert not {_key(e) for e in data.train} & {_key(e) for e in data.val}
        assert len(data.train) + len(data.val) == 100


def test_unusable_and_repeated_rows_are_counted_and_named(tmp_path: Path) -> None:
    rows = [
        story(0),
        story(0) | {"id": "copy"},
        story(1, "4"),
        story(2) | {"question": None},
        story(3) | {"id": "row-0"},
    ]
    write(tmp_path / "test.jsonl", rows)
    split = check(task("cosmosqa"), tmp_path)["splits"]["test"]
    assert (split["rows"], split["usable"], split["duplicates"], split["unusable"]) == (5, 2, 1, 2)
    assert split["references_correct"] == 3 and split["references_wrong"] == []
    assert split["unusable_rows"] == [
        {"id": "test-2", "reason": "the label is '4', not 0 to 3"},
        {"id": "test-3", "reason": "the question or the context is empty"},
    ]
    ids = [e.id for e in load(task("cosmosqa"), tmp_path, limit_train=0, limit_val=0).test()]
    assert sorted(ids) == ["row-0", "row-0#test-4"]


def test_a_limit_above_what_is_there_takes_all_and_says_so(folder: Path) -> None:
    data = load(task("gsm8k"), folder, limit_train=1000)
    assert len(data.train) == 80
    assert data.report.warnings == ("1000 train examples were asked for, there are 80; all are used.",)


def test_hub_shapes_give_the_same_examples(tmp_path: Path) -> None:
    hub = hop(1) | {
        "context": {"title": ["Place 1", "Other"], "sentences": [["First.", " It is in Paris."], ["Nothing."]]},
        "supporting_facts": {"title": ["Place 1", "Other"], "sent_id": [1, 7]},
    }
    hotpotqa, cosmosqa = task("hotpotqa"), task("cosmosqa")
    assert hotpotqa.parse(hub, "x") == hotpotqa.parse(hop(1), "x")
    assert hotpotqa.parse(hop(1), "x").context == "[Place 1] First. It is in Paris.\n[Other] Nothing."
    assert hotpotqa.reference_completion(hotpotqa.parse(hop(1), "x")) == "It is in Paris.\nAnswer: Paris"
    assert cosmosqa.parse(story(1) | {"label": 1}, "x") == cosmosqa.parse(story(1), "x")
    write(tmp_path / "test.csv", [hop(n) for n in range(3)])
    write(tmp_path / "train.parquet", [hub])
    assert check(hotpotqa, tmp_path)["splits"]["test"]["references_correct"] == 3
    assert check(hotpotqa, tmp_path)["splits"]["train"]["references_correct"] == 1


def test_digests_name_the_content(folder: Path) -> None:
    first, again = (load(task("gsm8k"), folder).train for _ in range(2))
    assert content_digest(first) == content_digest(again) != content_digest(first[1:])


Break = Callable[[Path], object]


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("train.jsonl", lambda p: p.write_text('{"question": "a"}\n'), "line 1 lacks 'answer'"),
        ("train.jsonl", lambda p: p.write_text(json.dumps(word_problem(1)) + '\n{"quest'), "line 2 is not JSON"),
        ("train.jsonl", lambda p: p.write_text("[1]\n"), "line 1 is not a JSON object"),
        ("train.jsonl", lambda p: p.write_text(""), "holds no rows"),
        ("train.jsonl", lambda p: p.write_bytes(b"\xff\xfe\x00"), "cannot be read"),
        ("train.jsonl.gz", lambda p: p.write_bytes(gzip.compress(b"{}" * 9999)[:40]), "cut off"),
        ("train.jsonl.gz", lambda p: p.write_bytes(b"not gzip"), "cannot be read"),
        ("train.csv", lambda p: p.write_text("question,answer\na,b,c\n"), "more or fewer fields"),
        ("train.csv", lambda p: p.write_text("question\na\n"), "lacks 'answer'"),
        ("train.parquet", lambda p: p.write_bytes(b"PAR1"), "cannot be read as parquet"),
        ("train.json", lambda p: p.write_text("[]"), "unknown format"),
    ],
)
def test_what_cannot_be_read_is_one_clear_error(folder: Path, name: str, spoil: Break, message: str) -> None:
    (folder / "gsm8k" / "train.jsonl").unlink()
    spoil(folder / "gsm8k" / name)
    with pytest.raises(DataError, match=message):
        load(task("gsm8k"), folder)


def test_missing_folders_and_splits_are_clear_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--data"):
        load(task("gsm8k"), tmp_path / "nowhere")
    (folder / "gsm8k" / "train.jsonl").unlink()
    with pytest.raises(DataError, match=r"no train file.*add train\.jsonl"):
        load(task("gsm8k"), folder)
    assert list(check(task("gsm8k"), folder)["splits"]) == ["test"]
    (folder / "gsm8k" / "test.jsonl").unlink()
    with pytest.raises(DataError, match="holds no rows for gsm8k"):
        check(task("gsm8k"), folder)
    write(folder / "gsm8k" / "train.jsonl", [word_problem(1)])
    with pytest.raises(DataError, match="no test file"):
        load(task("gsm8k"), folder).test()
    write(folder / "gsm8k" / "train.csv", [word_problem(1)])
    with pytest.raises(DataError, match="keep one file"):
        load(task("gsm8k"), folder)


def test_offline_the_hub_error_names_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = HubSource("cotune-tests/not-there", "0" * 40, {"train": ("train.parquet",)})
    with pytest.raises(DataError, match="--data"):
        list(read_hub(source, "train", ()))


@pytest.mark.parametrize("name", ["gsm8k", "math", "hotpotqa", "cosmosqa"])
def test_hub_revisions_are_pinned_commits(name: str) -> None:
    hub = task(name).hub
    assert hub is not None
    assert len(hub.revision) == 40 and int(hub.revision, 16)
    assert set(hub.files) == {"train", "test"}
    assert all(file.endswith(".parquet") for files in hub.files.values() for file in files)


def test_offline_tasks_come_from_their_generator_and_from_files(tmp_path: Path) -> None:
    micro = task("micro-gsm8k")
    data = load(micro, seed=5, limit_train=50, limit_val=20, limit_test=10)
    assert (len(data.train), len(data.val), len(data.test())) == (50, 20, 10)
    assert load(micro, seed=6, limit_test=10).test() == data.test()
    write(tmp_path / "micro-gsm8k" / "train.jsonl", [word_problem(n) for n in range(10)])
    write(tmp_path / "micro-gsm8k" / "test.jsonl", [word_problem(99)])
    assert load(micro, tmp_path).test()[0].reference == "100"


@pytest.mark.parametrize("name", ["gsm8k", "math", "hotpotqa", "cosmosqa"])
def test_real_folders_load(name: str, real_data: Path) -> None:
    data = load(task(name), real_data, limit_train=64, limit_val=64, limit_test=64)
    assert len(data.train) == 64 and len(data.test()) == 64
    assert len({e.id for e in (*data.train, *data.val, *data.test())}) == 128 + len(data.val)


# --- grading others' completions -------------------------------------------------------------------------------


def graded(name: str, *rows: Row) -> list[Row]:
    return list(grade_rows(task(name), [json.dumps(row) for row in rows]))


def test_bare_and_official_references_grade_alike() -> None:
    official = word_problem(71)["answer"]
    for reference in ("72", official, 72, "#### 72"):
        row = {"id": 1, "reference": reference, "completion": "so \\boxed{72.0}"}
        assert graded("gsm8k", row) == [
            {"id": 1, "outcome": "correct", "prediction": "72.0", "score": 1.0, "metrics": {"accuracy": 1.0}}
        ]
    for reference in (r"\frac{1}{2}", r"Hence $x = \boxed{\frac12}$."):
        assert graded("math", {"reference": reference, "completion": r"\boxed{0.5}"})[0]["outcome"] == "correct"


def test_others_completions_of_questions_and_choices() -> None:
    choices = ["home", "away", "both", "neither"]
    out = graded(
        "cosmosqa",
        {"reference": "B", "choices": choices, "completion": "Answer: away"},
        {"reference": "1", "choices": choices, "completion": "(A)"},
        {"reference": "away", "choices": choices, "completion": "I would sa", "truncated": True},
    )
    assert [(row["outcome"], row["prediction"]) for row in out] == [
        ("correct", "B"),
        ("wrong", "A"),
        ("truncated", None),
    ]
    assert out[2]["note"] and "id" not in out[0]
    (row,) = graded("hotpotqa", {"reference": "Eiffel Tower", "completion": "Answer: the Eiffel Tower Paris"})
    assert row["score"] == 0 and row["metrics"]["token_f1"] == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("gsm8k", "{", "line 2 is not JSON"),
        ("gsm8k", '{"reference": "1"}', "line 2 lacks completion"),
        ("gsm8k", '{"completion": "1"}', "line 2 lacks reference"),
        ("gsm8k", '{"reference": "none", "completion": "1"}', "not one number"),
        ("gsm8k", '{"reference": "1", "completion": 1}', "not text"),
        ("cosmosqa", '{"reference": "A", "completion": "A"}', "0 choices"),
        ("cosmosqa", '{"reference": "E", "choices": ["p", "q", "r", "s"], "completion": "A"}', "no letter"),
    ],
)
def test_a_bad_line_is_named(name: str, line: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(grade_rows(task(name), ["", line]))
