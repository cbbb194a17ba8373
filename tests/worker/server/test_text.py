"""Tokens to text in pieces: equal to decoding at once, valid UTF-8, stop strings never shown."""

import json
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from tilefleet_worker.chat_template import ChatTemplate
from tilefleet_worker.errors import ModelError, RequestError
from tilefleet_worker.stop_strings import StopMatcher
from tilefleet_worker.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return Tokenizer.load(tokenizer_folder)


def sentencepiece_tokenizer():
    """▁ for spaces and byte fallback, as Llama 2 and Gemma have them."""
    words = ["<unk>", "▁", "▁a", "a", "b", "c", *[f"<0x{byte:02X}>" for byte in range(256)]]
    fast = FastTokenizer(
        models.BPE({w: n for n, w in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>")
    )
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(fast, {}, None)


def in_pieces(tokenizer, token_ids):
    detokenizer = tokenizer.detokenizer()
    return [*[detokenizer.push([token_id]) for token_id in token_ids], detokenizer.finish()]


@given(st.lists(st.integers(0, 257), max_size=60))
def test_any_tokens_in_pieces_equal_all_at_once(tokenizer, token_ids):
    """Also for bytes that are not UTF-8, and for special tokens in between."""
    assert "".join(in_pieces(tokenizer, token_ids)) == tokenizer.decode(token_ids)


@given(st.text(max_size=40))
def test_any_text_survives_the_way_through_tokens(tokenizer, text):
    assert "".join(in_pieces(tokenizer, tokenizer.encode(text))) == text


@given(st.text(st.sampled_from("abc 🎈é漢"), max_size=20))
def test_sentencepiece_in_pieces_equals_all_at_once(text):
    tokenizer = sentencepiece_tokenizer()
    ids = tokenizer.encode(text)
    assert "".join(in_pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_half_a_character_waits(tokenizer):
    ids = tokenizer.encode("a🎈b")
    assert in_pieces(tokenizer, ids) == ["a", "", "", "", "🎈", "b", ""]


def test_ids_beyond_the_vocabulary_have_no_text(tokenizer):
    assert in_pieces(tokenizer, [65, 4000]) == [*in_pieces(tokenizer, [65])[:1], "", ""]


def reference_cut(text, stops):
    """Character by character: the answer ends where a stop string is first complete."""
    for end in range(1, len(text) + 1):
        hits = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if hits:
            return text[: end - max(hits)], True
    return text, False


stop_lists = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4)


@given(st.lists(st.text("abc", max_size=4), max_size=12), stop_lists)
def test_stop_strings_do_not_depend_on_the_pieces(pieces, stops):
    matcher = StopMatcher(stops)
    shown = ""
    for piece in pieces:
        shown += matcher.push(piece)
        assert not any(stop in shown for stop in stops)
    shown += matcher.finish()
    assert (shown, matcher.matched is not None) == reference_cut("".join(pieces), stops)


def test_beginning_of_a_stop_string_is_held_back():
    matcher = StopMatcher(["STOP"])
    assert [matcher.push(piece) for piece in ("a S", "T", "OX", "STO", "P b")] == [
        "a ",
        "",
        "STOX",
        "",
        "",
    ]
    assert matcher.matched == "STOP"
    assert matcher.finish() == ""


def test_missing_and_damaged_tokenizers_are_named(tmp_path):
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="is not a tokenizer"):
        Tokenizer.load(tmp_path)


def test_chat_template_file_goes_before_the_setting(tmp_path, tokenizer_folder):
    data = (tokenizer_folder / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(data)
    settings = {"chat_template": [{"name": "default", "template": "list"}], "eos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Tokenizer.load(tmp_path).chat_template.render([]) == "list"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer.load(tmp_path).chat_template.render([]) == "file"
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(ModelError, match="does not parse"):
        Tokenizer.load(tmp_path)


def render(source, messages=()):
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>").render(list(messages))


def test_template_sees_messages_tokens_and_helpers():
    source = "{{ bos_token }}{% for m in messages %}{{ m['content'] | tojson }}{% endfor %}"
    assert render(source, [{"role": "user", "content": "<é'>"}]) == '<s>"<é\'>"'
    assert render("{% if add_generation_prompt %}go{% endif %}") == "go"
    assert render(
        "{% for i in range(3) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    ) == ("01")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "fails"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails"),
        ("{{ messages[0].content }}", "fails"),
        ("{{ 1 / 0 }}", "fails"),
        ("{% for i in range(10**12) %}{% endfor %}", "takes longer"),
        ("{% for i in range(10**12) %}{{ 'x' * 4096 }}{% endfor %}", "writes more|takes longer"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails|takes longer"),
    ],
)
def test_template_that_misbehaves_is_a_400(source, words):
    began = time.monotonic()
    with pytest.raises(RequestError) as caught:
        render(source)
    assert caught.value.status == 400
    assert caught.value.param == "messages"
    assert re.search(words, caught.value.message)  # on a busy machine the time may run out first
    assert time.monotonic() - began < 30
