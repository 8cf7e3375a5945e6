"""The ablation table of the README: the tiny world with one thing changed, three seeds each.

    OMP_NUM_THREADS=1 python tests/ablations.py --out runs/ablations            all rows
    OMP_NUM_THREADS=1 python tests/ablations.py --out runs/ablations --rows softmax window-8

A row is flags of train.py, or a change of the code that the function beside it makes. What is done
already in --out is not done again, so two calls with the same --out share the work. Writes
ablations.md: the accuracy of K = 2 and K = 3 under the window, in %, one number for each seed."""
import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import encoder                                              # noqa: E402
import grpo                                                 # noqa: E402
import train                                                # noqa: E402

def softmax_in_s():
    """S' = softmax((W_Q q_g) answer^T) match: each row of S' is a mean of the evicted tokens."""
    def update(memory, q, match, answer, gate, decay):
        write = (q @ answer.mT).softmax(dim=-1) @ match             # (L, B, R, R)
        return memory + write, write
    encoder.MEMORY_UPDATES["sum"] = update

def scale_of_s(factor):
    def change():
        project = encoder.ThoughtEncoder.project
        def scaled(self, K, V, positions=None):
            q, match, answer, gate = project(self, K, V, positions)
            return factor * q, match, answer, gate
        encoder.ThoughtEncoder.project = scaled
    return change

def frobenius_norm():
    """The whole state has the norm sqrt(R), not each of its rows the norm 1."""
    def normalize(memory):
        size = memory.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12)
        return memory.shape[-1] ** 0.5 * memory / size
    encoder.normalize = normalize

def normalized_s():
    """S' is normalized by itself before it is added."""
    def update(memory, q, match, answer, gate, decay):
        write = encoder.normalize(q @ (answer.mT @ match))          # (L, B, R, R)
        return memory + write, write
    encoder.MEMORY_UPDATES["sum"] = update

def fixed_gate():
    rule = encoder.MEMORY_UPDATES["delta"]
    def update(memory, q, match, answer, gate, decay):
        return rule(memory, q, match, answer, gate.detach() * 0 + 0.5, decay)
    encoder.MEMORY_UPDATES["delta"] = update

def only_linears(part):
    """The other linears keep A = 0: they are not adapted."""
    def change():
        attach = train.attach_by_config
        def attach_some(model, config):
            found = attach(model, config)
            for name, linear in found.linears.items():
                linear.requires_grad_(part in name)
            return found
        train.attach_by_config = attach_some
    return change

def full_cache_replay():
    """The classic mistake: log-probs for the loss from a forward pass that sees everything."""
    replay = grpo.replay_and_backward
    def replay_full(model, encoder, rollout, *rest):
        return replay(model, encoder, dataclasses.replace(rollout, window=0), *rest)
    grpo.replay_and_backward = replay_full

ROWS = {    # name: (flags of train.py, function that changes the code)
    "default": ("", None),
    "lora": ("--adapter lora", None),
    "global tokens only": ("--adapter global-only", None),
    "global tokens 0": ("--global-tokens 0", None),
    "global tokens 4": ("--global-tokens 4", None),
    "global tokens 8": ("--global-tokens 8", None),
    "global tokens 16": ("--global-tokens 16", None),
    "rank 4": ("--rank 4", None),
    "rank 8": ("--rank 8", None),
    "rank 16": ("--rank 16", None),
    "eviction 1/8": ("--evict-ratio 0.125", None),
    "eviction 1/2": ("--evict-ratio 0.5", None),
    "window 8": ("--window 8", None),
    "window 24": ("--window 24", None),
    "update paper": ("--memory-update paper", None),
    "update sum": ("--memory-update sum", None),
    "update gated": ("--memory-update gated", None),
    "paper's order": ("--memory-order paper", None),
    "paper's order and update": ("--memory-order paper --memory-update paper", None),
    "plain keys": ("--memory-keys plain", None),
    "gradient through one eviction": ("--truncate-memory 1", None),
    "encoder lr 1e-3": ("--encoder-lr 1e-3", None),
    "exact reward": ("--reward exact", None),
    "gate fixed at 1/2": ("", fixed_gate),
    "update sum, softmax in S'": ("--memory-update sum", softmax_in_s),
    "update sum, S' normalized": ("--memory-update sum", normalized_s),
    "S' half": ("", scale_of_s(0.5)),
    "S' double": ("", scale_of_s(2.0)),
    "Frobenius norm": ("", frobenius_norm),
    "only attention": ("", only_linears("attention")),
    "only feed-forward": ("", only_linears("ffn")),
    "full-cache replay": ("", full_cache_replay)}

def run_one(name, out):
    """One run, in a process of its own. The rest of the command line are flags of train.py."""
    change = ROWS[name][1]
    if change:
        change()
    sys.argv[1:] = [*ROWS[name][0].split(), "--out", out, *sys.argv[4:]]
    config = train.parse_args()
    gaps = [metrics.get("logp_gap", 0.0) for metrics in train.train(config)]
    train.print_table(config)
    Path(out, "largest_gap.json").write_text(json.dumps(max(gaps)))

def cell(folder, config_window):
    rows = json.loads((folder / "table.json").read_text())["rows"]
    scores = [row["scores"] for row in rows if row["window"] == config_window][-1]
    return [100 * scores[f"tally-{K}"]["accuracy"][0] for K in (2, 3)]

def main():
    if sys.argv[1] == "--one":
        run_one(sys.argv[2], sys.argv[3])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--steps", default="100")
    args = parser.parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for name in args.rows:
            folder = Path(args.out, f"{name.replace(' ', '-').replace('/', '_')}-{seed}")
            try:
                folder.with_suffix(".begun").touch(exist_ok=False)      # another call does it
            except FileExistsError:
                continue
            print(name, seed, flush=True)
            with open(f"{folder}.log", "w") as log:
                subprocess.run([sys.executable, __file__, "--one", name, str(folder), "--seed",
                                seed, "--steps", args.steps], stdout=log, stderr=log, check=False,
                               env=os.environ)
    write_table(args)

def write_table(args):
    lines = ["| change | K = 2 | K = 3 | logp_gap |", "|---|---|---|---|"]
    for name in ROWS:
        found = []
        for seed in args.seeds:
            folder = Path(args.out, f"{name.replace(' ', '-').replace('/', '_')}-{seed}")
            if (folder / "largest_gap.json").exists():
                window = json.loads((folder / "config.json").read_text())["window"]
                gap = json.loads((folder / "largest_gap.json").read_text())
                found.append([*cell(folder, window), gap])
        if found:
            K_2 = ", ".join(f"{x[0]:.0f}" for x in found)
            K_3 = ", ".join(f"{x[1]:.0f}" for x in found)
            lines.append(f"| {name} | {K_2} | {K_3} | {max(x[2] for x in found):.0e} |")
    Path(args.out, "ablations.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))

if __name__ == "__main__":
    main()
