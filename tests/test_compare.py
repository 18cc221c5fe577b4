"""Models side by side: only what compares, true to the receipts, the best marked where it is shown to be."""

import json
import shutil

import checked
import judged
import matplotlib.image
import numpy as np
import pytest
import shapes
import tiny_images
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb

from handmill import folder, recipe
from handmill.checks import comparing, comparing_picture
from handmill.checks.verdict import percent, shown
from handmill.errors import UserError
from handmill.verbs import compare as verb
from handmill.verbs.compare import compare, lines
from handmill.verbs.generate import images

SAMPLERS = [{"steps": 5}, {"steps": 5, "sampler": "heun"}, {"steps": 5, "guidance": 2.0},
            {"steps": 5, "sampler": "heun", "guidance": 2.0, "guidance_interval": [0.1, 5.0]}]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A variational, a diffusion and a latent diffusion model of the same images."""
    home = tmp_path_factory.mktemp("runs")
    return [judged.write(home / kind, kind) for kind in ("asked", "unet", "latents")]


@pytest.fixture
def runs(made, tmp_path):
    """Copies of them, checked: the first far better than the others, which are alike."""
    paths = [shutil.copytree(path, tmp_path / path.name) for path in made]
    for path, distance in zip(paths, (2.0, 5.0, 5.25), strict=True):
        judged.check(path, distance)
    return paths


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two models of the same text by different tokenizers."""
    home = tmp_path_factory.mktemp("texts")
    return [checked.write(home, kind, codec=kind) for kind in ("byte", "character")]


def row(result, what):
    return next(row for row in result["rows"] if row["what"].startswith(what))


def colour(png, name):
    return int((np.abs(matplotlib.image.imread(png)[..., :3] - np.array(to_rgb(name))).max(-1) < 0.02).sum())


def test_images_stand_side_by_side_as_their_receipts_say(runs, tmp_path):
    result = compare(runs, tmp_path / "out", check=False, progress=False)
    assert result["columns"] == ["asked", "unet", "latents", "real images"]
    checks = [folder.read_receipt(path)["check"] for path in runs]
    for name, what in ((f"fd_{judged.NETWORK}@500", "Fréchet"), ("precision", "precision"), ("recall", "recall"),
                       ("density", "density"), ("coverage", "coverage")):
        cells = row(result, what)["cells"]
        for cell, check in zip(cells, checks, strict=False):
            assert cell.removesuffix(" (best)") == shown(check["fidelity"]["generated"][name])
        assert cells[3] == shown(checks[0]["fidelity"]["floor"][name])
    copies = checks[1]["copying"]["by"]["pixels"]
    assert row(result, "near to one training image, by pixels")["cells"][1:4:2] == [
        percent(copies["share_closer_than_real_1pct"]), percent(copies["share_of_real"])]
    assert row(result, "label agreement")["cells"][3] == shown(checks[0]["labels"]["ceiling"])
    assert row(result, "bits per dimension")["cells"][0] == shown(checks[0]["likelihood"]["bits_per_dimension"])
    assert row(result, "verdict")["cells"][0] == checks[0]["verdict"]["text"]
    assert row(result, "parameters")["cells"][:3] == ["54,321", "54,321", "54,321"]
    assert row(result, "training time")["cells"][0] == "1 min 02 s"
    assert row(result, "network evaluations")["cells"][:3] == ["1", "4", "4"]
    markdown = (tmp_path / "out/compare.md").read_text(encoding="utf-8").replace("\\", "")
    screen = "\n".join(lines(result))
    for line in result["rows"]:
        for cell in line["cells"]:
            assert cell in markdown
            assert cell in screen
    assert "](compare.png)" in markdown
    assert str(tmp_path) not in markdown


def test_only_what_is_shown_to_be_best_is_marked(runs, tmp_path):
    result = compare(runs, tmp_path / "out", check=False, progress=False)
    assert row(result, "Fréchet")["best"] == 0
    assert row(result, "Fréchet")["cells"][0].endswith(" (best)")
    assert all(line["best"] is None for line in result["rows"] if not line["what"].startswith("Fréchet"))


figures = st.tuples(st.integers(0, 9), st.integers(0, 3)).map(lambda pair: {"low": pair[0], "high": pair[0] + pair[1]})


@given(st.lists(st.none() | figures, max_size=4), st.sampled_from(["lower", "higher"]))
@settings(max_examples=300, deadline=None)
def test_the_best_lies_beyond_all_others(found, better):
    known = [i for i, f in enumerate(found) if f]
    beyond = [i for i in known if len(known) > 1 and all(
        found[i]["high"] < found[j]["low"] if better == "lower" else found[i]["low"] > found[j]["high"]
        for j in known if j != i)]
    assert comparing.best(found, better) == (beyond[0] if beyond else None)


def test_a_figure_without_an_interval_leaves_the_row_unmarked():
    sure, unsure = {"value": 1, "low": 1, "high": 1}, {"value": 9, "low": None, "high": None}
    assert comparing.best([sure, unsure, {"value": 9, "low": 9, "high": 9}], "lower") is None


def test_pictures_show_samples_and_points(runs, tmp_path, monkeypatch):
    shown_samples = {}
    monkeypatch.setattr(verb, "draw", lambda result, samples, png: shown_samples.update(samples)
                        or comparing_picture.draw(result, samples, png))
    compare(runs, tmp_path / "out", check=False, progress=False)
    png = tmp_path / "out/compare.png"
    assert colour(png, comparing_picture._MODEL) > 500
    assert colour(png, comparing_picture._REFERENCE) > 100
    assert matplotlib.image.imread(png).shape[0] > matplotlib.image.imread(png).shape[1] / 2
    assert set(shown_samples) == {"asked", "unet", "latents"}
    asked = [tiny_images.CLASSES[i % 3] for i in range(verb.SHOWN)]
    expected = images(folder.load(runs[1]), asked, seed=verb.SEED)
    assert np.abs(shown_samples["unet"].astype(int) - expected).max() <= 1


def test_samples_and_reconstructions_are_not_ranked(runs, tmp_path):
    coded = judged.write(runs[0].parent / "vq", "vq")
    judged.check(coded, 0.1, samples={"count": 500, "what": "reconstructions of held-out images", "sampling": {}},
                 copying={"missing": "not defined: reconstructions are not samples"},
                 likelihood={"kind": "reconstruction alone: no prior", "counted": "log density, nats", "images": 5,
                             "bits_per_dimension": judged.figure(0.5)})
    result = compare([coded, runs[0]], tmp_path / "out", check=False, progress=False)
    assert all(line["best"] is None for line in result["rows"])
    assert any("not all are judged alike" in note for note in result["notes"])
    assert row(result, "time per sample")["cells"][0] == "no samples"
    assert row(result, "bits per dimension")["cells"][0] == "no likelihood"


def test_likelihoods_counted_otherwise_stand_in_other_rows(runs, tmp_path):
    judged.check(runs[0], likelihood={"kind": "bound", "images": 500, "bits_per_dimension": judged.figure(0.25),
                                      "counted": "log likelihood of black and white pixels, nats per image"})
    result = compare(runs[:2], tmp_path / "out", check=False, progress=False)
    two = [line for line in result["rows"] if line["what"].startswith("bits per dimension")]
    assert [line["cells"][:2] for line in two] == [["0.250 [0.230, 0.270]", "counted otherwise"],
                                                   ["counted otherwise", "2.375 [2.355, 2.395]"]]


@pytest.mark.parametrize(("kind", "sampling"), [*(("unet", sampling) for sampling in SAMPLERS), ("prior", {})])
def test_evaluations_are_as_often_as_the_network_runs(tmp_path, kind, sampling):
    model = tiny_images.load(tmp_path / "model", kind, sampling=sampling)
    rows = []
    model.network.register_forward_hook(lambda module, given, out: rows.append(len(given[0])))
    images(model, ["bar", "dot"], seed=1)
    assert verb.evaluations(model) == sum(rows) / 2


def test_a_generator_stands_beside_an_autoencoder(tmp_path):
    drawn = shapes.folder(tmp_path / "shapes", 10)
    paths = [shapes.written(tmp_path / kind, kind, drawn) for kind in ("vae", "cgan", "stylegan2")]
    for path, distance in zip(paths, (5.0, 2.0, 5.25), strict=True):
        judged.check(path, distance, likelihood={"missing": "not defined for this family"})
    result = compare(paths, tmp_path / "out", check=False, progress=False)
    assert row(result, "network evaluations")["cells"][:3] == ["1", "1", "1"]
    assert all(cell.endswith(("ms", "s")) for cell in row(result, "time per sample")["cells"][:3])
    assert row(result, "Fréchet")["best"] == 1
    assert "cgan: likelihood not defined for this family." in result["notes"]
    rendered = []
    model = folder.load(paths[2])
    render = model.network.render
    model.network.render = lambda w, noise: rendered.append(len(w)) or render(w, noise)
    images(model, ["disc", "cross"], seed=1)
    assert verb.evaluations(model) == sum(rendered) / 2


@pytest.mark.parametrize(("change", "said"), [
    ({"seed": 2}, r"seed \(1 and 2\)"),
    ({"classes": ("bar", "dot")}, "checksums of their sources"),
])
def test_other_data_are_refused_and_named(runs, tmp_path, change, said):
    other = judged.write(tmp_path / "other/model", "unet", **change)
    with pytest.raises(UserError, match=f"cannot be compared, because they differ in .*{said}.*: train both"):
        compare([runs[0], other], tmp_path / "out", check=False)
    assert not (tmp_path / "out").exists()


def test_another_size_or_medium_is_refused(made, texts, tmp_path):
    one = verb._entry(made[0], "one")
    small = one.recipe.table()
    small["data"]["size"] = [8, 8]
    other = one._replace(recipe=recipe.parse(small), receipt=one.receipt | {"training": {}})
    assert comparing.apart(one, other) == "data.size ([16, 16] and [8, 8])"
    with pytest.raises(UserError, match=r"medium \(image and text\)"):
        compare([made[0], texts[0]], tmp_path / "out")


def test_the_same_data_prepared_elsewhere_compare(runs, tmp_path):
    other = judged.write(tmp_path / "moved/model", "unet")  # other paths and times, equal files
    judged.check(other)
    facts = folder.read_receipt(other)["training"]
    assert facts["fingerprint"] != folder.read_receipt(runs[0])["training"]["fingerprint"]
    assert compare([runs[0], other], tmp_path / "out", check=False, progress=False)["models"] == ["asked", "model"]


def test_one_folder_is_refused(runs, tmp_path):
    for paths in ([], runs[:1], [runs[0], runs[0]], [runs[0], runs[1], runs[0].parent / "x/../asked"]):
        with pytest.raises(UserError, match="two or more different model folders"):
            compare(paths, tmp_path / "out")


@pytest.mark.parametrize(("change", "said"), [
    ({"weights": "0" * 64}, "has a check of other weights: run `handmill check [^ ]*unet` first"),
    ({}, "is not checked: run `handmill check [^ ]*unet` first"),
    ({"settings": {"samples": 64, "images": 500, "importance": 64, "neighbours": 5, "inception": ""}},
     "checked with samples = 64, not 2000"),
    ({"fidelity": {"network": "cnn64-ffffffff"}}, "checked in the features cnn64-ffffffff, not cnn64-0a1b2c3d"),
])
def test_a_check_that_cannot_stand_beside_is_refused(runs, tmp_path, change, said):
    check = folder.read_receipt(runs[1])["check"]
    folder.record(runs[1], "check", check | change if change else {})
    with pytest.raises(UserError, match=said):
        compare(runs, tmp_path / "out", check=False)


def test_what_is_stale_is_checked_with_the_settings_of_the_first(runs, tmp_path, monkeypatch, capsys):
    judged.check(runs[0], settings={"samples": 64, "neighbours": 3})
    asked = []

    def check(path, progress, **wanted):
        asked.append((path.name, wanted))
        judged.check(path, settings=wanted)

    monkeypatch.setattr(verb.checking, "check", check)
    result = compare(runs, tmp_path / "out")
    assert asked == [(name, {"samples": 64, "importance": 64, "neighbours": 3})
                     for name in ("unet", "latents")]
    said = capsys.readouterr().out
    assert "unet is checked with samples = 2000, not 64: handmill check" in said
    assert "samples=64 neighbours=3" in said
    assert row(result, "coverage")["figures"][2]["n"] == 500
    monkeypatch.setattr(verb.checking, "check", lambda path, progress, **wanted: None)
    folder.record(runs[2], "check", {})
    with pytest.raises(UserError, match="after a new check too"):
        compare(runs, tmp_path / "out", progress=False)


def test_an_autoencoder_inside_is_counted(made):
    entry = verb._entry(made[2], "latents")._replace(codec={"parameters": 77, "seconds": {"train": 30.0}, "steps": 9})
    rows = comparing._cost([entry])
    assert [line.cells[0] for line in rows] == ["54,321 + 77 (codec)", "1 min 02 s + 30 s (codec)", "100 + 9 (codec)"]


def test_texts_of_different_tokenizers_stand_side_by_side(texts, tmp_path):
    result = compare(texts, tmp_path / "out", progress=False)
    checks = [folder.read_receipt(path)["check"] for path in texts]
    assert result["columns"] == ["byte", "character", "trigram model", "xz", "xz after training text"]
    bits = row(result, "bits per character")
    found = [check["likelihood"]["bits_per_character"] for check in checks]
    assert [cell.removesuffix(" (best)") for cell in bits["cells"][:2]] == [*map(shown, found)]
    assert bits["cells"][2] == shown(checks[0]["baselines"]["trigram"]["bits_per_character"])
    apart = [i for i in range(2) if found[i]["high"] < found[1 - i]["low"]]
    assert bits["best"] == (apart[0] if apart else None)
    assert row(result, "perplexity")["best"] is None
    assert "not comparable" in row(result, "perplexity")["what"]
    assert row(result, "copied, 16")["cells"][0] == percent(checks[0]["copying"]["lengths"]["16"]["generated"])
    assert row(result, "verdict")["cells"][:2] == [check["verdict"]["text"] for check in checks]
    assert colour(tmp_path / "out/compare.png", comparing_picture._MODEL) > 100
    assert colour(tmp_path / "out/compare.png", comparing_picture._REFERENCE) > 100
    again = compare(texts, tmp_path / "out", check=False, progress=False)  # the checks are in the receipts now
    assert again["rows"] == result["rows"]


def test_other_amounts_of_text_and_unknown_characters_are_told(texts, tmp_path):
    compare(texts, tmp_path / "out", progress=False)
    entries = [verb._entry(path, path.name) for path in texts]
    entries[1].check["held_out"] |= {"documents": 3, "unknown_characters": 12}
    notes = " ".join(comparing.compare(entries)["notes"])
    assert "character 3 (" in notes
    assert "tokens=0` reads all" in notes
    assert "character does not know 12 of these characters" in notes


def test_a_wide_table_is_cut_in_parts_for_the_screen(monkeypatch):
    rows = [{"what": "figure", "cells": [f"{i}" * 40 for i in range(5)]}, {"what": "verdict", "cells": ["good"] * 5}]
    result = {"models": list("abcde"), "columns": list("abcde"), "rows": rows, "notes": ["note"]}
    monkeypatch.setenv("COLUMNS", "100")
    told = lines(result)
    assert max(map(len, told)) <= 100
    assert sum(line.startswith("figure") for line in told) == 3
    assert all(any(f"{i}" * 40 in line for line in told) for i in range(5))
    monkeypatch.setenv("COLUMNS", "20")
    assert sum(line.startswith("figure") for line in lines(result)) == 5


def test_a_picture_without_figures_is_still_one(tmp_path):
    result = {"models": ["a", "b"], "columns": ["a", "b"], "rows": [{"what": "verdict", "cells": ["", ""]}]}
    comparing_picture.draw(result, {}, tmp_path / "empty.png")
    assert matplotlib.image.imread(tmp_path / "empty.png").std() > 0


def test_models_of_one_name_are_numbered(tmp_path):
    assert verb._names([tmp_path / "a/vae", tmp_path / "b/vae", tmp_path / "b/gpt"]) == ["vae (1)", "vae (2)", "gpt"]


def test_results_are_plain(runs, tmp_path):
    json.dumps(compare(runs, tmp_path / "out", check=False, progress=False))
