"""Bad input: each mistake is answered with one line that names the thing, exit code 2, and nothing is written."""
import json
import sys
from shutil import copyfile, copytree, rmtree

import pytest
import torch

import evaluate
import rollout
import train
from conftest import call
from model import ModelConfig, Transformer, read_folder
from train import write_safetensors

GOOD = '{"problem": "527184=", "answer": 7}'
DATA = {  # name of a file, what it holds
    "good": GOOD, "empty": "\n \n", "cut": GOOD + '\n{"problem": "1', "list": GOOD + "\n\n[1]",
    "mute": '{"answer": "1"}', "silent": '{"problem": "1"}', "blank": '{"problem": "1", "answer": " "}',
    "hashes": '{"problem": "1", "answer": "5 ####"}',
    "long": json.dumps({"problem": "1" * 4000, "answer": "1"}), "letters": '{"problem": "abc", "answer": "1"}'}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to make mistakes in: a run and its base model, spoilt copies of both, good and bad data files."""
    here = tmp_path_factory.mktemp("mistakes")
    small = "--steps 1 --prompts 1 --group-size 2 --test-problems 0 --base-steps 1 --device cpu --out".split()
    assert call(train, *small, here / "run") == 0
    for name, text in DATA.items():
        (here / f"{name}.jsonl").write_text(text)
    (here / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    for name in ("short", "gpt2", "wide", "other", "wordless"):
        copytree(here / "run" / "base", here / name)
    weights = here / "short" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    (here / "gpt2" / "config.json").write_text(json.dumps(train.TINY | {"model_type": "gpt2"}))
    wide = train.TINY | {"intermediate_size": 128}  # a sound model, of another shape
    (here / "wide" / "config.json").write_text(json.dumps(wide))
    write_safetensors(here / "wide" / "model.safetensors", Transformer(ModelConfig(wide)).tensors())
    write_safetensors(here / "other" / "model.safetensors", {  # of the same shape, but other weights
        name: p + 1 for name, p in read_folder(here / "run" / "base").items()})
    (here / "wordless" / "tokenizer.json").unlink()
    for name in ("unfinished", "foreign", "typed", "choosy", "shortened", "moved"):
        copytree(here / "run", here / name)
    (here / "unfinished" / "adapter.safetensors").unlink()
    config = json.loads((here / "run" / "config.json").read_text())
    (here / "foreign" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "warmup"}))
    (here / "typed" / "config.json").write_text(json.dumps(config | {"steps": "two"}))
    (here / "choosy" / "config.json").write_text(json.dumps(config | {"loss": "ppo"}))
    (here / "shortened" / "metrics.jsonl").write_text("")
    copyfile(here / "other" / "model.safetensors", here / "moved" / "base" / "model.safetensors")
    return here


TRAIN = "--base-steps 1 --steps 1 --prompts 1 --test-problems 0 --out new "
FILE = TRAIN + "--model run/base --data "
ASK, SCORE = "--raw --prompt 12= --max-new-tokens 9 ", "--max-new-tokens 9 --runs run --data "
MISTAKES = {  # script: [(command line, words of the one line that it says)]
    train: [
        ("--bogus 1", "--bogus"), ("stray", "stray"), ("--steps two", "--steps 'two'"), ("--loss", "--loss"),
        ("--preset huge", "--preset 'huge'"), ("--adapter qlora", "--adapter 'qlora'"),
        (TRAIN + "--window 10 --evict-ratio 0.25", "--window 10 --evict-ratio 0.25 divides"),
        (TRAIN + "--window -4", "--window -4"), (TRAIN + "--evict-ratio nan", "--evict-ratio nan"),
        (TRAIN + "--group-size 1", "--group-size 1"), (TRAIN + "--steps 0", "--steps 0"),
        (TRAIN + "--micro-batch -1", "--micro-batch -1"), (TRAIN + "--seed -1", "--seed -1"),
        (TRAIN + "--test-problems -1", "--test-problems -1"), (TRAIN + "--lr nan", "--lr nan"),
        (TRAIN + "--adapter lora --rank 4", "lora --global-tokens --rank 4"), (TRAIN + "--device cuda", "cuda"),
        ("--resume nowhere", "nowhere/config.json"), ("--resume run/base", "run/base/config.json train.py"),
        ("--resume run --seed 5", "--seed 5: run 0"), ("--resume run --window 8", "--window 8: run 16"),
        ("--resume run --out new", "--out new: run"), ("--resume run --steps 0", "--steps 0"),
        ("--resume foreign", "foreign/config.json: warmup missing"), ("--resume typed", "typed/config.json: steps two"),
        ("--resume choosy", "--loss ppo: grpo, dr_grpo, dapo"), ("--resume shortened", "shortened/metrics.jsonl shorter"),
        ("--resume moved", "moved/base is not what it was"), ("--resume", "--resume"),
        ("--merge run --out new", "run --adapter pte"), ("--merge run", "--merge run --out DIR"),
        ("--merge nowhere --out new", "nowhere/config.json"), ("--merge run --out other", "other already holds --out"),
        (TRAIN + "--wandb", "--wandb: pip install wandb"), (TRAIN + "--save-every 0", "--save-every 0"),
        (TRAIN + "--out run", "run already holds a run --out"), (TRAIN + "--out good.jsonl", "good.jsonl --out"),
        (TRAIN + "--out good.jsonl/new", "good.jsonl"), (TRAIN + "--max-new-tokens 9999", "9999 context"),
        (TRAIN + "--model run/base", "run/base tally"), (TRAIN + "--data good.jsonl", "good.jsonl tiny"),
        (TRAIN + "--data good.jsonl --model nowhere", "nowhere"),
        (TRAIN + "--data good.jsonl --model short", "short/model.safetensors: cut short"),
        (TRAIN + "--data good.jsonl --model gpt2", "gpt2/config.json: model_type"),
        (TRAIN + "--data good.jsonl --model wordless", "wordless/tokenizer.json"),
        (FILE + "nowhere.jsonl", "nowhere.jsonl"), (FILE + "empty.jsonl", "empty.jsonl no problems"),
        (FILE + "binary.jsonl", "binary.jsonl UTF-8"), (FILE + "cut.jsonl", "cut.jsonl, line 2: JSON"),
        (FILE + "list.jsonl", "list.jsonl, line 3: object"), (FILE + "mute.jsonl", "mute.jsonl, line 1: 'problem'"),
        (FILE + "silent.jsonl", "silent.jsonl, line 1: 'answer'"),
        (FILE + "blank.jsonl", "blank.jsonl, line 1: 'answer'"),
        (FILE + "hashes.jsonl", "hashes.jsonl, line 1: 'answer'"),
        (FILE + "long.jsonl --max-new-tokens 999", "4000 999 context"), (FILE + "letters.jsonl", "prompt token")],
    rollout: [
        ("--temp 1", "--temp"), (ASK, "--model --run"), ("--run run", "--prompt"), (ASK + "--model nowhere", "nowhere"),
        (ASK + "--run nowhere", "nowhere/config.json"), (ASK + "--run run/base", "run/base/config.json"),
        (ASK + "--run unfinished", "unfinished/adapter.safetensors"),
        (ASK + "--run run --model wide", "run/adapter.safetensors wide"),
        (ASK + "--run run --model other", "run other: same shape other weights"),
        (ASK + "--model run/base --window 10", "--window 10 divides"),
        (ASK + "--run run --max-new-tokens 9999", "9999 context"),
        (ASK + "--run run --max-new-tokens 0", "--max-new-tokens 0"),
        ("--run run --raw --max-new-tokens 9 --prompt abc", "prompt token"),
        (ASK + "--run run --temperature -1", "--temperature -1"), (ASK + "--run run --top-k -1", "--top-k -1")],
    evaluate: [
        ("--runs run", "--data"), ("--data good.jsonl", "--model --runs"), (SCORE + "nowhere.jsonl", "nowhere.jsonl"),
        (SCORE + "empty.jsonl", "empty.jsonl"), (SCORE + "cut.jsonl", "cut.jsonl, line 2:"),
        (SCORE + "good.jsonl --json list.jsonl", "list.jsonl exists"), (SCORE + "good.jsonl --window 3", "--window 3"),
        (SCORE + "good.jsonl --json nowhere/out.json", "nowhere"), (SCORE + "good.jsonl --batch 0", "--batch 0"),
        (SCORE + "long.jsonl --max-new-tokens 999", "4000 999 context"), (SCORE + "letters.jsonl", "prompt token"),
        (SCORE + "aime26", "aime26 math500, olympiadbench, minerva, amc23, aime24, aime25, gsm8k"),
        (SCORE + "good.jsonl --samples 4", "--samples 4 --temperature 0"),
        (SCORE + "good.jsonl --samples 4 --temperature 1 --pass-at 16", "pass@16 --samples 16"),
        (SCORE + "good.jsonl --samples 0", "--samples 0"), (SCORE + "good.jsonl --window two", "--window 'two'"),
        (SCORE + "good.jsonl --window 0,3", "--window 3"), (SCORE + "good.jsonl --window 8 -2", "--window -2"),
        (SCORE + "good.jsonl --window ,", "--window"), (SCORE + "good.jsonl --runs run nowhere", "nowhere/config.json"),
        (SCORE + "good.jsonl --runs unfinished", "unfinished/adapter.safetensors"),
        (SCORE + "good.jsonl --model wide", "run/adapter.safetensors wide"),
        (SCORE + "good.jsonl --model other", "run other: same shape other weights"),
        (SCORE + "good.jsonl --json nowhere/runs/out.json", "nowhere/runs/out.json")],
}


def listing(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.parametrize("module, line, words", [(m, *case) for m in MISTAKES for case in MISTAKES[m]],
                         ids=lambda x: getattr(x, "__name__", x))
def test_a_mistake_is_answered_in_one_line(place, monkeypatch, capsys, module, line, words):
    monkeypatch.chdir(place)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "wandb", None)                             # not installed
    for left in ("new", "runs"):  # where this test failed before
        rmtree(left, ignore_errors=True)
    before = listing(place)
    assert call(module, *line.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(f"{module.__name__}.py: "), err
    assert all(word in err for word in words.split()), err
    assert listing(place) == before


def test_only_newlines_end_a_line_of_data(tmp_path):
    """JSON may hold line separators of Unicode as they are; str.splitlines would cut there."""
    path, text = tmp_path / "x.jsonl", "a\u2028b\x85c"
    path.write_bytes((json.dumps({"problem": text, "answer": "1"}, ensure_ascii=False) + "\r\n").encode())
    assert rollout.load_problems(path) == [{"problem": text, "answer": "1"}]
