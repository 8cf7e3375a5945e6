"""benchmark.py measures what it says: sections 1 and 4, as small as they get."""
import json
from functools import partial
from types import SimpleNamespace

import torch

import benchmark

def run(path, *flags):
    """The tables of a run on the tiny shape, as they are in its JSON file."""
    benchmark.main([*flags, "--repeats", "1", "--threads", "1", "--json", str(path)])
    return json.loads(path.read_text())

def test_decode(tmp_path, capsys):
    flags = "--sections 1 --rows 1 2 --new-tokens 12 --window 8".split()
    tables = run(tmp_path / "all.json", *flags)
    rows = tables["decode"]
    assert [(row["arm"], row["rows"]) for row in rows] == [
        ("PTE", 1), ("LoRA", 1), ("no adapter", 1), ("PTE", 2), ("LoRA", 2), ("no adapter", 2)]
    assert all(row["tokens/s"] > 0 for row in rows)
    assert "| arm | rows | tokens/s |\n|---|---|---|\n| PTE | 1 |" in capsys.readouterr().out

def test_training(tmp_path):
    tables = run(tmp_path / "all.json", *"--sections 4 --lengths 66 99".split())
    assert list(tables) == ["training"]
    rows = {(row["arm"], row["tokens"]): row for row in tables["training"]}
    assert len(rows) == 6 and all(row["seconds"] > 0 for row in rows.values())
    growth = {arm: rows[arm, 99]["bytes"] / rows[arm, 66]["bytes"] for arm, _ in rows}
    assert growth["LoRA, full cache"] > 1.2
    assert growth["PTE, truncated memory"] == 1         # memory does not depend on the length

def test_bytes_are_counted_once_and_while_they_are_kept():
    weight = torch.ones(5, 5, requires_grad=True)
    x = torch.ones(5, 5, requires_grad=True)

    def replay(model, token_loss):
        for _ in range(2):
            y = x.exp()                                 # keeps y, 100 bytes
            z = y * weight + y.T * y                    # y again; the weight does not count
            token_loss(z, None).backward()

    model = SimpleNamespace(parameters=lambda: [weight])
    assert benchmark.bytes_kept(partial(replay, model)) == 100
