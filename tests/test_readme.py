"""The README: each flag that it names exists, what it quotes is what the code prints, and each file
and function that it points to is there."""
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import example
from train import Config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

def commands():
    """The command lines of the README, as lists of words."""
    text = README.replace("\\\n", " ")
    found = re.findall(r"(?:^    |`)((?:OMP_NUM_THREADS=1 )?(?:python|torchrun) [^`\n]*)", text, re.M)
    return [command.split("  ")[0].split("#")[0].split() for command in found]

@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "rollout.py", "tests/arrows.py",
                                    "tests/ablations.py"])
def test_every_flag_in_a_command_exists(script):
    known = set(re.findall(r'"(--[a-z-]+)"', (ROOT / script).read_text()))
    if script == "train.py":
        known = {"--" + field.name.replace("_", "-") for field in fields(Config)}
    named = set()
    for words in commands():
        if script in words:
            named |= {word for word in words if word.startswith("--")} - {"--nproc_per_node=4"}
    assert named and named <= known

def test_the_eviction_by_hand_is_what_the_command_prints(capsys):
    with torch.no_grad():
        example.main()
    printed = capsys.readouterr().out
    numbers = re.findall(r"\[ +-?\d\.\d\d +-?\d\.\d\d\]", printed)
    section = README.split("## 3. ")[1].split("## 4. ")[0]
    assert len(numbers) > 10
    assert re.findall(r"\[ +-?\d\.\d\d +-?\d\.\d\d\]", section) == numbers

def test_files_and_functions_exist():
    for name in re.findall(r"`((?:tests/)?[a-z_]+\.py)`", README):
        assert (ROOT / name).exists(), name
    for name, functions in re.findall(r"`([a-z]+\.py)`[:,] ((?:`[A-Za-z_.]+`(?:, )?)+)", README):
        code = (ROOT / name).read_text()
        for function in re.findall(r"`([A-Za-z_.]+)`", functions):
            if function.endswith(".py"):                            # a list of files
                continue
            last = function.split(".")[-1]
            assert re.search(rf"(def|class) {last}\b|^{last} = ", code, re.M), (name, function)
