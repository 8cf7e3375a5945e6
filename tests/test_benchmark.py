"""benchmark.py measures what it says: every section on the tiny shape, in seconds."""
import importlib.util
import json
import math

import pytest
import torch

import benchmark
from conftest import call

SMALL = ("--shape tiny --device cpu --threads 1 --sections 1,2,3,4,5,6 --rows 1,2 --window 8 --new-tokens 12 "
         "--long-tokens 12 --lengths 32,64 --train-lengths 24,96 --full-length 64 --step-tokens 12 --group-size 2 "
         "--repeats 1").split()
COLUMNS = {  # the first and the last of each section's table, and how many rows it has
    "1": ("rows", "to no adapter", 12), "2": ("rows", "same", 3), "3": ("arm", "to the first", 6),
    "4": ("arm", "peak MB", 5), "5": ("arm", "peak MB", 2), "6": ("rows", "share %", 4)}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The JSON of a run of all sections, and what it printed."""
    path, printed = tmp_path_factory.mktemp("benchmark") / "new" / "all.json", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *text, **where: None if "file" in where else printed.extend(text))
        assert call(benchmark, *SMALL, "--json", path) == 0
    return json.loads(path.read_text()), "\n".join(printed)


def test_every_section_gives_finite_positive_numbers(measured):
    sections = measured[0]["sections"]
    assert [*sections] == [*COLUMNS]
    for number, (first, last, n) in COLUMNS.items():
        if number == "2" and not importlib.util.find_spec("transformers"):
            assert sections["2"] == [] and "pip install transformers" in measured[1]
            continue
        assert len(sections[number]) == n
        for row in sections[number]:
            assert ([*row][0], [*row][-1]) == (first, last)
            for name, value in row.items():
                if value is None:                                               # there is no GPU; a window's own tokens
                    assert name == "peak MB" or name == "same" and row["window here"] != "full"
                elif not isinstance(value, str):
                    assert math.isfinite(value) and value > 0, (number, row)


def test_the_numbers_mean_something(measured):
    sections = measured[0]["sections"]
    assert all(row["same"] in (None, row["rows"]) for row in sections["2"])     # greedy, float32: as transformers
    for row in sections["1"] + sections["6"]:
        assert row["adapter"] != "none" or row["to no adapter"] == 1
    growth = {row["arm"]: row["to the first"] for row in sections["4"]}         # of 24 tokens, where it was run: to 96
    assert growth["PTE, truncate 1"] == 1 and growth["PTE, whole chain"] > 1.2
    assert "LoRA, full cache" in growth


def test_what_is_printed_and_saved(measured):
    result, printed = measured
    assert result.keys() == {"machine", "options", "sections"}
    assert result["options"]["shape"] == "tiny" and result["options"]["dtype"] == "float32"
    assert printed.startswith(result["machine"]) and "1 threads, no GPU" in result["machine"]
    for number, table in result["sections"].items():
        assert f"\n{number}. " in printed and "{" not in printed
        assert not table or f"| {' | '.join(table[0])} |\n|{' --- |' * len(table[0])}\n| " in printed


def test_saved_bytes_are_counted_once_and_while_they_live():
    weight, x = (torch.ones(5, 5, requires_grad=True) for _ in range(2))
    with (saved := benchmark.Saved([weight])):
        y = x.exp()                                                             # keeps y: 100 bytes
        z = (y * weight) + y.T * y                                              # y again, and weight, which is left out
        assert saved.held == saved.peak == 100
        z.sum().backward()
        del y, z
        assert saved.held == 0
        (x.exp().exp()).sum().backward()                                        # two at once
    assert (saved.held, saved.peak) == (0, 200)


@pytest.mark.parametrize("flags, word", [
    ("--shape qwen9", "qwen9"), ("--sections 7", "--sections"), ("--window 10", "--window 10"),
    ("--lengths 100", "--lengths 100"), ("--model nowhere", "nowhere"), ("--new-tokens 3", "--new-tokens")])
def test_a_mistake_is_one_line(flags, word, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(benchmark, *flags.split()) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and word in err and not [*tmp_path.iterdir()]
