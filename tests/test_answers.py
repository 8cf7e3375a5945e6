"""Finding and comparing answers. The cases are in answers.jsonl: completions and the answer in them
("extract"); equal answers that the built-in grader must know ("builtin") or that need math-verify
("library"); and near misses that must never be equal ("never")."""
import json
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

import evaluate
from evaluate import MAX_ANSWER, extract_answer, same_answer

CASES = [json.loads(line) for line in open(Path(__file__).with_name("answers.jsonl"))]
needs_library = pytest.mark.skipif(not find_spec("math_verify"), reason="needs math-verify")

def failures(kind, right, grader):
    """The pairs of a kind that get another verdict than `right`, in one of the two directions."""
    found = []
    for case in CASES:
        for answer in case.get("answers", ()) if case["kind"] == kind else ():
            if equal(case["gold"], answer, grader) != right:
                found.append((case["gold"], answer))
    return found

def equal(gold, answer, grader="builtin"):
    """The verdict, which must be the same in both directions."""
    verdict = same_answer(gold, answer, 0.0, grader)
    assert same_answer(answer, gold, 0.0, grader) == verdict
    return verdict

def test_the_answer_is_found():
    cases = [case for case in CASES if case["kind"] == "extract"]
    assert [c for c in cases if extract_answer(c["completion"]) != c["answer"]] == []

def test_the_builtin_grader():
    assert failures("builtin", True, "builtin") == []
    assert failures("library", False, "builtin") == []          # else they belong to "builtin"
    assert failures("never", False, "builtin") == []

@needs_library
def test_with_the_library():
    assert failures("library", True, "auto") == []
    assert failures("never", False, "auto") == []

def test_tolerance_is_for_numbers():
    for gold, answer, right in [("4.5e33", r"4.51\times 10^{33}", True), ("0.49", "0.4925", True),
                                ("100", "99", True), ("1.6", "1.7", False), ("-5", "5", False),
                                ("2.26e-10", "0", False), ("(1.5, 20)", "(20, 1.5)", False),
                                ("1.5, 20", "1.5, 20.1", False), ("1+2i", "1-2i", False)]:
        assert same_answer(gold, answer, tolerance=0.01) == right

@needs_library
def test_the_library_has_a_time_limit_in_every_thread():
    with ThreadPoolExecutor() as threads:
        assert not threads.submit(evaluate.ask_library, "x+y", "y+x+0", seconds=0).result()
        assert threads.submit(evaluate.ask_library, "x+y", "y+x+0").result()

@needs_library
def test_the_library_ends_with_the_program():
    program = "import evaluate; print(evaluate.ask_library('x+y', 'y+x'))"
    result = subprocess.run([sys.executable, "-c", program], cwd=Path(evaluate.__file__).parent,
                            capture_output=True, text=True, timeout=100)
    assert (result.returncode, result.stdout, result.stderr) == (0, "True\n", "")

def test_no_answer_is_wrong():
    assert not same_answer("5", None)
    assert not same_answer("9" * (MAX_ANSWER + 1), "9" * (MAX_ANSWER + 1))

PIECES = [r"\boxed{", r"\boxed{1}, ", "{", r"\{", "1", "(", "1,", "$", " ", "\n", "#", "answer: "]
HOSTILE = [piece * 10**6 for piece in PIECES] + [
    "9^{9^{9^9}}", "10^{-10^{10}}", "1e999999999", "9" * 499, "," * 500, "x=1," * 120, "-" * 499,
    "1," * 249 + "1", "(" * 249 + "1" + ")" * 249, r"\frac{" * 80, "1 " * 250, r"\text{" * 80,
    r"\frac{1}{" * 49 + "2" + "}" * 49, "1/" * 249 + "1", "answer: 1" + " *" * 10**6 + "2"]

def test_nothing_hostile_is_slow():
    for text in HOSTILE:
        start = time.perf_counter()
        extract_answer(text)
        extract_answer(r"\boxed{" + text)
        for other in ("5", text, text[::-1], text + "+1"):
            same_answer(text, other, 0.01, "builtin")
            same_answer(other, text, 0.0, "builtin")
        assert time.perf_counter() - start < 1, text[:20]

def test_random_texts_never_raise():
    rng = random.Random(0)
    pieces = r"""\boxed{ \frac \frac{1}{2} \text{ \left \cup \pi \\ ^{ _ { } \{ \} ( ) [ ] , . ; 0 1
        23 / - + * ! = < > | x e % ** Answer: and or cm million √ ± ≤ ° é 10^ 1,000""".split()
    pieces += [" ", "\0"]
    for _ in range(1000):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 60)))
        other = text.replace(rng.choice(pieces), rng.choice(pieces), 1)
        extract_answer(text)
        equal(text, other)
