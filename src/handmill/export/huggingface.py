"""A Hugging Face folder that `transformers` loads: config.json, model.safetensors and the tokenizer's files.

Two shapes that `transformers` knows by name are written: GPT-2's (Radford et al. 2019) and Llama's (Touvron
et al. 2023). Nothing is imported from `transformers`: the formats are written and read directly.

C width, V vocabulary.
"""

import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from handmill.data.middle import NAMES
from handmill.errors import UserError
from handmill.export import tokenizer
from handmill.export.compare import compare
from handmill.families import filling
from handmill.folder import Model, weights_of, write_text
from handmill.networks import build

# setting -> what the shape needs; `activation` decides which of the two is meant
NEEDS: dict[str, dict[str, Any]] = {
    "gpt2": {"norm": "layer", "positions": "learned", "activation": "gelu", "qk_norm": False, "memory": 0},
    "llama": {"norm": "rms", "positions": "rotary", "activation": "swiglu", "qk_norm": False, "memory": 0},
}
_TITLES = {"gpt2": "GPT-2", "llama": "Llama"}

_README = """# {name}

Made with Handmill. A language model of {shape}'s shape: {parameters:,} parameters, context {context} tokens.
Licence of the training text, as its owner states it: {licence}.

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("this/folder")
    network = AutoModelForCausalLM.from_pretrained("this/folder")
    tokens = tokenizer("Once", return_tensors="pt")
    print(tokenizer.decode(network.generate(**tokens)[0], skip_special_tokens=True))

The tokenizer puts `<|end|>` in front of every text, as in training; `<|end|>` inside a text stays text.
{marks}"""
_MARKS = """
Other tokens that no text becomes: {names}. They are put by their number, between the tokens of texts:

    mark = tokenizer.convert_tokens_to_ids
    def ids(text): return tokenizer(text, add_special_tokens=False)["input_ids"]
"""
_FILLING = """
What stands between two texts, up to `<|end|>`, follows this prompt:

    prompt = [mark("<|end|>"), {order}]
"""


def write(model: Model, folder: Path) -> None:
    """Write the model into `folder`. Raises UserError when `transformers` has no name for its network."""
    settings, codec = model.recipe.network, model.codec
    table = config(settings, codec.size, codec.end)
    weights = {name: weight.cpu() for name, weight in weights_of(model.network).items()}
    save_file(to_huggingface(weights, settings), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.write(codec, settings.context, folder)
    for name, content in (("config", table), ("generation_config", _generation(model))):
        write_text(folder / f"{name}.json", json.dumps(content, indent=1) + "\n")
    write_text(folder / "README.md", _README.format(
        name=model.recipe.name, licence=model.recipe.data.licence, context=settings.context,
        shape=_TITLES[shape(settings)], parameters=sum(w.numel() for w in weights.values()), marks=_marks(model)))


def _marks(model: Model) -> str:
    """What README.md says of special tokens."""
    if not model.codec.special:
        return ""
    said = _MARKS.format(names=", ".join(f"`{name}`" for name in model.codec.special))
    if not filling.taught(model.recipe, model.codec):
        return said
    prefix, suffix, middle = (f'mark("{name}")' for name in NAMES)
    order = (f"{prefix}, {suffix}, *ids(after), {middle}, *ids(before)" if filling.suffix_first(model.recipe) else
             f"{prefix}, *ids(before), {suffix}, *ids(after), {middle}")
    return said + _FILLING.format(order=order)


def compare_folder(model: Model, folder: Path, windows: Tensor) -> dict[str, Any]:
    """Compare the written folder with the trained network on windows (B, T) of tokens.

    `transformers` runs it where installed; else the file is read back. Raises UserError on a mismatch.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        read = from_huggingface(load_file(folder / "model.safetensors"), model.recipe.network)
        network = build(model.recipe.network, model.codec).eval()
        network.load_state_dict(read, strict=False)  # a tied head is not in the file
        return compare(model.network, network, windows) | {"compared_with": "own reading of the written file"}
    transformers.utils.logging.disable_progress_bar()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    figures = compare(model.network, _Transformers(loaded, model), windows, cached=False)
    texts = [model.codec.decode(window.tolist()) for window in windows]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in texts:
        if theirs(text, verbose=False)["input_ids"] != [model.codec.end, *map(int, model.codec.encode(text))]:
            raise UserError(f"the exported tokenizer does not cut this text as the trained one: {text!r}")
    return figures | {"compared_with": f"transformers {transformers.__version__}",
                      "characters_encoded": sum(map(len, texts))}


class _Transformers:
    """A network of `transformers`, called as ours is, without a state."""

    def __init__(self, network: Any, model: Model) -> None:
        self.network, self.settings = network.eval(), model.recipe.network

    def __call__(self, tokens: Tensor, state: None = None) -> tuple[Tensor, None]:
        return self.network(tokens).logits, None


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
                    f"{_TITLES[nearest]}, or export --to onnx instead")


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
        joined = torch.cat([_weight(weights, name, settings.width) * _scale(name, settings) for name in ours])
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
            weights[name] = part.contiguous() / _scale(name, settings)
    return {name: part for name, part in weights.items() if not _absent(name, settings)}


def _scale(name: str, settings: Any) -> float:
    """Their attention divides by sqrt(D); another scale of ours goes into the queries, which are linear."""
    scaled = settings.attention_scale and ".query." in name
    return settings.attention_scale * settings.head_width**0.5 if scaled else 1.0


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


def _generation(model: Model) -> dict[str, Any]:
    """The values of generation_config.json, from the recipe's [sampling] table."""
    s, end = model.recipe.sampling, model.codec.end
    common: dict[str, Any] = {
        "bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "max_new_tokens": s.max_tokens,
        "repetition_penalty": s.repetition_penalty}
    if model.codec.special:
        common["suppress_tokens"] = [*model.codec.special.values()]  # never drawn here either
    if s.temperature == 0:
        return common | {"do_sample": False}
    return common | {"do_sample": True, "temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p,
                     "min_p": s.min_p or None}
