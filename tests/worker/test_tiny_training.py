"""The tiny model's training: a resumed run is the unbroken one, rows have the promised form."""

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen3ForCausalLM

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tiny-model"


@pytest.fixture(scope="module")
def training() -> SimpleNamespace:
    """The example's modules; its folder is on the path only while they are imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLE))
        import architecture
        import batches
        import conversations
        import corpus
        import loop
        import muon
        import vocabulary

    return SimpleNamespace(
        architecture=architecture,
        batches=batches,
        conversations=conversations,
        corpus=corpus,
        loop=loop,
        muon=muon,
        vocabulary=vocabulary,
    )


def small_model(training: SimpleNamespace, seed: int) -> Qwen3ForCausalLM:
    config = training.architecture.configuration()
    config.update({"num_hidden_layers": 1, "layer_types": ["full_attention"], "hidden_size": 64})
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config)


def advance(training: SimpleNamespace, model, optimizers, steps: range) -> list[float]:  # type: ignore[no-untyped-def]
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        batch = torch.randint(0, 3072, (1, 9), generator=generator)
        losses.append(training.loop.train_step(model, optimizers, batch, 1.0))
    return losses


def test_a_resumed_run_equals_an_unbroken_one(training: SimpleNamespace, tmp_path: Path) -> None:
    whole = small_model(training, seed=1)
    whole_optimizers = training.loop.make_optimizers(whole)
    expected = advance(training, whole, whole_optimizers, range(4))

    first = small_model(training, seed=1)
    optimizers = training.loop.make_optimizers(first)
    losses = advance(training, first, optimizers, range(2))
    training.loop.save(tmp_path / "run" / "checkpoint.pt", first, optimizers, 2, 5.0)
    second = small_model(training, seed=99)
    optimizers = training.loop.make_optimizers(second)
    restored = training.loop.restore(tmp_path / "run" / "checkpoint.pt", second, optimizers)
    losses += advance(training, second, optimizers, range(2, 4))

    assert restored == (2, 5.0)
    assert losses == expected
    for ours, theirs in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_shortening_a_run_before_its_decay_changes_nothing(training: SimpleNamespace) -> None:
    share = training.loop.rate_share
    assert [share(step, 400) for step in range(200)] == [share(step, 2200) for step in range(200)]
    assert share(0, 400) < share(19, 400) == 1.0 > share(300, 400) > share(399, 400) > 0


def test_orthogonalised_moves_all_singular_values_near_one(training: SimpleNamespace) -> None:
    matrix = torch.randn(96, 40, generator=torch.Generator().manual_seed(3))
    values = torch.linalg.svdvals(training.muon.orthogonalised(matrix))
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.3


def test_log_lines_after_the_checkpoint_are_dropped(
    training: SimpleNamespace, tmp_path: Path
) -> None:
    log = tmp_path / "training" / "log.jsonl"
    training.loop.cut_log(log, 0)
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    training.loop.cut_log(log, 2)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_rows_are_repeatable_and_alternate_text_and_conversation(
    training: SimpleNamespace,
) -> None:
    text = "A *generator* is a function which returns an iterator over the values it yields. "
    documents = [
        training.corpus.Document("yield", "topic", "topics.py", "# Yield\n\n" + text * 2),
        training.corpus.Document("heapq.merge", "function", "heapq.py", text),
    ]
    tokenizer = training.vocabulary.train_tokenizer(document.text for document in documents)
    exchanges = training.conversations.exchanges(documents)
    rows = training.batches.Batches.of(tokenizer, documents, exchanges, row_tokens=24, seed=5)
    batch = rows.batch(step=3, rows=4)
    assert batch.shape == (4, 25)
    assert torch.equal(batch, rows.batch(step=3, rows=4))
    assert not torch.equal(batch, rows.batch(step=4, rows=4))
    turn_start = tokenizer.token_to_id("<|im_start|>")
    assert (batch[1::2, 0] == turn_start).all()
    assert not (batch[0::2] == turn_start).any()


def test_exchanges_answer_with_the_passage_that_names_the_subject(
    training: SimpleNamespace,
) -> None:
    filler = "Other words stand before it and have nothing to do with the matter. "
    passage = "A *context manager* is an object that defines what to set up and to undo."
    document = training.corpus.Document("x", "topic", "topics.py", f"# Blocks\n\n{filler}{passage}")
    found = training.conversations.exchanges([document])
    answers = {exchange.subject: exchange.answer for exchange in found}
    assert answers == {"Blocks": filler + passage, "a context manager": passage}
    wording = found[1].question(random.Random(0))
    assert "a context manager" in wording


def test_wrapped_paragraphs_are_joined_and_code_is_left(training: SimpleNamespace) -> None:
    wrapped = (
        "Title\n=====\n\nThis line was broken at the margin of the page where\nit goes on.\n\n"
        "   code = 1\n   more = 2\n\n* an item whose text is long enough to be broken here\n  rest"
    )
    assert training.corpus.clean(wrapped) == (
        "# Title\n\nThis line was broken at the margin of the page where it goes on.\n\n"
        "   code = 1\n   more = 2\n\n* an item whose text is long enough to be broken here rest"
    )
