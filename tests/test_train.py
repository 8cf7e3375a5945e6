"""train.py: a run and its files, the tiny base, another task, a notebook, resuming; mistakes.

All runs are tiny and learn nothing useful. A response is rewarded for its length here, so that even
a model that gets nothing right has rewards that differ, and a gradient.
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
from model import Transformer, UserError, read_safetensors, write_json
from train import Config, load_run

TINY = dict(prompts=2, group_size=4, window=8, evict_ratio=0.5, max_new_tokens=20, base_steps=2,
            steps=3, save_every=2, test_problems=0, device="cpu")
CLOCK = ("seconds", "tokens_per_second", "peak_memory_mb")
BOTH = {"step", "phase", "K", "lr", "seconds", "tokens_per_second", "loss", "grad_norm", "skipped",
        "grad_norm_encoder", "grad_norm_linears", "memory_write", "memory_cosine"}
FIELDS = BOTH | {"reward", "accuracy", "answer_found", "response_tokens", "truncated", "spread",
                 "evictions", "kl", "logp_gap", "ratio_clipped", "peak_memory_mb"}
REWARD = train.Tally.reward
IDS = torch.tensor([[5, 2, 7, 1, 11, 3, 0, 9, 12, 13, 4, 4]])

class Largest(train.Tally):
    """Another task: the larger of two digits."""
    name = "largest"
    counts = (2,)

    def problem(self, K, rng):
        digits = rng.integers(0, 10, K).tolist()
        question = "".join(map(str, digits)) + "="
        answer = str(max(digits))
        return {"problem": question, "walks": [""], "answer": answer, "exact": True, "K": K}

    def gold(self, problem):
        return "Answer:" + problem["answer"]

def run(**changes):
    """train.py with tiny settings -> exit code, stdout, stderr."""
    argv = []
    for name, value in (TINY | changes).items():
        argv += ["--" + name.replace("_", "-"), value]
    return call(train, *argv)

def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]

def result(folder):
    """What a run has led to: metrics without what tells the time, samples, the adapter's bytes."""
    metrics = lines(f"{folder}/metrics.jsonl")
    for line in metrics:
        for name in CLOCK:
            line.pop(name, None)
    adapter = Path(folder, "adapter.safetensors").read_bytes()
    return metrics, lines(f"{folder}/samples.jsonl"), adapter

def logits(run):
    model, encoder, _, _ = load_run(run)
    return model(IDS, S=encoder.state(encoder.initial_memory()))

@pytest.fixture(scope="module", autouse=True)
def printed(tmp_path_factory):
    """A working directory with a run of three steps in it, `run` -> what it has printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("train"))
        patch.setattr(train.Tally, "reward", lambda self, problem, text, n, ended: n / 20)
        code, out, err = run(out="run", test_problems=2)
        assert code == 0
        yield out, err

@pytest.fixture(scope="module")
def lora(printed):
    """`lora`, a LoRA run that has learned something, and `merged`, made from it."""
    run(out="lora", adapter="lora", rank=4, alpha=10, lr=0.1, warmup=0)
    assert call(train, "--merge", "lora", "--out", "merged")[0] == 0

def test_what_a_run_prints_and_writes(printed):
    out, err = printed
    assert "step    3  accuracy K=2   0% |  " in err and "everything is in run" in err
    assert out.splitlines()[-1].endswith("a window of 8: 0.0% before, 0.0% after")
    assert {path.name for path in Path("run").iterdir()} == {
        "config.json", "metrics.jsonl", "samples.jsonl", "checkpoint.pt", "base", "table.json",
        "adapter.safetensors", "adapter_config.json", "table.jsonl", "table.md", "tally-1.jsonl",
        "tally-2.jsonl", "tally-3.jsonl"}
    for step, metrics in enumerate(lines("run/metrics.jsonl"), start=1):
        assert metrics.keys() == FIELDS and metrics["step"] == step and metrics["K"] == 2
        assert metrics["logp_gap"] < 1e-4 and 0 <= metrics["answer_found"] <= 1
        assert min(metrics[name] for name in ("evictions", "spread", "grad_norm", "reward")) > 0
    samples = lines("run/samples.jsonl")
    assert [sample["step"] for sample in samples] == [1, 1, 2, 2, 3, 3]     # per problem
    for sample in samples:
        assert len(sample["prompt"]) == 14 and sample["prompt"][-1] == "="
        assert sample["prediction"] == evaluate.extract_answer(sample["response"])
        assert sample["reward"] == sample["tokens"] / 20
    rows = json.loads(Path("run/table.json").read_text())["rows"]
    assert [(row["arm"], row["window"]) for row in rows] == [
        ("no training", 0), ("no training", 8), ("PTE", 0), ("PTE", 8)]
    assert all([*row["scores"]] == ["tally-1", "tally-2", "tally-3"] for row in rows)

def test_a_run_takes_the_next_free_name_and_a_base_that_is_there():
    before = Path("runs/tiny-base-0/model.safetensors").stat()
    run()
    run()
    assert Path("runs/tiny-base-0/model.safetensors").stat() == before
    assert result("runs/tiny-pte-0") == result("runs/tiny-pte-0-2") == result("run")

def test_another_task_is_a_class_and_what_it_teaches_makes_the_base(monkeypatch):
    """Its own base, made anew when the steps or the task have changed."""
    monkeypatch.setitem(train.TASKS, "largest", Largest)
    bases = []
    for folder in ("a", "b", "c"):
        steps = 1 if folder == "a" else 2
        if folder == "c":
            monkeypatch.setattr(Largest, "gold", lambda self, problem: "Answer:0")
        code, out, _ = run(data="largest", out=folder, steps=1, base_steps=steps, test_problems=1)
        assert code == 0 and "| largest-2 | average" in out
        assert len(lines(f"{folder}/samples.jsonl")[0]["prompt"]) == 3
        bases.append(Path(folder, "base/model.safetensors").read_bytes())
    assert len(set(bases)) == 3

def test_the_preset_follows_the_model():
    assert (Config().preset, Config().window, Config().lr) == ("tiny", 16, 1e-3)
    assert (Config(model="DIR").window, Config(model="DIR").lr) == (256, 1e-5)
    assert Config(model="DIR", preset="80gb").window == 1024
    assert Config(model="DIR", window=7).window == 7
    with pytest.raises(TypeError, match="windw"):
        Config(windw=8)

def test_a_step_without_any_spread_says_why():
    """No answer is right, and only a right one is rewarded."""
    _, _, err = run(steps=1, out="equal", reward="exact")
    metrics = lines("equal/metrics.jsonl")[0]
    assert metrics["reward"] == metrics["accuracy"] == metrics["spread"] == 0
    assert "step 1: all rewards of each group are equal" in err
    assert f"{metrics['truncated']:.0%} were cut off" in err
    assert f"found in {metrics['answer_found']:.0%} of the responses" in err

@pytest.mark.parametrize("error, words, skipped", [
    (0.1, "step 2: logp_gap 0.1 is more than rounding", [0, 0, 0]),
    (float("nan"), "step 2: the gradient is not finite, no update", [0, 1, 0])])
def test_an_unhealthy_step_is_reported(error, words, skipped, monkeypatch):
    """In step 2 the rollout reports other log-probs than those it has drawn with."""
    def generate(*arguments, **settings):
        rollouts.append(rollout.generate_in_parts(*arguments, **settings))
        if len(rollouts) == 2:
            rollouts[1].logps += error
        return rollouts[-1]

    rollouts = []
    monkeypatch.setattr(train, "generate_in_parts", generate)
    _, _, err = run(out=f"off-{error}")
    assert words in err and "step 1: " not in err and "step 3: " not in err
    assert [metrics["skipped"] for metrics in lines(f"off-{error}/metrics.jsonl")] == skipped
    for tensor in read_safetensors(f"off-{error}/adapter.safetensors").values():
        assert tensor.isfinite().all()

def test_a_step_in_which_hardly_an_answer_is_found_says_so(monkeypatch):
    monkeypatch.setattr(evaluate, "extract_answer", lambda text: None)
    assert "an answer was found in 0% of the responses" in run(steps=1, out="mute")[2]

def test_rollouts_at_another_temperature_and_a_few_at_a_time():
    """The log-probs are those at the temperature."""
    run(out="cool", temperature=0.6, rollout_batch=5, steps=1)
    cool, = lines("cool/metrics.jsonl")
    assert cool["logp_gap"] < 1e-4
    assert cool["response_tokens"] != lines("run/metrics.jsonl")[0]["response_tokens"]

@pytest.fixture(scope="module")
def moved(printed):
    """`far/real`, a run with a model folder and a file of problems that were moved afterwards."""
    copytree("run/base", "model")
    rows = [{"problem": f"1{i}", "answer": 3, "solution": f"1{i}Answer:3"} for i in range(2)]
    Path("six.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, _, err = run(model="model", data="six.jsonl", out="real", sft_steps=1, steps=2)
    assert code == 0, err
    Path("far").mkdir()
    for name in ("real", "model", "six.jsonl"):
        Path(name).rename(f"far/{name}")

def test_a_run_can_be_moved_with_its_model_and_problems(moved, monkeypatch):
    code, _, err = call(rollout, "--run", "far/real", "--prompt", "12")
    assert code == 2 and "is gone" in err and "--model DIR" in err
    assert call(rollout, "--run", "far/real", "--model", "far/model", "--prompt", "12")[0] == 0
    code, _, err = call(train, "--resume", "far/real", "--steps", 3, "--model", "far/model",
                        "--data", "far/six.jsonl")
    assert code == 0, err
    monkeypatch.chdir("far/real")                               # and is found from anywhere
    assert load_run(".")[3]["window"] == 8

def test_a_run_does_not_go_on_with_another_model_or_other_problems(moved):
    run(out="seed", seed=1, steps=1)
    Path("other.jsonl").write_text('{"problem": "12", "answer": 3}\n')
    before = Path("far/real/config.json").read_bytes()
    for model, data in (("seed/base", "far/six.jsonl"), ("far/model", "other.jsonl")):
        code, _, err = call(train, "--resume", "far/real", "--model", model, "--data", data)
        assert code == 2 and "that far/real was trained on" in err
    assert call(rollout, "--run", "far/real", "--model", "seed/base", "--prompt", "12")[0] == 2
    assert Path("far/real/config.json").read_bytes() == before

def test_supervised_steps_come_first_and_a_run_goes_on_after_any_of_them():
    """RUN/sft, the adapter after them, is a run as well. Here the memory starts as zero."""
    settings = dict(sft_steps=2, steps=2, save_every=1, warmup=4, lr=1e-3, encoder_lr=3e-3,
                    global_tokens=0, memory_update="delta", memory_keys="plain")
    assert run(out="taught", **settings | dict(test_problems=1))[0] == 0
    metrics = lines("taught/metrics.jsonl")
    assert [line["phase"] for line in metrics] == ["sft", "sft", "grpo", "grpo"]
    assert [line.keys() for line in metrics] == [BOTH, BOTH, FIELDS, FIELDS]
    assert [line["lr"] for line in metrics] == pytest.approx([2.5e-4, 5e-4, 2.5e-4, 5e-4])
    groups = torch.load("taught/checkpoint.pt")["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([5e-4, 15e-4])
    arms = [row["arm"] for row in json.loads(Path("taught/table.json").read_text())["rows"]]
    assert [arm.split("keys, ")[-1] for arm in arms[::2]] == ["no training", "SFT", "SFT and GRPO"]
    for n in (1, 2):
        for step in train.train(Config(**TINY | settings, out=f"stop-{n}")):
            if step["step"] == n:
                break
        with open(f"stop-{n}/metrics.jsonl", "a") as file:
            file.write('{"step": 3, "rew')                      # killed before its checkpoint
        adapter = read_safetensors(f"stop-{n}/adapter.safetensors")
    with pytest.raises(UserError, match="cannot change.*resume_config"):
        list(train.train(Config(resume="stop-1", steps=3)))     # else with the window of a preset
    list(train.train(train.resume_config("stop-1", device="cpu")))
    assert call(train, "--resume", "stop-2")[0] == 0
    assert result("stop-1") == result("stop-2") == result("taught")
    assert call(train, "--resume", "stop-2", "--steps", 3)[0] == 0
    assert result("stop-2")[0][:4] == result("taught")[0] and len(result("stop-2")[0]) == 5
    _, encoder, tokenizer, config = load_run("taught/sft")
    assert not encoder.initial_memory().any()
    for name, tensor in adapter.items():                        # as it was after two steps
        assert torch.equal(encoder.tensors()[name], tensor)
    assert tokenizer.decode(tokenizer.encode("12=Answer:7")) == "12=Answer:7"
    assert (config["steps"], config["window"]) == (0, 8)

@pytest.mark.parametrize("world", ["tiny", "long"])
def test_a_world_asks_for_more_and_more_and_has_room_for_the_longest_response(world):
    config = Config(world=world)
    task = train.TASKS[config.data]()
    asked = [task.batch(step, 1, 0)[0]["K"] for step in range(config.steps)]
    assert max(asked[:8]) == 2 and max(asked[-8:]) == max(asked) == max(task.counts)
    longest = task.gold(task.problem(max(task.counts), np.random.default_rng(0)))
    assert len(longest.replace("Answer:", "A")) + 1 <= config.max_new_tokens

def test_the_reward_is_the_share_of_right_sums():
    for text, ended, reward in [("Answer:275", True, 1), ("Answer:285", True, 2 / 3), ("", True, 0),
                                ("Answer:27", True, 0), ("Answer:275", False, 0)]:
        assert REWARD(train.Tally(), {"answer": "275"}, text, 9, ended) == reward

def test_a_notebook_may_give_whole_numbers_and_no_strange_ones():
    assert Config(alpha=16).alpha == 16.0 and type(Config(alpha=16).alpha) is float
    for name, value in (("lr", float("nan")), ("alpha", -1), ("temperature", float("inf")),
                        ("seed", 10**14), ("rank", 10_000), ("loss", "drgrpo"),
                        ("prompt_template", "x")):
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')}"):
            Config(**{name: value}).check()

def test_a_run_is_written_by_one_process_at_a_time():
    with evaluate.open_locked("run/metrics.jsonl"):
        code, _, err = call(train, "--resume", "run", "--steps", 4)
        assert code == 2 and "another process is writing" in err
    assert len(lines("run/metrics.jsonl")) == 3

@pytest.mark.parametrize("error, code, words", [
    (KeyboardInterrupt, 130, "python train.py --resume"),
    (torch.OutOfMemoryError, 2, "out of memory: lower --rollout-batch, --micro-batch (of "
     "evaluate.py: --batch), --max-new-tokens or --window\n")])
def test_a_run_that_ends_early_says_how_to_go_on(error, code, words, monkeypatch):
    def generate(*_, **__):
        raise error
    monkeypatch.setattr(train, "generate_in_parts", generate)
    found, _, err = run(out=f"early-{code}")
    assert found == code and words in err

def test_wandb_gets_what_metrics_jsonl_gets(monkeypatch):
    logged = []
    stand_in = SimpleNamespace(__spec__="any", init=lambda project, name, config: None,
                               log=lambda metrics, step: logged.append(metrics))
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    yielded = [*train.train(Config(**TINY, out="logged", wandb=True))]
    assert yielded == logged == lines("logged/metrics.jsonl")

def test_a_merged_lora_is_a_model_of_its_own(lora):
    merged = Transformer.from_folder("merged")(IDS)
    torch.testing.assert_close(merged, logits("lora"), atol=1e-4, rtol=1e-4)
    assert (merged - Transformer.from_folder("lora/base")(IDS)).abs().max() > 0.1

def test_a_lora_has_the_names_and_shapes_that_peft_gives_it(lora):
    wanted = {}
    for name, weight in read_safetensors("lora/base/model.safetensors").items():
        if name.endswith("_proj.weight"):
            n_out, n_in = weight.shape
            place = "base_model.model." + name.removesuffix("weight")
            wanted |= {place + "lora_A.weight": (4, n_in), place + "lora_B.weight": (n_out, 4)}
    saved = read_safetensors("lora/adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == wanted

def test_peft_reads_a_lora(lora):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained("lora/base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, "lora")(IDS).logits
    torch.testing.assert_close(theirs, logits("lora"), atol=1e-4, rtol=1e-4)

# ------------------------------------------------------------------------------- people's mistakes

FILE = "--out new --model run/base --data "
MODEL = "--out new --data letters.jsonl --model "
ASK = "--prompt 12= "
MISTAKES = [                                # script, its command line, words of its one line
    (train, "--bogus 1", "--bogus --help"),
    (train, "--steps two", "--steps 'two'"),
    (train, "--window 10", "--window 10 divides"),
    (train, "--micro-batch 0", "--micro-batch 0"),
    (train, "--seed -1", "--seed"),
    (train, "--device cuda", "--device cuda"),
    (train, "--wandb", "wandb pip install wandb"),
    (train, "--out run", "run exists --resume run"),
    (train, "--resume nowhere", "nowhere/config.json"),
    (train, "--resume run/base", "run/base/config.json train.py"),
    (train, "--resume run --window 4", "--window run 8"),
    (train, "--resume run --adapter lora", "--adapter run pte"),
    (train, "--resume broken", "broken/checkpoint.pt: damaged"),
    (train, "--resume cut --steps 4", "metrics.jsonl has lost lines"),
    (train, "--merge run --out new", "run --adapter pte"),
    (train, "--merge lora", "lora --out DIR"),
    (train, "--model run/base", "run/base tally JSONL"),
    (train, MODEL + "nowhere", "nowhere"),
    (train, MODEL + "short", "short/model.safetensors damaged git lfs pull"),
    (train, MODEL + "gpt2", "gpt2/config.json 'gpt2'"),
    (train, FILE + "nowhere.jsonl", "nowhere.jsonl"),
    (train, FILE + "empty.jsonl", "empty.jsonl no problems"),
    (train, FILE + "cut.jsonl", "cut.jsonl, line 1 'problem' 'answer'"),
    (train, FILE + "letters.jsonl", "letters.jsonl, line 1 empty"),
    (train, FILE + "unsolved.jsonl --sft-steps 2", "unsolved.jsonl, line 2 'solution' --sft-steps"),
    (train, FILE + "long.jsonl", "long.jsonl, line 2 5000 --max-new-tokens"),
    (train, "--out new --template-args {", "--template-args JSON"),
    (rollout, ASK, "--model --run"),
    (rollout, "--run run", "--prompt"),
    (rollout, ASK + "--run run --window 3", "--window 3"),
    (rollout, ASK + "--run broken", "broken/adapter.safetensors"),
    (evaluate, "--runs run", "--data"),
    (evaluate, "--runs run --data aime26", "aime26"),
    (evaluate, "--runs run --data letters.jsonl --json letters.jsonl", "letters.jsonl")]

@pytest.fixture(scope="module")
def damaged(lora):
    """Damaged copies of the run and of its base; files of problems that cannot be used."""
    copytree("run", "broken")
    copytree("run", "cut")
    Path("cut/metrics.jsonl").write_text("")
    copytree("run/base", "short")
    copytree("run/base", "gpt2")
    for path in (Path("broken/checkpoint.pt"), Path("short/model.safetensors")):
        path.write_bytes(path.read_bytes()[:-99])
    Path("broken/adapter.safetensors").unlink()
    write_json("gpt2/config.json", {"model_type": "gpt2"})
    texts = {"empty": "\n", "cut": '{"problem": "12', "letters": '{"problem": "abc", "answer": 1}'}
    rows = [{"problem": "1" * n, "answer": 1} for n in (1, 5000)]
    texts["long"] = "\n".join(map(json.dumps, rows))
    rows = [{"problem": "1", "answer": 1, "solution": "1"}, {"problem": "1", "answer": 1}]
    texts["unsolved"] = "\n".join(map(json.dumps, rows))
    for name, text in texts.items():
        Path(f"{name}.jsonl").write_text(text)

def listing():
    return {path: path.stat().st_mtime_ns for path in Path().rglob("*")}    # of the last change

@pytest.mark.parametrize("script, line, words", MISTAKES, ids=lambda x: getattr(x, "__name__", x))
def test_a_mistake_is_answered_in_one_line(script, line, words, damaged, monkeypatch):
    """Exit code 2, one line on stderr that names the thing, and no file is written or changed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "wandb", None)                     # not installed
    before = listing()
    code, out, err = call(script, *line.split())
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith(script.__name__)
    assert all(word in err for word in words.split()), err
    assert listing() == before
