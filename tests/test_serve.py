"""The server over real sockets: OpenAI's own client, streams, limits, errors, disconnects, the command's refusals."""

import dataclasses
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_code
import torch

from handmill import folder
from handmill.errors import UserError
from handmill.families import autoregressive
from handmill.families.autoregressive import Sampling, greedy
from handmill.folder import Model
from handmill.verbs import serve as verb
from handmill.verbs.fill import fill
from handmill.verbs.generate import generate

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")

from handmill.serving.engine import Busy, Engine, Job, Limits  # noqa: E402
from handmill.serving.rest import create_app  # noqa: E402


@contextmanager
def running(models: dict[str, Model], **settings: Any) -> Iterator[str]:
    """A real server on a free port, in a thread; gives its address."""
    listening = verb.bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(create_app(models, **settings), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    home = tmp_path_factory.mktemp("serve")
    return {"tiny": tiny.load(home / "tiny", sampling={"temperature": 0.7, "max_tokens": 30}),
            "letters": tiny.load(home / "letters", codec="character", network=tiny.GPT2)}


@pytest.fixture(scope="module")
def address(models: dict[str, Model]) -> Iterator[str]:
    with running(models, limits=Limits(samples=6, max_tokens=500, body=20_000)) as url:
        yield url


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def ask(address: str, **fields: Any) -> Any:
    return httpx.post(f"{address}/v1/completions", json={"model": "tiny", "prompt": "Hello"} | fields, timeout=30)


# OpenAI's client

def test_the_client_gets_the_text_that_generate_makes(client: Any, models: dict[str, Model]) -> None:
    answer = client.completions.create(model="tiny", prompt="Hello", max_tokens=40, temperature=0.9, top_p=0.95,
                                       seed=11)
    expected = generate(models["tiny"], ["Hello"], seed=11, max_tokens=40, temperature=0.9, top_p=0.95)
    assert [choice.text for choice in answer.choices] == expected
    assert answer.object == "text_completion"
    assert answer.model == "tiny"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == 6  # the end token in front, and five bytes
    assert answer.usage.completion_tokens == 40
    assert answer.usage.total_tokens == 46
    assert answer.system_fingerprint.startswith("handmill-")


def test_the_client_streams_the_same_text(client: Any, models: dict[str, Model]) -> None:
    stream = client.completions.create(model="tiny", prompt=["Hello", "x"], n=2, max_tokens=40, seed=11, stream=True,
                                       stream_options={"include_usage": True})
    texts, finishes, usage, chunks = [""] * 4, [""] * 4, None, 0
    for chunk in stream:
        chunks += 1
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert not finishes[choice.index]
            texts[choice.index] += choice.text
            finishes[choice.index] = choice.finish_reason or ""
    assert texts == generate(models["tiny"], ["Hello", "Hello", "x", "x"], seed=11, max_tokens=40)
    assert chunks > 60
    assert set(finishes) <= {"length", "stop"}
    assert usage.prompt_tokens == 8
    assert usage.completion_tokens <= 160


def test_the_client_lists_the_models(client: Any) -> None:
    listed = client.models.list().data
    assert [model.id for model in listed] == ["tiny", "letters"]
    assert abs(listed[0].created - time.time()) < 3600
    assert client.models.retrieve("letters").owned_by == "handmill"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other' here"):
        client.models.retrieve("other")


def test_the_client_uses_the_extras(client: Any, models: dict[str, Model]) -> None:
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.4}
    answer = client.completions.create(model="letters", prompt="The", seed=2, max_tokens=20, extra_body=extra)
    assert answer.choices[0].text == generate(models["letters"], ["The"], seed=2, max_tokens=20, **extra)[0]


def test_the_clients_errors_are_openais(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-5' here, only tiny, letters"):
        client.completions.create(model="gpt-5", prompt="a")
    with pytest.raises(openai.BadRequestError, match=r"temperature: .*greater than or equal to 0") as caught:
        client.completions.create(model="tiny", prompt="a", temperature=-1)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="context is 48") as caught:
        client.completions.create(model="tiny", prompt="a" * 48)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="the character 'ß'"):
        client.completions.create(model="letters", prompt="The ß")


# what an answer holds

def test_what_is_left_out_is_as_in_the_recipe(address: str, models: dict[str, Model]) -> None:
    answer = ask(address, seed=3).json()
    assert answer["choices"][0]["text"] == generate(models["tiny"], ["Hello"], seed=3)[0]
    assert answer["usage"]["completion_tokens"] <= 30
    assert ask(address, seed=3).json()["choices"] == answer["choices"]
    assert ask(address).json()["choices"] != ask(address).json()["choices"]  # no seed


def test_echo_stop_and_finish(address: str) -> None:
    plain = ask(address, seed=5, max_tokens=200).json()["choices"][0]["text"]
    stop = plain[20:22]
    cut = plain[:plain.index(stop)]
    choice = ask(address, seed=5, max_tokens=200, stop=stop, echo=True).json()["choices"][0]
    assert choice == {"index": 0, "text": "Hello" + cut, "finish_reason": "stop", "logprobs": None}
    with httpx.stream("POST", f"{address}/v1/completions", json={
            "model": "tiny", "prompt": "Hello", "seed": 5, "max_tokens": 200, "stop": ["never", stop], "echo": True,
            "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert "".join(event["choices"][0]["text"] for event in events) == "Hello" + cut
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * (len(events) - 1) + ["stop"]


def test_neutral_fields_of_other_clients_are_taken(address: str) -> None:
    neutral = {"logprobs": None, "suffix": None, "best_of": 1, "frequency_penalty": 0.0, "presence_penalty": 0,
               "logit_bias": {}, "user": "someone"}
    assert ask(address, seed=1, **neutral).json()["choices"] == ask(address, seed=1).json()["choices"]


def test_a_prompt_may_be_empty(address: str, models: dict[str, Model]) -> None:
    assert ask(address, prompt="", seed=1).json()["choices"][0]["text"] == generate(models["tiny"], [""], seed=1)[0]


# filling in the middle

@pytest.fixture(scope="module")
def filler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Model, Any]]:
    """A model that was taught to fill in the middle, and OpenAI's client of its server."""
    sampling = {"temperature": 0.7, "max_tokens": 30}
    model = tiny_code.load(tmp_path_factory.mktemp("filler") / "filler", "bpe", sampling=sampling)
    with running({"filler": model}, limits=Limits(samples=6, max_tokens=500)) as url:
        yield model, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_the_client_fills_a_gap(filler: tuple[Model, Any]) -> None:
    model, client = filler
    answer = client.completions.create(model="filler", prompt="The quick", suffix=" dog", seed=4, max_tokens=16, n=2)
    assert answer.choices[0].text == fill(model, "The quick", " dog", 4, max_tokens=16)
    assert answer.choices[1].text != answer.choices[0].text
    texts = [len(model.codec.encode(text)) for text in ("The quick", " dog")]
    assert answer.usage.prompt_tokens == sum(texts) + 4  # the marks, and the end in front
    stream = client.completions.create(model="filler", prompt="The quick", suffix=" dog", seed=4, max_tokens=16,
                                       stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


def test_a_gap_leaves_its_texts_half_of_the_context(filler: tuple[Model, Any]) -> None:
    model, client = filler
    before, after = "The quick brown fox " * 30, " jumps over the lazy dog" * 30
    answer = client.completions.create(model="filler", prompt=before, suffix=after, seed=4)
    assert answer.choices[0].text == fill(model, before, after, 4)  # 24 tokens, not the recipe's 30
    assert answer.usage.completion_tokens <= 24
    assert answer.usage.prompt_tokens <= 24
    echoed = client.completions.create(model="filler", prompt=before, suffix=after, seed=4, echo=True)
    assert echoed.choices[0].text == before + answer.choices[0].text
    with pytest.raises(openai.BadRequestError, match="leaves no room"):
        client.completions.create(model="filler", prompt="a", suffix="b", max_tokens=46)


def test_no_suffix_goes_on_with_the_text(filler: tuple[Model, Any]) -> None:
    model, client = filler
    expected = generate(model, ["The"], seed=4)[0]
    for empty in (None, ""):
        answer = client.completions.create(model="filler", prompt="The", suffix=empty, seed=4)
        assert answer.choices[0].text == expected


def test_a_model_that_was_not_taught_refuses_a_suffix(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match=r"taught to fill in the middle, and 'tiny' was not") as caught:
        client.completions.create(model="tiny", prompt="a", suffix="b")
    assert caught.value.param == "suffix"


# refusals

@pytest.mark.parametrize(("fields", "status", "says"), [
    ({"logprobs": 1}, 400, "logprobs"), ({"suffix": "x"}, 400, "suffix"), ({"best_of": 3}, 400, "best_of"),
    ({"frequency_penalty": 1}, 400, "not supported"), ({"temprature": 1}, 400, "did you mean temperature?"),
    ({"logit_bias": {"5": 1}}, 400, "logit_bias"), ({"tempo": None}, 400, "tempo is not supported"),
    ({"n": 7}, 400, "from 1 to 6"), ({"n": 0}, 400, "n: "), ({"prompt": []}, 400, "from 1 to 6"),
    ({"prompt": ["a"] * 4, "n": 2}, 400, "from 1 to 6"), ({"prompt": [1, 2]}, 400, "prompt"),
    ({"max_tokens": 0}, 400, "max_tokens"), ({"max_tokens": 501}, 400, "max_tokens is above 500"),
    ({"stop": [""]}, 400, "empty string"), ({"stop": ["a"] * 17}, 400, "at most|most allowed"),
    ({"top_p": 0}, 400, "top_p"), ({"seed": -1}, 400, "seed"), ({"seed": 2**63}, 400, "seed"),
    ({"min_p": 2}, 400, "min_p"), ({"top_k": -1}, 400, "top_k"), ({"stream": "maybe"}, 400, "stream"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty"), ({"model": None}, 400, "model"),
    ({"prompt": "a" * 30_000}, 413, "20000 bytes"), ({"prompt": "a" * 15_000}, 400, "context is 48"),
])
def test_requests_are_refused_clearly(address: str, fields: dict[str, Any], status: int, says: str) -> None:
    answer = ask(address, **fields)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert any(part in error["message"] for part in says.split("|")), error


def test_other_requests_are_refused(address: str) -> None:
    where = f"{address}/v1/completions"
    assert httpx.post(where, content=b"{", headers={"content-type": "application/json"}).status_code == 400
    assert httpx.post(where, content=b'{"model": "tiny"}', headers={"content-type": "text/plain"}).status_code == 400
    for response, status in ((httpx.get(where), 405), (httpx.get(f"{address}/v1/nothing"), 404)):
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"
    for nan in ("NaN", "Infinity", "1e999"):
        body = f'{{"model": "tiny", "temperature": {nan}}}'.encode()
        response = httpx.post(where, content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400, nan


def test_only_the_given_hosts_are_answered(models: dict[str, Model]) -> None:
    with running(models, hosts=("127.0.0.1", "localhost")) as url:
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/health", headers={"host": "evil.example"}).status_code == 400
        assert httpx.get(f"{url}/health", headers={"host": "localhost:1"}).status_code == 200


# pages

def test_health_and_the_description(address: str) -> None:
    assert httpx.get(f"{address}/health").json() == {"status": "ok", "models": ["tiny", "letters"], "waiting": 0}
    schema = httpx.get(f"{address}/openapi.json").json()
    assert {"/v1/models", "/v1/completions", "/health"} <= set(schema["paths"])
    fields = schema["components"]["schemas"]["Completion"]["properties"]
    page = httpx.get(address, follow_redirects=True)
    assert page.url.path == "/docs"
    assert all(f"<code>{name}</code>" in page.text for name in fields)
    assert f"curl -s {address}/v1/completions" in page.text
    assert "What is left out is as in the model&#x27;s recipe" in page.text
    assert "src=" not in page.text  # the page loads nothing
    assert "<script" not in page.text
    assert "<link" not in page.text


# the queue

class Slow:
    """A network that waits for a permit before each call, and counts calls."""

    def __init__(self, network: Any) -> None:
        self.network, self.settings, self.padded = network, network.settings, network.padded
        self.permits, self.calls = threading.Semaphore(0), 0

    def __call__(self, tokens: torch.Tensor, state: Any = None) -> Any:
        self.calls += 1
        self.permits.acquire()
        return self.network(tokens, state)


@pytest.fixture
def slow(models: dict[str, Model]) -> Iterator[Slow]:
    network = Slow(models["tiny"].network)
    yield network
    network.permits.release(10_000)


def until(condition: Any) -> None:
    """Wait until the condition holds; fail after a time far longer than it needs."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def waiting(url: str) -> int:
    count: int = httpx.get(f"{url}/health").json()["waiting"]
    return count


def test_a_full_queue_refuses_and_disconnects_free_it(models: dict[str, Model], slow: Slow) -> None:
    model = dataclasses.replace(models["tiny"], network=slow)
    with running({"tiny": model}, limits=Limits(waiting=2)) as url:
        body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 50, "seed": 1}).encode()
        streamed = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 50, "stream": True}).encode()
        first = post(url, body)
        until(lambda: slow.calls == 1)
        second, third = post(url, body), post(url, streamed)
        until(lambda: waiting(url) == 2)
        refused = ask(url)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        with pytest.raises(openai.RateLimitError, match="2 requests are waiting already"):
            openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0).completions.create(
                model="tiny", prompt="a")
        second.close()  # one client in the queue goes away, of each kind
        until(lambda: waiting(url) == 1)
        third.close()
        until(lambda: waiting(url) == 0)
        first.close()  # and then the one being answered, after its token
        answer: list[Any] = []
        last = threading.Thread(target=lambda: answer.append(ask(url, prompt="a", max_tokens=5, seed=1)))
        last.start()
        until(lambda: waiting(url) == 1)
        slow.permits.release(100)
        last.join()
        assert answer[0].json()["choices"][0]["text"] == generate(models["tiny"], ["a"], seed=1, max_tokens=5)[0]
        assert slow.calls < 12  # the abandoned requests would have taken 50 calls each


def post(url: str, body: bytes) -> socket.socket:
    """Send a completion request and keep the connection open."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                       b"Content-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body)
    return connection


def test_requests_are_answered_in_order(models: dict[str, Model]) -> None:
    done: list[int] = []
    engine, finished = Engine(waiting=10), threading.Semaphore(0)

    def emit(number: int, item: Any) -> None:
        if item is None:
            done.append(number)
            finished.release()

    def work(tokens: int) -> Any:
        return lambda _dropped: autoregressive.generate(models["tiny"].network, models["tiny"].codec, ["a"],
                                                        Sampling(max_tokens=tokens), 1)

    for number in range(8):
        engine.submit(Job(work(1 + 5 * (8 - number)), lambda item, number=number: emit(number, item)))
    for _ in range(8):
        assert finished.acquire(timeout=20)
    assert done == list(range(8))
    engine.close()
    with pytest.raises(Busy):
        engine.submit(Job(work(1), lambda item: None))


def test_a_failing_request_is_answered_and_does_not_end_the_server(models: dict[str, Model]) -> None:
    class Broken:
        settings, padded = models["tiny"].network.settings, models["tiny"].network.padded

        def __call__(self, tokens: torch.Tensor, state: Any = None) -> Any:
            raise RuntimeError("out of luck")

    broken = dataclasses.replace(models["tiny"], network=Broken())
    with running({"broken": broken, "tiny": models["tiny"]}) as url:
        answer = ask(url, model="broken")
        assert answer.status_code == 500
        assert answer.json()["error"]["message"] == "RuntimeError: out of luck"
        streamed = ask(url, model="broken", stream=True)
        assert "out of luck" in streamed.text
        assert streamed.text.endswith("data: [DONE]\n\n")
        assert ask(url, max_tokens=3).status_code == 200


# the command

def test_the_greedy_tokens_of_training_must_be_repeated(tmp_path: Path, models: dict[str, Model]) -> None:
    prompt = [models["tiny"].codec.end, 70, 80, 90]
    tokens = greedy(models["tiny"].network, prompt, 20)
    good = tiny.write(tmp_path / "good", training={"witness": {"prompt_tokens": prompt, "tokens": tokens}})
    assert list(verb.load([good])) == ["good"]
    wrong = [*tokens[:-1], (tokens[-1] + 1) % 256]
    bad = tiny.write(tmp_path / "bad", training={"witness": {"prompt_tokens": prompt, "tokens": wrong}})
    with pytest.raises(UserError, match="bad does not answer as its receipt says"):
        verb.load([good, bad])


def test_folders_that_cannot_be_served(tmp_path: Path, models: dict[str, Model]) -> None:
    one = models["tiny"].path
    shutil.copytree(one, tmp_path / "elsewhere" / one.name)
    with pytest.raises(UserError, match="would both be named 'tiny'"):
        verb.load([one, tmp_path / "elsewhere" / one.name])
    with pytest.raises(UserError, match="at least one"):
        verb.load([])
    weights = tmp_path / "elsewhere" / one.name / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"weights\.safetensors is not as it was written"):
        verb.serve([tmp_path / "elsewhere" / one.name])
    with pytest.raises(UserError, match="is not a folder"):
        verb.serve([tmp_path / "nothing"])


def test_a_busy_port_is_named(models: dict[str, Model]) -> None:
    with closing(verb.bind("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} of 127\.0\.0\.1 cannot be used .*--port"):
            verb.serve([models["tiny"].path], port=port)
    for host, port in (("no.such.host.invalid", 80), ("127.0.0.1", 70_000), ("127.0.0.1", -1)):
        with pytest.raises(UserError, match=f"{host}:{port} is no address here"):
            verb.bind(host, port)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_the_command_serves_until_interrupted(models: dict[str, Model], host: str) -> None:
    program = ("import sys; from handmill.verbs.serve import serve; "
               f"serve([{str(models['tiny'].path)!r}], host={host!r}, port=0)")
    server = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        line = server.stderr.readline()
        if host == "0.0.0.0":
            assert line.startswith("warning: whoever reaches 0.0.0.0")
            line = server.stderr.readline()
        assert line.startswith("serving tiny at http://")
        url = line.split()[3].removesuffix("/v1,").replace("0.0.0.0", "127.0.0.1")
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        text = client.completions.create(model="tiny", prompt="a", seed=1, max_tokens=9).choices[0].text
        assert text == generate(models["tiny"], ["a"], seed=1, max_tokens=9)[0]
        assert httpx.get(f"{url}/health", headers={"host": "evil.example"}).status_code == (
            400 if host == "127.0.0.1" else 200)
        server.send_signal(2)
        rest = server.communicate(timeout=20)[1]
        assert server.returncode == 0, rest
        assert rest == ""
    finally:
        server.kill()
        server.wait()


def test_the_receipt_names_the_weights_served(address: str, models: dict[str, Model]) -> None:
    digest = folder.fingerprint(models["tiny"].path / "weights.safetensors")["sha256"]
    assert ask(address, max_tokens=1).json()["system_fingerprint"] == f"handmill-{digest[:12]}"
