"""A Hugging Face folder that `transformers` loads: config.json, model.safetensors and the tokenizer's files.

Two shapes that `transformers` knows by name are written: GPT-2's (Radford et al. 2019) and Llama's (Touvron
et al. 2023). Nothing is imported from `transformers`: the formats are written and read directly.

C width, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from handmill.errors import UserError

# setting -> what the shape needs; `activation` decides which of the two is meant
NEEDS: dict[str, dict[str, Any]] = {
    "gpt2": {"norm": "layer", "positions": "learned", "activation": "gelu", "qk_norm": False},
    "llama": {"norm": "rms", "positions": "rotary", "activation": "swiglu", "qk_norm": False},
}


def shape(settings: Any) -> str:
    """"gpt2" or "llama". Raises UserError naming the settings that keep a network from being either."""
    missing = {name: [f'{key}={str(value).lower()}' for key, value in needs.items()
                      if getattr(settings, key) != value] for name, needs in NEEDS.items()}
    if settings.key_heads != settings.heads:
        missing["gpt2"].append("kv_heads=0")
    for name, lacking in missing.items():
        if not lacking:
            return name
    nearest = min(missing, key=lambda name: len(missing[name]))
    changes = ", ".join(f"network.{change}" for change in missing[nearest])
    raise UserError(f"transformers has no name for this network: train with {changes} for the shape of "
                    f"{'GPT-2' if nearest == 'gpt2' else 'Llama'}, or export --to onnx instead")


def config(settings: Any, vocabulary: int, end: int) -> dict[str, Any]:
    """The values of config.json."""
    common = {"vocab_size": vocabulary, "bos_token_id": end, "eos_token_id": end, "dtype": "float32",
              "tie_word_embeddings": settings.tied, "use_cache": True}
    if shape(settings) == "gpt2":
        return common | {
            "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_positions": settings.context,
            "n_embd": settings.width, "n_layer": settings.layers, "n_head": settings.heads,
            "n_inner": settings.hidden_width, "activation_function": "gelu_new",
            "layer_norm_epsilon": settings.norm_epsilon, "attn_pdrop": settings.dropout,
            "embd_pdrop": settings.dropout, "resid_pdrop": settings.dropout}
    return common | {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": settings.context, "hidden_size": settings.width,
        "intermediate_size": settings.hidden_width, "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads, "num_key_value_heads": settings.key_heads,
        "head_dim": settings.head_width, "hidden_act": "silu",
        "rms_norm_eps": settings.norm_epsilon, "rope_theta": settings.theta,  # transformers 4 reads this one
        "rope_parameters": {"rope_type": "default", "rope_theta": settings.theta},  # and 5 this one
        "attention_bias": settings.bias, "mlp_bias": settings.bias, "attention_dropout": settings.dropout}


def to_huggingface(weights: Mapping[str, Tensor], settings: Any) -> dict[str, Tensor]:
    """The tensors of model.safetensors from a Decoder's weights."""
    tensors = {}
    for theirs, ours, turned in _names(settings):
        joined = torch.cat([_weight(weights, name, settings.width) for name in ours])
        tensors[theirs] = (joined.T if turned else joined).contiguous()
    return tensors


def from_huggingface(tensors: Mapping[str, Tensor], settings: Any) -> dict[str, Tensor]:
    """A Decoder's weights from the tensors of model.safetensors: `to_huggingface` the other way round.

    Raises UserError naming a tensor that is missing.
    """
    weights = {}
    for theirs, ours, turned in _names(settings):
        if theirs not in tensors:
            raise UserError(f"model.safetensors holds no {theirs}: it is not of the shape in config.json")
        joined = tensors[theirs].T if turned else tensors[theirs]
        for name, part in zip(ours, joined.chunk(len(ours)), strict=True):  # joined parts have one size
            weights[name] = part.contiguous()
    return {name: part for name, part in weights.items() if not _absent(name, settings)}


def _absent(name: str, settings: Any) -> bool:
    """Whether our network has no such weight though GPT-2 in `transformers` always has it."""
    norm = "norm." in name
    return (norm and not settings.gain) or (name.endswith(".bias") and not settings.bias)


def _weight(weights: Mapping[str, Tensor], name: str, width: int) -> Tensor:
    """A weight, or what it would be in a layer that has it without using it: gain 1, bias 0."""
    if name in weights:
        return weights[name]
    if "norm." in name:
        return torch.ones(width) if name.endswith("weight") else torch.zeros(width)
    assert name.endswith(".bias"), name
    return torch.zeros(weights[name.removesuffix("bias") + "weight"].shape[0])


def _names(settings: Any) -> Iterator[tuple[str, list[str], bool]]:
    """(name in the file, our names joined along the outputs, whether the file has it transposed)."""
    gpt2 = shape(settings) == "gpt2"
    body, layer = ("transformer.", "transformer.h.{}.") if gpt2 else ("model.", "model.layers.{}.")
    yield body + ("wte.weight" if gpt2 else "embed_tokens.weight"), ["embedding.weight"], False
    if gpt2:
        yield body + "wpe.weight", ["position.weight"], False
    for i in range(settings.layers):
        for theirs, ours, turned in _gpt2_layer() if gpt2 else _llama_layer(settings.bias):
            yield layer.format(i) + theirs, [f"blocks.{i}.{name}" for name in ours], turned
    yield body + ("ln_f.weight" if gpt2 else "norm.weight"), ["norm.weight"], False
    if gpt2:
        yield body + "ln_f.bias", ["norm.bias"], False
    if not settings.tied:
        yield "lm_head.weight", ["head.weight"], False


def _gpt2_layer() -> Iterator[tuple[str, list[str], bool]]:
    """Its matrices are (inputs, outputs), and one holds query, key and value."""
    linear = {"attn.c_attn": ["attention.query", "attention.key", "attention.value"],
              "attn.c_proj": ["attention.out"], "mlp.c_fc": ["mlp.up"], "mlp.c_proj": ["mlp.down"]}
    for theirs, ours in (linear | {"ln_1": ["attention_norm"], "ln_2": ["mlp_norm"]}).items():
        yield f"{theirs}.weight", [f"{name}.weight" for name in ours], theirs in linear
        yield f"{theirs}.bias", [f"{name}.bias" for name in ours], False


def _llama_layer(bias: bool) -> Iterator[tuple[str, list[str], bool]]:
    linear = {"self_attn.q_proj": "attention.query", "self_attn.k_proj": "attention.key",
              "self_attn.v_proj": "attention.value", "self_attn.o_proj": "attention.out",
              "mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.down"}
    norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    for theirs, ours in (linear | norms).items():
        yield f"{theirs}.weight", [f"{ours}.weight"], False
        if bias and theirs in linear:
            yield f"{theirs}.bias", [f"{ours}.bias"], False
