"""A bundle's tokenizer and chat template, read once and made when they're first needed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from glm4runtime.contract import TOKENIZER, BundleError, UserError
from glm4runtime.text.chat import ChatTemplate
from glm4runtime.text.tokenizer import Tokenizer


class BundleText:
    """What turns texts and messages into token ids and back. :meth:`close` ends the template's process."""

    def __init__(self, folder: Path, files: Mapping[str, bytes], chat_template: str | Path | None = None) -> None:
        """files: of ``folder``, see :mod:`glm4runtime.text.files`. chat_template: one in place of theirs, as text or as
        the Path of a file. Raises UserError where that can't be read, or has no Jinja in it.
        """
        self.folder = folder
        self._files = dict(files)
        self._source = None if chat_template is None else _template_source(chat_template)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer. Raises BundleError where it has none, or a broken one."""
        return Tokenizer.from_bytes(self.tokenizer_json, str(self.folder / TOKENIZER))

    @property
    def has_tokenizer(self) -> bool:
        """Whether the bundle has one; others take token ids only."""
        return TOKENIZER in self._files

    @property
    def tokenizer_json(self) -> bytes:
        """The tokenizer's file. Raises BundleError where the bundle has none."""
        if not self.has_tokenizer:
            raise BundleError(
                f"{self.folder / TOKENIZER}: missing; this bundle takes token ids only, build it from a checkpoint "
                "with one"
            )
        return self._files[TOKENIZER]

    @cached_property
    def template(self) -> ChatTemplate:
        """The bundle's chat template, or the one that was given. Raises UserError where there's none."""
        return ChatTemplate.from_files(self.folder, self._files, self._source)

    def close(self) -> None:
        """End the template's process, and let go of the tokenizer."""
        if isinstance(template := self.__dict__.pop("template", None), ChatTemplate):
            template.close()
        self.__dict__.pop("tokenizer", None)


def _template_source(template: str | Path) -> str:
    if isinstance(template, str):
        if "{" not in template:
            raise UserError(f"chat_template: {template!r:.200} has no Jinja in it; give a file as a pathlib.Path")
        return template
    try:
        return template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{template}: can't be read: {error}") from error
