"""mutants.py: breaks the core in one line at a time, and sees whether its tests notice.

    python tests/mutants.py                 all of them, about 10 minutes on one core
    python tests/mutants.py --only 3 17     some

A mutant that no test catches shows a gap in the tests, or changes nothing that can be seen.
"""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORE = ("cache", "encoder", "rollout", "grpo")
MUTANTS = [     # file, old text (must occur exactly once), new text
    ("cache", "E >= 1 and window % E == 0", "E >= 1"),
    ("cache", "window == 0 or window >= max_new_tokens", "window == 0"),
    ("cache", "- n_pads * (self.reserved >= self.P)", "+ 0 * n_pads"),
    ("cache", "token_at <= self.reserved[:, None]", "token_at <= self.reserved[-1]"),
    ("cache", "token_at >= self.prompt_lengths", "token_at > self.prompt_lengths"),
    ("cache", "self.values[layer].index_copy_(2, self.slots, v)", "pass"),
    ("cache", "prompt[rows], ring", "prompt[rows.flip(0)], ring"),
    ("cache", "prompt in enumerate(buffers)", "prompt in enumerate(list(buffers))"),
    ("cache", "buffer in enumerate(buffers)", "buffer in enumerate(list(buffers))"),
    ("cache", "= buffer[rows]", "= buffer[:len(rows)]"),
    ("cache", "self.token_at[self.P:].argsort()", "torch.arange(self.W)"),
    ("cache", "self.token_at[slots] = -1", "self.token_at[slots[:1]] = -1"),
    ("cache", "x.detach()[:, :, slots]", "x[:, :, slots]"),
    ("cache", "leaving.transpose(2, 3)", "leaving.transpose(2, 3).flip(3)"),
    ("cache", "[x.detach() for x in self.keys]", "self.keys"),
    ("cache", "if self.read_all_slots else", "if False else"),
    ("encoder", "self.scale = alpha / R", "self.scale = alpha / M"),
    ("encoder", "torch.zeros(base.out_features, M)", "torch.full((base.out_features, M), 1e-4)"),
    ("encoder", "torch.zeros(base.out_features, M)",
     "torch.zeros(base.out_features, M).to(base.weight.dtype)"),
    ("encoder", "z @ S.to(x.dtype).mT", "z @ S.to(x.dtype).flip(0).mT"),
    ("encoder", "return torch.zeros_like(memory) if", "return memory if"),
    ("encoder", 'if self.adapter == "global-only"', "if False"),
    ("encoder", "self.initial_memory().expand_as(memory)", "memory"),
    ("encoder", "memory + self.encode(K_e, V_e)", "self.encode(K_e, V_e)"),
    ("encoder", "memory + self.encode(K_e, V_e)", "memory + self.encode(V_e, K_e)"),
    ("encoder", 'self.memory_update == "paper"', "False"),
    ("encoder", "2 / (self.R * K.shape[2] ** 0.5)", "2 / self.R"),
    ("encoder", "F.rms_norm(V.to(self.h_g.dtype), V.shape[-1:])", "V.to(self.h_g.dtype)"),
    ("encoder", 'self.memory_order == "keys-match"', "True"),
    ("encoder", "F.normalize(S, dim=-1)", "F.normalize(S, dim=-2)"),
    ("encoder", "    model.requires_grad_(False)", "    pass"),
    ("encoder", "assert not isinstance(module, AdaptedLinear)", "assert True"),
    ("rollout", "hidden[torch.arange(N, device=device), prompt_lengths - 1]", "hidden[:, -1]"),
    ("rollout", "uniform[rows, t]", "uniform[:len(rows), t]"),
    ("rollout", "manual_seed(seed % 2**63)", "manual_seed(0)"),
    ("rollout", "memory[:, left] if", "memory[:, :len(left)] if"),
    ("rollout", "drawn = drawn[left]", "drawn = drawn[:len(left)]"),
    ("rollout", "encoder.update(memory, K_e, V_e) if", "memory if"),
    ("rollout", "first_end + 1, t + 1", "first_end, t + 1"),
    ("rollout", "logits / (temperature or 1.0)", "logits"),
    ("rollout", "(0, width - x.shape[1])", "(width - x.shape[1], 0)"),
    ("rollout", "seeds=seeds[i:i + n]", "seeds=seeds[:n]"),
    ("rollout", "argmax(dim=-1, keepdim=True)", "argmin(dim=-1, keepdim=True)"),
    ("rollout", "(1 - u[:, None])", "u[:, None]"),
    ("rollout", "over + self.evict_size - 1", "over"),
    ("rollout", "self.lengths - self.ended.long()", "self.lengths"),
    ("rollout", "fixed.copy_(new)", "pass"),
    ("rollout", "S, cache.slots = self.fixed", "S, _ = self.fixed"),
    ("rollout", "len(self.fixed[0]) != len(ids)", "True"),
    ("grpo", "correction=0", "correction=1"),
    ("grpo", "rounding = 1e-6", "rounding = 0"),
    ("grpo", "torch.minimum(ratio", "torch.maximum(ratio"),
    ("grpo", "(1 - clip_low, 1 + clip_high)", "(1 - clip_high, 1 + clip_low)"),
    ("grpo", "d.exp() - d - 1", "-d"),
    ("grpo", "(temperature or 1.0)", "1.0"),
    ("grpo", "(positions - 1)[..., None]", "positions[..., None]"),
    ("grpo", "if config.inner_epochs == 1:", "if False:"),
    ("grpo", "start + evict_size, n_written", "start + window, n_written"),
    ("grpo", "            cache.detach()", "            pass"),
    ("grpo", "memory = memory.detach()", "pass"),
    ("grpo", "S.backward(leaf.grad)", "pass"),
    ("grpo", "hidden[torch.arange(len(prompts), device=rows.device), prompt_lengths - 1]",
     "hidden[:, -1]"),
    ("grpo", "order[advantages[order] != 0]", "order"),
    ("grpo", "min(longest, rollout.window) if rollout.window else longest", "longest"),
    ("grpo", "numbers < rollout.lengths[rows, None]", "numbers < rollout.lengths[rows, None] - 1"),
    ("grpo", "advantages[rows, None]", "advantages[:len(rows), None]"),
    ("grpo", "(loss * mask).sum() / n_tokens", "(loss * mask).sum() / mask.sum()"),
    ("grpo", 'use_std=config.loss == "grpo"', "use_std=True"),
    ("grpo", "all_reduce(parameter.grad)", "pass"),
    ("grpo", "all_rows=config.kl_coef > 0", "all_rows=False"),
    ("grpo", "if epoch == 0", "if True"),
    ("grpo", "if finite:", "if True:"),
]

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
        own_tests_first = sorted(CORE, key=lambda name: name != file)
        tests = [f"tests/test_{name}.py" for name in own_tests_first]
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
    if first_failure("cache", "import torch\n", "import torch \n"):
        sys.exit("mutants.py: the tests fail without a mutant")
    survivors = []
    for number in numbers:
        file, old, new = MUTANTS[number]
        failure = first_failure(file, old, new)
        print(f"{number:3} {file}: {old.strip()!r} -> {new.strip()!r}", flush=True)
        print(f"        {failure or 'SURVIVED'}", flush=True)
        if not failure:
            survivors.append(number)
    n_caught = len(numbers) - len(survivors)
    print(f"{n_caught} of {len(numbers)} mutants are caught; survivors: {survivors or 'none'}")

if __name__ == "__main__":
    main()
