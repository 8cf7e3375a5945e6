"""Files from elsewhere, mutated: each either loads or ends in the project's own one-line error.

No other exception, no hang, no memory beyond the file's size, no file touched. The short form runs with the tests; more
cases, other seeds:  python tests/test_fuzz.py --cases 20000 --seed 1
"""
import argparse
import json
import random
import signal
import struct
import tempfile
import time
from pathlib import Path

import pytest
import torch

import conftest
import encoder
import train
from model import Tokenizer, Transformer, UserError, read_json
from rollout import load_problems

VALUES = [None, True, False, -1, 0, 1, 2, 7, 255, 2 ** 31, 2 ** 63, 10 ** 30, 0.5, -0.0, 1e308, float("inf"),
          float("nan"), "", "x", "x" * 5000, "\ud800", "\x00", "../../etc/passwd", [], {}, [[]], [0] * 1000, {"": None},
          "F32", "[[[", "(a+)+$", {"type": "Split"}, "{{ 9 ** 9 ** 9 }}"]
TEXT = "Hello 12,5= <|end|> wörld 世界 \t\n  I'm 3.5"
LIMIT = 10  # seconds a case may take; the longest builds a model of 1,000 layers (without numbers)


def nodes(tree, path=()):
    """The paths of all that is in a tree of dicts and lists."""
    branches = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path] * bool(path) + [p for key, branch in branches for p in nodes(branch, (*path, key))]


def at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def mutated_json(text, rng):
    """One to three changes of what the JSON says, or of its bytes."""
    if rng.random() < 0.3:
        return mutated_bytes(text.encode(), rng)
    tree = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not (paths := nodes(tree)):
            break
        *path, key = rng.choice(paths)
        parent, what = at(tree, path), rng.random()
        if what < 0.2:
            del parent[key]
        elif what < 0.4:
            parent[key] = at(tree, rng.choice(paths)) if rng.random() < 0.5 else [parent[key]] * rng.choice((1, 2, 300))
        elif what < 0.5 and isinstance(parent, dict):
            parent[rng.choice(["", "type", "content", "x" * 300, str(key) + " "])] = parent.pop(key)
        elif what < 0.6 and isinstance(parent[key], (int, float)):
            parent[key] = parent[key] * rng.choice((-1, 2, 1000, 1e-9)) + rng.choice((0, 1))
        else:
            parent[key] = rng.choice(VALUES)
        try:
            text = json.dumps(tree)                                             # a branch may hold itself now
        except ValueError:
            return b"[" * 100_000
    return text.encode("utf-8", "surrogatepass")


def mutated_bytes(data, rng):
    """A few bytes changed, cut out, put in, or said twice."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        i, j = sorted(rng.choices(range(len(data) + 1), k=2))
        j = min(j, i + rng.choice((1, 4, 50, len(data))))
        data[i:j] = rng.choice((b"", data[i:j] * 2, rng.randbytes(j - i), b"\x00" * (j - i), b"\xff\xfe", b'"', b"}",
                                b"[" * 5000))
    return bytes(data)


def mutated_safetensors(data, rng):
    """Its header changed as JSON, the length of the header, the header's bytes, any bytes, or a number in a tensor."""
    n, what = int.from_bytes(data[:8], "little"), rng.random()
    if what < 0.5:
        header = mutated_json(data[8:8 + n].decode(), rng)
        return struct.pack("<Q", len(header)) + header + data[8 + n:]
    if what < 0.6:
        return struct.pack("<Q", rng.choice((0, 1, n - 1, n + 1, len(data), 2 ** 40, 2 ** 63, 2 ** 64 - 1))) + data[8:]
    if what < 0.8:
        return mutated_bytes(data[:8 + n], rng) + data[8 + n:]
    i = rng.randrange(8 + n, len(data))
    return mutated_bytes(data, rng) if what < 0.9 else data[:i] + rng.randbytes(1) + data[i + 1:]


def mutated_lines(data, rng):
    lines = data.decode().splitlines()
    i = rng.randrange(len(lines))
    return b"\n".join(mutated_json(line, rng) if j == i else line.encode() for j, line in enumerate(lines))


def use_tokenizer(folder):
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.decode(tokenizer.encode(TEXT))
    if tokenizer.template:
        tokenizer.chat([{"role": "user", "content": TEXT}])


def use_model(folder):
    Transformer.from_folder(folder, dtype=torch.float32)(torch.tensor([[1, 2, 3]]))


TARGETS = {  # what is mutated, how, and what then reads the folder
    "model.safetensors": (mutated_safetensors, use_model),
    "config.json": (lambda data, rng: mutated_json(data.decode(), rng), use_model),
    "tokenizer.json": (lambda data, rng: mutated_json(data.decode(), rng), use_tokenizer),
    "tokenizer_config.json": (lambda data, rng: mutated_json(data.decode(), rng), use_tokenizer),
    "problems.jsonl": (mutated_lines, lambda folder: load_problems(folder / "problems.jsonl")),
    "run/config.json": (lambda data, rng: mutated_json(data.decode(), rng),
                        lambda folder: encoder.load("", folder / "run", "float32", "cpu"))}


def sound_folder(folder):
    """A tiny model, a tokenizer with merges, added tokens and a chat template, and a few problems."""
    train.build_base(folder, 1, 0, "cpu")
    spec = read_json(folder / "tokenizer.json")
    letters = [chr(n) for n in range(33, 127)] + ["Ġ", "Ċ"]
    merges = [["H", "e"], ["l", "l"], ["He", "ll"], ["Ġ", "I"]]
    vocab = {token: n for n, token in enumerate(letters + ["".join(m) for m in merges])}
    spec["model"] |= {"vocab": vocab, "merges": merges}
    spec["added_tokens"] = [{**token, "id": 200 + n} for n, token in enumerate(spec["added_tokens"])]
    spec["normalizer"] = {"type": "NFC"}
    regex = {"type": "Split", "pattern": {"Regex": r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"}, "behavior": "Isolated",
             "invert": False}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [regex, spec["pre_tokenizer"] | {"use_regex": False}]}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": "<|end|>", "eos_token": {"content": "<|end|>"}, "add_bos_token": True,
        "chat_template": "{% for m in messages %}{{ bos_token + m['role'] + m['content'] }}{% endfor %}"}))
    (folder / "problems.jsonl").write_text("\n".join(json.dumps({"problem": f"{n} + 1?", "answer": a, "exact": n > 1})
                                                     for n, a in enumerate(["1", 2, 3.0, "a #### 4"])))
    assert conftest.call(train, *conftest.SMALL, "--test-problems", 0, "--out", folder / "run") == 0
    for _, use in TARGETS.values():
        use(folder)


def resident():
    """Memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def fuzz(folder, target, cases, seed, bar=lambda cases: cases):
    """Mutates one file of the folder, again and again -> [cases that loaded, cases refused]. AssertionError for any
    other end; the file is put back."""
    path, (mutate, use) = folder / target, TARGETS[target]
    sound, rng, ends = path.read_bytes(), random.Random(f"{target} {seed}"), [0, 0]
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p != path}

    def hang(*_):
        raise AssertionError("it takes too long")
    handler = signal.signal(signal.SIGALRM, hang)
    try:
        for case in bar(range(cases)):
            data = mutate(sound, rng)
            path.write_bytes(data)
            memory, start = resident(), time.time()
            signal.alarm(LIMIT)
            try:
                use(folder)
                ends[0] += 1
            except (UserError, OSError) as error:                               # run_script makes a line of both
                error = UserError(str(error))
                assert len(str(error).splitlines()) == 1 and len(str(error)) < 2000, f"case {case}: {str(error):.3000}"
                ends[1] += 1
            except BaseException as error:
                Path(tempfile.gettempdir(), f"fuzz-{path.name}").write_bytes(data)
                raise AssertionError(f"{target}, seed {seed}, case {case}: {error!r:.500}") from error
            finally:
                signal.alarm(0)
            assert resident() - memory < 64e6 + 20 * len(data), f"case {case} takes {resident() - memory} bytes"
            assert path.read_bytes() == data, "the file was written to"
    finally:
        signal.signal(signal.SIGALRM, handler)
        path.write_bytes(sound)
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p != path}
    return ends


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    sound_folder(folder)
    return folder


@pytest.mark.parametrize("target", TARGETS)
def test_a_mutated_file_loads_or_is_refused_in_one_line(target, folder):
    loaded, refused = fuzz(folder, target, 600, seed=0)
    assert loaded > 10 and refused > 100                                        # both ends are reached


if __name__ == "__main__":
    from tqdm import tqdm
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        sound_folder(Path(place))
        for target in TARGETS:
            ends = fuzz(Path(place), target, o.cases // len(TARGETS), o.seed, tqdm)
            print(target, "loaded, refused:", ends, flush=True)
