"""Sphinx directive that writes the API reference from `unmask.__all__`.

    ```{api-reference}
    ```

Autodoc reads the docstring of every public name. Docstrings of this project are plain text with arguments as `name:
meaning`. `plain_docstring` converts them to reStructuredText and escapes markup characters.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, get_args, get_origin

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.inspect import stringify_signature

import unmask


def reference() -> str:
    """Return Markdown with one autodoc entry for each public name, in alphabetical order."""
    entries = []
    for name in sorted(unmask.__all__):
        value = getattr(unmask, name)
        if inspect.isclass(value):
            entries.append(f".. autoclass:: unmask.{name}\n   :members:\n")
        elif callable(value):
            entries.append(f".. autofunction:: unmask.{name}\n")
        else:
            entries.append(f".. py:data:: unmask.{name}\n   :type: {type(value).__name__}\n")
    return "\n".join(["```{eval-rst}", *entries, "```"])


def plain_docstring(lines: list[str], parameters: Iterable[str] = ()) -> list[str]:
    """Return the lines of a plain docstring as reStructuredText.

    lines: as autodoc passes them, without the indentation of the source. parameters: names of arguments, whose `name:
    meaning` becomes a list entry.
    """
    text = "\n".join(lines).strip("\n")
    result: list[str] = []
    for block in re.split(r"\n\s*\n", text):
        heading, *body = block.split("\n")
        if heading in ("Args:", "Raises:") and body:
            result += [*([f"{heading}", ""] if heading == "Raises:" else []), *_entries(body), ""]
        elif _is_code([heading, *body]):
            result += ["::", "", *("    " + line for line in (heading, *body)), ""]
        else:
            sentence = " ".join(line.strip() for line in (heading, *body))
            for part in _split_arguments(sentence, parameters):
                result += [part, ""]
    return result


def _entries(body: list[str]) -> Iterator[str]:
    """Yield a list entry for each `name: meaning` of an `Args:` block. Indented lines continue an entry."""
    text = inspect.cleandoc("\n" + "\n".join(body))
    for entry in re.split(r"\n(?=\S)", text):
        name, _, meaning = " ".join(entry.split()).partition(": ")
        yield f"* **{name}**: {_escape(meaning)}"


def _split_arguments(text: str, parameters: Iterable[str]) -> Iterator[str]:
    """Yield the text of a paragraph, then one list entry for each `name: meaning` in it."""
    names = "|".join(sorted(map(re.escape, parameters), key=len, reverse=True)) or "(?!)"
    starts = list(re.finditer(rf"(?:^|(?<=[.;] ))(?:((?:{names})(?:, (?:{names}))*): |(?=Raises [A-Z]))", text))
    ends = [*(start.start() for start in starts), len(text)]
    if before := text[: ends[0]].strip():
        yield _escape(before)
    for start, end in zip(starts, ends[1:], strict=True):
        body = _escape(text[start.end() : end].strip())
        yield f"* **{start[1]}**: {body}" if start[1] else body


def _is_code(body: list[str]) -> bool:
    """Return whether a block shows code or output rather than sentences."""
    indented = all(line.startswith("  ") for line in body if line)
    return indented and any(
        re.match(r"\s*(>>> |unmask |python |import |from )|\s*\S.*\S {3,}\S", line) for line in body
    )


def _escape(text: str) -> str:
    parts = re.split(r"(`+[^`]+`+)", text)
    plain = (re.sub(r"([\\*_|])", r"\\\1", part) for part in parts[::2])
    code = (f"``{part.strip('`')}``" for part in parts[1::2])
    return "".join(piece for pair in zip(plain, [*code, ""], strict=True) for piece in pair)


def plain_signature(value: Any) -> inspect.Signature:
    """Return the signature of a callable without the metadata of `Annotated` types."""
    signature = inspect.signature(value)
    parameters = [each.replace(annotation=_plain_type(each.annotation)) for each in signature.parameters.values()]
    return signature.replace(parameters=parameters, return_annotation=_plain_type(signature.return_annotation))


def _plain_type(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _process_docstring(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    parameters = inspect.signature(value).parameters if callable(value) else ()
    lines[:] = plain_docstring(lines, parameters)


def _process_signature(app: Sphinx, what: str, name: str, value: Any, *_: Any) -> tuple[str, str] | None:
    if what != "function":
        return None
    text = stringify_signature(plain_signature(value), unqualified_typehints=True)
    arguments, _, result = text.rpartition(") -> ")
    return (arguments + ")", result) if arguments else (text, "")


class ApiReference(SphinxDirective):
    """Directive `api-reference`: one entry for each public name of the package."""

    def run(self) -> list[nodes.Node]:
        """Return the entries of all public names."""
        return self.parse_text_to_nodes(reference())


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive and the conversion of docstrings with Sphinx."""
    app.add_directive("api-reference", ApiReference)
    app.connect("autodoc-process-docstring", _process_docstring)
    app.connect("autodoc-process-signature", _process_signature)
    return {"parallel_read_safe": True}
