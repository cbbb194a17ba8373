"""The text: Python's own documentation topics and the docstrings of its standard library.

Knows where the text lies and how it is cleaned; knows no tokenizer and no model. All text comes
from one CPython installation and is under the PSF licence; files that carry a notice of another
licence are left out. `manifest()` names every file read with its SHA-256: a run can be repeated.
"""

import ast
import hashlib
import itertools
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["topic", "module", "class", "function"]
EXCLUDED_PARTS = frozenset(
    [
        *("test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload"),
        *("ensurepip", "lib2to3", "turtledemo", "idlelib", "tkinter", "distutils", "encodings"),
        *("pydoc_data", "__pycache__"),
        # Near-equal doctests, drawing commands, tables: little prose for their size.
        *("turtle.py", "_pydecimal.py", "nntplib.py", "sre_parse.py"),
    ]
)
OTHER_LICENCE = re.compile(
    r"Permission to use, copy|Redistribution and use|Permission is hereby granted|"
    r"Licensed under|free software; you can|All rights reserved",
    re.IGNORECASE,
)
MIN_DOCSTRING_CHARACTERS = 60  # shorter ones ("Return self.") teach form, not content
WRAPPED_LINE_CHARACTERS = 50  # a shorter line was ended by its author, not by the margin
REPEATED_SHARE = 0.5  # of a topic's paragraphs: so much in a longer one makes it a repeat
HEADING = re.compile(r"^(?P<title>\S.*)\n(?P<mark>[*=\-~^\"])(?P=mark){2,}$", re.MULTILINE)
BULLET = re.compile(r"^(\*|-|\d+\.|\(\w\))\s")


@dataclass(frozen=True, slots=True)
class Document:
    """One piece of text with a name.

    name: "yield" for a topic, "heapq.nlargest" for a docstring. source: path below the standard
    library.
    """

    name: str
    kind: Kind
    source: str
    text: str

    @property
    def held_out(self) -> bool:
        """Kept for validation: about 5 % of the documents, by a hash of the name."""
        return hashlib.sha256(self.name.encode()).digest()[1] < 13  # 13 of 256: 5 %


def standard_library() -> Path:
    """Folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def documents(library: Path) -> list[Document]:
    """All documents, in order of source and position; equal texts and repeated topics once."""
    found = [*_without_repeats(list(_topics(library))), *_docstrings(library)]
    return list({document.text: document for document in reversed(found)}.values())[::-1]


def manifest(library: Path, found: list[Document]) -> list[dict[str, str | int]]:
    """One entry a source file: path, SHA-256 of its bytes, number of documents and characters."""
    entries: list[dict[str, str | int]] = []
    for source in sorted({document.source for document in found}):
        texts = [document.text for document in found if document.source == source]
        digest = hashlib.sha256((library / source).read_bytes()).hexdigest()
        entries.append(
            {
                "path": source,
                "sha256": digest,
                "documents": len(texts),
                "characters": sum(map(len, texts)),
            }
        )
    return entries


def clean(text: str) -> str:
    """Underlined headings become "# Title"; paragraphs broken at the margin become one line."""
    text = HEADING.sub(r"# \g<title>", text.strip())
    paragraphs = re.split(r"\n\s*\n", text)
    return "\n\n".join(_reflow(paragraph) for paragraph in paragraphs)


def sections(document: Document) -> Iterator[tuple[str, str]]:
    """(title, body) of each "# Title" part of a topic."""
    for part in re.split(r"^# ", document.text, flags=re.MULTILINE):
        title, _, body = part.partition("\n")
        if body.strip():
            yield title.strip(), body.strip()


def _reflow(paragraph: str) -> str:
    lines = [line.rstrip() for line in paragraph.split("\n") if line.strip()]
    joined = lines[:1]
    for previous, line in itertools.pairwise(lines):
        indent = len(line) - len(line.lstrip())
        hanging = bool(BULLET.match(joined[-1])) and indent in (2, 3, 4)
        flowing = indent == 0 and not joined[-1].startswith((" ", "#")) and not BULLET.match(line)
        if len(previous) >= WRAPPED_LINE_CHARACTERS and (hanging or flowing):
            joined[-1] += " " + line.strip()
        else:
            joined.append(line)
    return "\n".join(joined)


def _topics(library: Path) -> Iterator[Document]:
    path = library / "pydoc_data" / "topics.py"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            for name, text in ast.literal_eval(node.value).items():
                source = str(path.relative_to(library))
                yield Document(name, "topic", source, clean(text))


def _without_repeats(topics: list[Document]) -> Iterator[Document]:
    """Leave out each topic that a longer one contains ("with" is part of "compound").

    Otherwise half of the held-out topics would also stand in the training text.
    """
    paragraphs = {topic: set(topic.text.split("\n\n")[1:]) for topic in topics}
    kept: list[Document] = []
    for topic in sorted(topics, key=lambda topic: -len(topic.text)):
        own = paragraphs[topic]
        if all(len(own & paragraphs[longer]) < REPEATED_SHARE * len(own) for longer in kept):
            kept.append(topic)
    yield from (topic for topic in topics if topic in kept)


def _docstrings(library: Path) -> Iterator[Document]:
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if EXCLUDED_PARTS & set(parts) or parts[0].startswith(("_sysconfig", "config-")):
            continue
        code = path.read_text(encoding="utf-8")
        if not OTHER_LICENCE.search(code):
            module = ".".join(parts).removesuffix(".py").removesuffix(".__init__")
            yield from _inside(ast.parse(code), module, "module", str(Path(*parts)))


def _inside(node: ast.AST, name: str, kind: Kind, source: str) -> Iterator[Document]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node) or ""
        if len(text) >= MIN_DOCSTRING_CHARACTERS:
            yield Document(name, kind, source, clean(text))
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _inside(child, f"{name}.{child.name}", "class", source)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _inside(child, f"{name}.{child.name}", "function", source)
