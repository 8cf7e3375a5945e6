"""The three scripts as a person uses them: what they write and print. (Mistakes: test_mistakes.py)"""
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from shutil import copytree

import pytest
import torch

import evaluate
import grpo
import rollout
import train
from conftest import SMALL, call, lines
from grpo import group_advantages
from model import read_safetensors
from rollout import command_line

METRICS = ("step reward accuracy response_tokens truncated evictions loss grad_norm logp_gap ratio_clipped kl "
           "skipped tokens_per_second peak_memory_mb seconds").split()


def adapter(run):
    """All numbers of a run's adapter, one after the other."""
    return torch.cat([x.flatten() for _, x in sorted(read_safetensors(run / "adapter.safetensors").items())])


def test_what_a_run_writes(trained):
    config = json.loads((trained / "config.json").read_text())
    assert config.keys() == {f.name for f in fields(train.Config)} - {"resume", "merge"} | {
        "fingerprint", "problems"} and config["window"] == 8
    assert [m["step"] for m in lines(trained / "metrics.jsonl")] == [1, 2]
    for m in lines(trained / "metrics.jsonl"):
        assert [*m] == METRICS
        assert m["evictions"] > 0 and 0 <= m["logp_gap"] < 1e-4 and m["seconds"] > 0
    samples = lines(trained / "samples.jsonl")
    assert {s["step"] for s in samples} == {1, 2}
    assert all(s.keys() == {"step", "prompt", "response", "answer", "reward"} for s in samples)
    table = json.loads((trained / "table.json").read_text())
    assert [(row["arm"], row["window"]) for row in table["rows"]] == [
        ("no training", 0), ("no training", 8), ("PTE", 0), ("PTE", 8)]
    assert all([*row["scores"]] == ["tally-1", "tally-2", "tally-3"] for row in table["rows"])
    assert len(table["problems"]) == 4 * 3 * 4 and len(lines(trained / "tally-2.jsonl")) == 4
    assert (trained / "table.md").read_text().startswith("| arm | window | tally-1 | tally-2 | tally-3 | average |")


def train_on_file(trained, problems, out, *flags):
    """Trains on a file; half of all texts count as right, so that there is something to learn from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "grade", lambda problem, text: (text, sum(map(ord, text)) % 2 == 0))
        assert call(train, *SMALL, "--warmup", 0, "--group-size", 6, "--model", trained / "base", "--data", problems,
                    "--out", out, *flags) == 0
    return out


@pytest.fixture(scope="session")
def plain(trained, problems, tmp_path_factory):
    return train_on_file(trained, problems, tmp_path_factory.mktemp("runs") / "plain")


@pytest.mark.parametrize("flags", [
    "--adapter lora", "--adapter no-global", "--adapter global-only", "--memory-update sum", "--truncate-memory 1",
    "--loss dr_grpo", "--loss dapo --overlong-buffer 20", "--kl-coef 0.1",
    "--inner-epochs 2 --clip-low 1e-4 --clip-high 1e-4"])
def test_every_variant_trains_and_makes_a_difference(trained, problems, plain, tmp_path, flags):
    run = train_on_file(trained, problems, tmp_path / "run", *flags.split())
    assert not (run / "base").exists() and not (run / "table.json").exists()
    for m in lines(run / "metrics.jsonl"):
        assert [*m] == METRICS and m["evictions"] > 0 and m["logp_gap"] < 1e-4 and m["grad_norm"] > 0
        assert (m["kl"] > 0) == ("kl" in flags)
        assert (m["ratio_clipped"] > 0) == ("epochs" in flags)
    mine, usual = adapter(run), adapter(plain)
    assert len(mine) < len(usual) if "lora" in flags else (mine - usual).abs().max() > 1e-6  # fails for nan, too


def test_a_seed_repeats_a_run_bit_for_bit(trained, problems, plain, tmp_path):
    again = train_on_file(trained, problems, tmp_path / "again")
    other = train_on_file(trained, problems, tmp_path / "other", "--seed", 1)
    assert torch.equal(adapter(again), adapter(plain)) and not torch.equal(adapter(other), adapter(plain))
    assert lines(again / "samples.jsonl") == lines(plain / "samples.jsonl") != lines(other / "samples.jsonl")


def test_the_seed_reaches_problems_and_draws(trained, problems, tmp_path):
    first, second = (next(train.batches(train.Config(seed=seed), None)) for seed in (0, 1))
    assert first != second
    one = tmp_path / "one.jsonl"  # one problem, and a fresh adapter changes nothing: only the draws can differ
    one.write_text(problems.read_text().splitlines()[0])
    runs = [train_on_file(trained, one, tmp_path / seed, "--seed", seed, "--steps", 1) for seed in "01"]
    assert lines(runs[0] / "samples.jsonl") != lines(runs[1] / "samples.jsonl")


@pytest.mark.parametrize("thoughts", [24, 0])
def test_micro_batches_change_memory_and_not_the_result(thoughts, trained, problems, plain, tmp_path):
    small = train_on_file(trained, problems, tmp_path / "small", "--micro-batch", thoughts)
    for a, b in zip(lines(small / "metrics.jsonl"), lines(plain / "metrics.jsonl")):
        for name in ("reward", "loss", "grad_norm"):  # AdamW would hide a gradient of the wrong length
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6)
    assert (adapter(small) - adapter(plain)).abs().mean() < 1e-6  # where a gradient is 1e-9, AdamW's first step is all


def graded(trained, texts, **changes):
    """One train_step on given completions of one tally whose answer is 042; " cut" marks one that did not end.
    -> {"rewards", "use_std": as group_advantages got it, "total": as backward got it}"""
    model, encoder, tokenizer, _ = rollout.load("", trained, "float32", "cpu")
    rows = [tokenizer.encode(text.removesuffix(" cut")) + [14] * (not text.endswith(" cut")) for text in texts]
    made = rollout.Rollout(
        prompt_ids=torch.ones(1, 2), prompt_lengths=torch.tensor([2]), prompt_of=torch.zeros(len(rows)).long(),
        tokens=torch.tensor([row + [14] * (40 - len(row)) for row in rows]), logps=torch.zeros(len(rows), 40),
        lengths=torch.tensor([len(row) for row in rows]), ended=torch.tensor([row[-1:] == [14] for row in rows]),
        window=0, evict_size=0, n_ids=15)
    seen, nothing = {}, dict(loss=0, clipped=0, kl=0, gap=0, tokens=1)

    def advantages(rewards, group_size, **keywords):
        seen.update(rewards=rewards.tolist(), **keywords)
        return group_advantages(rewards, group_size, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "generate", lambda *_, **__: made)
        patch.setattr(grpo, "group_advantages", advantages)
        patch.setattr(grpo, "backward", lambda *_, **k: seen.update(total=k["total"]) or nothing)
        c = train.Config(group_size=len(rows) // 2, max_new_tokens=40, **changes)
        grpo.train_step(c, 0, model, encoder, tokenizer, torch.optim.AdamW(encoder.trainable().values()),
                        [{"problem": "12=", "answer": "042", "exact": True}] * 2, grpo.Health(4096))
    return seen


PAID = {"Answer:042": 1, "12=;3Answer:7;Answer:042": 1, "Answer:042 cut": 0, "Answer:042;": 0, "Answer:0421": 0,
        "Answer:42": 0, "Answer:0420": 0, "Answer:04": 0, "Answer:": 0, "042": 0, "": 0, "Answer:042;Answer:": 0}


def test_tally_pays_for_the_exact_answer_and_nothing_else(trained):
    assert dict(zip(PAID, graded(trained, PAID)["rewards"])) == PAID


def test_each_loss_divides_as_it_should(trained):
    lengths = [5, 13, 4, 6, 6, 4, 6, 4, 2, 4, 1, 7]  # of PAID: `Answer:` is one token, the end another
    for loss, use_std, total in (("grpo", True, sum(lengths)), ("dr_grpo", False, 12 * 40),
                                 ("dapo", True, sum(lengths[:6]))):  # in the second group none is right
        seen = graded(trained, PAID, loss=loss)
        assert seen["use_std"] == use_std and seen["total"] == total
    rewards = graded(trained, PAID, loss="dapo", overlong_buffer=30)["rewards"]
    assert rewards[1] == pytest.approx(1 - 3 / 30) and rewards[4] == 0


def test_rollout_prints_the_completion_and_nothing_else(trained, capsys):
    model, encoder, tokenizer, _ = rollout.load("", trained, "float32", "cpu")
    saved = read_safetensors(trained / "adapter.safetensors")
    assert all(torch.equal(p, saved[name]) for name, p in encoder.tensors().items())
    for seed in range(100):  # until one ends by itself after two evictions
        want = rollout.generate(model, encoder, [tokenizer.encode("12=")], max_new_tokens=30, window=8, evict_ratio=0.5,
                                n_ids=15, seed=seed, temperature=0.7)
        if want.ended and want.evictions() >= 2:
            break
    argv = ["--run", trained, "--prompt", "12=", "--raw", "--max-new-tokens", 30, "--seed", seed, "--show-evictions"]
    assert call(rollout, *argv) == 0
    out, err = capsys.readouterr()
    assert out == tokenizer.decode(want.completions()[0][:-1]) + "\n"
    assert err.count("[-4]") == want.evictions() and "tokens/s" in err and " MB" in err


def test_rollout_takes_a_raw_prompt_as_it_is(trained, tmp_path, capsys):
    folder = copytree(trained / "base", tmp_path / "base")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}=")
    said = []
    for argv in (["12"], ["12=", "--raw"], ["12", "--raw"]):  # without --max-new-tokens: the default fits too
        assert call(rollout, "--model", folder, "--prompt", *argv) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


CONTRACT = {  # the flags that the project promises, with a value that is no default
    train: "preset=24gb model=DIR data=F adapter=lora window=8 evict-ratio=0.5 rank=3 global-tokens=5 prompts=7 "
           "group-size=9 max-new-tokens=11 steps=13 lr=0.5 micro-batch=15 seed=17 device=cpu dtype=float32 out=RUN",
    rollout: "model=DIR run=RUN prompt=hi window=8 max-new-tokens=9 evict-ratio=0.5 temperature=0.0 dtype=bfloat16",
    evaluate: "model=DIR runs=R1,R2 data=F window=8,0 limit=3 json=OUT samples=2 pass-at=2 batch=5"}


@pytest.mark.parametrize("module", CONTRACT, ids=lambda m: m.__name__)
def test_flags_are_a_contract(module, capsys):
    options, presets = (train.Config, train.PRESETS) if module is train else (module.Options, None)
    promised = dict(pair.split("=") for pair in CONTRACT[module].split())
    for spell in (str, lambda name: name.replace("-", "_")):
        argv = [word for name, value in promised.items() for word in ("--" + spell(name), value)]
        got = command_line(options, "", presets, argv)
        got = {name: getattr(got, name.replace("-", "_")) for name in promised}
        assert {n: ",".join(map(str, v)) if isinstance(v, tuple) else str(v) for n, v in got.items()} == promised
    assert call(module, "--help") == 0
    shown = capsys.readouterr().out
    assert all("--" + f.name.replace("_", "-") in shown for f in fields(options)) and "(default: " in shown


@pytest.mark.parametrize("preset", ["tiny", "24gb", "80gb"])
def test_presets(preset):
    c = command_line(train.Config, "", train.PRESETS, ["--preset", preset, "--out", "none", "--steps", "77"])
    train.check(c)
    assert c.steps == 77 and all(getattr(c, k) == v for k, v in train.PRESETS[preset].items() if k != "steps")


@pytest.mark.parametrize("line, code, words", [("train.py --bogus", 2, "--bogus"),
    ("evaluate.py --runs RUN --data nowhere.jsonl", 2, "nowhere.jsonl"),
    ("rollout.py --run RUN --prompt 12= --raw --max-new-tokens 9", 0, "tokens/s")])
def test_exit_codes_and_streams(trained, line, code, words):
    script, *argv = line.replace("RUN", str(trained)).split()
    done = subprocess.run([sys.executable, Path(train.__file__).parent / script, *argv], capture_output=True, text=True)
    assert done.returncode == code and words in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1 and (code == 0) == (done.stdout != "")


def test_every_step_and_every_seed_draws_anew(tmp_path, monkeypatch):
    seeds, real = [], grpo.generate
    monkeypatch.setattr(grpo, "generate", lambda *rest, **how: seeds.append(how["seed"]) or real(*rest, **how))
    for seed in (0, 1):
        assert call(train, *SMALL, "--test-problems", 0, "--seed", seed, "--out", tmp_path / str(seed)) == 0
    assert len(set(seeds)) == len(seeds) == 4
