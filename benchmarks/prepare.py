"""Speed and memory of the data preparation on a made-up corpus with known duplicates.

    python benchmarks/prepare.py --sizes 10,1000 --codecs bpe

Words follow Zipf's law over 200,000 made-up ones, documents are 1 to 8 kB, in jsonl files and a few hundred txt
files. 2 % of the documents are exact copies of others and 2 % are near copies (1 % of the words replaced), so that
what is found can be counted. Every size and codec is prepared in a process of its own; a row for each is printed
and added to benchmarks/results/prepare.md.
"""

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "prepare.md"
HEADER = ("| date | machine | python, numpy | codec | corpus MB | seconds | MB/s | peak RSS MB | exact copies found "
          "| near copies found | wrongly removed |\n|" + " --- |" * 11 + "\n")
WORDS = 200_000
SHARD = 16_000_000  # bytes of a jsonl file


def vocabulary() -> np.ndarray:
    """Distinct words, the frequent ones short."""
    generator = random.Random(0)
    parts = [a + b for a in ("b", "ch", "d", "f", "g", "l", "m", "n", "pr", "s", "st", "t", "v", "w") for b in "aeiou"]
    words: dict[str, None] = {}
    while len(words) < WORDS:
        syllables = 1 + generator.randrange(2) if len(words) < 200 else generator.choice((2, 3, 3, 4))
        words["".join(generator.choices(parts, k=syllables)) + generator.choice(("", "", "n", "r", "s", "th"))] = None
    return np.array(list(words), dtype=object)


def texts(megabytes: float, seed: int) -> Iterator[list[str]]:
    """Batches of documents, each a list of words with sentence marks on them."""
    generator = np.random.default_rng(seed)
    words = vocabulary()
    cumulative = np.cumsum(1 / np.arange(1, WORDS + 1))
    left = megabytes * 1e6
    while left > 0:
        sizes = generator.integers(140, 1100, 200)  # words a document
        numbers = np.searchsorted(cumulative, generator.random(sizes.sum()) * cumulative[-1])
        chosen = words[numbers]
        marks = generator.integers(0, 14, len(chosen))
        chosen[marks == 0] += ",\n"
        chosen[marks == 1] += "."
        for part in np.split(chosen, np.cumsum(sizes)[:-1]):
            document = part.tolist()
            yield document
            left -= sum(map(len, document)) + len(document)


def planted(megabytes: float, seed: int, counts: dict[str, int]) -> Iterator[str]:
    """Documents with copies among them, each some hundred documents after what it copies."""
    generator = random.Random(seed)
    waiting: list[str] = []
    for number, words in enumerate(texts(megabytes, seed)):
        yield " ".join(words)
        if number % 50 == 0:
            waiting.append(" ".join(words))
            counts["exact"] += 1
        elif number % 50 == 25:
            copy = list(words)
            for place in generator.sample(range(len(copy)), max(1, len(copy) // 100)):
                copy[place] = "replaced"
            waiting.append(" ".join(copy))
            counts["near"] += 1
        if len(waiting) > 8:
            yield waiting.pop(0)
    yield from waiting


def make(folder: Path, megabytes: float, seed: int = 1) -> dict[str, int]:
    """Write the corpus; returns how many copies of each kind are in it."""
    counts = {"exact": 0, "near": 0, "documents": 0, "bytes": 0}
    shard, room = None, 0
    for number, document in enumerate(planted(megabytes, seed, counts)):
        counts["documents"] += 1
        counts["bytes"] += len(document)
        if number % 200 == 100 and number < 100_000:
            (folder / f"{number:07}.txt").write_text(document)
            continue
        if room <= 0:
            if shard:
                shard.close()
            shard, room = (folder / f"{number:07}.jsonl").open("w"), SHARD
        assert shard is not None
        room -= shard.write(json.dumps({"text": document}) + "\n")
    if shard:
        shard.close()
    return counts


def child(folder: str, cache: str, codec: str) -> None:
    """Prepare, and print seconds, bytes, peak memory and duplicates found as JSON."""
    began = time.perf_counter()
    from handmill.data.text_prepare import prepare
    from handmill.media import tokenizers
    from handmill.media.text import Data
    from handmill.recipe import Recipe, Training

    settings = {"bpe": tokenizers.BPESettings, "character": tokenizers.CharacterSettings,
                "byte": tokenizers.ByteSettings}[codec]()
    data = Data(paths=(folder,))
    recipe = Recipe("benchmark", "text", "autoregressive", 1, data, settings, None, None, Training(), None, None)
    packed = prepare(recipe, Path(cache), progress=sys.stderr.isatty())
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "peak": peak(), "duplicates": packed.report["duplicates"],
                      "tokens": packed.report["tokens"]}))


def peak() -> float:
    """Largest resident memory of this process in MB. The kernel's own mark where there is one: getrusage's begins
    with that of the process it was started from."""
    status = Path("/proc/self/status")
    if status.exists():
        marks = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(marks[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def row(codec: str, counts: dict[str, int], found: dict) -> str:
    megabytes, copies = counts["bytes"] / 1e6, found["duplicates"]
    wrong = copies["exact"] + copies["near"] - counts["exact"] - counts["near"]
    speed = f"{megabytes / found['seconds']:.2f}"
    cells = [time.strftime("%Y-%m-%d"), processor(), f"{platform.python_version()}, {np.__version__}", codec,
             f"{megabytes:.1f}", f"{found['seconds']:.2f}", speed, f"{found['peak']:.0f}",
             f"{copies['exact']} of {counts['exact']}", f"{copies['near']} of {counts['near']}", str(max(0, wrong))]
    return "| " + " | ".join(cells) + " |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="10,1000", help="MB, separated by commas")
    parser.add_argument("--codecs", default="bpe", help="bpe, character, byte, separated by commas")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    if not arguments.results.exists():
        arguments.results.write_text("# Data preparation\n\n" + HEADER)
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    print(HEADER, end="")
    for size in map(float, arguments.sizes.split(",")):
        with tempfile.TemporaryDirectory() as top:
            folder = Path(top) / "corpus"
            folder.mkdir()
            counts = make(folder, size)
            for codec in arguments.codecs.split(","):
                command = [sys.executable, __file__, "--child", str(folder), f"{top}/{codec}", codec]
                done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
                line = row(codec, counts, json.loads(done.stdout))
                print(line, end="", flush=True)
                with arguments.results.open("a") as file:
                    file.write(line)


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main()
