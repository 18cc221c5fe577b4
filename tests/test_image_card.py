"""The card of an image model: true, clear about what is missing, and without paths of the machine."""

import json
import re
import shutil
from pathlib import Path

import judged
import numpy as np
import pytest
import shapes

from handmill import folder, page, recipe
from handmill.card import NOT_CHECKED, sections
from handmill.card import image as parts
from handmill.checks.verdict import percent, shown
from handmill.media import pictures
from handmill.verbs.card import card


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = judged.write(tmp_path_factory.mktemp("runs") / "model", "unet")
    judged.check(path)
    return path


@pytest.fixture
def copy(model, tmp_path):
    return shutil.copytree(model, tmp_path / "copy")


def written(path):
    """The Markdown, unescaped for reading, and the HTML."""
    markdown, html = (file.read_text(encoding="utf-8") for file in card(path))
    return re.sub(r"\\(.)", r"\1", markdown), html


def test_card_tells_data_training_figures_copies_samples_and_licence(model):
    markdown, html = written(model)
    receipt = folder.read_receipt(model)
    check = receipt["check"]
    source = json.loads((model / "data/manifest.json").read_text())["sources"][0]
    generated, by = check["fidelity"]["generated"], check["copying"]["by"]
    said = ["An image model", "54,321", "16 x 16 pixels, grey", "bar, dot, ring", source["sha256"], "images-3",
            "3,200 (177.8 times the training split)", "0.6250 weighted squared error", "Abacus",
            *map(shown, generated.values()), shown(check["fidelity"]["floor"]["coverage"]), "n = 500", judged.NETWORK,
            percent(check["labels"]["agreement"]), percent(check["labels"]["ceiling"]), "3 of 3",
            shown(check["likelihood"]["bits_per_dimension"]), percent(by["pixels"]["share_closer_than_real_1pct"]),
            shown(by["pixels"]["median_ratio"]), check["verdict"]["text"], "unknown licence: find out", "seed 7",
            "steps 4, guidance 1.5", "not to be passed off", "not measured. Where faces"]
    for value in said:
        assert value in markdown, value
    for title in ("Use and limits", "Data", "Training", "Quality beside real images",
                  "Copying from the training images", "Samples", "Exports", "Settings", "Licence"):
        assert f"\n## {title}\n" in markdown
    assert html.count("data:image/png;base64,") == 4  # the sheet of the data and three pictures of the check
    for file in ("data/contact.png", *check["pictures"].values()):
        assert f"]({file})" in markdown


def test_data_are_counted_as_their_report_does(model):
    markdown, report = written(model)[0], json.loads((model / "data/report.json").read_text())
    for name, split in report["splits"].items():
        assert f"| {name} | {split['images']} |" in markdown
    for name, count in report["classes"]["images"].items():
        assert f"| {name} | {count} |" in markdown
    assert f"| images kept | {report['images']['kept']} |" in markdown


def test_no_path_of_the_machine_gets_in(tmp_path):
    path = judged.write(tmp_path / "model", "latents")  # its recipe names the autoencoder's folder
    made = recipe.read(path / "recipe.toml")
    settings = made.table()["check"] | {"inception": str(tmp_path / "inception")}
    judged.check(path, settings=settings)
    for text in written(path):
        assert str(tmp_path) not in re.sub(r"data:image/png;base64,[^\"]*", "", text)
    assert str(tmp_path) in made.codec.path
    assert f'path = "{Path(made.codec.path).name}"' in written(path)[0]
    assert "trained autoencoder" in written(path)[0]


def test_card_without_a_check_says_so_and_shows_the_training_picture(copy):
    receipt = folder.read_receipt(copy)
    del receipt["check"]
    (copy / "receipt.json").write_text(folder.sealed(receipt))
    markdown = written(copy)[0]
    assert markdown.count(NOT_CHECKED) == 3
    assert "None recorded: `handmill check` makes them" in markdown
    assert "do not rely on either" in markdown
    pictures.save_png(copy / "samples/training.png", np.zeros((4, 4, 1), np.uint8))
    assert "](samples/training.png)" in written(copy)[0]


def test_the_check_of_other_weights_is_not_shown(copy):
    folder.record(copy, "check", folder.read_receipt(copy)["check"] | {"weights": "0" * 64})
    assert written(copy)[0].count(NOT_CHECKED) == 3


def test_parts_that_were_not_measured_say_why(copy):
    gone = {"missing": "not measured: training data is not on this machine"}
    judged.check(copy, fidelity=gone, labels=gone, copying=gone, likelihood={"missing": "not defined for this family"},
                 pictures={"samples": "samples/gone.png"})
    markdown = written(copy)[0]
    assert markdown.count("training data is not on this machine") >= 5  # three parts, and the verdict twice
    assert "Likelihood not defined for this family." in markdown
    assert "Not there any more: samples." in markdown


def test_card_of_a_bare_folder_names_what_is_missing(copy):
    receipt = folder.read_receipt(copy)
    shutil.rmtree(copy / "data")
    receipt = {"format": receipt["format"], "files": {k: v for k, v in receipt["files"].items() if k[:5] != "data/"}}
    (copy / "receipt.json").write_text(folder.sealed(receipt))
    markdown = written(copy)[0]
    for said in ("Not recorded: the sources", "Not recorded: how the images", "Not drawn: the loss curve", "None made",
                 "Not recorded: what the plan predicted", "Not recorded: the licence", "| steps | not recorded |"):
        assert said in markdown, said


@pytest.mark.parametrize("file", ["../secret.png", "{outside}", "samples/../../secret.png", "receipt.json", "", "x"])
def test_a_receipt_cannot_draw_in_other_files(copy, file):
    pictures.save_png(copy.parent / "secret.png", np.zeros((4, 4, 1), np.uint8))
    name = file.format(outside=copy.parent / "secret.png")
    judged.check(copy, pictures={"samples": name, "nearest training images": name})
    shown_files = [block.file for section in sections(copy, folder.read_receipt(copy)) for block in section.blocks
                   if isinstance(block, page.Picture)]
    assert shown_files == ["data/contact.png"]


def test_an_autoencoder_of_codes_is_not_said_to_make_images(tmp_path):
    path = judged.write(tmp_path / "model", "vq")
    judged.check(path, samples={"count": 500, "what": "reconstructions of held-out images"},
                 copying={"missing": "not defined: reconstructions are not samples"},
                 codes={"codes": 32, "used": 21, "perplexity": 17.25, "images": 500})
    markdown = written(path)[0]
    assert "It makes none by itself" in markdown
    assert "It makes images" not in markdown
    assert "21 of 32, perplexity 17.2" in markdown
    assert "500 reconstructions of held-out images beside" in markdown


def test_card_of_a_generator_tells_its_game_and_what_went_wrong(tmp_path):
    path = shapes.written(tmp_path / "stylegan2", "stylegan2", shapes.folder(tmp_path / "shapes", 10))
    fault = "step 300: collapsed: coverage fell from 0.81 (step 200) to 0.10 and recall from 0.60 to 0.00"
    folder.record(path, "training", {"steps": 1000, "faults": [fault]})
    (path / "metrics.jsonl").write_text("".join(json.dumps(
        {"step": 50 * i, "validation_loss": 100 / i, "validation_coverage": i / 64, "validation_recall": i / 128,
         "validation_precision": 0.5}) + "\n" for i in range(1, 31)))
    check = judged.check(path)
    for what in ("truncation", "interpolation"):
        check["pictures"][what] = f"samples/{what}.png"
        pictures.save_png(path / check["pictures"][what], np.zeros((4, 4, 1), np.uint8))
    check["fidelity"]["generated"] |= {"coverage": judged.figure(0.089), "recall": judged.figure(0.0)}
    judged.check(path, fidelity=check["fidelity"], pictures=check["pictures"])
    markdown, html = written(path)
    for said in ("## Generator and discriminator", "| loss | non-saturating (Goodfellow et al. 2014) |", fault,
                 "| gradient penalty | none |", "| R1 penalty | 1, every 4 steps (Mescheder et al. 2018) |",
                 "| path length penalty | 2, every 4 steps (Karras et al. 2020) |", "| images of two styles | 90% |",
                 "discriminator sees | flip, as far", "30 times in training, 12 of them here",
                 "Found in training, and what was done", "| step | coverage | recall | precision | Fréchet distance |",
                 "| 50 | 0.016 | 0.008 | 0.500 | 100.000 |", "| 1,500 | 0.469 | 0.234 | 0.500 | 3.333 |",
                 "1 as trained, towards 0 nearer to the centre", "from one sample to another, a row each",
                 "does not call it good", "variety is lost: coverage is 0.089 against"):
        assert said in markdown, said
    for file in check["pictures"].values():
        assert f"]({file})" in markdown
    assert html.count("data:image/png;base64,") >= 5
    (path / "metrics.jsonl").unlink()
    folder.record(path, "training", {"steps": 1000, "faults": []})
    markdown = written(path)[0]
    assert "Not recorded: the evaluations in training." in markdown
    assert "what was done" not in markdown


def test_exports_show_the_worst_graph(copy):
    graphs = {"denoiser.onnx": {"largest_error": 3e-6, "tolerance": 1e-4},
              "decoder.onnx": {"largest_error": 2e-5, "tolerance": 1e-3}}
    folder.record(copy, "exports", {"made": "today", "graphs": graphs}, key="onnx")
    folder.record(copy, "exports", {"made": "today"}, key="another")
    markdown = written(copy)[0]
    assert "| 2.0e-05 (decoder.onnx; 1e-03 allowed) |" in markdown
    assert "| another | today | not recorded | not measured |" in markdown
    assert "greedy" not in markdown


def test_many_classes_are_summed_up():
    names = tuple(f"class{i}" for i in range(100))
    assert "one of 100 classes" in parts._asked(names)
    assert "class19 and 80 more" in parts._asked(names)
    table = parts._shares({"images": {name: 100 - i for i, name in enumerate(names)}, "unlabelled": 3})[0]
    assert table.rows[1] == ("class0", "100")
    assert table.rows[-2] == ("and 80 more, at least 1 each", f"{sum(range(1, 81)):,}")
    assert table.rows[-1] == ("without a class", "3")
