"""The transformer against Hugging Face's, on small random folders, and folders that are not what they should be.

GOLD was computed once with transformers 5.23.0 (float32, CPU), so the first test needs no such package; where it is
installed, the second one compares all logits, and GOLD, with it."""
import json

import numpy as np
import pytest
import torch

from model import Transformer, UserError
from train import write_safetensors

BASE = dict(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=48, max_position_embeddings=256, rms_norm_eps=1e-5, hidden_act="silu", eos_token_id=3)
SCALED = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)  # the 48 tokens below go well beyond these 16
LLAMA = BASE | dict(model_type="llama", head_dim=12, rope_theta=5e3, rope_scaling=SCALED)
BF16 = BASE | dict(model_type="llama", rope_theta=500.0)
FOLDERS = {  # name: (config.json, how the weights are written)
    "qwen2, biases, tied": (BASE | dict(model_type="qwen2", rope_theta=1e6, tie_word_embeddings=True), {}),
    "qwen2 of transformers 5, sharded": (BASE | dict(
        model_type="qwen2", rope_parameters={"rope_theta": 1e6, "rope_type": "default"}), {"shards": 3}),
    "llama 3, scaled rope, untied, wide heads": (LLAMA, {}),
    "llama 3 of transformers 5, sharded": (BASE | dict(
        model_type="llama", head_dim=12, rope_parameters=SCALED | {"rope_theta": 5e3}), {"shards": 2}),
    "llama, tied, biases, large eps": (BASE | dict(
        model_type="llama", rope_scaling=None, attention_bias=True, rms_norm_eps=0.1, tie_word_embeddings=True), {}),
    "llama, bfloat16": (BF16, {"dtype": torch.bfloat16}),
    "qwen3, q and k norm": (BASE | dict(model_type="qwen3", head_dim=16, rope_theta=1e6), {}),
}
WHERE = ([0, 0, 0, 1, 1, 1], [0, 20, 47, 5, 30, 47], [0, 39, 7, 11, 23, 2])  # row, position, id of six logits
GOLD = {  # name: [those logits, then the mean of |logit| over all]
    "qwen2, biases, tied": [4.93315, -2.13869, -4.07858, -1.47019, -5.13929, -3.21034, 2.52648],
    "qwen2 of transformers 5, sharded": [-2.43463, -2.41276, 1.90154, -2.65809, -0.23192, 1.1411, 2.68596],
    "llama 3, scaled rope, untied, wide heads": [1.5221, -2.09042, -3.408, 5.92991, -8.64239, 4.22462, 2.63852],
    "llama 3 of transformers 5, sharded": [1.5221, -2.09042, -3.408, 5.92991, -8.64239, 4.22462, 2.63852],
    "llama, tied, biases, large eps": [0.65737, -2.81104, 0.54447, 1.48969, -4.62206, -1.22924, 3.40759],
    "llama, bfloat16": [3.83588, 2.30405, 0.75105, -0.81127, 2.09811, 2.16439, 2.80839],
    "qwen3, q and k norm": [1.71632, 2.39821, -2.83865, -6.21141, -0.40756, 7.47416, 2.71733],
}
IDS = torch.from_numpy(np.random.default_rng(7).integers(0, 40, (2, 48)))


def tensors(config):
    """{Hugging Face name: tensor}, random, and large enough for every part of the model to matter."""
    c, rng = config, np.random.default_rng(0)
    C, H, KV, F = (c[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size"))
    D = c.get("head_dim") or C // H
    biased = "qkv" if c["model_type"] == "qwen2" else "qkvo" if c.get("attention_bias") else ""
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], C), "model.norm.weight": (C,)}
    if not c.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (c["vocab_size"], C)
    for layer in range(c["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        for n, (rows, columns) in {"q": (H * D, C), "k": (KV * D, C), "v": (KV * D, C), "o": (C, H * D)}.items():
            shapes[f"{p}self_attn.{n}_proj.weight"] = (rows, columns)
            if n in biased:
                shapes[f"{p}self_attn.{n}_proj.bias"] = (rows,)
            if n in "qk" and c["model_type"] == "qwen3":
                shapes[f"{p}self_attn.{n}_norm.weight"] = (D,)
        for n, shape in {"gate": (F, C), "up": (F, C), "down": (C, F)}.items():
            shapes[f"{p}mlp.{n}_proj.weight"] = shape
        shapes |= {f"{p}input_layernorm.weight": (C,), f"{p}post_attention_layernorm.weight": (C,)}
    scale = {name: 1.5 * shape[-1] ** -0.5 if name.endswith("proj.weight") else 0.5 for name, shape in shapes.items()}
    return {n: torch.from_numpy(rng.standard_normal(shapes[n]) * scale[n] + ("norm" in n)).float() for n in shapes}


def write_folder(folder, config, weights, shards=1, dtype=torch.float32, generation='{"eos_token_id": [5, 3]}'):
    """A Hugging Face folder without a tokenizer. Tensors are dealt out to the shards in turn."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(generation)
    files = [f"model-{k + 1:05d}-of-{shards:05d}.safetensors" for k in range(shards)]
    places = {name: files[k % shards] if shards > 1 else "model.safetensors" for k, name in enumerate(weights)}
    for file in set(places.values()):
        write_safetensors(folder / file, {n: t.to(dtype) for n, t in weights.items() if places[n] == file})
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@pytest.fixture(params=FOLDERS)
def named_folder(request, tmp_path):
    config, how = FOLDERS[request.param]
    return request.param, write_folder(tmp_path / "model", config, tensors(config), **how)


def logits_of(folder, dtype=torch.float32):
    with torch.no_grad():
        return Transformer.from_folder(folder, dtype=dtype)(IDS)


def summary(logits):
    return [round(x, 5) for x in (*logits[WHERE].tolist(), logits.abs().mean().item())]


def test_some_logits_equal_gold(named_folder):
    name, folder = named_folder
    assert summary(logits_of(folder)) == pytest.approx(GOLD[name], abs=1e-4)


def test_all_logits_equal_transformers(named_folder):
    transformers = pytest.importorskip("transformers")
    name, folder = named_folder
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits
    assert summary(theirs) == pytest.approx(GOLD[name], abs=1e-4)
    assert (logits_of(folder) - theirs).abs().max() < 1e-4


@pytest.fixture
def bf16_folder(tmp_path):
    return write_folder(tmp_path / "model", BF16, tensors(BF16), dtype=torch.bfloat16)


def test_bfloat16_weights_stay_bfloat16(bf16_folder):
    model = Transformer.from_folder(bf16_folder)  # bfloat16 is the default
    parameters = [*model.parameters()]
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in parameters)
    rough, exact = logits_of(bf16_folder, torch.bfloat16), logits_of(bf16_folder)
    assert rough.dtype == torch.bfloat16 and (rough - exact).abs().mean() < 0.02 * exact.abs().mean()


def test_end_tokens_are_those_of_both_files(bf16_folder):
    for generation, eos_ids in (('{"eos_token_id": [5, 3]}', [3, 5]), ('{"eos_token_id": 9}', [3, 9]), ("{}", [3])):
        (bf16_folder / "generation_config.json").write_text(generation)
        assert Transformer.from_folder(bf16_folder).config.eos_ids == eos_ids


def test_a_tied_folder_may_hold_a_second_copy_of_the_embedding(tmp_path):
    config, _ = FOLDERS["qwen2, biases, tied"]
    weights = tensors(config) | {"lm_head.weight": torch.zeros(40, 32)}
    model = Transformer.from_folder(write_folder(tmp_path / "model", config, weights))
    assert model.head.weight is model.embedding.weight


SPOILT_CONFIG = [  # (changes to config.json, words of the message)
    ({"model_type": "gpt2"}, ("model_type", "'gpt2'")), ({"model_type": None}, ("model_type", "None")),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ("rope type", "'yarn'")),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ("rope type", "'linear'")),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, ("rope type", "'dynamic'")),
    ({"rope_scaling": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                       "original_max_position_embeddings": 16}}, ("factor",)),
    ({"hidden_act": "gelu"}, ("hidden_act", "'gelu'")), ({"use_sliding_window": True}, ("use_sliding_window",)),
    ({"mlp_bias": True}, ("mlp_bias",)), ({"hidden_size": None}, ("hidden_size",)), ({"hidden_size": "32"}, ("sizes",)),
    ({"num_hidden_layers": 0}, ("sizes",)), ({"num_key_value_heads": 3}, ("sizes",)),
]
UP = "model.layers.1.mlp.up_proj.weight"
SPOILT_WEIGHTS = [  # (changes to the tensors, words)
    ({UP: None}, (UP, "missing", "(48, 32)")), ({"lm_head.weight": None}, ("lm_head.weight", "missing")),
    ({"model.layers.2.mlp.up_proj.weight": torch.zeros(48, 32)}, ("model.layers.2.mlp.up_proj.weight", "unexpected")),
    ({"model.norm.weight": torch.ones(31)}, ("model.norm.weight", "(31,)", "(32,)")),
    ({UP: torch.zeros(32, 48)}, (UP, "(32, 48)", "(48, 32)")),
]


def changed(old, changes):
    """A dict with some values changed; None takes the entry out."""
    return {key: value for key, value in (old | changes).items() if value is not None}


def refusal(folder):
    """What from_folder says, which must be one line."""
    with pytest.raises(UserError) as error:
        Transformer.from_folder(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("changes, words", SPOILT_CONFIG, ids=str)
def test_bad_config(tmp_path, changes, words):
    said = refusal(write_folder(tmp_path / "model", changed(LLAMA, changes), tensors(LLAMA)))
    assert all(word in said for word in ("config.json", *words)), said


@pytest.mark.parametrize("changes, words", SPOILT_WEIGHTS, ids=lambda x: " ".join(x))
@pytest.mark.parametrize("shards", [1, 2])
def test_bad_weights(tmp_path, changes, words, shards):
    said = refusal(write_folder(tmp_path / "model", LLAMA, changed(tensors(LLAMA), changes), shards))
    assert all(word in said for word in words), said


@pytest.mark.parametrize("shards, file", [
    (1, "config.json"), (1, "generation_config.json"), (1, "model.safetensors"), (2, "model.safetensors.index.json"),
    (2, "model-00002-of-00002.safetensors")])
def test_files_cut_short_or_replaced(tmp_path, shards, file):
    folder = write_folder(tmp_path / "model", LLAMA, tensors(LLAMA), shards)
    whole = (folder / file).read_bytes()
    cut = [whole[:n] for n in (0, 1, 8, len(whole) // 2, len(whole) - 1)]
    for text in (*cut, b"[]", b"\xff\xfe", b"version https://git-lfs.github.com/spec/v1"):
        (folder / file).write_bytes(text)
        assert file in refusal(folder)
    if file != "generation_config.json":
        (folder / file).unlink()
        assert file in refusal(folder)
    assert "config.json" in refusal(tmp_path / "nowhere")
