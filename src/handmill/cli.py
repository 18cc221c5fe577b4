"""The command line: one function a verb, thin. Errors of the user end in one sentence and exit code 2."""

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from handmill import __version__
from handmill.errors import UserError, is_out_of_memory


def temperatures(text: str) -> tuple[float, ...]:
    """Numbers with commas between them."""
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers: write for example 0.8,1,1,1") from None


LIBRARIES = 1000 << 20  # bytes of addresses that torch and what `train` loads take: measured, CPU build of torch 2.13
OVERRIDES = "recipe keys to override, for example training.steps=500"
SAMPLING: dict[str, tuple[Any, str]] = {  # option of generate -> its type and what it does
    "temperature": (float, "0: always the likeliest token"), "top_k": (int, "tokens to choose from"),
    "top_p": (float, "probability mass to choose from"),
    "min_p": (float, "least share of the likeliest token's probability"),
    "repetition_penalty": (float, "above 1: less repetition"), "max_tokens": (int, "new tokens a sample"),
    "steps": (int, "of a diffusion model: more are finer and slower; of music: a piece ends after so many"),
    "guidance": (float, "of a diffusion model: above 1, more like the class"),
    "sampler": (str, "of a diffusion model: ddpm, ddim, euler, heun, dpmpp_2m, unipc"),
    "truncation": (float, "of an adversarial model: below 1, nearer to the centre"),
    "voice_temperatures": (temperatures, "of music: 0.8,1 for a chord's notes from the highest down, the last for all "
                           "below")}
MEDIA = {  # option of generate -> the media that have it; one that is not here is of all
    "prompt_file": ("text",), "suffix": ("text",), "stop": ("text",), "out": ("image", "music"),
    "steps": ("image", "music"),
    "guidance": ("image",), "sampler": ("image",), "truncation": ("image",), "mixing": ("image",), "walk": ("image",),
    "project": ("image",), "fit": ("image",), "each": ("image",), "melody": ("music",), "beginning": ("music",),
    "soundfont": ("music",), "voice_temperatures": ("music",)}


def new(args: argparse.Namespace) -> None:
    from handmill import recipe as recipes
    from handmill.verbs.new import new

    if args.recipe is None:
        for name in recipes.shipped_names():
            print(f"{name:21s}{(recipes.SHIPPED / (name + '.toml')).read_text(encoding='utf-8').splitlines()[0][2:]}")
        return
    out = new(args.recipe, args.files, args.out or Path(f"{args.name or args.recipe}.toml"), args.name)
    print(f"wrote {out}; next: handmill train {out}")


def plan(args: argparse.Namespace) -> None:
    from handmill.training.plan import lines
    from handmill.verbs.plan import plan

    print("\n".join(lines(plan(args.recipe, args.out, args.overrides))))


def train(args: argparse.Namespace) -> None:
    from handmill.verbs.train import train

    train(args.recipe, args.out, args.overrides, quiet=args.quiet)


def check(args: argparse.Namespace) -> None:
    from handmill.checks import lines
    from handmill.verbs.check import check

    print("\n".join(lines(check(args.folder, True, **pairs(args.overrides)))))


def generate(args: argparse.Namespace) -> None:
    from handmill import folder
    from handmill.verbs.generate import generate, stream

    settings = pairs(args.set) | {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    settings |= {"seed": args.seed} | ({"stop": tuple(args.stop)} if args.stop else {})
    model = folder.load(args.folder)
    _fitting(args, model.recipe.medium)
    if model.recipe.medium != "text":
        return (_images if model.recipe.medium == "image" else _music)(args, model, settings)
    prompts = [p.read_text(encoding="utf-8") for p in args.prompt_file] + args.prompt or [""]
    prompts = [p for p in prompts for _ in range(args.n or 1)]
    if args.suffix:
        return _fill(model, prompts, args, settings)
    if len(prompts) == 1:
        print(prompts[0], end="", flush=True)
        for piece in stream(model, prompts[0], runtime=args.runtime, **settings):
            print(piece, end="", flush=True)
        print()
        return
    for i, text in enumerate(generate(model, prompts, runtime=args.runtime, **settings)):
        print(f"--- {i + 1}\n{prompts[i]}{text}")


def _fill(model: Any, prompts: Sequence[str], args: argparse.Namespace, settings: dict[str, Any]) -> None:
    from handmill.verbs.fill import fill
    from handmill.verbs.making import checked

    seed = checked(settings.pop("seed"))
    for i, prompt in enumerate(prompts):
        print(prompt + fill(model, prompt, args.suffix, seed + i, args.runtime, **settings) + args.suffix)


def _fitting(args: argparse.Namespace, medium: str) -> None:
    """Raise UserError for an option of generate that another medium has."""
    from handmill.verbs.generate import MADE

    for option, media in MEDIA.items():
        if getattr(args, option) and medium not in media:
            others = " and ".join(MADE[one] for one in media)
            raise UserError(f"--{option.replace('_', '-')} is for {others}, and {args.folder} makes {MADE[medium]}: "
                            "leave it out")


def _images(args: argparse.Namespace, model: Any, settings: dict[str, Any]) -> None:
    from handmill.families import tensors
    from handmill.verbs.generate import save_images

    if args.mixing or args.walk or args.project:
        _explore(args, model, settings)
        return
    classes = tensors.classes(model.recipe, model.codec) or ("",)
    prompts = [p for p in args.prompt for _ in range(args.n or 1)] or [
        classes[i % len(classes)] for i in range(args.n or 16)]
    out = args.out or args.folder / "samples"
    for path in save_images(model, prompts, out, runtime=args.runtime, **settings):
        print(path)


def _music(args: argparse.Namespace, model: Any, settings: dict[str, Any]) -> None:
    from handmill.verbs.compose import save_music, wish

    steps = settings.pop("steps", None)
    wishes = [wish(model, prompt, args.melody, args.beginning, steps) for prompt in args.prompt or [""]]
    wishes = [one for one in wishes for _ in range(args.n or 1)]
    for path in save_music(model, wishes, args.out or args.folder / "samples", runtime=args.runtime,
                           soundfont=args.soundfont, progress=True, **settings):
        print(path)


def _explore(args: argparse.Namespace, model: Any, settings: dict[str, Any]) -> None:
    from handmill.verbs import explore

    out = args.out or args.folder / "samples"
    if args.mixing:
        rows, columns = explore.matrix(args.mixing)
        print(explore.mixing(model, out, rows, columns, cut=args.cut, prompts=args.prompt, **settings))
    if args.walk:
        print(explore.walk(model, args.walk, args.prompt, args.stops, args.seconds, **settings))
    if args.project:
        found = explore.project(model, out, args.project, "".join(args.prompt[:1]), args.steps or 500, args.seed,
                                args.fit, args.each, progress=True)
        print(f"{found.picture}\n{found.weights}\nerror {found.error:.2f} of 255 levels, root mean square")


def export(args: argparse.Namespace) -> None:
    from handmill.verbs.export import export, lines

    result = export(args.folder, args.to)
    print(f"wrote {args.folder / 'exports' / args.to}")
    print("\n".join(lines(result)))


def serve(args: argparse.Namespace) -> None:
    from handmill.verbs.serve import serve

    serve(args.folders, args.host, args.port)


def card(args: argparse.Namespace) -> None:
    from handmill.verbs.card import card

    for path in card(args.folder):
        print(path)


def compare(args: argparse.Namespace) -> None:
    from handmill.verbs.compare import compare, lines

    print("\n".join(lines(compare(args.folders, args.out, check=not args.no_check))))


def demo(args: argparse.Namespace) -> None:
    from handmill.verbs.demo import demo

    demo(args.out)


def pairs(overrides: Sequence[str]) -> dict[str, Any]:
    """key=value words as keywords, each value read as TOML where it is TOML."""
    import tomllib

    result: dict[str, Any] = {}
    for word in overrides:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"{word!r} is not an override: write key=value, for example samples=8")
        try:
            result[key] = tomllib.loads(f"x = {value}")["x"]
        except tomllib.TOMLDecodeError:
            result[key] = value
    return result


def _new_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("recipe", nargs="?", help="a shipped recipe; leave out to list them")
    p.add_argument("files", nargs="*", help="files, folders or globs")
    p.add_argument("--out", type=Path, help="the file to write (default: RECIPE.toml)")
    p.add_argument("--name", help="the model's name; its folder is runs/NAME")


def _train_arguments(p: argparse.ArgumentParser) -> None:
    _recipe_arguments(p)
    p.add_argument("--quiet", action="store_true", help="print nothing")


def _check_arguments(p: argparse.ArgumentParser) -> None:
    _folder_argument(p)
    p.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the recipe's [check] table")


def _generate_arguments(p: argparse.ArgumentParser) -> None:
    _folder_argument(p)
    p.add_argument("prompt", nargs="*", help="texts to continue, classes of images, or what music is to be, such as "
                   '"key=G tempo=90 name=bach" (default: start from nothing)')
    p.add_argument("--prompt-file", type=Path, action="append", default=[], help="a file whose text is continued")
    p.add_argument("-n", type=int, help="samples a prompt (default 1), or images of all classes (default 16)")
    p.add_argument("--seed", type=int, default=1, help="the same seed gives the same samples (default 1)")
    p.add_argument("--out", type=Path, help="where images and music go (default: the model folder's samples/)")
    p.add_argument("--runtime", choices=("torch", "onnx"), default="torch", help="what runs the network")
    for name, (kind, about) in SAMPLING.items():
        p.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"{about} (default: the recipe's)")
    _exploring_arguments(p)
    _music_arguments(p)
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key of the [sampling] table")
    p.add_argument("--suffix", help="of a model that learnt to: fill in what stands between the prompt and this text")
    p.add_argument("--stop", action="append", help="a text that ends the sample; may be given more than once")


def _music_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--melody", type=Path, metavar="FILE", help="of music: a MIDI file whose highest notes it has")
    p.add_argument("--beginning", type=Path, metavar="FILE", help="of music: a MIDI file that the piece begins with")
    p.add_argument("--soundfont", default="", metavar="FILE", help="of music: an SF2 file to play with (default: the "
                   "built-in synthesiser)")


def _exploring_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--mixing", metavar="RxC", help="of a stylegan2: a matrix of images with mixed styles, such as 6x6")
    p.add_argument("--cut", default="middle", help="what a column of --mixing gives: coarse, middle, fine, or its "
                   "first layer (default: middle)")
    p.add_argument("--walk", type=Path, metavar="FILE", help="of an adversarial model: a .gif or .mp4 of a way through "
                   "samples and classes")
    p.add_argument("--stops", type=int, default=8, help="samples that --walk goes through (default 8)")
    p.add_argument("--seconds", type=float, default=8.0, help="how long --walk lasts (default 8)")
    p.add_argument("--project", type=Path, metavar="IMAGE", help="of an adversarial model: look for this image among "
                   "what it can make, in so many --steps (default 500)")
    p.add_argument("--fit", action="store_true", help="bring the --project image to the model's size and colour")
    p.add_argument("--each", action="store_true", help="a style for each layer in --project: nearer, even to what the "
                   "model cannot make")


def _recipe_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("recipe", help="a recipe file, or a shipped recipe's name")
    p.add_argument("overrides", nargs="*", metavar="key.sub=value", help=OVERRIDES)
    p.add_argument("--out", type=Path, help="the model folder (default: runs/NAME)")


def _export_arguments(p: argparse.ArgumentParser) -> None:
    _folder_argument(p)
    p.add_argument("--to", choices=("onnx", "huggingface"), required=True)


def _serve_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("folders", type=Path, nargs="+", help="model folders")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    p.add_argument("--port", type=int, default=8000)


def _compare_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("folders", type=Path, nargs="+", help="two or more model folders")
    p.add_argument("--out", type=Path, help="where compare.md and compare.png go (default: compare/)")
    p.add_argument("--no-check", action="store_true", help="do not check a model that was not checked: say so and end")


def _demo_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--out", type=Path, default=Path("runs"), help="where the demo's folders go (default: runs)")


def _folder_argument(p: argparse.ArgumentParser) -> None:
    p.add_argument("folder", type=Path, help="a model folder")


VERBS = (  # function, what it does, an example, its arguments
    (new, "write a commented recipe and point it at your files", "gpt notes/ --out notes.toml", _new_arguments),
    (plan, "say what training will take: memory, time, disk, largest batch", "notes.toml training.batch=64",
     _recipe_arguments),
    (train, "train from a recipe and write the model folder; goes on where an interrupted run stopped",
     "notes.toml training.steps=500", _train_arguments),
    (check, "measure a model on held-out documents, beside floors, and look for copies", "runs/notes samples=16",
     _check_arguments),
    (generate, "make text, images or music", 'runs/notes "Once upon" --temperature 0.7 --max-tokens 100 --seed 3\n'
     "  handmill generate runs/digits 7 -n 16 --steps 20 --out sevens\n"
     "  handmill generate runs/stylegan2 --walk walk.gif --truncation 0.7\n"
     '  handmill generate runs/chorales "key=G" -n 4 --melody tune.mid --out harmonised', _generate_arguments),
    (export, "write the model for another runtime, compared with the original on the spot", "runs/notes --to onnx",
     _export_arguments),
    (serve, "serve model folders over an OpenAI-shaped REST interface on this machine", "runs/notes --port 8000",
     _serve_arguments),
    (card, "write the model card as Markdown and HTML", "runs/notes", _folder_argument),
    (compare, "set models of the same data side by side, of any family: one table and one picture",
     "runs/vae runs/ddpm runs/latent-diffusion --out comparison", _compare_arguments),
    (demo, "the whole road on text that every Python has, in two minutes", "", _demo_arguments))


def parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The whole parser, and each verb's own, with its options and an example."""
    top = argparse.ArgumentParser(
        "handmill", description="Your files in; a generative model you own out.",
        epilog="The road: new -> plan -> train -> check -> generate -> export -> serve, and compare and card. "
               "Each verb has its own --help with an example.")
    top.add_argument("--version", action="version", version=f"handmill {__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    for function, about, example, arguments in VERBS:
        name = function.__name__
        sub = verbs.add_parser(name, help=about, description=about, epilog=f"example:\n  handmill {name} {example}",
                               formatter_class=argparse.RawDescriptionHelpFormatter)
        sub.set_defaults(function=function)
        arguments(sub)
    return top, verbs.choices


def _limit() -> float:
    """Bytes of addresses that this process may have (ulimit -v); inf: as many as there are."""
    if sys.platform == "win32":
        return float("inf")
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return float("inf") if limit == resource.RLIM_INFINITY else limit


def _room_for_libraries() -> None:
    """Raises UserError where `ulimit -v` leaves too little for the libraries, which would crash while they load."""
    if _limit() < LIBRARIES:
        raise UserError(f"the limit of memory (ulimit -v) is {int(_limit()) >> 20} MB, and the libraries alone take "
                        f"{LIBRARIES >> 20} MB of addresses: raise it")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; 0 when it worked, 2 with one sentence when the user has something to mend, 130 on Ctrl-C."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it when loaded: large pages for large tensors
    words = list(sys.argv[1:] if argv is None else argv)
    top, verbs = parsers()
    if words and words[0] in verbs:  # so that options and overrides may stand in any order
        args = verbs[words[0]].parse_intermixed_args(words[1:], argparse.Namespace(verb=words[0]))
    else:
        args = top.parse_args(words)
    try:
        _room_for_libraries()
        args.function(args)
    except UserError as error:
        print(f"handmill {args.verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # `handmill generate ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, MemoryError, RuntimeError, ImportError, SystemError) as error:
        said = _sentence(error)
        if said is None:
            raise
        print(f"handmill {args.verb}: {said}", file=sys.stderr)
        return 2
    return 0


def _sentence(error: Exception) -> str | None:
    """What the user has to mend where the machine refused something; None where it is no such error."""
    torn = isinstance(error, ImportError | SystemError) and _limit() < float("inf")  # a library that was half loaded
    if is_out_of_memory(error) or torn:
        return ("memory ran out: close other programs, raise the limit, or make training.batch, the network or what is "
                "asked for smaller")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        return f"{error.filename or 'a file'} cannot be written: {error.strerror}"
    return None
