"""Generation under the cache: every row is what it would be alone, and every log-prob is that of
the distribution that was sampled from."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import (DELTA, EOS, KINDS, NEVER, PLAIN, logits_by_hand, name_of, rows_of,
                      tiny_encoder, tiny_model, tiny_prompts)
from model import UserError
from rollout import RecordedStep, generate, generate_in_parts, inspect_memory, sample

PROMPTS = tiny_prompts(3, 7, 1, 5)                              # all but one are padded
UNTIL_24 = dict(max_new_tokens=24, window=8)                    # 2 leave at a time: 8 evictions

def policy(adapter=None, eos_token_id=[], **kind):
    """A model that never ends a response, and its encoder."""
    model = tiny_model(eos_token_id=eos_token_id)
    return model, tiny_encoder(model, adapter=adapter, **kind) if adapter else None

# ---- a row in a batch, and alone

@pytest.mark.parametrize("adapter", [None, "pte"])
def test_decoding_token_by_token_equals_one_full_forward(adapter):
    """With the full cache: prompt and response go through the model at once, without any cache."""
    model, encoder = policy(adapter)
    r = generate(model, encoder, PROMPTS, max_new_tokens=24)
    S = encoder.state(encoder.initial_memory()) if encoder else None
    for b, (prompt, tokens) in enumerate(rows_of(r)):
        logits = model(torch.tensor([prompt + tokens]), S=S)[0, len(prompt) - 1:-1]     # (T, vocab)
        logps = logits.log_softmax(-1)[range(24), tokens]
        torch.testing.assert_close(r.logps[b], logps, atol=1e-4, rtol=1e-4)

@pytest.mark.parametrize("W, ratio, kind", [
    (8, 0.25, None), (4, 1.0, DELTA), (3, 1 / 3, PLAIN), *[(8, 0.25, kind) for kind in KINDS]],
    ids=name_of)
@torch.no_grad()
def test_log_probs_in_a_batch_are_those_of_a_row_alone(W, ratio, kind, float64):
    """5 to 20 evictions; the row alone has a cache made of lists."""
    model, encoder = policy(**dict(adapter="pte") | kind) if kind else policy()
    r = generate(model, encoder, PROMPTS, 2, max_new_tokens=24, window=W, evict_ratio=ratio)
    for b in (0, 3):
        prompt, tokens = rows_of(r)[b]
        logits = logits_by_hand(model, encoder, prompt, tokens, W, round(W * ratio))
        wanted = logits.log_softmax(-1)[range(24), tokens]
        torch.testing.assert_close(r.logps[b], wanted, atol=1e-9, rtol=0)

def test_a_prompts_responses_depend_on_its_seed_and_not_on_the_batch(float64):
    model, encoder = policy("pte")
    before = torch.get_rng_state()                              # PyTorch's own is left alone
    batch = generate(model, encoder, PROMPTS, 3, seeds=[5, 6, 7, 8], **UNTIL_24)
    assert torch.equal(before, torch.get_rng_state())
    assert len(batch.tokens.unique(dim=0)) == 12
    for n, prompt in enumerate(PROMPTS):
        rows = slice(3 * n, 3 * n + 3)
        alone = generate(model, encoder, [prompt], 3, seeds=[5 + n], **UNTIL_24)
        other = generate(model, encoder, [prompt], 3, **UNTIL_24)
        assert batch.prompt_of[rows].tolist() == [n] * 3
        assert torch.equal(alone.tokens, batch.tokens[rows])
        assert not torch.equal(alone.tokens, other.tokens)
        torch.testing.assert_close(alone.logps, batch.logps[rows], atol=1e-9, rtol=0)

@pytest.mark.parametrize("rollout_batch", [1, 4, 5, 99])
def test_a_rollout_in_parts_is_the_rollout(rollout_batch, float64):
    """Of one, two or all groups of two at a time, whose prompts and responses differ in length."""
    model, encoder = policy("pte", eos_token_id=list(EOS))
    whole = generate(model, encoder, PROMPTS, 2, seeds=[5, 6, 7, 8], **UNTIL_24)
    assert len(whole.lengths.unique()) > 2 and whole.ended.any()
    parts = generate_in_parts(model, encoder, PROMPTS, 2, rollout_batch=rollout_batch,
                              seeds=[5, 6, 7, 8], **UNTIL_24)
    assert rows_of(parts) == rows_of(whole)
    for name in ("prompt_ids", "prompt_lengths", "prompt_of", "lengths", "ended", "window"):
        assert np.array_equal(getattr(parts, name), getattr(whole, name))
    assert parts.cache_mb <= whole.cache_mb

def test_a_response_ends_with_either_end_token_and_the_last_ends_the_loop(ends_at):
    model, _ = policy(eos_token_id=list(EOS))
    tokenizer = SimpleNamespace(decode=lambda ids: ids)
    steps = []
    ends_at([5, 1, 12, 10])
    r = generate(model, None, PROMPTS, on_token=lambda *step: steps.append(step), **UNTIL_24)
    assert r.lengths.tolist() == [5, 1, 12, 10] and r.ended.all() and r.tokens.shape == (4, 12)
    assert {tokens[-1] for _, tokens in rows_of(r)} == set(EOS)
    assert r.texts(tokenizer) == [tokens[:-1] for _, tokens in rows_of(r)]
    assert [len(ids) for ids, _ in steps] == [4] + [3] * 4 + [2] * 5 + [1] * 2
    assert [t for t, (_, evicting) in enumerate(steps) if evicting] == [8, 10]
    assert r.n_evictions().tolist() == [0, 0, 2, 1]             # the last token is never written
    assert r.cache_mb == 4 * 2 * 2 * 2 * (7 + 8) * 8 * 4 / 1e6  # B, k and v, L, KV, slots, D, bytes
    ends_at([NEVER] * 4)
    r = generate(model, None, PROMPTS, max_new_tokens=8)        # cut off; and the full cache
    assert not r.ended.any() and not r.n_evictions().any()
    assert r.texts(tokenizer) == [tokens for _, tokens in rows_of(r)]

def test_prompts_that_cannot_be_continued_are_refused():
    model, _ = policy()
    generate(model, None, [[1] * 250], max_new_tokens=6)
    for prompts in ([[1] * 251], [[1], []]):
        with pytest.raises(UserError):
            generate(model, None, prompts, max_new_tokens=6)

# ---- sampling

P_5 = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])                 # probabilities of five ids

@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 2.0])
def test_draws_and_their_log_probs_follow_the_distribution(temperature):
    p = P_5.double().numpy() ** (1 / temperature)
    p = p / p.sum()
    n = 20000
    u = torch.rand(n, generator=torch.Generator().manual_seed(0))
    ids, logps = sample(P_5.log().expand(n, 5), temperature, u)
    counts = np.bincount(ids, minlength=5)
    drawn = p > 0
    assert not counts[~drawn].any()
    chi_square = (counts - n * p)[drawn] ** 2 / (n * p[drawn])
    assert chi_square.sum() < 20                                # 4 degrees of freedom: p = 0.0005
    np.testing.assert_allclose(logps, np.log(p[ids]), atol=1e-5)

def test_extreme_draws():
    """An id without mass is never drawn, logits that are no numbers give an id that exists, and
    temperature 0 takes the most likely id with its log-prob at temperature 1."""
    u = torch.tensor([0.0, 1 - 2 ** -24])                       # the ends of torch.rand
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]).expand(2, 5)
    assert sample(logits, 1.0, u)[0].tolist() == [3, 1]
    assert sample(torch.full((2, 5), torch.nan), 1.0, u)[0].max() < 5
    ids, logps = sample(P_5.log().expand(2, 5), 0, u)
    assert ids.tolist() == [1, 1]
    torch.testing.assert_close(logps, torch.tensor([0.4, 0.4]).log())

# ---- the step that a GPU records, with a stand-in for torch.cuda

class Graph:
    """torch.cuda.CUDAGraph without a GPU: remembers one call of model.layers and repeats it, on the
    same tensors. What is recorded is not computed before the first replay."""
    recording = None
    n_recorded = 0

    def __enter__(self):
        Graph.recording = self

    def __exit__(self, *error):
        Graph.recording = None
        Graph.n_recorded += 1

    def replay(self):
        self.arguments[3].slots = self.slots                    # the cache writes where it did then
        self.result.copy_(self.layers(*self.arguments))

def record_steps(model, monkeypatch):
    """From now on `generate` decodes with a RecordedStep."""
    def layers(*arguments):
        graph = Graph.recording
        if graph is None:
            return model.layers(*arguments)
        graph.layers = model.layers
        graph.arguments = arguments
        graph.slots = arguments[3].slots
        graph.result = torch.full((len(arguments[0]), 1, 32), torch.nan)
        return graph.result

    def hidden(ids, cache, S):
        return step(ids, cache, S) if cache.n_tokens else prompt_hidden(ids, cache, S)

    step = RecordedStep(SimpleNamespace(layers=layers))
    prompt_hidden = model.hidden
    monkeypatch.setattr(model, "hidden", hidden)
    monkeypatch.setattr(Graph, "n_recorded", 0)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

@pytest.mark.parametrize("adapter", [None, "pte", "lora"])
def test_a_recorded_step_is_a_step(adapter, monkeypatch, ends_at):
    """It is recorded once for each number of rows: 4, 3, then 1."""
    model, encoder = policy(adapter, eos_token_id=list(EOS))
    ends_at([4, 12, 12, NEVER])
    plain = generate(model, encoder, PROMPTS, **UNTIL_24)
    record_steps(model, monkeypatch)
    ends_at([4, 12, 12, NEVER])
    fast = generate(model, encoder, PROMPTS, **UNTIL_24)
    assert torch.equal(fast.tokens, plain.tokens) and Graph.n_recorded == 3
    torch.testing.assert_close(fast.logps, plain.logps, atol=1e-4, rtol=1e-4)

def test_a_recording_that_fails_is_a_warning(monkeypatch):
    def fail(graph):
        raise RuntimeError("no memory left")

    model, encoder = policy("pte")
    plain = generate(model, encoder, PROMPTS, **UNTIL_24)
    record_steps(model, monkeypatch)
    monkeypatch.setattr(torch.cuda, "graph", fail)
    with pytest.warns(UserWarning, match="no memory left") as warned:
        slow = generate(model, encoder, PROMPTS, **UNTIL_24)
    assert len(warned) == 1 and torch.equal(slow.tokens, plain.tokens)

@pytest.mark.parametrize("kind", [DELTA, PLAIN], ids=name_of)
def test_a_look_inside_the_memory(kind):
    """Row 0 goes through the response as it was sampled; row j differs once eviction j is missing."""
    model, encoder = policy("pte", **kind)
    rollout = generate(model, encoder, PROMPTS[:1], **UNTIL_24)
    logps, evictions = inspect_memory(model, encoder, rollout)
    assert logps.shape == (9, 24) and len(evictions) == 8
    torch.testing.assert_close(logps[0], rollout.logps[0], atol=1e-4, rtol=1e-4)
    for j, eviction in enumerate(evictions, start=1):
        first = 8 + 2 * (j - 1) + 1                         # the first token drawn after it
        torch.testing.assert_close(logps[j, :first], logps[0, :first], atol=1e-4, rtol=1e-4)
        assert (logps[j, first:] - logps[0, first:]).abs().max() > 1e-3
        assert eviction["tokens"] == rollout.tokens[0, 2 * (j - 1):2 * j].tolist()
        assert sum(eviction["taken"]) == pytest.approx(1)
