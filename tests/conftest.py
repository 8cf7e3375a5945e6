"""What the tests of the core share: a tiny model, an adapter that matters, a cache without tricks.

The weights are random but large: attention is sharp, so one key too many, too few or at a wrong
position shows in the first digits. `logits_by_hand` is what rollout and replay must reproduce.
"""
import contextlib
import io
import itertools
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rollout
from encoder import MEMORY_ORDERS, MEMORY_UPDATES, attach
from model import ModelConfig, Transformer, run_script

torch.set_num_threads(1)

EOS = (38, 39)                                      # two end tokens, the largest ids
NEVER = 999                                         # the length of a row that never ends
CONFIG = dict(
    model_type="qwen2", vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, intermediate_size=48, max_position_embeddings=256,
    rope_theta=100.0, eos_token_id=list(EOS))       # theta 100: every pair turns within 50 tokens

# What the invariants are tested for, settings of `tiny_encoder`: every rule in every order, with
# plain keys as well, and the ablations.
KINDS = []
for order in MEMORY_ORDERS:
    for rule in MEMORY_UPDATES:
        KINDS.append(dict(memory_update=rule, memory_order=order))
PLAIN = dict(memory_update="gated", memory_order="paper", memory_keys="plain")
DELTA = dict(memory_update="delta", memory_order="keys-match", memory_keys="plain")
NO_GLOBAL = dict(memory_update="paper", global_tokens=0)
GLOBAL_ONLY = dict(adapter="global-only")
LORA = dict(adapter="lora")
KINDS += [PLAIN, DELTA, NO_GLOBAL, GLOBAL_ONLY, LORA]

def name_of(kind):
    """How pytest names a dict of settings; None: as it likes."""
    return " ".join(map(str, kind.values())) if isinstance(kind, dict) else None

every_kind = pytest.mark.parametrize("kind", KINDS, ids=name_of)

# The rollouts of the fixture `roll`: 3 prompts, 2 responses each, 4 evictions in the longest.
W = 4
E = 2
T = 12
PROMPTS = (3, 6, 1)                                 # their lengths
ENDS = [1, W, W + 1, W + E, W + E + 1, NEVER]       # at and between evictions

def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; run with -m slow")

def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and "slow" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))

def call(script, *argv):
    """Runs a script (a module) as its command line does -> exit code, stdout, stderr."""
    out = io.StringIO()
    err = io.StringIO()
    code = 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
          pytest.MonkeyPatch.context() as patch):
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, argv)])
        try:
            run_script(script.main)
        except SystemExit as stop:
            code = stop.code
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return code, out.getvalue(), err.getvalue()

def tiny_model(**changes):
    """A frozen Transformer of 2 layers with large random weights, always the same."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(CONFIG | changes)).requires_grad_(False)
    model.frequencies = model.frequencies.to(torch.get_default_dtype())
    for parameter in model.parameters():
        if parameter.ndim == 2:                                             # (out, in)
            parameter.normal_(std=1.5 / parameter.shape[1] ** 0.5)
    return model

def tiny_encoder(model, fresh=False, **kind):
    """Attaches an adapter with R = 4 and M = 6. Unless fresh, A, gates and decays are random."""
    torch.manual_seed(1)
    settings = dict(rank=4, global_tokens=6, alpha=6.0, memory_update="paper",
                    memory_order="keys-match", memory_keys="rotated")
    encoder = attach(model, **settings | kind)
    encoder.frequencies = encoder.frequencies.to(torch.get_default_dtype())
    for linear in [] if fresh else encoder.linears.values():
        torch.nn.init.normal_(linear.A, std=0.2)
    for name, parameter in encoder.named_parameters(recurse=False):
        if name in ("W_gate", "decay") and not fresh:
            torch.nn.init.normal_(parameter, std=0.5)
    return encoder

def tiny_prompts(*lengths):
    """One list of random ids for each length, always the same for the same lengths."""
    torch.manual_seed(2)
    return [torch.randint(EOS[0], (n,)).tolist() for n in lengths]

class ListCache:
    """The cache of one row as one would write it first, in the place of a SlidingCache."""

    def __init__(self, n_layers):
        self.n_tokens = 0
        self.n_evicted = 0
        self.prompt = [None] * n_layers                     # per layer (k, v), (1, KV, P, D) each
        self.response = [[] for _ in range(n_layers)]       # per layer one (k, v) for each token

    def reserve(self, n):
        self.reserved = torch.arange(self.n_tokens, self.n_tokens + n)
        self.n_tokens += n

    def positions(self):
        return self.reserved[None]                                          # (1, n)

    def mask(self):
        sees_all = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        return sees_all if self.prompt[0] else None                         # None: causal

    def write(self, layer, k, v):
        if self.prompt[layer] is None:
            self.prompt[layer] = (k, v)
        else:
            self.response[layer].append((k, v))
        keys, values = zip(self.prompt[layer], *self.response[layer])
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)             # (1, KV, slots, D)

    def evict(self, n):
        """Takes out the oldest n, (L, 1, n, KV*D) each, and their positions (1, n). All that is
        cached becomes a constant."""
        self.prompt = [(k.detach(), v.detach()) for k, v in self.prompt]
        keys = []
        values = []
        for layer, pairs in enumerate(self.response):
            pairs = [(k.detach(), v.detach()) for k, v in pairs]
            self.response[layer] = pairs[n:]
            keys.append(torch.cat([k.flatten(1) for k, v in pairs[:n]]))    # (n, KV*D)
            values.append(torch.cat([v.flatten(1) for k, v in pairs[:n]]))
        first = self.prompt[0][0].shape[2] + self.n_evicted
        self.n_evicted += n
        positions = torch.arange(first, first + n)[None]                    # (1, n)
        return torch.stack(keys)[:, None], torch.stack(values)[:, None], positions

def logits_by_hand(model, encoder, prompt, tokens, window, evict_size, truncate=False,
                   changes=None):
    """The logits (T, vocab) from which one row draws its tokens (a list of T ids), with nothing of
    cache.py, rollout.py and grpo.py: one row, one token at a time, one graph, lists.

    changes: a list that gets (memory before, what was written, memory after) of each eviction."""
    cache = ListCache(model.config.n_layers)
    memory = encoder and encoder.initial_memory()
    S = encoder and encoder.state(memory)
    logits = [model(torch.tensor([prompt]), cache, S)[0, -1]]
    for token in tokens[:-1]:
        if window and len(cache.response[0]) == window:     # one more is to be written: some leave
            K_e, V_e, positions = cache.evict(evict_size)
            if encoder:
                before = memory.detach() if truncate else memory
                memory, write = encoder.update(before, K_e, V_e, positions)
                S = encoder.state(memory)
                if changes is not None:
                    changes.append((before, write, memory))
        logits.append(model(torch.tensor([[token]]), cache, S)[0, -1])
    return torch.stack(logits)

def rows_of(r):
    """(prompt, tokens) of every row of a Rollout, lists without padding, the end token included."""
    columns = zip(r.prompt_of.tolist(), r.tokens.tolist(), r.lengths.tolist())
    prompts = [ids[:n] for ids, n in zip(r.prompt_ids.tolist(), r.prompt_lengths.tolist())]
    return [(prompts[p], tokens[:n]) for p, tokens, n in columns]

@pytest.fixture
def float64():
    """The test runs in float64: where two computations of one number differ, it is not rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)

@pytest.fixture
def ends_at(monkeypatch):
    """ends_at(lengths): `generate` draws as always, but row b ends with token lengths[b]."""
    real_sample = rollout.sample

    def script(lengths):
        lengths = torch.tensor(lengths)
        steps = itertools.count()

        def sample(logits, temperature, u):
            t = next(steps)
            ids, _ = real_sample(logits, temperature, u)
            ids = torch.where(ids >= EOS[0], ids - 20, ids)     # not yet: some other token
            going_on = lengths[lengths > t]                     # (b,) rows that are in the batch
            ids = torch.where(going_on == t + 1, EOS[t % 2], ids)
            logps = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
            return ids, logps.gather(1, ids[:, None])[:, 0]

        monkeypatch.setattr(rollout, "sample", sample)
    return script

@pytest.fixture
def roll(ends_at):
    """roll(): a model, its encoder and a Rollout of 6 rows that end in different ways (ENDS)."""
    def make(temperature=1.0, **kind):
        model = tiny_model()
        encoder = tiny_encoder(model, **kind)
        ends_at(ENDS)
        r = rollout.generate(model, encoder, tiny_prompts(*PROMPTS), 2, max_new_tokens=T, window=W,
                             evict_ratio=E / W, temperature=temperature)
        assert r.lengths.tolist() == [min(n, T) for n in ENDS]
        return model, encoder, r
    return make
