"""conftest.py: what the invariant tests share: a tiny model, an adapter that matters, and a cache without tricks.

The weights are random but large: logits are far from uniform and attention is sharp, so one key too many, too few or at
a wrong position shows in the first digits. Everything here is independent of cache.py, and small enough to be checked
by eye: what `logits_by_hand` returns is what the whole project must reproduce. At the end: a run to put scripts to.
"""
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import grpo
import rollout
import train
from encoder import ThoughtEncoder
from model import ModelConfig, Transformer

torch.set_num_threads(1)

W, E, T = 8, 2, 24                                                              # of `roll`: 8 evictions, 9 segments
EOS = (38, 39)                                                                  # two end tokens, the largest ids
NEVER = 999                                                                     # the length of a row that never ends
ENDS = [3, W, W + 1, W + 2, W + E, W + E + 1, 20, NEVER]                        # before, at and between evictions
ALL = torch.arange(len(ENDS))                                                   # the rows of `roll`
CONFIG = dict(model_type="qwen2", vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, head_dim=8, intermediate_size=48, max_position_embeddings=256,
              rope_theta=100.0, eos_token_id=[])                                # theta 100: all pairs turn in 50 tokens


def tiny_model(**config):
    """A frozen Transformer of 2 layers with large random weights, always the same; config: changes to CONFIG."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(CONFIG | config)).requires_grad_(False)
    model.frequencies = model.frequencies.to(torch.get_default_dtype())         # angles too are float64 in float64
    for p in model.parameters():
        if p.ndim == 2:                                                         # (out, in)
            p.normal_(std=1.5 / p.shape[1] ** 0.5)
    return model


def tiny_encoder(model, kind="pte", update="paper", R=4, M=6, fresh=False):
    """A ThoughtEncoder on the model, with R != M. Unless fresh, A is random and the adapter changes everything."""
    torch.manual_seed(1)
    encoder = ThoughtEncoder(model, kind, R, M, alpha=R, update=update)
    for linear in encoder.linears.values() if not fresh else ():
        torch.nn.init.normal_(linear.A, std=0.3)
    return encoder


def tiny_prompts(*lengths):
    """One list of random ids per length, always the same for the same lengths."""
    torch.manual_seed(2)
    return [torch.randint(EOS[0], (n,)).tolist() for n in lengths]


class ListCache:
    """The cache of one row as one would write it first: lists of keys and values. No ring, no mask of slots, no batch.

    It takes the place of a SlidingCache in `Transformer.hidden`."""

    def __init__(self, n_layers):
        self.position = 0
        self.prompt = [None] * n_layers                                         # per layer (k, v), (1, KV, P, D)
        self.thoughts = [[] for _ in range(n_layers)]                           # per layer a list of (k, v), T = 1

    def begin(self, T):
        positions = torch.arange(self.position, self.position + T)[None]        # the prompt at 0, 1, ..., then thoughts
        self.position += T
        return positions, torch.ones(T, T, dtype=torch.bool).tril() if T == self.position else None  # None: sees all

    def write(self, layer, k, v):
        if self.prompt[layer] is None:
            self.prompt[layer] = k, v
        else:
            self.thoughts[layer].append((k, v))
        return [torch.cat(x, dim=2) for x in zip(self.prompt[layer], *self.thoughts[layer])]

    def evict(self, E):
        """Pops the oldest E; (keys, values), each (L, 1, E, KV*D). All that is cached becomes a constant."""
        self.prompt = [(k.detach(), v.detach()) for k, v in self.prompt]
        self.thoughts = [[(k.detach(), v.detach()) for k, v in layer] for layer in self.thoughts]
        popped = [[layer.pop(0) for _ in range(E)] for layer in self.thoughts]  # L lists of E pairs
        return [torch.stack([torch.cat([pair[i].flatten(1) for pair in layer])[None] for layer in popped])
                for i in range(2)]


def logits_by_hand(model, encoder, prompt, tokens, W, E, truncate=0):
    """The logits (T, vocab) under which one row draws its tokens (T,): one row, one token at a time, one graph.

    truncate: the memory older than the last so many evictions is a constant."""
    cache, evicted = ListCache(model.config.n_layers), []
    S = encoder.read(encoder.start()) if encoder else None
    logits = [model(torch.tensor([prompt]), cache, S)[0, -1]]
    for token in tokens[:-1]:
        if W and len(cache.thoughts[0]) == W:                                   # one more is to be written: E leave
            evicted.append(cache.evict(E))
            if encoder:
                U = encoder.start()
                for age, leaving in zip(range(len(evicted), 0, -1), evicted):   # oldest first; the newest has age 1
                    if age == truncate < len(evicted):
                        U = U.detach()
                    U = encoder.write(U, *leaving)
                S = encoder.read(U)
        logits.append(model(torch.tensor([[token]]), cache, S)[0, -1])
    return torch.stack(logits)


def rows_of(r):
    """(prompt, tokens) of every row of a Rollout, as lists without padding; the end token is the last."""
    prompts = [ids[:n] for ids, n in zip(r.prompt_ids.tolist(), r.prompt_lengths.tolist())]
    return [(prompts[p], tokens) for p, tokens in zip(r.prompt_of.tolist(), r.completions())]


@pytest.fixture
def float64():
    """The test runs in float64: where two computations of one number differ, it is no rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def ends_at(monkeypatch):
    """ends_at(lengths): `generate` draws as it always does, but row b ends with its lengths[b]-th token, no sooner."""
    real = rollout.sample

    def script(lengths):
        lengths, steps = torch.tensor(lengths), iter(range(NEVER))

        def sample(logits, *settings):
            nonlocal lengths
            t = next(steps)
            if len(logits) < len(lengths):                                      # finished rows have left the batch
                lengths = lengths[(lengths <= t).int().argsort(stable=True)[:len(logits)]]
            ids, _ = real(logits, *settings)
            ids[(ids >= EOS[0]) & (t + 1 < lengths)] -= 20                      # an end too soon becomes another token
            ids[lengths == t + 1] = EOS[t % 2]
            return ids, logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
        monkeypatch.setattr(rollout, "sample", sample)
    return script


@pytest.fixture
def roll(ends_at):
    """roll(): a model, its encoder and 8 rollouts of 4 prompts of mixed length, which end in 8 ways."""
    def make(kind="pte", update="paper", fresh=False, window=W):
        model = tiny_model(eos_token_id=list(EOS))
        encoder = tiny_encoder(model, kind, update, fresh=fresh) if kind else None
        ends_at(ENDS)
        r = rollout.generate(model, encoder, tiny_prompts(3, 7, 1, 5), 2, max_new_tokens=T, window=window)
        assert r.lengths.tolist() == [min(n, T) for n in ENDS]
        return model, encoder, r
    return make


def off_policy(r):
    """The rollout with old log-probs that are off by up to 0.5: the clip acts on some tokens, on others it does not."""
    torch.manual_seed(4)
    return replace(r, logps=r.logps + torch.rand_like(r.logps) - 0.5)


def gradients(model, encoder, r, advantages, batches=(ALL,), **settings):
    """The gradient of a whole step {name: tensor}, with N = 100, and what `backward` returns for each batch of rows."""
    encoder.zero_grad()
    sums = [grpo.backward(model, encoder, r, advantages, rows, total=100, **settings) for rows in batches]
    return {name: p.grad.clone() for name, p in encoder.trainable().items()}, sums


def assert_same(got, wanted):
    """Two gradients, every tensor to 1e-9 of its largest number; and none is zero."""
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert wanted[name].abs().max() > 1e-6, name
        assert (got[name] - wanted[name]).abs().max() <= 1e-9 * wanted[name].abs().max(), name


# ---- the scripts, as small as they get -------------------------------------------------------------------------------
SMALL = ("--steps 2 --prompts 2 --group-size 4 --window 8 --evict-ratio 0.5 --test-problems 4 --base-steps 3 "
         "--device cpu").split()


def call(module, *argv):
    """Runs a script's main() in this process, as run_script does -> exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [Path(module.__file__).name, *map(str, argv)])
        try:
            rollout.run_script(module.main)
        except SystemExit as end:
            return end.code
    return 0


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run of the default job, as small as it gets: two steps on a base that has learnt next to nothing."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert call(train, *SMALL, "--out", out) == 0
    return out


@pytest.fixture(scope="session")
def problems(tmp_path_factory):
    """A file of problems that the tiny model can read, under the three names that a problem may have."""
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    rows = [{"problem": "527184=", "answer": "7"}, {"question": "903341=", "answer": 0},
            {"prompt": "12=", "answer": "so far 5\n#### 3"}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path
