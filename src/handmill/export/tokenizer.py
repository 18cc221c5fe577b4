"""A codec as the tokenizer.json and tokenizer_config.json that `tokenizers` and `transformers` read.

Bytes and BPE become a byte-level BPE (Radford et al. 2019, section 2.2), characters a word-level model with a
word for each character. Every text gets the end token in front, with which all documents begin in training. Text never
becomes the end or a special token, whatever it says, as in training: those are put by their number.
"""

import json
from pathlib import Path
from typing import Any

from handmill.disk import write_text
from handmill.errors import UserError
from handmill.media.tokenizers import PATTERN, Tokenizer

END = "<|end|>"
UNKNOWN = "\N{REPLACEMENT CHARACTER}"


def write(codec: Tokenizer, context: int, folder: Path) -> None:
    """Write both files; above `context` tokens `transformers` warns that a text is too long.

    Raises UserError for a special token whose name means another token already.
    """
    _save(folder / "tokenizer.json", tokenizer(codec))
    _save(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END, "pad_token": END,
        "model_max_length": context, "padding_side": "left", "clean_up_tokenization_spaces": False,
        "additional_special_tokens": [*codec.special], "split_special_tokens": True})


def tokenizer(codec: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json."""
    added = [{"id": token, "content": name, "special": True, "normalized": False, "single_word": False,
              "lstrip": False, "rstrip": False} for name, token in ({END: codec.end} | codec.special).items()]
    front = {"single": [{"SpecialToken": {"id": END, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
             "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
             "special_tokens": {END: {"id": END, "ids": [codec.end], "tokens": [END]}}}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "post_processor": {"type": "TemplateProcessing", **front},
            **(_characters(codec) if codec.kind == "character" else _byte_level(codec))}


def _vocabulary(codec: Tokenizer, names: list[str]) -> dict[str, int]:
    """Every token by its name, from those of all but the special ones."""
    assert len({*names}) == len(names) == codec.size - len(codec.special), "two tokens have one name"
    if taken := {*names} & {*codec.special}:
        raise UserError(f"the special token {min(taken)!r} cannot be exported, for another token has this name: "
                        "choose one like '<|name|>' in codec.special and train anew")
    return {name: i for i, name in enumerate([*names, *codec.special])}


def _characters(codec: Tokenizer) -> dict[str, Any]:
    unknown = UNKNOWN if UNKNOWN not in codec.alphabet else "<|unknown|>"
    assert (codec.end, codec.unknown) == (0, 1)
    return {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated",
                              "invert": False},
            "decoder": {"type": "Fuse"},
            "model": {"type": "WordLevel", "unk_token": unknown,
                      "vocab": _vocabulary(codec, [END, unknown, *codec.alphabet])}}


def _byte_level(codec: Tokenizer) -> dict[str, Any]:
    letters = _letters()
    names = ["".join(letters[byte] for byte in piece) for piece in codec.token_bytes[:codec.end]]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    words = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, level]},
            "decoder": level,
            "model": {"type": "BPE", "vocab": _vocabulary(codec, [*names, END]),
                      "merges": [[names[left], names[right]] for left, right in codec.merges]}}


def _letters() -> list[str]:
    """GPT-2's printable letter for each byte: itself where printable in Latin-1, else one from U+0100 on."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


def _save(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
