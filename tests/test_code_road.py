"""Models of code on the road: the shipped recipe, what is known of its sources, the check, filling in the middle."""

import json
import re
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_code

from handmill import folder
from handmill import recipe as recipes
from handmill.card import sections
from handmill.checks import code, lines
from handmill.checks import text as checks
from handmill.checks.intervals import Figure, wilson
from handmill.data.ingest import ingest
from handmill.data.middle import NAMES, assembled, marks
from handmill.data.sources import STDLIB, find
from handmill.errors import UserError
from handmill.families import autoregressive, filling
from handmill.families.autoregressive import Piece, Sampling
from handmill.page import Table
from handmill.verbs.check import check
from handmill.verbs.fill import fill
from handmill.verbs.new import new
from handmill.verbs.train import train

TOP = Path(sysconfig.get_path("stdlib"))
MODULES = ("ast", "bisect", "calendar", "cmd", "copy", "csv", "dis", "fnmatch", "glob", "graphlib", "heapq", "queue",
           "sched", "shlex", "string", "textwrap")
SMALL = ("training.steps=20", "training.batch=4", "training.evaluate_every=20", "training.sample_every=0",
         "training.precision=fp32", "network.layers=1", "network.width=48", "network.heads=2", "network.context=96",
         "codec.vocabulary=400", "data.test=0.3", "check.samples=2", "check.sample_tokens=20", "check.functions=8",
         "check.function_tokens=24")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe as it is shipped, shrunk to seconds, on a small standard library; checked."""
    home = tmp_path_factory.mktemp("code")
    (home / "library").mkdir()
    for name in MODULES:
        shutil.copy(TOP / f"{name}.py", home / "library")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sysconfig, "get_path", lambda _name: str(home / "library"))
        path = train("code", home / "model", SMALL, quiet=True)
    check(path, progress=False)
    return path


# the recipe and its sources

def test_new_points_the_recipe_at_other_files_and_their_licence(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    shipped = recipes.read("code").data
    assert (shipped.paths, shipped.licence) == ((STDLIB,), "PSF-2.0")
    for name, files, licence in (("a", [], "PSF-2.0"), ("b", [str(tmp_path / "src")], "unknown"),
                                 ("c", [STDLIB], "PSF-2.0"), ("d", [STDLIB, str(tmp_path / "src")], "unknown")):
        recipe = recipes.read(new("code", files, tmp_path / f"{name}.toml"))
        assert (recipe.data.paths, recipe.data.licence) == (tuple(files or [STDLIB]), licence)
        assert recipe.objective.middle == 0.5
        assert recipe.codec.special == NAMES
    made = recipes.read(new("gpt", [STDLIB], tmp_path / "e.toml"))
    assert (made.data.paths, made.data.licence) == ((STDLIB,), "PSF-2.0")


def test_each_source_has_its_own_licence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("library", "mine", "work"):
        (tmp_path / name).mkdir()
    (tmp_path / "library" / "a.py").write_text("def a():\n    return 1\n")
    (tmp_path / "mine" / "b.py").write_text("def b():\n    return 2\n")
    (tmp_path / "mine" / "LICENSE").write_text("Do what you like.\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda _name: str(tmp_path / "library"))
    data = recipes.read("code", ["data.licence='MIT'"]).data
    found = find((STDLIB, str(tmp_path / "mine")), tmp_path / "runs")
    _, notes = ingest(found, data, tmp_path / "work", lambda _: None)
    entries = {Path(entry["path"]).name: entry for entry in notes.manifest}
    assert entries["a.py"]["path"] == f"{STDLIB}/a.py"
    assert (entries["a.py"]["licence"], entries["b.py"]["licence"]) == ("PSF-2.0", "MIT")
    assert "licence_file" not in entries["a.py"]
    assert entries["b.py"]["licence_file"].endswith("mine/LICENSE")


def test_the_manifest_of_a_model_of_the_library(trained: Path) -> None:
    manifest = json.loads((trained / "data" / "manifest.json").read_text())
    assert {source["licence"] for source in manifest["sources"]} == {"PSF-2.0"} == {manifest["licence"]}
    assert f"{STDLIB}/bisect.py" in {source["path"] for source in manifest["sources"]}


# the check

def test_the_check_tells_what_parses_and_compiles(trained: Path) -> None:
    result = folder.read_receipt(trained)["check"]
    found = result["code"]
    assert found["functions"] == 8
    assert {"completion", "middle"} <= set(found)
    for part in ("completion", "middle"):
        assert found[part][code.REAL]["compiles"]["value"] == 1
        assert 0 <= found[part][code.MODEL]["compiles"]["value"] <= found[part][code.MODEL]["parses"]["value"]
    told = "\n".join(lines(result))
    assert "signature and docstring completed  parses" in told
    assert "filled a gap with the very lines" in told
    assert re.search(r"% of the Python functions it completes compile, not shown to be more than the .*shuffled",
                     result["verdict"]["text"])
    assert checks.verdict(result) == result["verdict"]


def test_the_card_shows_them(trained: Path) -> None:
    shown = {section.title: section for section in sections(trained, folder.read_receipt(trained))}
    tables = [block for block in shown["Python that it writes"].blocks if isinstance(block, Table)]
    assert [table.rows[0][0] for table in tables] == ["signature and docstring completed",
                                                      "lines in the middle filled in"]
    assert tables[0].rows[1][0] == code.MODEL


def test_without_functions_nothing_is_said_of_code(trained: Path) -> None:
    model = folder.load(trained)
    result = checks.run(model, recipes.build(checks.Settings, {"samples": 0, "tokens": 2000}, "check"), progress=False)
    assert "code" not in result
    assert "Python" not in "\n".join(lines(result))


def test_text_without_functions_is_said_and_not_an_error(trained: Path) -> None:
    model = folder.load(trained)
    settings = recipes.build(checks.Settings, {"samples": 0, "tokens": 2000, "functions": 3, "function_characters": 1},
                             "check")
    result = checks.run(model, settings, progress=False)
    assert result["code"]["missing"].startswith("not measured: the held-out text holds no Python function of at most 1")
    assert "code not measured" in result["verdict"]["text"]
    assert "Python functions: not measured" in "\n".join(lines(result | {"medium": "text"}))


@pytest.mark.parametrize("wrong", [{"functions": -1}, {"function_characters": 0}, {"function_tokens": 0}])
def test_wrong_settings_are_named(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        recipes.build(checks.Settings, wrong, "check")


def test_what_a_model_that_writes_python_reaches(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are tokens that open no document and end with a head, gaps have marks; `pass` compiles after any."""
    sources = [(trained.parent / "library" / f"{name}.py").read_text() for name in MODULES]
    known = [(code.prompt(function), function.indent) for function in code.functions(sources, 10**6, 1200, 1)]
    heads: list[str] = []
    gaps: list[str] = []

    def writes(_network: Any, codec: Any, prompts: Any, sampling: Sampling, _seed: int, first: int) -> Iterator[Piece]:
        for i, prompt in enumerate(prompts):
            indent = ""
            if not isinstance(prompt, str) and marks(codec).middle in prompt:
                gaps.append(assembled(codec, prompt))
            elif not isinstance(prompt, str):
                heads.append(codec.decode(prompt))
                assert codec.end not in prompt
                indent = next(indent for text, indent in known if text.endswith(heads[-1]))
            assert sampling.max_tokens == (24 if heads else 20)
            yield Piece(i, f"{indent}    pass\nx = 1\n", 9, "stop")

    monkeypatch.setattr(autoregressive, "generate", writes)
    model = folder.load(trained)
    found = checks.run(model, model.recipe.check, progress=False)["code"]
    assert found["completion"][code.MODEL]["compiles"]["value"] == 1
    assert found["completion"][code.MODEL]["ends"]["value"] == 1
    assert found["middle"][code.MODEL]["exact"]["value"] == 0
    assert (len(heads), len(gaps)) == (8, 8)
    assert all(len(head) > 30 for head in heads)


def test_the_verdict_names_the_floors() -> None:
    def rows(model: int, **floors: int) -> dict[str, Any]:
        hits = {code.MODEL: model, code.REAL: 100} | floors
        return {name: {"compiles": Figure(k / 100, *wilson(k, 100), 100, "").plain()} for name, k in hits.items()}

    found = {"completion": rows(80, **{code.SHUFFLED: 40}), "middle": rows(50, **{code.NOTHING: 48, code.ANOTHER: 44})}
    assert code.words(found) == [
        "80.0% of the Python functions it completes compile, more than the 40.0% with their real lines shuffled",
        "50.0% of those it fills a gap in compile, not shown to be more than the 48.0% with the gap left empty"]
    found["middle"] = rows(70, **{code.NOTHING: 40, code.ANOTHER: 44})
    assert code.words(found)[1].endswith("compile, more than the 44.0% with another's lines in it")
    assert len(code.words({"completion": found["completion"]})) == 1


def test_a_later_check_without_the_training_text_keeps_the_rest(trained: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(trained, moved)
    before = folder.read_receipt(moved)["check"]
    after = check(moved, progress=False)
    assert after["carried"]["parts"] == ["trigram", "xz_trained", "copying"]
    assert after["code"] == before["code"]  # it needs no training text
    assert after["verdict"] == before["verdict"]


# filling

@pytest.mark.parametrize("codec", ["byte", "bpe", "character"])
@pytest.mark.parametrize("suffix_first", [0.0, 1.0])
def test_a_gap_is_filled_from_the_prompt_of_its_order(tmp_path: Path, codec: str, suffix_first: float) -> None:
    model = tiny_code.load(tmp_path / "model", codec, suffix_first=suffix_first)
    prompt = filling.prompt(model.recipe, model.codec, "The ", " fox", 12)
    prefix, suffix, middle = marks(model.codec)
    order = [token for token in prompt if token in (prefix, suffix, middle)]
    assert order == [prefix, suffix, middle]
    assert (prompt[prompt.index(prefix) + 1] == suffix) == (suffix_first == 1)
    assert assembled(model.codec, prompt) == "The  fox"
    made = "".join(piece.text for piece in autoregressive.generate(
        model.network, model.codec, [prompt], Sampling(max_tokens=12), 3))
    assert fill(model, "The ", " fox", 3, max_tokens=12) == made
    assert fill(model, "The ", " fox", 4, max_tokens=12) != made
    assert fill(model, "The ", " fox", 3, max_tokens=12, temperature=0.0) == fill(
        model, "The ", " fox", 9, max_tokens=12, temperature=0.0)


def test_long_texts_are_read_where_they_touch_the_gap(tmp_path: Path) -> None:
    model = tiny_code.load(tmp_path / "model")  # a context of 48 bytes
    before, after = "lost" * 90 + "kept", "seen" + "lost" * 90
    assert fill(model, before, after, 1) == fill(model, "other" * 80 + before[-100:], after, 1)
    assert len(fill(model, before, after, 1).encode()) <= 3 * 24  # half of the context, where nothing else is said
    with pytest.raises(UserError, match="leaves no room"):
        fill(model, before, after, 1, max_tokens=46)


def test_models_that_were_not_taught_say_so(tmp_path: Path) -> None:
    for number, model in enumerate((tiny.load(tmp_path / "plain"), tiny_code.load(tmp_path / "never", middle=0.0),
                                    tiny_code.load(tmp_path / "others", special=("<|a|>",)))):
        assert not filling.taught(model.recipe, model.codec), number
        with pytest.raises(UserError, match=r"was not taught to fill in the middle: .*codec\.special"):
            fill(model, "a", "b", 1)


@pytest.mark.slow
def test_a_model_learns_to_fill(tmp_path: Path) -> None:
    """Lines that say the same number before and after the gap, so that only who reads both sides knows the end."""
    settings = ["network.layers=2", "network.width=64", "network.heads=2", "network.context=64", "codec.kind=byte",
                "training.steps=300", "training.batch=32", "training.evaluate_every=300", "training.sample_every=0",
                "training.precision=fp32", "data.document=line", "data.near_duplicates=0", "objective.middle=0.9",
                "objective.suffix_first=0.5"]
    text = tmp_path / "lines.txt"
    text.write_text("".join(f"<{a}{b}|{a}{b}>\n" for a in "abcdefghijklmnopqrst" for b in "abcdefghijklmnopqrst"))
    recipe = tmp_path / "r.toml"
    source = (recipes.SHIPPED / "code.toml").read_text()
    recipe.write_text(re.sub(r"(?m)^vocabulary.*\n", "", source))
    model = folder.load(train(recipe, tmp_path / "model", [*settings, f"data.paths=['{text}']"], quiet=True))
    right = sum(fill(model, f"<{w}|", ">", 1, temperature=0.0, max_tokens=8) == w for w in ("ac", "kd", "sr", "ti"))
    right += sum(fill(model, "<", f"|{w}>", 1, temperature=0.0, max_tokens=8) == w for w in ("bb", "qd", "mr", "hi"))
    assert right >= 6
