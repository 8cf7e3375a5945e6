"""mutants.py: breaks cache.py, encoder.py and grpo.py in small ways, one at a time, and sees whether the tests notice.

    python tests/mutants.py                 all of them, two at a time: half an hour on 2 cores
    python tests/mutants.py --only 3 17     some

A mutant that no test catches shows a gap in the tests, or changes nothing that can be seen. Each line of the list: what
is replaced (it must occur once in the file), and by what.
"""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = {"cache.py": "cache decode rollout grpo gradient mistakes scripts safetensors resume ranks",
         "encoder.py": "encoder grpo gradient decode adapter_files mistakes scripts arms evaluate fuzz",
         "grpo.py": "grpo gradient decode health scripts ranks resume"}
MUTANTS = {
    "cache.py": [
        ("window % E:", "False:"),
        ("if 0 < evict_ratio <= 1 else 0 ", "if evict_ratio > 0 else 0 "),
        ("abs(E - window * evict_ratio) > 1e-6", "False"),
        ("if 0 < window < max_thoughts else", "if 0 < window else"),
        ("columns < self.prompt_lengths[:, None]", "columns <= self.prompt_lengths[:, None]"),
        ("self.prompt_lengths[rows], -self.P % multiple", "self.prompt_lengths[:len(rows)], -self.P % multiple"),
        ("        self.P += extra\n", ""),
        ("self.prompt_lengths[rows], self.seen[rows]", "self.prompt_lengths[rows], self.seen[:len(rows)]"),
        ("self.n - self.oldest == self.window", "self.n - self.oldest >= self.window - 1"),
        ("(columns <= columns[:, None])[None, None] ", "(columns < columns[:, None] + 2)[None, None] "),
        ("a = self.P + self.n % self.window ", "a = self.P + (self.n + 1) % self.window "),
        ("min(self.n, self.window))", "min(self.n - 1, self.window))"),
        ("self.seen[:, a:a + T] = True", "self.seen[:, a:a + 1] = True"),
        ("mask[..., a:a + T] = queries <= queries[:, None]", "mask[..., a:a + T] = queries < queries[:, None]"),
        ("self.prompt_lengths[:, None] + queries, mask", "self.P + queries, mask"),
        ("self.values[layer].index_copy_(2, self.slots, v)", "self.values[layer].index_copy_(2, self.slots, v.detach())"),
        ("a = self.P + self.oldest % self.window", "a = self.P"),
        ("self.oldest += self.evict_size", "self.oldest += 1"),
        ("        self.seen[:, a:b] = False\n", ""),
        ("x[:, :, a:b].detach()", "x[:, :, a:b]"),
        (".transpose(2, 3).flatten(3)", ".flatten(3).transpose(2, 2)"),
        ("[x.detach() for x in self.keys], [x.detach()", "[x for x in self.keys], [x.detach()"),
        ("self.keys + self.values) / 1e6", "self.keys) / 1e6"),
        ("fixed and sum(p._version for p in model.parameters())\n", "0\n"),
        ("dict(isolate_recompiles=True, options={", "dict(options={"),
        ("mark = rows == 1, w.data_ptr(), w._version", "mark = rows == 1, w.data_ptr()"),
        ("halved((size + 1) // 2, least) if 2 * least <= size", "halved((size + 1) // 2, least) if least <= size // 4"),
        ("[..., :n_ids].to(", ".to("),
        ("values = [value] * ranks()[1]", "values = [value]"),
        ("if prompts % n:", "if False:"),
        ("        there.replace(path)\n", "        shutil.copy(there, path)\n"),
        ("        there.unlink(missing_ok=True)\n", ""),
        ("all(p.suffix == \".tmp\" for p", "all(True for p"),
    ],
    "encoder.py": [
        ("alpha / R, None", "alpha / M, None"),
        ("torch.block_diag(*self.A.split(self.base.parts)).T * self.scale",
         "torch.block_diag(*self.A.split(self.base.parts)).T"),
        ("self.ready if self.ready and not torch.is_grad_enabled() else", "self.ready if self.ready else"),
        ("torch.bmm(z, S).view", "torch.bmm(z, S.flip(1)).view"),
        ("torch.zeros(base.out_features, M)", "torch.full((base.out_features, M), 1e-4)"),
        ("self.attend(self.h_g[:, None], self.h_g[:, None])",
         "self.attend(self.h_g[:, None], self.h_g[:, None].flip(2))"),
        ("return U * 0 if self.kind == \"no-global\" else U", "return U"),
        ("if self.kind in (\"lora\", \"global-only\"):", "if self.kind == \"lora\":"),
        ("        U = U + self.attend(K_e, V_e)", "        U = self.attend(K_e, V_e)"),
        ("        U = U + self.attend(K_e, V_e)", "        U = U + self.attend(V_e, K_e)"),
        ("return self.normalize(U) if self.update == \"paper\" else U", "return U"),
        ("return U if self.kind == \"lora\" else self.normalize(U)", "return U"),
        ("/ (self.R * E) ** 0.5", "/ self.R ** 0.5"),
        ("/ (self.R * E) ** 0.5", "/ (self.M * E) ** 0.5"),
        ("k = K.to(q.dtype) @ self.W_K[:, None]", "k = K.to(q.dtype) @ self.W_V[:, None]"),
        ("return F.normalize(S, dim=-1)", "return F.normalize(S.flatten(2), dim=-1).view(S.shape)"),
        ("found |= {f\"{start}.lora_A.weight\": B,", "found |= {f\"{start}.lora_A.weight\": B.flip(0),"),
        ("linear.B.detach().chunk(len(names))", "linear.B.detach().chunk(len(names))[::-1]"),
        ("config[\"alpha\"] / config[\"rank\"] * A @ B).to", "config[\"alpha\"] * A @ B).to"),
        ("* A @ B).to(W.dtype)", "* A @ B)"),
        ("if config[\"adapter\"] != \"lora\":", "if False:"),
        ("if config.get(\"fingerprint\", mark := fingerprint(read_folder(folder))) != mark:", "if False:"),
    ],
    "grpo.py": [
        ("use_std=True, eps=1e-4):", "use_std=True, eps=1e-2):"),
        ("(groups - groups.mean(dim=1, keepdim=True)) * spread", "(groups - groups.mean(dim=1, keepdim=True))"),
        ("keepdim=True, correction=0)", "keepdim=True, correction=1)"),
        ("(max_length - buffer - lengths) / max(buffer, 1)", "(max_length - buffer - lengths) / max_length"),
        ("return -torch.minimum(ratio", "return -torch.maximum(ratio"),
        ("ratio.clamp(1 - clip_low, 1 + clip_high)", "ratio.clamp(1 - clip_high, 1 + clip_low)"),
        ("hidden[torch.arange(len(prompts), device=hidden.device), lengths - 1]", "hidden[:, -1]"),
        ("done + (E if done else cache.window)", "done + E"),
        ("span = slice(first + 1 if first else 0, stop + 1)", "span = slice(first, stop + 1)"),
        ("        cache.detach()\n", ""),
        ("(rollout.lengths[rows] > done + 1)", "(rollout.lengths[rows] > done + 2)"),
        ("deque((K[:, on], V[:, on]) for K, V in recent)", "recent"),
        ("if truncate and len(recent) > truncate:", "if False:"),
        ("U_0.shape[1] == 1 else U_0[:, on]", "U_0.shape[1] == 1 else U_0[:, :len(on)]"),
        ("columns = lengths[:, None] + torch.arange(T, device=ids.device) ",
         "columns = prompts.shape[1] + torch.arange(T, device=ids.device) + 0 * lengths[:, None] "),
        ("mask = columns < rollout.lengths[rows, None] ", "mask = columns < rollout.lengths[rows, None] - 1 "),
        ("advantages[rows, None], clip_low", "advantages[:len(rows), None], clip_low"),
        ("kl = d.exp() - d - 1", "kl = -d"),
        ("loss = (loss * mask).sum() / total", "loss = (loss * mask).sum() / mask.sum()"),
        ("(logps - old).abs() * mask).max()", "(logps - old).abs() * mask).min()"),
        ("order if everything else order[advantages[order] != 0]", "order[advantages[order] != 0]"),
        ("rows if len(rows) else order[:1], []", "rows, []"),
        ("most // segment_thoughts(rollout, rollout.lengths[rows[0]])", "most // segment_thoughts(rollout, 10 ** 6)"),
        ("0 if spread else self.alike + 1", "0 if spread else self.alike"),
        ("0 if finite else self.skipped + 1", "self.skipped if finite else self.skipped + 1"),
        ("if not gap <= limit and not self.warned:", "if gap > limit and not self.warned:"),
        ("            self.warned = True\n", ""),
        ("1 - 0.9 * step / c.steps", "1 - step / c.steps"),
        ("        optimizer.zero_grad()\n", ""),
        ("lengths[largest[0]]) // 2", "lengths[largest[0]]) - 1"),
        ("            torch.distributed.all_reduce(p.grad)  ", "            pass  "),
        ("problems = problems[rank * share:][:share]", "problems = problems[:share]"),
        ("seed=c.seed * 1_000_003 + step", "seed=c.seed * 1_000_003"),
        ("share=(rank, n), compile", "compile"),
        ("rewards = correct * rollout.ended if", "rewards = correct if"),
        ("use_std=c.loss != \"dr_grpo\"", "use_std=True"),
        ("rollout.lengths[advantages != 0] if c.loss == \"dapo\"", "rollout.lengths[advantages != 0] if False"),
        ("total = sum(everyone(", "total = max(everyone("),
        (".item() if epoch == 0 else gap ", ".item() "),
        ("math.isfinite(grad_norm) and math.isfinite(loss)", "math.isfinite(grad_norm)"),
        ("            break\n", "            pass\n"),
    ]}


def caught(number, file, old, new):
    """The first test that fails on a copy of the project with this change, "" if none does."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", "__pycache__"))
        text = (copy / file).read_text()
        assert text.count(old) == 1, f"mutant {number}: {old!r} occurs {text.count(old)} times in {file}"
        (copy / file).write_text(text.replace(old, new))
        tests = [f"tests/test_{name}.py" for name in TESTS[file].split()]
        done = subprocess.run([sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", *tests], cwd=copy,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1200)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0][:110] if failed else "" if done.returncode == 0 else f"exit code {done.returncode}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of mutants")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time, one core each")
    o = parser.parse_args()
    jobs = [(file, *change) for file, changes in MUTANTS.items() for change in changes]
    chosen = o.only or range(len(jobs))
    survivors = []
    with ThreadPoolExecutor(o.jobs) as pool:
        for number, test in zip(chosen, pool.map(lambda n: caught(n, *jobs[n]), chosen)):
            survivors += [number] * (not test)
            print(f"{number:3} {jobs[number][0]}: {jobs[number][1].strip()[:60]!r}: {test or 'SURVIVED'}", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants are caught; survivors: {survivors or 'none'}")
