"""Recipes: round trips, overrides, and a sentence for every mistake."""

from pathlib import Path

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from handmill import recipe as recipes
from handmill.errors import UserError
from handmill.verbs.new import new


@pytest.mark.parametrize("name", recipes.shipped_names())
def test_shipped_recipes_read_and_round_trip(name: str, tmp_path: Path) -> None:
    recipe = recipes.read(name, ["data.paths=['x']"])
    assert recipe.name == name
    assert recipes.parse(recipe.table()) == recipe
    (tmp_path / "again.toml").write_text(tomli_w.dumps(recipe.table()))
    assert recipes.read(tmp_path / "again.toml") == recipe


@settings(deadline=None)
@given(steps=st.integers(1, 10**9), rate=st.floats(1e-9, 10.0), name=st.text("abcXYZ é-_08東", min_size=1, max_size=20))
def test_any_values_round_trip(steps: int, rate: float, name: str) -> None:
    table = recipes.read("gpt").table()
    table["name"] = name
    table["training"] |= {"steps": steps, "learning_rate": rate}
    recipe = recipes.parse(table)
    assert recipes.parse(recipe.table()) == recipe
    assert (recipe.name, recipe.training.steps, recipe.training.learning_rate) == (name, steps, rate)


def test_overrides() -> None:
    recipe = recipes.read("gpt", ["training.steps=7", "data.paths=['a', 'b']", "name=plain words", "training.ema=1"])
    assert recipe.training.steps == 7
    assert recipe.data.paths == ("a", "b")
    assert recipe.name == "plain words"
    assert recipe.training.ema == 1.0


@pytest.mark.parametrize(("line", "said"), [
    ("stesp = 5", r"line 2: unknown key training\.stesp, did you mean training\.steps\?"),
    ("steps = 1.5", r"line 2: training\.steps = 1\.5 must be a whole number"),
    ("learning_rate = '1e-4'", r"training\.learning_rate = '1e-4' must be a number"),
    ("betas = [0.9]", r"training\.betas = \[0\.9\] must have 2 values"),
    ("optimizer = 'mion'", r"training\.optimizer = 'mion' is not known: did you mean 'muon'"),
    ("batch = 10\nmicro_batch = 3", r"cannot be cut into micro-batches of 3"),
    ("steps = 0", r"steps = 0 must be above 0"),
    ("ema = 1.5", r"ema = 1\.5 must lie between 0 and 1"),
    ("steps = ", r"is not valid TOML: .*line 2"),
])
def test_mistakes_name_the_line_and_the_remedy(tmp_path: Path, line: str, said: str) -> None:
    table = recipes.read("gpt").table()
    del table["training"]
    file = tmp_path / "my.toml"
    file.write_text(f"[training]\n{line}\n")
    head = {k: v for k, v in table.items() if not isinstance(v, dict)}
    rest = {k: v for k, v in table.items() if isinstance(v, dict)}
    text = file.read_text() + tomli_w.dumps(rest)
    file.write_text(text)
    overrides = [f"{k}={v!r}" for k, v in head.items()]
    with pytest.raises(UserError, match=said) as caught:
        recipes.read(file, overrides)
    assert "my.toml" in str(caught.value)


@pytest.mark.parametrize(("override", "said"), [
    ("network.kind='decodr'", "did you mean 'decoder'"),
    ("medium='texts'", "did you mean 'text'"),
    ("network=5", r"needs a table \[network\]"),
    ("network.heads=5", "not divisible by heads = 5"),
    ("network.kv_heads=4", "not divisible by kv_heads = 4"),
    ("colour='red'", "unknown key colour"),
    ("steps", "is not an override"),
    ("name.x=3", "name is not a table"),
])
def test_overrides_that_cannot_be(override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        recipes.read("gpt", [override])


def test_a_bad_override_does_not_blame_a_line_of_the_file() -> None:
    for override in ("training.steps='many'", "nope=1", "training.stepz=1"):
        with pytest.raises(UserError) as caught:
            recipes.read("gpt", [override])
        assert ", line" not in str(caught.value)


def test_a_recipe_that_is_not_there() -> None:
    with pytest.raises(UserError, match="did you mean 'gpt2'"):
        recipes.read("gtp2")
    with pytest.raises(UserError, match="the shipped ones are autoencoder, cgan, character"):
        recipes.read("some/where.toml")


def test_new_keeps_the_comments(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    out = new("gpt", [str(tmp_path / "notes")], tmp_path / "mine.toml")
    text = out.read_text()
    assert text.count("#") == (recipes.SHIPPED / "gpt.toml").read_text().count("#")
    recipe = recipes.read(out)
    assert recipe.name == "mine"
    assert recipe.data.paths == (str(tmp_path / "notes"),)
    with pytest.raises(UserError, match="exists already"):
        new("gpt", [], out)
    with pytest.raises(UserError, match="does not exist"):
        new("gpt", [str(tmp_path / "nowhere")], tmp_path / "other.toml")


@pytest.mark.parametrize("override", [
    "training.micro_batch=-1", "training.betas=[0.9, 1.5]", "training.betas=[-0.1, 0.95]", "training.learning_rate=inf",
    "training.weight_decay=-0.1", "training.evaluate_items=-5", "training.sample_every=-1", "training.clip=nan",
    "network.kv_heads=-2", "network.hidden=-4", "name='../elsewhere'", "name=''",
])
def test_values_that_cannot_be_are_refused_before_anything_runs(override: str) -> None:
    with pytest.raises(UserError, match=override.split("=")[0].split(".")[-1]):
        recipes.read("gpt", [override])
