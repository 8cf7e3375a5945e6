"""evaluate.py: scores against brute force, problem files, arms, the table, and resuming.

The models are as good as random: where a score has to be more than 0, a sum of the characters
decides what a text has answered, and how well (`coin`). How answers are compared: test_answers.py.
"""
import json
from itertools import combinations, permutations
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace

import numpy as np
import pytest

import evaluate
from conftest import CONFIG, tiny_encoder, tiny_model
from encoder import save_adapter
from evaluate import (BENCHMARKS, ProblemFile, append, evaluation_args, evictions_survived,
                      find_arms, grade, interval, load_problems, load_set, majority, open_locked,
                      pass_at_k, problem_ids, problem_scores)
from model import UserError, read_safetensors, write_json, write_safetensors

DIGITS = ["527184=", "12=", "903341,527184=", "7=", "4455=", "12="]

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two files of problems, six.jsonl and aime24.jsonl; the second one has a k of its own."""
    folder = tmp_path_factory.mktemp("data")
    for name, texts in (("six", DIGITS), ("aime24", DIGITS[:2])):
        more = {"parts": [0, 5]} if name == "six" else {}       # the tokens that hold the parts
        rows = [json.dumps({"problem": text, "answer": "00", **more}) for text in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    return folder

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of a random model, with 40 tokens: 38 characters and two end tokens."""
    run = tmp_path_factory.mktemp("run")
    config = {"model": "tiny", "adapter": "pte", "memory_order": "keys-match", "rank": 4,
              "memory_update": "delta", "memory_keys": "rotated", "alpha": 6.0,
              "global_tokens": 6, "window": 8, "evict_ratio": 0.5, "max_new_tokens": 24,
              "seed": 0, "sft_steps": 0, "steps": 3}
    model = tiny_model()
    base = run / "base"
    base.mkdir()
    write_json(base / "config.json", CONFIG)
    write_safetensors(base / "model.safetensors", model.tensors())
    vocab = {chr(ord("0") + i): i for i in range(38)}           # 0 ... 9 : ; < = > ? @ A ... U
    vocab[","] = vocab.pop("U")
    ends = [{"id": i, "content": f"<|{i}|>", "special": True} for i in (38, 39)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    write_json(base / "tokenizer.json", {
        "added_tokens": ends, "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []}})
    write_json(run / "config.json", config)
    save_adapter(run, tiny_encoder(model, memory_update="delta"), config)
    return run

@pytest.fixture
def coin(monkeypatch):
    def grade(problem, text, grader):
        n = sum(map(ord, text))
        return f"{n % 2}{n % 3}" + "0" * (n % 5 == 0), n % 2 == 0
    monkeypatch.setattr(evaluate, "grade", grade)

def variant(run, to, **changes):
    """A copy of a run with other settings in its config.json."""
    copytree(run, to)
    config = json.loads((run / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | changes))
    return to

SMALL = dict(max_new_tokens=24, device="cpu", grader="builtin", evict_ratio=0.5)

def compare(runs, data, **settings):
    """evaluate.compare for settings as a dict."""
    argv = []
    for name, value in dict(runs=runs, data=data, **settings).items():
        values = value if isinstance(value, (list, tuple)) else [value]
        argv += ["--" + name.replace("_", "-"), *map(str, values)] if values else []
    return evaluate.compare(evaluate.evaluation_args(argv))

# ---- scores

def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_sample():
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations([True] * c + [False] * (n - c), k))
                share = sum(any(subset) for subset in subsets) / len(subsets)
                assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)

def said(*predictions):
    return [{"prediction": p, "correct": p in ("1/2", "0.5", r"\frac12"), "truncated": p is None,
             "tokens": 10 * i, "evictions": i, "cache_mb": 2.5} for i, p in enumerate(predictions)]

def test_the_most_frequent_value_wins_in_any_order_and_spelling():
    for predictions, point in [
            (["1/2"], 1), (["3"], 0), (["1/2", "3"], 1 / 2), (["1/2", "3", "4"], 1 / 3),
            (["3", "4"], 0), (["1/2", "1/2", "3"], 1), (["1/2", "3", "3"], 0),
            (["1/2", "1/2", "3", "3", "4"], 1 / 2), ([None, None, "1/2"], 1), ([None, None], 0),
            (["3", "3", "1/2", "0.5", r"\frac12"], 1), (["3", "3.0", "6/2", "1/2", "0.5"], 0)]:
        for order in permutations(predictions):
            assert majority(said(*order)) == pytest.approx(point)

def test_scores_of_one_problem():
    got = problem_scores(said("3", "1/2", "3", None, "0.5"), 3)
    assert got == pytest.approx({"accuracy": 2 / 5, "pass@3": 1 - 1 / 10, "maj@3": 0,
                                 "truncated": 1 / 5, "tokens": 20, "evictions": 2, "cache_mb": 2.5})
    assert "pass@1" not in problem_scores(said("3"), 1)

def test_evictions_are_counted_from_the_one_that_takes_the_token():
    for window, size in [(8, 2), (4, 4), (3, 1), (0, 0)]:
        counts = [0] * 40                                       # for each of the tokens so far
        cached = []
        for now in range(40):
            found = [evictions_survived(token, now, window, size) for token in range(now)]
            assert found == counts[:now]
            if window and len(cached) == window:                # room is made for token `now`
                cached = cached[size:]
                counts = [n + (i not in cached and i < now) for i, n in enumerate(counts)]
            cached.append(now)

def test_the_interval_covers_a_known_mean():
    """200 data sets of 60 problems at 30 %: about 95 in 100 intervals hold 30 %."""
    rng = np.random.default_rng(1)
    found = [interval([rng.random(60) < 0.3]) for _ in range(200)]
    misses = [mean for mean, low, high in found if not low <= 0.3 <= high]
    assert 2 <= len(misses) <= 24
    assert all(low <= mean <= high for mean, low, high in found)

def test_the_average_weighs_data_sets_alike():
    x = np.random.default_rng(2).random(400)
    y = np.arange(100) % 2
    mean, low, high = interval([x, y])
    assert mean == pytest.approx((x.mean() + y.mean()) / 2)
    assert high - low == pytest.approx(1.96 * (x.var() / 400 + y.var() / 100) ** 0.5, rel=0.1)
    assert interval([np.zeros(9), np.ones(3)]) == [0.5, 0.5, 0.5]

def test_a_problem_says_how_strictly_it_is_graded():
    for changes, response, wanted in [
            ({"exact": True}, r"\boxed{42}", ("42", False)), ({}, r"\boxed{42}", ("42", True)),
            ({"exact": True}, r"\boxed{042}", ("042", True)), ({}, "42", (None, False)),
            ({"tolerance": 0.1}, r"\boxed{43}", ("43", True)), ({}, r"\boxed{43}", ("43", False))]:
        assert grade({"answer": "042", "tolerance": 0} | changes, response, "builtin") == wanted

# ---- problems

def test_a_problem_file(tmp_path):
    path = tmp_path / "x.jsonl"
    for row, problem, answer in [
            ({"problem": "1+1", "answer": 2}, "1+1", "2"),
            ({"question": "?", "answer": 0, "tolerance": 0.1}, "?", "0"),
            ({"prompt": "?", "answer": "48/2 = 24\n#### 72"}, "?", "72"),
            ({"prompt": "?", "answer": r"\boxed{\frac{1}{2}}"}, "?", r"\frac{1}{2}"),
            ({"question": "?", "final_answer": ["$2$", r"$\sqrt{3}$"]}, "?", r"2, \sqrt{3}")]:
        path.write_text("\ufeff" + json.dumps(row) + "\n\n", encoding="utf-8")
        found, = load_problems(path)
        found = found["problem"], found["answer"], found["tolerance"]
        assert found == (problem, answer, row.get("tolerance", 0))

@pytest.mark.parametrize("text, words", [
    ("", "holds no problems"), ("{}\n", "line 1 JSON"), ("\n[1]", "line 2 JSON"),
    ('{"problem": "1"}', "line 1"), ('{"problem": "1", "answer": "5 ####"}', "line 1"),
    ('{"problem": "1", "answer": 1}\n{"pro', "line 2 JSON"), ("[" * 99_999, "line 1"),
    ('{"problem": 1, "answer": 1}', "line 1"), ('{"problem": "1", "answer": null}', "line 1"),
    ('{"problem": "1", "answer": NaN}', "line 1"), ('{"problem": "1", "answer": []}', "line 1"),
    ('{"problem": "1", "answer": "\\\\boxed{}"}', "line 1"),
    ('{"problem": "1", "answer": 5, "tolerance": "x"}', "line 1 tolerance"),
    ('{"problem": "1", "answer": 5, "tolerance": 5}', "line 1 tolerance"),
    ('{"prompt": [{"role": "user"}], "ground_truth": 1}', "prompt, ground_truth 'problem'"),
    ('{"problem": "1", "solution": "1"}', "problem, solution 'answer'")])
def test_a_bad_problem_file_is_refused(tmp_path, text, words):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(UserError) as refusal:
        load_problems(path)
    assert all(word in str(refusal.value) for word in [str(path), *words.split()])

def test_a_problem_file_is_a_task(data):
    task = ProblemFile(data / "six.jsonl")
    task.problems = list(range(6))
    steps = [task.batch(step, 4, seed=0) for step in range(6)]                  # 4 rounds
    order = sum(steps, [])
    for i in range(0, 24, 6):
        assert sorted(order[i:i + 6]) == list(range(6))
    assert order[:6] != order[6:12] and steps[4] == task.batch(4, 4, seed=0)
    assert [task.batch(step, 4, seed=1) for step in range(6)] != steps
    assert task.reward({"answer": "3", "tolerance": 0}, r"\boxed{3.0}", 9, True) == 1.0
    assert task.reward({"answer": "3", "tolerance": 0}, r"\boxed{4}", 9, True) == 0.0

def test_each_benchmark_has_samples_and_tolerance_of_its_own(tmp_path):
    right = []
    for name, (file, *_) in BENCHMARKS.items():
        (tmp_path / file).write_text('{"problem": "?", "answer": "1.6"}\n' * 3)
        flags = ["--data-dir", str(tmp_path), "--limit", "2"]
        short, found = load_set(name, evaluation_args(flags))
        several = "aime" in name
        assert short == name and len(found.problems) == 2
        assert (found.n_samples, found.k) == ((16, 16) if several else (1, 1))
        assert found.temperature == (0.6 if several else 0)
        if grade(found.problems[0], r"\boxed{1.61}", "builtin")[1]:
            right.append(name)
    assert right == ["minerva"]
    with pytest.raises(UserError, match="--data-dir"):
        load_set("gsm8k", evaluation_args([]))

def test_the_prompt_of_a_problem():
    """The template given, else a request for a box, but the bare problem to a base model."""
    for format_of_model, template, wanted in [
            ("chat", "", "1+1\nPlease reason step by step, and put your final answer within "
             "\\boxed{}."), ("", "", "1+1"), ("", "Q: {problem}\nA:", "Q: 1+1\nA:")]:
        tokenizer = SimpleNamespace(template=format_of_model, prompt=lambda text: text)
        assert problem_ids(tokenizer, {"problem": "1+1"}, template) == wanted

# ---- arms and the table

def test_arms_have_names(trained, tmp_path):
    pte = variant(trained, tmp_path / "pte")
    again = variant(trained, tmp_path / "again", seed=7, out="x", device="cuda")
    full = variant(trained, tmp_path / "full", adapter="lora", window=0)
    lora_c = variant(trained, tmp_path / "lora_c", adapter="lora")
    other = variant(trained, tmp_path / "other", adapter="global-only")
    sums = variant(trained, tmp_path / "sum", memory_update="sum", memory_order="paper")
    empty = variant(trained, tmp_path / "empty", global_tokens=0, memory_keys="plain")
    taught = variant(trained, tmp_path / "taught", sft_steps=2, steps=0)
    both = variant(trained, tmp_path / "both", sft_steps=2)
    runs = [pte, again, full, lora_c, other, sums, empty, taught, both]
    arms = find_arms(str(trained / "base"), runs)
    assert [name for name, _ in arms.values()] == [
        "no training", "PTE", "PTE", "LoRA", "LoRA_c", "global-only",
        "PTE, paper's order, sum update", "PTE, no global tokens, plain keys", "PTE, SFT", "PTE, SFT and GRPO"]
    assert [name for name, _ in find_arms("", [pte]).values()] == ["no training", "PTE"]
    narrow = variant(trained, tmp_path / "narrow", window=4)
    with pytest.raises(UserError, match="differ in window"):    # no seeds of one arm
        find_arms("", [pte, narrow])
    seeds = [variant(trained, tmp_path / str(i), seed=i, base_hash=str(i)) for i in range(2)]
    names = [name for name, _ in find_arms("", seeds).values()]
    assert names == ["no training", "no training", "PTE", "PTE"]    # each tiny seed has its base

@pytest.fixture
def table(trained, data, tmp_path, coin):
    """Two runs that differ in the seed, two data sets, two windows -> (JSON, Markdown, records)."""
    other = variant(trained, tmp_path / "other", seed=1)
    path = tmp_path / "table.json"
    text = compare([trained, other], [data / "six.jsonl", "aime24"], data_dir=data, samples=3,
                   window=(0, 8), json=path, temperature=1.0, **SMALL)
    lines = path.with_suffix(".jsonl").read_text().splitlines()
    return json.loads(path.read_text()), text, [json.loads(line) for line in lines]

def test_every_number_of_the_table_is_that_of_the_records(table):
    saved, text, (first, *records) = table
    assert saved["grader"] == "builtin" and first == saved["settings"]
    for row in saved["rows"]:
        assert [*row] == "arm window models scores cache_mb memory_mb average by_evictions".split()
        mine = [r for r in records if (r["arm"], r["window"]) == (row["arm"], row["window"])]
        assert len(mine) == len(row["models"]) * 3 * 8
        means = []
        for name, score in (("six", "accuracy"), ("aime24", "pass@3")):
            right = np.array([r["correct"] for r in mine if r["data"] == name])
            assert row["scores"][name]["accuracy"][0] == pytest.approx(right.mean())
            means.append(row["scores"][name][score][0])
        for r in mine:
            parts = [x == "0" and len(r["prediction"]) == 2 for x in r["prediction"][:2]]
            assert r.get("parts", parts) == parts and ("parts" in r) == (r["data"] == "six")
        parts = np.array([r["parts"] for r in mine if "parts" in r])            # (n, 2)
        found = [row["scores"]["six"][name][0] for name in ("sums", "sum-1", "sum-2")]
        assert found == pytest.approx([parts.mean(), *parts.mean(axis=0)])
        assert "sums" not in row["scores"]["aime24"] and 0 < parts.mean() < 1
        assert row["average"][0] == pytest.approx(np.mean(means))
        assert row["cache_mb"] == max(r["cache_mb"] for r in mine)
        shown = "{:.1f} ({:.1f}-{:.1f})".format(*[100 * x for x in row["average"]])
        lines = [line for line in text.split("\n") if line.startswith(f"| {row['arm']} |")]
        assert any(shown in line for line in lines)
    arms = [(row["arm"], row["window"], len(row["models"])) for row in saved["rows"]]
    assert [arm for arm in arms if arm[0] == "PTE"] == [("PTE", 0, 2), ("PTE", 8, 2)]
    assert saved["rows"][1]["cache_mb"] < saved["rows"][0]["cache_mb"]
    assert "aime24 pass@3" in text

def test_a_sample_depends_on_its_seed_alone(table, trained, data, tmp_path, coin):
    def responses(name, **changes):
        path = tmp_path / f"{name}.json"
        settings = SMALL | dict(window=[8], samples=3, temperature=1.0) | changes
        compare([trained], [data / "six.jsonl"], json=path, **settings)
        lines = path.with_suffix(".jsonl").read_text().splitlines()[1:]
        records = [json.loads(line) for line in lines]
        assert all(r["tokens"] == 24 for r in records if r["truncated"])
        assert all(r["evictions"] == max(0, -(-(r["tokens"] - 1 - 8) // 4)) for r in records)
        return {(r["model"], r["number"], r["sample"]): r["response"] for r in records}
    whole = responses("whole")
    assert responses("batches", batch=4) == whole != responses("seed", seed=1)
    assert len(set(whole.values())) > len(whole) / 3
    assert responses("fewer", samples=2).items() <= whole.items()

def test_work_is_not_lost_nor_done_twice(trained, data, tmp_path, coin, monkeypatch):
    calls = []
    generate = evaluate.generate

    def counted(model, encoder, prompts, **settings):
        calls.append(len(prompts))
        return generate(model, encoder, prompts, **settings)
    monkeypatch.setattr(evaluate, "generate", counted)
    path = tmp_path / "x.json"

    def run(**changes):
        calls.clear()
        settings = SMALL | dict(window=[8], batch=4, json=path) | changes
        return compare([trained], [data / "six.jsonl"], **settings)

    def contents(lines):
        """{key: response}; the memory of a sample depends on the others in its batch."""
        records = [json.loads(line) for line in lines.splitlines()[1:]]
        return {evaluate.key(record): record["response"] for record in records}
    text = run()
    whole = path.with_suffix(".jsonl").read_bytes()
    assert calls == [4, 2, 4, 2] and whole.count(b"\n") == 13
    rng = np.random.default_rng(0)
    first = whole.index(b"\n") + 1
    for cut in [0, 5, first, *rng.integers(first, len(whole), 6), len(whole)]:
        path.unlink()
        path.with_suffix(".jsonl").write_bytes(whole[:cut])
        n_records = max(whole[:cut].count(b"\n") - 1, 0)
        assert run() == text and sum(calls) == 12 - n_records
        assert contents(path.with_suffix(".jsonl").read_bytes()) == contents(whole)
    path.with_suffix(".jsonl").write_bytes(whole + whole[first:])       # a repeated key counts once
    assert run() == text and calls == []
    for changes in (dict(seed=1), dict(max_new_tokens=25), dict(samples=2, temperature=1.0),
                    dict(limit=3), dict(evict_ratio=0.25)):
        with pytest.raises(UserError, match="results of other settings"):
            run(**changes)
    run(window=[8, 0])                                         # another window is just added
    assert sum(calls) == 12
    changed = variant(trained, tmp_path / "changed")            # its adapter is trained further
    settings = SMALL | dict(window=[8], json=tmp_path / "y.json")
    for scale in (1, 2):
        weights = read_safetensors(changed / "adapter.safetensors")
        weights = {name: scale * tensor.clone() for name, tensor in weights.items()}
        write_safetensors(changed / "adapter.safetensors", weights)
        calls.clear()
        compare([changed], [data / "six.jsonl"], **settings)
        assert sum(calls) == (12 if scale == 1 else 6)          # not its base again
    with open_locked(path.with_suffix(".jsonl")):               # another process is at it
        with pytest.raises(UserError, match="another process"):
            run()
    path.with_suffix(".jsonl").write_text("notes\n")
    with pytest.raises(UserError, match="something else"):
        run()
    path.with_suffix(".jsonl").unlink()
    with pytest.raises(UserError, match="x.json"):
        run()

def test_a_full_disk_is_named():
    if Path("/dev/full").exists():
        with pytest.raises(UserError, match="/dev/full: No space left on device"):
            append("/dev/full", [{"x": 1}])

@pytest.mark.parametrize("settings, words", [
    (dict(runs=[]), "--model --runs"), (dict(data=[]), "math500"), (dict(batch=0), "--batch 1"),
    (dict(window=[3]), "window 3"), (dict(samples=4, temperature=0.0), "--samples --temperature"),
    (dict(samples=4, pass_at=16), "--pass-at --samples"), (dict(json="x.txt"), "x.txt .json"),
    (dict(max_new_tokens=9999), "six.jsonl, line 1 9999"),
    (dict(runs=["nowhere"]), "nowhere/config.json"), (dict(limit=-1), "--limit 0"),
    (dict(prompt_template="x"), "--prompt-template {problem}"),
    (dict(temperature="nan"), "--temperature"), (dict(json="table.json"), "table.json new")])
def test_mistakes_are_refused(trained, data, tmp_path, monkeypatch, settings, words):
    monkeypatch.chdir(tmp_path)
    Path("table.md").write_text("somebody's")
    with pytest.raises(UserError) as refusal:
        compare(**(SMALL | dict(runs=[trained], data=[data / "six.jsonl"]) | settings))
    assert all(word in str(refusal.value) for word in words.split())

def test_curves_are_means_over_runs_and_bins_of_20_steps(tmp_path):
    arms = {}
    for seed, accuracy in enumerate((0.2, 0.6)):
        run = tmp_path / str(seed)
        run.mkdir()
        rows = [{"step": step, "K": 2, "accuracy": accuracy} for step in range(1, 41)]
        append(run / "metrics.jsonl", [{"step": 0, "K": 2, "phase": "sft"}, *rows])
        arms[str(run)] = ("PTE", {"seed": seed})
    arms["base"] = ("no training", None)
    first, second, base = evaluate.learning_curves(arms)
    assert base == {} and list(first) == ["PTE, K = 2"]
    curve = evaluate.mean_curve([first["PTE, K = 2"], second["PTE, K = 2"]])
    assert curve == pytest.approx({20: 0.4, 40: 0.4})
    title, line = evaluate.text_chart("accuracy", {"PTE": curve}).splitlines()
    assert title.split() == ["accuracy", "20", "40"] and line.split() == ["PTE", "40", "40"]
