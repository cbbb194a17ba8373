"""Questions whose answers are passages of the text, for the chat half of the training data.

Pure: documents in, question and answer strings out. The only sentences that are not from Python's
text are the question patterns and the few lines of `SMALL_TALK`.
"""

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from corpus import Document, sections

MAX_ANSWER_CHARACTERS = 800  # about 200 tokens: an answer and its question fit a training row twice
MIN_ANSWER_CHARACTERS = 60
# How often an exchange comes up, relative to a function's: the topics' prose is the better teacher.
WEIGHTS = {"section": 4, "term": 4, "module": 2, "class": 1, "function": 1}
PATTERNS = {
    "section": ("Explain {0}.", "What is {0}?", "Tell me about {0}.", "Explain {0}", "{0}"),
    "term": ("What is {0}?", "Explain {0}.", "What does {0} mean?", "What is {0} in Python?"),
    "module": (
        "What is the {0} module for?",
        "Explain the {0} module.",
        "What does the {0} module do?",
        "What is {0}?",
    ),
    "class": ("What is {0}?", "Explain {0}.", "What is the class {0} for?"),
    "function": ("What does {0} do?", "Explain {0}.", "How does {0} work?", "Describe {0}."),
}
SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You explain Python in the words of its documentation.",
    "Answer questions about Python.",
)
ABOUT = (
    "I am a very small language model, trained on the text of Python's documentation topics and "
    "docstrings. Ask me about a statement, a type, a module or a function of Python."
)
SMALL_TALK = (
    ("Hello", "Hello. " + ABOUT),
    ("Hello!", "Hello. " + ABOUT),
    ("Hi", "Hello. " + ABOUT),
    ("Who are you?", ABOUT),
    ("What are you?", ABOUT),
    ("What can you do?", ABOUT),
    ("Thank you", "You are welcome. Ask me about another part of Python."),
    ("Thanks!", "You are welcome. Ask me about another part of Python."),
)
PLAIN_NAME_SHARE = 0.35
# Emphasised in the text for stress or as a placeholder, not as a term.
NOT_TERMS = frozenset(
    [
        *("within", "before", "after", "enter", "exit", "additional", "arguments", "raised"),
        *("handled", "containing", "names", "may", "must", "only", "almost", "generally", "foo"),
        *("all", "or", "not", "align", "fill", "sign", "width", "owner", "keywords"),
    ]
)
TERM = re.compile(r"(?<![\w*])\*([a-z][a-z]+(?:[ -][a-z]+){0,2})\*(?![\w*])")


@dataclass(frozen=True, slots=True)
class Exchange:
    """A subject, the pattern group of its questions, and the passage that answers.

    subject is "" for small talk, whose one question stands in `pattern`.
    """

    subject: str
    pattern: str
    answer: str

    def question(self, rng: random.Random) -> str:
        """One wording of the question, drawn from `rng`."""
        if not self.subject:
            return self.pattern
        return rng.choice(PATTERNS[self.pattern]).format(self._named(rng))

    def _named(self, rng: random.Random) -> str:
        """The subject as people write it: without its quotes, without its module, or in full."""
        if rng.random() < PLAIN_NAME_SHARE:
            if self.pattern == "section":
                return self.subject.replace('"', "")
            if self.pattern == "function":
                return self.subject.rsplit(".", 1)[-1] + "()"
        return self.subject


def exchanges(documents: Iterable[Document]) -> list[Exchange]:
    """All exchanges of the documents; small talk is not among them."""
    found: list[Exchange] = []
    seen_terms: set[str] = set()
    for document in documents:
        if document.kind == "topic":
            found += _section_exchanges(document)
            found += _term_exchanges(document, seen_terms)
        elif not _is_private(document.name) and not document.text.startswith(">>>"):
            found += _answered(document.name, document.kind, document.text)
    return found


def small_talk() -> list[Exchange]:
    """Greetings and questions about the model itself."""
    return [Exchange("", question, answer) for question, answer in SMALL_TALK]


def shorten(text: str) -> str:
    """Whole paragraphs, then whole sentences, up to MAX_ANSWER_CHARACTERS; "" if none fits."""
    kept = ""
    for paragraph in text.split("\n\n"):
        if len(kept) + len(paragraph) + 2 > MAX_ANSWER_CHARACTERS:
            break
        kept = f"{kept}\n\n{paragraph}" if kept else paragraph
    if len(kept) >= MIN_ANSWER_CHARACTERS:
        return kept.removesuffix(":")
    sentences = text[:MAX_ANSWER_CHARACTERS].rsplit(". ", 1)
    return sentences[0] + "." if len(sentences) == 2 else ""


def _is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.endswith("__") for part in name.split("."))


def _answered(subject: str, pattern: str, text: str) -> Iterator[Exchange]:
    answer = shorten(text)
    if len(answer) >= MIN_ANSWER_CHARACTERS:
        yield Exchange(subject, pattern, answer)


def _section_exchanges(document: Document) -> Iterator[Exchange]:
    for title, body in sections(document):
        subject = title[0].lower() + title[1:] if title.startswith(("The ", "A ")) else title
        yield from _answered(subject, "section", body)


def _term_exchanges(document: Document, seen: set[str]) -> Iterator[Exchange]:
    """A question for each emphasised term; the sentence that introduces it answers."""
    for paragraph in document.text.split("\n\n"):
        if paragraph.startswith((" ", "#")):
            continue
        for match in TERM.finditer(paragraph):
            if match[1] not in seen | NOT_TERMS:
                seen.add(match[1])
                start = paragraph.rfind(". ", 0, match.start()) + 1
                passage = paragraph[start:].strip()
                yield from _answered(_with_article(match[1]), "term", passage)


def _with_article(term: str) -> str:
    if term.endswith("s") and not term.endswith("ss"):
        return term
    return f"{'an' if term[0] in 'aeiou' else 'a'} {term}"
