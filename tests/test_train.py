"""train.py: a run and its files, the tiny base, a second task, a notebook, resuming, people's mistakes.

All runs are tiny and learn nothing useful. Here a response is rewarded for its length, so that even
a model that gets nothing right has rewards that differ and a gradient.
"""
import json
import sys
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
import rollout
import train
from conftest import call
from model import Transformer, read_safetensors, write_json, write_safetensors
from train import Config, load_run

TINY = dict(prompts=2, group_size=4, window=8, evict_ratio=0.5, max_new_tokens=20, base_steps=2,
            steps=3, save_every=2, sample_every=2, test_problems=0, device="cpu")
CLOCK = ("seconds", "tokens_per_second", "peak_memory_mb")
FIELDS = {"step", "K", "reward", "accuracy", "answer_found", "response_tokens", "truncated", "spread",
          "evictions", "loss", "kl", "grad_norm", "logp_gap", "ratio_clipped", "skipped", *CLOCK}
IDS = torch.tensor([[5, 2, 7, 1, 11, 3, 0, 9, 12, 13, 4, 4]])

def by_length(self, problem, text, n_tokens, ended):
    return n_tokens / 20

class Largest:
    """A second task: the largest of three digits, of K such lists."""
    characters = "0123456789,="
    counts = (1, 2)
    reward = by_length

    def problem(self, K, rng):
        lists = rng.integers(0, 10, (K, 3)).tolist()
        question = ",".join("".join(map(str, digits)) for digits in lists) + "="
        answer = "".join(str(max(digits)) for digits in lists)
        return {"problem": question, "answer": answer, "exact": True, "K": K}

    def batch(self, step, n, seed):
        rng = np.random.default_rng([seed, 1, step])
        return [self.problem(2, rng) for _ in range(n)]

    def gold(self, problem):
        return ["Answer:" + problem["answer"]]

def run(**changes):
    """train.py with tiny settings -> exit code, stdout, stderr."""
    argv = []
    for name, value in (TINY | changes).items():
        argv += ["--" + name.replace("_", "-")] + ([] if value is True else [value])
    return call(train, *argv)

def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]

def result(folder):
    """What a run has led to, without what tells the time."""
    metrics = lines(f"{folder}/metrics.jsonl")
    for line in metrics:
        for name in CLOCK:
            del line[name]
    return (metrics, lines(f"{folder}/samples.jsonl"),
            Path(folder, "adapter.safetensors").read_bytes())

def logits(folder):
    return Transformer.from_folder(folder)(IDS)

def logits_of_run(folder):
    model, encoder, _, _ = load_run(folder)
    return model(IDS, S=encoder.state(encoder.initial_memory()))

@pytest.fixture(scope="module", autouse=True)
def first(tmp_path_factory):
    """A working directory with one run in it, runs/tiny-pte-0 -> its (exit code, stdout, stderr)"""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("train"))
        patch.setattr(train.Tally, "reward", by_length)
        yield run(test_problems=2)

@pytest.fixture(scope="module")
def lora(first):
    """The folder of a LoRA run that has learned something, alpha / rank = 2.5."""
    assert run(out="lora", adapter="lora", rank=4, global_tokens=4, alpha=10, lr=0.1, warmup=0)[0] == 0
    return "lora"

WHOLE = "runs/tiny-pte-0"

def test_what_a_run_prints_and_writes(first):
    code, out, err = first
    assert code == 0 and "step    3  accuracy K=2   0% |" in err and f"everything is in {WHOLE}" in err
    assert "K = 2 under a window of 8: 0% before, 0% after" in out.splitlines()[-1]
    tables = {"table.json", "table.jsonl", "table.md", *[f"tally-{K}.jsonl" for K in (1, 2, 3)]}
    assert {path.name for path in Path(WHOLE).iterdir()} == tables | {
        "config.json", "metrics.jsonl", "samples.jsonl", "checkpoint.pt", "base",
        "adapter.safetensors", "adapter_config.json"}
    for step, metrics in enumerate(lines(f"{WHOLE}/metrics.jsonl"), start=1):
        assert metrics.keys() == FIELDS and metrics["step"] == step and metrics["K"] == 2
        assert metrics["logp_gap"] < 1e-4 and 0 <= metrics["answer_found"] <= 1
        assert min(metrics[name] for name in ("evictions", "spread", "grad_norm", "reward")) > 0
    samples = lines(f"{WHOLE}/samples.jsonl")
    assert [sample["step"] for sample in samples] == [1, 1, 3, 3]       # one of each group
    for sample in samples:
        assert len(sample["prompt"]) == 14 and sample["prompt"][-1] == "="
        assert sample["prediction"] == evaluate.extract_answer(sample["response"])
        assert sample["reward"] == sample["response_tokens"] / 20
    rows = json.loads(Path(WHOLE, "table.json").read_text())["rows"]
    assert [(row["arm"], row["window"]) for row in rows] == [
        ("no training", 0), ("no training", 8), ("PTE", 0), ("PTE", 8)]
    assert all([*row["scores"]] == ["tally-1", "tally-2", "tally-3"] for row in rows)

def test_a_second_run_takes_the_next_free_name_and_the_same_base():
    before = Path("runs/tiny-base-0/model.safetensors").stat()
    assert run()[0] == 0
    assert Path("runs/tiny-base-0/model.safetensors").stat() == before
    assert result("runs/tiny-pte-0-2") == result(WHOLE)                 # bit for bit

def test_another_task_is_a_class_and_gets_a_base_of_its_own(monkeypatch):
    monkeypatch.setitem(train.TASKS, "largest", Largest)
    files = []
    for changes in ({}, {}, {"base_steps": 1}, {"data": "largest", "test_problems": 1}):
        code, out, _ = run(seed=5, steps=1, **changes)
        assert code == 0
        files.append(Path("runs/tiny-base-5/model.safetensors").stat().st_mtime_ns)
    assert files[0] == files[1] and len(set(files)) == 3
    assert "| largest-1 | largest-2 |" in out and out.splitlines()[-1].startswith("K = 2 under")
    assert len(lines("runs/tiny-pte-5-4/samples.jsonl")[0]["prompt"]) == 8

def test_a_notebook_stops_and_a_script_goes_on_as_if_nothing_had_happened():
    for metrics in train.train(Config(**TINY, out="half")):
        if metrics["step"] == 1:
            break
    assert torch.load("half/checkpoint.pt")["step"] == 1 and len(lines("half/metrics.jsonl")) == 1
    with open("half/metrics.jsonl", "a") as file:               # of a step without a checkpoint
        file.write('{"step": 2, "rew')
    assert call(train, "--resume", "half")[0] == 0
    assert result("half") == result(WHOLE)

def test_more_steps_go_on_other_settings_are_refused():
    copytree(WHOLE, "more")
    others = dict(model="x", data="x", adapter="lora", memory_update="sum", rank=4, global_tokens=4,
                  window=4, seed=5)
    assert set(others) == set(train.FIXED)
    for name, value in others.items():
        flag = "--" + name.replace("_", "-")
        code, _, err = call(train, "--resume", "more", flag, value)
        assert code == 2 and f"{flag}: more was trained with" in err
    assert result("more") == result(WHOLE)
    assert call(train, "--resume", "more", "--steps", 4)[0] == 0
    metrics = lines("more/metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3, 4]
    assert metrics[:3] == lines(f"{WHOLE}/metrics.jsonl")

def test_load_run_gives_what_was_trained():
    model, encoder, tokenizer, config = load_run(WHOLE)
    for name, tensor in read_safetensors(f"{WHOLE}/adapter.safetensors").items():
        assert torch.equal(encoder.tensors()[name], tensor)
    assert config["window"] == 8 and tokenizer.decode(tokenizer.encode("12=Answer:7")) == "12=Answer:7"
    response = rollout.generate(model, encoder, [tokenizer.prompt("12=")], max_new_tokens=4)
    assert response.texts(tokenizer)[0] != ""

def test_the_preset_follows_the_model():
    assert (Config().preset, Config().window, Config().lr) == ("tiny", 16, 1e-3)
    assert (Config(model="DIR").window, Config(model="DIR").lr) == (256, 1e-5)
    assert Config(model="DIR", preset="80gb").window == 1024
    assert Config(model="DIR", window=7).window == 7
    with pytest.raises(TypeError, match="windw"):
        Config(windw=8)

def test_a_run_without_any_spread_says_why(monkeypatch):
    monkeypatch.setattr(train.Tally, "reward", lambda *_: 0.0)
    code, _, err = run(steps=1, out="equal")
    metrics = lines("equal/metrics.jsonl")[0]
    assert code == 0 and metrics["spread"] == metrics["grad_norm"] == 0
    assert "step 1: all rewards of each group are equal" in err
    assert f"{metrics['truncated']:.0%} of the responses were cut off" in err
    assert f"found in {metrics['answer_found']:.0%}" in err

@pytest.mark.parametrize("wrong, words, skipped", [
    (0.1, "step 2: logp_gap 0.1", [0, 0, 0]),
    (float("nan"), "step 2: the gradient is not finite, no update", [0, 1, 0])])
def test_an_unhealthy_step_is_reported(wrong, words, skipped, monkeypatch):
    """In step 2 the rollout reports other log-probs than it has drawn with."""
    calls = []

    def generate(*arguments, **settings):
        found = rollout.generate(*arguments, **settings)
        calls.append(found)
        if len(calls) == 2:
            found.logps += wrong
        return found

    monkeypatch.setattr(train, "generate", generate)
    code, _, err = run(out=f"wrong-{wrong}")
    assert code == 0 and words in err and "step 1: " not in err and "step 3: " not in err
    assert [m["skipped"] for m in lines(f"wrong-{wrong}/metrics.jsonl")] == skipped
    assert result(f"wrong-{wrong}")[2] != result(WHOLE)[2]
    for tensor in read_safetensors(f"wrong-{wrong}/adapter.safetensors").values():
        assert tensor.isfinite().all()

def test_out_of_memory_names_the_flags_to_lower(monkeypatch):
    def generate(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(train, "generate", generate)
    code, _, err = run(out="large")
    assert code == 2 and err.splitlines()[-1].startswith("train.py: out of memory: lower --micro-b")

def test_wandb_gets_what_metrics_jsonl_gets(monkeypatch):
    logged = []
    began = {}
    stand_in = SimpleNamespace(init=lambda **settings: began.update(settings),
                               log=lambda metrics, step: logged.append(metrics))
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    assert run(steps=2, out="logged", wandb=True)[0] == 0
    assert logged == lines("logged/metrics.jsonl") and began["config"]["window"] == 8

def test_a_lora_has_the_names_and_shapes_of_peft(lora):
    sizes = {"self_attn.q_proj": (96, 96), "self_attn.k_proj": (96, 48), "self_attn.v_proj": (96, 48),
             "self_attn.o_proj": (96, 96), "mlp.gate_proj": (96, 256), "mlp.up_proj": (96, 256),
             "mlp.down_proj": (256, 96)}
    wanted = {}
    for layer in range(3):
        for name, (n_in, n_out) in sizes.items():
            place = f"base_model.model.model.layers.{layer}.{name}"
            wanted[f"{place}.lora_A.weight"] = (4, n_in)
            wanted[f"{place}.lora_B.weight"] = (n_out, 4)
    saved = read_safetensors(f"{lora}/adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == wanted
    config = json.loads(Path(lora, "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 10)

def test_a_merged_lora_is_a_model_of_its_own(lora):
    assert call(train, "--merge", lora, "--out", "merged")[0] == 0
    torch.testing.assert_close(logits("merged"), logits_of_run(lora), atol=1e-4, rtol=1e-4)
    assert (logits("merged") - logits(f"{lora}/base")).abs().max() > 0.1
    assert call(rollout, "--model", "merged", "--prompt", "12=", "--max-new-tokens", 3)[0] == 0

def test_peft_reads_a_lora(lora):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(f"{lora}/base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, lora)(IDS).logits
    torch.testing.assert_close(theirs, logits_of_run(lora), atol=1e-4, rtol=1e-4)
