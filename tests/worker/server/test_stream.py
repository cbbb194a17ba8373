"""Stream events: any split of the bytes parses, idle streams live, and failure is said."""

import asyncio
import itertools
import json

import openai
from hypothesis import given
from hypothesis import strategies as st
from openai._streaming import SSEDecoder

from tilefleet_worker.config import parse_args
from tilefleet_worker.request import Delta, Request, SamplingParams
from tilefleet_worker.server.answer import Answer, Piece
from tilefleet_worker.server.answers import AnswerDesk, Job
from tilefleet_worker.server.chat_format import ChatFormat
from tilefleet_worker.server.formats import Envelope, TextFormat, event
from tilefleet_worker.server.metrics import Metrics
from tilefleet_worker.server.protocol import StreamOptions
from tilefleet_worker.server.replies import draining
from tilefleet_worker.server.state import WorkerState
from tilefleet_worker.server.stream import EventStream
from tilefleet_worker.tokenizer import Tokenizer


class StillEngine:
    """Accepts requests and computes nothing; the test delivers the deltas."""

    def __init__(self):
        self.aborted = []
        self.sink = None

    def set_sink(self, sink):
        self.sink = sink

    def submit(self, request):
        return None

    def abort(self, request_id, reason):
        self.aborted.append(request_id)


class Client:
    """The ASGI side of a client that may leave."""

    def __init__(self):
        self.sent = []
        self.left = asyncio.Event()

    async def receive(self):
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.sent.append(message)

    @property
    def body(self):
        return b"".join(message.get("body", b"") for message in self.sent)


def open_stream(tokenizer_folder, keep_alive_seconds=15.0):
    state = WorkerState(parse_args(["--model", "tiny"]))
    desk, engine = AnswerDesk(Metrics(state)), StillEngine()
    desk.connect(engine, asyncio.get_running_loop())
    tokenizer = Tokenizer.load(tokenizer_folder)
    request = Request("r-0", (1, 2), SamplingParams(max_tokens=9), 0.0)
    job = Job(desk, [Answer(0, request, tokenizer.detokenizer())])
    job.submit()
    envelope = Envelope("r", 1, "tiny", TextFormat(tokenizer))
    stream = EventStream(job, envelope, StreamOptions(), keep_alive_seconds)
    client = Client()
    task = asyncio.create_task(stream({}, client.receive, client.send))
    return desk, engine, client, task


async def test_idle_stream_gets_comments_that_clients_skip(tokenizer_folder):
    _, engine, client, task = open_stream(tokenizer_folder, keep_alive_seconds=0.01)
    await asyncio.sleep(0.1)
    engine.sink([Delta("r-0", (65,), "length")])
    await task
    assert client.body.count(b": keep-alive\n\n") >= 2
    events = list(SSEDecoder().iter_bytes(iter([client.body])))
    assert events[-1].data == "[DONE]"
    assert json.loads(events[-2].data)["choices"][0]["finish_reason"] == "length"


async def test_client_that_leaves_aborts_in_the_engine(tokenizer_folder):
    desk, engine, client, task = open_stream(tokenizer_folder)
    engine.sink([Delta("r-0", (65,), None)])
    await asyncio.sleep(0.01)
    client.left.set()
    await task
    assert engine.aborted == ["r-0"]
    assert desk.num_open == 0
    engine.sink([Delta("r-0", (65,), None)])  # a late delta finds nobody and harms nobody
    await asyncio.sleep(0.01)


async def test_cut_stream_ends_with_error_and_done(tokenizer_folder):
    desk, engine, client, task = open_stream(tokenizer_folder)
    desk.cut()
    await task
    events = [e.data for e in SSEDecoder().iter_bytes(iter([client.body]))]
    assert json.loads(events[0])["error"]["code"] == draining().code
    assert events[1:] == ["[DONE]"]
    assert engine.aborted == ["r-0"]


texts = st.text(max_size=20)


@given(texts)
def test_an_event_is_one_line_for_every_reader(text):
    data = event({"text": text + "\u2028\x85\r\n\u2029"}).decode()
    assert len(data.splitlines()) == 2
    assert json.loads(data[6:]) == {"text": text + "\u2028\x85\r\n\u2029"}


@given(st.lists(texts, min_size=1, max_size=8), st.lists(st.integers(1, 400), max_size=20))
def test_stream_parses_under_any_split_of_its_bytes(tokenizer_folder, pieces, cuts):
    envelope = Envelope("chatcmpl-1", 1, "m", ChatFormat(Tokenizer.load(tokenizer_folder)))
    chunks = [Piece(0, text, None) for text in pieces] + [Piece(0, "", "stop")]
    data = b"".join(
        event(envelope.chunk([choice]))
        for piece in chunks
        for choice in envelope.format.chunks(piece)
    )
    points = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    parts = [data[a:b] for a, b in itertools.pairwise(points)]
    found = [json.loads(e.data) for e in SSEDecoder().iter_bytes(iter(parts))]
    text = "".join(body["choices"][0]["delta"].get("content", "") for body in found)
    assert text == "".join(pieces)
    for body in found:
        openai.types.chat.ChatCompletionChunk.model_validate(body, strict=True)
