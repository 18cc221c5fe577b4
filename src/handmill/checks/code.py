"""Models of code: how often a Python function that they complete, or whose gap they fill, parses and compiles.

Held-out functions are given to the model where they stand in their file, up to the end of their docstring, or with some
of their lines missing. Nothing is ever run: `compile` alone sees the texts, and only short ones. Syntax says nothing of
sense (`pass` is a correct body), so each share stands beside those of the real text and of lines put together without
any knowledge.

A completion ends where Python ends the block: before the first line that is indented no further than `def`, comments
and blank lines aside, outside of brackets, strings and lines that a backslash continues. One that runs on until the
sampler stops it is taken as it is, and one that adds no statement to the docstring counts as failed.
"""

import ast
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np

from handmill.checks.intervals import Figure, difference, wilson
from handmill.checks.tables import Row, aligned, percent
from handmill.data.order import draw, permute
from handmill.errors import UserError

LIMIT = 8_000  # characters that are compiled: within it nesting of any kind ends in an error, soon and without a crash
AROUND = 4_000  # characters of the file that are shown on either side, at most
DOCUMENT = 200_000  # characters of a held-out document, which is the user's own, at most
MODEL, REAL, SHUFFLED = "this model", "the real text", "its lines shuffled"  # rows of the tables
NOTHING, ANOTHER = "nothing", "another's lines"
_FAILURES = (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError)  # ValueError: a NUL, half a surrogate
_LEXEME = re.compile(r'''(?P<skipped>\#[^\n]* | \\\n | ("""|\'\'\')(?:\\.|[^\\])*?(?:\2|\Z)
                                    | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*')
                       | (?P<open>[(\[{]) | (?P<close>[)\]}]) | (?P<line>\n(?=[^\s\#]))''', re.DOTALL | re.VERBOSE)

Complete = Callable[[list[str]], list[str]]  # prompts -> what follows each
Fill = Callable[[list[tuple[str, str]]], list[str]]  # texts before and after -> what stands between each two


class Function(NamedTuple):
    """A function of a held-out document; `head` and `body` are without the indentation of its `def`."""

    document: int
    head: str  # from `def` to the end of the docstring, or to the line before the first statement
    body: str  # the lines after that
    documented: bool
    indent: str = ""  # of its `def`
    above: str = ""  # of the document
    below: str = ""


class Syntax(NamedTuple):
    """What Python makes of a text."""

    parses: bool
    compiles: bool
    statements: int  # in the body of the function that the text begins with


class Gap(NamedTuple):
    """The lines of a function, some of which are taken out."""

    before: str
    middle: str
    after: str


def run(documents: Sequence[str], count: int, longest: int, seed: int, complete: Complete,
        fill: Fill | None = None) -> dict[str, Any]:
    """Shares of `count` functions of at most `longest` characters that parse and compile, with Wilson's intervals.

    `fill` is None for a model that was not taught to fill in the middle.
    Raises UserError where the documents hold no such function.
    """
    found = functions(documents, count, longest, seed)
    if not found:
        raise UserError(f"the held-out text holds no Python function of at most {longest} characters: "
                        "train on Python files, with data.document = 'file'")
    about = {"functions": len(found), "documents": len({function.document for function in found}), "longest": longest}
    parts = {"completion": completion(found, complete, seed)}
    return about | parts | ({"middle": middle(found, fill, seed)} if fill else {})


def completion(found: Sequence[Function], complete: Complete, seed: int) -> dict[str, Any]:
    """Functions continued from signature and docstring, beside their real bodies and those with their lines shuffled.

    Row -> "parses", "compiles", and for the model "ends": how many came to the end of their block by themselves.
    """
    made = complete([prompt(function) for function in found])
    assert len(made) == len(found), (len(made), len(found))
    made = [outdented(text, function.indent) for function, text in zip(found, made, strict=True)]
    shuffled = [_shuffled(function.body, draw(seed, "lines", i)) for i, function in enumerate(found)]
    rows = ((MODEL, made), (REAL, [function.body for function in found]), (SHUFFLED, shuffled))
    shares: dict[str, Any] = {name: _continued(found, texts) for name, texts in rows}
    shares[MODEL]["ends"] = _share([block(text[:LIMIT])[1] for text in made])
    return shares


def middle(found: Sequence[Function], fill: Fill, seed: int) -> dict[str, Any]:
    """Functions whose gap is filled, beside the real lines, none at all, and the lines of another function's gap.

    Row -> "parses", "compiles", and for the model "exact": how many are the real lines but for white space at the end.
    """
    gaps = [gap(function, draw(seed, "gap", i)) for i, function in enumerate(found)]
    made, real = fill([around(*pair) for pair in zip(found, gaps, strict=True)]), [lines for _, lines, _ in gaps]
    assert len(made) == len(found), (len(made), len(found))
    made = [outdented(text, function.indent) for function, text in zip(found, made, strict=True)]
    rows = ((MODEL, made), (REAL, real), (NOTHING, [""] * len(gaps)), (ANOTHER, real[1:] + real[:1]))
    shares = {name: _shares([syntax(before + text + after)
                             for (before, _, after), text in zip(gaps, texts, strict=True)]) for name, texts in rows}
    shares[MODEL]["exact"] = _share([a.rstrip() == b.rstrip() for a, b in zip(made, real, strict=True)])
    return shares


def functions(documents: Sequence[str], count: int, longest: int, seed: int) -> list[Function]:
    """At most `count` functions of at most `longest` characters, in an order that depends on the seed.

    One of each document comes before a second of any, so that they depend on each other as little as can be.
    What a document says twice counts once; one that is not Python has none.
    """
    each: list[list[Function]] = []
    for number in permute(np.arange(len(documents)), max(1, len(documents)), draw(seed, "documents")).tolist():
        if len(each) == count:
            break
        some = [function for function in _functions(documents[number], number)
                if len(function.head + function.body) <= min(longest, LIMIT)]
        order = permute(np.arange(len(some)), max(1, len(some)), draw(seed, "functions", number))
        each += [[some[i] for i in order]] if some else []
    once = {function[:3]: function for turn in zip_longest(*each) for function in turn if function}
    return list(once.values())[:count]


def prompt(function: Function) -> str:
    """The document up to where the body begins, or the last of it."""
    return (function.above + indented(function.head, function.indent))[-AROUND:]


def around(function: Function, lines: Gap) -> tuple[str, str]:
    """The document before and after a gap, as far as it is shown."""
    return ((function.above + indented(lines.before, function.indent))[-AROUND:],
            (indented(lines.after, function.indent) + function.below)[:AROUND])


def indented(text: str, indent: str) -> str:
    """Its lines that are not blank, further in."""
    return "".join(indent * bool(line.strip()) + line for line in text.splitlines(keepends=True))


def outdented(text: str, indent: str) -> str:
    """Its lines further out; one that is not so far in begins at the margin."""
    return "".join(line.removeprefix(indent) if line.startswith(indent) else line.lstrip(" \t")
                   for line in text.splitlines(keepends=True))


def block(text: str) -> tuple[str, bool]:
    """What of a text, which goes on after a function's head, belongs to its block, and whether the block ends in it."""
    depth = 0
    for lexeme in _LEXEME.finditer("\n" + text):
        depth = max(0, depth + (lexeme.lastgroup == "open") - (lexeme.lastgroup == "close"))
        if lexeme.lastgroup == "line" and not depth:
            return text[:lexeme.start()], True
    return text, False


def gap(function: Function, key: int) -> Gap:
    """A function without some lines in a row of its body: where they begin, and then how many, is equally likely."""
    lines = _lines(function.body)
    a = draw(key, "begin") % len(lines)
    b = a + 1 + draw(key, "end") % (len(lines) - a)
    return Gap(function.head + "".join(lines[:a]), "".join(lines[a:b]), "".join(lines[b:]))


def syntax(text: str) -> Syntax:
    """Whether a text is Python by its grammar, and by the compiler's rules as well; it is never run."""
    if len(text) > LIMIT:
        return Syntax(False, False, 0)
    tree = _quietly(lambda: ast.parse(text))
    if tree is None:
        return Syntax(False, False, 0)
    first = tree.body[0] if tree.body else None
    statements = len(first.body) if isinstance(first, ast.FunctionDef | ast.AsyncFunctionDef) else 0
    code = _quietly(lambda: compile(text, "<text>", "exec", dont_inherit=True))
    return Syntax(True, code is not None, statements)


def _quietly(read: Callable[[], Any]) -> Any:
    """What Python makes of a text, or None. An invalid escape is a warning only, which some have made an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return read()
        except _FAILURES:
            return None


def tables(result: dict[str, Any]) -> list[list[Row]]:
    """A table for each way to write code, its header first."""
    titles = {"completion": "signature and docstring completed", "middle": "lines in the middle filled in"}
    return [[(title, "parses", "compiles"),
             *((name, percent(row["parses"]), percent(row["compiles"])) for name, row in result[part].items())]
            for part, title in titles.items() if part in result]


def heading(result: dict[str, Any]) -> str:
    """Which functions were taken."""
    return (f"{result['functions']:,} Python functions of {result['documents']:,} held-out documents, "
            f"of at most {result['longest']:,} characters; none was run")


def lines(result: dict[str, Any]) -> list[str]:
    """What the screen shows of `run`."""
    shown = [heading(result)]
    for table in tables(result):
        shown += ["", *aligned(table)]
    return [*shown, "", *remarks(result)]


def remarks(result: dict[str, Any]) -> list[str]:
    """What else was counted of the model's own text."""
    said = [f"came to the end of the function by itself: {percent(result['completion'][MODEL]['ends'])}"]
    if "middle" in result:
        said.append(f"filled a gap with the very lines that stood there: {percent(result['middle'][MODEL]['exact'])}")
    return said


def words(result: dict[str, Any]) -> list[str]:
    """What the verdict says: the shares that compile, and whether they are shown to lie above the highest floor."""
    said = [_above(result["completion"], {SHUFFLED: "with their real lines shuffled"},
                   "of the Python functions it completes compile")]
    if "middle" in result:
        floors = {NOTHING: "with the gap left empty", ANOTHER: "with another's lines in it"}
        said.append(_above(result["middle"], floors, "of those it fills a gap in compile"))
    return said


def _above(rows: dict[str, Any], floors: dict[str, str], what: str) -> str:
    shares = {name: Figure(**rows[name]["compiles"]) for name in (MODEL, *floors)}
    floor = max(floors, key=lambda name: shares[name].value)
    apart = difference(shares[MODEL], shares[floor]).low
    return (f"{shares[MODEL].value:.1%} {what}, {'more' if apart and apart > 0 else 'not shown to be more'} than the "
            f"{shares[floor].value:.1%} {floors[floor]}")


def _continued(found: Sequence[Function], texts: Sequence[str]) -> dict[str, Any]:
    made = [syntax(function.head + block(text[:LIMIT])[0]) for function, text in zip(found, texts, strict=True)]
    return _shares([each if each.statements > function.documented else Syntax(False, False, 0)
                    for each, function in zip(made, found, strict=True)])


def _shares(made: Sequence[Syntax]) -> dict[str, Any]:
    return {"parses": _share([s.parses for s in made]), "compiles": _share([s.compiles for s in made])}


def _share(hits: Sequence[bool]) -> dict[str, Any]:
    low, high = wilson(sum(hits), len(hits))
    return Figure(sum(hits) / len(hits), low, high, len(hits), "Wilson 1927 for functions").plain()


def _shuffled(text: str, key: int) -> str:
    lines = _lines(text)
    return "".join(lines[i] for i in permute(np.arange(len(lines)), len(lines), key))


def _lines(text: str) -> list[str]:
    """With their ends. Not splitlines: a form feed ends no line of Python."""
    return re.findall(r".*\n", text)


def _functions(text: str, document: int) -> Iterator[Function]:
    """The functions of modules and classes. Those within functions are left out: they may use names around them."""
    text = text.replace("\r\n", "\n").replace("\r", "\n") + "\n"
    tree = _quietly(lambda: ast.parse(text)) if len(text) <= DOCUMENT else None
    lines = _lines(text)
    for node in _definitions(tree) if tree else ():
        function = _function(node, lines, document)
        if function:
            yield function


def _definitions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        elif isinstance(child, ast.stmt):
            yield from _definitions(child)


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str], document: int) -> Function | None:
    """A function in its parts, or None where its body shares a line with the head, or is a docstring and no more."""
    documented = ast.get_docstring(node, clean=False) is not None
    rest = node.body[documented:]
    if not rest or not lines[rest[0].lineno - 1][:rest[0].col_offset].isspace():
        return None
    first = min([rest[0].lineno, *(each.lineno for each in getattr(rest[0], "decorator_list", ()))])
    split = node.body[0].end_lineno if documented else first - 1
    indent = lines[node.lineno - 1][:node.col_offset]
    head, body = ("".join(line.removeprefix(indent) for line in part)
                  for part in (lines[node.lineno - 1:split], lines[split:node.end_lineno]))
    above, below = "".join(lines[:node.lineno - 1]), "".join(lines[node.end_lineno:])
    return Function(document, head, body, documented, indent, above, below)
