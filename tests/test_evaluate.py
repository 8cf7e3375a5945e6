"""evaluate.py: scores against brute force, what a model is asked, the hub (a fake one). The table: test_arms.py.

Models are as good as random here, and say so: where a score has to be more than 0, a text is right if the sum of its
characters is even (`coin`). How answers are compared: test_answers.py; mistakes on the command line: test_mistakes.py.
"""
import json
import sys
from fnmatch import fnmatch
from itertools import combinations, permutations
from pathlib import Path
from shutil import copy, copytree
from types import ModuleType

import numpy as np
import pytest
import torch

import encoder
import evaluate
import rollout
import train
from conftest import SMALL, call
from evaluate import grade, interval, majority, pass_at_k, scores
from model import UserError, read_safetensors
from train import write_safetensors

DIGITS = ["527184=", "12=", "903341,527184=", "7=", "4455=", "12="]             # two of one length; one comes twice


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two files of problems, `six` and `two`; the second is also the only one with a k of its own: AIME24."""
    here = tmp_path_factory.mktemp("data")
    for name, texts in (("six", DIGITS), ("aime24", DIGITS[:2])):
        (here / f"{name}.jsonl").write_text("".join(json.dumps({"problem": t, "answer": 3}) + "\n" for t in texts))
    return here


@pytest.fixture
def coin(monkeypatch):
    monkeypatch.setattr(evaluate, "grade", lambda problem, text: (text, sum(map(ord, text)) % 2 == 0))


def arguments(*flags):
    return ["--device", "cpu", "--max-new-tokens", 24, "--evict-ratio", 0.5, *flags]


def variant(run, to, noise=0.0, **changes):
    """A copy of a run with other settings in its config.json and noise in its adapter."""
    copytree(run, to)
    (to / "config.json").write_text(json.dumps(json.loads((run / "config.json").read_text()) | changes))
    torch.manual_seed(0)
    write_safetensors(to / "adapter.safetensors", {name: x + noise * torch.randn_like(x) for name, x in
                                                    read_safetensors(run / "adapter.safetensors").items()})
    return to


def refusal(capsys, module, *argv):
    """The one line with which a script refuses its arguments."""
    capsys.readouterr()
    assert call(module, *argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1, err
    return err


# ---- scores ----------------------------------------------------------------------------------------------------------
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_sample():
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = [any(subset) for subset in combinations([True] * c + [False] * (n - c), k)]
                assert pass_at_k(n, c, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


def said(*predictions, right=("1/2", "0.5", r"\frac12")):
    """Samples with these predictions, as `measure` grades them."""
    return [{"prediction": p, "correct": p in right, "truncated": p is None, "tokens": 10 * i, "evictions": i}
            for i, p in enumerate(predictions)]


@pytest.mark.parametrize("predictions, point", [
    (["1/2"], 1), (["3"], 0), (["1/2", "3"], 1 / 2), (["1/2", "3", "4"], 1 / 3), (["3", "4"], 0),
    (["1/2", "1/2", "3"], 1), (["1/2", "3", "3"], 0), (["1/2", "1/2", "3", "3", "4"], 1 / 2),
    ([None, None, "1/2"], 1), ([None, None], 0), ([None, None, "1/2", "3"], 1 / 2),
    (["3", "3", "1/2", "0.5", r"\frac12"], 1), (["3", "3", "1/2", "0.5"], 1 / 2),
    (["3", "3.0", "6/2", "1/2", "0.5"], 0),
    (["", "", "1/2"], 0)])                                                      # an empty box is an answer
def test_the_most_frequent_value_wins_in_any_order_and_spelling(predictions, point):
    for order in permutations(predictions):
        assert majority(said(*order)) == pytest.approx(point)


def test_which_k_are_measured():
    for n, k, wanted in ((1, 0, []), (1, 1, []), (2, 0, [2]), (3, 0, [2, 3]), (4, 1, [2, 4]), (5, 3, [2, 3, 4, 5]),
                         (16, 0, [2, 4, 8, 16]), (20, 16, [2, 4, 8, 16, 20])):
        assert [*scores(said(*["3"] * n), k)] == ["accuracy", *(f"pass@{k}" for k in wanted),
                                                  *(f"maj@{k}" for k in wanted), "truncated", "tokens", "evictions"]


def test_scores_of_one_problem():
    got = scores(said("3", "1/2", "3", None, "0.5"), 3)
    assert got == pytest.approx({
        "accuracy": 2 / 5, "pass@2": 1 - 3 / 10, "pass@3": 1 - 1 / 10, "pass@4": 1, "pass@5": 1,
        "maj@2": 1 / 2, "maj@3": 0, "maj@4": 0, "maj@5": 1 / 2, "truncated": 1 / 5, "tokens": 20, "evictions": 2})


def test_the_interval_covers_a_known_mean():
    """200 data sets of 60 problems at 30 %: about 95 in 100 intervals hold 30 %, misses fall on both sides."""
    rng = np.random.default_rng(1)
    found = [interval([rng.random(60) < 0.3]) for _ in range(200)]
    low, high = (sum(f(x) for x in found) for f in (lambda x: x[2] < 0.3, lambda x: x[1] > 0.3))
    assert 176 <= 200 - low - high <= 198 and low and high
    assert all(low <= mean <= high for mean, low, high in found)


def test_the_average_weighs_data_sets_alike_and_draws_within_each():
    rng = np.random.default_rng(2)
    x, y = rng.random(400), rng.random(100) < 0.5
    mean, low, high = interval([x, y])
    assert mean == pytest.approx((x.mean() + y.mean()) / 2)
    assert high - low == pytest.approx(2 * 1.96 * (x.var() / 400 + y.var() / 100) ** 0.5 / 2, rel=0.1)
    assert interval([np.zeros(9), np.ones(3)]) == [0.5, 0.5, 0.5] and interval([np.full(7, 0.25)]) == [0.25] * 3
    assert interval([x, y]) == [mean, low, high]                                # the same for the same numbers


@pytest.mark.parametrize("problem, response, wanted", [
    ({"answer": "042", "exact": True}, r"\boxed{42}", ("42", False)),
    ({"answer": "042", "exact": True}, r"\boxed{042}", ("042", True)),
    ({"answer": "042"}, r"\boxed{42}", ("42", True)), ({"answer": "042"}, "42", (None, False)),
    ({"answer": "1.6", "tolerance": 0.01}, r"\boxed{1.61}", ("1.61", True)),
    ({"answer": "1.6", "tolerance": 0.01}, r"\boxed{1.63}", ("1.63", False)),
    ({"answer": "1.6"}, r"\boxed{1.61}", ("1.61", False))])
def test_a_problem_says_how_strictly_it_is_graded(problem, response, wanted):
    assert grade(problem, response) == wanted


def test_only_minerva_is_graded_with_a_tolerance(tmp_path):
    for benchmark in rollout.BENCHMARKS.values():
        (tmp_path / benchmark.file).write_text('{"problem": "?", "answer": "1.6"}')
    loaded = {name: rollout.load_data(name, tmp_path, 0) for name in rollout.BENCHMARKS}
    assert [name for name, (p,) in loaded.items() if grade(p, r"\boxed{1.61}")[1]] == ["minerva"]
    assert not grade(*rollout.load_data(str(tmp_path / "minerva_math.jsonl"), "", 0), r"\boxed{1.61}")[1]


# ---- solve -----------------------------------------------------------------------------------------------------------
def solved(run, **settings):
    """[(index, solutions)] of DIGITS by a run's model."""
    model, encoder, tokenizer, _ = rollout.load("", run, "float32", "cpu")
    settings = dict(window=8, evict_ratio=0.5, max_new_tokens=24) | settings
    return [(i, texts) for i, texts, *_ in rollout.solve(model, encoder, tokenizer, [{"problem": t} for t in DIGITS],
                                                         **settings)]


def test_every_problem_once_longest_first_and_in_any_batch_the_same(trained):
    """Greedy. The long problem makes the short ones' rows be padded, and what ends early leaves the batch."""
    alone = solved(trained, batch=1)
    assert [i for i, _ in alone] == [2, 0, 4, 1, 5, 3]
    assert len({texts[0]["response"] for _, texts in alone}) > 1
    assert alone == solved(trained, batch=2) == solved(trained, batch=32)
    assert solved(trained, batch=4, samples=2) == [(i, texts * 2) for i, texts in alone]  # each to its own problem


@pytest.mark.parametrize("samples, batch, rows", [
    (1, 4, [4, 2]), (2, 4, [4, 4, 4]), (3, 4, [3] * 6), (5, 2, [2, 2, 1] * 6), (2, 99, [12])])
def test_a_batch_has_no_more_rows_than_asked_and_every_sample_is_drawn_anew(trained, monkeypatch, samples, batch, rows):
    real, seen = rollout.generate, []

    def generate(model, encoder, prompts, group, **settings):
        seen.append(len(prompts) * group)
        return real(model, encoder, prompts, group, **settings)
    monkeypatch.setattr(rollout, "generate", generate)
    found = solved(trained, samples=samples, batch=batch, temperature=1.0, max_new_tokens=40)
    assert seen == rows and all(len(texts) == samples for _, texts in found)
    said = [text["response"] for _, texts in found for text in texts]
    assert len(said) - len(set(said)) <= len(said) // 8                         # a text of one token may come again


@pytest.mark.parametrize("samples, batch, temperature", [(1, 2, 0), (1, 2, 1.0), (2, 4, 1.0), (3, 2, 1.0)])
def test_what_is_skipped_changes_nothing_of_the_rest(trained, samples, batch, temperature):
    settings = dict(samples=samples, batch=batch, temperature=temperature, max_new_tokens=12)
    whole = solved(trained, **settings)
    for skip in (0, 2, 4, 6):
        assert solved(trained, skip=skip, **settings) == whole[skip:]
    assert (solved(trained, seed=100, **settings) == whole) == (temperature == 0)


def test_what_is_known_of_a_solution(trained):
    solutions = [text for _, texts in solved(trained, samples=9, temperature=1.0) for text in texts]
    assert {text["truncated"] for text in solutions} == {True, False}
    for text in solutions:
        assert "<|end|>" not in text["response"] and 1 <= text["tokens"] <= 24
        assert not text["truncated"] or text["tokens"] == 24
        assert text["evictions"] == max(0, -(-(text["tokens"] - 1 - 8) // 4))   # 4 of 8 leave; the last is not written
    assert not any(text["evictions"] for _, texts in solved(trained, window=0) for text in texts)


# ---- the hub ---------------------------------------------------------------------------------------------------------
HUB = {  # name: (hub id, configuration, split), a row as it is there, and the answer it holds
    "math500": ("HuggingFaceH4/MATH-500 None test", dict(problem="?", solution="so", answer=r"\frac12"), r"\frac12"),
    "olympiadbench": ("Hothan/OlympiadBench OE_TO_maths_en_COMP train",
                      dict(question="?", solution=["so"], final_answer=["$2$", r"$\sqrt{3}$"]), r"2, \sqrt{3}"),
    "minerva": ("math-ai/minervamath None test", dict(question="?", answer="4.5e33"), "4.5e33"),
    "amc23": ("math-ai/amc23 None test", dict(id=0, question="?", answer="27"), "27"),
    "aime24": ("HuggingFaceH4/aime_2024 None train", dict(id=60, problem="?", solution="so", answer="204"), "204"),
    "aime25": ("math-ai/aime25 None test", dict(problem="?", answer="70", id="0"), "70"),
    "gsm8k": ("openai/gsm8k main test", dict(question="?", answer="48/2 = 24\n48+24 = 72\n#### 72"), "72")}


def fake(monkeypatch, name, **functions):
    module = ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("name", HUB)
def test_a_benchmark_without_a_file_comes_from_the_hub(tmp_path, monkeypatch, name):
    where, row, answer = HUB[name]
    assert rollout.BENCHMARKS.keys() == HUB.keys()

    def load_dataset(path, name=None, *, split):
        assert f"{path} {name} {split}" == where
        return [row, row, row]
    fake(monkeypatch, "datasets", load_dataset=load_dataset)
    problems = rollout.load_data(name, tmp_path, 2)
    assert [(p["problem"], p["answer"], p["data"]) for p in problems] == [("?", answer, name)] * 2
    monkeypatch.setitem(sys.modules, "datasets", None)                          # a file comes first
    (tmp_path / rollout.BENCHMARKS[name].file).write_text('{"problem": "1=", "answer": "1"}')
    assert [p["problem"] for p in rollout.load_data(name, tmp_path, 0)] == ["1="]


def test_a_hub_that_does_not_give_is_one_line(trained, tmp_path, monkeypatch, capsys):
    def broken(*_, **__):
        raise ConnectionError("no route\nto host")
    monkeypatch.chdir(tmp_path)
    data, model = ["--model", trained / "base", "--data", "gsm8k"], ["--model", "owner/name", "--data", "x.jsonl"]
    Path("x.jsonl").write_text('{"problem": "1=", "answer": "1"}')
    scripts = [(evaluate, model), (rollout, ["--model", "owner/name", "--prompt", "1="]), (train, model)]
    for name in ("datasets", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, name, None)                            # as if it were not installed
    said = refusal(capsys, evaluate, *data)
    assert "pip install datasets" in said and "openai/gsm8k" in said and "--data-dir" in said
    for script, argv in scripts:
        said = refusal(capsys, script, *argv)
        assert "pip install huggingface_hub" in said and "owner/name" in said
    fake(monkeypatch, "datasets", load_dataset=broken)
    fake(monkeypatch, "huggingface_hub", snapshot_download=broken)
    said = refusal(capsys, evaluate, *data)
    assert "openai/gsm8k" in said and "ConnectionError: no route" in said
    for script, argv in scripts:
        said = refusal(capsys, script, *argv)
        assert "owner/name" in said and "ConnectionError: no route" in said
    fake(monkeypatch, "datasets", load_dataset=lambda *_, **__: [{"question": "?"}])
    assert "openai/gsm8k" in refusal(capsys, evaluate, *data) and [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


def test_a_model_comes_from_the_hub_for_every_script(trained, data, tmp_path, monkeypatch, capsys):
    """Only config, tokenizer and safetensors files are fetched, and they are enough."""
    monkeypatch.chdir(tmp_path)
    asked = []

    def snapshot_download(repo_id, allow_patterns):
        def fetched(name):
            return any(fnmatch(name, pattern) for pattern in allow_patterns)
        asked.append(repo_id)
        assert all(map(fetched, "config.json generation_config.json tokenizer.json tokenizer_config.json "
                       "model.safetensors model-00001-of-00002.safetensors model.safetensors.index.json".split()))
        assert not any(map(fetched, "pytorch_model.bin pytorch_model.bin.index.json original/consolidated.00.pth "
                           "README.md original/params.json onnx/model.onnx training_args.bin tf_model.h5".split()))
        Path("fetched").mkdir(exist_ok=True)
        for file in (trained / "base").iterdir():
            if fetched(file.name):
                copy(file, "fetched")
        return "fetched"
    fake(monkeypatch, "huggingface_hub", snapshot_download=snapshot_download)
    hub = ["--model", "owner/name-1.5B"]
    assert call(rollout, *hub, "--raw", "--prompt", "12=", "--max-new-tokens", 9) == 0
    assert call(train, *SMALL, "--steps", 1, "--max-new-tokens", 9, *hub, "--data", data / "six.jsonl") == 0
    assert call(evaluate, *arguments(*hub, "--data", data / "six.jsonl", "--json", "a.json")) == 0
    assert len(asked) == 3                                                      # then: the run knows where its model is
    run = ["--runs", "runs/name-1.5B-pte-0"]
    assert call(evaluate, *arguments(*run, "--data", data / "six.jsonl", "--json", "b.json")) == 0
    assert set(asked) == {"owner/name-1.5B"} and len(asked) > 3
    rows = [json.loads(Path(name).read_text())["rows"] for name in ("a.json", "b.json")]
    assert rows[0][0]["scores"] == rows[1][0]["scores"] and rows[1][1]["arm"] == "PTE"


def test_a_name_that_is_no_id_is_not_asked_for(tmp_path, monkeypatch):
    """A folder that is there, a path, a name of one part: the hub has none of them."""
    fake(monkeypatch, "huggingface_hub", snapshot_download=None)
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    for name in ("owner/name", "/owner/none", "./owner/none", "../x", "none", "a/b/c", "owner/none/"):
        with pytest.raises(UserError):
            rollout.load(name, "", "float32", "cpu")
