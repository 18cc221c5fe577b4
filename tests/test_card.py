"""The card and the loss curve: true, escaped, and clear about what is missing."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser

import checked
import matplotlib.image
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb

from handmill import folder, page
from handmill.card import NOT_CHECKED
from handmill.page import Code, Picture, Points, Section, Table, Text
from handmill.training import curve
from handmill.verbs.card import card
from handmill.verbs.check import check

NASTY = "<script>alert('x')</script> & ```` | *bold*\n# not a title\n[link](http://x)"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = checked.write(tmp_path_factory.mktemp("runs"))
    training = folder.read_receipt(path)["training"]
    folder.record(path, "training", training | {"items": 3072, "unit": "tokens", "measure": "nats per token"})
    check(path, progress=False)
    curve.draw(path / "metrics.jsonl", path / "loss.png")
    return path


@pytest.fixture
def copy(model, tmp_path):
    return shutil.copytree(model, tmp_path / "copy")


class Page(HTMLParser):
    """Tags, and the text between them, as a browser reads them."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.text, self.images = [], "", []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.images += [dict(attrs)["src"]] if tag == "img" else []

    def handle_data(self, data):
        self.text += data


def test_card_tells_data_settings_figures_copying_samples_and_licence(model):
    markdown, html = (path.read_text(encoding="utf-8") for path in card(model))
    receipt = folder.read_receipt(model)
    figure = receipt["check"]["likelihood"]["bits_per_character"]
    trigram = receipt["check"]["baselines"]["trigram"]["bits_per_character"]
    sample = json.loads((model / "samples/check.jsonl").read_text(encoding="utf-8").splitlines()[0])["text"]
    source = json.loads((model / "data/manifest.json").read_text())["sources"][0]
    shown = [f"{figure['value']:.3f}", f"{figure['low']:.3f}", f"{trigram['value']:.3f}", "12,345", "Abacus", "CC0-1.0",
             source["sha256"], "tiny.txt", "1 min 02 s", "210.0 MB", "2.6250 nats per token", "context = 32",
             receipt["files"]["weights.safetensors"]["sha256"], receipt["check"]["verdict"]["text"]]
    text = Page(html).text
    for value in shown:
        assert value in markdown, value
        assert value in text, value
    assert sample in text
    assert sample in markdown
    assert text.count("not recorded") == 1  # the disk that training took
    for title in ("Use and limits", "Data", "Training", "Quality on held-out text", "Copying from the training text",
                  "Samples", "Exports", "Settings", "Licence"):
        assert f"\n## {title}\n" in markdown


def test_card_holds_its_curve_and_no_path_of_the_machine(model):
    markdown, html = (path.read_text(encoding="utf-8") for path in card(model))
    image = Page(html).images[0]
    assert base64.b64decode(image.removeprefix("data:image/png;base64,")) == (model / "loss.png").read_bytes()
    assert "](loss.png)" in markdown
    for text in (markdown, html.replace(image, "")):
        assert str(model.parent) not in text
        assert not re.search(r"(?<![\w<.])/(home|tmp|work|root|private|Users)\b", text)
        assert "http" not in text


def test_samples_and_names_are_escaped(copy):
    rows = [{"sample": 0, "seed": 1, "text": NASTY}]
    (copy / "samples/check.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    markdown, html = (path.read_text(encoding="utf-8") for path in card(copy))
    read = Page(html)
    assert "script" not in read.tags
    assert NASTY in read.text
    assert f"\n`````text\n{NASTY}\n`````\n" in markdown  # a fence longer than the sample's own


def test_card_without_a_check_says_so(copy):
    receipt = folder.read_receipt(copy)
    del receipt["check"]
    (copy / "receipt.json").write_text(folder.sealed(receipt))
    markdown = card(copy)[0].read_text(encoding="utf-8")
    assert markdown.count(page.plain(NOT_CHECKED)) == 3  # at the head, under quality and under copying
    assert "None recorded: \\`handmill check\\` makes them" in markdown
    assert "do not rely on either" in markdown


def test_card_does_not_show_the_check_of_other_weights(copy):
    folder.record(copy, "check", folder.read_receipt(copy)["check"] | {"weights": "0" * 64})
    assert page.plain(NOT_CHECKED) in card(copy)[0].read_text(encoding="utf-8")


def test_card_of_a_bare_folder_names_what_is_missing(copy):
    receipt = folder.read_receipt(copy)
    shutil.rmtree(copy / "data")
    (copy / "loss.png").unlink()
    receipt = {"format": receipt["format"], "files": {k: v for k, v in receipt["files"].items() if k[:5] != "data/"}}
    (copy / "receipt.json").write_text(folder.sealed(receipt))
    markdown = card(copy)[0].read_text(encoding="utf-8")
    for said in ("Not recorded: the sources", "Not recorded: how the data were cleaned", "Not drawn: the loss curve",
                 "Not recorded: what the plan predicted", "Not recorded: the licence", "None made",
                 "| steps | not recorded |", "| parameters | not recorded |"):
        assert said in markdown, said


def test_exports_show_their_parity_and_whether_they_are_of_these_weights(copy):
    weights = folder.read_receipt(copy)["files"]["weights.safetensors"]["sha256"]
    folder.record(copy, "exports", {"weights": weights, "logits_error": 2e-6, "greedy_tokens": 128,
                                    "compared_with": "abacus 1.0"}, key="onnx")
    markdown = card(copy)[0].read_text(encoding="utf-8")
    assert "2.0e-06 | 128 |" in markdown
    assert "Made of other weights" not in markdown
    folder.record(copy, "exports", {"weights": "0" * 64}, key="huggingface")
    assert "Made of other weights than these: huggingface" in card(copy)[0].read_text(encoding="utf-8")


def test_unknown_licence_and_secrets_are_warned_of(copy):
    for name, change in (("manifest", lambda m: m["sources"][0].update(licence="unknown")),
                         ("report", lambda r: r["secrets"]["counts"].update({"private key": 3}))):
        value = json.loads((copy / f"data/{name}.json").read_text())
        change(value)
        (copy / f"data/{name}.json").write_text(json.dumps(value))
    receipt = folder.read_receipt(copy)
    receipt["files"] |= {f"data/{n}.json": folder.fingerprint(copy / f"data/{n}.json") for n in ("manifest", "report")}
    (copy / "receipt.json").write_text(folder.sealed(receipt))
    markdown = card(copy)[0].read_text(encoding="utf-8")
    assert "3 possible secrets" in markdown
    assert "unknown licence: find out" in markdown


@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"])), min_size=1, max_size=3))
@settings(max_examples=80, deadline=None)
def test_any_text_comes_through_html_whole(tmp_path_factory, texts):
    blocks = [Text(texts[0]), Points(texts), Table([tuple(texts), tuple(texts)]), Code(texts[-1], texts[0])]
    read = Page(page.html([Section(texts[0], blocks), Section("end", [])], tmp_path_factory.getbasetemp()))
    assert read.text.count(texts[0]) >= 4 if texts[0] else True
    assert set(read.tags) <= {
        "html", "head", "meta", "title", "style", "body", "main", "section", "h1", "h2", "p", "ul", "li", "div",
        "table", "thead", "tbody", "tr", "th", "td", "figure", "figcaption", "pre"}


def test_markdown_escapes_what_would_be_markup():
    assert page.plain("a|b <i> *x* _y_ snake_case `c` [d](e)\nf") == (
        r"a\|b \<i\> \*x\* \_y\_ snake_case \`c\` \[d\](e) f")
    source = page.markdown([Section("T", [Table([("a", "b"), ("1|2", "3\n4")]), Picture("loss.png", "x")])])
    assert "| a | b |\n| --- | --- |\n| 1\\|2 | 3 4 |" in source


# the curve


def drawn(png, colour):
    """How many pixels have about this colour."""
    image = matplotlib.image.imread(png)[..., :3]
    return int((np.abs(image - np.array(to_rgb(colour))).max(-1) < 0.02).sum())


def metrics(path, steps=200, every=50):
    with path.open("w") as file:
        for step in range(1, steps + 1):
            file.write(json.dumps({"step": step, "loss": 1 + 3 / step, "rate": 1 - step / steps}) + "\n")
            if step % every == 0:
                file.write(json.dumps({"step": step, "validation_loss": 1.25 + 3 / step}) + "\n")
    return path


def test_curve_draws_training_and_validation(tmp_path):
    curve.draw(metrics(tmp_path / "metrics.jsonl"), tmp_path / "both.png")
    curve.draw(metrics(tmp_path / "metrics.jsonl", every=1000), tmp_path / "train.png")
    assert drawn(tmp_path / "both.png", curve._TRAIN) > 2000
    assert drawn(tmp_path / "both.png", curve._VALIDATION) > 1000
    assert drawn(tmp_path / "train.png", curve._VALIDATION) == 0


def test_curve_reads_past_a_torn_line_and_joins_a_step(tmp_path):
    path = metrics(tmp_path / "metrics.jsonl")
    whole = curve.read(path)
    assert whole[49] == {"step": 50, "loss": 1.06, "rate": 0.75, "validation_loss": 1.31}
    with path.open("a") as file:
        file.write('{"step": 201, "lo')
    assert curve.read(path) == whole
    curve.draw(path, tmp_path / "torn.png")
    assert drawn(tmp_path / "torn.png", curve._TRAIN) > 2000


@pytest.mark.parametrize("text", ["", "{", '{"step": 1, "loss": NaN}\n', '{"step": 1, "loss": 2.0}\n', "[1]\n"])
def test_curve_of_almost_nothing_is_still_a_picture(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    curve.draw(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert matplotlib.image.imread(tmp_path / "loss.png").shape[:2] == (720, 1200)
    curve.draw(tmp_path / "missing.jsonl", tmp_path / "loss.png")


def test_smoothing_keeps_the_mean_of_a_line_and_the_ends():
    line = np.linspace(4, 1, 500)
    assert curve.smoothed(line) == pytest.approx(line)
    noisy = line + np.random.default_rng(0).normal(0, 1, 500)
    assert np.abs(curve.smoothed(noisy) - line)[10:-10].std() < 0.5
    assert curve.smoothed(np.array([3.0])) == pytest.approx([3.0])
