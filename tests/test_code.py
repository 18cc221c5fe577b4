"""Code checks: what counts as Python, where a function ends, and what the baselines reach on the standard library."""

import ast
import sysconfig
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handmill.checks import code
from handmill.checks.code import LIMIT, MODEL, REAL, Function, Syntax, block, functions, gap, syntax
from handmill.checks.intervals import wilson
from handmill.data.sources import STDLIB, find
from handmill.errors import UserError

TOP = Path(sysconfig.get_path("stdlib"))
DOCUMENTS = [(TOP / f"{name}.py").read_text(encoding="utf-8")
             for name in ("ast", "bisect", "calendar", "csv", "heapq", "shutil", "string", "textwrap", "queue", "uuid")]
FOUND = functions(DOCUMENTS, 150, 1200, 1)
EXAMPLE = '''"""A module."""
import os

@decorated
def plain(a, b=(1,
                2)):
    """Says what it does.

    At length.
    """
    # a comment
    total = a
    return total


class C:
    async def method(self):
        text = """
at the margin
"""
        return text

    def bare(self): return 1

    def documented(self):
        """Nothing else."""

    def after(self):
        """Two on a line."""; self.x = 1


def outer():

    @cached
    def inner(): return 1
    return inner


if True:
    def guarded(x):
        x += 1
        return x
'''


@pytest.mark.parametrize(("text", "expected"), [
    ("def f():\n    return 1\n", Syntax(True, True, 1)),
    ("def f():\n    '''Said.'''\n    a = 1\n    return a\n", Syntax(True, True, 3)),
    ("async def f():\n    await g()\n", Syntax(True, True, 1)),
    ("x = 1\n", Syntax(True, True, 0)),
    ("", Syntax(True, True, 0)),
    ("return 1\n", Syntax(True, False, 0)),  # grammar, but no function around it
    ("def f(a, a):\n    pass\n", Syntax(True, False, 1)),
    ("def f():\n    break\n", Syntax(True, False, 1)),
    ("def f():\n    await g()\n", Syntax(True, False, 1)),
    ("def f():\n    nonlocal x\n", Syntax(True, False, 1)),
    ("def f(:\n    pass\n", Syntax(False, False, 0)),
    ("def f():\nreturn 1\n", Syntax(False, False, 0)),
    ("def f():\n    x = (1,\n", Syntax(False, False, 0)),
    ("def f():\n    x = '\n", Syntax(False, False, 0)),
    ("def f():\n\tif x:\n        pass\n", Syntax(False, False, 0)),
    ("def f():\n    return '\\d' is 'a'\n", Syntax(True, True, 1)),  # two warnings, no error
    ("raise SystemExit(__import__('os')._exit(3))\n", Syntax(True, True, 0)),  # nothing is run
    ("def f():\n    x: int = yield\n", Syntax(True, True, 1)),
])
def test_what_is_python(text: str, expected: Syntax) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert syntax(text) == expected


N = LIMIT - 20
HOSTILE = ["(" * N, "(" * (N // 2) + ")" * (N // 2), "{" * N, "-" * N + "1", "not " * (N // 4) + "1",
           "+".join(["a"] * (N // 2)), "a" + ".b" * (N // 2), "a" + "()" * (N // 2), "a[" * (N // 2),
           "lambda:" * (N // 7) + "1", "1 if 1 else " * (N // 12) + "1", "**".join(["a"] * (N // 3)),
           "{0:" * (N // 3), "f'{" * (N // 3), "([{" * (N // 3), "a\0b", "9" * N, "'a'*9999999*9999999", "9**9**9**9",
           "if 1: pass\n" + "elif 1: pass\n" * (N // 13), "".join(" " * i + "if 1:\n" for i in range(99)),
           "with " + "(" * (N // 2) + "a as b", "'" * N, '"""' + "\\" * N, "\ud800 = 1", "\f" * N, "#" * N]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_costs_little_and_breaks_nothing(text: str) -> None:
    began = time.process_time()
    for whole in (text, "def f():\n    x = " + text):
        assert isinstance(syntax(whole), Syntax)
        block(whole)
    assert time.process_time() - began < 3


def test_text_above_the_limit_is_not_read() -> None:
    assert syntax("x = 1\n" + "#" * LIMIT) == Syntax(False, False, 0)
    assert syntax("#" * LIMIT) == Syntax(True, True, 0)


@given(st.text(st.sampled_from("def f():\n \t()[]{}'\"\\#x=1,\0é")))
@settings(deadline=None, max_examples=300)
def test_any_text_is_judged(text: str) -> None:
    found = syntax(text)
    assert found.parses or not found.compiles
    kept, ended = block(text)
    assert text.startswith(kept)
    assert ended == (kept != text)
    assert block(kept) == (kept, False)


@pytest.mark.parametrize(("text", "kept"), [
    ("    return 1\n\n\ndef g():\n    pass\n", "    return 1\n\n\n"),
    ("    return 1\nx = 2\n", "    return 1\n"),
    ("    return 1\n", None),
    ("    x = '''\nat the margin\n'''\n    return x\nend\n", "    x = '''\nat the margin\n'''\n    return x\n"),
    ("    x = f(\n1,\n)\n    return x\n@end\n", "    x = f(\n1,\n)\n    return x\n"),
    ("    x = 1 + \\\n2\n    return x\nend\n", "    x = 1 + \\\n2\n    return x\n"),
    ("    x = '(' + \"[\"  # ({\n    return x\nend\n", "    x = '(' + \"[\"  # ({\n    return x\n"),
    ("    x = '\\'('\nend\n", "    x = '\\'('\n"),
    ("# a comment at the margin\n    return 1\nend", "# a comment at the margin\n    return 1\n"),
    ("    )\nend\n", "    )\n"),
    ("end\n", ""),
    ("    x = '''never closed\nend\n", None),
    ("    return f'''{x!r:>{width}}\n'''\nend", "    return f'''{x!r:>{width}}\n'''\n"),
])
def test_where_a_block_ends(text: str, kept: str | None) -> None:
    assert block(text) == ((text, False) if kept is None else (kept, True))


def test_functions_are_found_in_their_parts() -> None:
    found = {function.head.split("(")[0].split()[-1]: function for function in functions([EXAMPLE], 99, 1000, 1)}
    assert set(found) == {"plain", "method", "outer", "guarded"}  # neither nested nor on one line
    assert found["plain"][:4] == (
        0, 'def plain(a, b=(1,\n                2)):\n    """Says what it does.\n\n    At length.\n    """\n',
        "    # a comment\n    total = a\n    return total\n", True)
    assert found["method"].head == "async def method(self):\n"
    assert found["method"].body == '    text = """\nat the margin\n"""\n    return text\n'
    assert found["outer"].body == "    @cached\n    def inner(): return 1\n    return inner\n"
    assert found["guarded"].body == "    x += 1\n    return x\n"
    assert found["method"].indent == found["guarded"].indent == "    "
    assert code.prompt(found["method"]) == EXAMPLE[:EXAMPLE.index("        text = ")]
    lines = gap(found["guarded"], 0)._replace(before="def guarded(x):\n", after="    return x\n")
    before, after = code.around(found["guarded"], lines)
    assert before == EXAMPLE[:EXAMPLE.index("        x += 1")]
    assert before + "        x += 1\n" + after == EXAMPLE + "\n"


@given(st.text(st.sampled_from("ab \n")), st.sampled_from(["", "    ", "  "]))
def test_lines_come_out_as_they_went_in(text: str, indent: str) -> None:
    inside = code.indented(text, indent)
    assert [line for line in code.outdented(inside, indent).split("\n") if line.strip()] == [
        line for line in text.split("\n") if line.strip()]
    assert all(line.startswith(indent) for line in inside.split("\n") if line.strip())


def test_what_is_less_far_in_than_the_function_ends_it() -> None:
    made = code.outdented("        return 1\n\n    def other(self):\n        pass\n", "    ")
    assert block(made) == ("    return 1\n\n", True)


@pytest.mark.parametrize("function", FOUND)
def test_real_functions_are_whole_and_end_where_they_end(function: Function) -> None:
    assert syntax(function.head + function.body).parses
    tree = ast.parse(function.head + function.body)
    assert len(tree.body) == 1
    assert function.documented == bool(ast.get_docstring(tree.body[0], clean=False))  # type: ignore[arg-type]
    assert block(function.body + "def another():\n    pass\n") == (function.body, True)


def test_the_choice_of_functions_depends_on_the_seed_and_spreads_over_documents() -> None:
    assert functions(DOCUMENTS, 150, 1200, 1) == FOUND
    assert functions(DOCUMENTS, 150, 1200, 2) != FOUND
    assert functions(DOCUMENTS, 20, 1200, 1) == FOUND[:20]
    assert len({function.document for function in FOUND[:10]}) == 10
    assert len({function[:3] for function in FOUND}) == len(FOUND) == 150
    assert all(len(function.head + function.body) <= 1200 for function in FOUND)
    assert functions([], 5, 1200, 1) == functions(["not Python at all", "a\0b", ""], 5, 1200, 1) == []


@given(st.sampled_from(FOUND), st.integers(0, 2**62))
@settings(deadline=None)
def test_gaps_are_lines_of_the_function(function: Function, key: int) -> None:
    made = gap(function, key)
    assert "".join(made) == function.head + function.body
    assert made.middle.endswith("\n")
    assert made.before.startswith(function.head)


def test_gaps_begin_and_end_everywhere() -> None:
    function = Function(0, "def f():\n", "    a\n    b\n    c\n", False)
    assert len({gap(function, key) for key in range(200)}) == 6


def test_shares_stand_between_those_of_real_text_and_of_none() -> None:
    bodies = {code.prompt(function): code.indented(function.body, function.indent) for function in FOUND}
    half = iter(range(len(FOUND)))

    def complete(prompts: list[str]) -> list[str]:
        return [bodies[prompt] + "\nx = 1\n" if next(half) % 2 else " " * 12 + "return (\n" for prompt in prompts]

    result = code.run(DOCUMENTS, 150, 1200, 1, complete, lambda around: ["        pass\n"] * len(around))
    rows = result["completion"]
    assert (result["functions"], result["documents"]) == (150, 10)
    assert rows[REAL]["compiles"]["value"] == 1
    assert rows[MODEL]["compiles"]["value"] == rows[MODEL]["parses"]["value"] == 0.5
    assert (rows[MODEL]["compiles"]["low"], rows[MODEL]["compiles"]["high"]) == wilson(75, 150)
    assert rows[MODEL]["ends"]["value"] == 0.5
    assert rows["its lines shuffled"]["compiles"]["value"] < 0.8
    assert result["middle"][REAL]["compiles"]["value"] == 1
    assert result["middle"]["nothing"]["compiles"]["value"] < 0.8
    shown = "\n".join(code.lines(result))
    assert "50.00 % [42.1" in shown
    assert "lines in the middle filled in" in shown


def test_an_empty_completion_is_none_even_after_a_docstring() -> None:
    found = [function for function in FOUND if function.documented]
    assert len(found) > 20
    for text in ("", "\n\n", "    # a comment\n", "\ndef another():\n    return 1\n"):
        rows = code.completion(found, lambda prompts, text=text: [text] * len(prompts), 1)  # type: ignore[misc]
        assert rows[MODEL]["compiles"]["value"] == 0
    short = {code.prompt(function): f"{function.indent}    pass\n" for function in found}
    rows = code.completion(found, lambda prompts: [short[prompt] for prompt in prompts], 1)
    assert rows[MODEL]["compiles"]["value"] == 1


def test_text_without_functions_is_an_error() -> None:
    with pytest.raises(UserError, match="no Python function"):
        code.run(["Prose.", "x = 1\n"], 10, 1000, 1, lambda prompts: prompts)


def test_the_standard_library_is_a_source(tmp_path: Path) -> None:
    found = find((STDLIB,), tmp_path)
    names = {source.name for source in found}
    assert {f"{STDLIB}/ast.py", f"{STDLIB}/json/decoder.py"} <= names
    assert len(names) == len(found) > 300
    assert {source.licence for source in found} == {"PSF-2.0"}
    assert {source.suffix for source in found} == {".py"}
    assert not any(part in ("test", "tests", "site-packages") for name in names for part in name.split("/"))
    assert all(name.startswith(f"{STDLIB}/") for name in names)  # and not with where Python is installed


def test_a_python_without_its_sources_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "python3.zip"))
    with pytest.raises(UserError, match="python:stdlib"):
        find((STDLIB,), tmp_path)
