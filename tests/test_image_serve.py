"""The server of images over real sockets: OpenAI's own client, every refusal, limits, turns, clients that go away."""

import base64
import dataclasses
import io
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapes
import tiny
import tiny_images
import torch
from PIL import Image
from torch import Tensor, nn

from handmill import folder
from handmill.errors import UserError
from handmill.folder import Model
from handmill.verbs import serve as verb
from handmill.verbs.generate import generate

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")

from test_serve import running, until, waiting  # noqa: E402

from handmill.serving.engine import Limits  # noqa: E402
from handmill.serving.images import encode_png  # noqa: E402

LIMITS = Limits(images=20, evaluations=50, work=400, body=5000)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    home = tmp_path_factory.mktemp("served")
    made = {kind: tiny_images.load(home / kind, kind) for kind in ("unet", "asked", "latents", "prior", "vq")}
    made["plain"] = tiny_images.load(home / "plain", "gaussian", classes=())
    drawn = shapes.folder(home / "shapes", 10)
    made |= {kind: folder.load(shapes.written(home / kind, kind, drawn)) for kind in ("dcgan", "stylegan2")}
    return made | {"text": tiny.load(home / "text")}


@pytest.fixture(scope="module")
def address(models: dict[str, Model]) -> Iterator[str]:
    with running(models, limits=LIMITS) as url:
        yield url


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def ask(address: str, **fields: Any) -> Any:
    return httpx.post(f"{address}/v1/images/generations", json={"model": "unet"} | fields, timeout=60)


def pixels(datum: Any) -> np.ndarray[Any, Any]:
    content = datum["b64_json"] if isinstance(datum, dict) else datum.b64_json
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content)), formats=("PNG",)))[..., None]


def images(answer: Any) -> np.ndarray[Any, Any]:
    assert answer.status_code == 200, answer.text
    return np.stack([pixels(datum) for datum in answer.json()["data"]])


# OpenAI's client

def test_the_client_gets_the_images_that_generate_makes(client: Any, models: dict[str, Model]) -> None:
    answer = client.images.generate(model="unet", prompt="ring", n=2, response_format="b64_json", size="16x16",
                                    quality="standard", user="someone", extra_body={"seed": 5, "guidance": 2.0})
    expected = generate(models["unet"], ["ring", "ring"], seed=5, guidance=2.0)
    assert [(pixels(datum) == image).all() for datum, image in zip(answer.data, expected, strict=True)] == [True, True]
    assert answer.created > 1_700_000_000
    assert answer.size == "16x16"
    assert answer.output_format == "png"
    assert answer.data[1].label == "ring"
    assert answer.data[1].seed == 5
    assert answer.data[1].index == 1


def test_the_clients_errors_are_openais(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="'7' is no class of this model: choose one of bar") as caught:
        client.images.generate(model="unet", prompt="7")
    assert caught.value.param == "prompt"
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError, match="there is no model 'dall-e-3' here, only unet"):
        client.images.generate(model="dall-e-3", prompt="ring")
    with pytest.raises(openai.BadRequestError, match=r"'text' makes text, which is asked for at /v1/completions"):
        client.images.generate(model="text", prompt="ring")
    with pytest.raises(openai.BadRequestError, match=r"'unet' makes image.*at /v1/images/generations"):
        client.completions.create(model="unet", prompt="ring")


def test_text_and_images_are_served_together(client: Any, models: dict[str, Model]) -> None:
    text = client.completions.create(model="text", prompt="The", seed=3, max_tokens=9).choices[0].text
    assert text == generate(models["text"], ["The"], seed=3, max_tokens=9)[0]
    listed = {model.id: model for model in client.models.list().data}
    assert list(listed) == list(models)
    assert listed["text"].medium == "text"
    assert (listed["unet"].medium, listed["unet"].size) == ("image", "16x16")
    assert listed["unet"].classes == ["bar", "dot", "ring"]
    assert client.models.retrieve("plain").classes == []
    assert client.models.retrieve("text").endpoint == "/v1/completions"


# what an answer holds

@pytest.mark.parametrize("kind", ["unet", "asked", "latents", "prior", "plain", "dcgan", "stylegan2"])
def test_every_family_answers_as_generate_does(address: str, models: dict[str, Model], kind: str) -> None:
    """And one after another in passes of 16: nothing depends on how a request is cut."""
    prompt = {"plain": "", "dcgan": "", "stylegan2": "disc"}.get(kind, "dot")
    made = images(ask(address, model=kind, prompt=prompt, n=18, seed=2)).astype(int)
    expected = np.array(generate(models[kind], [prompt] * 18, seed=2)).astype(int)
    assert np.abs(made - expected).max() <= 1
    assert len(np.unique(made, axis=0)) == 18


def test_truncation_is_asked_for(address: str, models: dict[str, Model]) -> None:
    one = {"model": "stylegan2", "label": 1, "n": 3, "seed": 2}
    made = images(ask(address, truncation=0.5, **one)).astype(int)
    expected = np.array(generate(models["stylegan2"], ["disc"] * 3, seed=2, truncation=0.5)).astype(int)
    assert np.abs(made - expected).max() <= 1
    assert (made != images(ask(address, **one))).any()
    usual = images(ask(address, model="dcgan", truncation=0, n=3, seed=2))
    assert (usual == usual[0]).all()
    notes = ask(address, truncation=0.5, **one).json()["data"][0]["b64_json"]
    shown = Image.open(io.BytesIO(base64.b64decode(notes))).text["recipe"]  # type: ignore[attr-defined]
    assert "truncation = 0.5" in shown


def test_the_seed_decides(address: str) -> None:
    first = ask(address, seed=3, n=2)
    assert (images(first) == images(ask(address, seed=3, n=2))).all()
    assert (images(first)[0] == images(ask(address, seed=3))[0]).all()
    assert (images(first) != images(ask(address, seed=4, n=2))).any()
    one, two = ask(address), ask(address)  # no seed: another each time, and told
    assert (images(one) != images(two)).any()
    told = one.json()["data"][0]["seed"]
    assert (images(ask(address, seed=told)) == images(one)).all()


def test_an_image_says_how_it_was_made(address: str, models: dict[str, Model]) -> None:
    answer = ask(address, label=1, seed=9, n=2, steps=3, sampler="heun").json()
    notes = Image.open(io.BytesIO(base64.b64decode(answer["data"][1]["b64_json"]))).text  # type: ignore[attr-defined]
    digest = folder.fingerprint(models["unet"].path / "weights.safetensors")["sha256"]
    assert (notes["class"], notes["seed"], notes["index"], notes["weights"]) == ("dot", "9", "1", digest)
    assert "steps = 3" in notes["recipe"]
    assert 'sampler = "heun"' in notes["recipe"]
    assert answer["system_fingerprint"] == f"handmill-{digest[:12]}"
    assert answer["model"] == "unet"
    assert set(answer["data"][0]) == {"b64_json", "seed", "index", "label"}


def test_a_class_by_name_number_or_not_at_all(address: str) -> None:
    named = images(ask(address, prompt="ring", seed=1))
    both = {"prompt": "ring", "label": "ring"}
    for fields in ({"label": "ring"}, {"label": 2}, {"prompt": "ring", "label": 2}, both):
        assert (images(ask(address, seed=1, **fields)) == named).all()
    anyone = ask(address, seed=1)
    assert anyone.json()["data"][0]["label"] is None
    assert (images(anyone) != named).any()
    assert (images(ask(address, prompt="", label=None, seed=1)) == images(anyone)).all()


def test_neutral_fields_of_other_clients_are_taken(address: str) -> None:
    neutral = {"quality": "auto", "style": None, "background": "opaque", "moderation": "low", "stream": False,
               "output_compression": 100, "output_format": "png", "size": "auto", "user": "x", "safety_identifier": "y",
               "response_format": None, "partial_images": 0}
    assert (images(ask(address, seed=1, **neutral)) == images(ask(address, seed=1))).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_the_png_holds_the_pixels(channels: int) -> None:
    image = np.random.default_rng(1).integers(0, 256, (5, 7, channels), np.uint8)
    read = Image.open(io.BytesIO(encode_png(image, {"class": "réd 北"})))
    assert read.size == (7, 5)
    assert (np.asarray(read).reshape(image.shape) == image).all()
    assert read.text == {"class": "réd 北"}  # type: ignore[attr-defined]


# refusals

@pytest.mark.parametrize(("fields", "status", "says"), [
    ({"response_format": "url"}, 400, "nothing is kept that a link could lead to"),
    ({"response_format": 5}, 400, "response_format"),
    ({"output_format": "webp"}, 400, 'output_format = \'webp\' is not supported here: ask for "png"'),
    ({"size": "1024x1024"}, 400, 'ask for "16x16" (width x height) or "auto"'), ({"size": "16"}, 400, "16x16"),
    ({"n": 0}, 400, "n: "), ({"n": 21}, 400, "n is above 20, the most allowed"), ({"n": 2.5}, 400, "n: "),
    ({"steps": 0}, 400, "steps: "), ({"steps": 51}, 400, "evaluate the network 51 times, above 50"),
    ({"steps": 26, "sampler": "heun"}, 400, "with heun evaluate the network 51 times"),
    ({"n": 20, "steps": 21}, 400, "above 400 evaluations, the most allowed: ask for at most 19 images"),
    ({"n": 20, "steps": 20, "guidance": 2}, 400, "20 images of 40 evaluations each"),
    ({"sampler": "magic"}, 400, "sampler"), ({"guidance": -1}, 400, "guidance"), ({"guidance": 2000}, 400, "guidance"),
    ({"temperature": 0.5}, 400, "temperature is no setting of this model, which has steps, guidance, sampler"),
    ({"model": "asked", "steps": 5}, 400, "steps is no setting of this model, which has temperature"),
    ({"prompt": "cat"}, 400, "'cat' is no class of this model"), ({"label": "cat"}, 400, "is no class"),
    ({"label": 3}, 400, "label = 3 is no class of this model, which has 3"), ({"label": -1}, 400, "label = -1"),
    ({"label": True}, 400, "label"), ({"label": 1.0}, 400, "label"), ({"prompt": ["ring"]}, 400, "prompt"),
    ({"prompt": "ring", "label": "bar"}, 400, "prompt and label name two classes"),
    ({"prompt": "x" * 1001}, 400, "prompt: "), ({"label": "x" * 1001}, 400, "label"),
    ({"prompt": "x" * 6000}, 413, "5000 bytes"),
    ({"model": "plain", "prompt": "bar"}, 400, "was not told classes"), ({"model": "plain", "label": 0}, 400, "has 0"),
    ({"model": "vq"}, 400, "has no prior"), ({"seed": -1}, 400, "seed"), ({"seed": 2**63}, 400, "seed"),
    ({"quality": "hd"}, 400, "quality is not supported here"), ({"style": "vivid"}, 400, "style is not supported"),
    ({"background": "transparent"}, 400, "background"), ({"stream": True}, 400, "stream is not supported"),
    ({"partial_images": 2}, 400, "partial_images"), ({"guidence": 2}, 400, "did you mean guidance?"),
    ({"image": "abc"}, 400, "image is not supported here"), ({"model": None}, 400, "model"),
    ({"model": "other"}, 404, "there is no model 'other'"), ({"model": "text"}, 400, "at /v1/completions"),
    ({"model": "stylegan2", "truncation": 5}, 400, "truncation: Input should be less than or equal to 2"),
    ({"model": "stylegan2", "truncation": -0.5}, 400, "truncation: "), ({"truncation": 1}, 400, "truncation is no"),
    ({"model": "stylegan2", "temperature": 0.5}, 400, "temperature is no setting of this model, which has truncation"),
    ({"model": "stylegan2", "prompt": "circle"}, 400, "'circle' is no class of this model: choose one of cross, disc"),
    ({"model": "dcgan", "prompt": "disc"}, 400, "was not told classes"), ({"model": "dcgan", "n": 21}, 400, "above 20"),
    ({"model": "prior", "top_k": -1}, 400, "top_k"), ({"model": "prior", "guidance": 2}, 400, "guidance is no"),
])
def test_requests_are_refused_clearly(address: str, fields: dict[str, Any], status: int, says: str) -> None:
    answer = ask(address, **fields)
    assert answer.status_code == status, answer.text[:300]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert says in error["message"], error


def test_a_row_of_codes_counts_its_codes(models: dict[str, Model]) -> None:
    with running({"prior": models["prior"]}, limits=Limits(work=40)) as url:  # 16 codes an image
        assert ask(url, model="prior", n=2).status_code == 200
        assert "3 images of 16 evaluations" in ask(url, model="prior", n=3).json()["error"]["message"]


# pages

def test_the_description_shows_what_can_be_asked(address: str, models: dict[str, Model]) -> None:
    page = httpx.get(f"{address}/docs").text
    fields = httpx.get(f"{address}/openapi.json").json()["components"]["schemas"]["Generation"]["properties"]
    assert {"prompt", "label", "size", "steps", "guidance", "sampler"} <= set(fields)
    assert all(f"<code>{name}</code>" in page for name in fields)
    assert f"curl -s {address}/v1/images/generations" in page
    assert "&quot;model&quot;: &quot;unet&quot;" in page
    assert "&quot;model&quot;: &quot;text&quot;" in page
    assert "<code>unet</code> (image)" in page
    with running({"unet": models["unet"]}) as url:
        page = httpx.get(f"{url}/docs").text
        assert "/v1/images/generations" in page
        assert "/v1/completions" not in page


# turns

class Slow(nn.Module):
    """A network that waits for a permit before each call, and counts calls."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.permits, self.calls = network, threading.Semaphore(0), 0

    def forward(self, x: Tensor, noise: Tensor, condition: dict[str, Tensor]) -> Tensor:
        self.calls += 1
        self.permits.acquire()
        made: Tensor = self.network(x, noise, condition)
        return made


def post(url: str, **fields: Any) -> Any:
    """Send a request and keep the connection open."""
    import socket

    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"model": "unet"} | fields).encode()
    connection = socket.create_connection((host, int(port)))
    connection.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                       b"Content-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body)
    return connection


def test_clients_that_go_away_free_the_queue_and_the_network(models: dict[str, Model]) -> None:
    slow = Slow(models["unet"].network).eval()
    with running({"unet": dataclasses.replace(models["unet"], network=slow), "text": models["text"]},
                 limits=Limits(waiting=2)) as url:
        try:
            first = post(url, steps=500)
            until(lambda: slow.calls == 1)
            second, third = post(url, steps=500), post(url, n=60, steps=300)
            until(lambda: waiting(url) == 2)
            refused = ask(url)
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
            assert httpx.post(f"{url}/v1/completions", json={"model": "text"}).status_code == 429  # one queue for all
            second.close()
            until(lambda: waiting(url) == 1)
            third.close()
            until(lambda: waiting(url) == 0)
            first.close()  # while its first step is being made: left before the second
            answer: list[Any] = []
            last = threading.Thread(target=lambda: answer.append(ask(url, prompt="bar", seed=1)))
            last.start()
            until(lambda: waiting(url) == 1)
            slow.permits.release(20)
            last.join()
            assert (images(answer[0])[0] == generate(models["unet"], ["bar"], seed=1)[0]).all()
            assert slow.calls < 10  # the abandoned requests would have taken hundreds of calls each
        finally:
            slow.permits.release(10_000)


def test_many_at_once_get_each_their_own(address: str, models: dict[str, Model]) -> None:
    expected = {seed: generate(models["unet"], ["ring"], seed=seed)[0] for seed in range(8)}
    text = generate(models["text"], ["The"], seed=1, max_tokens=9)[0]

    def image(seed: int) -> Any:
        return images(ask(address, prompt="ring", seed=seed))[0]

    def words(_: int) -> Any:
        body = {"model": "text", "prompt": "The", "seed": 1, "max_tokens": 9}
        return httpx.post(f"{address}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]

    with ThreadPoolExecutor(12) as pool:
        made, said = pool.map(image, expected), pool.map(words, range(4))
        assert all((one == two).all() for one, two in zip(made, expected.values(), strict=True))
        assert list(said) == [text] * 4


def test_a_failing_request_is_answered_and_does_not_end_the_server(models: dict[str, Model]) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, *_: Any) -> Tensor:
            raise RuntimeError("out of luck")

    with running({"broken": dataclasses.replace(models["unet"], network=Broken().eval()),
                  "unet": models["unet"]}) as url:
        answer = ask(url, model="broken")
        assert answer.status_code == 500
        assert answer.json()["error"]["message"] == "RuntimeError: out of luck"
        assert ask(url).status_code == 200


# the command

def test_what_is_not_as_trained_or_makes_nothing_is_not_served(models: dict[str, Model], tmp_path: Path) -> None:
    from handmill import families

    unet = models["unet"]
    with pytest.raises(UserError, match="is an autoencoder of codes, which has nothing to draw them from"):
        verb.load([models["vq"].path])
    kept = families.witness(unet.network, unet.codec, None, unet.recipe)
    for name, by in (("good", 0.0), ("bad", 1.0)):
        answer = [value + by * (i == 0) for i, value in enumerate(kept["answer"])]
        folder.write(tmp_path / name, unet.recipe, folder.weights_of(unet.network), unet.codec, {},
                     {"witness": {"answer": answer}})
    assert list(verb.load([tmp_path / "good"])) == ["good"]
    with pytest.raises(UserError, match="bad does not answer as its receipt says"):
        verb.load([tmp_path / "bad"])
