"""A task for a real, small model whose answer needs thoughts that the window has dropped: following
arrows between eight digits. Writes arrows-train.jsonl and arrows-test.jsonl, the same each time.

    python tests/arrows.py --out DIR

The arrows form one ring of all eight digits. A walk of four steps is written out digit by digit,
each a lookup in the prompt, and the answer repeats where both walks ended. With a window of 8
tokens the end of the first walk is gone by then. To read it off the prompt a model would have to
take four steps in its head; a guess is right in 1 of 7 cases."""
import argparse
import json
from pathlib import Path

import numpy as np

def problem(rng):
    """A row of a problem file, with the worked solution that supervised steps teach."""
    ring = rng.permutation(8)                                       # ring[i] points to ring[i + 1]
    after = {int(ring[i]): int(ring[(i + 1) % 8]) for i in range(8)}
    starts = rng.choice(8, size=2, replace=False).tolist()
    walks = []
    for digit in starts:
        walk = [digit]
        for _ in range(4):
            walk.append(after[walk[-1]])
        walks.append("".join(map(str, walk)))
    arrows = " ".join(f"{digit}>{after[digit]}" for digit in range(8))
    answer = walks[0][-1] + walks[1][-1]
    return {"problem": f"Arrows {arrows}. Four steps from {starts[0]} and from {starts[1]}.",
            "answer": answer, "exact": True, "parts": True,
            "solution": f"{walks[0]};{walks[1]}\nAnswer: {answer}"}

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=".")
    args = parser.parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for seed, (name, n) in enumerate([("train", 5000), ("test", 100)]):
        rng = np.random.default_rng(seed)
        lines = [json.dumps(problem(rng)) + "\n" for _ in range(n)]
        Path(args.out, f"arrows-{name}.jsonl").write_text("".join(lines))

if __name__ == "__main__":
    main()
