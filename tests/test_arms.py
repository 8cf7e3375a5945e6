"""evaluate.py: the arms and their table, the files that are written, and a killed run that loses nothing.

Scores, and what a model is asked: test_evaluate.py, which has the helpers of this file, too.
"""
import json
import re
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from random import Random
from shutil import copy
from types import ModuleType
from unittest.mock import MagicMock

import numpy as np
import pytest

import encoder
import evaluate
import rollout
from conftest import call, lines
from encoder import arms
from evaluate import interval, scores
from model import read_safetensors
from train import write_safetensors
from test_evaluate import arguments, coin, data, refusal, solved, variant


# ---- the files and the table -----------------------------------------------------------------------------------------
@pytest.fixture
def table(trained, data, tmp_path, coin, capsys):
    """What one command makes of two runs that differ in the seed, two data sets and two windows: (JSON, printed)."""
    other = variant(trained, tmp_path / "other", noise=0.5, seed=1, out="elsewhere", device="auto", dtype="float32")
    assert call(evaluate, *arguments("--runs", trained, other, "--data", data / "six.jsonl,aime24", "--data-dir", data,
                                     "--window", 0, 8, "--samples", 3, "--temperature", 1, "--json",
                                     tmp_path / "table.json")) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "table.md").read_text() + f"\nsaved: {tmp_path / 'table.json'}, .jsonl, .md\n"
    return json.loads((tmp_path / "table.json").read_text()), printed


def test_every_number_of_the_table_is_that_of_the_records(table, trained, tmp_path):
    """Two seeds: a problem has the mean of both. The base that both were trained on is measured once."""
    saved, _ = table
    rows, records, both = saved["rows"], saved["problems"], [str(trained), str(tmp_path / "other")]
    assert [(r["arm"], r["window"], r["models"]) for r in rows] == [
        (arm, W, models) for arm, models in (("no training", [both[0] + "/base"]), ("PTE", both)) for W in (0, 8)]
    assert len(records) == (1 + 2) * 2 * (6 + 2)
    names = "accuracy pass@2 pass@3 maj@2 maj@3 truncated tokens evictions".split()
    for row in rows:
        assert [*row] == "arm window models cache_mb memory_mb average scores".split()
        assert [*row["scores"]] == ["six", "aime24"]
        columns = {name: [] for name in row["scores"]}
        for i in range(8):
            mine = [scores(r["samples"], 0) for r in records
                    if (r["arm"], r["window"], r["number"]) == (row["arm"], row["window"], i)]
            assert len(mine) == len(row["models"])
            columns["six" if i < 6 else "aime24"].append({n: sum(m[n] for m in mine) / len(mine) for n in names})
        for data, column in columns.items():
            assert [*row["scores"][data]] == names
            for n in names:
                assert row["scores"][data][n] == pytest.approx(interval([np.array([x[n] for x in column])]))
        of = [np.array([x[n] for x in columns[data]]) for data, n in (("six", "accuracy"), ("aime24", "pass@3"))]
        assert row["average"] == pytest.approx(interval(of))
    assert 0 < rows[2]["average"][0] != rows[3]["average"][0]


def test_the_records_hold_all_that_was_said(table, trained, data, tmp_path):
    records = table[0]["problems"]
    for r in records:
        assert [*r] == "arm model window cache_mb memory_mb data number answer samples".split() and r["answer"] == "3"
        for s in r["samples"]:
            assert [*s] == "response tokens truncated evictions prediction correct".split()
    assert [r["number"] for r in records] == [*range(8)] * 6
    first, *rest = lines(tmp_path / "table.jsonl")                              # the settings, then the same records
    assert first["samples"] == 3 and sorted(map(json.dumps, rest)) == sorted(map(json.dumps, records))
    assert call(evaluate, *arguments("--runs", trained, "--data", data / "six.jsonl", "--window", 8, "--json",
                                     tmp_path / "greedy.json")) == 0
    greedy = json.loads((tmp_path / "greedy.json").read_text())["problems"]
    for i, (text,) in solved(trained):
        (sample,) = greedy[6 + i]["samples"]
        assert {name: sample[name] for name in text} == text
    # keys and values of 2 x 24 float32 in 3 layers, of 14 tokens of the longest problem and 8 thoughts
    assert greedy[6]["cache_mb"] == pytest.approx(2 * 2 * 24 * 4 * 3 * (14 + 8) / 1e6)


def test_the_printed_tables_are_those_of_the_json(table):
    saved, printed = table
    main, budget, everything = ([[cell.strip() for cell in line.strip("| ").split(" | ")] for line in part.splitlines()]
                                for part in printed.rpartition("\nsaved")[0].strip().split("\n\n"))

    def shown(x, scale=100):
        return "{:.1f} ({:.1f}-{:.1f})".format(*(scale * y for y in x))
    windows = {0: "full", 8: "8"}
    assert main[0] == ["arm", "window", "six", "aime24 pass@3", "average", "cache MB", "memory MB"]
    assert main[2:] == [[r["arm"], windows[r["window"]], shown(r["scores"]["six"]["accuracy"]),
                         shown(r["scores"]["aime24"]["pass@3"]), shown(r["average"]), f"{r['cache_mb']:.3f}",
                         f"{r['memory_mb']:.0f}"] for r in saved["rows"]]
    assert budget[0] == ["average by window", "full", "8"]
    assert budget[2:] == [[main[2][0], main[2][4], main[3][4]], [main[4][0], main[4][4], main[5][4]]]
    assert everything[0] == ["data", "arm", "window", *saved["rows"][0]["scores"]["six"]]
    assert everything[2:] == [
        [data, r["arm"], windows[r["window"]], *(shown(x, 1 if name in ("tokens", "evictions") else 100)
                                                 for name, x in r["scores"][data].items())]
        for data in ("six", "aime24") for r in saved["rows"]]
    assert saved["rows"][1]["cache_mb"] < saved["rows"][0]["cache_mb"]


def test_one_window_has_no_table_of_windows_and_columns_come_as_asked(trained, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)                                                 # for the default of --json
    assert call(evaluate, *arguments("--model", trained / "base", "--data", "aime24", data / "six.jsonl", "--limit", 1,
                                     "--data-dir", data)) == 0
    main, everything = capsys.readouterr().out.rpartition("\nsaved: runs/eval-")[0].strip().split("\n\n")
    assert main.startswith("| arm | window | aime24 | six | average |") and main.count("\n") == 2
    assert everything.startswith("| data | arm | window | accuracy | truncated | tokens | evictions |")


def test_arms_have_names(trained, tmp_path, monkeypatch):
    """Runs that differ in the seed, in where they lie or what computed them are one arm; if in more, another."""
    monkeypatch.setattr(encoder, "read_adapter", lambda run, *_: read_safetensors(run + "/adapter.safetensors"))
    same = dict(seed=7, out="x", device="cuda", dtype="bfloat16", compile="on", save_every=7, sample_every=3,
                wandb=True)
    lora, slow = dict(adapter="lora"), dict(lr=1e-5)
    runs = [str(variant(trained, tmp_path / name, **changes)) for name, changes in {
        "pte": {}, "again": same, "slow": slow, "x/slow": slow | dict(seed=1), "x/pte": dict(lr=2e-5),
        "lora": lora | dict(window=0), "c": lora, "d": lora | dict(seed=3), "e": dict(adapter="global-only")}.items()]
    slow, third = f"PTE ({runs[2]})", f"PTE ({runs[4]})"
    named = ["PTE", "PTE", slow, slow, third, "LoRA", "LoRA_c", "LoRA_c", "global-only"]
    assert [(arm, run) for arm, _, run, _ in arms("", runs)] == [("no training", ""), *zip(named, runs)]
    assert [(arm, run) for arm, _, run, _ in arms("", [runs[0], runs[0] + "/"])][1:] == [("PTE", runs[0])]
    base = trained / "base"
    assert [found[:3] for found in arms(str(base), runs[:1])] == [("no training", str(base), ""),
                                                                  ("PTE", str(base), runs[0])]
    path = tmp_path / "again" / "base" / "model.safetensors"                    # of another seed: another base
    write_safetensors(path, {name: x + 1 for name, x in read_safetensors(path).items()})
    assert [arm for arm, _, run, _ in arms("", runs) if not run] == ["no training"] * 2
    other = variant(trained, tmp_path / "other", model=str(tmp_path / "again" / "base"))  # a model of its own
    assert [arm for arm, _, run, _ in arms("", [runs[0], str(other)]) if not run] == [
        "no training", f"no training ({other / '..' / 'again' / 'base'})".replace("other/../", "")]


def test_plot_draws_a_line_for_each_arm(trained, data, tmp_path, monkeypatch, capsys):
    argv = arguments("--runs", trained, "--data", data / "six.jsonl", "--limit", 2, "--window", "0,8", "--json",
                     tmp_path / "x.json", "--plot", tmp_path / "x.png")
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "find_spec", lambda name: None)
        assert "pip install matplotlib" in refusal(capsys, evaluate, *argv) and not [*tmp_path.iterdir()]
    package = ModuleType("matplotlib")
    package.__spec__, package.pyplot = ModuleSpec("matplotlib", None), MagicMock()
    monkeypatch.setitem(sys.modules, "matplotlib", package)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", package.pyplot)
    assert call(evaluate, *argv) == 0
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    for line, arm in zip(package.pyplot.errorbar.call_args_list, ("no training", "PTE"), strict=True):
        assert line.kwargs["label"] == arm
        assert [*line.args[0]] == sorted(row["cache_mb"] for row in rows if row["arm"] == arm)
    package.pyplot.savefig.assert_called_once_with(str(tmp_path / "x.png"))


# ---- work is not lost ------------------------------------------------------------------------------------------------
def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(trained, data, tmp_path):
    argv = arguments("--runs", trained, "--data", data / "six.jsonl", "--window", "0,8", "--samples", 2, "--batch", 2,
                     "--temperature", 1, "--limit", 4, "--max-new-tokens", 60)
    assert call(evaluate, *argv, "--json", tmp_path / "whole.json") == 0
    whole, killed, rng = (tmp_path / "whole.jsonl").read_bytes(), tmp_path / "killed.jsonl", Random(0)
    command = [sys.executable, evaluate.__file__, *map(str, argv), "--json", str(tmp_path / "killed.json")]
    for wanted in [*sorted(rng.sample(range(2, 13), 3)), None]:                 # of 1 + 4 * 4 lines
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if wanted:
            while process.poll() is None and not (killed.exists() and killed.read_bytes().count(b"\n") >= wanted):
                time.sleep(0.002)
            time.sleep(rng.random() * 0.03)
            process.kill()
        assert process.wait(timeout=60) == (-9 if wanted else 0)
        assert whole.startswith(killed.read_bytes()) and (killed.read_bytes() == whole) == (not wanted)
    for suffix in ("json", "md"):
        assert (tmp_path / f"killed.{suffix}").read_bytes() == (tmp_path / f"whole.{suffix}").read_bytes()


def test_a_torn_file_is_mended_and_nothing_whole_is_done_again(trained, data, tmp_path, monkeypatch):
    argv = arguments("--runs", trained, "--data", data / "six.jsonl", "--limit", 3, "--window", "0,8", "--samples", 2,
                     "--temperature", 1, "--batch", 4, "--max-new-tokens", 12, "--json")  # batches of 2 and 1 problems
    assert call(evaluate, *argv, tmp_path / "whole.json") == 0
    whole, rng, real, batches = (tmp_path / "whole.jsonl").read_bytes(), Random(0), rollout.generate, []

    def generate(*args, **settings):
        torn = tmp_path / "torn.jsonl"
        batches.append(torn.exists() and len(torn.read_bytes()[ends[0]:].splitlines()))  # records, before each batch
        return real(*args, **settings)
    monkeypatch.setattr(rollout, "generate", generate)
    ends = [found.end() for found in re.finditer(b"\n", whole)]
    assert len(ends) == 1 + 4 * 3
    for cut in [0, ends[0] - 1, *ends, ends[0] + 1, ends[4] - 1, *rng.sample(range(ends[0], ends[-1]), 3), -1]:
        torn, cut = (whole[:cut], cut) if cut >= 0 else (whole[:ends[4]] + b"\0\0\n" + whole[ends[4]:], ends[4])
        (tmp_path / "torn.jsonl").write_bytes(torn)
        for end in ("json", "md"):
            (tmp_path / f"torn.{end}").unlink(missing_ok=True)
        batches.clear()
        assert call(evaluate, *argv, tmp_path / "torn.json") == 0
        jobs, rest = divmod(max(sum(end <= cut for end in ends) - 1, 0), 3)
        assert batches == [0, 2, 3, 5, 6, 8, 9, 11][jobs * 2 + rest // 2:]
        for suffix in ("json", "jsonl", "md"):
            assert (tmp_path / f"torn.{suffix}").read_bytes() == (tmp_path / f"whole.{suffix}").read_bytes()


def test_results_of_other_settings_are_not_gone_on_with(trained, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = variant(trained, tmp_path / "run")
    copy(data / "six.jsonl", "mine.jsonl")
    argv = arguments("--runs", run, "--data", "mine.jsonl", "--limit", 2, "--samples", 2, "--temperature", 1, "--json",
                     "x.json")
    assert call(evaluate, *argv) == 0
    before = {name: Path(name).read_bytes() for name in ("x.json", "x.jsonl", "x.md")}

    def refused(word, *flags):
        said = refusal(capsys, evaluate, *argv, *flags)
        return "x.jsonl" in said and word in said and before == {name: Path(name).read_bytes() for name in before}
    for flags in ("--max-new-tokens 25", "--window 8", "--samples 3", "--temperature 2", "--seed 1", "--batch 5",
                  "--evict-ratio 0.25", "--limit 3"):
        assert refused(flags.split()[0][2:].replace("-", "_"), *flags.split()), flags
    assert refused("model", "--model", trained / "base")
    Path("mine.jsonl").write_text(Path("mine.jsonl").read_text().replace("527184", "527185"))
    assert refused("problems")
    copy(data / "six.jsonl", "mine.jsonl")
    copy(run / "adapter.safetensors", "kept")
    variant(trained, tmp_path / "noisy", noise=0.1)
    copy("noisy/adapter.safetensors", run)
    assert refused("models")
    copy("kept", run / "adapter.safetensors")
    monkeypatch.setattr(rollout, "generate", None)                              # nothing is left to do, only to show
    assert call(evaluate, *argv, "--pass-at", 2) == 0 and "six" not in Path("x.md").read_text()
    assert Path("x.jsonl").read_bytes() == before["x.jsonl"] and "| mine pass@2 |" in Path("x.md").read_text()
    Path("x.jsonl").unlink()
    before = {"x.json": Path("x.json").read_bytes()}
    assert "x.json exists" in refusal(capsys, evaluate, *argv) and Path("x.json").read_bytes() == before["x.json"]
    assert not Path("x.jsonl").exists()


