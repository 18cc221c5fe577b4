"""`demo`: the whole road on the language reference that comes with every Python, in about two minutes."""

import time
from pathlib import Path

from handmill import checks, folder
from handmill.errors import UserError
from handmill.verbs.card import card
from handmill.verbs.check import check
from handmill.verbs.export import export
from handmill.verbs.generate import generate
from handmill.verbs.new import new
from handmill.verbs.train import train

SETTINGS = ("data.licence='PSF-2.0'", "codec.vocabulary=512", "network.layers=4", "network.width=160",
            "network.heads=5", "network.context=128", "network.dropout=0.15", "training.steps=450",
            "training.evaluate_every=75", "training.save_every=225", "training.sample_every=8.0",
            "data.validation=0.1", "data.test=0.1")


def demo(out: Path) -> None:
    """Write the texts, then new, train, check, generate, export and card, saying each command as it goes."""
    started = time.perf_counter()
    files = write_topics(out / "demo-texts")
    recipe = out / "demo.toml"
    recipe.unlink(missing_ok=True)
    say(f"handmill new gpt {files} --out {recipe}")
    new("gpt", [str(files)], recipe)
    say(f"handmill train {recipe} {' '.join(SETTINGS)} --out {out / 'demo'}")
    path = train(recipe, out / "demo", SETTINGS)
    say(f"handmill check {path} samples=16")
    print("\n".join(checks.lines(check(path, samples=16, sample_tokens=128))))
    say(f'handmill generate {path} "The with statement" --max-tokens 80')
    print("The with statement" + generate(folder.load(path), ["The with statement"], max_tokens=80)[0])
    say(f"handmill export {path} --to onnx")
    try:
        parity = export(path, "onnx")
        print(f"largest difference from the trained network's logits: {parity['logits_error']:.2g}")
    except UserError as error:
        print(f"left out: {error}")
    say(f"handmill card {path}")
    pages = card(path)
    print(f"\nDone in {time.perf_counter() - started:.0f} s. Yours now:\n"
          f"  model folder  {path}\n  loss curve    {path / 'loss.png'}\n  card          {pages[1]}\n"
          f"  serve it      handmill serve {path}\n"
          f"  your own      handmill new gpt FOLDER --out mine.toml && handmill train mine.toml")


def write_topics(target: Path) -> Path:
    """The topics of `pydoc_data`, one text file each."""
    from pydoc_data.topics import topics  # type: ignore[import-untyped,unused-ignore]

    target.mkdir(parents=True, exist_ok=True)
    for name, text in topics.items():
        (target / f"{name}.txt").write_text(text, encoding="utf-8")
    return target


def say(command: str) -> None:
    print(f"\n$ {command}", flush=True)
