"""mutants.py: breaks the code in one line at a time, and sees whether its tests notice.

    python tests/mutants.py --only 3 17     two of them; without --only all, in about 15 minutes

The mutants are in mutants.jsonl: a file, an old text, which must occur exactly once, and the new
text. A mutant that no test catches shows a gap in the tests, or changes nothing that can be seen.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORE = ("cache", "encoder", "rollout", "grpo")
MUTANTS = [json.loads(line) for line in open(ROOT / "tests" / "mutants.jsonl")]

def first_failure(file, old, new):
    """The first test that fails on a copy of the project with this change, "" if none does."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", "__pycache__"))
        path = copy / f"{file}.py"
        text = path.read_text()
        if text.count(old) != 1:
            sys.exit(f"mutants.py: {old!r} occurs {text.count(old)} times in {file}.py, not once")
        path.write_text(text.replace(old, new))
        names = [file, *[name for name in CORE if name != file]]       # its own tests first
        tests = [f"tests/test_{name}.py" for name in names]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
            cwd=copy, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    failed = [x for x in done.stdout.splitlines() if x.startswith(("FAILED", "ERROR"))]
    return failed[0] if failed else f"exit code {done.returncode}"

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=int, nargs="+", help="numbers of mutants; default: all")
    numbers = parser.parse_args().only or range(len(MUTANTS))
    for file in ("train", "evaluate"):                                  # and the core's tests too
        text = (ROOT / f"{file}.py").read_text()
        if first_failure(file, text, text):
            sys.exit(f"mutants.py: the tests of {file}.py or of the core fail without a mutant")
    survivors = []
    for number in numbers:
        mutant = MUTANTS[number]
        failure = first_failure(**mutant)
        print(f"{number:3} {mutant}", flush=True)
        print(f"        {failure or 'SURVIVED'}", flush=True)
        if not failure:
            survivors.append(number)
    n_caught = len(numbers) - len(survivors)
    print(f"{n_caught} of {len(numbers)} mutants are caught; survivors: {survivors or 'none'}")

if __name__ == "__main__":
    main()
