"""A codec as the tokenizer.json and tokenizer_config.json that `tokenizers` and `transformers` read.

Bytes and BPE become a byte-level BPE (Radford et al. 2019, section 2.2), characters a word-level model with a
word for each character. Every text gets the end token in front, with which all documents begin in training.
"""

import json
from pathlib import Path
from typing import Any

from handmill.disk import write_text
from handmill.media.tokenizers import PATTERN, Tokenizer

END = "<|end|>"
UNKNOWN = "\N{REPLACEMENT CHARACTER}"


def write(codec: Tokenizer, context: int, folder: Path) -> None:
    """Write both files; above `context` tokens `transformers` warns that a text is too long."""
    _save(folder / "tokenizer.json", tokenizer(codec))
    _save(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END, "pad_token": END,
        "model_max_length": context, "padding_side": "left", "clean_up_tokenization_spaces": False,
        "split_special_tokens": True})  # text that reads like the end token stays text, as in training


def tokenizer(codec: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json."""
    end = {"id": codec.end, "content": END, "special": True, "normalized": False,
           "single_word": False, "lstrip": False, "rstrip": False}
    front = {"single": [{"SpecialToken": {"id": END, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
             "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
             "special_tokens": {END: {"id": END, "ids": [codec.end], "tokens": [END]}}}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [end], "normalizer": None,
            "post_processor": {"type": "TemplateProcessing", **front},
            **(_characters(codec) if codec.kind == "character" else _byte_level(codec))}


def _characters(codec: Tokenizer) -> dict[str, Any]:
    unknown = UNKNOWN if UNKNOWN not in codec.alphabet else "<|unknown|>"
    vocabulary = {END: codec.end, unknown: codec.unknown}
    vocabulary |= {character: i for i, character in enumerate(codec.alphabet, len(vocabulary))}
    assert len(vocabulary) == codec.size, (len(vocabulary), codec.size)
    return {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated",
                              "invert": False},
            "decoder": {"type": "Fuse"},
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": unknown}}


def _byte_level(codec: Tokenizer) -> dict[str, Any]:
    letters = _letters()
    names = ["".join(letters[byte] for byte in piece) for piece in codec.token_bytes]
    names[codec.end] = END
    assert len(set(names)) == codec.size, "two tokens stand for the same bytes"
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    words = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, level]},
            "decoder": level,
            "model": {"type": "BPE", "vocab": {name: i for i, name in enumerate(names)},
                      "merges": [[names[left], names[right]] for left, right in codec.merges]}}


def _letters() -> list[str]:
    """GPT-2's printable letter for each byte: itself where printable in Latin-1, else one from U+0100 on."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


def _save(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
